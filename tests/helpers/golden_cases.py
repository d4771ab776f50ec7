"""The golden cases: weights, inputs and losses rebuilt from numpy's frozen legacy generator."""

import json
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from shunted_lit import ShuntedTransformer

FOLDER = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((FOLDER / "golden.json").read_text())}
OUTPUTS = load_file(FOLDER / "golden.safetensors")


def reference_weights(case: dict) -> dict[str, torch.Tensor]:
    """The state dict of the source, by the source's names."""
    weights = {}
    for name, shape in case["state_dict"].items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        z = np.random.RandomState((zlib.crc32(name.encode()) + case["salt"]) % 2**32).standard_normal(shape)
        if len(shape) >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        else:
            z = (1 if name.endswith(".weight") else 0) + 0.1 * z
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


def build(case: dict) -> nn.Module:
    """This package's network for a case, untrained, in eval mode."""
    if case["kind"] == "backbone":
        return timm.create_model(case["name"], **case["args"]).eval()
    arguments = {key: value for key, value in case["args"].items() if key != "norm_layer"}
    return ShuntedTransformer(norm_layer=partial(nn.LayerNorm, eps=1e-6), **arguments).eval()


def draw(salt: int, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(salt).standard_normal(shape).astype(np.float32))


def outputs(case: dict, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    if case["kind"] == "neck":
        return {"output": model(x)}
    last, stages = model.forward_intermediates(x)
    return {"output": model.forward_head(last), **{f"stage{i}": stage for i, stage in enumerate(stages, 1)}}
