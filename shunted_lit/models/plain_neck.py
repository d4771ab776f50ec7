"""The neck as one would first write it in PyTorch, to compare its speed and memory with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shunted_lit.models.ops import pad_to_multiple
from shunted_lit.models.shunted import ShuntedHeads, ShuntedTransformer


class PlainNeck(nn.Module):
    """The equations of `ShuntedTransformer` without its optimizations.

    Tokens (B, N, C) are copied to images (B, C, H, W) for each convolution and back, and attention weights are stored.

    Args:
        keywords: those of `ShuntedTransformer`; the plain neck has the same parameters.

    Shape:
        (B, cin, H, W) -> (B, cin, H, W), equal to `ShuntedTransformer`.
    """

    def __init__(self, **keywords: Any):
        super().__init__()
        self.neck = ShuntedTransformer(**keywords)

    def forward(self, x: Tensor) -> Tensor:
        neck: Any = self.neck
        image, (H, W) = x, x.shape[2:]
        embedded = neck.patch_embed.norm(copy_to_tokens(neck.patch_embed.proj(x)))
        skipped, x = embedded[..., : neck.bypass], embedded[..., neck.bypass :]
        for block in neck.block:
            x = x + self.attention(block.attn, block.norm1(x), H, W)
            x = x + self.feed_forward(block.mlp, block.norm2(x), H, W)
        out = copy_to_image(torch.cat([skipped, neck.norm(x)], -1), H, W)
        out = neck.layer_scale(neck.out_proj(out))
        return out + image if neck.adds_input else out

    @staticmethod
    def attention(attn: Any, x: Tensor, H: int, W: int) -> Tensor:
        outputs = []
        for q, heads in zip(attn.q(x).chunk(len(attn.groups), -1), attn.groups, strict=True):
            is_shunted = isinstance(heads, ShuntedHeads)
            merged, h, w = x, H, W
            if is_shunted:
                merged = heads.sr(pad_to_multiple(copy_to_image(x, H, W), heads.ratio))
                h, w = merged.shape[2:]
                merged = F.gelu(heads.norm(copy_to_tokens(merged)))
            k, v = heads.kv(merged).chunk(2, -1)
            local = copy_to_tokens(heads.local_conv(copy_to_image(v, h, w)))
            v = v + local if is_shunted else v
            q, k, v = (x.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
            weights = torch.softmax(q @ k.transpose(-2, -1) * heads.scale, -1)
            out = (weights @ v).transpose(1, 2).flatten(2)
            outputs.append(out if is_shunted else out + local)  # where r = 1, as in the reference implementation
        return attn.proj(torch.cat(outputs, -1))

    @staticmethod
    def feed_forward(mlp: Any, x: Tensor, H: int, W: int) -> Tensor:
        x, conv = mlp.fc1(x), mlp.dwconv
        detail = F.conv2d(copy_to_image(x, H, W), conv.weight, conv.bias, padding=1, groups=conv.groups)
        return mlp.fc2(F.gelu(x + copy_to_tokens(detail)))


def copy_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def copy_to_image(x: Tensor, H: int, W: int) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), contiguous."""
    return x.transpose(1, 2).unflatten(2, (H, W)).contiguous()
