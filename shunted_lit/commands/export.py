"""`shunted-lit export`: write a network in a format that other programs read."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from shunted_lit import data as data_modules  # noqa: F401 - once imported, `--data` takes their names
from shunted_lit.export.formats import FORMATS, check_runtime, export_verified
from shunted_lit.export.quantization import (
    QuantizationReport,
    check_quantizer,
    choose_annotation,
    quantize_verified,
    read_calibration,
)
from shunted_lit.export.targets import build_target
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.files import check_new_file, check_new_folder


def export(
    source: str,
    format: Literal["onnx", "openvino", "torch_export", "safetensors"] = "safetensors",
    out: Path | None = None,
    *,
    part: Literal["model", "neck"] = "model",
    level: int | None = None,
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
    options: dict[str, Any] | None = None,
    quantize: Literal["int8"] | None = None,
    calibration: Path | None = None,
    data: LightningDataModule | None = None,
    max_drop: float = 1.0,
) -> None:
    """Export a neck, backbone, classifier, detector or segmenter.

    Batch size, height and width of the exported network are dynamic unless fixed below. The exported file is run by its
    own runtime at three sizes and kept only if its outputs equal PyTorch's; the largest difference is printed.

    Args:
        source: A checkpoint of `shunted-lit fit`; a file of weights of a neck, shunted_t, shunted_s or shunted_b, such
            as the reference implementation's; or one of these four names for random weights.
        format: "onnx"; "openvino" (.xml and .bin); "torch_export" (.pt2, for `torch.export.load`); or "safetensors", a
            folder in the layout of the Hugging Face hub. Load a safetensors classifier or backbone by
            `timm.create_model("local-dir:OUT", pretrained=True)` after importing shunted_lit, or a classifier by
            transformers, and a neck by `ShuntedTransformer.from_pretrained`.
        out: File or folder to write; must not exist. Named after the source by default.
        part: "neck" exports only the neck of a detector or segmenter.
        level: Pyramid level of the neck, where there are several.
        batch: Only accepted batch size; any by default.
        height: Only accepted height; any by default. Some runtimes are faster with fixed sizes.
        width: Only accepted width; any by default.
        options: Keywords of a model by name, such as {"cin": 256} or {"num_classes": 10}.
        quantize: "int8" for 8-bit integers in onnx and openvino: a quarter of the size, and faster on processors with
            such instructions.
        calibration: Folder of images as the network will see them, 10 or more, from which int8 takes its ranges; for a
            neck alone, of .npy files (channels, H, W).
        data: Labelled data; their validation split is scored in float32 and in int8, and layers that cost the score
            more than `max_drop` stay in float32. Of the classes of the checkpoint, such as `--data YoloDataModule
            --data.data data.yaml`.
        max_drop: Largest accepted loss of the score in int8, in points (hundredths).

    Raises:
        ValueError: The source cannot be exported in this format, an argument is out of range, a runtime is not
            installed, the output exists, the exported network differs from PyTorch, or int8 loses too much.
    """
    fixed = {"batch": batch, "height": height, "width": width}
    check_minimum(1, **fixed)
    check_minimum(0, max_drop=max_drop)
    if format == "safetensors":
        out = out or Path(Path(source).stem)
        check_new_folder(out)
    else:
        check_runtime(format)
        suffixes = FORMATS[format].suffixes
        out = out or Path(Path(source).stem + suffixes[0])
        check_new_file(out, suffixes[0])
        for suffix in suffixes[1:]:
            check_new_file(out.with_suffix(suffix), suffix)
    if quantize is None and (calibration is not None or data is not None):
        raise ValueError("`calibration` and `data` are for int8; add --quantize int8.")
    if quantize is not None:
        check_quantizer(format)
    target = build_target(source, part, level, options)
    target.network.eval()
    if format != "safetensors":
        reports: list[QuantizationReport] = []
        inputs = read_calibration(calibration, target, fixed) if quantize else []
        if data is not None:
            choose_annotation(target, data)

        def finish(path: Path) -> None:
            reports.append(quantize_verified(target, format, path, inputs, data, max_drop))

        error = export_verified(target, format, out, fixed, finish if quantize else None)
        files = ", ".join(str(out.with_suffix(suffix)) for suffix in suffixes)
        print(f"{files}: {target.description}; within {error:.1e} of PyTorch at three sizes")
        for report in reports:
            print(f"int8: {report}")
        return
    if target.save_weights is None:
        formats = ", ".join(FORMATS)
        raise ValueError(
            f"{source}: safetensors takes classifiers, backbones and necks; choose {formats}, or --part=neck."
        )
    if any(fixed.values()):
        raise ValueError("`batch`, `height` and `width` cannot be fixed in safetensors, which has no graph; omit them.")
    target.save_weights(out)
    print(", ".join(map(str, sorted(out.iterdir()))))
