"""Runs of several configs over several seeds, and what came out: a table of mean and spread, and a picture."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shunted_lit.utils.files import lock_folder
from shunted_lit.visualization.plots import read_metrics

Scores = dict[str, float]


def study(
    configs: list[Path] | Path,
    seeds: int = 3,
    out: Path = Path("study"),
    options: list[str] = [],  # noqa: B006 - read only
) -> None:
    """Train each config by each seed, and compare: a table, results.csv, runs.csv and results.png in a folder.

    Runs are `shunted-lit fit` in processes of their own, one after the other. What is finished is not run again: the
    same command goes on where it stopped, and more seeds or configs may be added later.

    Args:
        configs: a YAML file, a folder of them, or several in a list: '[configs/ablations, mine.yaml]'. Their names tell
            the rows.
        seeds: each config is trained by the seeds 0, 1, ... up to this number.
        out: folder of the runs, a folder each, and of the results.
        options: further words for all of them, such as '["--trainer.max_time=00:00:05:00"]' for equal time.

    Raises:
        ValueError: no config, two of one name, a number below 1, and a folder of a run that was made by another config
            or other options; once all others are finished, runs that failed.
    """
    configs = [configs] if isinstance(configs, Path) else configs
    files = [file for path in configs for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    if not files:
        told = ", ".join(map(str, configs)) or "an empty list"
        raise ValueError(f"there is no config in {told}; name YAML files or folders of them")
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]}: no such config")
    names = [file.stem for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two configs are called {repeated[0]}; their names tell rows and folders, so rename one")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, but 1 is the least")
    planned = [Run(file, seed, out / file.stem / f"seed_{seed}", options) for file in files for seed in range(seeds)]
    for run in planned:
        run.check()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is there and no folder; name another by --out")
    lock = lock_folder(out)
    console = Console()
    finished: list[tuple[Run, Scores]] = []
    failed: list[str] = []
    for number, run in enumerate(planned, 1):
        if not run.is_done():
            console.print(f"{number} of {len(planned)}: {run.config.stem}, seed {run.seed}", highlight=False)
            try:
                run.train()
            except ValueError as error:
                console.print(f"  {error}", highlight=False, soft_wrap=True)
                failed.append(str(error))
                continue
        finished.append((run, json.loads(run.done.read_text(encoding="utf-8"))))
    if finished:
        report(finished, out, seeds, console)
    lock.release()
    if failed:
        told = "\n".join(failed)
        raise ValueError(told if len(failed) == 1 else f"{len(failed)} of {len(planned)} runs failed:\n{told}")


def report(finished: Sequence[tuple["Run", Scores]], out: Path, seeds: int, console: Console) -> None:
    """The table, on the terminal and as CSV, that of single runs, and the picture."""
    results: dict[str, list[Scores]] = {}
    for run, scores in finished:
        results.setdefault(run.config.stem, []).append(scores)
    table = summary(results)
    write_table(out / "results.csv", table)
    write_table(out / "runs.csv", [{"config": run.config.stem, "seed": run.seed, **scores} for run, scores in finished])
    draw_results(out / "results.png", results, [name for name in scores_of(table) if name != "minutes"])
    console.print(rich_table(table, seeds))
    written = (str(out / name) for name in ("results.csv", "runs.csv", "results.png"))
    console.print(", ".join(written), soft_wrap=True, highlight=False)


class Run:
    """One training: a config and a seed, in a folder of its own.

    Args:
        config: the YAML.
        seed: for all random numbers.
        folder: of the run; `done.json` in it holds its scores once it is finished.
        options: further words of the command line.
    """

    def __init__(self, config: Path, seed: int, folder: Path, options: Sequence[str]):
        self.config, self.seed, self.folder, self.options = config, seed, folder, list(options)
        self.done, self.origin = folder / "done.json", folder / "origin.json"

    def made_by(self) -> dict[str, Any]:
        return {"config": self.config.read_text(encoding="utf-8"), "options": self.options}

    def check(self) -> None:
        """Raises ValueError where the folder holds something else."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return  # where one was cut off just then
        if not self.origin.is_file():
            raise ValueError(f"{self.folder}: holds no run of a study; name another folder by --out")
        if json.loads(self.origin.read_text(encoding="utf-8")) != self.made_by():
            raise ValueError(
                f"{self.folder}: was made by another content of {self.config.name} or by other options; name another "
                "folder by --out, or remove it"
            )

    def is_done(self) -> bool:
        """Whether its scores are there, and whole."""
        try:
            return bool(json.loads(self.done.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    def train(self) -> None:
        """Runs it from its start; one that was cut off is begun anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.origin.write_text(json.dumps(self.made_by()), encoding="utf-8")
        command = [sys.executable, "-m", "shunted_lit", "fit", f"--config={self.config}", *self.options,
                   f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder}"]  # fmt: skip
        began = time.monotonic()
        with (self.folder / "log.txt").open("w", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        metrics = self.folder / "version_0/metrics.csv"
        if code or not metrics.is_file():
            lines = (self.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
            errors = [line for line in lines if "error:" in line.lower()] or lines
            told = errors[-1] if code and lines else "without a word" if code else "it has written no metrics.csv"
            raise ValueError(
                f"{self.config}, seed {self.seed}: training failed: {told}; all of it is in {self.folder / 'log.txt'}"
            )
        found = {name: values for name, (_, values) in read_metrics(metrics).items() if name.startswith("val/")}
        best = {name: (min if name.endswith("loss") else max)(values) for name, values in found.items()}
        scores = {name: score for name, score in best.items() if score != -1}  # torchmetrics: no such object
        self.done.write_text(json.dumps({**scores, "minutes": (time.monotonic() - began) / 60}), encoding="utf-8")


def summary(results: Mapping[str, Sequence[Scores]]) -> list[dict[str, Any]]:
    """A row a config: the mean of each score over the runs that have it, and its sample deviation, "" for one run."""
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {"config": name, "runs": len(runs)}
        for score in dict.fromkeys(score for run in runs for score in run):
            values = [run[score] for run in runs if score in run]
            row[score] = statistics.fmean(values)
            row[f"{score} std"] = statistics.stdev(values) if len(values) > 1 else ""
        rows.append(row)
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    heads = list(dict.fromkeys(head for row in rows for head in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, heads)
        writer.writeheader()
        writer.writerows(rows)


def scores_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the scores, in order."""
    heads = dict.fromkeys(head for row in rows for head in row)
    return [head for head in heads if head not in ("config", "runs") and not head.endswith(" std")]


def rich_table(rows: Sequence[Mapping[str, Any]], seeds: int) -> Table:
    title = f"best of a run, mean and standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    labels = [row["config"] + f" ({row['runs']} of {seeds})" * (row["runs"] < seeds) for row in rows]
    table.add_column("", no_wrap=True, min_width=max(map(len, labels)))  # whole names
    names = scores_of(rows)
    for name in names:
        table.add_column(name.removeprefix("val/").replace("_", " "), justify="right")
    for label, row in zip(labels, rows, strict=True):
        table.add_row(label, *(cell(row.get(name), row.get(f"{name} std")) for name in names))
    return table


def cell(mean: float | None, deviation: Any) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if deviation == "" else f"{mean:.3f}\n±{deviation:.3f}"


def draw_results(path: Path, results: Mapping[str, Sequence[Scores]], names: Sequence[str]) -> None:
    """A panel for each of the named scores: a point a run, and a line at the mean."""
    height = 0.35 * len(results) + 1
    figure = Figure(figsize=(1.5 + 2.4 * len(names), height), layout="constrained", dpi=120)
    for number, (axes, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        for place, runs in enumerate(results.values()):
            values = [run[name] for run in runs if name in run]
            axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            if values:
                axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color="C3")
        axes.set_yticks(range(len(results)), results if number == 0 else [""] * len(results))
        axes.invert_yaxis()
        axes.set_title(name.removeprefix("val/"), fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel("best of a run: a point each, red their mean", fontsize=8)
    figure.savefig(path)
