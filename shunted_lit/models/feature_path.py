"""The feature path: maps of any timm backbone, with necks on selected levels.

A level is named by its stride: level l has stride 2 ** l, so levels 3, 4, 5 are C3, C4, C5 of the detection literature.
"""

import difflib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import Format, nhwc_to
from torch import Tensor, nn

from shunted_lit.models.pyramid import ShuntedPyramid
from shunted_lit.models.shunted import ShuntedBackbone, ShuntedTransformer
from shunted_lit.models.weights import describe_mismatch, flatten, from_reference_names, read_checkpoint, select
from shunted_lit.utils.checks import check_choice, check_keywords

log = logging.getLogger(__name__)

PYRAMID = "pyramid"  # the form of a neck across levels, and its name among the necks


def check_model_name(name: str) -> None:
    """Raise ValueError, with close names, where timm has no such model. timm checks names such as "local-dir:..."."""
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"`backbone` must be a timm model, got {name!r}; close names: {', '.join(close) or 'none'}.")


def check_neck_keywords(keywords: Mapping[str, Any]) -> None:
    """Raise ValueError where there is no such form of the neck, or it has no such keyword, or one of another type."""
    check_choice("form", keywords.get("form", "reference"), ("reference", "light", PYRAMID))
    if keywords.get("form") == PYRAMID:
        check_keywords("the neck across levels", drop_form(keywords), ShuntedPyramid)
    else:
        check_keywords("the neck", keywords, ShuntedTransformer)


