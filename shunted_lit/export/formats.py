"""Models out of Python: trained or by name, in formats that other programs read, checked before they are there."""

import functools
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from shunted_lit.data.classification import eval_transform_options
from shunted_lit.data.shapes import SceneOptions, ShapesDataset
from shunted_lit.export.batched_detectors import Normalized, batched, with_free_bins
from shunted_lit.models.shunted import ShuntedTransformer
from shunted_lit.models.timm_registry import VARIANTS
from shunted_lit.models.weights import from_reference_names, infer_neck_keywords, read_checkpoint
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask
from shunted_lit.utils.files import check_new_folder

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of what is exported from PyTorch: absolute, or relative to the largest output where that is above 1
Outputs = Sequence[Tensor]


@dataclass
class Exportable:
    """A network, and what there is to know of its inputs and outputs."""

    network: nn.Module
    channels: int
    outputs: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # height and width of three inputs to check it at
    note: str  # what goes in and what comes out
    metadata: dict[str, Any] = field(default_factory=dict)
    stride: int = 32  # pixels of the input to one of the coarsest map
    pictures: bool = False  # whether inputs are in 0..1
    reference: Callable[[Tensor], Outputs] | None = None  # what the network itself is checked against, if anything
    error: Callable[[Outputs, Outputs], float] | None = None  # the largest difference between elements, where None
    save: Callable[[Path], None] | None = None  # writes the safetensors folder, where there is one to write


# --- what can be exported, by name or out of a checkpoint


def named(source: str, options: Mapping[str, Any]) -> Exportable:
    """The neck, or a variant of the backbone, untrained."""
    log.warning("%s is exported untrained: name a checkpoint to export its weights", source)
    if source == "neck":
        return neck_parts(ShuntedTransformer(**options).eval())
    return backbone_parts(timm.create_model(source, **options))


def neck_parts(neck: ShuntedTransformer) -> Exportable:
    def save(out: Path) -> None:
        weights = {name: value.contiguous() for name, value in neck.state_dict().items()}
        heads = {"num_heads": attention.num_heads, "qk_scale": attention.groups[0].scale}
        out.mkdir(parents=True, exist_ok=True)
        known = {**infer_neck_keywords(weights), **heads, **neck.variants, "ratios": ratios}
        save_file(weights, out / "model.safetensors", {"neck": json.dumps(known)})

    attention: Any = cast(Any, neck.block[0]).attn
    cin, ratios = neck.cin, [group.ratio for group in attention.groups]
    note = f"features (B, {cin}, H, W) -> output (B, {cin}, H, W)"
    return Exportable(neck, cin, ("output",), ((40, 40), (13, 21), (20, 9)), note, stride=max(ratios), save=save)


def backbone_parts(
    model: nn.Module, names: Sequence[str] | None = None, options: Any = None, data: Mapping[str, Any] | None = None
) -> Exportable:
    """A classifier as timm has it, on normalized images; on plain ones, with `data`, what its run knew of images."""
    config: Any = model.pretrained_cfg
    trained, data = data is not None, data or {}
    size = {"input_size": (3, data["image_size"], data["image_size"])} if "image_size" in data else {}

    def save(out: Path) -> None:
        save_for_hf(
            model.to(memory_format=torch.contiguous_format),
            str(out),
            model_config={"label_names": names} if names else None,
            model_args=options or None,
            safe_serialization=True,
            data_config={**size, **eval_transform_options(data)} or None,
        )

    channels: Any = model.in_chans
    mean, std = config["mean"], config["std"]
    inputs = "in 0..1" if trained else f"normalized by mean {mean} and std {std}"
    return Exportable(
        Normalized(model, mean, std) if trained else model,
        channels,
        ("logits",),
        ((224, 224), (97, 131), (64, 160)),
        f"images (B, {channels}, H, W), {inputs} -> logits (B, {model.num_classes})",
        {"names": list(names or [])},
        pictures=trained,
        save=save,
    )


def classifier_parts(source: str, content: Mapping[str, Any]) -> Exportable:
    task = ClassificationTask.load_from_checkpoint(source, map_location="cpu", weights_only=True)
    data = content.get("datamodule_hyper_parameters", {})
    return backbone_parts(task.model, task.class_names, task.hparams["backbone_options"], data)


