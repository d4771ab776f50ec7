"""`shunted-lit benchmark`: compare the speed and memory of networks."""

# ruff: noqa: B006 - lists as defaults, which the command line shows; they are never changed

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shunted_lit.export.formats import FORMATS, check_runtime
from shunted_lit.export.measurement import (
    Backend,
    Candidate,
    Mode,
    Precision,
    Row,
    check_plain_neck,
    compare,
    describe_machine,
    measure_size,
    uses_autocast,
)
from shunted_lit.models.feature_path import check_neck_keywords
from shunted_lit.models.shunted import ShuntedTransformer
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.files import check_new_folder

BACKBONES = ["shunted_t", "pvt_v2_b1", "shunted_s", "pvt_v2_b2", "swin_tiny_patch4_window7_224", "convnext_tiny"]
ABBREVIATIONS = {"float32": "f32", "bfloat16": "bf16"}
CAPTION = (
    "ms: median, with the spread from the fastest to the slowest round; ratio: speed relative to the first row; "
    "share: of the rate of a matrix product in the same precision"
)


def benchmark(
    out: Path = Path("benchmark"),
    *,
    necks: list[str] = ["neck", "plain neck"],
    backbones: list[str] = BACKBONES,
    against: list[str] = [],
    against_input: Literal["features", "images"] = "features",
    modes: list[Mode] = ["inference", "training"],
    backends: list[Backend] = ["eager"],
    precisions: list[Precision] = ["float32", "bfloat16"],
    neck: dict[str, Any] = {},
    size: int = 40,
    batch: int = 1,
    train_batch: int = 4,
    image_size: int = 224,
    image_batch: int = 8,
    sizes: list[int] = [20, 40, 80, 160],
    rounds: int = 7,
    memory: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Compare the speed and memory of networks: tables, benchmark.json and benchmark.png.

    Networks run in turn in one process, so that a slower phase of the machine affects all alike. Ratios are relative to
    the first row of a table. The share compares with a large matrix product, measured in the same rounds and precision.
    Memory is the peak of a step above the loaded model.

    Args:
        out: Folder to write; must not exist, or be empty.
        necks: Networks on features: "neck", "light" (its light form), "pyramid" (a neck across three levels, of which
            `size` is the finest, with the neck's channels and depth), "plain neck" (a plain PyTorch implementation of
            the paper), or none.
        backbones: Names of timm models on images, or none.
        against: Your own networks as module:factory, a function or class called without arguments.
        against_input: Whether these take the necks' features or the backbones' images.
        modes: "inference", "training" (a forward and a backward pass; bfloat16 by autocast), or both.
        backends: "eager", "compile" (torch.compile, with CUDA graphs on GPUs), "onnx" (onnxruntime; float32 inference)
            and "openvino" (inference).
        precisions: Any of "float32", "bfloat16" and "mixed" (autocast: float32 weights, bfloat16 products).
        neck: Keywords of the neck, such as {"cin": 256}.
        size: Height and width of the features.
        batch: Number of feature maps in inference.
        train_batch: Number of feature maps in training.
        image_size: Height and width of the images.
        image_batch: Number of images.
        sizes: Heights and widths of features for the plot of cost over size; none for no plot.
        rounds: How often each network is timed.
        memory: Measure peak memory, each in a process of its own.
        device: "auto" takes a GPU if there is one.

    Raises:
        ValueError: Nothing to time, a runtime that is not installed, an unknown model, or a number below 1.
    """
    check_new_folder(out)
    check_minimum(
        1, size=size, batch=batch, train_batch=train_batch, image_size=image_size, image_batch=image_batch,
        sizes=min(sizes, default=1), rounds=rounds,
    )  # fmt: skip
    for backend in backends:
        if backend in FORMATS:
            check_runtime(backend)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` must be cpu or auto, got cuda: PyTorch finds no CUDA device.")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_neck_keywords(neck)
    cin = ShuntedTransformer(**{**neck, "device": "meta"}).cin
    on_features = [*necks, *against] if against_input == "features" else necks
    on_images = [*backbones, *against] if against_input == "images" else backbones
    batches = {"inference": batch, "training": train_batch}
    groups: dict[str, list[Candidate]] = {}
    for mode in modes:
        shape = (batches[mode], cin, size, size)
        groups[f"necks, {mode}"] = make_candidates(on_features, mode, backends, precisions, shape, neck)
        shape = (image_batch, 3, image_size, image_size)
        groups[f"backbones, {mode}"] = make_candidates(on_images, mode, backends, precisions, shape)
    groups = {title: candidates for title, candidates in groups.items() if candidates}
    if not groups:
        raise ValueError("There is nothing to time; choose --necks, --backbones or --against, and --modes, --backends.")
    for name in dict.fromkeys(candidate.model for candidates in groups.values() for candidate in candidates):
        Candidate(name, options=neck).build()  # report wrong names before the long part
    if "plain neck" in necks:
        check_plain_neck(neck, place)

    machine = describe_machine(place)
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    tables: dict[str, list[Row]] = {}
    curves: dict[str, list[Row]] = {}
    for title, candidates in groups.items():
        tables[title] = compare(candidates, rounds, place, memory, title)
        console.print(make_table(title, tables[title]))
    for name in on_features if sizes else []:
        sided = [Candidate(name, shape=(1, cin, side, side), options=neck) for side in sizes]
        curves[name] = [row for candidate in track(sided, f"{name}, sizes") for row in measure_size(candidate, place)]
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "tables": tables, "sizes": curves}
    (out / "benchmark.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    written = [out / "benchmark.json"]
    if curves:
        draw_sizes(out / "benchmark.png", curves, machine)
        written.append(out / "benchmark.png")
    console.print(", ".join(map(str, written)), soft_wrap=True, highlight=False)


def make_candidates(
    models: Sequence[str], mode: Mode, backends: Sequence[Backend], precisions: Sequence[Precision],
    shape: tuple[int, ...], neck: Any = None,
) -> list[Candidate]:  # fmt: skip
    """Combine models, backends and precisions, as far as a backend supports mode and precision."""
    if mode == "training" and "bfloat16" in precisions:  # which is mixed precision
        precisions = [precision for precision in precisions if precision != "mixed"]
    return [
        Candidate(model, mode, backend, precision, shape, neck)
        for precision in precisions
        for backend in backends
        if backend not in FORMATS or (mode == "inference" and precision in FORMATS[backend].precisions)
        for model in models
    ]


def make_table(title: str, rows: Sequence[Row]) -> Table:
    shape = " x ".join(map(str, rows[0]["shape"]))
    table = Table(title=f"{title}, {shape}", caption=CAPTION, box=SIMPLE_HEAD, padding=0)
    table.add_column("", overflow="fold", min_width=16)
    for name in ("by", "ms", "spread", "images/s", "ratio", "share", "memory"):
        table.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    for row in rows:
        spread = (row["seconds_most"] - row["seconds_least"]) / row["seconds"]
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f} MB"
        precision = "mixed" if uses_autocast(row["mode"], row["precision"]) else row["precision"]
        by = f"{row['backend']} {ABBREVIATIONS.get(precision, precision)}"
        table.add_row(row["model"], by, f"{row['seconds'] * 1e3:.1f}", f"{spread:.0%}",
                      f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}",
                      f"{row['share_of_matrix_product']:.0%}", memory)  # fmt: skip
    return table


def draw_sizes(path: Path, curves: Mapping[str, Sequence[Row]], machine: Mapping[str, Any]) -> None:
    """Save time and memory over the number of tokens on logarithmic axes, where linear cost has slope 1."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    sides = sorted({row["size"] for rows in curves.values() for row in rows})
    for axes, key, unit, scale in zip(
        figure.subplots(1, 2), ("seconds", "peak_memory"), ("ms", "MB above the model"), (1e3, 1e-6), strict=True
    ):
        for name, rows in curves.items():
            known = [(row["size"] ** 2, row[key] * scale) for row in rows if row[key]]
            if known:
                axes.loglog(*zip(*known, strict=True), marker="o", label=name)
        axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(f"one image, float32, {machine.get('GPU', machine['processor'])}", fontsize=10)
    figure.savefig(path)
