"""`shunted-lit predict` writes the files of a checkpoint's task, and resumes after an interruption."""

import json
from pathlib import Path

import pytest
import torch
from helpers.exports import save_checkpoint
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.tasks import DetectionTask


def predict(*arguments):
    main(["predict", "--ckpt_path=best.ckpt", "--data.images=images", "--data.num_workers=0",
          "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *arguments])  # fmt: skip


def test_interrupted_prediction_resumes(capsys):
    torch.manual_seed(0)
    task = DetectionTask(2, ["a", "b"], backbone="test_resnet", levels=[3, 4, 5], neck=None, neck_levels=None,
                         pyramid_channels=32, extra_levels=0, min_size=64, max_size=96)  # fmt: skip
    save_checkpoint(task, "best.ckpt")
    Path("images").mkdir()
    for i in range(3):
        Image.new("RGB", (40 + i, 32), (80 * i, 9, 9)).save(f"images/{i}.png")
    predict("--trainer.limit_predict_batches=1")
    assert "1 of 3 chunks are complete; run the same command again to resume" in capsys.readouterr().out
    assert [path.name for path in Path("predictions/labels").iterdir()] == ["0.txt"]
    assert Path("predictions/.chunks").is_dir()
    with pytest.raises(ValueError, match=r"started with min_score 0\.3, now it is 0\.5; remove this folder"):
        predict("--predictions.min_score=0.5")
    predict()
    assert "3 images, " in capsys.readouterr().out
    content = json.loads(Path("predictions/predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.png", "1.png", "2.png"]
    assert {path.name for path in Path("predictions").iterdir()} == {
        "classes.txt", "labels", "pictures", "predictions.json"
    }  # fmt: skip
