"""The base class of tasks whose network is built on a feature path: detection and segmentation."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from shunted_lit.models.feature_path import PYRAMID, FeaturePath, check_weights_source
from shunted_lit.models.weights import flatten, load_matching_weights, read_checkpoint
from shunted_lit.tasks.base import BaseTask

log = logging.getLogger(__name__)


def start_as_identity(neck: dict[str, Any] | None, weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the keywords of the neck of a trained network: where it had none, a new one starts as an identity.

    Keywords that say how the neck starts stay as they are.
    """
    if neck is None or any(".necks." in name for name in weights):
        return neck
    if neck.get("form") == PYRAMID or {"identity_start", "layer_scale"} & neck.keys():
        return neck
    log.info("the new neck starts as an identity; set `neck.identity_start` to false for one that does not")
    return {**neck, "identity_start": True}


class FeaturePathTask(BaseTask):
    """A task over a feature path: a timm backbone, with or without the neck.

    A subclass builds its network over `build_features(levels=...)`, assigns it to the attribute that `network` names,
    and calls `load_network_weights`. It evaluates by `validation_step` and `log_scores`.

    Args:
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Names of the classes; the command line takes them from the data.
        backbone: Name of a timm model, such as shunted_t, shunted_s or shunted_b.
        pretrained: Start the backbone from timm's pretrained weights.
        weights: Start from a file instead (a checkpoint or .safetensors). A checkpoint of the same task gives all
            weights; layers for another number of classes, and necks and heads that it lacks, start from scratch. A
            classifier of timm, of the reference implementation or of `shunted-lit fit` gives those of the backbone.
        neck: Keywords of `ShuntedTransformer`, {} for its defaults; null: no neck. With `form: pyramid`, keywords of
            `ShuntedPyramid`. A new neck in a trained network (`weights`) starts as an identity by default.
        neck_levels: Levels with a neck; level l has stride 2 ** l.
        freeze_backbone: Train all but the backbone.
        grad_checkpointing: Recompute backbone and neck in the backward pass: less memory, more time.
        backbone_options: Further keywords of `timm.create_model`.
        **optim: Settings of the optimizer, see `OptimizerConfig`.
    """

    network: str

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        *,
        backbone: str = "shunted_t",
        pretrained: bool = False,
        weights: str | None = None,
        neck: dict[str, Any] | None = None,
        neck_levels: list[int] = [5],  # noqa: B006 - read only; a list, as in YAML and checkpoints
        freeze_backbone: bool = False,
        grad_checkpointing: bool = False,
        backbone_options: dict[str, Any] | None = None,
        **optim: Any,
    ):
        super().__init__(num_classes, class_names, **optim)
        content = {} if weights is None else read_checkpoint(weights)
        self._network_weights: tuple[str, dict[str, Any]] | None = None
        if weights is not None and any(name.startswith(f"{self.network}.") for name in flatten(content)):
            check_weights_source(pretrained, weights)
            self._network_weights, weights = (weights, content), None
            neck = self.hparams["neck"] = start_as_identity(neck, flatten(content))
        self.build_features = functools.partial(
            FeaturePath, backbone, pretrained=pretrained, weights=weights, neck=neck, neck_levels=neck_levels,
            freeze_backbone=freeze_backbone, grad_checkpointing=grad_checkpointing, backbone_options=backbone_options,
        )  # fmt: skip

    @property
    def backbone(self) -> nn.Module:
        """The timm backbone, which Lightning's `BackboneFinetuning` freezes."""
        return next(module for module in self.modules() if isinstance(module, FeaturePath)).backbone

    def load_network_weights(self, classifiers: Sequence[str], optional: Sequence[str]) -> None:
        """Load the weights of the whole network where `weights` is a file of it.

        Args:
            classifiers: Names of the layers that depend on the number of classes.
            optional: Names of modules that the file may lack.

        Raises:
            ValueError: The weights do not fit; with the settings in which file and task differ.
        """
        if self._network_weights is None:
            return
        (source, content), self._network_weights = self._network_weights, None
        try:
            load_matching_weights(self, flatten(content), source, classifiers=classifiers, optional=optional)
        except ValueError as error:
            saved, current = content.get("hyper_parameters", {}), self.hparams
            irrelevant = {"num_classes", "class_names", *asdict(self.optim), *self.evaluation_settings}
            differences = "; ".join(
                f"{name} is {saved[name]!r} in the file, {current[name]!r} here"
                for name in sorted(current.keys() & saved.keys() - irrelevant)
                if saved[name] != current[name]
            )
            raise ValueError(f"{error} Settings that differ: {differences}." if differences else str(error)) from None
        names = content.get("class_names", self.class_names)
        if len(names) == len(self.class_names) and names != self.class_names:
            label = next(i for i, pair in enumerate(zip(names, self.class_names, strict=True)) if len(set(pair)) > 1)
            log.warning("%s: class %d is %r in the file and %r here; classes take the weights of the same number",
                        source, label, names[label], self.class_names[label])  # fmt: skip

    def log_scores(self, stage: str) -> None:
        """Log the scores of an evaluation under `stage`/, "val" or "test", and reset the metrics."""
        raise NotImplementedError

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")
