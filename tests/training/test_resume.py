"""Interrupted runs: checkpoints stay readable, and a resumed run equals one that was never stopped, bit for bit."""

import csv
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shunted_lit.cli import main
from shunted_lit.data import ShapesDataModule
from shunted_lit.data.sampling import TrainingSampler
from shunted_lit.tasks import BaseTask
from shunted_lit.training.checkpoint import RunCheckpoint, Stopped
from shunted_lit.training.resume import create_run_folder, find_last_run

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
SHAPES = [
    "--data=ShapesDataModule",
    "--data.size=32",
    "--data.val_size=8",
    "--data.batch_size=4",
    "--seed_everything=5",
]
# Every source of random numbers: order, flips, colours, mixup, erasing, stochastic depth.
SMALL = "--model.backbone_options={dims: [8, 16, 24, 32], num_heads: [2, 2, 2, 2], depths: [1, 1, 2, 1]}"
CLASSES = ["fit", *QUIET, "--model=ClassificationTask", "--model.backbone=shunted_t", SMALL, "--model.mixup=0.8",
           "--model.drop_path_rate=0.3", "--model.random_erasing=0.3", *SHAPES, "--data.distort=0.5"]  # fmt: skip
BOXES = ["fit", *QUIET, "--model=DetectionTask", "--model.backbone=test_resnet",
         "--model.neck={depth: 1, num_heads: 2}", "--model.extra_levels=0", "--model.pyramid_channels=32",
         "--model.min_size=64", "--model.max_size=64",
         *SHAPES, "--data.size=64", "--data.crop=0.5"]  # fmt: skip
MAPS = ["fit", *QUIET, "--model=SegmentationTask", "--model.backbone=shunted_t", SMALL, "--model.decoder=fpn", *SHAPES]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_equal_runs(one, other):
    """Check that weights, optimizer states and metrics of two runs are equal, bit for bit."""
    first, second = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, other))
    assert first["global_step"] == second["global_step"] > 0
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = [content["optimizer_states"][0]["state"] for content in (first, second)]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])
    rows = [list(csv.DictReader((run / "metrics.csv").open(newline=""))) for run in (one, other)]
    assert rows[0] == rows[1]
    best = [torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] for run in (one, other)]
    assert best[0] == best[1]


RUNNER = """
import os, sys, traceback
import torch
from shunted_lit.cli import main
torch.set_num_threads(1)
for line in sys.stdin:  # a fork starts at once; a new process would import for seconds
    if not (pid := os.fork()):
        os.setpgid(0, 0)
        os.dup2(2, 1)
        try:
            main(line.strip().split("|"))
        except SystemExit as stop:
            os._exit(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    try:
        os.setpgid(pid, pid)  # the child does the same; one of them is first
    except OSError:
        pass
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runner:
    """Run commands in forked processes."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def start(self, words):
        self.process.stdin.write("|".join(words) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self):
        while not (line := self.process.stdout.readline().strip()).lstrip("-").isdecimal():
            assert self.process.poll() is None, self.log.read_text()
        return line

    def wait(self):
        return int(self.line())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_uninterrupted_run(tmp_path):
    words = [*CLASSES, "--data.train_size=202", "--data.num_workers=1", "--trainer.max_epochs=3",
             "--checkpoint.last_every_n_steps=3"]  # fmt: skip
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    dice = random.Random(0)
    kills = in_writing = 0
    with Runner(tmp_path / "log.txt") as runner:
        began = time.monotonic()
        runner.start([*words, f"--trainer.default_root_dir={reference}"])
        assert runner.wait() == 0, (tmp_path / "log.txt").read_text()
        seconds = time.monotonic() - began
        again = [*words, f"--trainer.default_root_dir={killed}", "--ckpt_path=last"]
        last = killed / "version_0/checkpoints/last.ckpt"
        metrics = killed / "version_0/metrics.csv"
        part = last.with_name(".last.ckpt.part")
        code = -9
        while code:
            before = steps(last)
            pid = runner.start(again)
            if kills < 22:
                part.unlink(missing_ok=True)
                deadline = time.monotonic() + seconds
                if kills % 2:
                    while not part.exists() and time.monotonic() < deadline and alive(pid):
                        time.sleep(0.0003)
                else:
                    goal = before + dice.randint(-1, 5)  # below 0: during the start
                    while (last_step(metrics) or 0) < goal and time.monotonic() < deadline and alive(pid):
                        time.sleep(0.003)
                    time.sleep(dice.uniform(0, 0.15))
                os.killpg(pid, signal.SIGKILL)
                in_writing += part.exists()
            code = runner.wait()
            assert code in (0, -9), (tmp_path / "log.txt").read_text()
            kills += code == -9
            assert steps(last) >= before, "saved steps are never lost"
            if code == -9 and (rows := last_step(metrics)) is not None:
                assert rows + 1 - steps(last) <= 3 + 1, "at most an interval and the current step are lost"
    assert kills >= 20
    assert in_writing >= 3
    assert_equal_runs(reference / "version_0", killed / "version_0")
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [path.name for path in killed.iterdir()] == ["version_0"]


