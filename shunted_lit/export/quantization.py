"""int8: quantize an exported file on calibration images, and measure what that changes."""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from shunted_lit.data.image_io import find_images, read_image
from shunted_lit.export.formats import FORMATS, openvino_core, run_compiled, run_session
from shunted_lit.export.targets import ExportTarget, Outputs, Runner

log = logging.getLogger(__name__)

FEWEST, MOST = 10, 300  # calibration images; NNCF takes up to 300
Fixed = Mapping[str, int | None]


@dataclass(frozen=True)
class QuantizationReport:
    """What int8 changes.

    Attributes:
        change: how outputs on calibration inputs differ between float32 and int8, in words.
        score: name of the score that `before` and `after` are; "" where no labelled data were given.
        before, after: score of the float32 and of the int8 file, in 0..1.
        kept: layers that stay in float32.
    """

    change: str
    score: str = ""
    before: float = 0.0
    after: float = 0.0
    kept: Sequence[str] = ()

    @property
    def drop(self) -> float:
        """Loss of the score, in points."""
        return 100 * (self.before - self.after)

    def __str__(self) -> str:
        words = [self.change]
        if self.score:
            words.append(f"{self.score} {self.before:.4f} in float32, {self.after:.4f} in int8")
        if self.kept:
            words.append(f"in float32 stay {', '.join(self.kept)}")
        return "; ".join(words)


def check_quantizer(format: str) -> None:
    """Raise ValueError where a format has no int8, or where NNCF is not installed."""
    if format not in QUANTIZERS:
        raise ValueError(f"int8 needs the format {' or '.join(QUANTIZERS)}, got {format}; choose --format openvino.")
    if importlib.util.find_spec("nncf") is None:
        raise ValueError("int8 needs nncf: pip install 'shunted-lit[quantize]'")


def choose_annotation(target: ExportTarget, data: Any) -> None:
    """Let a data module provide what the target's task is scored by; raise ValueError where it cannot."""
    if target.task is None:
        raise ValueError("`data` scores the task of a checkpoint, but this source has none; leave it out.")
    if getattr(data, "slicing", None) is not None:
        raise ValueError("`data.slices` must be null for export: the exported network takes whole images.")
    if target.task.annotation in getattr(data, "offers", ()):
        data.choose_annotation(target.task.annotation)
    target.task.check_data(data)


def read_calibration(folder: Path | None, target: ExportTarget, fixed: Fixed) -> list[Tensor]:
    """Read the calibration inputs of a network, each (B, `channels`, H, W).

    Args:
        folder: images, prepared as evaluation does; or, for a neck alone, features as .npy files (channels, H, W).
        target: the network.
        fixed: "batch", "height" and "width" of the only accepted input; None for any.

    Raises:
        ValueError: there is no such folder, it holds too few files, or a file has other channels.
    """
    if folder is None or not folder.is_dir():
        raise ValueError(f"int8 needs a folder of images as `calibration`, at least {FEWEST}, got {folder}; name one.")
    if target.prepare is None:
        kind, paths, read = "features as .npy files", sorted(folder.rglob("*.npy")), read_features
    else:
        kind, paths, read = "images", find_images(folder), lambda path: target.prepare(read_image(path))  # type: ignore
    if len(paths) < FEWEST:
        raise ValueError(f"`calibration` must hold at least {FEWEST} {kind}, got {len(paths)} in {folder}; add some.")
    inputs = []
    for path in paths[:: -(-len(paths) // MOST)]:
        x = read(path)
        if x.dim() != 3 or len(x) != target.channels:
            raise ValueError(
                f"{path}: must have the shape ({target.channels}, H, W) for this network, got {list(x.shape)}."
            )
        size = fixed["height"] or x.shape[1], fixed["width"] or x.shape[2]
        if size != x.shape[1:]:
            x = F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
        inputs.append(x.expand(fixed["batch"] or 1, *x.shape))
    return inputs


def read_features(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False)).float()


class Quantizer(NamedTuple):
    """How NNCF quantizes the files of a format.

    Attributes:
        load: returns the model in a file.
        save: writes a model to a file.
        feed: turns an input into what the model is called with.
        run: returns a function that runs a model as NNCF's accuracy control passes it on.
    """

    load: Callable[[Path], Any]
    save: Callable[[Any, Path], Any]
    feed: Callable[[Any, Tensor], Any]
    run: Callable[[Any], Runner]


def save_openvino(model: Any, path: Path) -> None:
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


def load_onnx_model(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def save_onnx_model(model: Any, path: Path) -> None:
    import onnx

    onnx.save(model, path)


def run_onnx_model(model: Any) -> Runner:
    import onnxruntime

    return run_session(onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]))


QUANTIZERS: Mapping[str, Quantizer] = {
    "openvino": Quantizer(
        lambda path: openvino_core().read_model(path), save_openvino, lambda model, x: x.numpy(), run_compiled
    ),
    "onnx": Quantizer(
        load_onnx_model, save_onnx_model, lambda model, x: {model.graph.input[0].name: x.numpy()}, run_onnx_model
    ),
}


