"""The backbones as timm models: variants, default configurations, pretrained weights, registration, timm's methods.

Importing this module registers `shunted_t`, `shunted_s` and `shunted_b`; `import shunted_lit` does so as soon as timm
is imported. `shunted.py`, whose backbone inherits `TimmBackbone`, is imported only when a model is built.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # has no public name; timm's own models import it from here
from torch import Tensor, nn

from shunted_lit.models import ops
from shunted_lit.models.weights import ReferenceWeightsMixin, from_reference_names, init_weights
from shunted_lit.utils.checks import check_choice

log = logging.getLogger(__name__)

VARIANTS: dict[str, dict[str, Any]] = {
    "shunted_t": {"depths": (1, 2, 4, 1), "num_conv": 0},
    "shunted_s": {"depths": (2, 4, 12, 1), "num_conv": 1},
    "shunted_b": {"depths": (3, 4, 24, 2), "num_conv": 2},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "input_size": (3, 224, 224), "pool_size": (7, 7), "fixed_input_size": False, "num_classes": 1000,
            "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stages.0.patch_embed.conv.0", "classifier": "head.fc", "license": "apache-2.0",
        }
        for name in VARIANTS
    }
)  # fmt: skip


class TimmBackbone(ReferenceWeightsMixin):
    """timm's interface for a backbone with `stages`, `head`, `feature_info` and `default_cfg`."""

    if TYPE_CHECKING:  # TorchScript reads annotations of classes, and does not know these types
        stages: nn.Sequential
        head: ClassifierHead
        feature_info: list[dict[str, Any]]
        in_chans: int

    def set_head(self, channels: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any) -> None:
        """Build the classifier on maps of `channels`."""
        check_choice("global_pool", global_pool, ("avg", "max", "avgmax", ""))
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels
        self.head = ClassifierHead(channels, num_classes, global_pool, drop_rate, **dd)

    def init_weights(self) -> None:
        """Draw all weights again, as the reference does; also after `to_empty` on the meta device."""
        self.apply(init_weights)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by an untrained one; `global_pool` None keeps the pooling."""
        check_choice("global_pool", global_pool or self.head.global_pool.pool_type, ("avg", "max", "avgmax", ""))
        self.num_classes = num_classes
        example = next(self.parameters())
        self.head.reset(num_classes, global_pool, device=example.device, dtype=example.dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups, for layer decay: one a block, or one a stage if `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),  # with the first block of its stage
            (r"^stages\.(\d+)\.block\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),  # with the last block of its stage
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, more time."""
        for stage in self.stages.children():
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def freeze_patch_embed(self) -> None:
        """Stop training the stem; its BatchNorms still follow the data in training mode."""
        stem: Any = self.stages[0].patch_embed
        stem.requires_grad_(False)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the stages in `indices` (as in timm), each (B, dim, h, w) after the stage's norm.

        The last map comes before the list unless `intermediates_only`. `norm` changes nothing.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and with any of them, or on request, the head."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index + 1 < len(self.stages)
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dims[-1], ceil(H / 32), ceil(W / 32)), after the last norm, not pooled."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, dims[-1], h, w) -> (B, num_classes), or (B, dims[-1]) if `pre_logits`; a map where nothing is pooled."""
        if pre_logits or self.head.global_pool.pool_type:
            return self.head(x, pre_logits=pre_logits)
        return ops.to_image(self.head.fc(ops.to_tokens(self.head.drop(x))), (x.shape[2], x.shape[3]))

    def weights_advice(self, weights: Mapping[str, Any]) -> str:
        shapes = {name: getattr(value, "shape", None) for name, value in weights.items()}
        matches = {}
        for name in VARIANTS:
            own = create(name, pretrained=False, in_chans=self.in_chans, device="meta").state_dict().items()
            matches[name] = sum(shapes.get(key) == value.shape for key, value in own if not key.startswith("head."))
        nearest = max(matches, key=lambda name: matches[name])
        if not matches[nearest]:
            return "They are not those of a Shunted Transformer."
        return (
            f"{matches[nearest]} of these {len(shapes)} tensors would fit {nearest}; to leave out a head of other "
            "classes, or to change channels, use pretrained=True, pretrained_cfg_overlay={'file': ...}."
        )


def stage_strides(first: int, stages: int, output_stride: int | None) -> list[int]:
    """Return the stride of each stage: from that of the stem, doubled by each stage while within `output_stride`."""
    if output_stride not in (None, 8, 16, 32) or first > (output_stride or first):
        raise ValueError(f"`output_stride` must be 8, 16 or 32, and at least the stem's {first}, got {output_stride}.")
    strides = [first]
    while len(strides) < stages:
        doubled = 2 * strides[-1]
        strides.append(strides[-1] if output_stride and doubled > output_stride else doubled)
    return strides


def pretrained_filter(checkpoint: Mapping[str, Any], model: TimmBackbone) -> dict[str, Any]:
    """Return weights under this package's names, for timm to load; timm adapts the stem to other channels.

    timm is not strict where classes differ, so what does not fit is refused here. It also drops the head unless the
    model has as many classes as `default_cfg`, so a head that fits is loaded here.
    """
    weights, config = from_reference_names(checkpoint), cast(dict[str, Any], model.default_cfg)
    stem = f"{config['first_conv']}.weight"
    heads, body = ({k: v for k, v in model.state_dict().items() if k.startswith("head.") is it} for it in (True, False))
    given = {k: body[k] if k == stem else v for k, v in weights.items() if not k.startswith("head.")}
    model.check_weights(given, body)
    if heads and model.num_classes != config["num_classes"]:
        given = {name: value for name, value in weights.items() if name.startswith("head.")}
        if {name: value.shape for name, value in given.items()} == {name: v.shape for name, v in heads.items()}:
            model.load_state_dict(given, strict=False)
        else:
            classes = len(given["head.fc.bias"]) if "head.fc.bias" in given else 0
            log.info("head not loaded: the weights have %d classes, the model %d", classes, model.num_classes)
    return weights


def create(variant: str, pretrained: bool, **keywords: Any) -> TimmBackbone:
    """Build a variant as `timm.create_model` does."""
    from shunted_lit.models.shunted import ShuntedBackbone

    return build_model_with_cfg(
        ShuntedBackbone,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**VARIANTS[variant], **keywords},
    )


@register_model
def shunted_t(pretrained: bool = False, **keywords: Any) -> TimmBackbone:
    """Shunted-T: 11.6 M parameters, 2.1 G multiply-adds at 224 x 224."""
    return create("shunted_t", pretrained, **keywords)


@register_model
def shunted_s(pretrained: bool = False, **keywords: Any) -> TimmBackbone:
    """Shunted-S: 22.4 M parameters, 4.9 G multiply-adds at 224 x 224."""
    return create("shunted_s", pretrained, **keywords)


@register_model
def shunted_b(pretrained: bool = False, **keywords: Any) -> TimmBackbone:
    """Shunted-B: 39.6 M parameters, 8.1 G multiply-adds at 224 x 224."""
    return create("shunted_b", pretrained, **keywords)
