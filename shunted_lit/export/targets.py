"""Export targets: the networks that can be exported, built from a name, a file of weights or a checkpoint."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_dtype

from shunted_lit.data.classification import eval_transform_options
from shunted_lit.export.batched_detectors import batch_detector
from shunted_lit.export.wrappers import NormalizedInput, replace_adaptive_pooling
from shunted_lit.models.segmenters import segment
from shunted_lit.models.shunted import ShuntedTransformer
from shunted_lit.models.timm_registry import VARIANTS
from shunted_lit.models.weights import from_reference_names, read_checkpoint
from shunted_lit.tasks import BaseTask, ClassificationTask, DetectionTask, SegmentationTask

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # largest accepted error: absolute, or relative to the largest output where that is above 1
Outputs = Sequence[Tensor]
Runner = Callable[[Tensor], Outputs]
Size = tuple[int, int]


@dataclass
class ExportTarget:
    """A network to export and what is known of its inputs and outputs.

    Attributes:
        network: the network, (B, `channels`, H, W) -> one tensor or a tuple of tensors.
        channels: input channels.
        outputs: names of the outputs.
        check_sizes: height and width of three inputs on which the exported program is compared with PyTorch.
        description: inputs and outputs in words, with shapes.
        metadata: written into the exported file as JSON, by name.
        stride: input pixels per cell of the coarsest feature map.
        takes_images: whether inputs are images in 0..1 rather than normalized images or features.
        reference: the original model that `network` is compared with, if `network` is a rewritten version.
        compare: function of two lists of outputs that returns their largest difference; elementwise by default.
        save_weights: writes a folder of safetensors, where that is supported.
        prepare: turns an image into an input (`channels`, H, W) as evaluation does; None where inputs are no images.
        task: the trained task, where there is one.
        forward: given a function that runs an exported file, returns the `forward` of the task that uses this file.
        describe_change: says how expected and actual outputs of several inputs differ, where that is no plain error.
    """

    network: nn.Module
    channels: int
    outputs: tuple[str, ...] = ("output",)
    check_sizes: tuple[Size, Size, Size] = ((40, 40), (13, 21), (20, 9))
    description: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    stride: int = 32
    takes_images: bool = False
    reference: Callable[[Tensor], Outputs] | None = None
    compare: Callable[[Outputs, Outputs], float] | None = None
    save_weights: Callable[[Path], Any] | None = None
    prepare: Callable[[Image.Image], Tensor] | None = None
    task: BaseTask | None = None
    forward: Callable[[Runner], Callable[[Any], Any]] | None = None
    describe_change: Callable[[Sequence[Outputs], Sequence[Outputs]], str] | None = None


def build_target(source: str, part: str, level: int | None, options: Mapping[str, Any] | None) -> ExportTarget:
    """Build the export target of a name, a file of weights or a checkpoint of `shunted-lit fit`.

    Args:
        source: the name of a model or the path of a file.
        part: "model", or "neck" for the neck of a detector or segmenter.
        level: pyramid level of the neck where a checkpoint has several.
        options: keywords of a model by name.

    Raises:
        ValueError: an unknown source, options for a file, or a file of something that cannot be exported.
    """
    names = ("neck", *VARIANTS)
    if source in names and not Path(source).is_file():
        log.warning("%s is exported with random weights; name a checkpoint to export trained ones.", source)
        if source == "neck":
            return neck_target(ShuntedTransformer(**(options or {})).eval())
        return backbone_target(timm.create_model(source, **(options or {})))
    if not Path(source).exists():
        raise ValueError(f"`source` must be a file or one of {', '.join(names)}; there is no file {source}.")
    if options:
        raise ValueError(f"`options` are for models by name, but {source} is a file; leave them out.")
    content = read_checkpoint(source)
    weights = from_reference_names(content)
    is_neck = "patch_embed.proj.weight" in weights and "task" not in content
    if part == "neck" or is_neck:
        neck = ShuntedTransformer.from_checkpoint(source, level)
        return neck_target(neck, None if is_neck else features_before_neck(source, content, level))
    if "task" not in content:
        return backbone_target(build_backbone(source, weights))
    return task_target(source, content)


def neck_target(neck: ShuntedTransformer, prepare: Callable[[Image.Image], Tensor] | None = None) -> ExportTarget:
    description = f"features (B, {neck.cin}, H, W) -> output (B, {neck.cin}, H, W)"
    stride = max(neck.keywords()["ratios"])
    return ExportTarget(
        neck, neck.cin, description=description, stride=stride, save_weights=neck.save_pretrained, prepare=prepare
    )


def features_before_neck(source: str, content: Mapping[str, Any], level: int | None) -> Callable[[Image.Image], Tensor]:
    """Return a function that computes the input of a neck in a trained detector or segmenter from an image."""
    target = task_target(source, content)
    necks = {name.rpartition(".necks.")[2]: module for name, module in target.network.named_modules()
             if isinstance(module, ShuntedTransformer)}  # fmt: skip
    neck = necks[str(level)] if str(level) in necks else next(iter(necks.values()))

    def prepare(image: Image.Image) -> Tensor:
        inputs: list[Tensor] = []
        hook = neck.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
        with hook, torch.no_grad():
            target.network.eval()(target.prepare(image)[None])  # type: ignore[misc]
        return inputs[0]

    return prepare


def build_backbone(path: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Create the variant that weights belong to, with their number of classes and input channels, and load them."""
    known = {name: options["depths"] for name, options in VARIANTS.items()}
    depths = tuple(
        len({name.split(".")[3] for name in weights if name.startswith(f"stages.{i}.block.")}) for i in range(4)
    )
    variants = [name for name in VARIANTS if known[name] == depths]
    if not variants:
        raise ValueError(f"{path}: the number of blocks per stage must be one of {known}, got {depths}.")
    classes = len(weights["head.fc.bias"]) if "head.fc.bias" in weights else 0
    stem = weights.get("stages.0.patch_embed.conv.0.weight")
    channels = 3 if stem is None else stem.shape[1]
    model = timm.create_model(variants[0], num_classes=classes, in_chans=channels)
    model.load_state_dict(weights)
    return model


