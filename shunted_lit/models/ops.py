"""Tensor operations behind the architecture, and the only place that depends on how and where the code runs.

Each fast path stands next to the plain formula that it replaces; the tests compare the two. Questions such as "is this
being scripted, traced, compiled, in inference mode, on which processor?" belong here, so that `shunted.py` reads like
the paper.

Tokens are (B, H * W, C), contiguous, and carry their `size` (H, W). That is the memory layout of a channels_last
(B, C, H, W) image, so `to_image` and `to_tokens` are views and nothing is copied.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Size = tuple[int, int]  # height and width of a map of tokens
Method = Callable[..., Any]

SMALL_ATTENTION = 2**24  # attention weights (32 MB in bfloat16) up to which plain products beat fused attention
WIDE = 2**21  # elements of a block's tokens from which recomputing is worth its bookkeeping


def factory_keywords(device: Any, dtype: Any) -> dict[str, Any]:
    """Return the keywords that are not None: not every `norm_layer` accepts `device` and `dtype`."""
    return {key: value for key, value in {"device": device, "dtype": dtype}.items() if value is not None}


def to_image(x: Tensor, size: Size) -> Tensor:
    """View tokens (B, H * W, C) as an image (B, C, H, W)."""
    return x.reshape(x.shape[0], size[0], size[1], x.shape[2]).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """Flatten an image (B, C, H, W) to tokens (B, H * W, C); a view where the image is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """Lay out an image (B, C, H, W) as channels_last; no copy where it is already.

    The copy is one of tokens: `torch.func.vmap` has no rule for `contiguous(memory_format=torch.channels_last)`.
    """
    return to_image(to_tokens(x).contiguous(), (x.shape[2], x.shape[3]))


def pad_to_multiple(x: Tensor, r: int) -> Tensor:
    """Pad an image (B, C, H, W) with zeros at the right and bottom so that `r` divides H and W."""
    H, W = x.shape[2], x.shape[3]
    # Not `-H % r`, which fails in torch.export with dynamic sizes.
    return F.pad(x, [0, (W + r - 1) // r * r - W, 0, (H + r - 1) // r * r - H]) if r > 1 else x


def check_image(x: Tensor, channels: int) -> Tensor:
    """Return `x`; raise ValueError unless it is an image (B, `channels`, H, W) with H and W of at least 1."""
    if torch.jit.is_tracing():  # a check would be traced as a constant, with a warning
        return x
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"The input must have the shape (B, {channels}, H, W), H and W >= 1, got {list(x.shape)}.")
    return x


torch.fx.wrap("check_image")  # one call in a symbolic trace, which cannot follow branches


def split_channels(x: Tensor, parts: int) -> list[Tensor]:
    """Split (B, N, C) into equal parts of its channels. One part is `x`: LiteRT converts no split into one."""
    return [x] if parts == 1 else x.chunk(parts, dim=-1)  # type: ignore[return-value]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """View (B, N, heads * d) as (B, heads, N, d)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Join (B, heads, N, d) to (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Return softmax(q k^T * scale) v for q (B, heads, N, d) and k, v (B, heads, M, d): (B, heads, N, d)."""
    plain = False if torch.jit.is_scripting() else is_plain_attention_faster(q, k)
    if plain:
        weights = torch.softmax((q * scale) @ k.transpose(-2, -1), -1)
        return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)


torch.fx.wrap("attention")


