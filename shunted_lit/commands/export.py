"""`shunted-lit export`: write a network in a format that other programs read."""

from pathlib import Path
from typing import Any, Literal

from shunted_lit.export.formats import FORMATS, check_runtime, export_verified
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

    Raises:
        ValueError: The source cannot be exported in this format, an argument is out of range, a runtime is not
            installed, the output exists, or the exported network differs from PyTorch.
    """
    fixed = {"batch": batch, "height": height, "width": width}
    check_minimum(1, **fixed)
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
    target = build_target(source, part, level, options)
    target.network.eval()
    if format != "safetensors":
        error = export_verified(target, format, out, fixed)
        files = ", ".join(str(out.with_suffix(suffix)) for suffix in suffixes)
        print(f"{files}: {target.description}; within {error:.1e} of PyTorch at three sizes")
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
