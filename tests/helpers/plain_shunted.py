"""The paper's formulas, head by head, with nothing shared with the package but the weights. Slow on purpose."""

import math

import torch
from torch import Tensor


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, C), a 3x3 kernel a channel, zeros around."""
    B, H, W, C = x.shape
    wide = x.new_zeros(B, H + 2, W + 2, C)
    wide[:, 1:-1, 1:-1] = x
    out = bias.expand(B, H, W, C).clone()
    for i in range(3):
        for j in range(3):
            out += wide[:, i : i + H, j : j + W] * weight[:, 0, i, j]
    return out


def aggregate(x: Tensor, weights: dict[str, Tensor], group: str, r: int) -> Tensor:
    """MTA: patches of r x r tokens, zeros beyond the right and bottom, through one matrix; norm; GELU."""
    B, H, W, C = x.shape
    h, w = math.ceil(H / r), math.ceil(W / r)
    wide = x.new_zeros(B, h * r, w * r, C)
    wide[:, :H, :W] = x
    weight = weights[f"{group}.sr.weight"]
    out = weights[f"{group}.sr.bias"].expand(B, h, w, len(weight)).clone()
    for i in range(r):
        for j in range(r):
            out += wide[:, i::r, j::r] @ weight[:, :, i, j].T
    return gelu(layer_norm(out, weights, f"{group}.norm", 1e-5))


def attention(x: Tensor, weights: dict[str, Tensor], num_heads: int, ratios: tuple[int, ...], scale: float) -> Tensor:
    """Shunted self-attention of tokens (B, H, W, C), one head after the other."""
    B, H, W, C = x.shape
    d = C // num_heads
    heads = num_heads // len(ratios)
    q = linear(x, weights, "q").reshape(B, H * W, C)
    outputs = []
    for head in range(num_heads):
        group, place = divmod(head, heads)
        name = f"groups.{group}"
        tokens = x if ratios == (1,) else aggregate(x, weights, name, ratios[group])
        _, h, w, _ = tokens.shape
        kv = linear(tokens, weights, f"{name}.kv")
        columns = slice(place * d, (place + 1) * d)
        k, v = kv[..., : heads * d][..., columns], kv[..., heads * d :][..., columns]
        local = depthwise(v, weights[f"{name}.local_conv.weight"][columns], weights[f"{name}.local_conv.bias"][columns])
        if ratios != (1,):
            v = v + local
        scores = q[..., head * d : (head + 1) * d] @ k.reshape(B, h * w, d).transpose(1, 2) * scale
        out = torch.softmax(scores, dim=-1) @ v.reshape(B, h * w, d)
        outputs.append(out + local.reshape(B, h * w, d) if ratios == (1,) else out)
    return linear(torch.cat(outputs, -1).reshape(B, H, W, C), weights, "proj")


def feed_forward(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    hidden = linear(x, weights, "fc1")
    detail = depthwise(hidden, weights["dwconv.weight"], weights["dwconv.bias"])
    return linear(gelu(hidden + detail), weights, "fc2")


def neck(
    x: Tensor,
    weights: dict[str, Tensor],
    depth: int,
    num_heads: int,
    ratios: tuple[int, ...],
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The neck on (B, C, H, W), in the precision of its arguments."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    B, C, H, W = x.shape
    wide = x.new_zeros(B, C, H + 2, W + 2)
    wide[:, :, 1:-1, 1:-1] = x
    kernel = weights["patch_embed.proj.weight"]
    tokens = weights["patch_embed.proj.bias"].expand(B, H, W, C).clone()
    for i in range(3):
        for j in range(3):
            tokens += wide[:, :, i : i + H, j : j + W].permute(0, 2, 3, 1) @ kernel[:, :, i, j].T
    tokens = layer_norm(tokens, weights, "patch_embed.norm", 1e-5)
    for j in range(depth):
        block = under(f"block.{j}.")
        normed = layer_norm(tokens, block, "norm1", eps)
        scaled = scale or (C // num_heads) ** -0.5
        tokens = tokens + attention(normed, under(f"block.{j}.attn."), num_heads, ratios, scaled)
        tokens = tokens + feed_forward(layer_norm(tokens, block, "norm2", eps), under(f"block.{j}.mlp."))
    return layer_norm(tokens, weights, "norm", eps).permute(0, 3, 1, 2)
