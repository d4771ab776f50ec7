"""The neck in Ultralytics' YOLO: model YAMLs, weights, and every way in which a new interpreter meets the neck."""

from pathlib import Path

import pytest
import torch
import ultralytics
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

import shunted_lit.ultralytics as adapter
from shunted_lit.cli import main

ROOT = Path(__file__).parent.parent
FAMILIES = [
    family for family in ("yolo26", "yolo11") if list(Path(ultralytics.__file__).parent.rglob(f"{family}.yaml"))
]
NANO = f"{FAMILIES[0]}n"
SMALL = {"depth": 1, "mlp_ratios": 1}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stir(model, seed=0):
    """Weights and statistics with which no two maps are alike, as after training."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def layers_of(path):
    """The layers of a model YAML, as Ultralytics builds them, without memory."""
    with torch.device("meta"):
        return tasks.parse_model(tasks.yaml_model_load(path), ch=3, verbose=False)[0]


def predict(model, x):
    with torch.no_grad():
        return model.eval()(x)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of the smallest model, as one has it before the neck."""
    path = tmp_path_factory.mktemp("base") / f"{NANO}.pt"
    yolo = YOLO(f"{NANO}.yaml")
    stir(yolo.model)
    yolo.save(path)
    return path


# --- model YAMLs


def test_the_newest_and_a_year_old_ultralytics_are_stated():
    assert f'"ultralytics>={adapter.OLDEST}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_neck_has_the_channels_of_the_layer_before_at_every_width(family, scale):
    path = Path(f"{family}{scale}-shunted.yaml")
    adapter.write_yaml(f"{family}{scale}", path, [6, 10])
    base = layers_of(f"{family}{scale}.yaml")
    necks = {i: layer.cin for i, layer in enumerate(layers_of(path)) if isinstance(layer, adapter.ShuntedTransformer)}
    assert necks == {7: base[6].cv2.conv.out_channels, 12: base[10].cv2.conv.out_channels}


@pytest.mark.parametrize("after", [None, [4, 6, 10], [5, 9, 16, 22]])
def test_the_outputs_are_those_of_the_base_wherever_the_necks_stand(after, base):
    """With a layer scale of 0 a neck returns what it takes, so any index that is off by one would show."""
    path = Path(f"{NANO}-shunted.yaml")
    adapter.write_yaml(NANO, path, after, SMALL)
    model, start = YOLO(path).model, YOLO(base).model
    assert adapter.transfer_weights(model, start) == (len(start.state_dict()),) * 2
    x = torch.rand(1, 3, 96, 64)
    torch.testing.assert_close(predict(model, x), predict(start, x), rtol=1e-5, atol=1e-4)
    necks = [layer for layer in model.model if isinstance(layer, adapter.ShuntedTransformer)]
    assert len(necks) == (1 if after is None else len(after))
    for neck in necks:
        before = predict(model, x)
        nn.init.ones_(neck.layer_scale.gamma)
        assert not torch.equal(predict(model, x), before), "a neck that nothing reads"


def test_sources_counted_backwards():
    path = Path("tiny.yaml")
    adapter.write_yaml("yolov3-tiny", path, [13, 15], SMALL)
    old = yaml.safe_load(next(Path(ultralytics.__file__).parent.rglob("yolov3-tiny.yaml")).read_text())
    assert any(layer[0] == -2 for layer in old["head"]), "what this test is about"
    model, start = YOLO(path).model, YOLO("yolov3-tiny.yaml").model
    adapter.transfer_weights(model, stir(start))
    x = torch.rand(1, 3, 96, 64)
    torch.testing.assert_close(predict(model, x), predict(start, x), rtol=1e-5, atol=1e-4)


def test_a_name_without_a_scale_keeps_that_of_the_base():
    adapter.write_yaml(f"{FAMILIES[0]}s", Path("mine.yaml"), neck=SMALL)
    assert layers_of("mine.yaml")[11].cin == 512
    adapter.write_yaml("mine.yaml", Path("twice.yaml"), 4, SMALL)
    assert [layer.cin for layer in layers_of("twice.yaml") if adapter.is_neck(layer)] == [256, 512]