def steps(path):
    """Return the steps of a checkpoint, which must be readable."""
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def last_step(path):
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    return max((int(row["step"]) for row in rows if (row["step"] or "").isdecimal()), default=None)


def alive(pid):
    return Path(f"/proc/{pid}/stat").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_process_group_ends_run_with_checkpoint(tmp_path, number, code):
    words = [*BOXES, "--data.train_size=40", "--data.num_workers=2", "--trainer.max_epochs=3"]
    with Runner(tmp_path / "log.txt") as runner:
        runner.start([*words, "--trainer.default_root_dir=reference"])
        assert runner.wait() == 0, (tmp_path / "log.txt").read_text()
        pid = runner.start([*words, "--trainer.default_root_dir=stopped"])
        metrics = tmp_path / "stopped/version_0/metrics.csv"
        while (last_step(metrics) or 0) < 13:
            assert alive(pid)
            time.sleep(0.01)
        os.killpg(pid, number)  # as terminals and schedulers do: workers get it, too
        assert runner.wait() == code, (tmp_path / "log.txt").read_text()
        stopped = steps(tmp_path / "stopped/version_0/checkpoints/last.ckpt")
        assert 13 <= stopped < 30
        assert f"stopped after step {stopped}" in (tmp_path / "log.txt").read_text()
        runner.start([*words, "--trainer.default_root_dir=stopped", "--ckpt_path=last"])
        assert runner.wait() == 0
    assert_equal_runs(Path("reference/version_0"), Path("stopped/version_0"))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("words", "at"),
    [
        slow([*BOXES, "--data.train_size=24", "--data.num_workers=2"], 8),
        slow([*BOXES, "--data.train_size=32", "--data.num_workers=0", "--trainer.val_check_interval=0.5"], 11),
        slow([*BOXES, "--data.train_size=28", "--data.num_workers=0", "--trainer.accumulate_grad_batches=3"], 4),
        slow([*BOXES, "--data.train_size=24", "--data.num_workers=0", "--trainer.check_val_every_n_epoch=2"], 7),
        slow([*MAPS, "--data.train_size=24", "--data.num_workers=0", "--trainer.callbacks+=EMAWeightAveraging"], 8),
        slow([*MAPS, "--data.train_size=24", "--data.num_workers=0", "--trainer.precision=bf16-mixed"], 6),
        ([*CLASSES, "--data.train_size=24", "--data.num_workers=0"], 12),
    ],
    ids=["workers", "validation twice an epoch", "accumulation", "validation each second epoch", "averaged weights",
         "bfloat16", "fast"],
)  # fmt: skip
def test_stopped_run_resumes_bit_for_bit(words, at, monkeypatch):
    words = [*words, "--trainer.max_epochs=4"]
    main([*words, "--trainer.default_root_dir=reference"])
    step, stopped = BaseTask.on_train_batch_start, []

    def interrupted(self, batch, batch_idx):
        step(self, batch, batch_idx)
        if self.global_step == at and not stopped:
            stopped.append(batch_idx)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(BaseTask, "on_train_batch_start", interrupted)
        with pytest.raises(Stopped):
            main([*words, "--trainer.default_root_dir=stopped"])
    assert at < steps(Path("stopped/version_0/checkpoints/last.ckpt")) <= at + 1
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert getattr(signal.getsignal(signal.SIGTERM), "__func__", None) is not RunCheckpoint.on_signal
    main([*words, "--trainer.default_root_dir=stopped", "--ckpt_path=last"])
    assert_equal_runs(Path("reference/version_0"), Path("stopped/version_0"))