def drop_form(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `ShuntedPyramid`, which has a single form."""
    return {name: value for name, value in keywords.items() if name != "form"}


def check_weights_source(pretrained: bool, weights: str | None) -> None:
    """Raise ValueError where training would start from two sources of weights."""
    if pretrained and weights is not None:
        raise ValueError(f"`pretrained` must be false where `weights` is given ({weights}): choose one of the two.")


def state_dict_and_classifiers(path: str, model: Any) -> tuple[dict[str, Any], list[str]]:
    """Read a classifier's weights under the names of a timm model; also return the names of the model's classifiers.

    Raises:
        ValueError: a file that cannot be read, or a checkpoint of another task.
    """
    content = read_checkpoint(path)
    if (task := content.get("task", "ClassificationTask")) != "ClassificationTask":
        raise ValueError(
            f"{path}: a checkpoint of {task} can only start a {task}; a backbone needs the weights of a classifier, of "
            "timm or of the reference implementation."
        )
    state = from_reference_names(content) if isinstance(model, ShuntedBackbone) else flatten(content)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    return state, [classifiers] if isinstance(classifiers, str) else list(classifiers)


def read_backbone_weights(path: str, backbone: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read weights of a file under the names of timm's `backbone`, without a classifier.

    Raises:
        ValueError: a file that cannot be read, or weights that do not fit.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(backbone, **options)
    weights, classifiers = state_dict_and_classifiers(path, model)
    expected, weights = (select(some, classifiers, inside=False) for some in (model.state_dict(), weights))
    if mismatch := describe_mismatch(expected, weights):
        advice = model.weights_advice(weights) if isinstance(model, ShuntedBackbone) else ""
        raise ValueError(f"{path}: weights do not fit {backbone}: {mismatch}. {advice}".rstrip())
    log.info("%s: loaded all %d tensors of the backbone", path, len(expected))
    return weights


def group_by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Return groups of indices of the images (C, H, W) that share height and width."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape[-2:]), []).append(i)
    return list(groups.values())


class FeaturePath(nn.Module):
    """A timm backbone and a neck on each of `neck_levels`, or one neck across them.

    Args:
        backbone: name of a timm model, such as shunted_t, shunted_s and shunted_b.
        pretrained: let timm download the backbone's published weights.
        levels: levels of the maps to return.
        neck: keywords of `ShuntedTransformer`, {} for its defaults, None for no neck. `cin` is that of the level. With
            {"form": "pyramid"}, keywords of `ShuntedPyramid`: one neck across all `neck_levels`.
        neck_levels: levels, among `levels`, that get a neck.
        freeze_backbone: train no weight of the backbone, and keep it in eval mode (BatchNorm statistics stay).
        backbone_options: further keywords of `timm.create_model`, such as {"img_size": 256} for a ViT.
        weights: file of weights to start the backbone from: a checkpoint of the reference implementation, of timm or
            of `shunted-lit fit` for classification, or .safetensors. A classifier in it is ignored.
        grad_checkpointing: recompute backbone and necks in the backward pass: less memory, more time.

    Shape:
        (B, 3, H, W) -> {str(level): (B, channels[level], ceil(H / 2 ** level), ceil(W / 2 ** level))}

    Raises:
        ValueError: an unknown backbone, level or neck keyword; a `cin` that is not the level's; weights that do not
            fit; checkpointing where the backbone has none.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
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
            raise ValueError(f"`levels` must name at least one level, and none twice, got {list(levels)}.")
        if neck is not None and not neck_levels:
            raise ValueError("`neck_levels` must name a level where there is a neck; name one, or set `neck` to null.")
        indices = find_map_indices(backbone, options, self.levels)
        check_weights_source(pretrained, weights)
        source: dict[str, Any] = {"pretrained": pretrained}
        if weights is not None:
            state = read_backbone_weights(weights, backbone, options)
            source = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": 0}}
        model: Any = timm.create_model(backbone, features_only=True, out_indices=indices, **source, **options)
        self.channels: dict[int, int] = dict(zip(self.levels, model.feature_info.channels(), strict=True))
        self.backbone = model
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(False).eval()
        self.neck_levels = sorted(neck_levels) if neck is not None else []
        for level in self.neck_levels:
            if level not in self.channels:
                raise ValueError(f"`neck_levels` must be among `levels` {list(self.levels)}, got level {level}.")
        self.necks = build_necks({level: self.channels[level] for level in self.neck_levels}, neck or {})
        if grad_checkpointing:
            self._set_grad_checkpointing(backbone)

    def _set_grad_checkpointing(self, name: str) -> None:
        # Set it on each module that knows how: timm's wrapper would spare the first stage, the widest.
        modules: list[Any] = [m for m in self.modules() if hasattr(m, "grad_checkpointing") and m is not self.backbone]
        if not any(module in modules for module in self.backbone.modules()):
            if not hasattr(self.backbone, "set_grad_checkpointing"):
                raise ValueError(f"timm has no activation checkpointing for {name}; set `grad_checkpointing` to false.")
            self.backbone.set_grad_checkpointing(True)
        for module in modules:
            module.grad_checkpointing = True

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
        for name, neck in self.necks.items():
            if name == PYRAMID:
                levels = [str(level) for level in self.neck_levels]
                features.update(zip(levels, neck([features[level] for level in levels]), strict=True))
            else:
                features[name] = neck(features[name])
        return features


def find_map_indices(backbone: str, options: dict[str, Any], levels: Sequence[int]) -> list[int]:
    """Return which of the backbone's maps have the strides of `levels`; the last one, where several have it."""
    check_model_name(backbone)
    with torch.device("meta"):  # only the strides are needed
        probe: Any = timm.create_model(backbone, features_only=True, **options)
    strides = probe.feature_info.reduction()
    index = {stride: i for i, stride in enumerate(strides)}
    for level in levels:
        if 2**level not in index:
            raise ValueError(f"{backbone} has no level {level} (stride {2**level}): its maps have strides {strides}.")
    return [index[2**level] for level in levels]


def build_necks(channels: Mapping[int, int], keywords: Mapping[str, Any]) -> nn.ModuleDict:
    """Build the neck of each level by the level's name, or the one across levels, under the name "pyramid".

    Args:
        channels: channels of each level.
        keywords: as the argument `neck` of `FeaturePath`.

    Raises:
        ValueError: an unknown keyword, or channels that differ from the channels of the level.
    """
    check_neck_keywords(keywords)
    if keywords.get("form") == PYRAMID and channels:
        own = {"channels": list(channels.values()), **drop_form(keywords)}
        if list(own["channels"]) != list(channels.values()):
            raise ValueError(f"The neck's `channels` must be {[*channels.values()]}, got {own['channels']}; omit them.")
        return nn.ModuleDict({PYRAMID: ShuntedPyramid(**own)})
    necks = nn.ModuleDict()
    for level, cin in channels.items():
        if keywords.get("cin", cin) != cin:
            raise ValueError(f"The neck's `cin` must be {cin}, the channels of level {level}, got {keywords['cin']}.")
        necks[str(level)] = ShuntedTransformer(**{**keywords, "cin": cin})
    return necks
