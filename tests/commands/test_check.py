"""Bad data: told in one go by `check` and at the start of `fit`; left out by an option, with a limit."""

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
def folder(scenes, tmp_path, monkeypatch):
    """A copy to damage, in the current folder."""
    shutil.copytree(scenes, tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "set"


def cut(path, share=0.5):
    """Leaves the header and a part of an image."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def checked(capsys, *words):
    """What `check` prints, and its exit code."""
    try:
        main(["check", *words])
        code = 0
    except ValueError as error:
        code, last = 2, str(error)
    lines = capsys.readouterr().out.splitlines()
    return [*lines, last] if code else lines


@pytest.mark.parametrize("words", [YOLO, COCO, MASKS], ids=["yolo", "coco", "masks"])
def test_a_whole_set_is_whole(words, capsys):
    assert checked(capsys, *words) == [
        "16 images, nothing wrong with them, by labels and headers; --decode true reads pixels, too"
    ]
    assert checked(capsys, *words, "--decode=true") == ["16 images, nothing wrong with them"]


def test_all_faults_of_a_yolo_set_in_one_go(folder, capsys):
    (folder / "labels/train/000001.txt").write_text("0 0.5 0.5 x 0.2\n0 0.5 0.5 0.1 0.1\n77 0.5 0.5 0.1 0.1\n")
    (folder / "images/train/000002.png").unlink()
    (folder / "images/train/000003.png").write_bytes(b"no image")
    (folder / "images/val/000000.png").write_bytes(b"")
    cut(folder / "images/train/000004.png")
    found = checked(capsys, *YOLO)
    assert [line.partition(":")[0] for line in found[:-1]] == [
        "set/labels/train/000001.txt",
        "set/labels/train/000001.txt",
        "set/labels/train/000002.txt",
        "set/images/train/000003.png",
        "set/images/val/000000.png",
    ]
    assert [line.split(":")[1] for line in found[:2]] == ["1", "3"], "the lines"
    assert found[-1] == "5 faults in 15 images"
    decoded = checked(capsys, *YOLO, "--decode=true", "--data.num_workers=2")
    assert decoded[-1] == "6 faults in 15 images"
    assert any(line.startswith("set/images/train/000004.png: not a readable image") for line in decoded)


def test_more_faults_than_an_error_shows_are_all_printed(folder, capsys):
    for path in (folder / "labels/train").iterdir():
        path.write_text("nonsense\n" * 30)
    (folder / "images/val/000001.png").write_bytes(b"")
    found = checked(capsys, *YOLO)
    assert sum("expected numbers (class cx cy w h), got 'nonsense'" in line for line in found) == 12 * 30
    assert any(line.startswith("set/images/val/000001.png") for line in found)


def test_all_faults_of_a_coco_set(folder, capsys):
    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 99
    content["annotations"][1]["bbox"] = [0, 0, -1, 2]
    content["images"][5]["width"] += 1
    file.write_text(json.dumps(content))
    (folder / "images/train/000007.png").write_bytes(b"no image")
    found = checked(capsys, *COCO)
    assert "names category 99" in found[0]
    assert "annotation 2: the box" in found[1]
    assert found[2].startswith("set/images/train/000005.png: is 64 x 64, but its annotations state (65, 64)")
    assert found[3].startswith("set/images/train/000007.png: not a readable image")
    assert found[4:] == ["4 faults in 16 images"]


def test_all_faults_of_masks(folder, capsys):
    for i in (1, 2):
        (folder / f"masks/train/{i:06d}.png").unlink()
    Image.new("RGB", (64, 64)).save(folder / "masks/train/000003.png")
    Image.new("L", (63, 64)).save(folder / "masks/train/000004.png")
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(folder / "masks/val/000000.png")
    found = checked(capsys, *MASKS)
    assert [line.partition(":")[0] for line in found] == [
        "set/images/train/000001.png", "set/images/train/000002.png", "set/masks/train/000003.png",
        "set/masks/train/000004.png", "4 faults in 14 images",
    ]  # fmt: skip
    assert any("000000.png: has 1 values that are no class: 99" in line
               for line in checked(capsys, *MASKS, "--decode=true"))  # fmt: skip


def test_classes_in_folders(folder, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "classes" / split / name).mkdir(parents=True)
            shutil.copy(folder / "images/val/000000.png", folder / "classes" / split / name / "a.png")
    words = ["--data=ImageFolderDataModule", "--data.root=set/classes"]
    assert checked(capsys, *words) == [
        "4 images, nothing wrong with them, by labels and headers; --decode true reads pixels, too"
    ]
    (folder / "classes/train/dog/b.png").write_bytes(b"no image")
    assert checked(capsys, *words)[0].startswith("set/classes/train/dog/b.png: not a readable image")


def test_a_config_of_fit_tells_what_to_look_at(folder, capsys):
    config = str(Path(__file__).parents[2] / "configs/shapes/mask_rcnn.yaml")
    assert "masks need a polygon on each line" in checked(capsys, f"--config={config}", *YOLO)[0]
    assert checked(capsys, f"--config={config}", *COCO)[-1].startswith("16 images, nothing wrong")


def test_the_exit_code(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shunted-lit", "check", *YOLO])
    (folder / "images/val/000000.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2
    assert "shunted-lit: error: 1 fault in 16 images" in capsys.readouterr().err


# --- fit


def test_fit_tells_all_damaged_headers_before_it_begins(folder):
    for split, i in (("train", 3), ("train", 5), ("val", 1)):
        (folder / f"images/{split}/{i:06d}.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"(?s)train/000003.*train/000005.*val/000001.*data: 3 faults\. 2 .*--data.skip"
    ):
        main([*FIT])
    assert not list(Path("runs").glob("*/metrics.csv"))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_left_out_and_told(folder, workers, caplog):
    (folder / "images/train/000003.png").write_bytes(b"no image")
    for i in (5, 6):
        cut(folder / f"images/train/{i:06d}.png")  # headers are whole: found in training
    with caplog.at_level("WARNING"):
        cli = main([*FIT, "--data.skip_damaged=3", f"--data.num_workers={workers}", "--trainer.max_epochs=2"])
    assert cli.trainer.global_step == 6, "as many steps as with whole images"
    assert "set/images/train/000003.png: not a readable image" in caplog.text
    told = next(r.getMessage() for r in caplog.records if "were damaged and skipped" in r.getMessage())
    assert told.startswith("3 of 12 training images were damaged and skipped: ")
    assert all(f"00000{i}.png" in told for i in (3, 5, 6))
    rows = csv.DictReader(Path(cli.trainer.log_dir, "metrics.csv").read_text().splitlines())
    assert any(row["val/map"] for row in rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_more_than_the_limit_is_an_error(folder, workers):
    for i in (5, 6, 7):
        cut(folder / f"images/train/{i:06d}.png")
    with pytest.raises(ValueError, match=r"3 training images are damaged, but `skip_damaged` is 2"):
        main([*FIT, "--data.skip_damaged=2", f"--data.num_workers={workers}"])


def test_evaluation_is_of_whole_images_alone(folder):
    (folder / "images/val/000001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"val/000001.png: not a readable image"):
        main([*FIT, "--data.skip_damaged=9"])
    cut(folder / "images/val/000002.png")
    with pytest.raises(ValueError, match=r"val/00000[12].png: not a readable image"):
        main([*FIT, "--data.skip_damaged=9", "--data.check_images=false"])


def test_without_the_option_a_damaged_image_is_an_error_by_name(folder):
    cut(folder / "images/train/000006.png")
    with pytest.raises(ValueError, match=r"train/000006.png: not a readable image"):
        main([*FIT])


def test_headers_are_read_once_a_run_and_only_where_asked_for(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("shunted_lit.data.detection.read_size", lambda path: seen.append(path) or (64, 64))
    main([*FIT, "--trainer.fast_dev_run=1"])
    assert len(seen) == len(set(seen)) == 16
    seen.clear()
    main([*FIT, "--trainer.fast_dev_run=1", "--data.check_images=false"])
    assert not seen


def test_a_wrong_limit():
    with pytest.raises(ValueError, match="`skip_damaged` must be at least 0, got -1"):
        YoloDataModule("set/data.yaml", skip_damaged=-1)


@pytest.mark.parametrize(("suffix", "orientation"), [("jpg", 6), ("png", 6), ("jpg", 1), ("webp", 8), ("tiff", 5)])
def test_the_header_tells_the_size_that_is_read(folder, suffix, orientation):
    from shunted_lit.data.image_io import read_image, read_size

    exif = Image.Exif()
    exif[274] = orientation
    path = folder / f"turned.{suffix}"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert read_image(path).size == ((30, 40) if orientation >= 5 else (40, 30))
    assert read_size(path) == read_image(path).size


def test_logs_of_workers_reach_the_terminal(folder, capfd, monkeypatch):
    cut(folder / "images/train/000006.png")
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.basicConfig(format="%(message)s")
    main([*FIT, "--data.skip_damaged=1", "--data.num_workers=1"])
    assert "set/images/train/000006.png: not a readable image" in capfd.readouterr().err


def test_one_fault_hides_no_other(folder, capsys):
    """Bytes that are no text, a label that leads nowhere, ids twice, images that are missing in a list."""
    labels = folder / "labels/train"
    (labels / "000001.txt").write_bytes(b"0 0.5 0.5 0.1 \xff")
    (labels / "000002.txt").unlink()
    (labels / "000002.txt").symlink_to("nowhere.txt")
    (labels / "000003.txt").write_text("77 0.5 0.5 0.1 0.1\n")
    found = checked(capsys, *YOLO)
    assert [Path(line.partition(":")[0]).name for line in found[:-1]] == [
        "000001.txt", "000002.txt", "000003.txt",
    ]  # fmt: skip
    (folder / "list.txt").write_text("images/train/000004.png\nnone.png\nimages/train/000004.png\nnor.png\n")
    content = (folder / "data.yaml").read_text().replace("images/train", "list.txt")
    (folder / "data.yaml").write_text(content)
    found = checked(capsys, *YOLO)
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
    told = "\n".join(checked(capsys, *COCO))
    for words in (
        "twice",
        "annotations[5] must have id",
        "the id of images[2] must be an integer, got 'x'",
        "width and height as integers",
        "val/000001",
    ):
        assert words in told


def test_labels_and_images_of_both_splits_are_told_by_fit_at_once(folder):
    (folder / "labels/train/000001.txt").write_text("77 0.5 0.5 0.1 0.1\n")
    (folder / "labels/val/000001.txt").write_text("78 0.5 0.5 0.1 0.1\n")
    (folder / "images/train/000003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)class must be .* 77.*train/000003.*class must be .* 78.*data: 3 faults"):
        main(FIT)


def test_the_same_images_for_both_splits_are_told(folder, caplog):
    (folder / "data.yaml").write_text((folder / "data.yaml").read_text().replace("images/val", "images/train"))
    main(["check", *YOLO])
    assert "train and val are the same images" in caplog.text
