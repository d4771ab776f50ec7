"""Loggers by one word, and pictures in them."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from shunted_lit.utils.checks import check_choice

PROJECT = "shunted-lit"  # groups runs in W&B and MLflow


def create_tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="", version="tensorboard")


def create_wandb(folder: Path) -> Logger:
    """Create a logger that uploads where W&B knows an API key or WANDB_MODE requests it, and writes files elsewhere."""
    import wandb

    decides = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    # Not by Lightning's `offline`: it sets a variable that W&B no longer reads after the login.
    return WandbLogger(name=folder.name, save_dir=folder, project=project, mode=None if decides else "offline")


def create_mlflow(folder: Path) -> Logger:
    """Create a logger for the server that MLFLOW_TRACKING_URI names; without one, for a database in the run folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    folder = folder.absolute()
    artifacts = None if uri else (folder / "mlflow").as_uri()
    return MLFlowLogger(PROJECT, folder.name, uri or f"sqlite:///{folder / 'mlflow.db'}", artifact_location=artifacts)


# By name, which is also the name of the package: functions from the folder of a run to its logger.
LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": create_tensorboard,
    "wandb": create_wandb,
    "mlflow": create_mlflow,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown name, or a logger whose package is not installed."""
    for name in names:
        check_choice("loggers", name, LOGGERS)
        if find_spec(name) is None:
            raise ValueError(f"`loggers`: {name} is not installed; run pip install 'shunted-lit[{name}]'")


def log_picture(logger: Logger, path: Path, step: int) -> None:
    """Add a picture to TensorBoard, W&B or MLflow; other loggers are left as they are."""
    if isinstance(logger, TensorBoardLogger):
        with Image.open(path) as image:
            logger.experiment.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(path.stem, [str(path)])
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path))
