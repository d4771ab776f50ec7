"""Resuming runs: which folder and checkpoint a run continues, and which settings it takes from the checkpoint."""

import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from shunted_lit.data.classification import eval_transform_options
from shunted_lit.models.weights import read_checkpoint

log = logging.getLogger(__name__)

LAST_CHECKPOINT = "checkpoints/last.ckpt"  # in the folder of a run
LINKED_ARGUMENTS = ("num_classes", "class_names", "annotation")  # passed from data to task, or from task to data
OPTIMIZER_ARGUMENTS = ("optimizer", "lr_scheduler")  # passed from the top level of a config to the task


@dataclass(frozen=True)
class ResumePlan:
    """What a run takes over from an earlier one.

    Args:
        checkpoint: file that the Trainer loads; None to train from the initial weights.
        run_folder: folder of the run that is continued; None for a new folder.
        steps_done: optimizer steps of the continued run.
        model_arguments: arguments of the task in the checkpoint; they replace those of config and command line.
    """

    checkpoint: str | None = None
    run_folder: Path | None = None
    steps_done: int | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)


def plan_resume(subcommand: str, config: Namespace) -> ResumePlan:
    """Return the checkpoint that a command loads and the run that it resumes, if any.

    Args:
        subcommand: "fit", "validate", "test" or "predict".
        config: parsed arguments of the command.

    Raises:
        ValueError: evaluation without a checkpoint, a file that is not a Lightning checkpoint, or one of another task.
    """
    checkpoint, run_folder = config.ckpt_path, None
    if checkpoint == "last" and subcommand == "fit":
        run_folder = find_resumable_run(Path(config.trainer.default_root_dir or "runs"))
        checkpoint = str(run_folder / LAST_CHECKPOINT) if run_folder else None
    if checkpoint is None:
        if subcommand != "fit":
            raise ValueError(f"{subcommand} needs trained weights; pass a checkpoint with --ckpt_path.")
        return ResumePlan()
    if checkpoint.endswith(".ckpt") and "://" not in checkpoint and not Path(checkpoint).exists():
        raise ValueError(f"{checkpoint}: no such file; pass a checkpoint such as runs/version_0/checkpoints/last.ckpt.")
    content = read_checkpoint(checkpoint) if Path(checkpoint).is_file() else {}
    if content and "pytorch-lightning_version" not in content:
        raise ValueError(f"{checkpoint} holds no run to resume; pass it as --model.weights to start from its weights.")
    check_task(content, config.model.class_path)
    steps_done = content["global_step"] if run_folder else None
    return ResumePlan(str(checkpoint), run_folder, steps_done, saved_arguments(content))


def find_resumable_run(root: Path) -> Path | None:
    """Return the folder of the newest training run below a root that has a last.ckpt; report what is found."""
    folder = find_last_run(root)
    if folder and (folder / LAST_CHECKPOINT).is_file():
        log.info("%s: resuming this run", folder)
        return folder
    log.warning("%s: no last.ckpt of a run yet; starting a new run", folder or root)
    return None


def find_last_run(root: Path) -> Path | None:
    """Return the folder of the newest training run below a root; None if there is none."""
    return max((run for run in list_runs(root) if (run / "checkpoints").exists()), key=run_version, default=None)


def list_runs(root: Path) -> list[Path]:
    """Return the folders root/version_0, root/version_1, ... that exist, in any order."""
    return [path for path in root.glob("version_*") if path.name.removeprefix("version_").isdecimal()]


def run_version(run_folder: Path) -> int:
    """Return the number N of a run folder version_N."""
    return int(run_folder.name.removeprefix("version_"))


def create_run_folder(root: Path) -> Path:
    """Create and return root/version_N, where N is one above the highest that exists, or 0.

    The newest run thus has the highest number, also after folders were deleted.
    """
    for number in itertools.count(max(map(run_version, list_runs(root)), default=-1) + 1):
        folder = root / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # also where another run created it a moment ago
            continue
        return folder
    raise AssertionError("unreachable")


def check_task(content: Mapping[str, Any], class_path: str) -> None:
    """Raise ValueError if a checkpoint is of another task than `class_path`."""
    name = class_path.rpartition(".")[2]
    saved = content.get("hyper_parameters", {}).get("_class_path")  # absent in checkpoints of the Python interface
    if (saved or class_path) != class_path or content.get("task", name) != name:
        saved_name = (saved or content["task"]).rpartition(".")[2]
        raise ValueError(f"the checkpoint is of {saved_name}, not of {name}; pass --model={saved_name}.")


