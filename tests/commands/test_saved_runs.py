"""Checkpoints of `fit` from earlier versions: they validate, predict and resume with the recorded results.

tests/saved_runs/VERSION/TASK holds the config.yaml and last.ckpt of a run, and the predictions of that version for
image.png; scores.json holds the scores of that version, from validation and from one more epoch of training.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shunted_lit.cli import main

SAVED = sorted((Path(__file__).parents[1] / "saved_runs").glob("*/*/last.ckpt"))
CHECKPOINTS = [pytest.param(path, id=f"{path.parts[-3]}-{path.parts[-2]}") for path in SAVED]
SLOW = [pytest.param(*case.values, id=case.id, marks=[] if "classification" in case.id else pytest.mark.slow)
        for case in CHECKPOINTS]  # fmt: skip
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def assert_recorded(trainer, checkpoint, suffix=""):
    recorded = json.loads((checkpoint.parents[1] / "scores.json").read_text())[checkpoint.parent.name + suffix]
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert scores.keys() == recorded.keys()
    assert scores == pytest.approx(recorded, abs=1e-4)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_checkpoint_validates_with_recorded_scores(checkpoint):
    assert_recorded(
        main(["validate", f"--ckpt_path={checkpoint}", "--trainer.logger=false", *QUIET]).trainer, checkpoint
    )


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_checkpoint_predicts_as_recorded(checkpoint):
    main(["predict", f"--ckpt_path={checkpoint}", f"--data.images={checkpoint.parents[1] / 'image.png'}", *QUIET,
          "--data.num_workers=0", "--predictions.min_score=0.01", "--predictions.pictures=false"])  # fmt: skip
    out, saved = Path("predictions"), checkpoint.parent
    if (saved / "predictions.csv").exists():
        rows = [list(csv.reader((folder / "predictions.csv").open())) for folder in (out, saved)]
        assert rows[0][1][:1] + rows[0][1][1::2] == rows[1][1][:1] + rows[1][1][1::2]  # file and names of classes
        assert [float(x) for x in rows[0][1][2::2]] == pytest.approx([float(x) for x in rows[1][1][2::2]], abs=1e-4)
    elif (saved / "predictions.json").exists():
        found, recorded = (json.loads((f / "predictions.json").read_text())["annotations"] for f in (out, saved))
        assert [(a["category_id"], a["bbox"]) for a in found] == [
            (a["category_id"], pytest.approx(a["bbox"], abs=0.02)) for a in recorded
        ]
        assert [a["score"] for a in found] == pytest.approx([a["score"] for a in recorded], abs=1e-4)
    else:
        found, recorded = (np.asarray(Image.open(path)) for path in (out / "masks/image.png", saved / "mask.png"))
        assert (found == recorded).mean() > 0.99


@pytest.mark.parametrize("checkpoint", SLOW)
def test_checkpoint_resumes_with_recorded_scores(checkpoint):
    cli = main(["fit", f"--config={checkpoint.parent / 'config.yaml'}", f"--ckpt_path={checkpoint}", *QUIET,
                "--trainer.max_epochs=5", "--trainer.default_root_dir=runs"])  # fmt: skip
    assert cli.trainer.global_step == 5 * 8
    assert_recorded(cli.trainer, checkpoint, "_resumed")
