"""The feature path: an image in, maps of any timm backbone out, with the neck on the levels that ask for it.

A level is named by its stride: level l has stride 2 ** l, so 3, 4, 5 are the C3, C4, C5 of the detection literature.
"""

import difflib
import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from jsonargparse import ArgumentError, ArgumentParser
from timm.layers import Format, nhwc_to
from torch import Tensor, nn

from shunted_lit.models.shunted import ShuntedBackbone, ShuntedTransformer
from shunted_lit.models.weights import describe_mismatch, flatten, from_reference_names, read_checkpoint

log = logging.getLogger(__name__)


def check_model_name(name: str) -> None:
    """Raises ValueError, with close names, where timm has no such model; "local-dir:..." and the like are timm's."""
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}")


def state_dict_and_classifiers(path: str, model: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Weights of a file under the names of a timm model, and the names of the model's classifiers."""
    content = read_checkpoint(path)
    if (task := content.get("task", "ClassificationTask")) != "ClassificationTask":
        raise ValueError(
            f"{path} is of {task}, from which the same task can start, but no other; a backbone starts from a "
            "classifier's weights, or the authors' or timm's"
        )
    state = from_reference_names(content) if isinstance(model, ShuntedBackbone) else flatten(content)
    heads = model.pretrained_cfg.get("classifier") or ()
    return state, (heads,) if isinstance(heads, str) else tuple(heads)


def read_backbone_weights(path: str, backbone: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a file under the names of timm's `backbone`, without a classifier's head.

    Raises:
        ValueError: a file that can't be read, or whose weights do not fit.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(backbone, **options)
    state, classifiers = state_dict_and_classifiers(path, model)
    heads = tuple(f"{head}." for head in classifiers)
    mine, state = (
        {name: value for name, value in some.items() if not name.startswith(heads)}
        for some in (model.state_dict(), state)
    )
    if told := describe_mismatch(mine, state):
        advice = model.weights_advice(state) if isinstance(model, ShuntedBackbone) else ""
        raise ValueError(f"{path}: weights do not fit {backbone}: {told}. {advice}".rstrip())
    log.info("%s: all %d tensors of the backbone start from it", path, len(mine))
    return state


def group_by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the images (C, H, W), those of equal height and width together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape[-2:]), []).append(i)
    return list(groups.values())


def check_neck_keywords(keywords: Mapping[str, Any]) -> None:
    """Raises ValueError where the neck has no such keyword, or one of another type."""
    known = inspect.signature(ShuntedTransformer).parameters
    if unknown := sorted(set(keywords) - set(known)):
        raise ValueError(f"the neck has no keyword {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    for name, value in keywords.items():
        try:
            neck_parser().parse_object({name: value}, defaults=False)
            fits = name != "norm_layer" or callable(value)  # the parser also takes names of classes
        except ArgumentError:
            fits = False
        if not fits:
            kind = inspect.formatannotation(known[name].annotation).replace("collections.abc.", "")
            raise ValueError(f"the neck's {name} is {value!r}, but {kind} is needed")


@functools.cache
def neck_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ShuntedTransformer, fail_untyped=False)
    return parser


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
        weights: start the backbone from a file instead: a checkpoint of the authors', of timm or of
            `shunted-lit fit` on classes, or .safetensors. A classifier's head is left out.
        grad_checkpointing: compute backbone and necks again in the backward pass: less memory, more time.

    Shape:
        (B, 3, H, W) -> {str(level): (B, channels[level], ceil(H / 2 ** level), ceil(W / 2 ** level))}

    Raises:
        ValueError: an unknown backbone, level or neck keyword; a `cin` that is not the level's; weights that do not
            fit; checkpointing where the backbone has none.
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
        weights: str | None = None,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        options = dict(backbone_options or {})
        self.levels = tuple(sorted(levels))
        if not levels or len(set(levels)) != len(levels):
            raise ValueError(f"levels are {list(levels)}; name at least one, and none twice")
        if neck is not None and not neck_levels:
            raise ValueError("there is a neck, but neck_levels is empty; name a level, or set neck to null")
        indices = self._feature_indices(backbone, options, self.levels)
        if weights is not None:
            if pretrained:
                raise ValueError(f"pretrained is true and weights is {weights}: training can start from one of them")
            pretrained = True
            overlay: dict[str, Any] = {
                "state_dict": read_backbone_weights(weights, backbone, options),
                "num_classes": 0,
            }
        source: dict[str, Any] = {} if weights is None else {"pretrained_cfg_overlay": overlay}
        backbone_model: Any = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, out_indices=indices, **source, **options
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
        if grad_checkpointing:
            self._set_grad_checkpointing(backbone)

    def _set_grad_checkpointing(self, name: str) -> None:
        # Blocks by themselves, where the model's parts know how; timm's wrapper would spare the first, widest stage.
        parts: list[Any] = [m for m in self.modules() if hasattr(m, "grad_checkpointing") and m is not self.backbone]
        in_backbone = [m for m in self.backbone.modules() if m in parts]
        if not in_backbone and hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(True)
        elif not in_backbone:
            raise ValueError(f"timm has no checkpointing for {name}; set grad_checkpointing to false")
        for part in parts:
            part.grad_checkpointing = True

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