def saved_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the task in a checkpoint."""
    return {name: value for name, value in content.get("hyper_parameters", {}).items() if not name.startswith("_")}


def drop_initial_weights(arguments: Any, checkpoint: str) -> None:
    """Unset the arguments that name initial weights: those of the checkpoint replace them."""
    for name, unset in (("weights", None), ("pretrained", False)):
        if name in arguments:
            if arguments[name]:
                log.warning("`model.%s` is ignored: the weights of %s are used", name, checkpoint)
            arguments[name] = unset


def restore_requested(arguments: Any, requested: Mapping[str, Any], changeable: Collection[str]) -> None:
    """Restore the requested values of changeable arguments in place, and report those that the checkpoint overrides.

    Args:
        arguments: arguments of the task, with the values of the checkpoint.
        requested: the values of config and command line.
        changeable: arguments that evaluation may change.
    """
    for name, saved in list(arguments.items()):
        if name in LINKED_ARGUMENTS or name not in requested or requested[name] == saved:
            continue
        value = requested[name]
        if name in changeable:
            arguments[name] = {**saved, **value} if isinstance(saved, dict) and isinstance(value, dict) else value
            log.info("`model.%s` is %s; in training it was %s", name, value, saved)
        else:
            log.warning("`model.%s` is %s as in the checkpoint, not %s", name, saved, value)


def evaluation_settings(subcommand: str, args: Sequence[str]) -> list[str]:
    """Return arguments that set task and data of an evaluation as in its checkpoint; none if a config sets them.

    Args:
        subcommand: "validate", "test" or "predict".
        args: words after the subcommand.

    Raises:
        ValueError: no checkpoint, or no images to predict.
    """
    given = {word.partition("=")[0] for word in args}
    if given & {"-h", "--help", "-c", "--config"}:
        return []
    if subcommand == "predict" and not any(name.startswith("--data") for name in given):
        raise ValueError("predict needs images; pass an image or a folder of images with --data.images.")
    for i, word in enumerate(args):
        name, _, value = word.partition("=")
        if name == "--ckpt_path" and (value or i + 1 < len(args)):
            settings = settings_from_checkpoint(value or args[i + 1], predicts=subcommand == "predict")
            return [part for key, setting in settings.items() for part in (f"--{key}", json.dumps(setting))]
    raise ValueError(f"{subcommand} needs trained weights; pass a checkpoint with --ckpt_path.")


def settings_from_checkpoint(path: str, predicts: bool = True) -> dict[str, Any]:
    """Return the task and the data of a checkpoint of `shunted-lit fit`, as settings of the command line.

    Args:
        path: the checkpoint.
        predicts: take only image transforms and slices from the checkpoint, as users name the images; else its data.

    Raises:
        ValueError: the file is no such checkpoint.
    """
    content = read_checkpoint(path)
    if "task" not in content or "hyper_parameters" not in content:
        raise ValueError(f"{path} holds no run of `shunted-lit fit`, so its task is unknown; pass a checkpoint of fit.")
    arguments, trained = saved_arguments(content), content.get("datamodule_hyper_parameters", {})
    data: dict[str, Any] = {"class_path": "shunted_lit.data.ImagesDataModule", "init_args": {}}
    if predicts and trained.get("slices"):
        data["init_args"] = {name: trained[name] for name in ("slices", "overlap")}
    if predicts and content["task"] == "ClassificationTask":
        size = trained.get("image_size", trained.get("size"))
        data["init_args"] = {**eval_transform_options(trained), "image_size": size}
    if not predicts:
        linked = {*LINKED_ARGUMENTS, *OPTIMIZER_ARGUMENTS}
        arguments = {name: value for name, value in arguments.items() if name not in linked}
        known = {k: value for k, value in trained.items() if not k.startswith("_") and k not in LINKED_ARGUMENTS}
        data = {"class_path": trained.get("_class_path"), "init_args": known}
    settings = {"model": {"class_path": f"shunted_lit.tasks.{content['task']}", "init_args": arguments}, "data": data}
    return settings if data["class_path"] else {"model": settings["model"]}
