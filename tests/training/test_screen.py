"""What a run prints: what users can act on, in order, and nothing else."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar

from shunted_lit.cli import main
from shunted_lit.data.scenes import write_scenes
from shunted_lit.training.screen import RunProgressBar, format_time_left

FIT = ["fit", "--config=neck.yaml", "--model.backbone=test_resnet", "--model.neck.depth=1",
       "--model.pyramid_channels=32", "--model.min_size=64", "--data.size=64", "--data.val_size=4",
       "--data.batch_size=4", "--report.images=0", "--trainer.accelerator=cpu",
       "--trainer.log_every_n_steps=1"]  # fmt: skip
UNWANTED = "FLOPs|TPU|HPU|v_num|many workers|Seed set|litlogger|max_epochs"


def test_output_to_a_file_is_data_model_folder_epochs_and_scores(capsys):
    write_scenes(Path("set"), train=6, val=3, size=64)
    data = ["--data=YoloDataModule", "--data.data=set/data.yaml", "--data.batch_size=4", "--model.freeze_backbone=true"]
    capsys.readouterr()
    main([*(word for word in FIT if not word.startswith("--data.")), *data, "--trainer.max_epochs=2"])
    output = capsys.readouterr().out
    labels = [Path("set/labels", split).iterdir() for split in ("train", "val")]
    objects = [sum(len(file.read_text().splitlines()) for file in files) for files in labels]
    expected = (
        rf"^data     YoloDataModule: 5 classes \(circle, triangle, square, star, cross\), 6 training images with "
        rf"{objects[0]} objects, 3 validation images with {objects[1]} objects\n"
        r"model    DetectionTask \(fcos, test_resnet, neck on level 5\): (\d\.\d) M parameters, (\d\.\d) M trainable\n"
        r"results  runs/version_0\n"
        r"Epoch 1/2, loss \d+\.\d{3}, map 0\.\d{3}, [\d.]+ images/s, 0:0\d:\d\d left\n"
        r"Epoch 2/2, loss .* images/s, 0:00:00 left\n"
        r" +runs/version_0, \d+ s +\n"
    )
    found = re.match(expected, output)
    assert found, output
    assert float(found[2]) < float(found[1]), "the frozen backbone is not trainable"
    assert "\x1b" not in output
    assert "\r" not in output
    assert output.index("Epoch 2/2") < output.index("val/map")
    assert "backbone: test_resnet" in Path("runs/version_0/config.yaml").read_text()
    assert not Path("runs/version_0/hparams.yaml").exists(), "config.yaml has all settings"


@pytest.mark.parametrize(
    ("options", "bar", "has_summary", "prints_model"),
    [
        (["--trainer.enable_progress_bar=false"], type(None), False, True),
        (["--trainer.callbacks+=TQDMProgressBar", "--trainer.enable_model_summary=true"], TQDMProgressBar, True, False),
        (["--trainer.enable_model_summary=false"], RunProgressBar, False, False),
    ],
)
def test_own_choices_replace_the_bar_and_the_summary(
    options, bar, has_summary, prints_model, capsys, recwarn, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    cli = main([*FIT, "--data.train_size=4", "--trainer.fast_dev_run=true", *options])
    assert type(cli.trainer.progress_bar_callback) is bar
    assert any(isinstance(callback, ModelSummary) for callback in cli.trainer.callbacks) == has_summary
    assert capsys.readouterr().out.count("model    DetectionTask") == prints_model
    assert not [warning for warning in recwarn if "many workers" in str(warning.message)], "the number is our choice"


def test_time_left_covers_the_whole_run(monkeypatch):
    bar = RunProgressBar()
    bar.setup(SimpleNamespace(is_global_zero=True, global_step=30, callbacks=[]), None, "fit")
    bar.start_time, bar.start_step, bar.steps = 1000.0, 10, 100  # resumed at step 10, 2 s a step
    monkeypatch.setattr("shunted_lit.training.screen.time.monotonic", lambda: 1040.0)
    assert bar.time_left() == 140
    bar.start_step = 30
    assert bar.time_left() is None
    assert [format_time_left(seconds) for seconds in (None, 5, 3661, float("inf"))] == [
        "-:--:-- left", "0:00:05 left", "1:01:01 left", "-:--:-- left"]  # fmt: skip


def run_in_terminal(words):
    """Return what a fresh process prints on a terminal of 100 columns."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-m", "shunted_lit", *words]
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env) as process:
        os.close(child)
        chunks = []
        try:
            while chunk := os.read(parent, 65536):
                chunks.append(chunk)
        except OSError:  # the process has ended
            pass
        os.close(parent)
    assert process.returncode == 0
    return b"".join(chunks).decode()


@pytest.mark.slow
def test_bar_on_a_terminal_has_speed_and_time_left_and_ends_before_the_table():
    output = run_in_terminal([*FIT, "--data.train_size=24", "--trainer.max_epochs=2"])
    assert not re.search(UNWANTED, output), re.findall(f".*(?:{UNWANTED}).*", output)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output).replace("\r", "\n")
    assert plain.count("GPU available") == 1, "each message is printed once"
    bars = [line for line in plain.splitlines() if line.startswith("Epoch 2/2")]
    assert re.fullmatch(r"Epoch 2/2 +━+ 6/6 [\d.]+ images/s 0:00:00 left loss: \d\.\d{3} map: 0\.\d{3} *", bars[-1]), (
        bars
    )
    places = [plain.index(text) for text in ("using the shipped", "data  ", "model  ", "results  ", "Epoch 1/2")]
    assert places == sorted(places)
    assert plain.rindex("Epoch 2/2") < plain.index("┏"), "the table comes last"
    assert "Epoch" not in plain[plain.index("┏") :]
