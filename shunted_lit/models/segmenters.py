"""Segmenters: a feature path and a decoder of segmentation_models_pytorch, which return logits for each pixel."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.models.ops import pad_to_multiple
from shunted_lit.utils.checks import check_choice, check_minimum, check_options

LEVELS = (2, 3, 4, 5)  # of the feature path that decoders need
MAX_STRIDE = 32  # of level 5; images are padded to a multiple of it


class DecoderEntry(NamedTuple):
    """An entry of `DECODERS`."""

    build: type[nn.Module]  # a class of segmentation_models_pytorch; the decoder takes its keywords
    out_channels: Callable[[Any], int]


DECODERS: Mapping[str, DecoderEntry] = {
    "fpn": DecoderEntry(FPNDecoder, lambda decoder: decoder.out_channels),
    "upernet": DecoderEntry(UPerNetDecoder, lambda decoder: decoder.fusion_block[0].out_channels),
    "segformer": DecoderEntry(SegformerDecoder, lambda decoder: decoder.fuse_stage[0].out_channels),
}


def fcn_head(cin: int, num_classes: int, channels: int = 256) -> nn.Sequential:
    """Build an auxiliary head (Long et al., CVPR 2015) as in mmsegmentation's UPerNet: (B, cin, h, w) -> logits."""
    return nn.Sequential(
        nn.Conv2d(cin, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


class Segmenter(nn.Module):
    """Semantic FPN (Kirillov et al., CVPR 2019), UPerNet (Xiao et al., ECCV 2018) or SegFormer (Xie et al., NeurIPS
    2021) over a feature path.

    The image is normalized as for ImageNet and padded with zeros at the right and bottom to a multiple of 32. Logits at
    a quarter of its size are upsampled and cropped to it.

    The paper uses the heads of mmsegmentation. Those of segmentation_models_pytorch differ:

    - fpn: no 3x3 convolution after each pyramid level (2.4 M parameters fewer), GroupNorm instead of BatchNorm,
      dropout 0.2 instead of 0.1, aligned corners when maps are doubled;
    - upernet: a LayerNorm on each level first, no dropout; as wide as published with `decoder_channels=512`;
    - segformer: no dropout; as wide as the published B2 to B5 with `segmentation_channels=768`.

    Args:
        decoder: One of `DECODERS`.
        features: Feature path of levels 2, 3, 4 and 5, with necks on any of them.
        num_classes: Number of classes; labels start at 0.
        auxiliary: Add an auxiliary head on level 4, which only training uses.
        **keywords: Keywords of the decoder's class.

    Shape:
        (B, 3, H, W) in 0..1 -> logits (B, num_classes, H, W), H and W from 1 up.

    Raises:
        ValueError: An unknown decoder or option, other levels, or less than two classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, decoder: str, features: FeaturePath, num_classes: int, *, auxiliary: bool = False, **keywords: Any
    ):
        super().__init__()
        check_choice("decoder", decoder, DECODERS)
        check_minimum(2, num_classes=num_classes)
        if features.levels != LEVELS:
            raise ValueError(f"The feature path must have the levels {list(LEVELS)}, got {list(features.levels)}.")
        build, out_channels = DECODERS[decoder]
        parameters = inspect.signature(build).parameters.keys()
        check_options(decoder, keywords, parameters - {"encoder_channels", "encoder_depth"})
        # torchvision's Normalize reads values of tensors, which torch.export cannot trace.
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.features = features
        # Decoders take a map per level from 0 on: the image, and a map without channels, as in the library's models.
        channels = list(features.channels.values())
        self.decoder = build(encoder_channels=[3, 0, *channels], **keywords)
        self.head = nn.Conv2d(out_channels(self.decoder), num_classes, 1)
        self.auxiliary = fcn_head(features.channels[4], num_classes) if auxiliary else None
        initialize_decoder(self.decoder)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)[0]

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, num_classes, H, W), and those of the auxiliary head at stride 16, if any."""
        H, W = images.shape[-2:]
        x = pad_to_multiple((images - self.mean) / self.std, MAX_STRIDE)
        maps = self.features(x)
        auxiliary = self.auxiliary(maps["4"]) if self.auxiliary is not None else None
        decoded = self.head(self.decoder([x, x[:, :0, ::2, ::2], *maps.values()]))
        decoded = F.interpolate(decoded, scale_factor=4.0, mode="bilinear", align_corners=False)
        # Negative padding crops. The memory layout of [..., :H, :W] depends on the size, which breaks exporters.
        return F.pad(decoded, [0, W - decoded.shape[-1], 0, H - decoded.shape[-2]]), auxiliary


def segment(
    segmenter: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    short_side: int | None = None,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Return the logits (num_classes, H, W) of one image.

    Args:
        segmenter: Maps (B, 3, H, W) to (B, num_classes, H, W).
        image: (3, H, W) in 0..1.
        short_side: Length that the shorter side is scaled to first, in pixels; the longer one becomes at most four
            times as long. None: the image's own size.
        window: Side of windows that slide over the image, in pixels. Logits are averaged where windows overlap. None:
            the whole image at once.
        stride: Pixels from one window to the next. None: two thirds of a window.
    """
    H, W = image.shape[-2:]
    x = image[None]
    if short_side is not None:
        factor = min(short_side / min(H, W), 4 * short_side / max(H, W))
        size = (max(round(H * factor), 1), max(round(W * factor), 1))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
    if window is None:
        logits = segmenter(x)
    else:
        logits = segment_windows(segmenter, x, window, stride or max(window * 2 // 3, 1))
    if logits.shape[-2:] != (H, W):
        logits = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
    return logits[0]


def segment_windows(segmenter: Callable[[Tensor], Tensor], x: Tensor, window: int, stride: int) -> Tensor:
    """Return logits (1, num_classes, H, W) of an image (1, 3, H, W), averaged over overlapping windows."""
    H, W = x.shape[-2:]
    total: Any = None
    count = x.new_zeros(1, 1, H, W)
    for top in window_starts(H, window, stride):
        for left in window_starts(W, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = segmenter(x[place])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], H, W)
            total[place] += logits
            count[place] += 1
    return total / count


def window_starts(length: int, window: int, stride: int) -> Sequence[int]:
    """Return the first pixel of each window along a side of `length` pixels; the last window ends at the border."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
