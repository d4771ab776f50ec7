"""`shunted-lit study`: train several configs with several seeds and compare them."""

import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shunted_lit.commands.configs import resolve_path
from shunted_lit.training.study import Scores, StudyRun, YoloStudyRun, score_names, summarize
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.files import lock_folder


def study(
    configs: list[Path] | Path,
    seeds: int = 3,
    out: Path = Path("study"),
    *,
    options: list[str] = [],  # noqa: B006 - never changed
    jobs: int = 1,
) -> None:
    """Train each config with each seed, and compare: a table, results.csv, runs.csv and results.png.

    Each run is a process of its own: `shunted-lit fit` for a YAML file, `shunted-lit yolo train` for a checkpoint of
    Ultralytics. Finished runs are kept: the same command resumes after an interruption, and adds runs for more seeds or
    configs.

    Args:
        configs: A YAML file or a checkpoint (.pt) to fine-tune, a folder of them, or a list of these:
            '[configs/ablations, mine.yaml]'. The names of the files label the results. Where a path does not exist, the
            shipped config or folder of this name is used.
        seeds: Number of seeds; each config is trained with 0, 1, ... below this number.
        out: Folder of the results, with a folder for each run.
        options: Further arguments for all runs, such as '["--trainer.max_time=00:00:05:00"]' for equal time; for
            checkpoints, settings of Ultralytics, such as '["data=data.yaml", "epochs=12"]'.
        jobs: Number of runs side by side, each with its share of the processors.

    Raises:
        ValueError: No config, two configs of one name, a number below 1, or a folder of a run with another config or
            other options. Failed runs are reported after all others are finished.
    """
    files = list_configs([configs] if isinstance(configs, Path) else configs)
    check_minimum(1, seeds=seeds, jobs=jobs)
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    runs = [
        (YoloStudyRun if file.suffix == ".pt" else StudyRun)(
            file, seed, out / file.stem / f"seed_{seed}", options, threads
        )
        for file in files
        for seed in range(seeds)
    ]
    for run in runs:
        run.check_folder()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file; choose another name.")
    lock = lock_folder(out)
    console = Console()

    def finish(numbered: tuple[int, StudyRun]) -> str | None:
        """Train a run unless it is done, and return its error."""
        number, run = numbered
        if run.is_done():
            return None
        console.print(f"{number} of {len(runs)}: {run.config.stem}, seed {run.seed}", highlight=False)
        try:
            run.train()
        except ValueError as error:
            console.print(f"  {error}", highlight=False, soft_wrap=True)
            return str(error)
        return None

    pool = ThreadPoolExecutor(jobs)
    try:  # a single job stays in this thread, where an interruption also ends its process
        errors = list((map if jobs == 1 else pool.map)(finish, enumerate(runs, 1)))
    finally:
        pool.shutdown(cancel_futures=True)
    failed = [error for error in errors if error]
    if finished := [(run, run.read_scores()) for run in runs if run.is_done()]:
        report(finished, out, seeds, console)
    lock.release()
    if failed:
        heading = [f"{len(failed)} of {len(runs)} runs failed:"] if len(failed) > 1 else []
        raise ValueError("\n".join([*heading, *failed]))


def list_configs(paths: Sequence[Path]) -> list[Path]:
    """Return the YAML files among paths of files and folders, and names of shipped ones.

    Raises:
        ValueError: there is none, a file does not exist, or two files have one name.
    """
    found = [resolve_path(path, folders=True) for path in paths]
    files = [
        file
        for path in found
        for file in ([*sorted(path.glob("*.yaml")), *sorted(path.glob("*.pt"))] if path.is_dir() else [path])
    ]
    if not files:
        where = ", ".join(map(str, paths)) or "an empty list"
        raise ValueError(f"`configs` must name YAML files, checkpoints, or folders of them; there are none in {where}.")
    names = [file.stem for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Names of configs must differ, but two are called {repeated[0]}; rename one.")
    return files


def report(finished: Sequence[tuple[StudyRun, Scores]], out: Path, seeds: int, console: Console) -> None:
    """Write results.csv, runs.csv and results.png, and print the summary."""
    results: dict[str, list[Scores]] = {}
    for run, scores in finished:
        results.setdefault(run.config.stem, []).append(scores)
    rows = summarize(results)
    write_csv(out / "results.csv", rows)
    write_csv(out / "runs.csv", [{"config": run.config.stem, "seed": run.seed, **scores} for run, scores in finished])
    draw_results(out / "results.png", results, [name for name in score_names(rows) if name != "minutes"])
    console.print(make_table(rows, seeds))
    written = (str(out / name) for name in ("results.csv", "runs.csv", "results.png"))
    console.print(", ".join(written), soft_wrap=True, highlight=False)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def make_table(rows: Sequence[Mapping[str, Any]], seeds: int) -> Table:
    title = f"best of a run, mean and standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    labels = [row["config"] + f" ({row['runs']} of {seeds})" * (row["runs"] < seeds) for row in rows]
    table.add_column("", no_wrap=True, min_width=max(map(len, labels)))
    names = score_names(rows)
    for name in names:
        table.add_column(name.removeprefix("val/").replace("_", " "), justify="right")
    for label, row in zip(labels, rows, strict=True):
        table.add_row(label, *(format_score(row.get(name), row.get(f"{name} std")) for name in names))
    return table


def format_score(mean: float | None, deviation: Any) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if deviation == "" else f"{mean:.3f}\n±{deviation:.3f}"


def draw_results(path: Path, results: Mapping[str, Sequence[Scores]], names: Sequence[str]) -> None:
    """Save a panel per score, with a point per run and a line at the mean of each config."""
    figure = Figure(figsize=(1.5 + 2.4 * len(names), 0.35 * len(results) + 1), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        for place, runs in enumerate(results.values()):
            values = [run[name] for run in runs if name in run]
            axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            if values:
                axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color="C3")
        axes.set_title(name.removeprefix("val/"), fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(results)), results)
    panels[0].invert_yaxis()
    figure.supxlabel("best of a run: a point each, red their mean", fontsize=8)
    figure.savefig(path)