def backbone_target(
    model: Any, names: Sequence[str] = (), options: Any = None, data: Mapping[str, Any] | None = None
) -> ExportTarget:
    """Return the target of a timm classifier.

    Args:
        model: the classifier.
        names: its class names.
        options: keywords it was created with, for `config.json`.
        data: settings of the data it was trained on; its inputs are then plain images in 0..1, else normalized ones.
    """
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    is_trained, data = data is not None, data or {}
    size = {"input_size": (3, data["image_size"], data["image_size"])} if "image_size" in data else {}

    def save_weights(out: Path) -> None:
        save_for_hf(
            model.to(memory_format=torch.contiguous_format),
            str(out),
            model_config={"label_names": names} if names else None,
            model_args=options or None,
            safe_serialization=True,
        )
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config["pretrained_cfg"].update({**size, **eval_transform_options(data)})
        # timm repeats the number of classes in `model_args`, which transformers passes on next to its own.
        config.get("model_args", {}).pop("num_classes", None)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    evaluation = {name: model.pretrained_cfg[name] for name in ("crop_pct", "interpolation")}
    transform: Any = create_transform(
        data.get("image_size", model.pretrained_cfg["input_size"][-1]),
        normalize=False,
        **{**evaluation, **eval_transform_options(data)},
    )

    def prepare(image: Image.Image) -> Tensor:
        x = to_dtype(transform(image), scale=True)
        return x if is_trained else normalize(x, mean, std)

    inputs = "in 0..1" if is_trained else f"normalized by mean {mean} and std {std}"
    return ExportTarget(
        NormalizedInput(model, mean, std) if is_trained else model,
        model.in_chans,
        ("logits",),
        ((224, 224), (97, 131), (64, 160)),
        f"images (B, {model.in_chans}, H, W), {inputs} -> logits (B, {model.num_classes})",
        {"names": list(names)},
        takes_images=is_trained,
        save_weights=save_weights,
        prepare=prepare,
    )


def classifier_target(path: str, content: Mapping[str, Any]) -> ExportTarget:
    task = ClassificationTask.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    data = content.get("datamodule_hyper_parameters", {})
    target = backbone_target(task.model, task.class_names, task.hparams["backbone_options"], data)
    target.task = task
    target.forward = lambda run: lambda images: run(to_dtype(images, scale=True))[0]
    return target


