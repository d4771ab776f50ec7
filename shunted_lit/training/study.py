"""Runs of a study: one config trained with one seed each, and the summary of their scores."""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shunted_lit.visualization.plots import read_metrics

Scores = dict[str, float]


class StudyRun:
    """One `shunted-lit fit` in a folder of its own.

    Args:
        config: the YAML file.
        seed: seed of all random number generators.
        folder: run folder; holds `origin.json`, and `done.json` with the scores once the run is finished.
        options: further arguments of the command line.
        threads: processor threads of the run; None leaves that to PyTorch.
    """

    def __init__(self, config: Path, seed: int, folder: Path, options: Sequence[str], threads: int | None = None):
        self.config, self.seed, self.folder, self.options = config, seed, folder, list(options)
        self.environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.done, self.origin = folder / "done.json", folder / "origin.json"

    def describe_origin(self) -> dict[str, Any]:
        return {"config": self.config.read_text(encoding="utf-8"), "options": self.options}

    def check_folder(self) -> None:
        """Raise ValueError if the folder holds something other than this run."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return  # empty after an interruption
        if not self.origin.is_file():
            raise ValueError(f"{self.folder}: must be empty or hold a run of a study; choose another --out.")
        if json.loads(self.origin.read_text(encoding="utf-8")) != self.describe_origin():
            raise ValueError(
                f"{self.folder}: {self.config.name} or the options have changed since this run; choose another --out, "
                "or remove the folder."
            )

    def is_done(self) -> bool:
        """Return whether complete scores are stored."""
        try:
            return any(name.startswith("val/") for name in self.read_scores())
        except (OSError, ValueError):
            return False

    def read_scores(self) -> Scores:
        return json.loads(self.done.read_text(encoding="utf-8"))

    def train(self) -> None:
        """Train from the first step, also after an interruption, and store the scores.

        Raises:
            ValueError: the training failed, with the last error of its log, or it has no validation score.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.origin.write_text(json.dumps(self.describe_origin()), encoding="utf-8")
        start = time.monotonic()
        self.fit()
        minutes = (time.monotonic() - start) / 60
        self.done.write_text(json.dumps({**self.collect_scores(), "minutes": minutes}), encoding="utf-8")

    def fit(self) -> None:
        self.run("fit", f"--config={self.config}", *self.options, f"--seed_everything={self.seed}",
                 f"--trainer.default_root_dir={self.folder}")  # fmt: skip

    def run(self, *words: str) -> None:
        """Run `shunted-lit` with its output in log.txt. Raise ValueError, with the last error, if it fails."""
        log = self.folder / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            command = [sys.executable, "-m", "shunted_lit", *words]
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, check=False, env=self.environment
            ).returncode
        if code:
            lines = log.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {code}"]
            self.fail(([line for line in lines if "error:" in line.lower()] or lines)[-1])

    def fail(self, reason: str) -> NoReturn:
        raise ValueError(f"{self.config}, seed {self.seed}: training failed: {reason}; see {self.folder / 'log.txt'}.")

    def collect_scores(self) -> Scores:
        """Return the best of each validation score."""
        metrics = self.folder / "version_0/metrics.csv"
        if not metrics.is_file():
            self.fail("it has written no metrics.csv")
        scores = {}
        for name, (_, values) in read_metrics(metrics).items():
            best = min(values) if name.endswith("loss") else max(values)
            if name.startswith("val/") and best != -1:  # torchmetrics: there is no such object
                scores[name] = best
        if not scores:
            raise ValueError(
                f"{self.config}, seed {self.seed}: a study compares val/ scores, but the run has none; check "
                f"`trainer.limit_val_batches` and `trainer.check_val_every_n_epoch`, and see {self.folder / 'log.txt'}."
            )
        return scores


class YoloStudyRun(StudyRun):
    """One `shunted-lit yolo train` of a checkpoint, and the scores of its last epoch by `shunted-lit yolo score`.

    Args:
        options: settings of Ultralytics as name=value, among them data.

    Raises:
        ValueError: another form of options.
    """

    def __init__(self, config: Path, seed: int, folder: Path, options: Sequence[str], threads: int | None = None):
        super().__init__(config, seed, folder, options, threads)
        if not all("=" in option for option in options) or not any(option.startswith("data=") for option in options):
            raise ValueError(f"`options` must be as data=data.yaml, among them data, for {config}, got {self.options}.")

    def describe_origin(self) -> dict[str, Any]:
        return {"config": hashlib.sha256(self.config.read_bytes()).hexdigest(), "options": self.options}

    def fit(self) -> None:
        place = [f"project={self.folder.resolve()}", "name=run", "exist_ok=True"]
        self.run("yolo", "train", f"model={self.config}", *self.options, f"seed={self.seed}", *place)

    def collect_scores(self) -> Scores:
        settings, scores = dict(option.split("=", 1) for option in self.options), self.folder / "scores.json"
        self.run("yolo", "score", f"--model={self.folder / 'run/weights/last.pt'}", f"--data={settings['data']}",
                 f"--imgsz={settings.get('imgsz', 640)}", f"--out={scores}")  # fmt: skip
        found = json.loads(scores.read_text(encoding="utf-8"))
        return {f"val/{name}": value for name, value in found.items() if value is not None}


def summarize(results: Mapping[str, Sequence[Scores]]) -> list[dict[str, Any]]:
    """Return a row per config: the mean of each score over the runs that have it, and its sample standard deviation.

    The deviation of a single run is "".
    """
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {"config": name, "runs": len(runs)}
        for score in dict.fromkeys(score for run in runs for score in run):
            values = [run[score] for run in runs if score in run]
            row[score] = statistics.fmean(values)
            row[f"{score} std"] = statistics.stdev(values) if len(values) > 1 else ""
        rows.append(row)
    return rows


def score_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the scores in the rows of a summary, in order."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [column for column in columns if column not in ("config", "runs") and not column.endswith(" std")]
