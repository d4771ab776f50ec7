"""`shunted-lit cost`: tokens and FLOPs of each granularity."""

from typing import Any

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from shunted_lit.models.feature_path import PYRAMID, check_neck_keywords
from shunted_lit.models.pyramid import ShuntedPyramid
from shunted_lit.models.shunted import ShuntedTransformer
from shunted_lit.models.timm_registry import VARIANTS
from shunted_lit.utils.checks import check_choice, check_minimum
from shunted_lit.visualization.attention import attention_costs


def cost(
    name: str,
    options: dict[str, Any] = {},  # noqa: B006 - never changed
    *,
    height: int = 40,
    width: int = 40,
) -> None:
    """Print what each granularity costs: tokens, keys and FLOPs of each head group.

    Args:
        name: neck, pyramid (the neck across levels), shunted_t, shunted_s or shunted_b.
        options: Keywords of the network, such as {"ratios": [8, 4, 2, 1], "num_heads": 4} for the neck, and
            {"channels": [256, 512, 512]} for the pyramid.
        height: Height of the input: features for the necks, of the finest level, and an image for the others.
        width: Width of the input.

    Raises:
        ValueError: An unknown name, options that the network does not take, or a size below 1.
    """
    check_choice("name", name, ("neck", PYRAMID, *VARIANTS))
    check_minimum(1, height=height, width=width)
    if name in ("neck", PYRAMID):
        check_neck_keywords({"form": PYRAMID, **options} if name == PYRAMID else options)
    with torch.device("meta"):
        try:
            if name == "neck":
                model: Any = ShuntedTransformer(**options)
                shapes = [(model.cin, height, width)]
            elif name == PYRAMID:
                model = ShuntedPyramid(**options)
                shapes = [(c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(model.channels)]
            else:
                model = timm.create_model(name, **options)
                shapes = [(model.in_chans, height, width)]
        except (RuntimeError, TypeError) as error:  # unknown keywords, or pretrained weights
            raise ValueError(f"`options` must be keywords of {name}, got {options} ({error}).") from error
        inputs = [torch.empty(1, *shape) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            costs = attention_costs(model.eval(), inputs if name == PYRAMID else inputs[0])
    attention, total = sum(sum(row.flops.values()) for row in costs), counter.get_total_flops()
    table = Table(
        title=f"{name}, {', '.join(' x '.join(map(str, (1, *shape))) for shape in shapes)}: MFLOPs of each granularity",
        caption=f"together {attention / 1e6:.0f} of the network's {total / 1e6:.0f} MFLOPs",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "r", "heads", "queries", "keys", *costs[0].flops):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in costs:
        numbers = map(str, (row.ratio, row.heads, row.queries, row.keys))
        block = row.name.rpartition(".attn.groups.")[0]
        table.add_row(block, *numbers, *(f"{flops / 1e6:.1f}" for flops in row.flops.values()))
    Console().print(table)
