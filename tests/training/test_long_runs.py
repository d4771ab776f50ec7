"""Long runs: memory stays constant, and the death of a data worker is reported.

With SHUNTED_LIT_LONG=1 they take 2,000 training steps and 10,000 predictions.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow
LONG = os.environ.get("SHUNTED_LIT_LONG") == "1"

# Run in a separate process, so that memory freed by other tests cannot hide growth. What counts is the memory in use:
# the resident size moves by 30 MiB with what the C library keeps for later.
SAMPLED = """
import ctypes, gc, sys
import torch
from lightning.pytorch import Callback
from shunted_lit.cli import main

torch.set_num_threads(1)

class Mallinfo2(ctypes.Structure):  # the C library's own count, over all threads
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Mallinfo2

class Sample(Callback):
    def __init__(self, every: int = 20):
        self.every, self.count = every, 0
    def sample(self):
        self.count += 1
        if self.count % self.every == 0:
            gc.collect()
            memory = library.mallinfo2()
            print("sample", self.count, (memory.uordblks + memory.hblkhd) / 2**20, flush=True)
    def on_train_batch_end(self, *_):
        self.sample()
    def on_predict_batch_end(self, *_):
        self.sample()

main(sys.argv[1:])
"""


def measure_memory(*words):
    """Return the memory in use by a command's process in MiB, by the number of batches done."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLED, *words, "--trainer.enable_progress_bar=false"], capture_output=True, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONMALLOC": "malloc"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("sample ")]
    return {int(count): float(size) for _, count, size in rows}


def growth(memory):
    """Return by how many MiB the peak of the last third of the batches exceeds that of the middle third."""
    third = max(memory) / 3
    middle = [value for batch, value in memory.items() if third < batch <= 2 * third]
    return max(value for batch, value in memory.items() if batch > 2 * third) - max(middle)


TRAIN = {
    "classes": ["--model=ClassificationTask", "--model.backbone=resnet10t", "--data=ShapesDataModule", "--data.size=32",
                "--model.mixup=0.8", "--model.random_erasing=0.2"],
    "boxes": ["--model=DetectionTask", "--model.backbone=resnet10t", "--model.neck={depth: 1, num_heads: 4}",
              "--model.pyramid_channels=64", "--model.min_size=32", "--model.max_size=32", "--data=ShapesDataModule",
              "--data.size=32"],
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAIN)
def test_training_memory_stays_constant(kind):
    steps = 2000 if LONG else 200
    memory = measure_memory(
        "fit", *TRAIN[kind], "--data.batch_size=2", "--data.num_workers=0", "--data.train_size=200",
        "--data.val_size=4", f"--trainer.max_epochs={steps // 100}", "--trainer.check_val_every_n_epoch=4",
        "--trainer.callbacks+=Sample",
    )  # fmt: skip
    assert max(memory) == steps
    assert growth(memory) < 1, memory


def test_prediction_memory_stays_constant(tmp_path):
    from shunted_lit.tasks import DetectionTask

    task = DetectionTask(
        2, backbone="resnet10t", pyramid_channels=64, min_size=32, max_size=32, neck={"depth": 1, "num_heads": 4},
        detector_options={"score_thresh": 0.0, "detections_per_img": 3},
    )  # fmt: skip
    names = {"task": "DetectionTask", "class_names": task.class_names, "hyper_parameters": dict(task.hparams)}
    torch.save({"state_dict": task.state_dict(), "pytorch-lightning_version": "2.6.0", **names}, "run.ckpt")
    count = 10_000 if LONG else 400
    (tmp_path / "images").mkdir()
    for i in range(count):
        Image.new("RGB", (32 + i % 7, 32), (i % 256, 90, 90)).save(tmp_path / f"images/{i:05d}.png")
    memory = measure_memory(
        "predict", "--ckpt_path=run.ckpt", "--data.images=images", "--data.num_workers=0", "--predictions.min_score=0",
        "--trainer.callbacks+=Sample",
    )  # fmt: skip
    assert max(memory) == count
    assert growth(memory) < 1, memory
    assert len(list((tmp_path / "predictions/pictures").iterdir())) == count


def test_death_of_a_data_worker_is_reported():
    """SIGKILL, as the kernel sends when memory is short."""
    words = ["fit", *TRAIN["classes"], "--data.batch_size=2", "--data.num_workers=2", "--data.train_size=4000",
             "--trainer.max_epochs=9", "--trainer.enable_progress_bar=false"]  # fmt: skip
    with Path("log.txt").open("w") as log:
        run = subprocess.Popen([sys.executable, "-m", "shunted_lit", *words], stdout=log, stderr=log)
    try:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        rows = Path("runs/version_0/metrics.csv")
        while not rows.exists() and run.poll() is None:
            time.sleep(0.05)
        workers = [pid for pid in map(int, children.read_text().split()) if "shunted_lit" in command_of(pid)]
        assert len(workers) >= 2
        os.kill(workers[0], signal.SIGKILL)
        assert run.wait(60) == 2
    finally:
        run.kill()
        run.wait()
    output = Path("log.txt").read_text()
    assert "Traceback" not in output
    assert f"DataLoader worker (pid {workers[0]}" in output or f"DataLoader worker (pid(s) {workers[0]}" in output
    assert "A data loading process died, most often for lack of memory" in output


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()
