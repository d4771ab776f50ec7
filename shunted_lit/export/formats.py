"""Export formats: write a program to a file, run the file, and compare its outputs with PyTorch's."""

import functools
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from shunted_lit.data.shapes import SceneOptions, ShapesDataset
from shunted_lit.export.targets import TOLERANCE, ExportTarget, Outputs, Runner
from shunted_lit.export.wrappers import fold_residuals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """A file format and its runtime.

    Attributes:
        write: writes a program to a path.
        load: returns a function that runs the file at a path in a precision.
        suffixes: of the files written; the first is that of the path.
        packages: what the format needs.
        precisions: what the runtime computes in on CPUs.
    """

    write: Callable[[ExportedProgram, Path, ExportTarget], None]
    load: Callable[[Path, str], Runner]
    suffixes: tuple[str, ...]
    packages: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("float32",)


def write_torch_export(program: ExportedProgram, path: Path, target: ExportTarget) -> None:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(target.metadata)})


def load_torch_export(path: Path, precision: str = "float32") -> Runner:
    module = torch.export.load(path).module()

    def run(x: Tensor) -> Outputs:
        try:
            return as_tuple(module(x))
        except AssertionError as error:  # a guard of the program, such as images.size()[2] >= 129
            raise ValueError(f"torch_export cannot take all sizes of this network ({error}); choose onnx.") from error

    return run


def write_onnx(program: ExportedProgram, path: Path, target: ExportTarget) -> None:
    inputs = ["images" if target.channels == 3 else "features"]
    written: Any = torch.onnx.export(
        program, input_names=inputs, output_names=list(target.outputs), dynamo=True, verbose=False
    )
    written.model.metadata_props.update({key: json.dumps(value) for key, value in target.metadata.items()})
    written.save(path)


def load_onnx(path: Path, precision: str = "float32") -> Runner:
    import onnxruntime

    return run_session(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


def run_session(session: Any) -> Runner:
    """Return a function that runs an InferenceSession of ONNX Runtime."""
    (argument,) = session.get_inputs()
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {argument.name: x.numpy()})]


def write_openvino(program: ExportedProgram, path: Path, target: ExportTarget) -> None:
    import openvino

    intermediate = path.with_suffix(".onnx")
    write_onnx(program, intermediate, target)
    model = openvino.convert_model(intermediate)
    intermediate.unlink()
    for key, value in target.metadata.items():
        model.set_rt_info(json.dumps(value), ["shunted_lit", key])
    openvino.save_model(model, path, compress_to_fp16=False)


@functools.cache
def openvino_core() -> Any:
    """Return the one OpenVINO core of this process.

    With several, a later signal (such as a DataLoader worker's exit) can crash the process: OpenVINO 2026.4 moves the
    signal stack with each new core and restores it with each deleted one, which leaves it on freed memory when two are
    deleted in the order of their creation.
    """
    import openvino

    return openvino.Core()


def load_openvino(path: Path, precision: str = "float32") -> Runner:
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]  # the default is bfloat16 on CPUs that support it
    return run_compiled(openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint}))


def run_compiled(model: Any) -> Runner:
    """Return a function that runs a CompiledModel of OpenVINO."""
    return lambda x: [torch.from_numpy(out.copy()) for out in model(x.numpy()).values()]


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: Mapping[str, Format] = {
    "onnx": Format(write_onnx, load_onnx, (".onnx",), ONNX),
    "openvino": Format(write_openvino, load_openvino, (".xml", ".bin"), (*ONNX, "openvino"), ("float32", "bfloat16")),
    "torch_export": Format(write_torch_export, load_torch_export, (".pt2",)),
}


