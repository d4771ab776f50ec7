"""Validation images held out of the training images, in each format."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from shunted_lit.cli import main
from shunted_lit.data import CocoDataModule, ImageFolderDataModule, MaskFolderDataModule, YoloDataModule
from shunted_lit.data.scenes import write_scenes

SETTINGS = {"num_workers": 0, "flip": 0.0}
COUNT = 24


@pytest.fixture(scope="module")
def one_split(tmp_path_factory):
    """24 scenes in each format without a validation split: images, labels, masks, classes, data.yaml, labels.json."""
    written, folder = (tmp_path_factory.mktemp(name) / "set" for name in ("written", "one_split"))
    write_scenes(written, train=COUNT, val=1, size=48)
    folder.mkdir()
    for form in ("images", "labels", "masks"):
        shutil.move(written / form / "train", folder / form)
    shutil.move(written / "annotations/train.json", folder / "labels.json")
    shutil.move(written / "classes.txt", folder)
    names = yaml.safe_load((written / "data.yaml").read_text())["names"]
    (folder / "data.yaml").write_text(yaml.safe_dump({"train": "images", "names": names}))
    for number in range(COUNT):
        target = folder / f"photos/{'ab'[number % 2]}/{number:06d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"images/{number:06d}.png", target)
    return folder


@pytest.fixture
def folder(one_split, tmp_path):
    return shutil.copytree(one_split, tmp_path / "set")


def build_yolo(root, **options):
    return YoloDataModule(str(root / "data.yaml"), **SETTINGS, **options)


def build_coco(root, **options):
    files = {"train_images": "images", "train_annotations": "labels.json"}
    return CocoDataModule(str(root), **SETTINGS, **files, **options)


def build_masks(root, **options):
    return MaskFolderDataModule(str(root), train_images="images", train_masks="masks", **SETTINGS, **options)


def build_classes(root, **options):
    return ImageFolderDataModule(str(root / "photos"), train=".", image_size=48, **SETTINGS, **options)


BUILDERS = [build_yolo, build_coco, build_masks, build_classes]
per_format = pytest.mark.parametrize("build", BUILDERS)


def names_by_split(module):
    """Return the names of the images of each split, relative to the root."""
    datasets = {split: module.dataset(split) for split in ("train", "val")}
    return {
        split: [os.path.relpath(dataset.name_of(i), module.root) for i in range(len(dataset))]
        for split, dataset in datasets.items()
    }


@per_format
def test_fraction_splits_the_images_by_a_hash_of_their_names(folder, build):
    module = build(folder, val_fraction=0.3)
    splits = names_by_split(module)
    images = sorted(splits["train"] + splits["val"])
    assert len(set(images)) == len(images) == COUNT
    by_hash = [name for name in images if int(hashlib.sha256(name.encode()).hexdigest(), 16) < 0.3 * 2**256]
    assert splits["val"] == by_hash
    assert 0 < len(by_hash) < COUNT / 2
    assert module.hparams["val_fraction"] == 0.3, "a checkpoint of the run validates on the same images"


@per_format
def test_held_out_images_keep_their_labels_and_are_not_augmented(folder, build):
    module, other = build(folder, val_fraction=0.3), build(folder, val_fraction=0.9)
    assert module.dataset("val").transform is module.eval_transform
    assert module.dataset("train").transform is module.train_transform
    position = {name: i for i, name in enumerate(names_by_split(other)["val"])}
    for i, name in enumerate(names_by_split(module)["val"]):
        (image, target), (expected, label) = module.dataset("val")[i], other.dataset("val")[position[name]]
        assert torch.equal(image, expected)
        for key in ("boxes", "labels") if isinstance(target, dict) else ():
            assert torch.equal(target[key], label[key])
        if isinstance(target, torch.Tensor):
            assert torch.equal(target, label)
        if isinstance(target, int):
            assert module.class_names[target] == Path(name).parts[0]


def test_images_keep_their_split_when_others_are_added(folder):
    before = names_by_split(build_yolo(folder, val_fraction=0.3))
    for number in range(20):
        shutil.copy(folder / "images/000000.png", folder / f"images/another_{number}.png")
    after = names_by_split(build_yolo(folder, val_fraction=0.3))
    for split in ("train", "val"):
        assert set(before[split]) < set(after[split])


def test_split_does_not_depend_on_where_the_data_are(folder):
    before = names_by_split(build_coco(folder, val_fraction=0.3))
    shutil.move(folder, "elsewhere")
    assert names_by_split(build_coco(Path("elsewhere"), val_fraction=0.3)) == before


def test_at_least_one_image_is_held_out(folder):
    assert len(names_by_split(build_masks(folder, val_fraction=1e-9))["val"]) == 1


@per_format
def test_list_names_the_images_to_hold_out(folder, build):
    root = build(folder, val_fraction=0.5).root
    chosen = ["b/000003.png", "a/000010.png"] if build is build_classes else ["images/000003.png", "images/000010.png"]
    (root / "val.txt").write_text(f"{chosen[0]}\n\n./{chosen[1]}\n")
    splits = names_by_split(build(folder, val_list="val.txt"))
    assert sorted(splits["val"]) == sorted(chosen)
    assert len(splits["train"]) == COUNT - 2


def test_data_yaml_may_name_the_same_images_for_both_splits(folder):
    content = yaml.safe_load((folder / "data.yaml").read_text())
    (folder / "data.yaml").write_text(yaml.safe_dump({**content, "val": "images"}))
    assert sum(map(len, names_by_split(build_yolo(folder, val_fraction=0.3)).values())) == COUNT


@per_format
def test_missing_validation_split_names_the_option(folder, build):
    with pytest.raises(ValueError, match=r"(no such file or folder|val missing).*`val_fraction`, such as"):
        build(folder).setup("fit")


@per_format
def test_existing_validation_split_raises(folder, build):
    (folder / "labels/val").mkdir()
    for name in ("images/val", "photos/val"):
        shutil.copytree(folder / "photos/a", folder / name)
    (folder / "annotations").mkdir()
    shutil.copy(folder / "labels.json", folder / "annotations/instances_val2017.json")
    content = yaml.safe_load((folder / "data.yaml").read_text())
    (folder / "data.yaml").write_text(yaml.safe_dump({**content, "val": "images/val"}))
    with pytest.raises(ValueError, match=r"`val_fraction`.*, got .*val.*omit the option"):
        build(folder, val_fraction=0.2).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "`val_fraction` must be above 0 and below 1, got 0.0"),
        ({"val_fraction": 1.0}, "`val_fraction` must be above 0 and below 1, got 1.0"),
        ({"val_fraction": 0.2, "val_list": "val.txt"}, "`val_fraction` must not be set with `val_list`, got 0.2; omit"),
        ({"val_list": "none.txt"}, "set/none.txt: no such file"),
        ({"val_list": "val.txt"}, r"val.txt:2: images/gone.png is not among the 24 .*, such as images/000000.png"),
        ({"val_list": "empty.txt"}, "0 of 24 images are held out, so that val has none"),
        ({"val_list": "all.txt"}, "24 of 24 images are held out, so that train has none"),
    ],
)
def test_invalid_split_raises(folder, options, message):
    (folder / "val.txt").write_text("images/000001.png\nimages/gone.png\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "all.txt").write_text("".join(f"images/{number:06d}.png\n" for number in range(COUNT)))
    with pytest.raises(ValueError, match=message):
        build_coco(folder, **options).setup("fit")


def test_class_without_training_images_raises(folder):
    (folder / "photos/val.txt").write_text("".join(f"a/{number:06d}.png\n" for number in range(0, COUNT, 2)))
    with pytest.raises(ValueError, match="photos/a: no images in this class to train on"):
        build_classes(folder, val_list="val.txt").setup("fit")


def test_check_counts_each_image_and_each_error_once(folder, capsys):
    words = ["check", "--data", "YoloDataModule", f"--data.data={folder / 'data.yaml'}", "--data.val_fraction", "0.3"]
    main(words)
    assert f"{COUNT} images, no errors" in capsys.readouterr().out
    (folder / "labels/000001.txt").write_text("0 0.5 0.5 0.1\n")
    (folder / "labels/orphan.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ValueError, match="found 2 errors"):
        main(words)


def test_shards_have_the_same_splits(folder):
    pytest.importorskip("webdataset")
    main(["shard", "--data=ImageFolderDataModule", f"--data.root={folder / 'photos'}", "--data.train=.",
          "--data.val_fraction=0.3", "--data.num_workers=0", "--out=shards"])  # fmt: skip
    splits = names_by_split(build_classes(folder, val_fraction=0.3))
    for split, names in splits.items():
        (shard,) = json.loads(Path(f"shards/{split}/index.json").read_text())["shards"]
        assert shard["samples"] == len(names)
