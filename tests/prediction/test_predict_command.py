"""`shunted-lit predict` writes the files of a checkpoint's task, and resumes after an interruption."""

import json
from pathlib import Path

import pytest
import torch
from helpers.exports import save_checkpoint
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.data import ImagesDataModule
from shunted_lit.tasks import ClassificationTask, DetectionTask


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


def test_large_images_are_predicted_in_slices(capsys):
    """Each half of a picture is predicted as a picture of its own, and validation scores the same boxes."""
    torch.manual_seed(0)
    task = DetectionTask(2, ["a", "b"], backbone="test_resnet", pyramid_channels=32, min_size=64, max_size=64,
                         detector_options={"score_thresh": 0.0})  # fmt: skip
    save_checkpoint(task, "best.ckpt")
    Path("images").mkdir()
    halves = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    Image.fromarray(torch.cat(halves, 2).permute(1, 2, 0).numpy()).save("images/0.png")
    predict("--predictions.min_score=0", "--data.slices=64", "--data.overlap=0")
    content = json.loads(Path("predictions/predictions.json").read_text())
    found = sorted((a["score"], a["bbox"]) for a in content["annotations"])
    with torch.no_grad():
        results = [task.eval()([half / 255])[0] for half in halves]
    expected = sorted(
        (float(score), [x1 + 64 * i, y1, x2 - x1, y2 - y1])
        for i, result in enumerate(results)
        for score, (x1, y1, x2, y2) in zip(result["scores"], result["boxes"].tolist(), strict=True)
    )
    assert len(found) > 5
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert sorted(x for _, (x, *_) in found) == pytest.approx(sorted(x for _, (x, *_) in expected), abs=0.1)
    states = [ImagesDataModule("images", **options).state() for options in ({}, {"slices": 64}, {"slices": 32})]
    assert len({str(state) for state in states}) == 3, "a run that is resumed must have the same slices"


def test_tasks_without_slices_refuse_them():
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/0.png")
    save_checkpoint(ClassificationTask(2, ["a", "b"], backbone="test_resnet"), "best.ckpt")
    with pytest.raises(
        ValueError, match=r"`data\.slices` must be null for ClassificationTask: only detectors take slices"
    ):
        predict("--data.slices=4", "--data.image_size=8")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.slices=0", "`slices` must be at least 1, got 0"),
        ("--data.overlap=1", "`overlap` must be at least 0 and below 1, got 1"),
    ],
)
def test_impossible_slices_are_one_line(argument, message):
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/0.png")
    save_checkpoint(DetectionTask(2, ["a", "b"], backbone="test_resnet", pyramid_channels=32), "best.ckpt")
    with pytest.raises((ValueError, SystemExit)) as error:
        predict("--data.slices=64", argument)
    assert message in str(error.value)
