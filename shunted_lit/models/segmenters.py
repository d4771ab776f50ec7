"""Segmenters: the feature path, a decoder of segmentation_models_pytorch, and a class for each pixel."""

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

LEVELS = (2, 3, 4, 5)  # that the decoders are built over
STRIDE = 32  # of the last level; the decoders double it up again


class Decoder(NamedTuple):
    """An entry of `DECODERS`."""

    kind: type[nn.Module]  # of segmentation_models_pytorch, whose keywords are the decoder's
    channels: Callable[[Any], int]  # of what it returns


DECODERS: Mapping[str, Decoder] = {
    "fpn": Decoder(FPNDecoder, lambda decoder: decoder.out_channels),
    "upernet": Decoder(UPerNetDecoder, lambda decoder: decoder.fusion_block[0].out_channels),
    "segformer": Decoder(SegformerDecoder, lambda decoder: decoder.fuse_stage[0].out_channels),
}


class FCNHead(nn.Sequential):
    """Auxiliary head (Long et al., CVPR 2015, as mmsegmentation's UPerNet has it): (B, cin, h, w) -> logits."""

    def __init__(self, cin: int, num_classes: int, channels: int = 256):
        super().__init__(
            nn.Conv2d(cin, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(channels, num_classes, 1),
        )


class Segmenter(nn.Module):
    """Semantic FPN (Kirillov et al., CVPR 2019), UPerNet (Xiao et al., ECCV 2018) or SegFormer (Xie et al., NeurIPS
    2021) over a feature path.

    The image is normalized as for ImageNet, padded with zeros at the right and bottom to a multiple of 32, and the
    logits of a quarter of its size are scaled up and cut to it.

    The paper took mmsegmentation's heads. segmentation_models_pytorch's differ so:
    - fpn: no 3x3 convolution after each level of the pyramid (2.4 M parameters less), GroupNorm for BatchNorm, dropout
      0.2 for 0.1, corners aligned where maps are doubled;
    - upernet: a LayerNorm on each level first, no dropout; as wide as published with `decoder_channels=512`;
    - segformer: no dropout; as wide as the published B2 to B5 with `segmentation_channels=768`.

    Args:
        decoder: one of `DECODERS`.
        features: the feature path, of the levels 2, 3, 4 and 5; a neck may sit on any of them.
        num_classes: number of classes; labels run from 0.
        auxiliary: whether to add an auxiliary head on level 4, for training alone.
        keywords: of the decoder's class.

    Shape:
        (B, 3, H, W) in 0..1 -> logits (B, num_classes, H, W), H and W from 1 up.

    Raises:
        ValueError: an unknown decoder or keyword, other levels, less than two classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, decoder: str, features: FeaturePath, num_classes: int, auxiliary: bool = False, **keywords: Any):
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder is {decoder!r}; choose one of {', '.join(sorted(DECODERS))}")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, but there is nothing to tell apart with less than 2")
        if features.levels != LEVELS:
            raise ValueError(f"the features have the levels {list(features.levels)}, but {list(LEVELS)} are needed")
        kind, channels_of = DECODERS[decoder]
        known = set(inspect.signature(kind).parameters) - {"encoder_channels", "encoder_depth"}
        if unknown := sorted(set(keywords) - known):
            raise ValueError(f"{decoder} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        # Not torchvision's Normalize: it looks at values, which torch.export can't follow.
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.features = features
        # The decoders count maps from the image, (B, 3, H, W), on; level 1 is an empty one, as in their own models.
        channels = list(features.channels.values())
        self.decoder = kind(encoder_channels=[3, 0, *channels], **keywords)
        self.head = nn.Conv2d(channels_of(self.decoder), num_classes, 1)
        self.auxiliary = FCNHead(features.channels[4], num_classes) if auxiliary else None
        initialize_decoder(self.decoder)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)[0]

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and those of the auxiliary head, if any, in its map's size."""
        H, W = images.shape[-2:]
        x = pad_to_multiple((images - self.mean) / self.std, STRIDE)
        maps = self.features(x)
        auxiliary = self.auxiliary(maps["4"]) if self.auxiliary is not None else None
        decoded = self.head(self.decoder([x, x[:, :0, ::2, ::2], *maps.values()]))
        decoded = F.interpolate(decoded, scale_factor=4.0, mode="bilinear", align_corners=False)
        # Not [..., :H, :W]: its layout, which exporters look at, depends on whether there is anything to cut.
        return F.pad(decoded, [0, W - decoded.shape[-1], 0, H - decoded.shape[-2]]), auxiliary


def segment(
    segmenter: nn.Module,
    image: Tensor,
    short_side: int | None = None,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Logits (classes, H, W) of one image (3, H, W), in its own size.

    Args:
        segmenter: (B, 3, H, W) -> (B, classes, H, W).
        image: in 0..1.
        short_side: what the shorter side is scaled to first, but the longer one no more than four times as long.
        window: side of the windows that slide over the image, whose logits are averaged where they overlap; None for
            the whole image at once.
        stride: pixels from a window to the next; two thirds of a window where None.
    """
    H, W = image.shape[-2:]
    x = image[None]
    if short_side is not None:
        factor = min(short_side / min(H, W), 4 * short_side / max(H, W))
        x = F.interpolate(x, size=(max(round(H * factor), 1), max(round(W * factor), 1)), mode="bilinear",
                          align_corners=False, antialias=True)  # fmt: skip
    logits = segmenter(x) if window is None else slide(segmenter, x, window, stride or max(window * 2 // 3, 1))
    if logits.shape[-2:] != (H, W):
        logits = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
    return logits[0]


def slide(segmenter: nn.Module, x: Tensor, window: int, stride: int) -> Tensor:
    """Logits (1, classes, H, W) of one image (1, 3, H, W), averaged over windows; the last ones lie at the border."""
    H, W = x.shape[-2:]
    total: Any = None
    count = x.new_zeros(1, 1, H, W)
    for top in starts(H, window, stride):
        for left in starts(W, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = segmenter(x[place])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], H, W)
            total[place] += logits
            count[place] += 1
    return total / count


def starts(length: int, window: int, stride: int) -> Sequence[int]:
    """First pixels of the windows that cover `length` pixels."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