def is_plain_attention_faster(q: Tensor, k: Tensor) -> bool:
    """Return whether two matrix products beat torch's fused attention: bfloat16 on a CPU, few weights."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # sizes are symbols there
    if exporting or not q.is_cpu or q.dtype != torch.bfloat16:
        return False
    B, heads, N, _ = q.shape
    return B * heads * N * k.shape[2] <= SMALL_ATTENTION


def residual_depthwise_gelu(x: Tensor, size: Size, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return GELU(x + depthwise3x3(x)) for tokens (B, H * W, C), a kernel (C, 1, 3, 3) and a bias (C,) or None.

    The residual costs nothing: it is a 1 in the centre of each kernel.
    """
    channels = x.shape[2]
    if torch.jit.is_tracing():  # torch's TorchScript-based ONNX exporter needs a parameter as weight
        return F.gelu(x + to_tokens(F.conv2d(to_image(x, size), weight, bias, padding=1, groups=channels)))
    weight = weight + F.pad(weight.new_ones([1, 1, 1, 1]), [1, 1, 1, 1])
    fused = False if torch.jit.is_scripting() else can_fuse_gelu(x)
    if fused:
        return convolve_and_gelu(x, size, weight, bias)
    x = to_tokens(F.conv2d(to_image(x, size), weight, bias, padding=1, groups=channels))
    in_place = False if torch.jit.is_scripting() else can_overwrite(x)
    return torch.ops.aten.gelu_(x) if in_place else F.gelu(x)


def is_plain_eager() -> bool:
    """Return whether operations run as they are called: not compiled, exported or traced, nor under `torch.func`.

    The transforms of `torch.func` (`vmap`, `grad`, `jvp`, ...) have no rule for the fast paths, or a slow one. torch
    has no public function that tells whether one is active.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active()


def can_fuse_gelu(x: Tensor) -> bool:
    """Return whether oneDNN can run a convolution and its GELU in one pass.

    The operator has no derivative, so only inference mode may use it; compilers fuse on their own.
    """
    if not is_plain_eager() or not torch.is_inference_mode_enabled():
        return False
    plain = type(x) is Tensor and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
    has_kernels = torch.backends.cpu.get_cpu_capability() == "AVX512"  # oneDNN fuses these dtypes only there
    return plain and has_kernels and bool(torch.backends.mkldnn.enabled)


def can_overwrite(x: Tensor) -> bool:
    """Return whether an operator may write its result over its input: eagerly, without gradients.

    The maps of the feed-forward layers are the widest of the network: one copy less allows larger images.
    """
    return type(x) is Tensor and not torch.is_grad_enabled() and is_plain_eager()


@torch.jit.unused
def convolve_and_gelu(x: Tensor, size: Size, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a depthwise 3x3 convolution and GELU as one oneDNN operator, the one that torch.compile uses."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)  # autocast ignores this operator
    run = torch.ops.mkldnn._convolution_pointwise
    return to_tokens(run(to_image(x, size), weight, bias, [1, 1], [1, 1], [1, 1], x.shape[2], "gelu", [], "none"))


def should_recompute(x: Tensor, width: int) -> bool:
    """Return whether a step with input `x` is run again in the backward pass rather than keeping its results.

    `width` is the ratio of the channels of `x` to those of the block.

    Only on CPUs: on an NVIDIA H100 the bookkeeping made a training step slower than the reference implementation's.
    Compilers decide on their own what to keep, and a symbolic trace (where `x` is no Tensor) has no backward pass.
    """
    trains_on_cpu = torch.is_grad_enabled() and isinstance(x, Tensor) and x.is_cpu
    return is_plain_eager() and trains_on_cpu and x.numel() >= width * WIDE


def recompute_in_backward(width: int) -> Callable[[Method], Method]:
    """Decorate a method of tokens and their size, (x, size): if `should_recompute`, keep only its inputs.

    The results inside the method are computed again in the backward pass (activation checkpointing), which saves the
    memory of the network's widest maps and makes a training step about 4 % slower.

    Args:
        width: ratio of the channels of `x` to those of the block.
    """
    decide, run, partial = should_recompute, checkpoint, functools.partial  # for `wrapper`, which gets other globals

    def decorate(method: Method) -> Method:
        def wrapper(self: Any, x: Tensor, size: Size) -> Any:
            if decide(x, width):
                return run(partial(method, self), x, size, use_reentrant=False)
            inputs = [x]
            del x  # else this frame would keep the map while `method` runs
            return method(self, inputs.pop(), size)

        # TorchScript compiles the source of `method`, which it finds by `__wrapped__`, with the globals of the wrapper:
        # so the wrapper gets those of `method`.
        own = FunctionType(wrapper.__code__, method.__globals__, method.__name__, None, wrapper.__closure__)
        return functools.wraps(method)(own)

    return decorate