def check_runtime(format: str) -> None:
    """Raise ValueError if a package that a format needs is not installed."""
    if missing := [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{format} needs {', '.join(missing)}: pip install 'shunted-lit[export]'")


def export_verified(target: ExportTarget, format: str, out: Path, fixed: Mapping[str, int | None],
                    finish: Callable[[Path], Any] | None = None) -> float:  # fmt: skip
    """Export a network, run the file at three sizes, and move it to `out` if its outputs equal PyTorch's.

    Args:
        target: what to export.
        format: one of `FORMATS`.
        out: the file to write.
        fixed: "batch", "height" and "width" of the only accepted input; None keeps a dimension dynamic.
        finish: changes the verified file, or raises an error, before it is moved to `out`; the changed file must run at
            the three sizes, too.

    Returns:
        The largest difference from PyTorch, before `finish`.

    Raises:
        ValueError: the difference exceeds `TOLERANCE`, or a dimension cannot be dynamic; no file is written.
    """
    kind, compare = FORMATS[format], target.compare or largest_difference
    inputs = make_check_inputs(target, fixed)
    dynamic = {i: Dim.DYNAMIC for i, name in {0: "batch", 2: "height", 3: "width"}.items() if fixed[name] is None}
    # At this size every map has several rows and columns, and padding: exporters would treat exceptions as constant.
    height, width = fixed["height"] or 3 * target.stride + 1, fixed["width"] or 4 * target.stride + 1
    example = torch.rand(fixed["batch"] or 2, target.channels, height, width)
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=out.parent) as folder:
        warnings.simplefilter("ignore")  # exporters warn about their own internals
        expected = [as_tuple(target.network(x)) for x in inputs]
        errors = []
        if target.reference is not None and not any(fixed.values()):
            errors += [compare(outputs[:3], target.reference(x)) for x, outputs in zip(inputs, expected, strict=True)]
        if "scores" in target.outputs and not any((outputs[2] > 0).any() for outputs in expected):
            log.warning("The detector found no object in the check images, so empty results were compared.")
        network = fold_residuals(target.network)
        program = torch.export.export(network, (example,), dynamic_shapes=(dynamic,), strict=False)
        path = Path(folder) / out.name
        kind.write(program, path, target)
        run = kind.load(path, "float32")
        errors += [compare(run(x), outputs) for x, outputs in zip(inputs, expected, strict=True)]
        if not max(errors) <= TOLERANCE:
            raise ValueError(
                f"{out} is not written: its outputs may differ from PyTorch's by at most {TOLERANCE:g}, "
                f"got {max(errors):.1e}; try another format."
            )
        if finish is not None:
            finish(path)
            run = kind.load(path, "float32")
            for x, outputs in zip(inputs, expected, strict=True):
                actual, wanted = ([list(out.shape) for out in tensors] for tensors in (run(x), outputs))
                if actual != wanted:
                    raise ValueError(f"{out} is not written: its outputs must have the shapes {wanted}, got {actual}.")
        for suffix in kind.suffixes:
            path.with_suffix(suffix).replace(out.with_suffix(suffix))
    return max(errors)


def make_check_inputs(target: ExportTarget, fixed: Mapping[str, int | None]) -> list[Tensor]:
    """Return three inputs that differ in their dynamic dimensions: drawn scenes for images in 0..1, else noise."""
    inputs = []
    for sizes in zip((2, 1, 3), *zip(*target.check_sizes, strict=True), strict=True):
        batch, height, width = (fixed[name] or size for name, size in zip(fixed, sizes, strict=True))
        if target.takes_images and target.channels == 3:
            side = max(height, width, 16)
            options = SceneOptions("boxes", seed=0, size=side, min_extent=6, max_objects=12)
            scenes: Any = ShapesDataset("val", batch, options, lambda image, target: image)
            images = [scenes[i].as_subclass(Tensor)[:, :height, :width] / 255 for i in range(batch)]
            inputs.append(torch.stack(images))
        else:
            generator = torch.Generator().manual_seed(0)
            inputs.append(torch.randn(batch, target.channels, height, width, generator=generator))
    return inputs


def as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def largest_difference(actual: Outputs, expected: Outputs) -> float:
    """Return the largest elementwise difference, relative to the largest element where that is above 1."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if a.shape == b.shape else torch.inf
        for a, b in zip(actual, expected, strict=True)
    )
