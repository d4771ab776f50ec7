"""How fast the networks are and how much memory they take, beside others on the same input, in one interleaved run."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shunted_lit.export.formats import FORMATS, Exportable, check_runtime
from shunted_lit.models.feature_path import check_model_name, check_neck_keywords
from shunted_lit.models.ops import pad_to_multiple
from shunted_lit.models.shunted import ShuntedHeads, ShuntedTransformer
from shunted_lit.utils.files import check_new_folder

log = logging.getLogger(__name__)

Backend = Literal["eager", "compile", "onnx", "openvino"]
Precision = Literal["float32", "bfloat16", "mixed"]
Mode = Literal["inference", "training"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.bfloat16}  # of products
SHORT = {"float32": "f32", "bfloat16": "bf16", "mixed": "mixed"}
MATMUL = "matrix product"  # of squares: what the machine can do, measured in the same run
SIDE = {"cpu": 2048, "cuda": 8192}  # of these squares
CALLS = {"cpu": 1, "cuda": 5}  # of a step each time: a GPU begins while the processor still tells it what to do
COMPILE = {"cpu": None, "cuda": "reduce-overhead"}  # CUDA graphs: to launch a kernel would take longer than the kernel


class PlainNeck(nn.Module):
    """The neck by the paper's formulas as one would write them first, for comparison.

    Tokens (B, N, C) are copied to images (B, C, H, W) for each convolution and back; attention weights are in memory.

    Args:
        keywords: those of `ShuntedTransformer`, whose weights it has.

    Shape:
        (B, cin, H, W) -> (B, cin, H, W), equal to `ShuntedTransformer`.
    """

    def __init__(self, **keywords: Any):
        super().__init__()
        self.neck = ShuntedTransformer(**keywords)

    def forward(self, x: Tensor) -> Tensor:
        neck: Any = self.neck
        x = neck.patch_embed.proj(x)
        H, W = x.shape[2:]
        x = neck.patch_embed.norm(tokens(x))
        for block in neck.block:
            x = x + self.attention(block.attn, block.norm1(x), H, W)
            x = x + self.feed_forward(block.mlp, block.norm2(x), H, W)
        return image(neck.norm(x), H, W)

    @staticmethod
    def attention(attn: Any, x: Tensor, H: int, W: int) -> Tensor:
        outputs = []
        for q, heads in zip(attn.q(x).chunk(len(attn.groups), -1), attn.groups, strict=True):
            shunted = isinstance(heads, ShuntedHeads)
            merged, h, w = x, H, W
            if shunted:
                merged = heads.sr(pad_to_multiple(image(x, H, W), heads.ratio))
                h, w = merged.shape[2:]
                merged = F.gelu(heads.norm(tokens(merged)))
            k, v = heads.kv(merged).chunk(2, -1)
            local = tokens(heads.local_conv(image(v, h, w)))
            v = v + local if shunted else v
            q, k, v = (part.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
            weights = torch.softmax(q @ k.transpose(-2, -1) * heads.scale, -1)
            out = (weights @ v).transpose(1, 2).flatten(2)
            outputs.append(out if shunted else out + local)  # as the authors have it
        return attn.proj(torch.cat(outputs, -1))

    @staticmethod
    def feed_forward(mlp: Any, x: Tensor, H: int, W: int) -> Tensor:
        x, kernel = mlp.fc1(x), mlp.dwconv
        detail = F.conv2d(image(x, H, W), kernel.weight, kernel.bias, padding=1, groups=kernel.groups)
        return mlp.fc2(F.gelu(x + tokens(detail)))


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor, H: int, W: int) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a copy."""
    return x.transpose(1, 2).unflatten(2, (H, W)).contiguous()


def by_autocast(mode: Mode, precision: Precision) -> bool:
    """Whether weights stay in float32 and products are in bfloat16: always where bfloat16 is trained in."""
    return precision == "mixed" or (mode == "training" and precision == "bfloat16")


