"""Time and memory of networks in PyTorch and in the runtimes they are exported to.

Everything that is compared runs in turn in one process, so that a slower phase of the machine affects all alike.
"""

import importlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shunted_lit.export.formats import FORMATS
from shunted_lit.export.targets import ExportTarget
from shunted_lit.export.wrappers import fold_residuals
from shunted_lit.models.feature_path import check_model_name
from shunted_lit.models.plain_neck import PlainNeck
from shunted_lit.models.pyramid import ShuntedPyramid
from shunted_lit.models.shunted import ShuntedTransformer

log = logging.getLogger(__name__)

Backend = Literal["eager", "compile", "onnx", "openvino"]
Precision = Literal["float32", "bfloat16", "mixed"]
Mode = Literal["inference", "training"]
Step = Callable[[], Any]
Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


class PyramidOnOneMap(nn.Module):
    """The neck across levels on a map (B, C, H, W) and two coarser copies of it -> tokens (B, C, N) of all levels."""

    def __init__(self, cin: int = 512, depth: int = 3, **_: Any):
        super().__init__()
        self.neck = ShuntedPyramid([cin] * 3, depth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y.flatten(2) for y in self.neck([x, x[..., ::2, ::2], x[..., ::4, ::4]])], 2)


NECKS: Mapping[str, Callable[..., nn.Module]] = {
    "neck": ShuntedTransformer,
    "light": lambda **options: ShuntedTransformer(**{**options, "form": "light"}),
    "pyramid": PyramidOnOneMap,
    "plain neck": PlainNeck,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.bfloat16}  # of matrix products
WARM_UP_ROUNDS = 2


class DeviceSettings(NamedTuple):
    """How a kind of device is measured."""

    matmul_side: int  # of the square matrices whose product shows what the device can do
    calls: int  # steps per measurement: a GPU starts while the processor is still launching kernels
    compile_mode: str | None


DEVICES = {
    "cpu": DeviceSettings(2048, 1, None),
    "cuda": DeviceSettings(8192, 5, "reduce-overhead"),  # CUDA graphs: launching kernels takes longer than running them
}


def uses_autocast(mode: Mode, precision: Precision) -> bool:
    """Return whether weights stay in float32 while products are bfloat16; training in bfloat16 always does."""
    return precision == "mixed" or (mode == "training" and precision == "bfloat16")