def detector_target(path: str, content: Mapping[str, Any]) -> ExportTarget:
    task = DetectionTask.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    transform: Any = task.detector.transform
    short, longest = transform.min_size[-1], transform.max_size  # evaluation takes the last of several short sides
    network = batch_detector(task.detector)

    def prepare(image: Image.Image) -> Tensor:
        return transform.resize(to_dtype(pil_to_tensor(image), scale=True), None)[0]

    def detect(run: Runner, image: Tensor) -> dict[str, Tensor]:
        x = transform.resize(image, None)[0]
        boxes, labels, scores, *masks = (output[0] for output in run(x[None]))
        found = {"boxes": boxes, "labels": labels, "scores": scores}
        found |= {"masks": masks[0][:, None]} if masks else {}
        found = {name: values[scores > 0] for name, values in found.items()}
        (result,) = transform.postprocess([found], [x.shape[-2:]], [image.shape[-2:]])
        return {**result, **({"masks": result["masks"][:, 0] >= task.detector.MASK_THRESHOLD} if masks else {})}

    outputs = f"boxes (B, {network.count}, 4) x1 y1 x2 y2 in pixels, labels, scores, 0 for none"
    return ExportTarget(
        network,
        3,
        ("boxes", "labels", "scores", *(("masks",) if network.has_masks else ())),
        # Sizes that the reference, torchvision's detector, does not rescale.
        ((short, short), (short, min(short * 4 // 3, longest)), (min(short * 3 // 2, longest), short)),
        f"images (B, 3, H, W) in 0..1, short side {short} -> {outputs}"
        + (", masks 28 x 28 over each box" if network.has_masks else ""),
        {"names": task.class_names, "min_size": short, "max_size": longest},
        stride=network.coarsest_stride,
        takes_images=True,
        reference=lambda images: pad_detections(task(list(images)), network.count),
        compare=detection_error,
        prepare=prepare,
        task=task,
        forward=lambda run: lambda images: [detect(run, image) for image in images],
        describe_change=describe_found_again,
    )


def segmenter_target(path: str, content: Mapping[str, Any]) -> ExportTarget:
    task = SegmentationTask.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    classes = len(task.class_names)

    def prepare(image: Image.Image) -> Tensor:
        inputs: list[Tensor] = []  # of the first window, where evaluation slides one over the image

        def record(x: Tensor) -> Tensor:
            inputs.append(x[0])
            return x.new_zeros(len(x), classes, *x.shape[2:])

        segment(record, to_dtype(pil_to_tensor(image), scale=True), **task.evaluation)
        return inputs[0]

    return ExportTarget(
        replace_adaptive_pooling(task.segmenter),
        3,
        ("logits",),
        ((128, 128), (97, 131), (160, 96)),
        f"images (B, 3, H, W) in 0..1 -> logits (B, {classes}, H, W)",
        {"names": task.class_names},
        takes_images=True,
        reference=lambda images: (task.segmenter(images),),
        prepare=prepare,
        task=task,
        forward=lambda run: lambda images: [segment(lambda x: run(x)[0], x, **task.evaluation) for x in images],
    )


TASK_TARGETS: Mapping[str, Callable[[str, Mapping[str, Any]], ExportTarget]] = {
    ClassificationTask.__name__: classifier_target,
    DetectionTask.__name__: detector_target,
    SegmentationTask.__name__: segmenter_target,
}


def task_target(path: str, content: Mapping[str, Any]) -> ExportTarget:
    """Return the target of a checkpoint of `shunted-lit fit`."""
    if content["task"] not in TASK_TARGETS:
        raise ValueError(f"{path}: the task must be one of {', '.join(TASK_TARGETS)}, got {content['task']}.")
    return TASK_TARGETS[content["task"]](path, content)


def pad_detections(results: Sequence[Mapping[str, Tensor]], count: int) -> Outputs:
    """Stack torchvision's detections of several images into (B, count, ...) tensors, padded with zeros."""

    def pad(name: str) -> Tensor:
        rows = [result[name] for result in results]
        return torch.stack([torch.cat([row, row.new_zeros(count - len(row), *row.shape[1:])]) for row in rows])

    return pad("boxes"), pad("labels"), pad("scores")


def describe_found_again(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> str:
    """Say how many of the expected detections with a score from 0.3 are among the actual ones, by IoU from 0.75."""
    found = total = 0
    for outputs, others in zip(expected, actual, strict=True):
        for boxes, labels, scores, boxes2, labels2, scores2 in zip(*outputs[:3], *others[:3], strict=True):
            is_sure = scores >= 0.3
            is_match = (box_iou(boxes, boxes2) >= 0.75) & (labels[:, None] == labels2) & (scores2 > 0)
            found, total = found + int((is_match.any(1) & is_sure).sum()), total + int(is_sure.sum())
    return f"finds {found} of the {total} objects again that float32 finds with a score from 0.3"


def detection_error(actual: Outputs, expected: Outputs) -> float:
    """Return the largest difference between detections and the nearest ones of the same class and image.

    Differences are those of scores, masks, and boxes relative to the largest coordinate. Detections are matched because
    equal scores may come in another order. The lowest scores of a full list are ignored: which of several equal ones is
    kept is arbitrary.
    """
    worst, extent = 0.0, expected[0].max().clamp(min=1)
    for first, second in ((actual, expected), (expected, actual)):
        for (boxes, labels, scores, *masks), (boxes2, labels2, scores2, *masks2) in zip(
            zip(*first, strict=True), zip(*second, strict=True), strict=True
        ):
            lowest = scores[-1] + TOLERANCE if scores[-1] > 0 else scores.new_zeros(())
            is_match = (labels2 == labels[:, None]) & (scores2 > 0)
            error = torch.maximum((boxes2 - boxes[:, None]).abs().amax(-1) / extent, (scores2 - scores[:, None]).abs())
            error, nearest = error.masked_fill(~is_match, torch.inf).min(1)
            for mask, mask2 in zip(masks, masks2, strict=True):
                error = torch.maximum(error, (mask - mask2[nearest]).abs().flatten(1).amax(1))
            worst = max([worst, *error[scores > lowest].tolist()])
    return worst
