"""Drawn scenes, the two folder formats, and what is wrong with other people's files."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shunted_lit.data import CocoDataModule, ShapesDataModule, YoloDataModule
from shunted_lit.data.masks import draw_mask
from shunted_lit.data.scenes import write_scenes
from shunted_lit.data.yolo import label_path

STILL = {"num_workers": 0, "flip": 0.0, "distort": 0.0, "crop": 0.0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, train=6, val=3, size=96)
    return folder


@pytest.fixture
def folder(scenes, tmp_path):
    """A copy to damage."""
    return shutil.copytree(scenes, tmp_path / "set")


def yolo(folder, **keywords):
    module = YoloDataModule(str(folder / "data.yaml"), **{**STILL, **keywords})
    module.setup("fit")
    return module


def coco(folder, **keywords):
    module = CocoDataModule(
        str(folder),
        "images/train",
        "annotations/train.json",
        "images/val",
        "annotations/val.json",
        **{**STILL, **keywords},
    )
    module.setup("fit")
    return module


def same(a, b):
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in ("boxes", "labels"))


# --- drawn scenes


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(16, 160), st.integers(1, 12))
def test_boxes_enclose_what_is_seen(seed, size, max_objects):
    module = ShapesDataModule(size=size, min_extent=4, max_objects=max_objects, seed=seed, **STILL)
    module.setup("fit")
    image, target = module.datasets["train"][0]
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
    assert (target["masks"].sum(0) <= 1).all(), "a pixel belongs to one object"
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        rows, columns = torch.where(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_scenes_hold_small_and_large_objects_of_every_class():
    module = ShapesDataModule(**STILL)
    module.setup("fit")
    targets = [module.datasets["train"][i][1] for i in range(200)]
    boxes = torch.cat([target["boxes"] for target in targets])
    extents = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    assert extents.min() <= 8
    assert 56 <= extents.max() <= 68
    assert set(torch.cat([target["labels"] for target in targets]).tolist()) == set(range(module.num_classes))


def test_in_related_scenes_the_large_shape_tells_what_the_discs_are():
    module = ShapesDataModule(size=96, scenes="related", max_objects=6, annotation="masks", **STILL)
    module.setup("fit")
    found = set()
    for index in range(60):
        _, target = module.datasets["train"][index]
        widths = (target["boxes"][:, 2:] - target["boxes"][:, :2]).amax(1)
        assert widths[0] >= 96 // 3 - 3
        assert (widths[1:] <= 96 // 6 + 1).all()
        assert (target["labels"] == target["labels"][0]).all()
        found.add((int(target["labels"][0]), len(widths) > 1))
        for mask, width in zip(target["masks"][1:], widths[1:], strict=True):
            assert mask.sum() > 0.6 * width**2, "a disc, whatever its class"
    assert {label for label, more in found if more} == set(range(5))


def test_scenes_follow_their_seed_and_splits_share_none():
    def first(split, seed):
        module = ShapesDataModule(seed=seed, **STILL)
        module.setup("fit")
        return module.datasets[split][0]

    assert same(first("train", 1), first("train", 1))
    assert not same(first("train", 1), first("train", 2))
    assert not same(first("train", 1), first("val", 1))
    assert not same(first("val", 1), first("train", 2))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"train_size": 0}, "train_size is 0"),
        ({"min_extent": 65}, "min_extent is 65, but 1 to half the size, 64"),
        ({"size": 0}, "min_extent is 6"),
        ({"scenes": "far"}, "scenes are 'far'; choose one of plain, related"),
    ],
)
def test_wrong_scenes_are_told(keywords, message):
    with pytest.raises(ValueError, match=message):
        ShapesDataModule(**keywords)


# --- on disk


def test_both_formats_hold_the_same(scenes):
    a, b = yolo(scenes), coco(scenes)
    assert a.class_names == b.class_names
    for split, count in (("train", 6), ("val", 3)):
        assert len(a.datasets[split]) == len(b.datasets[split]) == count
        assert all(same(a.datasets[split][i], b.datasets[split][i]) for i in range(count))


def test_written_boxes_are_the_drawn_ones(scenes):
    drawn = ShapesDataModule(size=96, **STILL)
    drawn.setup("fit")
    assert all(same(yolo(scenes).datasets["train"][i], drawn.datasets["train"][i]) for i in range(6))


def test_digits_on_photographs(tmp_path):
    write_scenes(tmp_path / "digits", kind="digits", train=4, val=4, size=128)
    module = yolo(tmp_path / "digits")
    assert module.class_names == [str(digit) for digit in range(10)]
    boxes = torch.cat([module.datasets["train"][i][1]["boxes"] for i in range(4)])
    assert len(boxes)
    assert ((boxes[:, 2:] - boxes[:, :2]).amax(1) <= 98).all()


def test_scenes_are_never_written_over(scenes):
    with pytest.raises(ValueError, match="there already and not empty"):
        write_scenes(scenes)


def test_batches(scenes):
    images, targets = next(iter(yolo(scenes, batch_size=2).val_dataloader()))
    assert [image.shape for image in images] == [(3, 96, 96)] * 2
    assert [target["image_id"] for target in targets] == [0, 1]


def test_augmentation_moves_boxes_with_the_image():
    plain = ShapesDataModule(**STILL)
    mirrored = ShapesDataModule(**{**STILL, "flip": 1.0})
    for module in (plain, mirrored):
        module.setup("fit")
    (image, target), (other, moved) = plain.datasets["train"][3], mirrored.datasets["train"][3]
    assert torch.equal(other, image.flip(2))
    expected = target["boxes"].clone()
    expected[:, [0, 2]] = 128 - target["boxes"][:, [2, 0]]
    assert torch.equal(moved["boxes"], expected)
    assert torch.equal(moved["masks"], target["masks"].flip(2))
    assert same(plain.datasets["val"][3], mirrored.datasets["val"][3]), "evaluation is never augmented"


def test_all_augmentations_keep_entries_together():
    module = ShapesDataModule(num_workers=0, flip=0.5, distort=1.0, crop=1.0)
    module.setup("fit")
    torch.manual_seed(0)
    for i in range(30):
        image, target = module.datasets["train"][i]
        n = len(target["boxes"])
        assert n == len(target["labels"]) == len(target["iscrowd"]) == len(target["masks"])
        height, width = image.shape[-2:]
        assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()


# --- YOLO's format


@pytest.mark.parametrize("form", ["list of folders", "txt", "path", "names as list"])
def test_data_yaml_in_all_its_forms(folder, form):
    expected = yolo(folder)
    file = folder / "data.yaml"
    content = yaml.safe_load(file.read_text())
    if form == "list of folders":
        content["train"] = ["images/train"]
    elif form == "txt":
        lines = sorted((folder / "images/train").iterdir())
        (folder / "train.txt").write_text("".join(f"./images/train/{path.name}\n" for path in lines))
        content["train"] = "train.txt"
    elif form == "path":
        content["path"] = str(folder)
        file = folder.parent / "elsewhere.yaml"
    else:
        content["names"] = list(content["names"].values())
        content["nc"] = len(content["names"])
    file.write_text(yaml.safe_dump(content))
    module = YoloDataModule(str(file), **STILL)
    module.setup("fit")
    assert module.class_names == expected.class_names
    assert all(same(module.datasets["train"][i], expected.datasets["train"][i]) for i in range(6))


def test_polygons_are_boxed(folder):
    (folder / "labels/train/000000.txt").write_text("1 0.25 0.5 0.75 0.25 0.5 0.75\n")
    target = yolo(folder).datasets["train"][0][1]
    assert target["boxes"].tolist() == [[24, 24, 72, 72]]
    assert target["labels"].tolist() == [1]


def test_images_without_labels_are_background_and_counted(folder, caplog):
    (folder / "labels/train/000000.txt").unlink()
    (folder / "labels/train/000001.txt").write_text("\n")
    with caplog.at_level(logging.WARNING):
        module = yolo(folder)
    assert len(module.datasets["train"][0][1]["boxes"]) == len(module.datasets["train"][1][1]["boxes"]) == 0
    assert "train: 2 of 6 images have no object" in caplog.text


@pytest.mark.parametrize("reader", [yolo, coco])
def test_a_set_without_any_object_is_told(folder, reader):
    shutil.rmtree(folder / "labels")
    edit(folder, lambda c: c["annotations"].clear())
    with pytest.raises(ValueError, match="none of the 6 images has an object"):
        reader(folder)


def test_an_image_named_twice_is_told(folder):
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), "train": ["images/train", "images/train"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"000000\.txt belongs to several images"):
        yolo(folder)


def test_images_are_read_upright_and_in_full_depth(folder):
    path = folder / "images/train/000000.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(path, exif=exif)
    assert yolo(folder).datasets["train"][0][0].shape == (3, 64, 32)
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    Image.fromarray(ramp).save(path)
    image = yolo(folder).datasets["train"][0][0]
    assert image.mean().item() == pytest.approx(0.5, abs=0.01)


def test_label_paths():
    from pathlib import Path

    assert label_path(Path("/a/images/b/images/c/x.jpg")) == Path("/a/images/b/labels/c/x.txt")
    assert label_path(Path("/a/pictures/x.y.png")) == Path("/a/pictures/x.y.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", r"000002.txt, line 2: 4 numbers; class cx cy w h \(5\)"),
        ("9 0.5 0.5 0.2 0.2", "line 2: class 9, but names has the classes 0 to 4"),
        ("-1 0.5 0.5 0.2 0.2", "line 2: class -1, but"),
        ("1.5 0.5 0.5 0.2 0.2", "line 2: class 1.5, but"),
        ("0 0.9 0.5 0.4 0.2", r"line 2: the box 0.7 0.4 1.1 0.6 .* not within the image"),
        ("0 0.5 0.5 0 0.2", "line 2: the box .* has no area"),
        ("0 0.5 0.5 -0.1 0.2", "line 2: the box .* has no area"),
        ("0 0.5 0.5 nan 0.2", "line 2: .*not finite"),
        ("0 0.5 x 0.1 0.2", "line 2: .*not all numbers"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "line 2: 8 numbers"),
    ],
)
def test_wrong_labels_name_file_and_line(folder, line, message):
    (folder / "labels/train/000002.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(ValueError, match=message):
        yolo(folder)


def test_all_that_is_wrong_is_told_in_one_go(folder):
    (folder / "labels/train/000001.txt").write_text("0 0.5 0.5 0.2\n9 0.5 0.5 0.2 0.2\n")
    (folder / "labels/train/000002.txt").write_text("0 0.5 0.5 0.5 0.5\n0 0.9 0.5 0.4 0.2\n")
    with pytest.raises(ValueError, match="3 faults") as told:
        yolo(folder)
    lines = str(told.value).splitlines()
    for line, part in zip(lines, ("000001.txt, line 1", "000001.txt, line 2", "000002.txt, line 2"), strict=False):
        assert part in line
    assert lines[3].endswith("data.yaml: 3 faults")
    (folder / "labels/train/000003.txt").write_text("x\n" * 400)
    with pytest.raises(ValueError, match="403 faults, the first 10 of them above") as told:
        yolo(folder)
    assert len(str(told.value).splitlines()) == 11


def test_all_that_is_wrong_in_coco_is_told_in_one_go(folder):
    for name in ("000002.png", "000004.png"):
        (folder / "images/train" / name).unlink()
    edit(folder, lambda content: content["annotations"][1].update(category_id=77))
    edit(folder, lambda content: content["annotations"][2].update(bbox=[1, 2]))
    with pytest.raises(ValueError, match=r"there is no .*000002\.png\n.*there is no .*000004\.png\n") as told:
        coco(folder)
    assert "annotation 2 names category 77" in str(told.value)
    assert "annotation 3: bbox is [1, 2]" in str(told.value)
    assert str(told.value).endswith("train.json: 4 faults")


def test_bad_boxes_can_be_dropped_but_are_counted(folder, caplog):
    (folder / "labels/train/000002.txt").write_text("0 0.5 0.5 0.5 0.5\n0 0.9 0.5 0.4 0.2\n0 0.5 0.5 0 0.2\n")
    module = yolo(folder, bad_boxes="drop")
    assert len(module.datasets["train"][2][1]["boxes"]) == 1
    assert "left out 2 boxes" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": None}, "names missing"),
        ({"names": {0: "a", 2: "b"}}, r"names has the keys \[0, 2\], but numbers 0 to 1"),
        ({"names": "cat"}, "names is a str;"),
        ({"nc": 80}, "nc is 80, but names has 5 entries"),
        ({"val": "images/none"}, "val names .*none, which is neither a folder nor a .txt"),
        ({"val": "annotations"}, "val holds no images"),
        ({"train": "list.txt"}, "list.txt, line 2: there is no image .*gone.png"),
    ],
)
def test_wrong_data_yaml_is_told(folder, change, message):
    (folder / "list.txt").write_text("images/train/000000.png\nimages/train/gone.png\n")
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), **change}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        yolo(folder)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_unreadable_data_yaml_is_told(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data\.yaml"):
        YoloDataModule(str(tmp_path / "data.yaml"))
    with pytest.raises(ValueError, match="no such file"):
        YoloDataModule(str(tmp_path / "none.yaml"))


def test_splits_may_share_a_folder(folder):
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        (folder / f"{split}.txt").write_text("".join(f"images/train/{number:06d}.png\n" for number in numbers))
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), "train": "train.txt", "val": "val.txt"}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    module = yolo(folder)
    assert (len(module.datasets["train"]), len(module.datasets["val"])) == (4, 2)


def test_path_may_be_from_where_one_works(folder, monkeypatch):
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), "path": "set"}
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/data.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder.parent)
    assert len(yolo(folder / "elsewhere").datasets["train"]) == 6


@pytest.mark.parametrize("reader", [yolo, coco])
def test_a_missing_image_is_told(folder, reader):
    (folder / "images/train/000003.png").unlink()
    with pytest.raises(ValueError, match=r"000003\.(txt: no image in|png)"):
        reader(folder)


@pytest.mark.parametrize(
    ("reader", "content", "workers"),
    [(reader, content, 0) for reader in (yolo, coco) for content in (b"", b"not an image", "half")]
    + [(yolo, "half", 1)],
)
def test_an_unreadable_image_is_told(folder, reader, content, workers):
    path = folder / "images/train/000003.png"
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    module = reader(folder, num_workers=workers)
    with pytest.raises(ValueError, match=r"000003\.png: not a readable image"):
        list(module.train_dataloader())


def test_grey_and_transparent_images_become_rgb(folder):
    for number, mode in enumerate(("L", "RGBA", "P", "1")):
        Image.new(mode, (40, 30)).save(folder / f"images/train/{number:06d}.png")
        assert yolo(folder).datasets["train"][number][0].shape == (3, 30, 40)


# --- COCO's format


def edit(folder, change):
    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 2 names image 77"),
        (lambda c: c["annotations"][1].update(category_id=77), "annotation 2 names category 77"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 2: bbox is \[1, 2, 3\]"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, "4"]), "annotation 2: bbox"),
        (lambda c: c["annotations"][1].update(bbox=[90, 2, 30, 4]), "annotation 2: the box .* not within"),
        (lambda c: c["annotations"][1].update(bbox=[9, 2, 0, 4]), "annotation 2: the box .* has no area"),
        (lambda c: c["annotations"][1].update(id=1), "annotations holds the id 1 twice"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] needs id, image_id, category_id, bbox"),
        (lambda c: c["images"][1].update(file_name="gone.png"), "image 2 is missing: there is no .*gone.png"),
        (lambda c: c["images"][1].update(file_name="000000.png"), "several images have the file_name 000000.png"),
        (lambda c: c["images"][1].update(file_name="/etc/passwd"), "not within"),
        (lambda c: c["images"][1].update(width="96"), "image 2 needs file_name as text"),
        (lambda c: c["annotations"][1].update(image_id="1"), "annotation 2 names image '1'"),
        (lambda c: c["annotations"][1].update(iscrowd="0"), "annotation 2: iscrowd is '0'"),
        (lambda c: c["categories"].pop(), "other categories than"),
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: (c["images"].clear(), c["annotations"].clear()), "no images"),
    ],
)
def test_wrong_annotations_are_told(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        coco(folder)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 100_000])
def test_unreadable_annotations_are_told(folder, text):
    (folder / "annotations/train.json").write_text(text)
    with pytest.raises(ValueError, match=r"train\.json"):
        coco(folder)
    (folder / "annotations/train.json").unlink()
    with pytest.raises(ValueError, match="no such annotation file"):
        coco(folder)


def test_an_image_of_another_size_is_told(folder):
    edit(folder, lambda c: c["images"][0].update(width=640))
    with pytest.raises(ValueError, match=r"000000\.png: is 96 x 96, but its annotations say \(640, 96\)"):
        coco(folder).datasets["train"][0]


def test_category_ids_with_holes_are_mapped(folder):
    for split in ("train", "val"):
        file = folder / f"annotations/{split}.json"
        content = json.loads(file.read_text())
        for entry in content["categories"]:
            entry["id"] = 90 - 7 * entry["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 90 - 7 * entry["category_id"]
        content["categories"].reverse()
        file.write_text(json.dumps(content))
    before, after = yolo(folder), coco(folder)
    assert after.class_names == before.class_names[::-1]
    for i in range(6):
        labels = before.datasets["train"][i][1]["labels"]
        assert torch.equal(after.datasets["train"][i][1]["labels"], len(before.class_names) - 1 - labels)


def test_crowds_are_ignored_in_evaluation_and_absent_in_training(folder):
    shutil.copy(folder / "annotations/val.json", folder / "annotations/train.json")
    edit(folder, lambda c: c["annotations"][0].update(iscrowd=1))
    shutil.copy(folder / "annotations/train.json", folder / "annotations/val.json")
    module = CocoDataModule(
        str(folder), "images/val", "annotations/val.json", "images/val", "annotations/val.json", **STILL
    )
    module.setup("fit")
    train, val = module.datasets["train"][0][1], module.datasets["val"][0][1]
    assert val["iscrowd"].tolist() == [1] + [0] * (len(val["labels"]) - 1)
    assert len(train["labels"]) == len(val["labels"]) - 1


def test_masks_fit_numpy_order():
    module = ShapesDataModule(**STILL)
    module.setup("fit")
    image, target = module.datasets["val"][0]
    assert np.asarray(target["masks"]).shape == (len(target["labels"]), *image.shape[1:])


def test_drawn_scenes_for_boxes_have_no_masks():
    masks, boxes = (ShapesDataModule(train_size=2, val_size=2, annotation=kind) for kind in ("masks", "boxes"))
    for data in (masks, boxes):
        data.setup("validate")
    image, target = boxes.datasets["val"][0]
    assert "masks" not in target, "pictures would show them in the truth alone"
    assert same((image, target), masks.datasets["val"][0])


# --- masks


def same_masks(a, b):
    return same(a, b) and torch.equal(a[1]["masks"], b[1]["masks"])


@pytest.mark.parametrize("form", ["text", "counts", "pixels"])
def test_masks_in_each_of_cocos_forms_are_the_drawn_ones(folder, form):
    def rewrite(content):
        for entry in content["annotations"]:
            mask = draw_mask(entry["segmentation"], 96, 96)
            if form == "counts":  # by columns, zeros first
                flat = mask.T.flatten()
                edges = np.flatnonzero(np.diff(flat, prepend=0))
                entry["segmentation"]["counts"] = np.diff(edges, prepend=0, append=flat.size).tolist()
            elif form == "pixels":  # a polygon around each pixel
                entry["segmentation"] = [
                    [x, y, x + 1, y, x + 1, y + 1, x, y + 1]
                    for y, x in zip(*map(np.ndarray.tolist, mask.nonzero()), strict=True)
                ]

    edit(folder, rewrite)
    drawn = ShapesDataModule(size=96, **STILL)
    drawn.setup("fit")
    read = coco(folder, annotation="masks")
    assert all(same_masks(read.datasets["train"][i], drawn.datasets["train"][i]) for i in range(6))


def test_polygons_are_drawn_where_they_lie(folder):
    def rewrite(content):
        content["annotations"][0].update(bbox=[10, 20, 30, 40], segmentation=[[10, 20, 40, 20, 40, 60, 10, 60]])

    edit(folder, rewrite)
    mask = coco(folder, annotation="masks").datasets["train"][0][1]["masks"][0]
    expected = torch.zeros(96, 96, dtype=torch.bool)
    expected[20:60, 10:40] = True
    assert torch.equal(mask, expected)


def test_yolo_polygons_are_masks(folder):
    for path in (folder / "labels/train").iterdir():
        path.write_text("1 0.25 0.5 0.75 0.5 0.75 0.75 0.25 0.75\n")
    for path in (folder / "labels/val").iterdir():
        path.unlink()
    (folder / "labels/val/000000.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2\n")
    target = yolo(folder, annotation="masks").datasets["train"][0][1]
    expected = torch.zeros(1, 96, 96, dtype=torch.bool)
    expected[:, 48:72, 24:72] = True
    assert torch.equal(target["masks"], expected)
    assert target["boxes"].tolist() == [[24, 48, 72, 72]]
    (folder / "labels/train/000000.txt").write_text("1 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ValueError, match=r"000000.txt, line 1: a box, but masks are wanted"):
        yolo(folder, annotation="masks")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "is empty"),
        (None, "is neither a list of polygons nor run lengths"),
        ([1, 2, 3, 4, 5, 6], "is one list of numbers; a list of polygons is needed"),
        ({"size": [96, 96], "counts": [9216]}, "covers no pixel"),
        ([[10, 10, 20, 20, 30, 30]], "has no area"),
        ([[1, 2, 3, 4]], "has a polygon of 4 numbers; an even number, 6 or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "has a polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "has a polygon of 6 numbers; .*finite"),
        ([[1, 2, 3, 4, 5, "6"]], "has a polygon of 6 numbers"),
        ([[1, 2, 300, 4, 5, 6]], "has a polygon that is not within the image of 96 x 96"),
        ({"size": [96, 64], "counts": [6144]}, r"has the size \[96, 64\], but its image \[height, width\] \[96, 96\]"),
        ({"size": [96, 96], "counts": [1, 2, 3]}, "has run lengths of 6 pixels together, but its image has 9216"),
        ({"size": [96, 96], "counts": [9217, -1]}, "has run lengths that are not all whole numbers"),
        ({"size": [96, 96], "counts": "abc"}, "has damaged run lengths"),
        ({"size": [96, 96], "counts": ""}, "has damaged run lengths"),
        ({"size": [96, 96], "counts": "\u00ff\u00fe"}, "has damaged run lengths"),
        ({"size": [96, 96], "counts": 5}, "has counts that are neither"),
    ],
)
def test_damaged_masks_name_file_and_annotation(folder, caplog, segmentation, message):
    edit(folder, lambda content: content["annotations"][1].update(segmentation=segmentation))
    with pytest.raises(ValueError, match=f"train.json: annotation 2: segmentation {message}"):
        coco(folder, annotation="masks")
    assert "masks" not in coco(folder).datasets["train"][0][1], "boxes alone are as they were"
    module = coco(folder, annotation="masks", bad_boxes="drop")
    assert "left out 1 boxes" in caplog.text
    content = json.loads((folder / "annotations/train.json").read_text())
    kept = sum(len(module.datasets["train"][i][1]["labels"]) for i in range(6))
    assert kept == len(content["annotations"]) - 1


def test_annotations_without_masks_are_told(folder):
    edit(folder, lambda content: content["annotations"][1].pop("segmentation"))
    with pytest.raises(ValueError, match="annotation 2 has no segmentation, but masks are wanted"):
        coco(folder, annotation="masks")


def test_masks_are_augmented_with_their_boxes(folder):
    module = coco(folder, annotation="masks", flip=0.5, crop=1.0)
    torch.manual_seed(0)
    for i in range(24):
        image, target = module.datasets["train"][i % 6]
        assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            x1, y1, x2, y2 = box.round().int().tolist()
            assert mask[y1:y2, x1:x2].sum() == mask.sum(), "the box encloses the mask"


def test_what_data_do_not_have_is_told(folder):
    with pytest.raises(ValueError, match="annotation is 'map', but YoloDataModule has boxes or masks"):
        yolo(folder, annotation="map")


def test_one_object_a_scene_for_its_class():
    module = ShapesDataModule(annotation="class", num_workers=0, batch_size=4)
    module.setup("fit")
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (4, 3, 128, 128)
    assert images.dtype == torch.uint8
    assert labels.shape == (4,)
    assert {module.datasets["train"][i][1] for i in range(40)} == set(range(5))