def detector_parts(source: str, content: Mapping[str, Any]) -> Exportable:
    task = DetectionTask.load_from_checkpoint(source, map_location="cpu", weights_only=True).eval()
    transform: Any = task.detector.transform
    short, longest = transform.min_size[-1], transform.max_size  # in evaluation, the last of several
    network: Any = batched(task.detector)
    # Sizes that torchvision's detector, which is the reference, takes as they are.
    sizes = (short, short), (short, min(short * 4 // 3, longest)), (min(short * 3 // 2, longest), short)
    note = f"images (B, 3, H, W) in 0..1, short side {short} -> boxes (B, {network.count}, 4) x1 y1 x2 y2 in pixels"
    masks = network.has_masks
    return Exportable(
        network,
        3,
        ("boxes", "labels", "scores", *(("masks",) if masks else ())),
        sizes,
        f"{note}, labels, scores, 0 for none{', masks 28 x 28 over each box' if masks else ''}",
        {"names": task.class_names, "min_size": short, "max_size": longest},
        stride=network.coarsest,
        pictures=True,
        reference=lambda images: padded(task(list(images)), network.count),
        error=detection_error,
    )


def segmenter_parts(source: str, content: Mapping[str, Any]) -> Exportable:
    task = SegmentationTask.load_from_checkpoint(source, map_location="cpu", weights_only=True)
    classes = len(task.class_names)
    return Exportable(
        with_free_bins(task.eval().segmenter),
        3,
        ("logits",),
        ((128, 128), (97, 131), (160, 96)),
        f"images (B, 3, H, W) in 0..1 -> logits (B, {classes}, H, W)",
        {"names": task.class_names},
        pictures=True,
        reference=lambda images: (task.segmenter(images),),
    )


TASKS: Mapping[str, Callable[[str, Mapping[str, Any]], Exportable]] = {
    ClassificationTask.__name__: classifier_parts,
    DetectionTask.__name__: detector_parts,
    SegmentationTask.__name__: segmenter_parts,
}


def padded(results: Sequence[Mapping[str, Tensor]], count: int) -> Outputs:
    """Detections of torchvision's form as (B, count, ...), with zeros where there are no more."""

    def pad(name: str) -> Tensor:
        rows = [result[name] for result in results]
        return torch.stack([torch.cat([row, row.new_zeros(count - len(row), *row.shape[1:])]) for row in rows])

    return pad("boxes"), pad("labels"), pad("scores")


def detection_error(found: Outputs, expected: Outputs) -> float:
    """The largest difference of a detection from the nearest one of its class and image.

    In scores, in masks, and in boxes over the largest coordinate. Not element by element: equal scores may stand in
    another order. The least scores of a full list are left out: which of several equal ones is the last is by chance.
    """
    worst, scale = 0.0, expected[0].max().clamp(min=1)
    for one, other in ((found, expected), (expected, found)):
        for (boxes, labels, scores, *masks), (boxes2, labels2, scores2, *masks2) in zip(
            zip(*one, strict=True), zip(*other, strict=True), strict=True
        ):
            last = scores[-1] + TOLERANCE if scores[-1] > 0 else scores.new_zeros(())
            alike = (labels2 == labels[:, None]) & (scores2 > 0)
            apart = torch.maximum((boxes2 - boxes[:, None]).abs().amax(-1) / scale, (scores2 - scores[:, None]).abs())
            apart, nearest = apart.masked_fill(~alike, torch.inf).min(1)
            for mask, mask2 in zip(masks, masks2, strict=True):
                apart = torch.maximum(apart, (mask - mask2[nearest]).abs().flatten(1).amax(1))
            worst = max([worst, *apart[scores > last].tolist()])
    return worst


def find(source: str, part: str, level: int | None, options: Mapping[str, Any] | None) -> Exportable:
    """What `source` names, and in it what `part` names."""
    known = ("neck", *VARIANTS)
    if source in known and not Path(source).is_file():
        return named(source, options or {})
    if not Path(source).exists():
        raise ValueError(f"{source} is neither a file nor one of {', '.join(known)}")
    if options:
        raise ValueError(f"options are for models by name; {source} is a file, which says what it holds")
    content = read_checkpoint(source)
    weights = from_reference_names(content)
    of_a_neck = "patch_embed.proj.weight" in weights and "task" not in content
    if part == "neck" or of_a_neck:
        return neck_parts(ShuntedTransformer.from_checkpoint(source, level))
    if "task" not in content:
        return backbone_parts(backbone_of(source, weights))
    if content["task"] not in TASKS:
        raise ValueError(f"{source} is of {content['task']}, but only {', '.join(TASKS)} can be exported")
    return TASKS[content["task"]](source, content)


def backbone_of(path: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The variant whose weights these are, with as many classes as they have."""
    depths = {name: options["depths"] for name, options in VARIANTS.items()}
    found = tuple(
        len({name.split(".")[3] for name in weights if name.startswith(f"stages.{i}.block.")}) for i in range(4)
    )
    variants = [name for name in VARIANTS if depths[name] == found]
    if not variants:
        raise ValueError(f"{path} holds no backbone: blocks a stage are {found}, but {depths} are known")
    classes = len(weights["head.fc.bias"]) if "head.fc.bias" in weights else 0
    stem = weights.get("stages.0.patch_embed.conv.0.weight")
    channels = 3 if stem is None else stem.shape[1]
    model = timm.create_model(variants[0], num_classes=classes, in_chans=channels)
    model.load_state_dict(weights)
    return model


# --- formats: how a program is written, and how what was written is run


def write_torch_export(program: ExportedProgram, path: Path, parts: Exportable) -> None:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(parts.metadata)})


def run_torch_export(path: Path, precision: str = "float32") -> Callable[[Tensor], Outputs]:
    module = torch.export.load(path).module()

    def run(x: Tensor) -> Outputs:
        try:
            return as_tuple(module(x))
        except AssertionError as error:  # a guard of the program, such as images.size()[2] >= 129
            raise ValueError(f"torch_export can't take all sizes of this network ({error}); onnx can") from error

    return run


def write_onnx(program: ExportedProgram, path: Path, parts: Exportable) -> None:
    inputs = ["images" if parts.channels == 3 else "features"]
    written: Any = torch.onnx.export(
        program, input_names=inputs, output_names=list(parts.outputs), dynamo=True, verbose=False
    )
    written.model.metadata_props.update({key: json.dumps(value) for key, value in parts.metadata.items()})
    written.save(path)


def run_onnx(path: Path, precision: str = "float32") -> Callable[[Tensor], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {argument.name: x.numpy()})]


def write_openvino(program: ExportedProgram, path: Path, parts: Exportable) -> None:
    import openvino

    between = path.with_suffix(".onnx")
    write_onnx(program, between, parts)
    model = openvino.convert_model(between)
    between.unlink()
    for key, value in parts.metadata.items():
        model.set_rt_info(json.dumps(value), ["shunted_lit", key])
    openvino.save_model(model, path, compress_to_fp16=False)


@functools.cache
def openvino_core() -> Any:
    """One for the process: OpenVINO (2026.4) moves the stack that signals are handled on with each new core, and back
    with each that goes. Two that go in the order they came leave it on freed memory: the next signal, such as the end
    of a DataLoader's worker, is a segmentation fault."""
    import openvino

    return openvino.Core()


def run_openvino(path: Path, precision: str = "float32") -> Callable[[Tensor], Outputs]:
    # By itself it computes in bfloat16 where the processor has units for that.
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    model = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda x: [torch.from_numpy(out.copy()) for out in model(x.numpy()).values()]


@dataclass(frozen=True)
class Format:
    """An entry of `FORMATS`."""

    write: Callable[[ExportedProgram, Path, Exportable], None]
    run: Callable[..., Callable[[Tensor], Outputs]]  # from a file, and a precision, float32 by default
    suffixes: tuple[str, ...]  # of the files written, the first one the name
    packages: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("float32",)  # that its runtime computes in, on processors


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: Mapping[str, Format] = {
    "onnx": Format(write_onnx, run_onnx, (".onnx",), ONNX),
    "openvino": Format(write_openvino, run_openvino, (".xml", ".bin"), (*ONNX, "openvino"), ("float32", "bfloat16")),
    "torch_export": Format(write_torch_export, run_torch_export, (".pt2",)),
}


def check_runtime(format: str) -> None:
    """Raises ValueError where a package that a format needs is not installed."""
    if missing := [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{format} needs {', '.join(missing)}: pip install 'shunted-lit[export]'")


# --- the command


def export(
    source: str,
    format: Literal["onnx", "openvino", "torch_export", "safetensors"] = "safetensors",
    out: Path | None = None,
    part: Literal["model", "neck"] = "model",
    level: int | None = None,
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Write a neck, backbone, classifier, detector or segmenter for use without this package.

    Batch, height and width of what is exported are free, but for what is fixed below. A file is there only once it was
    run at three sizes by its own runtime, and gave what PyTorch gives; the largest difference found is told.

    Args:
        source: a checkpoint of `shunted-lit fit`; weights of a neck or of a shunted_t, _s or _b, such as the authors';
            or "neck", "shunted_t", "shunted_s" or "shunted_b" for an untrained one.
        format: "onnx"; "openvino" (a .xml and a .bin); "torch_export" (.pt2, for `torch.export.load`); "safetensors", a
            folder as Hugging Face's hub has them, of a classifier or backbone for `timm.create_model("local-dir:OUT",
            pretrained=True)` once shunted_lit is imported, or of a neck for `ShuntedTransformer.from_checkpoint`.
        out: file or folder to write; must not be there. Named after the source, in this folder, by default.
        part: "neck" for the neck of a detector or segmenter alone.
        level: which neck, where there are several.
        batch, height, width: where given, the only one that will be taken; some runtimes are faster so.
        options: keywords for a model by name, such as {"cin": 256} or {"num_classes": 10}.

    Raises:
        ValueError: a runtime that is not installed, a size below 1, something that can't be exported so, a file that is
            there already; what was written gives something else than PyTorch.
    """
    fixed = {"batch": batch, "height": height, "width": width}
    for name, value in fixed.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but at least 1 is needed, or null for any")
    kind = FORMATS.get(format)
    if kind:
        check_runtime(format)
    out = out or Path(Path(source).stem + (kind.suffixes[0] if kind else ""))
    if kind is None:
        check_new_folder(out)
    elif existing := [path for path in map(out.with_suffix, kind.suffixes) if path.exists()]:
        raise ValueError(f"{existing[0]} is there already; name another file by --out")
    elif out.suffix != kind.suffixes[0]:
        raise ValueError(f"{out} does not end in {kind.suffixes[0]}, as {format} files do")
    parts = find(source, part, level, options)
    parts.network.eval()
    if kind is not None:
        error = write_checked(parts, kind, out, fixed)
        files = ", ".join(str(out.with_suffix(suffix)) for suffix in kind.suffixes)
        print(f"{files}: {parts.note}; within {error:.1e} of PyTorch at three sizes")
        return
    if parts.save is None:
        raise ValueError(f"{source}: safetensors is for classifiers, backbones and necks; choose onnx, openvino or "
                         "torch_export, or part=neck")  # fmt: skip
    if any(fixed.values()):
        raise ValueError("safetensors holds weights alone: batch, height and width say nothing there")
    parts.save(out)
    print(", ".join(map(str, sorted(out.iterdir()))))


def write_checked(parts: Exportable, kind: Format, out: Path, fixed: Mapping[str, int | None]) -> float:
    """Writes `out` once the same in a folder beside it was found to be equal to PyTorch; returns the difference."""
    inputs, shapes = check_inputs(parts, fixed), {0: "batch", 2: "height", 3: "width"}
    free = {i: Dim.DYNAMIC for i, name in shapes.items() if fixed[name] is None}
    # A size at which no map has a single row or column, and which is padded: exporters take both for what always is.
    sizes = (fixed["batch"] or 2, fixed["height"] or 3 * parts.stride + 1, fixed["width"] or 4 * parts.stride + 1)
    example = torch.rand(sizes[0], parts.channels, *sizes[1:])
    compare = parts.error or largest_difference
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=out.parent) as folder:
        warnings.simplefilter("ignore")  # of the exporters, about their own workings
        expected = [as_tuple(parts.network(x)) for x in inputs]
        errors = []
        if parts.reference is not None and not any(fixed.values()):
            errors += [compare(outputs[:3], parts.reference(x)) for x, outputs in zip(inputs, expected, strict=True)]
        if "scores" in parts.outputs and not any((outputs[2] > 0).any() for outputs in expected):
            log.warning("the detector found nothing in the scenes drawn for the check: only that was compared")
        program = torch.export.export(parts.network, (example,), dynamic_shapes=(free,), strict=False)
        path = Path(folder) / out.name
        kind.write(program, path, parts)
        run = kind.run(path)
        errors += [compare(run(x), outputs) for x, outputs in zip(inputs, expected, strict=True)]
        if not max(errors) <= TOLERANCE:
            raise ValueError(f"{out} is not written: its outputs differ from PyTorch's by {max(errors):.1e}")
        for suffix in kind.suffixes:
            path.with_suffix(suffix).replace(out.with_suffix(suffix))
    return max(errors)


def check_inputs(parts: Exportable, fixed: Mapping[str, int | None]) -> list[Tensor]:
    """Three inputs, of other sizes where these are free: noise, or for networks of pictures drawn scenes."""
    inputs = []
    for sizes in zip((2, 1, 3), *zip(*parts.sizes, strict=True), strict=True):
        batch, height, width = (fixed[name] or size for name, size in zip(fixed, sizes, strict=True))
        if parts.pictures and parts.channels == 3:
            side = max(height, width, 16)
            options = SceneOptions("boxes", seed=0, size=side, min_extent=6, max_objects=12)
            scenes: Any = ShapesDataset("val", batch, options, lambda image, target: image)
            images = [scenes[i].as_subclass(Tensor)[:, :height, :width] / 255 for i in range(batch)]
            inputs.append(torch.stack(images))
        else:
            generator = torch.Generator().manual_seed(0)
            inputs.append(torch.randn(batch, parts.channels, height, width, generator=generator))
    return inputs


def as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def largest_difference(found: Outputs, expected: Outputs) -> float:
    """Between elements, over the largest element where that is above 1."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if a.shape == b.shape else torch.inf
        for a, b in zip(found, expected, strict=True)
    )
