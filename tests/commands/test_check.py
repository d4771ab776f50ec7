"""Errors in data: `check` and the start of `fit` report all at once; training can skip some damaged images."""

import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shunted_lit.cli import command, main
from shunted_lit.data import YoloDataModule
from shunted_lit.data.scenes import write_scenes

YOLO = ["--data=YoloDataModule", "--data.data=set/data.yaml"]
COCO = ["--data=CocoDataModule", "--data.root=set", "--data.train_images=images/train", "--data.val_images=images/val",
        "--data.train_annotations=annotations/train.json", "--data.val_annotations=annotations/val.json"]  # fmt: skip
MASKS = ["--data=MaskFolderDataModule", "--data.root=set"]
FIT = ["fit", *YOLO, "--model=DetectionTask", "--model.min_size=64", "--model.max_size=64",
       "--model.pyramid_channels=64",
       "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, train=12, val=4, size=64)
    return folder


@pytest.fixture(autouse=True)
def folder(scenes, tmp_path):
    """Copy the data set to the current folder, to be damaged there."""
    shutil.copytree(scenes, tmp_path / "set")
    return tmp_path / "set"


def truncate(path):
    """Keep the first half of an image file, with its header."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def check(capsys, *words):
    """Return the lines that `check` prints, with its error as the last one."""
    try:
        main(["check", *words])
        code = 0
    except ValueError as error:
        code, last = 2, str(error)
    lines = capsys.readouterr().out.splitlines()
    return [*lines, last] if code else lines


@pytest.mark.parametrize("words", [YOLO, COCO, MASKS], ids=["yolo", "coco", "masks"])
def test_intact_data_have_no_errors(words, capsys):
    assert check(capsys, *words) == ["16 images, no errors (labels and headers; --decode true also reads pixels)"]
    assert check(capsys, *words, "--decode=true") == ["16 images, no errors"]


def test_check_prints_all_errors_of_yolo_data(folder, capsys):
    (folder / "labels/train/000001.txt").write_text("0 0.5 0.5 x 0.2\n0 0.5 0.5 0.1 0.1\n77 0.5 0.5 0.1 0.1\n")
    (folder / "images/train/000002.png").unlink()
    (folder / "images/train/000003.png").write_bytes(b"no image")
    (folder / "images/val/000000.png").write_bytes(b"")
    truncate(folder / "images/train/000004.png")
    found = check(capsys, *YOLO)
    assert [line.partition(":")[0] for line in found[:-1]] == [
        "set/labels/train/000001.txt",
        "set/labels/train/000001.txt",
        "set/labels/train/000002.txt",
        "set/images/train/000003.png",
        "set/images/val/000000.png",
    ]
    assert [line.split(":")[1] for line in found[:2]] == ["1", "3"], "line numbers"
    assert found[-1] == "found 5 errors in 15 images."
    decoded = check(capsys, *YOLO, "--decode=true", "--data.num_workers=2")
    assert decoded[-1] == "found 6 errors in 15 images."
    assert any(line.startswith("set/images/train/000004.png: not a readable image") for line in decoded)


def test_check_prints_hundreds_of_errors(folder, capsys):
    for path in (folder / "labels/train").iterdir():
        path.write_text("nonsense\n" * 30)
    (folder / "images/val/000001.png").write_bytes(b"")
    found = check(capsys, *YOLO)
    assert sum("expected numbers (class cx cy w h), got 'nonsense'" in line for line in found) == 12 * 30
    assert any(line.startswith("set/images/val/000001.png") for line in found)


def test_check_prints_all_errors_of_coco_data(folder, capsys):
    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 99
    content["annotations"][1]["bbox"] = [0, 0, -1, 2]
    content["images"][5]["width"] += 1
    file.write_text(json.dumps(content))
    (folder / "images/train/000007.png").write_bytes(b"no image")
    found = check(capsys, *COCO)
    assert "names category 99" in found[0]
    assert "annotation 2: the box" in found[1]
    assert found[2].startswith("set/images/train/000005.png: is 64 x 64, but its annotations state (65, 64)")
    assert found[3].startswith("set/images/train/000007.png: not a readable image")
    assert found[4:] == ["found 4 errors in 16 images."]


def test_check_prints_all_errors_of_masks(folder, capsys):
    for i in (1, 2):
        (folder / f"masks/train/{i:06d}.png").unlink()
    Image.new("RGB", (64, 64)).save(folder / "masks/train/000003.png")
    Image.new("L", (63, 64)).save(folder / "masks/train/000004.png")
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(folder / "masks/val/000000.png")
    found = check(capsys, *MASKS)
    assert [line.partition(":")[0] for line in found] == [
        "set/images/train/000001.png", "set/images/train/000002.png", "set/masks/train/000003.png",
        "set/masks/train/000004.png", "found 4 errors in 14 images.",
    ]  # fmt: skip
    assert any("000000.png: has 1 values that are no class: 99" in line
               for line in check(capsys, *MASKS, "--decode=true"))  # fmt: skip


def test_check_reads_class_folders(folder, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "classes" / split / name).mkdir(parents=True)
            shutil.copy(folder / "images/val/000000.png", folder / "classes" / split / name / "a.png")
    words = ["--data=ImageFolderDataModule", "--data.root=set/classes"]
    assert check(capsys, *words) == ["4 images, no errors (labels and headers; --decode true also reads pixels)"]
    (folder / "classes/train/dog/b.png").write_bytes(b"no image")
    assert check(capsys, *words)[0].startswith("set/classes/train/dog/b.png: not a readable image")


def test_check_takes_the_kind_of_labels_from_a_config_of_fit(folder, capsys):
    config = str(Path(__file__).parents[2] / "configs/shapes/mask_rcnn.yaml")
    assert "masks need a polygon on each line" in check(capsys, f"--config={config}", *YOLO)[0]
    assert check(capsys, f"--config={config}", *COCO)[-1].startswith("16 images, no errors")


def test_check_exits_with_code_2(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shunted-lit", "check", *YOLO])
    (folder / "images/val/000000.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2
    assert "shunted-lit: error: found 1 error in 16 images." in capsys.readouterr().err


# --- fit


def test_fit_reports_all_damaged_headers_before_training(folder):
    for split, i in (("train", 3), ("train", 5), ("val", 1)):
        (folder / f"images/{split}/{i:06d}.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"(?s)train/000003.*train/000005.*val/000001.*data: 3 faults\. 2 .*--data.skip"
    ):
        main([*FIT])
    assert not list(Path("runs").glob("*/metrics.csv"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_training_images_are_skipped_and_reported(folder, workers, caplog):
    (folder / "images/train/000003.png").write_bytes(b"no image")
    for i in (5, 6):
        truncate(folder / f"images/train/{i:06d}.png")  # headers are whole: found in training
    with caplog.at_level("WARNING"):
        cli = main([*FIT, "--data.skip_damaged=3", f"--data.num_workers={workers}", "--trainer.max_epochs=2"])
    assert cli.trainer.global_step == 6, "as many steps as with whole images"
    assert "set/images/train/000003.png: not a readable image" in caplog.text
    message = next(r.getMessage() for r in caplog.records if "were damaged and skipped" in r.getMessage())
    assert message.startswith("3 of 12 training images were damaged and skipped: ")
    assert all(f"00000{i}.png" in message for i in (3, 5, 6))
    rows = csv.DictReader(Path(cli.trainer.log_dir, "metrics.csv").read_text().splitlines())
    assert any(row["val/map"] for row in rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_damaged_images_than_the_limit_are_an_error(folder, workers):
    for i in (5, 6, 7):
        truncate(folder / f"images/train/{i:06d}.png")
    with pytest.raises(ValueError, match=r"3 training images are damaged, but `skip_damaged` is 2"):
        main([*FIT, "--data.skip_damaged=2", f"--data.num_workers={workers}"])


def test_damaged_validation_images_are_never_skipped(folder):
    (folder / "images/val/000001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"val/000001.png: not a readable image"):
        main([*FIT, "--data.skip_damaged=9"])
    truncate(folder / "images/val/000002.png")
    with pytest.raises(ValueError, match=r"val/00000[12].png: not a readable image"):
        main([*FIT, "--data.skip_damaged=9", "--data.check_images=false"])


def test_damaged_image_without_skipping_is_an_error(folder):
    truncate(folder / "images/train/000006.png")
    with pytest.raises(ValueError, match=r"train/000006.png: not a readable image"):
        main([*FIT])


@pytest.mark.slow
def test_headers_are_read_once_per_run_and_only_on_request(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("shunted_lit.data.detection.read_size", lambda path: seen.append(path) or (64, 64))
    main([*FIT, "--trainer.fast_dev_run=1"])
    assert len(seen) == len(set(seen)) == 16
    seen.clear()
    main([*FIT, "--trainer.fast_dev_run=1", "--data.check_images=false"])
    assert not seen


def test_negative_limit_is_rejected():
    with pytest.raises(ValueError, match="`skip_damaged` must be at least 0, got -1"):
        YoloDataModule("set/data.yaml", skip_damaged=-1)


@pytest.mark.parametrize(("suffix", "orientation"), [("jpg", 6), ("png", 6), ("jpg", 1), ("webp", 8), ("tiff", 5)])
def test_size_from_header_respects_exif_orientation(folder, suffix, orientation):
    from shunted_lit.data.image_io import read_image, read_size

    exif = Image.Exif()
    exif[274] = orientation
    path = folder / f"turned.{suffix}"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert read_image(path).size == ((30, 40) if orientation >= 5 else (40, 30))
    assert read_size(path) == read_image(path).size


@pytest.mark.slow
def test_worker_logs_reach_the_terminal(folder, capfd, monkeypatch):
    truncate(folder / "images/train/000006.png")
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.basicConfig(format="%(message)s")
    main([*FIT, "--data.skip_damaged=1", "--data.num_workers=1"])
    assert "set/images/train/000006.png: not a readable image" in capfd.readouterr().err


def test_no_error_hides_another(folder, capsys):
    """Undecodable bytes, a dangling symlink, duplicate ids, and missing images in a list."""
    labels = folder / "labels/train"
    (labels / "000001.txt").write_bytes(b"0 0.5 0.5 0.1 \xff")
    (labels / "000002.txt").unlink()
    (labels / "000002.txt").symlink_to("nowhere.txt")
    (labels / "000003.txt").write_text("77 0.5 0.5 0.1 0.1\n")
    found = check(capsys, *YOLO)
    assert [Path(line.partition(":")[0]).name for line in found[:-1]] == [
        "000001.txt", "000002.txt", "000003.txt",
    ]  # fmt: skip
    (folder / "list.txt").write_text("images/train/000004.png\nnone.png\nimages/train/000004.png\nnor.png\n")
    content = (folder / "data.yaml").read_text().replace("images/train", "list.txt")
    (folder / "data.yaml").write_text(content)
    found = check(capsys, *YOLO)
    assert sum("there is no image" in line for line in found) == 2
    assert sum("or to one that is named twice" in line for line in found) == 1

    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    content["annotations"][3]["id"] = content["annotations"][2]["id"]
    del content["annotations"][5]["bbox"]
    content["images"][2]["id"] = "x"
    content["images"][4]["width"] = 10**400
    file.write_text(json.dumps(content))
    (folder / "images/val/000001.png").write_bytes(b"")
    messages = "\n".join(check(capsys, *COCO))
    for words in (
        "twice",
        "annotations[5] must have id",
        "the id of images[2] must be an integer, got 'x'",
        "width and height as integers",
        "val/000001",
    ):
        assert words in messages


def test_fit_reports_labels_and_images_of_both_splits_at_once(folder):
    (folder / "labels/train/000001.txt").write_text("77 0.5 0.5 0.1 0.1\n")
    (folder / "labels/val/000001.txt").write_text("78 0.5 0.5 0.1 0.1\n")
    (folder / "images/train/000003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)class must be .* 77.*train/000003.*class must be .* 78.*data: 3 faults"):
        main(FIT)


def test_same_images_in_both_splits_are_reported(folder, caplog):
    (folder / "data.yaml").write_text((folder / "data.yaml").read_text().replace("images/val", "images/train"))
    main(["check", *YOLO])
    assert "train and val are the same images" in caplog.text