@dataclass(frozen=True)
class Candidate:
    """A network and the way it is run.

    Attributes:
        model: one of `NECKS`, module:factory, or the name of a timm model.
        mode: "inference", or "training" for a forward and a backward pass.
        backend: what runs it.
        precision: of its products.
        shape: of its input.
        options: keywords of a neck.
    """

    model: str
    mode: Mode = "inference"
    backend: Backend = "eager"
    precision: Precision = "float32"
    shape: tuple[int, ...] = (1, 512, 40, 40)
    options: Any = field(default=None, hash=False)

    def build(self) -> nn.Module:
        """Create the network with the same initial weights at each call.

        Raises:
            ValueError: an unknown name, module or factory, or a factory that does not return a module.
        """
        torch.manual_seed(0)
        if self.model in NECKS:
            return NECKS[self.model](**(self.options or {}))
        if ":" not in self.model:
            check_model_name(self.model)
            return timm.create_model(self.model)
        path, _, name = self.model.partition(":")
        sys.path.insert(0, "")  # modules in the working directory
        try:
            model = getattr(importlib.import_module(path), name)()
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.model} cannot be built ({error}); name a module:factory that needs no arguments."
            ) from None
        finally:
            sys.path.pop(0)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.model} must return an nn.Module, got {type(model).__name__}.")
        return model

    def prepare(self, device: str, folder: Path) -> Step:
        """Return a function that runs one step; exported files go to `folder`."""
        x = torch.rand(self.shape)
        model = self.build().train(self.mode == "training")
        if self.backend in FORMATS:
            return self.prepare_exported(model.eval(), x, folder)
        model, x = model.to(device), x.to(device)
        if device == "cuda":
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        mode = DEVICES[device].compile_mode
        run: Any = torch.compile(model, mode=mode) if self.backend == "compile" else model
        autocast = torch.autocast(device, torch.bfloat16, enabled=uses_autocast(self.mode, self.precision))

        def train() -> None:
            model.zero_grad(set_to_none=True)
            with autocast:
                loss = run(x).float().square().mean()
            loss.backward()

        def infer() -> None:
            with torch.inference_mode(), autocast:
                run(x)

        if self.mode == "training":
            return train
        if not uses_autocast(self.mode, self.precision):
            model.to(DTYPES[self.precision])
            x = x.to(DTYPES[self.precision])
        return infer

    def prepare_exported(self, model: nn.Module, x: Tensor, folder: Path) -> Step:
        format = FORMATS[self.backend]
        path = Path(tempfile.mkdtemp(dir=folder)) / f"model{format.suffixes[0]}"
        with torch.no_grad():
            program = torch.export.export(fold_residuals(model), (x,), strict=False)
        format.write(program, path, ExportTarget(model, x.shape[1]))
        run = format.load(path, self.precision)
        return lambda: run(x)

    def count_flops(self) -> int:
        """Count the multiplications and additions of a step; a backward pass takes twice those of a forward pass."""
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on CPUs
            self.build().eval()(torch.rand(1, *self.shape[1:]))
        return counter.get_total_flops() * self.shape[0] * (3 if self.mode == "training" else 1)

    def measure_memory(self, device: str) -> int | None:
        """Return the peak memory of a step above the loaded model in bytes, or None if it cannot be measured."""
        if device == "cuda":
            if self.backend == "compile":  # CUDA graphs keep their memory
                return None
            step = self.prepare(device, Path())
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        if self.backend in FORMATS or not Path("/proc/self/clear_refs").exists():
            return None
        # In a new process, which returns freed memory to the system at once: only memory in use is counted.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
        command = [sys.executable, "-m", "shunted_lit.export.measurement", json.dumps(asdict(self))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            log.warning("The memory of %s on %s could not be measured: %s", self.model, list(self.shape), reason)
            return None
        return int(done.stdout.split()[-1])


def measure_own_peak(candidate: Candidate) -> int:
    """Return the peak memory of a step in this process, which must be a new one."""

    def read_status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    if candidate.backend == "compile":
        candidate.prepare("cpu", Path())()  # the memory of compilation is not counted
    step = candidate.prepare("cpu", Path())
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_status("VmRSS")
    step()
    return read_status("VmHWM") - before


def time_interleaved(steps: Mapping[Key, Step], rounds: int, device: str, title: str) -> dict[Key, list[float]]:
    """Run every step once per round; return the seconds of each, without those of two warm-up rounds."""
    calls = DEVICES[device].calls
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for number in track(range(WARM_UP_ROUNDS + rounds), title, transient=True):
        for key, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP_ROUNDS:
                times[key].append((time.perf_counter() - start) / calls)
    return times


def compare(candidates: Sequence[Candidate], rounds: int, device: str, memory: bool, title: str) -> list[Row]:
    """Time candidates in interleaved rounds, with a large matrix product as the yardstick.

    Returns:
        A row per candidate. `ratio` is its speed relative to the first candidate, as the median of the rounds' ratios.
    """
    side = DEVICES[device].matmul_side
    steps: dict[Any, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in dict.fromkeys(candidate.precision for candidate in candidates):
            square = torch.rand(side, side, device=device, dtype=DTYPES[precision])
            steps[precision] = lambda square=square: square @ square  # type: ignore[misc]
        for candidate in track(candidates, f"{title}: building", transient=True):
            steps[candidate] = candidate.prepare(device, Path(folder))
        times = time_interleaved(steps, rounds, device, title)
    flops = {candidate.model: candidate.count_flops() for candidate in {c.model: c for c in candidates}.values()}
    rows = []
    for candidate in track(candidates, f"{title}: memory", transient=True) if memory else candidates:
        seconds, first = times[candidate], times[candidates[0]]
        median = statistics.median(seconds)
        rate = 2 * side**3 / statistics.median(times[candidate.precision])
        rows.append(
            {
                **asdict(candidate),
                "seconds": median,
                "seconds_least": min(seconds),
                "seconds_most": max(seconds),
                "images_per_second": candidate.shape[0] / median,
                "ratio": statistics.median(a / b for a, b in zip(first, seconds, strict=True)),
                "flops": flops[candidate.model],
                "share_of_matrix_product": flops[candidate.model] / median / rate,
                "matrix_product_flops_per_second": rate,
                "peak_memory": candidate.measure_memory(device) if memory else None,
            }
        )
    return rows


def measure_size(candidate: Candidate, device: str) -> list[Row]:
    """Measure seconds and memory of one input; empty if attention weights might not fit into this machine's memory."""
    name, side = candidate.model, candidate.shape[-1]
    required = 3 * 4 * side**4  # bytes: the weights of one head in float32, and two tensors computed from them
    if name != "neck" and device == "cpu" and required > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        log.warning("%s at %d x %d is skipped: it may need %.0f GB.", name, side, side, required / 1e9)
        return []
    steps = {candidate: candidate.prepare(device, Path())}
    seconds = time_interleaved(steps, 3, device, f"{name} at {side} x {side}")[candidate]
    return [{"size": side, "seconds": statistics.median(seconds), "peak_memory": candidate.measure_memory(device)}]


def check_plain_neck(options: Mapping[str, Any], device: str) -> None:
    """Raise ValueError if the plain neck differs from the neck: comparing their speed would mean nothing."""
    plain = PlainNeck(**options).eval().to(device, torch.float64)  # float32 may be TensorFloat-32
    x = torch.rand(1, plain.neck.cin, 9, 14, device=device, dtype=torch.float64)
    with torch.no_grad():
        error = (plain(x) - plain.neck(x)).abs().max().item()
    if not error < 1e-9:
        raise ValueError(f"The plain neck must equal the neck within 1e-9, got a difference of {error:.1e}.")


def describe_machine(device: str) -> dict[str, Any]:
    """Return what results depend on: processor, threads, GPU, and the version of PyTorch."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**gpu, "processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":  # the process that `Candidate.measure_memory` starts
    arguments = json.loads(sys.argv[1])
    print(measure_own_peak(Candidate(**{**arguments, "shape": tuple(arguments["shape"])})))
