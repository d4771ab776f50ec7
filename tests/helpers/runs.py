"""Short runs of the command line, and what they leave."""

import csv
from pathlib import Path

from shunted_lit.cli import main

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def fit(*args):
    """Run `fit`, without predictions.png unless asked for; return the CLI and the folder of the run."""
    cli = main(["fit", *QUIET, "--report.images=0", *args])
    return cli, Path(cli.trainer.log_dir)


def read_metric(folder, name):
    """Return the logged values of one metric."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
