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


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def convolution(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """(B, C, H, W), a k x k kernel, zeros around -> (B, H, W, cout)."""
    kernel = weights[f"{name}.weight"]
    B, C, H, W = x.shape
    k = kernel.shape[-1]
    wide = x.new_zeros(B, C, H + k - 1, W + k - 1)
    wide[:, :, k // 2 : k // 2 + H, k // 2 : k // 2 + W] = x
    out = weights[f"{name}.bias"].expand(B, H, W, len(kernel)).clone()
    for i in range(k):
        for j in range(k):
            out += wide[:, :, i : i + H, j : j + W].permute(0, 2, 3, 1) @ kernel[:, :, i, j].T
    return out


def neck(
    x: Tensor,
    weights: dict[str, Tensor],
    depth: int,
    num_heads: int,
    ratios: tuple[int, ...],
    scale: float | None = None,
    eps: float = 1e-5,
    adds_input: bool = False,
) -> Tensor:
    """The neck on (B, C, H, W), in the precision of its arguments; of the light form if its blocks are narrow."""
    tokens = layer_norm(convolution(x, weights, "patch_embed.proj"), weights, "patch_embed.norm", 1e-5)
    dim = len(weights["norm.weight"])
    skipped, tokens = tokens[..., :-dim], tokens[..., -dim:]
    for j in range(depth):
        block = under(weights, f"block.{j}.")
        normed = layer_norm(tokens, block, "norm1", eps)
        scaled = scale or (dim // num_heads) ** -0.5
        tokens = tokens + attention(normed, under(weights, f"block.{j}.attn."), num_heads, ratios, scaled)
        tokens = tokens + feed_forward(layer_norm(tokens, block, "norm2", eps), under(weights, f"block.{j}.mlp."))
    out = torch.cat([skipped, layer_norm(tokens, weights, "norm", eps)], -1)
    if "out_proj.weight" in weights:
        out = linear(out, {name: value.squeeze() for name, value in weights.items()}, "out_proj")
    out = out.permute(0, 3, 1, 2)
    return x + out if adds_input else out


def pyramid(maps: list[Tensor], weights: dict[str, Tensor], depth: int, num_heads: int,
            ratios: tuple[int, ...]) -> list[Tensor]:  # fmt: skip
    """The neck across levels, one query level, head group and head after the other."""
    levels = [convolution(x, weights, f"patch_embed.{i}") + weights["level_embed"][i] for i, x in enumerate(maps)]
    d, heads = levels[0].shape[-1] // num_heads, num_heads // len(maps)
    for j in range(depth):
        block, attn = under(weights, f"block.{j}."), under(weights, f"block.{j}.attn.")
        normed = [layer_norm(x, block, "norm1", 1e-5) for x in levels]
        for i, tokens in enumerate(levels):
            B, H, W, C = tokens.shape
            q = linear(normed[i], attn, "q").reshape(B, H * W, C)
            outputs = []
            for head in range(num_heads):
                group, place = divmod(head, heads)
                name = f"groups.{group}"
                keys = aggregate(normed[group], attn, name, ratios[group])
                h, w = keys.shape[1:3]
                kv = linear(keys, attn, f"{name}.kv")
                columns = slice(place * d, (place + 1) * d)
                k, v = kv[..., : heads * d][..., columns], kv[..., heads * d :][..., columns]
                kernel, bias = (attn[f"{name}.local_conv.{kind}"][columns] for kind in ("weight", "bias"))
                v = v + depthwise(v, kernel, bias)
                scores = q[..., head * d : (head + 1) * d] @ k.reshape(B, h * w, d).transpose(1, 2) * d**-0.5
                outputs.append(torch.softmax(scores, dim=-1) @ v.reshape(B, h * w, d))
            levels[i] = tokens + linear(torch.cat(outputs, -1).reshape(B, H, W, C), attn, "proj")
        mlp = under(weights, f"block.{j}.mlp.")
        levels = [x + feed_forward(layer_norm(x, block, "norm2", 1e-5), mlp) for x in levels]
    outputs = [layer_norm(x, weights, "norm", 1e-5).permute(0, 3, 1, 2) for x in levels]
    return [x + convolution(out, weights, f"out_proj.{i}").permute(0, 3, 1, 2) for i, (x, out) in
            enumerate(zip(maps, outputs, strict=True))]  # fmt: skip
