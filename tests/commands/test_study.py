"""Studies: what they run, what they make of it, and that nothing is run twice or mixed up."""

import csv
import json
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from shunted_lit.cli import main
from shunted_lit.commands import study as module
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


def run(*words):
    main(["study", "[configs]", f"--options={json.dumps(TINY)}", *words])


def rows(path="study/results.csv"):
    with Path(path).open(newline="") as file:
        return {row["config"]: row for row in csv.DictReader(file)}


def test_a_study_and_its_continuation(monkeypatch, capsys):
    trained = []
    train = module.Run.train
    monkeypatch.setattr(module.Run, "train", lambda self: trained.append((self.config.stem, self.seed)) or train(self))
    run("--seeds=1")
    assert trained == [("with", 0), ("without", 0)]
    run("--seeds=2")
    assert trained[2:] == [("with", 1), ("without", 1)], "what is finished is not run again"
    found = rows()
    assert set(found) == {"with", "without"}
    for name, row in found.items():
        seeds = [json.loads(Path(f"study/{name}/seed_{seed}/done.json").read_text()) for seed in (0, 1)]
        minutes = [scores["minutes"] for scores in seeds]
        assert float(row["minutes"]) == pytest.approx(statistics.mean(minutes))
        assert float(row["minutes std"]) == pytest.approx(statistics.stdev(minutes))
        assert "val/map" in row
        with Path("study/runs.csv").open(newline="") as file:
            each = [run for run in csv.DictReader(file) if run["config"] == name]
        assert [(run["seed"], float(run["minutes"])) for run in each] == [("0", minutes[0]), ("1", minutes[1])]
    config = yaml.safe_load(Path("study/with/seed_1/version_0/config.yaml").read_text())
    assert (config["seed_everything"], config["data"]["init_args"]["train_size"]) == (1, 8)
    with Image.open("study/results.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    told = capsys.readouterr().out
    assert "over 2 seeds" in told
    assert "results.csv" in told
    Path("study/with/seed_1/done.json").unlink()  # as if cut off
    run("--seeds=2")
    assert trained[4:] == [("with", 1)]


def test_a_score_that_the_first_run_lacks_is_there():
    (row,) = module.summary({"a": [{"map": 1.0}, {"map": 2.0, "large": 3.0}, {"map": 3.0, "large": 5.0}]})
    assert (row["large"], row["large std"]) == (4.0, pytest.approx(2**0.5))


def test_the_table_tells_rows_of_fewer_runs(capsys):
    rows = module.summary({"a": [{"x": 1.0}, {"x": 3.0}], "b": [{"x": 5.0}]})
    Console(width=80).print(module.rich_table(rows, 2))
    told = capsys.readouterr().out
    assert "b (1 of 2)" in told
    assert "±1.414" in told
    assert told.count("±") == 1


def test_the_best_loss_is_the_least(tmp_path, monkeypatch):
    def fit(command, **_):
        folder = Path(command[-1].partition("=")[2]) / "version_0"
        folder.mkdir()
        (folder / "metrics.csv").write_text("epoch,step,val/loss,val/acc1\n0,1,2.5,0.1\n1,2,0.3,0.9\n2,3,0.4,0.8\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", fit)
    run = module.Run(Path("configs/with.yaml"), 0, tmp_path / "run", [])
    run.train()
    scores = json.loads(run.done.read_text())
    assert (scores["val/loss"], scores["val/acc1"]) == (0.3, 0.9)


def test_summary_is_mean_and_deviation():
    found = module.summary({"a": [{"x": 1.0, "y": 2.0}, {"x": 3.0}], "b": [{"x": 5.0}]})
    assert found == [
        {"config": "a", "runs": 2, "x": 2.0, "x std": pytest.approx(2**0.5), "y": 2.0, "y std": ""},
        {"config": "b", "runs": 1, "x": 5.0, "x std": ""},
    ]
    assert module.scores_of(found) == ["x", "y"]


def test_runs_of_another_kind_are_not_mixed_in(monkeypatch):
    monkeypatch.setattr(module.Run, "train", lambda self: finish(self))

    def finish(some):
        some.folder.mkdir(parents=True)
        some.origin.write_text(json.dumps(some.made_by()))
        some.done.write_text(json.dumps({"val/map": 0.5}))

    run("--seeds=1")
    before = Path("study/with/seed_0/done.json").read_text()
    Path("configs/with.yaml").write_text("other: 1")
    with pytest.raises(ValueError, match=r"with/seed_0: was made by another content of with\.yaml or by other options"):
        run("--seeds=1")
    with pytest.raises(ValueError, match="was made by another content"):
        main(["study", "[configs/without.yaml]", "--seeds=1"])
    assert Path("study/with/seed_0/done.json").read_text() == before
    Path("study/without/seed_1").mkdir()
    Path("study/without/seed_1/mine.txt").write_text("")
    with pytest.raises(ValueError, match="seed_1: holds no run of a study"):
        main(["study", "[configs/without.yaml]", "--seeds=2", f"--options={json.dumps(TINY)}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["[]"], "no config in an empty list"),
        (["[none.yaml]"], r"none\.yaml: no such config"),
        (["[empty]"], "no config in empty; name YAML files or folders"),
        (["[configs, configs/with.yaml]"], "two configs are called with"),
        (["[configs]", "--seeds=0"], "seeds is 0"),
        (["[configs/with.yaml]", "--seeds=1", "--options=[--model.lr=-1]"], r"training failed: .*log\.txt"),
    ],
)
def test_what_does_not_fit_is_told(words, message):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        main(["study", *words])
    assert not list(Path().rglob("done.json"))


def test_a_run_that_fails_leaves_the_others_to_finish(monkeypatch, capsys):
    def finish(some):
        if some.config.stem == "with":
            raise ValueError(f"{some.config}, seed {some.seed}: training failed: a reason")
        some.folder.mkdir(parents=True)
        some.origin.write_text(json.dumps(some.made_by()))
        some.done.write_text(json.dumps({"val/map": 0.5}))

    monkeypatch.setattr(module.Run, "train", finish)
    with pytest.raises(ValueError, match=r"2 of 4 runs failed:\n.*seed 0: training failed: a reason\n.*seed 1"):
        run("--seeds=2")
    assert set(rows()) == {"without"}
    assert rows()["without"]["runs"] == "2"
    with pytest.raises(ValueError, match=r"^configs/with\.yaml, seed 0: training failed"):
        main(["study", "configs/with.yaml", "--seeds=1", f"--options={json.dumps(TINY)}"])


def test_a_folder_in_use_and_what_a_cut_off_study_leaves(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("seed_everything: 0")
    lock = lock_folder(tmp_path / "study")
    with pytest.raises(ValueError, match="another process is writing to it"):
        module.study([config], seeds=1, out=tmp_path / "study")
    lock.release()
    with pytest.raises(ValueError, match=r"a\.yaml: is there and no folder; name another by --out"):
        module.study([config], seeds=1, out=config)
    run = module.Run(config, 0, tmp_path / "study/a/seed_0", [])
    run.folder.mkdir(parents=True)
    run.check()  # it was cut off before its first file
    run.done.write_text("")
    assert not run.is_done()
