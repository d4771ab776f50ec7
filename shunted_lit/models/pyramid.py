"""The neck across levels: shunted self-attention over the maps of a feature pyramid.

Queries come from every level. Head group i has the tokens of level i as keys and values, merged r_i x r_i to one: fine
groups read fine levels, coarse groups coarse ones. Heads, feed-forward layer and initial weights are defined
in `shunted.py` and `weights.py`.
"""

from collections.abc import Sequence
from os import PathLike

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from shunted_lit.models import ops
from shunted_lit.models.ops import Size
from shunted_lit.models.shunted import DetailSpecificFeedForward, ShuntedSelfAttention
from shunted_lit.models.weights import flatten, init_weights, read_checkpoint
from shunted_lit.utils.checks import check_lengths, check_minimum


class PyramidAttention(ShuntedSelfAttention):
    """Shunted self-attention (Sec. 3.1.1) of which each head group has keys and values from a level of its own."""

    def forward(self, levels: list[Tensor], sizes: list[Size]) -> list[Tensor]:  # type: ignore[override]
        """Tokens (B, N_i, C) and size (H_i, W_i) of each level -> tokens of the same shapes."""
        queries = ops.split_channels(self.q(torch.cat(levels, 1)), len(levels))
        groups = zip(self.groups, queries, levels, sizes, strict=True)
        out = torch.cat([group(q, x, size) for group, q, x, size in groups], -1)
        return list(self.proj_drop(self.proj(out)).split([x.shape[1] for x in levels], 1))


class PyramidBlock(nn.Module):
    """Transformer block over levels: x + attention(LN(x)), then x + FFN(LN(x)); the levels share all but the heads."""

    def __init__(self, dim: int, num_heads: int, ratios: Sequence[int], mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PyramidAttention(dim, num_heads, ratios)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = DetailSpecificFeedForward(dim, int(dim * mlp_ratio))

    def forward(self, levels: list[Tensor], sizes: list[Size]) -> list[Tensor]:
        """Tokens (B, N_i, C) and size (H_i, W_i) of each level -> tokens of the same shapes."""
        attended = self.attn([self.norm1(x) for x in levels], sizes)
        levels = [x + y for x, y in zip(levels, attended, strict=True)]
        return [x + self.mlp(self.norm2(x), size) for x, size in zip(levels, sizes, strict=True)]


class ShuntedPyramid(nn.Module, PyTorchModelHubMixin, library_name="shunted-lit", license="apache-2.0"):
    """A neck across the levels of a feature pyramid. It starts as an identity.

    Each map is projected to `dim` channels, gets an embedding of its level, passes the blocks together with the other
    maps, and is added to the input through a 1x1 convolution that starts at zero (ControlNet, arXiv 2302.05543).

    Args:
        channels: channels of each map, from the finest level to the coarsest; two or more.
        depth: number of blocks.
        dim: channels in the blocks; 32 per level by default.
        num_heads: heads in total, a multiple of the number of levels; one per level by default.
        ratios: for each level, how many rows and columns of its tokens become one key; by default 1 for the coarsest
            level and twice as many for each finer one, such that each level has about as many keys.
        mlp_ratios: hidden channels of the feed-forward layer, as a multiple of `dim`.

    Shape:
        a list of maps (B, channels[i], H_i, W_i), any sizes from 1 up -> a list of the same shapes.

    Raises:
        ValueError: fewer than two levels, settings with different numbers of them, heads that do not divide the
            channels; in `forward`, another number of maps, or a map of another shape.
    """

    def __init__(self, channels: Sequence[int], depth: int = 1, *, dim: int | None = None, num_heads: int | None = None,
                 ratios: Sequence[int] | None = None, mlp_ratios: float = 2.0):  # fmt: skip
        super().__init__()
        self.channels = list(channels)
        self.grad_checkpointing = False
        levels = len(self.channels)
        check_minimum(2, levels=levels)
        check_minimum(1, channels=min(self.channels), depth=depth)
        ratios = [2**i for i in reversed(range(levels))] if ratios is None else ratios
        check_lengths("level", channels=self.channels, ratios=ratios)
        dim, num_heads = dim or 32 * levels, num_heads or levels
        self.patch_embed = nn.ModuleList(nn.Conv2d(cin, dim, 1) for cin in self.channels)
        self.level_embed = nn.Parameter(torch.zeros(levels, dim))
        self.block = nn.ModuleList(PyramidBlock(dim, num_heads, ratios, mlp_ratios) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out_proj = nn.ModuleList(nn.Conv2d(dim, cin, 1) for cin in self.channels)
        self.apply(init_weights)
        for layer in self.out_proj:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.channels):
            raise ValueError(f"The input must be {len(self.channels)} maps, one per level, got {len(maps)}.")
        images = [ops.check_image(x, cin) for x, cin in zip(maps, self.channels, strict=True)]
        sizes = [(x.shape[2], x.shape[3]) for x in images]
        embedded = [embed(ops.to_channels_last(x)) for embed, x in zip(self.patch_embed, images, strict=True)]
        levels = [ops.to_tokens(x) + level for x, level in zip(embedded, self.level_embed, strict=True)]
        for block in self.block:
            if self.grad_checkpointing:
                levels = checkpoint(block, levels, sizes, use_reentrant=False)  # type: ignore[assignment]
            else:
                levels = block(levels, sizes)
        outputs = [ops.to_image(self.norm(x), size) for x, size in zip(levels, sizes, strict=True)]
        return [project(out) + x for project, out, x in zip(self.out_proj, outputs, images, strict=True)]

    @classmethod
    def from_checkpoint(cls, path: str | PathLike) -> Self:
        """Load a trained neck across levels from a checkpoint of `shunted-lit fit`, in eval mode.

        Raises:
            ValueError: the file cannot be read, or holds no such neck.
        """
        content = read_checkpoint(path)
        parts = ((name.rpartition(".necks.pyramid."), value) for name, value in flatten(content).items())
        weights = {inner: value for (_, found, inner), value in parts if found}
        keywords = content.get("hyper_parameters", {}).get("neck")
        if not weights or not keywords:
            raise ValueError(f"{path}: holds no neck across levels; train one with --model.neck '{{form: pyramid}}'.")
        channels = [weights[f"patch_embed.{i}.weight"].shape[1] for i in range(len(weights["level_embed"]))]
        neck = cls(channels, **{name: value for name, value in keywords.items() if name not in ("form", "channels")})
        neck.load_state_dict(weights)
        return neck.eval()
