"""Random label files, annotations, data.yaml files and images: they are read, or reported with the file and line."""

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.fuzzing import examples, key_paths
from helpers.readers import coco_files
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shunted_lit.data import CocoDataModule, YoloDataModule
from shunted_lit.data.detection import Record
from shunted_lit.data.image_io import DamagedError, read_image, read_size
from shunted_lit.data.scenes import write_scenes
from shunted_lit.data.segmentation import read_mask
from shunted_lit.data.validation import LabelCheck
from shunted_lit.data.yolo import SLACK, read_labels

DAMAGED_FILES = {**coco_files(), "train_annotations": "annotations/damaged.json"}
NAMES = ["cat", "dog", "cow"]
NUMBER = st.one_of(
    st.floats(-0.5, 1.5).map(lambda x: f"{x:.6f}"), st.integers(-2, 5).map(str), st.text(max_size=3),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "0x1", "1_0", "\u0663", "", "NaN", "1,5", "--1"]),
)  # fmt: skip
LABELS = st.one_of(
    st.lists(st.lists(NUMBER, max_size=9).map(" ".join), max_size=6).map("\n".join), st.text(max_size=60)
)


@examples(200, 20_000)
@given(LABELS, st.booleans())
def test_random_labels_are_read_or_reported_by_line(tmp_path_factory, text, masks):
    file = tmp_path_factory.getbasetemp() / "labels.txt"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    check = LabelCheck()
    record = Record(Path("a.png"), 0, segments=[] if masks else None)
    read_labels(file, record, NAMES, check)
    try:
        file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        assert len(check.faults) == 1
        assert check.faults[0].startswith(f"{file}: not a readable text file")
        return
    assert all(fault.startswith(f"{file}:") for fault in check.faults)
    boxes, labels = record.boxes, record.labels
    assert len(boxes) == len(labels)
    assert len(boxes) == len(record.segments if masks else boxes)
    assert len(boxes) + len(check.faults) == sum(bool(line.strip()) for line in file.read_text("utf-8").splitlines())
    for x1, y1, x2, y2 in boxes:
        assert -SLACK <= x1 < x2 <= 1 + SLACK
        assert -SLACK <= y1 < y2 <= 1 + SLACK
    assert all(label in range(3) for label in labels)


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_scenes") / "set"
    write_scenes(folder, train=3, val=2, size=32)
    return folder


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 70), st.floats(), st.text(max_size=4), st.just(10**30)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


def damage(content, dice, value):
    """Replace, remove or duplicate a random entry."""
    *above, key = dice.choice(list(key_paths(content)))
    for step in above:
        content = content[step]
    kind = dice.choice(["replace", "remove", "duplicate"])
    if kind == "replace":
        content[key] = value
    elif kind == "remove":
        del content[key]
    elif isinstance(content, list):
        content.append(content[key])


@examples(60, 10_000)
@given(st.randoms(use_true_random=False), st.lists(JSON, min_size=1, max_size=3), st.booleans())
def test_random_annotations_are_read_or_reported_by_file(small_scenes, dice, values, masks):
    file = small_scenes / "annotations/damaged.json"
    content = json.loads((small_scenes / "annotations/train.json").read_text())
    for value in values:
        damage(content, dice, value)
    file.write_text(json.dumps(content))
    data = CocoDataModule(
        str(small_scenes), **DAMAGED_FILES,
        annotation="masks" if masks else "boxes",
    )  # fmt: skip
    try:
        dataset = data.build_dataset("train", data.eval_transform)
    except ValueError as error:
        assert str(file) in str(error)
        return
    for i in range(len(dataset)):
        try:
            image, target = dataset[i]
        except DamagedError as error:
            assert "train/0000" in str(error)
            continue
        assert target["boxes"].isfinite().all()
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert all(label in range(len(data.class_names)) for label in target["labels"].tolist())
        assert not masks or target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])


@examples(40, 5000)
@given(st.randoms(use_true_random=False), st.lists(JSON, min_size=1, max_size=2))
def test_random_data_yaml_is_read_or_reported_by_file(small_scenes, dice, values):
    file = small_scenes / "damaged.yaml"
    content = yaml.safe_load((small_scenes / "data.yaml").read_text())
    for value in values:
        damage(content, dice, value)
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        YoloDataModule(str(file), num_workers=0).setup("fit")
    except ValueError as error:
        assert any(word in str(error) for word in (str(file), "damaged.yaml", "labels/", "images/")), str(error)


@examples(60, 10_000)
@given(st.randoms(use_true_random=False), st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]), st.integers(1, 6))
def test_damaged_images_are_read_or_reported_by_file(tmp_path_factory, dice, kind, count):
    content = io.BytesIO()
    Image.radial_gradient("L").resize((9, 7)).save(content, kind)
    raw = bytearray(content.getvalue())
    for _ in range(count):
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    if dice.random() < 0.3:
        raw = raw[: dice.randrange(len(raw))]
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(raw)
    for read in (read_image, read_size, read_mask):
        try:
            read(path)
        except DamagedError as error:
            assert str(error).startswith(str(path))


def test_undamaged_scenes_have_no_faults(small_scenes):
    shutil.copy(small_scenes / "annotations/train.json", small_scenes / "annotations/damaged.json")
    data = CocoDataModule(str(small_scenes), **DAMAGED_FILES)
    assert len(data.build_dataset("train", data.eval_transform)) == 3
