"""The feature path: an image in, maps of any timm backbone out, with the neck on the levels that ask for it.

A level is named by its stride: level l has stride 2 ** l, so 3, 4, 5 are the C3, C4, C5 of the detection literature.
"""

import difflib
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import Format, nhwc_to
from torch import Tensor, nn

from shunted_lit.shunted import ShuntedTransformer


def check_model_name(name: str) -> None:
    """Raises ValueError, with close names, where timm has no such model; "local-dir:..." and the like are timm's."""
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}")


def check_neck_keywords(keywords: Mapping[str, Any]) -> None:
    """Raises ValueError where the neck has no such keyword."""
    known = set(inspect.signature(ShuntedTransformer).parameters)
    if unknown := sorted(set(keywords) - known):
        raise ValueError(f"the neck has no keyword {', '.join(unknown)}; it has {', '.join(sorted(known))}")


class FeaturePath(nn.Module):
    """Backbone, then a neck of its own on each of `neck_levels`.

    Args:
        backbone: name of a timm model, shunted_t, shunted_s and shunted_b among them.
        pretrained: passed on to timm, which fetches the backbone's published weights.
        levels: which maps to return, fine to coarse.
        neck: keywords of `ShuntedTransformer`, {} for its defaults, None for no neck. `cin` is the level's.
        neck_levels: those of `levels` that get a neck.
        freeze_backbone: train no weight of the backbone, and keep it in eval mode (BatchNorm as it was trained).
        backbone_options: further keywords for `timm.create_model`, such as {"img_size": 256} for a ViT.

    Shape:
        (B, 3, H, W) -> {str(level): (B, channels[level], ceil(H / 2 ** level), ceil(W / 2 ** level))}

    Raises:
        ValueError: an unknown backbone, level or neck keyword; a `cin` that is not the level's.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        pretrained: bool = False,
        levels: Sequence[int] = (3, 4, 5),
        neck: Mapping[str, Any] | None = None,
        neck_levels: Sequence[int] = (5,),
        freeze_backbone: bool = False,
        backbone_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        options = dict(backbone_options or {})
        self.levels = tuple(sorted(levels))
        if not levels or len(set(levels)) != len(levels):
            raise ValueError(f"levels are {list(levels)}; name at least one, and none twice")
        if neck is not None and not neck_levels:
            raise ValueError("there is a neck, but neck_levels is empty; name a level, or set neck to null")
        indices = self._feature_indices(backbone, options, self.levels)
        backbone_model: Any = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, out_indices=indices, **options
        )
        self.channels: dict[int, int] = dict(zip(self.levels, backbone_model.feature_info.channels(), strict=True))
        self.backbone = backbone_model
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(False).eval()
        self.necks = nn.ModuleDict()
        for level in neck_levels if neck is not None else ():
            if level not in self.channels:
                raise ValueError(f"neck_levels names level {level}, but levels are {list(self.levels)}; add it there")
            self.necks[str(level)] = self._neck(level, self.channels[level], dict(neck or {}))

    @staticmethod
    def _feature_indices(backbone: str, options: dict[str, Any], levels: tuple[int, ...]) -> list[int]:
        check_model_name(backbone)
        with torch.device("meta"):  # costs no memory: only the strides are wanted
            probe: Any = timm.create_model(backbone, features_only=True, **options)
        strides = probe.feature_info.reduction()
        index = {stride: i for i, stride in enumerate(strides)}  # the last map of a stride, where several have it
        for level in levels:
            if 2**level not in index:
                raise ValueError(
                    f"{backbone} has no level {level} (stride {2**level}): its maps have the strides {strides}"
                )
        return [index[2**level] for level in levels]

    @staticmethod
    def _neck(level: int, channels: int, keywords: dict[str, Any]) -> ShuntedTransformer:
        check_neck_keywords(keywords)
        if keywords.setdefault("cin", channels) != channels:
            raise ValueError(
                f"the neck's cin is {keywords['cin']}, but level {level} has {channels} channels; leave cin out"
            )
        return ShuntedTransformer(**keywords)

    def train(self, mode: bool = True) -> "FeaturePath":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        maps = self.backbone(x)
        if getattr(self.backbone, "output_fmt", Format.NCHW) == Format.NHWC:
            maps = [nhwc_to(x, Format.NCHW) for x in maps]
        features = OrderedDict((str(level), x) for level, x in zip(self.levels, maps, strict=True))
        for level, neck in self.necks.items():
            features[level] = neck(features[level])
        return features
