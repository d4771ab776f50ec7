"""What no one would write on purpose: architectures, configs, command lines, label files and annotations, at random.

SHUNTED_LIT_LONG=1 tries thousands of each, as README says.
"""

import copy
import functools
import io
import json
import logging
import os
import random
import shutil
import string
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from shunted_lit import ShuntedBackbone, ShuntedTransformer
from shunted_lit.cli import command
from shunted_lit.data import CocoDataModule, YoloDataModule
from shunted_lit.data.image_io import DamagedError, read_image, read_size
from shunted_lit.data.scenes import write_scenes
from shunted_lit.data.segmentation import read_mask
from shunted_lit.data.validation import LabelCheck
from shunted_lit.data.yolo import SLACK, read_labels

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("SHUNTED_LIT_LONG") == "1"


def tries(few, many):
    """Settings of a test that tries so many, or in a long run so many."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(deadline=None, max_examples=many if LONG else few, suppress_health_check=quiet)


# --- architectures


@st.composite
def infer_neck_keywords(draw):
    """Most of them possible, some not."""
    ratios = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    heads = len(ratios) * draw(st.integers(1, 2))
    keywords = {
        "cin": heads * draw(st.integers(1, 4)),
        "depth": draw(st.integers(1, 3)),
        "num_heads": heads,
        "mlp_ratios": draw(st.sampled_from([1, 2.5, 4])),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "ratios": ratios,
        "aggregation": draw(st.sampled_from(["conv", "avg", "max", "linear"])),
        "local_enhancement": draw(st.sampled_from(["before", "after", "none"])),
        "feed_forward": draw(st.sampled_from(["detail", "conventional"])),
        "layer_scale": draw(st.sampled_from([None, 0.0, 0.5])),
    }
    faults = {"cin": 0, "depth": 0, "num_heads": 5, "mlp_ratios": 0.01, "ratios": (0,), "feed_forward": "none such"}
    fault = draw(st.sampled_from([None] * 24 + [*faults]))
    return keywords if fault is None else {**keywords, fault: faults[fault]}


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def works(model, x, shape):
    """Shape, finite values and gradients, and the same again from the weights; of no image, too."""
    found = model(x)
    assert found.shape == shape
    assert found.dtype == x.dtype
    assert found.isfinite().all()
    found.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))


@tries(60, 3000)
@given(infer_neck_keywords(), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), DTYPES)
def test_a_neck_works_or_says_why_not(keywords, height, width, batch, dtype):
    try:
        model = ShuntedTransformer(**keywords, dtype=dtype)
    except ValueError as error:
        assert str(error)
        return
    works(
        model, torch.randn(batch, keywords["cin"], height, width, dtype=dtype), (batch, keywords["cin"], height, width)
    )


@st.composite
def backbone_keywords(draw):
    stages = draw(st.integers(1, 4))
    heads = [draw(st.sampled_from([1, 2, 4])) for _ in range(stages)]
    lists = {
        "dims": [head * draw(st.sampled_from([2, 4, 6])) for head in heads],
        "num_heads": heads,
        "depths": [draw(st.sampled_from([1, 1, 2])) for _ in range(stages)],
        "mlp_ratios": [draw(st.sampled_from([1, 2, 4])) for _ in range(stages)],
        "ratios": [tuple(draw(st.sampled_from([1, 2, 4, 8])) for _ in range(min(head, 2))) for head in heads],
    }
    shortened = draw(st.sampled_from([None] * 24 + [*lists]))
    if shortened:
        lists[shortened] = lists[shortened][:-1]
    return {
        **lists,
        "num_classes": draw(st.sampled_from([0, 1, 5])),
        "stem": draw(st.sampled_from(["shunted", "patch4", "patch16"])),
    }


@tries(25, 1000)
@given(backbone_keywords(), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2), DTYPES)
def test_a_backbone_works_or_says_why_not(keywords, height, width, batch, dtype):
    try:
        model = ShuntedBackbone(**keywords, dtype=dtype).eval()  # BatchNorm can't train on one pixel
    except ValueError as error:
        assert str(error)
        return
    count = keywords["num_classes"] or keywords["dims"][-1]
    if dtype is torch.bfloat16:  # whose strided convolutions read memory that no one wrote, where a map has one column
        width += 64
    works(model, torch.randn(batch, 3, height, width, dtype=dtype), (batch, count))


@tries(3, 40)
@given(infer_neck_keywords(), st.integers(3, 9), st.integers(3, 9))
def test_an_exported_neck_gives_the_same(keywords, height, width):
    try:
        model = ShuntedTransformer(**keywords).eval()
    except ValueError:
        return
    least = max(keywords["ratios"]) + 1  # a program of torch.export takes no map with a single row
    sizes = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=least), 3: torch.export.Dim("w", min=least)}
    program = torch.export.export(model, (torch.randn(2, keywords["cin"], 24, 20),), dynamic_shapes=(sizes,))
    x = torch.randn(3, keywords["cin"], height * 4, width * 4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


# --- configs and command lines

VALUES = [
    *(None, -1, 0, 1, 7, 3.5, -0.5, "x", "", [], {}, [1, "a"], {"a": 1}, True, "null", "..", "${x}", 1e-300, [[]], "0"),
    *(float("nan"), "shunted_lit.tasks.DetectionTask", "os.system", "DetectionTask", "\u00e9\u4e2d"),
]


def places(content, path=()):
    """All keys of a nested config."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def damaged(text, dice):
    """A config with one to three faults."""
    content = yaml.safe_load(text)
    for _ in range(dice.randint(1, 3)):
        *above, key = dice.choice(list(places(content)) or [("trainer",)])
        inner = content
        for step in above:
            inner = inner[step]
        kind = dice.choice(["replace", "remove", "rename", "nest", "add"])
        if kind == "replace" or not isinstance(inner, dict):
            inner[key] = copy.deepcopy(dice.choice(VALUES))
        elif kind == "remove":
            del inner[key]
        elif kind == "rename":
            inner[f"{key}{dice.choice(string.ascii_lowercase)}"] = inner.pop(key)
        elif kind == "nest":
            inner[key] = {str(key): inner[key]}
        else:
            inner[dice.choice(["x", "class_path", "init_args", "neck", "1", ""])] = copy.deepcopy(dice.choice(VALUES))
    text = yaml.safe_dump(content, allow_unicode=True)
    if dice.random() < 0.25:
        at = dice.randrange(len(text))
        text = (
            text[:at]
            + dice.choice(["\t", ":", "{", "\0", "- ", "&a *a", "!!python/object:os.system", '"', "\x85"])
            + text[at:]
        )
    return text


