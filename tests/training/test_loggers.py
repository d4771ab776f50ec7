"""Loggers by one word: scores and pictures arrive in the files of the real packages."""

import sys
from pathlib import Path

import pytest
from helpers.runs import QUIET, read_metric

from shunted_lit.cli import main
from shunted_lit.training.loggers import check_loggers

FIT = ["fit", *QUIET, "--model=ClassificationTask", "--model.backbone=test_resnet", "--data=ShapesDataModule",
       "--data.size=32", "--data.train_size=8", "--data.val_size=4", "--data.batch_size=4", "--data.num_workers=0",
       "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--report.images=2"]  # fmt: skip
RUN = Path("runs/version_0")


@pytest.mark.slow
def test_tensorboard_gets_scores_and_pictures():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main([*FIT, "--loggers=tensorboard"])
    events = EventAccumulator(str(RUN / "tensorboard")).Reload()
    scores = [event.value for event in events.Scalars("val/loss")]
    assert scores == pytest.approx(read_metric(RUN, "val/loss"), rel=1e-5)
    assert events.Tags()["images"] == ["predictions", "curves"]
    assert events.Images("predictions")[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.slow
def test_wandb_runs_offline_without_an_account(monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no netrc
    Path("a.yaml").write_text("loggers: [wandb]\n")
    main([*FIT, "--config=a.yaml"])
    (folder,) = RUN.glob("wandb/offline-run-*")
    pictures = {path.name.split("_")[0]: path for path in folder.glob("files/media/images/*.png")}
    assert pictures.keys() == {"predictions", "curves"}
    assert pictures["predictions"].read_bytes() == (RUN / "predictions.png").read_bytes()
    assert list(folder.glob("run-*.wandb"))


@pytest.mark.slow
def test_mlflow_writes_a_database_in_the_run_folder(monkeypatch):
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main([*FIT, "--loggers=[mlflow]"])
    client = mlflow.MlflowClient(f"sqlite:///{RUN.absolute()}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("shunted-lit").experiment_id])
    assert run.data.metrics["val/loss"] == pytest.approx(read_metric(RUN, "val/loss")[0], rel=1e-5)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"predictions.png", "curves.png"}


@pytest.mark.slow
def test_a_logger_of_the_trainer_gets_pictures_as_well():
    pytest.importorskip("tensorboard")
    main([*FIT, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=elsewhere"])
    assert (RUN / "metrics.csv").is_file()
    (file,) = Path("elsewhere").rglob("events.out.tfevents.*")
    assert b"predictions" in file.read_bytes()


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=r"mlflow is not installed; run pip install 'shunted-lit\[mlflow\]'"):
        check_loggers(["mlflow"])