@dataclass(frozen=True)
class Candidate:
    """A network, what it does, and by what it is run."""

    model: str  # "neck", "plain neck", module:factory, or a name of timm's
    mode: Mode = "inference"
    backend: Backend = "eager"
    precision: Precision = "float32"
    shape: tuple[int, ...] = (1, 512, 40, 40)
    options: Any = field(default=None, hash=False)  # the neck's keywords

    def build(self) -> nn.Module:
        """The network, with weights that are the same at each call.

        Raises:
            ValueError: no such name, module or factory, or a factory that gives no module.
        """
        torch.manual_seed(0)
        if self.model == "neck":
            return ShuntedTransformer(**(self.options or {}))
        if self.model == "plain neck":
            return PlainNeck(**(self.options or {}))
        if ":" not in self.model:
            check_model_name(self.model)
            return timm.create_model(self.model)
        path, _, name = self.model.partition(":")
        sys.path.insert(0, "")  # modules of the folder that one works in
        try:
            model = getattr(importlib.import_module(path), name)()
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.model} can't be built ({error}); name a module:factory without arguments"
            ) from None
        finally:
            sys.path.pop(0)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.model} gives a {type(model).__name__}, but an nn.Module is needed")
        return model

    def prepare(self, device: str, folder: Path) -> Callable[[], Any]:
        """What is timed: one call is one step."""
        if self.model == MATMUL:
            square = torch.rand(SIDE[device], SIDE[device], device=device, dtype=DTYPES[self.precision])
            return lambda: square @ square
        x = torch.rand(self.shape)
        model = self.build().train(self.mode == "training")
        if self.backend in FORMATS:
            return self.prepare_exported(model.eval(), x, folder)
        model, x = model.to(device), x.to(device)
        if device == "cuda":
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        autocast = by_autocast(self.mode, self.precision)
        mixed = torch.autocast(device, torch.bfloat16, enabled=autocast)
        run: Any = torch.compile(model, mode=COMPILE[device]) if self.backend == "compile" else model

        def train() -> None:
            model.zero_grad(set_to_none=True)
            with mixed:
                loss = run(x).float().square().mean()
            loss.backward()

        def infer() -> None:
            with torch.inference_mode(), mixed:
                run(x)

        if self.mode == "training":
            return train
        if not autocast:
            model.to(DTYPES[self.precision])
            x = x.to(DTYPES[self.precision])
        return infer

    def prepare_exported(self, model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
        kind = FORMATS[self.backend]
        path = Path(tempfile.mkdtemp(dir=folder)) / f"model{kind.suffixes[0]}"
        with torch.no_grad():
            program = torch.export.export(model, (x,), strict=False)
        kind.write(program, path, Exportable(model, x.shape[1], ("output",), (), ""))
        run = kind.run(path, self.precision)
        return lambda: run(x)

    def flops(self) -> int:
        """Multiplications and additions of a step, by torch's counter; backwards twice as many as forwards."""
        counter = FlopCounterMode(display=False)
        # Of one image; attention as products, since the counter does not know the fused one of processors.
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            self.build().eval()(torch.rand(1, *self.shape[1:]))
        return counter.get_total_flops() * self.shape[0] * (3 if self.mode == "training" else 1)

    def peak_memory(self, device: str) -> int | None:
        """Bytes above the loaded model during a step; on processors of a new process, and None where it can't tell."""
        if device == "cuda":
            if self.backend == "compile":  # graphs keep all of theirs
                return None
            step = self.prepare(device, Path())
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        if self.backend in FORMATS or not Path("/proc/self/clear_refs").exists():
            return None
        # Freed memory goes back to the system at once, so that what is counted is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
        command = [sys.executable, "-m", "shunted_lit.commands.benchmark", json.dumps(asdict(self))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            log.warning("the memory of %s on %s is not known: %s", self.model, list(self.shape), reason)
            return None
        return int(done.stdout.split()[-1])


def measure_peak(candidate: Candidate) -> int:
    """Of this process, which has done nothing else yet."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    if candidate.backend == "compile":
        candidate.prepare("cpu", Path())()  # compiles
    step = candidate.prepare("cpu", Path())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def interleave(
    steps: Mapping[Candidate, Callable[[], Any]], rounds: int, device: str, title: str
) -> dict[Candidate, list[float]]:
    """Seconds of each step, one after the other in each round; the first two rounds do not count."""
    calls = CALLS[device]
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in steps}
    for number in track(range(rounds + 2), title, transient=True):
        for candidate, step in steps.items():
            began = time.perf_counter()
            for _ in range(calls):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[candidate].append((time.perf_counter() - began) / calls)
    return times


def measure(
    candidates: Sequence[Candidate], rounds: int, device: str, memory: bool, title: str
) -> list[dict[str, Any]]:
    """A row a candidate; `ratio` is how many times as fast as the first one, median of the rounds' own ratios."""
    products = [Candidate(MATMUL, precision=p) for p in dict.fromkeys(c.precision for c in candidates)]
    with tempfile.TemporaryDirectory() as folder:
        steps = {c: c.prepare(device, Path(folder)) for c in track([*products, *candidates], f"{title}: building")}
        times = interleave(steps, rounds, device, title)
    side = SIDE[device]
    rates = {product.precision: 2 * side**3 / statistics.median(times[product]) for product in products}
    flops = {name: next(c for c in candidates if c.model == name).flops() for name in {c.model for c in candidates}}
    rows = []
    for candidate in track(candidates, f"{title}: memory") if memory else candidates:
        seconds = times[candidate]
        median, first = statistics.median(seconds), times[candidates[0]]
        work = flops[candidate.model]
        rows.append(
            {
                **asdict(candidate),
                "seconds": median,
                "seconds_least": min(seconds),
                "seconds_most": max(seconds),
                "images_per_second": candidate.shape[0] / median,
                "ratio": statistics.median(a / b for a, b in zip(first, seconds, strict=True)),
                "flops": work,
                "share_of_matrix_product": work / median / rates[candidate.precision],
                "matrix_product_flops_per_second": rates[candidate.precision],
                "peak_memory": candidate.peak_memory(device) if memory else None,
            }
        )
    return rows


def benchmark(
    out: Path = Path("benchmark"),
    necks: list[str] = ["neck", "plain neck"],  # noqa: B006 - read only
    backbones: list[str] = [  # noqa: B006
        "shunted_t",
        "pvt_v2_b1",
        "shunted_s",
        "pvt_v2_b2",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
    ],
    against: list[str] = [],  # noqa: B006
    against_input: Literal["features", "images"] = "features",
    modes: list[Mode] = ["inference", "training"],  # noqa: B006
    backends: list[Backend] = ["eager"],  # noqa: B006
    precisions: list[Precision] = ["float32", "bfloat16"],  # noqa: B006
    neck: dict[str, Any] = {},  # noqa: B006
    size: int = 40,
    batch: int = 1,
    train_batch: int = 4,
    image_size: int = 224,
    image_batch: int = 8,
    sizes: list[int] = [20, 40, 80, 160],  # noqa: B006
    rounds: int = 7,
    memory: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Time networks beside each other: a table here, and benchmark.json and benchmark.png in a folder.

    All that is compared runs in turn in one process, so that a machine that slows down does so for all. Ratios are to
    the first row of a table. The share is that of a large matrix product's rate on this machine, in the same precision
    and measured in the same rounds: what is left to gain. Memory is the peak of a step above the loaded model.

    Args:
        out: folder to write; must not exist, or be empty.
        necks: networks on features: "neck", "plain neck" (the paper's formulas as one would write them first), or none.
        backbones: names of timm models on images, or none.
        against: your own networks, as module:factory, a function or class that is called without arguments.
        against_input: whether these take the necks' features or the backbones' images.
        modes: "inference", "training" (a step forwards and backwards, bfloat16 by autocast), or both.
        backends: "eager", "compile" (torch.compile, on GPUs with CUDA graphs), "onnx" (onnxruntime, float32 and
            inference alone), "openvino" (inference alone).
        precisions: any of "float32", "bfloat16", "mixed" (weights in float32, bfloat16 by autocast).
        neck: keywords of `ShuntedTransformer`, such as {"cin": 256}.
        size, batch, train_batch: height and width of the features, and how many at a time.
        image_size, image_batch: the same of images.
        sizes: heights and widths for the plot of cost against size, of the necks; none for no such plot.
        rounds: how often each is timed.
        memory: whether to measure peak memory, each in a process of its own.
        device: "auto" takes a GPU where there is one.

    Raises:
        ValueError: nothing to time, a runtime that is not installed, an unknown model, a number below 1.
    """
    check_new_folder(out)
    numbers = {"size": size, "batch": batch, "train_batch": train_batch, "image_size": image_size, "rounds": rounds}
    for name, value in {**numbers, "image_batch": image_batch, "sizes": min(sizes, default=1)}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but at least 1 is needed")
    for backend in backends:
        if backend in FORMATS:
            check_runtime(backend)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if place == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no such GPU")
    check_neck_keywords(neck)
    features, images = (against, []) if against_input == "features" else ([], against)
    cin = ShuntedTransformer(**{**neck, "device": "meta"}).cin
    shapes = {"inference": (batch, cin, size, size), "training": (train_batch, cin, size, size)}
    pictures = (image_batch, 3, image_size, image_size)
    groups: dict[str, list[Candidate]] = {}
    for mode in modes:
        groups[f"necks, {mode}"] = variants([*necks, *features], mode, backends, precisions, shapes[mode], neck)
        groups[f"backbones, {mode}"] = variants([*backbones, *images], mode, backends, precisions, pictures, None)
    groups = {title: candidates for title, candidates in groups.items() if candidates}
    if not groups:
        raise ValueError(
            "there is nothing to time: name necks, backbones or --against, and modes and backends for them"
        )
    for name in dict.fromkeys(c.model for candidates in groups.values() for c in candidates):
        Candidate(name, options=neck).build()  # faults of names are told before long work starts
    if "plain neck" in necks:
        check_plain(neck, place)

    machine = describe(place)
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    tables = {}
    for title, candidates in groups.items():
        tables[title] = measure(candidates, rounds, place, memory, title)
        console.print(table_of(title, tables[title]))
    curves = {
        f"{name}": [row for side in track(sizes, f"{name}: sizes") for row in at_size(name, side, cin, neck, place)]
        for name in [*necks, *features]
        if sizes
    }
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "tables": tables, "sizes": curves}
    (out / "benchmark.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    written = [out / "benchmark.json"]
    if curves:
        draw(out / "benchmark.png", curves, machine)
        written.append(out / "benchmark.png")
    console.print(", ".join(map(str, written)), soft_wrap=True, highlight=False)


def variants(
    models: Sequence[str], mode: Mode, backends: Sequence[Backend], precisions: Sequence[Precision],
    shape: tuple[int, ...], neck: Any,
) -> list[Candidate]:  # fmt: skip
    """Every model by every backend in every precision, where there is such a thing."""
    same = by_autocast(mode, "bfloat16") and "bfloat16" in precisions
    every = [
        Candidate(model, mode, backend, precision, shape, neck)
        for precision in precisions
        if not (same and precision == "mixed")
        for backend in backends
        for model in models
    ]
    return [c for c in every if c.backend not in FORMATS or (
        c.mode == "inference" and c.precision in FORMATS[c.backend].precisions)]  # fmt: skip


def check_plain(neck: Mapping[str, Any], device: str) -> None:
    """Raises ValueError where the two necks with the same weights give something else: a ratio would mean nothing."""
    plain = PlainNeck(**neck).eval().to(device, torch.float64)  # float32 may be TensorFloat-32
    x = torch.rand(1, plain.neck.cin, 9, 14, device=device, dtype=torch.float64)
    with torch.no_grad():
        error = (plain(x) - plain.neck(x)).abs().max().item()
    if not error < 1e-9:
        raise ValueError(f"the plain neck differs by {error:.1e} from the neck; it should not by more than 1e-9")


def at_size(name: str, side: int, cin: int, neck: Any, device: str) -> list[dict[str, Any]]:
    """One image of `side` squared: seconds and memory; nothing where the machine may not have that memory."""
    candidate = Candidate(name, shape=(1, cin, side, side), options=neck)
    weights = 3 * 4 * side**4  # bytes of one head's attention, and what is made of it
    if name != "neck" and device == "cpu" and weights > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        log.warning("%s at %d x %d is left out: it may need %.0f GB", name, side, side, weights / 1e9)
        return []
    times = interleave({candidate: candidate.prepare(device, Path())}, 3, device, f"{name} at {side} x {side}")
    seconds = statistics.median(times[candidate])
    return [{"size": side, "seconds": seconds, "peak_memory": candidate.peak_memory(device)}]


def describe(device: str) -> dict[str, Any]:
    """The machine, as far as results depend on it."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**gpu, "processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


def table_of(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    shape = " x ".join(map(str, rows[0]["shape"]))
    caption = (
        "ms: median, and spread from the least to the most of it; ratio: how many times as fast as the first row; "
        "share: of the matrix product's rate in the same precision"
    )
    table = Table(title=f"{title}, {shape}", caption=caption, box=SIMPLE_HEAD, padding=0)
    table.add_column("", overflow="fold", min_width=16)
    for name in ("by", "ms", "spread", "images/s", "ratio", "share", "memory"):
        table.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    for row in rows:
        spread = (row["seconds_most"] - row["seconds_least"]) / row["seconds"]
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f} MB"
        by = f"{row['backend']} {SHORT['mixed' if by_autocast(row['mode'], row['precision']) else row['precision']]}"
        table.add_row(row["model"], by, f"{row['seconds'] * 1e3:.1f}", f"{spread:.0%}",
                      f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}",
                      f"{row['share_of_matrix_product']:.0%}", memory)  # fmt: skip
    return table


def draw(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]], machine: Mapping[str, Any]) -> None:
    """Writes time and memory over the number of tokens, on logarithmic axes: a line of slope 1 is linear."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    for axes, key, unit, scale in zip(
        figure.subplots(1, 2), ("seconds", "peak_memory"), ("ms", "MB above the model"), (1e3, 1e-6), strict=True
    ):
        for name, rows in curves.items():
            known = [(row["size"] ** 2, row[key] * scale) for row in rows if row[key]]
            if known:
                axes.loglog(*zip(*known, strict=True), marker="o", label=name)
        sides = sorted({row["size"] for rows in curves.values() for row in rows})
        axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(f"one image, float32, {machine.get('GPU', machine['processor'])}", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":  # a process of its own, for `Candidate.peak_memory`
    words = json.loads(sys.argv[1])
    print(measure_peak(Candidate(**{**words, "shape": tuple(words["shape"])})))