CONFIGS = ["neck.yaml", "shapes/mask_rcnn.yaml", "shapes/semantic_fpn.yaml", "digits.yaml", "imagenet/shunted_t.yaml",
           "coco/retinanet_shunted_t.yaml", "ade20k/fpn_shunted_t.yaml"]  # fmt: skip


def ends_well(words, monkeypatch, capsys):
    """Runs a command line up to the training, which is left out: a message and exit code 2, or none and no fault."""
    monkeypatch.setattr(Trainer, "fit", functools.wraps(Trainer.fit)(lambda *_, **__: None))
    monkeypatch.setattr("sys.argv", ["shunted-lit", *words])
    monkeypatch.setattr(logging.root, "handlers", [])  # those of other tests may write to what is closed
    try:
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    told = capsys.readouterr()
    assert code in (0, 2), told.err
    assert "Traceback" not in told.err
    assert code == 0 or "error: " in told.err
    return code


@pytest.mark.parametrize("seed", range(2000 if LONG else 24))
def test_a_damaged_config_is_told(seed, tmp_path, monkeypatch, capsys):
    dice = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    text = damaged((ROOT / "configs" / CONFIGS[seed % len(CONFIGS)]).read_text(), dice)
    Path("damaged.yaml").write_text(text, encoding="utf-8")
    ends_well(["fit", "--config=damaged.yaml", "--trainer.logger=false"], monkeypatch, capsys)


WORDS = [
    word.strip()
    for word in """
fit | validate | test | predict | check | cost | export | attention | benchmark | scenes | study | digits |
--help | --config | none.yaml | neck | --model | DetectionTask | --data | ShapesDataModule | --data.size=x |
--model.lr=-1 | --model.neck={depth: 0} | --trainer.max_epochs | 1 | --ckpt_path | last | --ckpt_path=a.ckpt |
--model.weights=a.pt | --data.batch_size=0 | --options | {cin: 3} | --out | . | --point | 1 | -x | <empty> | = |
--trainer.devices=9 | --model.detector | yolo | --model.backbone=resnet | --data.train_size=-4 | shunted_q |
--trainer.precision=8 | --trainer.accelerator | abacus | --seed_everything | --data.annotation=x
""".replace("<empty>", "").split("|")
]