def test_yaml_command():
    main(["yolo", "yaml", "--base", f"{FAMILIES[0]}s", "--after", "10", "--out", f"{FAMILIES[0]}s-shunted.yaml"])
    main(["yolo", "yaml", "--base", "yolo11m", "--after", "[6, 10]", "--out", "two.yaml", "--neck.depth", "2",
          "--neck.num_heads", "4", "--neck.ratios", "[4, 2, 1, 1]", "--neck.layer_scale", "null"])  # fmt: skip
    layers = yaml.safe_load(Path("two.yaml").read_text())["backbone"]
    keywords = {"layer_scale": None, "depth": 2, "num_heads": 4, "ratios": [4, 2, 1, 1]}
    assert [layers[i] for i in (7, 12)] == [[-1, 1, "ShuntedTransformer", ["c2", keywords]]] * 2
    assert layers_of(f"{FAMILIES[0]}s-shunted.yaml")[11].cin == 512


def test_yaml_arguments_as_the_source_has_them():
    """Positional, in the source's order: cin, depth, img_size, num_heads."""
    content = adapter.insert_neck(NANO)
    content["backbone"][-1][-1] = ["c2", 1, 40, 4, {"ratios": [2, 1, 1, 1]}]
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    neck = layers_of("mine.yaml")[11]
    assert (len(neck.block), [group.ratio for group in neck.block[0].attn.groups]) == (1, [2, 1, 1, 1])


@pytest.mark.parametrize(
    ("base", "after", "neck", "message"),
    [
        ("yolo27s", None, {}, "'yolo27s' is no file, and no model of Ultralytics .*; close names: "),
        ("yolo11s", 24, {}, "has no layer 24 that a neck could follow: the layers 0 to 22 may"),
        ("yolo11s", 23, {}, "has no layer 23 that"),
        ("yolo11s", [4, -1], {}, "has no layer -1 that"),
        ("yolo11s", [], {}, "names no layer"),
        ("list.yaml", 1, {}, "layer 1 of list.yaml, .*CBLinear, returns tuple, but the neck takes one map"),
        ("yolo11s", 10, {"num_heads": 3}, "layer 10 of yolo11s has 512 channels: 512 channels do not split into 3"),
        ("yolo11n", [4, 10], {"num_heads": 256}, "layer 4 of yolo11n has 128 channels: .*into 256 heads"),
        ("yolo11s", 10, {"dept": 3}, "the neck has no keyword dept; it has .*depth"),
        ("yolo11s", 10, {"cin": 512}, "leave it out"),
        ("none.yaml", None, {}, "'none.yaml' is no file"),
        ("data.yaml", None, {}, "data.yaml is no model YAML: it needs layers in backbone and head"),
        ("broken.yaml", None, {}, "broken.yaml: not a readable model YAML"),
        ("yolo11q-cut.yaml", None, {}, "'yolo11q-cut.yaml' is no file"),
        ("yolo11x-cut.yaml", None, {}, "is scale 'x' by its name, but has n"),
    ],
)
def test_wrong_yamls_are_told(base, after, neck, message):
    layers = "backbone: [[-1, 1, Conv, [8]], [-1, 1, CBLinear, [[4, 4]]]], head: [[0, 1, Conv, [8]]]"
    Path("list.yaml").write_text(f"{{{layers}}}")
    Path("data.yaml").write_text("{train: images, names: [a]}")
    Path("broken.yaml").write_text("backbone: [")
    Path("yolo11x-cut.yaml").write_text(f"{{scales: {{n: [1, 1, 1]}}, {layers}}}")
    with pytest.raises(ValueError, match=message):
        adapter.write_yaml(base, Path("out.yaml"), after, neck)
    assert not Path("out.yaml").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("there.yaml", "there.yaml is there already"),
        ("out.txt", r"must end in \.yaml"),
        ("yolo11n-shunted.yaml", "reads as scale 'n', but yolo11s is scale 's'"),
    ],
)
def test_wrong_names_are_told(out, message):
    Path("there.yaml").write_text("mine")
    with pytest.raises(ValueError, match=message):
        adapter.write_yaml("yolo11s", Path(out))
    assert Path("there.yaml").read_text() == "mine"


def test_a_fixed_number_of_channels_is_told():
    content = adapter.insert_neck(NANO)
    content["backbone"][-1][-1] = [512]
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=r"shape \[1, 256, .*, but \(B, 512, H, W\) is needed"):
        YOLO("mine.yaml")