def test_second_signal_ends_at_once(monkeypatch):
    def twice(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BaseTask, "on_train_batch_start", twice)
    with pytest.raises(SystemExit):
        main([*BOXES, "--data.train_size=8", "--data.num_workers=0", "--trainer.max_epochs=1"])
    assert not Path("runs/version_0/checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_number_of_workers_changes_nothing():
    ends = []
    for workers in (0, 1, 3):
        root = f"with_{workers}"
        main([*BOXES, "--data.train_size=16", f"--data.num_workers={workers}", "--trainer.max_epochs=2",
              f"--trainer.default_root_dir={root}"])  # fmt: skip
        ends.append(Path(root, "version_0"))
    assert_equal_runs(ends[0], ends[1])
    assert_equal_runs(ends[0], ends[2])


def test_seed_and_epoch_change_order_and_augmentation():
    def samples(seed, epoch):
        data = ShapesDataModule(train_size=16, size=64, num_workers=0, batch_size=16, annotation="boxes", crop=0.5)
        data.setup("fit")
        data.load_state_dict({"seed": seed, "epoch": epoch, "batches": 0})
        images, targets = next(iter(data.train_dataloader()))
        return [target["image_id"] for target in targets], torch.stack([image[:, :8, :8] for image in images])

    orders, pixels = zip(*(samples(*key) for key in ((0, 0), (0, 0), (0, 1), (1, 0))), strict=True)
    assert orders[0] == orders[1]
    assert torch.equal(pixels[0], pixels[1])
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[2]) == list(range(16)), "each image once"


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_sampler_splits_an_epoch_over_ranks_and_resumes_within_it(replicas, repeats):
    length = 31
    parts = [list(TrainingSampler(range(length), replicas, rank, seed=7, repeats=repeats)) for rank in range(replicas)]
    assert {len(part) for part in parts} == {-(-length // replicas)}
    keys = [key for part in parts for key in part]
    assert len({key[1:] for key in keys}) == len(keys), "no two samples share random numbers"
    counts = np.bincount([key[0] for key in keys], minlength=length)
    if repeats == 1:
        assert set(counts) <= {1, 2}
        assert sum(counts) == -(-length // replicas) * replicas
    else:
        assert counts.max() == repeats
    for rank, part in enumerate(parts):
        assert list(TrainingSampler(range(length), replicas, rank, seed=7, repeats=repeats, start=4)) == part[4:]
    order = TrainingSampler(range(length), replicas, 0, seed=7, repeats=repeats, epoch=3, start=4)
    order.set_epoch(3)
    assert order.start == 4
    order.set_epoch(4)
    assert [key[1:3] for key in order] == [(7, 4)] * len(order), "the next epoch is complete"


@pytest.mark.slow
def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    words = [*BOXES, "--data.train_size=8", "--data.num_workers=0", "--trainer.max_epochs=1"]
    main(words)
    last = tmp_path / "runs/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()
    limit = len(before) // 2
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from shunted_lit.cli import command
import sys
sys.argv = ["shunted-lit", *{words!r}, "--trainer.max_epochs=2", "--ckpt_path=last"]
command()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert re.search(r"(last|best)\.ckpt: cannot write a checkpoint of \d+ MB", message)
    assert "File too large" in message
    assert "trainer.default_root_dir" in message
    assert "the previous checkpoint is kept" in message
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
def test_ckpt_path_last_resumes_the_newest_training_run(caplog):
    words = [*BOXES, "--data.train_size=4", "--data.val_size=4", "--data.num_workers=0", "--trainer.max_epochs=1"]
    with caplog.at_level("WARNING"):
        main([*words, "--ckpt_path=last"])
    assert "no last.ckpt of a run yet; starting a new run" in caplog.text
    main(words)
    main(["validate", "--ckpt_path=runs/version_0/checkpoints/last.ckpt"])
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["version_0", "version_1", "version_2"]
    assert find_last_run(Path("runs")) == Path("runs/version_1"), "not the one that validated"
    cli = main([*words[:-1], "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert cli.trainer.global_step == 2
    assert Path(cli.trainer.log_dir) == Path("runs/version_1")
    assert len(list(Path("runs").iterdir())) == 3
    assert {path.name for path in Path("runs/version_1").glob("config*")} == {"config.yaml", "config_resumed.yaml"}
    assert find_last_run(Path("elsewhere")) is None


@pytest.mark.slow
def test_last_checkpoint_is_written_without_improvement(monkeypatch):
    monkeypatch.setattr(RunCheckpoint, "check_monitor_top_k", lambda self, trainer, current: self.best_model_path == "")
    main([*BOXES, "--data.train_size=8", "--data.num_workers=0", "--trainer.max_epochs=3"])
    assert steps(Path("runs/version_0/checkpoints/last.ckpt")) == 6
    assert steps(Path("runs/version_0/checkpoints/best.ckpt")) == 2


def test_run_folders_are_created_in_order(tmp_path):
    assert [create_run_folder(tmp_path / "runs").name for _ in range(3)] == ["version_0", "version_1", "version_2"]


@pytest.mark.parametrize("setting", ["last_every_n_steps=0", "last_every_n_minutes=-1"])
def test_invalid_checkpoint_intervals_are_rejected(setting):
    with pytest.raises(ValueError, match=rf"`checkpoint.{setting.partition('=')[0]}` must be above 0, got"):
        main([*BOXES, "--data.train_size=4", f"--checkpoint.{setting}"])