@pytest.mark.parametrize("seed", range(2000 if LONG else 24))
def test_a_random_command_line_is_told(seed, tmp_path, monkeypatch, capsys):
    dice = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    others = ("benchmark", "scenes", "digits", "study", "yolo")  # which may work for minutes, or are Ultralytics' own
    words = ["yolo"]
    while words[0] in others:
        words = dice.choices(WORDS, k=dice.randint(1, 6))
        if dice.random() < 0.7:
            words = ["fit", "--model=DetectionTask", "--data=ShapesDataModule", "--trainer.logger=false", *words]
    ends_well(words, monkeypatch, capsys)


# --- label files

NAMES = ["cat", "dog", "cow"]
NUMBER = st.one_of(
    st.floats(-0.5, 1.5).map(lambda x: f"{x:.6f}"), st.integers(-2, 5).map(str), st.text(max_size=3),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "0x1", "1_0", "\u0663", "", "NaN", "1,5", "--1"]),
)  # fmt: skip
LABELS = st.one_of(
    st.lists(st.lists(NUMBER, max_size=9).map(" ".join), max_size=6).map("\n".join), st.text(max_size=60)
)


@tries(400, 20_000)
@given(LABELS, st.booleans())
def test_labels_are_read_or_told_by_line(tmp_path_factory, text, masks):
    file = tmp_path_factory.getbasetemp() / "labels.txt"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    check = LabelCheck()
    try:
        boxes, labels, segments = read_labels(file, NAMES, check, masks)
    except ValueError as error:
        assert str(error).startswith(f"{file}: not a readable text file")
        return
    assert all(fault.startswith(f"{file}, line ") for fault in check.faults)
    assert len(boxes) == len(labels) == len(segments)
    assert len(boxes) + len(check.faults) == sum(bool(line.strip()) for line in file.read_text("utf-8").splitlines())
    for x1, y1, x2, y2 in boxes:
        assert -SLACK <= x1 < x2 <= 1 + SLACK
        assert -SLACK <= y1 < y2 <= 1 + SLACK
    assert all(label in range(3) for label in labels)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, train=3, val=2, size=32)
    return folder


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 70), st.floats(), st.text(max_size=4), st.just(10**30)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


def change(content, dice, value):
    """Replaces, removes or doubles something at a random place."""
    *above, key = dice.choice(list(places(content)))
    for step in above:
        content = content[step]
    kind = dice.choice(["replace", "remove", "double"])
    if kind == "replace":
        content[key] = value
    elif kind == "remove":
        del content[key]
    elif isinstance(content, list):
        content.append(content[key])


@tries(150, 10_000)
@given(st.randoms(use_true_random=False), st.lists(JSON, min_size=1, max_size=3), st.booleans())
def test_annotations_are_read_or_told_by_file(scenes, dice, values, masks):
    file = scenes / "annotations/damaged.json"
    content = json.loads((scenes / "annotations/train.json").read_text())
    for value in values:
        change(content, dice, value)
    file.write_text(json.dumps(content))
    data = CocoDataModule(
        str(scenes), "images/train", "annotations/damaged.json", "images/val", "annotations/val.json",
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


@tries(100, 5000)
@given(st.randoms(use_true_random=False), st.lists(JSON, min_size=1, max_size=2))
def test_data_yaml_is_read_or_told_by_file(scenes, dice, values):
    file = scenes / "damaged.yaml"
    content = yaml.safe_load((scenes / "data.yaml").read_text())
    for value in values:
        change(content, dice, value)
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        YoloDataModule(str(file), num_workers=0).setup("fit")
    except ValueError as error:
        assert any(word in str(error) for word in (str(file), "damaged.yaml", "labels/", "images/")), str(error)


@tries(150, 10_000)
@given(st.randoms(use_true_random=False), st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]), st.integers(1, 6))
def test_damaged_images_are_read_or_told_by_file(tmp_path_factory, dice, kind, count):
    from PIL import Image

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


def test_the_scenes_are_whole(scenes):
    """What the tests above damage is no fault itself."""
    shutil.copy(scenes / "annotations/train.json", scenes / "annotations/damaged.json")
    data = CocoDataModule(str(scenes), "images/train", "annotations/damaged.json", "images/val", "annotations/val.json")
    assert len(data.build_dataset("train", data.eval_transform)) == 3
