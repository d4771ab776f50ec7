"""`shunted-lit study` trains what is missing, summarizes it, and mixes nothing up."""

import csv
import json
import statistics
import subprocess
import threading
from pathlib import Path

import pytest
import yaml
from helpers.yolo import NANO
from PIL import Image
from rich.console import Console
from ultralytics import YOLO

from shunted_lit.cli import main
from shunted_lit.commands.study import make_table, study
from shunted_lit.data.scenes import write_scenes
from shunted_lit.training.study import StudyRun, score_names, summarize
from shunted_lit.ultralytics import write_yaml
from shunted_lit.utils.files import lock_folder

ROOT = Path(__file__).parents[2]
TINY = ["--data.train_size=8", "--data.val_size=4", "--data.size=64", "--data.batch_size=4", "--data.num_workers=0",
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--model.min_size=64"]  # fmt: skip


@pytest.fixture(autouse=True)
def two_configs(in_tmp_path):
    Path("configs").mkdir()
    content = yaml.safe_load((ROOT / "configs/neck.yaml").read_text())
    content["model"]["init_args"]["neck"] = {"depth": 1, "mlp_ratios": 1}
    Path("configs/with.yaml").write_text(yaml.safe_dump(content))
    content["model"]["init_args"]["neck"] = None
    Path("configs/without.yaml").write_text(yaml.safe_dump(content))


def run_study(*arguments):
    main(["study", "[configs]", f"--options={json.dumps(TINY)}", *arguments])


def read_results():
    with Path("study/results.csv").open(newline="") as file:
        return {row["config"]: row for row in csv.DictReader(file)}


@pytest.mark.slow  # five trainings
def test_study_resumes_and_adds_seeds(monkeypatch, capsys):
    trained = []
    train = StudyRun.train
    monkeypatch.setattr(StudyRun, "train", lambda self: trained.append((self.config.stem, self.seed)) or train(self))
    run_study("--seeds=1")
    assert trained == [("with", 0), ("without", 0)]
    run_study("--seeds=2")
    assert trained[2:] == [("with", 1), ("without", 1)], "finished runs are kept"
    results = read_results()
    assert set(results) == {"with", "without"}
    for name, row in results.items():
        seeds = [json.loads(Path(f"study/{name}/seed_{seed}/done.json").read_text()) for seed in (0, 1)]
        minutes = [scores["minutes"] for scores in seeds]
        assert float(row["minutes"]) == pytest.approx(statistics.mean(minutes))
        assert float(row["minutes std"]) == pytest.approx(statistics.stdev(minutes))
        assert "val/map" in row
        with Path("study/runs.csv").open(newline="") as file:
            runs = [run for run in csv.DictReader(file) if run["config"] == name]
        assert [(run["seed"], float(run["minutes"])) for run in runs] == [("0", minutes[0]), ("1", minutes[1])]
    config = yaml.safe_load(Path("study/with/seed_1/version_0/config.yaml").read_text())
    assert (config["seed_everything"], config["data"]["init_args"]["train_size"]) == (1, 8)
    with Image.open("study/results.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    output = capsys.readouterr().out
    assert "over 2 seeds" in output
    assert "results.csv" in output
    Path("study/with/seed_1/done.json").unlink()  # as after an interruption
    run_study("--seeds=2")
    assert trained[4:] == [("with", 1)]


def test_summary_has_scores_that_the_first_run_lacks():
    (row,) = summarize({"a": [{"map": 1.0}, {"map": 2.0, "large": 3.0}, {"map": 3.0, "large": 5.0}]})
    assert (row["large"], row["large std"]) == (4.0, pytest.approx(2**0.5))


def test_table_marks_configs_with_fewer_runs(capsys):
    rows = summarize({"a": [{"x": 1.0}, {"x": 3.0}], "b": [{"x": 5.0}]})
    Console(width=80).print(make_table(rows, 2))
    output = capsys.readouterr().out
    assert "b (1 of 2)" in output
    assert "±1.414" in output
    assert output.count("±") == 1


def replace_training(monkeypatch, metrics):
    """Let `fit` write these lines to metrics.csv instead of training."""

    def fit(command, **_):
        folder = Path(command[-1].partition("=")[2]) / "version_0"
        folder.mkdir()
        (folder / "metrics.csv").write_text(metrics)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("shunted_lit.training.study.subprocess.run", fit)


def test_the_best_loss_is_the_lowest(tmp_path, monkeypatch):
    replace_training(monkeypatch, "epoch,step,val/loss,val/acc1\n0,1,2.5,0.1\n1,2,0.3,0.9\n2,3,0.4,0.8\n")
    run = StudyRun(Path("configs/with.yaml"), 0, tmp_path / "run", [])
    run.train()
    scores = json.loads(run.done.read_text())
    assert (scores["val/loss"], scores["val/acc1"]) == (0.3, 0.9)


def test_runs_without_validation_scores_are_reported_in_one_line(monkeypatch):
    replace_training(monkeypatch, "epoch,step,train/loss\n0,1,2.5\n")
    with pytest.raises(ValueError, match=r"^.*a study compares val/ scores, but the run has none; check .*log\.txt\.$"):
        main(["study", "[configs/with.yaml]", "--seeds=1"])
    assert not Path("study/with/seed_0/done.json").exists()


def test_summary_is_mean_and_standard_deviation():
    summary = summarize({"a": [{"x": 1.0, "y": 2.0}, {"x": 3.0}], "b": [{"x": 5.0}]})
    assert summary == [
        {"config": "a", "runs": 2, "x": 2.0, "x std": pytest.approx(2**0.5), "y": 2.0, "y std": ""},
        {"config": "b", "runs": 1, "x": 5.0, "x std": ""},
    ]
    assert score_names(summary) == ["x", "y"]


def finish(run):
    """Store what a training stores, without one."""
    run.folder.mkdir(parents=True)
    run.origin.write_text(json.dumps(run.describe_origin()))
    run.done.write_text(json.dumps({"val/map": 0.5}))


def test_jobs_run_side_by_side_and_all_finish(monkeypatch):
    """A run waits for the other, so that runs one after the other would wait forever."""
    together = threading.Barrier(2, timeout=30)

    def train(run):
        together.wait()
        assert int(run.environment["OMP_NUM_THREADS"]) >= 1
        finish(run)

    monkeypatch.setattr(StudyRun, "train", train)
    run_study("--seeds=2", "--jobs=2")
    assert {name: row["runs"] for name, row in read_results().items()} == {"with": "2", "without": "2"}


@pytest.mark.slow
def test_checkpoints_of_yolo_are_trained_and_scored():
    write_scenes(Path("set"), train=8, val=4, size=64)
    for name, neck in {"none": None, "light": {"form": "light"}}.items():
        model = f"{NANO}.yaml"
        if neck:
            write_yaml(NANO, model := f"{NANO}-light.yaml", neck=neck)
        YOLO(model).save(f"{name}.pt")
    options = ["data=set/data.yaml", "epochs=1", "imgsz=64", "batch=4", "workers=0", "plots=False", "device=cpu"]
    main(["study", "[none.pt, light.pt]", "--seeds=1", "--jobs=2", f"--options={json.dumps(options)}"])
    results = read_results()
    assert set(results) == {"none", "light"}
    assert {"val/AP", "val/AP50", "val/circle", "minutes"} <= set(results["light"])
    with pytest.raises(ValueError, match=r"none\.pt or the options have changed since this run"):
        main(["study", "[none.pt]", "--seeds=1", '--options=["data=set/data.yaml"]'])


def test_a_study_of_yolo_needs_data():
    Path("some.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`options` must be as data=data\.yaml, among them data, for some\.pt, got"):
        main(["study", "[some.pt]", '--options=["epochs=2"]'])


def test_runs_of_another_config_or_other_options_are_rejected(monkeypatch):
    monkeypatch.setattr(StudyRun, "train", finish)
    run_study("--seeds=1")
    before = Path("study/with/seed_0/done.json").read_text()
    Path("configs/with.yaml").write_text("other: 1")
    with pytest.raises(
        ValueError, match=r"with/seed_0: with\.yaml or the options have changed since this run; choose another --out"
    ):
        run_study("--seeds=1")
    with pytest.raises(ValueError, match=r"without\.yaml or the options have changed since this run"):
        main(["study", "[configs/without.yaml]", "--seeds=1"])
    assert Path("study/with/seed_0/done.json").read_text() == before
    Path("study/without/seed_1").mkdir()
    Path("study/without/seed_1/mine.txt").write_text("")
    with pytest.raises(ValueError, match="seed_1: must be empty or hold a run of a study; choose another --out"):
        main(["study", "[configs/without.yaml]", "--seeds=2", f"--options={json.dumps(TINY)}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["[]"], "`configs` must name YAML files, .*; there are none in an empty list"),
        (["[none.yaml]"], r"none\.yaml does not exist, and no shipped config has this name"),
        (["[empty]"], "`configs` must name YAML files, .*; there are none in empty"),
        (["[configs, configs/with.yaml]"], "two are called with; rename one"),
        (["[configs]", "--seeds=0"], "`seeds` must be at least 1, got 0"),
        pytest.param(
            ["[configs/with.yaml]", "--seeds=1", "--options=[--model.lr=-1]"],
            r"training failed: .*log\.txt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_arguments_are_reported(arguments, message):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        main(["study", *arguments])
    assert not list(Path().rglob("done.json"))


def test_other_runs_finish_when_one_fails(monkeypatch, capsys):
    def fail_one(run):
        if run.config.stem == "with":
            raise ValueError(f"{run.config}, seed {run.seed}: training failed: a reason")
        finish(run)

    monkeypatch.setattr(StudyRun, "train", fail_one)
    with pytest.raises(ValueError, match=r"2 of 4 runs failed:\n.*seed 0: training failed: a reason\n.*seed 1"):
        run_study("--seeds=2")
    assert set(read_results()) == {"without"}
    assert read_results()["without"]["runs"] == "2"
    with pytest.raises(ValueError, match=r"^configs/with\.yaml, seed 0: training failed"):
        main(["study", "configs/with.yaml", "--seeds=1", f"--options={json.dumps(TINY)}"])


def test_folders_in_use_and_interrupted_runs(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("seed_everything: 0")
    lock = lock_folder(tmp_path / "study")
    with pytest.raises(ValueError, match="another process is writing to it"):
        study([config], seeds=1, out=tmp_path / "study")
    lock.release()
    with pytest.raises(ValueError, match=r"--out must be a folder, but .*a\.yaml is a file; choose another name"):
        study([config], seeds=1, out=config)
    run = StudyRun(config, 0, tmp_path / "study/a/seed_0", [])
    run.folder.mkdir(parents=True)
    run.check_folder()  # interrupted before its first file
    run.done.write_text("")
    assert not run.is_done()
