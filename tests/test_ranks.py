"""Several processes: what they train and judge together is what one does alone; and how they end where one fails."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shunted_lit.cli import main
from shunted_lit.tasks import DetectionTask, SegmentationTask

# Without BatchNorm, whose statistics SyncBatchNorm shares on GPUs alone; 13 images to judge, which 2 do not divide. In
# float64, as AdamW makes whole steps of gradients that are rounding errors alone.
COMMON = [
    "--data=ShapesDataModule", "--data.size=32", "--data.train_size=16", "--data.val_size=13", "--data.num_workers=0",
    "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.precision=64-true", "--report.images=0",
    "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--model.warmup_epochs=0",
]  # fmt: skip
NARROW = ["--model.backbone=pvt_v2_b0", "--model.levels=[3,4]", "--model.extra_levels=0", "--model.pyramid_channels=32",
          "--model.min_size=32", "--model.max_size=32"]  # fmt: skip
TASKS = {
    "classification": ["--model=ClassificationTask", "--model.backbone_options={stem: patch4, depths: [1, 1, 1, 1]}"],
    "fcos": ["--model=DetectionTask", *NARROW, "--model.detector=fcos", "--model.neck={depth: 1}",
             "--model.neck_levels=[4]"],
    "retinanet": ["--model=DetectionTask", *NARROW, "--model.detector=retinanet"],
    "segmentation": ["--model=SegmentationTask", "--model.backbone=pvt_v2_b0", "--model.decoder=fpn",
                     "--model.neck={depth: 1}", "--model.decoder_options={dropout: 0.0}"],
}  # fmt: skip
# One after another in the same processes: to start them takes longest.
SEVERAL = """
import json, sys
from shunted_lit.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
"""


def words(name, folder, batch_size, **more):
    further = [f"--{key}={value}" for key, value in more.items()]
    return ["fit", *COMMON, *TASKS[name], f"--data.batch_size={batch_size}",
            f"--trainer.default_root_dir={folder}", *further]  # fmt: skip


def torchrun(*args, count=2, timeout=300, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.run([*launch, *args], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the runs of two processes, by the task."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "several.py"
    script.write_text(SEVERAL)
    several = [words(name, folder / name, 4, **{"trainer.strategy": "ddp", "trainer.devices": 2}) for name in TASKS]
    done = torchrun(str(script), json.dumps(several))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", list(TASKS))
def test_two_processes_train_and_judge_as_one(name, trained, tmp_path):
    main(words(name, tmp_path, 8))
    one, two = tmp_path / "version_0", trained / name / "version_0"
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    begun = states[0].keys() == states[1].keys()
    assert begun and len(states[0]) > 50
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)
    scores = [{key: float(value) for row in rows(run) for key, value in row.items() if key.startswith("val/") and value}
              for run in (one, two)]  # fmt: skip
    assert scores[0].keys() == scores[1].keys() and len(scores[0]) >= 2
    for key in scores[0]:
        assert scores[0][key] == pytest.approx(scores[1][key], abs=1e-5), key