def quantize_verified(target: ExportTarget, format: str, path: Path, inputs: Sequence[Tensor],
                      data: LightningDataModule | None, max_drop: float) -> QuantizationReport:  # fmt: skip
    """Replace an exported file by its int8 version.

    Args:
        target: the exported network.
        format: one of `QUANTIZERS`.
        path: the float32 file.
        inputs: of `read_calibration`.
        data: labelled data; None compares outputs alone.
        max_drop: largest accepted loss of the score, in points (hundredths).

    Raises:
        ValueError: the score falls by more than `max_drop`.
    """
    report = quantize_file(target, format, path, inputs, data, max_drop)
    if report.drop > max_drop:
        raise ValueError(
            f"{report.score} may fall by at most {max_drop:g} points in int8, got {report.before:.4f} in float32 and "
            f"{report.after:.4f} in int8; raise --max_drop, or calibrate with more images."
        )
    return report


def quantize_file(target: ExportTarget, format: str, path: Path, inputs: Sequence[Tensor],
                  data: LightningDataModule | None, max_drop: float) -> QuantizationReport:  # fmt: skip
    """Replace an exported file by its int8 version, see `quantize_verified`, and measure what that changes.

    Where the score falls by more than `max_drop`, the layers that cost it most return to float32, one group after the
    other (NNCF's accuracy control).
    """
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters

    kind, quantizer = FORMATS[format], QUANTIZERS[format]
    int8 = path.with_stem(f"{path.stem}_int8")
    model = quantizer.load(path)
    calibration = nncf.Dataset([quantizer.feed(model, x) for x in inputs])
    # Smoothing moves the range of activations into the weights. It cost a segmenter 3 points of mIoU, and gained none.
    smoothing = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    # By channel, NNCF takes tokens for channels in front of a depthwise convolution, and the file fits one size alone.
    by_tensor = QuantizationParameters(per_channel=False)
    advanced = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=smoothing, activations_quantization_params=by_tensor
    )
    kind_of_model = nncf.ModelType.TRANSFORMER
    with quiet("nncf"):
        quantized = nncf.quantize(model, calibration, model_type=kind_of_model, advanced_parameters=advanced)
    quantizer.save(quantized, int8)
    before = kind.load(path, "float32")
    report = measure_change(target, before, kind.load(int8, "float32"), inputs, data)
    if data is not None and report.drop > max_drop:
        log.warning("%s: int8 loses %.1f points of %s; looking for the layers that cost them, by one validation each.",
                    path.name, report.drop, report.score)  # fmt: skip

        def validate(loaded: Any, items: Iterable[int]) -> tuple[float, list[float]]:
            score = compute_score(target, quantizer.run(loaded), data)
            return score, [score for _ in items]

        with record_restored_layers() as kept:
            restored = nncf.quantize_with_accuracy_control(
                quantizer.load(path), calibration, nncf.Dataset(range(len(inputs))), validate, max_drop=max_drop / 100,
                model_type=kind_of_model, advanced_quantization_parameters=advanced,
            )  # fmt: skip
        int8 = path.with_stem(f"{path.stem}_restored")  # the runtime still has the other file in memory
        quantizer.save(restored, int8)
        report = measure_change(target, before, kind.load(int8, "float32"), inputs, data)
        report = replace(report, kept=tuple(kept))
    for suffix in kind.suffixes:
        int8.with_suffix(suffix).replace(path.with_suffix(suffix))
    return report


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Hide the messages of a logger and of those below it that are no errors."""
    loggers = [logging.getLogger(each) for each in (name, *logging.root.manager.loggerDict) if each.startswith(name)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def record_restored_layers() -> Iterator[list[str]]:
    """Collect the names of the layers that NNCF's accuracy control returns to float32: it only logs them."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            first, *lines = record.getMessage().splitlines()
            if "reverted back to the floating-point precision" in first:
                names.extend(line.strip() for line in lines)

    handler, logger = Handler(), logging.getLogger("nncf")
    logger.addHandler(handler)
    try:
        yield names
    finally:
        logger.removeHandler(handler)


def measure_change(target: ExportTarget, before: Runner, after: Runner, inputs: Sequence[Tensor],
                   data: LightningDataModule | None) -> QuantizationReport:  # fmt: skip
    """Compare two versions of a network on calibration inputs, and on labelled data where there are any."""
    few = inputs[:: -(-len(inputs) // 16)]
    compare = target.describe_change or describe_error
    change = compare([before(x) for x in few], [after(x) for x in few])
    if data is None:
        return QuantizationReport(change)
    task: Any = target.task
    return QuantizationReport(
        change, task.monitor, compute_score(target, before, data), compute_score(target, after, data)
    )


def describe_error(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> str:
    error = max(float((a[0] - b[0]).abs().max()) for a, b in zip(actual, expected, strict=True))
    largest = max(float(b[0].abs().max()) for b in expected)
    return f"differs from float32 by up to {error / largest:.1%} of the largest output"


def compute_score(target: ExportTarget, run: Runner, data: LightningDataModule) -> float:
    """Return the monitored score of a task, such as val/map, where a function runs its network."""
    task: Any = target.task
    task.forward = target.forward(run)  # type: ignore[misc]
    with quiet("lightning.pytorch"):
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.validate(task, data, verbose=False)
    del task.forward
    return float(trainer.callback_metrics[task.monitor])
