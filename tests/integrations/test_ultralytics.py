"""The neck in Ultralytics' YOLO: registration, model YAMLs, weights, and errors."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import ultralytics
import yaml
from helpers.yolo import FAMILIES, HAS_RESTRICTED_LOADING, NANO, SMALL, predict, run_python, run_yolo
from lightning.pytorch import Trainer
from torch import nn
from torchvision import models
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks
from ultralytics.utils import dist

import shunted_lit as package
import shunted_lit.ultralytics as adapter
from shunted_lit.cli import main
from shunted_lit.tasks import DetectionTask

ROOT = Path(__file__).parents[2]


def randomize_statistics(model):
    """Set random BatchNorm statistics, as after training, such that no two maps are alike."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def build_layers(path):
    """Return the layers of a model YAML as Ultralytics builds them, on the meta device."""
    with torch.device("meta"):
        return tasks.parse_model(tasks.yaml_model_load(path), ch=3, verbose=False)[0]


def assert_same_outputs(model, base, height=64, width=96):
    x = torch.rand(1, 3, height, width)
    torch.testing.assert_close(predict(model, x), predict(base, x), rtol=1e-5, atol=1e-4)


def mentions(*words):
    """Return a pattern for messages that contain all of `words`, in any order."""
    return "(?s)^" + "".join(f"(?=.*{re.escape(word)})" for word in words)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of the smallest model without a neck."""
    path = tmp_path_factory.mktemp("base") / f"{NANO}.pt"
    yolo = YOLO(f"{NANO}.yaml")
    randomize_statistics(yolo.model)
    yolo.save(path)
    return path


@pytest.fixture(scope="module")
def with_neck(tmp_path_factory, base):
    """A folder with neck.yaml, the smallest model with a neck, and neck.pt, the same with the weights of the base."""
    folder = tmp_path_factory.mktemp("with_neck")
    adapter.write_yaml(NANO, str(folder / "neck.yaml"), neck=SMALL)  # strings here, paths in the tests below
    adapter.write_weights(str(folder / "neck.yaml"), str(folder / "neck.pt"), base=str(base))
    return folder


# Registration


def test_oldest_version_matches_pyproject():
    assert f'"ultralytics>={adapter.OLDEST}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_checkpoint_loads_in_a_process_that_imports_only_ultralytics(with_neck):
    output = run_yolo(with_neck / "neck.pt", "model.model[11].__class__")
    assert "result: <class 'shunted_lit.ultralytics.ShuntedTransformer'>" in output


@pytest.fixture
def restored_safe_globals():
    """Ultralytics allows classes for the rest of the process, which other tests expect to be refused."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.skipif(not HAS_RESTRICTED_LOADING, reason="this version of Ultralytics has no restricted loading")
def test_restricted_loading_accepts_the_neck(with_neck, restored_safe_globals):
    checkpoint, _ = tasks.torch_safe_load(with_neck / "neck.pt", safe_only=True)
    assert adapter.is_neck((checkpoint["ema"] or checkpoint["model"]).model[11])


def test_ddp_script_imports_the_neck_first():
    adapter.register()  # a second call changes nothing
    trainer = SimpleNamespace(args=SimpleNamespace(model=None), model=None, callbacks={}, hub_session=None)
    script = Path(dist.generate_ddp_file(trainer)).read_text()
    assert script.startswith("import sys\nsys.path = [")
    assert script.count("import shunted_lit.ultralytics\n") == 1
    assert script.index("import shunted_lit.ultralytics\n") < script.index("ultralytics.utils")


@pytest.mark.slow
def test_package_does_not_import_ultralytics():
    run_python("-c", "import sys, shunted_lit, shunted_lit.cli; sys.exit('ultralytics' in sys.modules)")


# Model YAMLs


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("family", FAMILIES)
def test_necks_have_the_channels_of_the_layer_before_at_every_scale(family, scale):
    path = Path(f"{family}{scale}-shunted.yaml")
    adapter.write_yaml(f"{family}{scale}", path, [6, 10])
    base = build_layers(f"{family}{scale}.yaml")
    necks = {i: layer.cin for i, layer in enumerate(build_layers(path)) if adapter.is_neck(layer)}
    assert necks == {7: base[6].cv2.conv.out_channels, 12: base[10].cv2.conv.out_channels}


@pytest.mark.parametrize("after", [None, [4, 6, 10], [5, 9, 16, 22]])
def test_outputs_equal_the_base_wherever_necks_are_inserted(after, base):
    """A new neck is an identity, so that a wrong layer number changes the outputs."""
    path = Path(f"{NANO}-shunted.yaml")
    adapter.write_yaml(NANO, path, after, neck=SMALL)
    model, base_model = YOLO(path).model, YOLO(base).model
    assert adapter.transfer_weights(model, base_model) == (len(base_model.state_dict()),) * 2
    assert_same_outputs(model, base_model)
    necks = [layer for layer in model.model if adapter.is_neck(layer)]
    assert len(necks) == (1 if after is None else len(after))
    x = torch.rand(1, 3, 64, 64)
    for neck in necks:
        before = predict(model, x)
        nn.init.dirac_(neck.out_proj.weight)
        assert not torch.equal(predict(model, x), before), "no layer reads the neck"


@pytest.mark.parametrize("neck", [{"form": "light"}, {"form": "pyramid"}, {"form": "pyramid", "ratios": [8, 2]}])
def test_other_forms_start_with_the_outputs_of_the_base_and_change_them(neck, base):
    path = Path(f"{NANO}-shunted.yaml")
    levels = [19, 16] if "ratios" in neck else None  # of the maps that the head reads
    adapter.write_yaml(NANO, path, levels, neck=neck)
    model, base_model = YOLO(path).model, YOLO(base).model
    assert adapter.transfer_weights(model, base_model) == (len(base_model.state_dict()),) * 2
    assert_same_outputs(model, base_model)
    x = torch.rand(1, 3, 64, 96)
    before = predict(model, x)
    for name, parameter in model.named_parameters():
        if ".out_proj." in name and name.endswith(".weight"):
            nn.init.dirac_(parameter)
            after = predict(model, x)
            assert not torch.equal(after, before), f"nothing reads the output of {name}"
            before = after


def run_branches(model, x):
    """Return the output of each branch of a detection head, by the branch's name and its level."""
    outputs, hooks = {}, []
    for name, branches in model.model[-1].named_children():
        if isinstance(branches, nn.ModuleList) and "cv" in name:
            for level, branch in enumerate(branches):
                key = name, level
                hooks.append(branch.register_forward_hook(lambda _, __, out, key=key: outputs.update({key: out})))
    predict(model, x)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("name", [NANO, "yolov10n", "yolov8n-obb", f"{NANO}-pose", "yolov3-tiny"])
def test_a_finer_level_leaves_the_outputs_of_the_others(name, capsys):
    base = YOLO(f"{name}.yaml")
    randomize_statistics(base.model)
    base.model.names = {i: f"thing {i}" for i in range(len(base.model.names))}
    base.save("base.pt")
    main(["yolo", "yaml", "--base", name, "--recipe", "finer_level", "--out", f"{name}-small.yaml"])
    assert f"{name}-small.yaml: the head also reads layer" in capsys.readouterr().out
    main(["yolo", "weights", "--model", f"{name}-small.yaml", "--base", "base.pt", "--out", "small.pt"])
    x = torch.rand(1, 3, 64, 96)
    base, model = YOLO("base.pt").model.float(), YOLO("small.pt").model.float()
    assert model.names == base.names
    assert model.stride.tolist() == [base.stride.min() / 2, *base.stride.tolist()][-len(model.stride) :]
    expected, outputs = run_branches(base, x), run_branches(model, x)
    assert expected
    for (branch, level), output in expected.items():
        torch.testing.assert_close(outputs[branch, level + 1], output, rtol=1e-4, atol=1e-4)
    finest = {out.shape[-2:] for (_, level), out in outputs.items() if level == 0}
    assert finest == {(64 // int(model.stride[0]), 96 // int(model.stride[0]))}


def test_a_finer_level_takes_necks():
    adapter.write_yaml(NANO, f"{NANO}-small.yaml", recipe="finer_level")
    adapter.write_yaml(NANO, f"{NANO}-light.yaml", 25, neck={"form": "light"}, recipe="finer_level")
    adapter.write_yaml(NANO, f"{NANO}-pyramid.yaml", neck={"form": "pyramid"}, recipe="finer_level")
    base = randomize_statistics(YOLO(f"{NANO}-small.yaml").model)
    x = torch.rand(1, 3, 64, 64)
    for form in ("light", "pyramid"):
        model = YOLO(f"{NANO}-{form}.yaml").model
        assert adapter.transfer_weights(model, base) == (len(base.state_dict()),) * 2
        assert_same_outputs(model, base)
        before = predict(model, x)
        projections = [p for name, p in model.named_parameters() if ".out_proj." in name and p.ndim == 4]
        assert len(projections) == (1 if form == "light" else 4)
        for projection in projections:
            nn.init.dirac_(projection)
        assert not torch.equal(predict(model, x), before)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (f"{NANO}-cls", "must end in one of Detect, .* got Classify; choose another base"),
        (f"{NANO}-seg", "must end in one of Detect, .* got Segment"),
        ("yolov8n-p2", "must have a map for a level finer than stride 4, got none .* stride 8"),
        ("small.yaml", "must have a map for a level finer than stride 4, got none .* stride 8"),
    ],
)
def test_base_without_place_for_a_finer_level_raises(base, message):
    adapter.write_yaml(NANO, "small.yaml", recipe="finer_level")
    with pytest.raises(ValueError, match=message):
        adapter.write_yaml(base, "out.yaml", recipe="finer_level")
    assert not Path("out.yaml").exists()


def test_the_neck_across_levels_has_the_channels_of_each_scale():
    for scale in "nsx":
        adapter.write_yaml(f"{FAMILIES[0]}{scale}", Path(f"{scale}.yaml"), neck={"form": "pyramid"})
        path = Path(f"{FAMILIES[0]}{scale}-pyramid.yaml")
        Path(f"{scale}.yaml").rename(path)
        layers = build_layers(path)
        assert layers[23].channels == [layers[i].cv2.conv.out_channels for i in (16, 19, 22)]
        assert layers[27].f == [24, 25, 26]


@pytest.mark.skipif(not HAS_RESTRICTED_LOADING, reason="this version of Ultralytics has no restricted loading")
def test_restricted_loading_accepts_a_neck_across_levels(restored_safe_globals):
    adapter.write_yaml(NANO, Path(f"{NANO}-pyramid.yaml"), neck={"form": "pyramid"})
    YOLO(f"{NANO}-pyramid.yaml").save("pyramid.pt")
    checkpoint, _ = tasks.torch_safe_load("pyramid.pt", safe_only=True)
    assert (checkpoint["ema"] or checkpoint["model"]).model[23].f == [16, 19, 22]


def test_negative_sources_are_renumbered():
    adapter.write_yaml("yolov3-tiny", Path("tiny.yaml"), [13, 15], neck=SMALL)
    original = yaml.safe_load(next(Path(ultralytics.__file__).parent.rglob("yolov3-tiny.yaml")).read_text())
    assert any(layer[0] == -2 for layer in original["head"])
    model, base = YOLO("tiny.yaml").model, YOLO("yolov3-tiny.yaml").model
    adapter.transfer_weights(model, randomize_statistics(base))
    assert_same_outputs(model, base)


def test_file_name_without_scale_keeps_the_scale_of_the_base():
    adapter.write_yaml(f"{FAMILIES[0]}s", Path("mine.yaml"), neck=SMALL)
    assert build_layers("mine.yaml")[11].cin == 512
    adapter.write_yaml("mine.yaml", Path("twice.yaml"), 4, neck=SMALL)
    assert [layer.cin for layer in build_layers("twice.yaml") if adapter.is_neck(layer)] == [256, 512]


def test_yaml_command_writes_the_keywords_of_the_neck():
    main(["yolo", "yaml", "--base", f"{FAMILIES[0]}s", "--after", "10", "--out", f"{FAMILIES[0]}s-shunted.yaml"])
    main(["yolo", "yaml", "--base", "yolo11m", "--after", "[6, 10]", "--out", "two.yaml", "--neck.depth", "2",
          "--neck.num_heads", "4", "--neck.ratios", "[4, 2, 1, 1]", "--neck.identity_start", "false"])  # fmt: skip
    layers = yaml.safe_load(Path("two.yaml").read_text())["backbone"]
    keywords = {"identity_start": False, "depth": 2, "num_heads": 4, "ratios": [4, 2, 1, 1]}
    assert [layers[i] for i in (7, 12)] == [[-1, 1, "ShuntedTransformer", ["c2", keywords]]] * 2
    assert build_layers(f"{FAMILIES[0]}s-shunted.yaml")[11].cin == 512


def test_layer_accepts_positional_arguments_of_the_reference():
    """In the order of the reference implementation: cin, depth, img_size; the others by name."""
    content = adapter.insert_neck(NANO)
    content["backbone"][-1][-1] = ["c2", 1, 40, {"num_heads": 4, "ratios": [2, 1, 1, 1]}]
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    neck = build_layers("mine.yaml")[11]
    assert (len(neck.block), [group.ratio for group in neck.block[0].attn.groups]) == (1, [2, 1, 1, 1])


MODEL_YAMLS = {
    "list.yaml": "{backbone: [[-1, 1, Conv, [8]], [-1, 1, CBLinear, [[4, 4]]]], head: [[0, 1, Conv, [8]]]}",
    "data.yaml": "{train: images, names: [a]}",
    "has.yaml": "{backbone: [[-1, 1, Conv, [8]], [-1, 1, Conv, [8]], [-1, 1, ShuntedTransformer, [c2]]], "
    "head: [[-1, 1, Conv, [8]], [-1, 1, Conv, [8]]]}",
    "broken.yaml": "backbone: [",
    "short.yaml": "{backbone: [[-1, 1, Conv, [8]], [-1, Conv]], head: [[-1, 1, Conv, [8]]]}",
    "foreign.yaml": "{backbone: [[-1, 1, Foreign, [8]]], head: [[-1, 1, Conv, [8]]]}",
    "yolo11x-cut.yaml": "{scales: {n: [1, 1, 1]}, backbone: [[-1, 1, Conv, [8]]], head: [[0, 1, Conv, [8]]]}",
}


@pytest.mark.parametrize(
    ("base", "after", "neck", "message"),
    [
        ("yolo27s", None, {}, r"must be a file or a model of Ultralytics 8.*, got 'yolo27s'; close names: "),
        ("yolo11s", 24, {}, "`after` must be a layer of yolo11s from 0 to 22, got 24"),
        ("yolo11s", 23, {}, "from 0 to 22, got 23"),
        ("yolo11s", [4, -1], {}, "from 0 to 22, got -1"),
        ("yolo11s", [], {}, "`after` must name at least one layer"),
        ("yolo11s", [10, 10], {}, "layer 10 of yolo11s must get one neck.*`depth`"),
        ("has.yaml", 1, {}, "layer 1 of has.yaml must get one neck"),
        ("has.yaml", 2, {}, "layer 2 of has.yaml must get one neck"),
        ("yolo11s.pt", None, {}, "is a checkpoint; name the model, such as yolo11s, or its YAML.*yolo weights"),
        ("rtdetr-l", None, {}, "out.yaml must have 'rtdetr' in its name.*rename it"),
        ("yolo11s", 10, {"depth": "many"}, mentions("depth", "'many'", "int")),
        ("yolo11s", 10, {"depth": 1.5}, mentions("depth", "1.5", "int")),
        ("yolo11s", 10, {"depth": 0}, mentions("depth", "0", "at least 1")),
        ("yolo11s", 10, {"layer_scale": "abc"}, mentions("layer_scale", "'abc'", "float | None")),
        ("yolo11s", 10, {"norm_layer": "foo"}, mentions("norm_layer", "'foo'", "Callable")),
        ("yolo11s", 10, {"ratios": [4, "x"]}, mentions("ratios", "[4, 'x']", "Sequence[int]")),
        (
            "yolo11s",
            10,
            {"device": "cuda"},
            "the neck's `device` follows from the layer before it, got 'cuda'; omit it",
        ),
        ("yolo11s", None, {"form": "wide"}, mentions("form", "'wide'", "light, pyramid, reference")),
        ("yolo11s", [16, 10], {"form": "pyramid"}, r"two or more of the layers \[16, 19, 22\], .*, got \[10, 16\]"),
        ("yolo11s", 16, {"form": "pyramid"}, r"two or more of the layers \[16, 19, 22\], .*, got \[16\]"),
        ("yolo11s-cls", None, {"form": "pyramid"}, r"two or more of the layers .* the head of yolo11s-cls reads"),
        ("yolo11s", None, {"form": "pyramid", "depht": 1}, mentions("the neck across levels", "depht", "depth")),
        ("yolo11s", None, {"form": "pyramid", "dim": 31}, mentions("num_heads", "31")),
        ("yolo11s", 10, {"cin": 512}, "the neck's `cin` follows from the layer before it, got 512; omit it"),
        ("list.yaml", 1, {}, "layer 1 of list.yaml, .*CBLinear, must return one map.*, got tuple; choose another"),
        ("yolo11s", 10, {"num_heads": 3}, mentions("layer 10 of yolo11s has 512 channels", "3")),
        ("yolo11n", [4, 10], {"num_heads": 256}, mentions("layer 4 of yolo11n has 128 channels", "256")),
        ("yolo11s", 10, {"dept": 3}, mentions("keyword", "dept", "depth")),
        ("none.yaml", None, {}, "got 'none.yaml'"),
        ("data.yaml", None, {}, "data.yaml is not a model YAML: it must list layers under backbone and head"),
        ("short.yaml", None, {}, r"layer 1 must be \[from, repeats, module, .*, got \[-1, 'Conv'\]"),
        ("foreign.yaml", None, {}, "Ultralytics cannot build foreign.yaml: KeyError: 'Foreign'"),
        ("broken.yaml", None, {}, "broken.yaml is not a readable model YAML: "),
        ("yolo11q-cut.yaml", None, {}, "got 'yolo11q-cut.yaml'"),
        ("yolo11x-cut.yaml", None, {}, "must define its scale, 'x', got n; rename it"),
    ],
)
def test_invalid_base_or_neck_raises(base, after, neck, message):
    for name, content in MODEL_YAMLS.items():
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=message):
        adapter.write_yaml(base, Path("out.yaml"), after, neck=neck)
    assert not Path("out.yaml").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("existing.yaml", "existing.yaml .*already"),
        ("out.txt", r"must end in \.yaml"),
        ("yolo11n-shunted.yaml", "must have the scale of yolo11s in its name, 's', got 'n'; rename it"),
    ],
)
def test_invalid_file_name_raises(out, message):
    Path("existing.yaml").write_text("mine")
    with pytest.raises(ValueError, match=message):
        adapter.write_yaml("yolo11s", Path(out))
    assert Path("existing.yaml").read_text() == "mine"


def test_wrong_number_of_channels_in_a_yaml_raises():
    content = adapter.insert_neck(NANO)
    content["backbone"][-1][-1] = [512]
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=mentions("[1, 256, ", "(B, 512, H, W)")):
        YOLO("mine.yaml")


# Weights


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_weights_classes_and_names_of_the_base_are_loaded(base, capsys, fine_tuned):
    trained = YOLO(base)
    model = trained.model
    trained.model = type(model)({**model.yaml, "nc": 3}, verbose=False)
    if fine_tuned:  # Ultralytics then keeps the width that the head had for 80 classes
        trained.model.load(model, verbose=False)
    trained.model.names = {0: "a", 1: "b", 2: "c"}
    randomize_statistics(trained.model)
    trained.save("mine.pt")
    adapter.write_yaml(NANO, Path("mine.yaml"), neck=SMALL)
    main(["yolo", "weights", "--model", "mine.yaml", "--base", "mine.pt", "--out", "new.pt"])
    count = len(trained.model.state_dict())
    assert count == (708 if NANO == "yolo26n" else 499)
    assert f"mine.pt: loaded {count} of {count} tensors" in capsys.readouterr().out
    new, old = YOLO("new.pt"), YOLO("mine.pt")
    assert new.names == {0: "a", 1: "b", 2: "c"}
    assert_same_outputs(new.model, old.model)
    loaded, total = adapter.transfer_weights(YOLO("mine.yaml").model, old.model)
    assert 0.8 * count < loaded < total == count, "a head with other classes is loaded in part"


IMAGE = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))  # models with P6 need multiples of 64


def write_and_compare(name, trained):
    """Write `trained` with a new neck, check that its outputs stay, and return the written model and the outputs."""
    randomize_statistics(trained.model)
    trained.save("mine.pt")
    model, out = Path(f"{name}-neck.yaml"), Path(f"{name}-neck.pt")
    adapter.write_yaml(name, model, neck=SMALL)
    adapter.write_weights(model, out, base="mine.pt")
    expected, written = predict(YOLO("mine.pt").model, IMAGE), YOLO(out)
    outputs = predict(written.model, IMAGE)
    if "rtdetr" in name:  # with random weights, rounding decides which of two equal queries comes first
        same = torch.isclose(outputs, expected, rtol=1e-5, atol=1e-4).all(-1)
        assert same.float().mean() > 0.98, same
    else:
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-4)
    return written, expected


def model_names():
    """Return the name of each model YAML of the installed Ultralytics, where it has scales with the first one."""
    for file in sorted((Path(ultralytics.__file__).parent / "cfg/models").rglob("*.yaml")):
        scale = next(iter(yaml.safe_load(file.read_text()).get("scales") or {}), "")
        yield re.sub(r"(?<=[ov-])(\d+)(?![a-z\d])", rf"\g<1>{scale}", file.stem, count=1)


@pytest.fixture
def random_torchvision_weights(monkeypatch):
    """Replace the weights that torchvision would download by random ones."""

    def build_state(self, *args, **keywords):
        return models.get_model(type(self).__name__.removesuffix("_Weights").lower()).state_dict()

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", build_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(model_names()))
def test_every_model_of_ultralytics_takes_the_neck_and_its_weights(name, random_torchvision_weights, capsys):
    written, outputs = write_and_compare(name, (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml"))
    loaded, total = re.search(r"mine.pt: loaded (\d+) of (\d+) tensors", capsys.readouterr().out).groups()
    assert int(loaded) == int(total) > 100
    (neck,) = (layer for layer in written.model.model if adapter.is_neck(layer))
    nn.init.normal_(neck.out_proj.weight, std=100.0)
    with pytest.raises(AssertionError, match="not"):  # else no layer reads the neck
        torch.testing.assert_close(predict(written.model, IMAGE), outputs)


def test_base_whose_weights_cannot_be_downloaded_raises(monkeypatch):
    def fail(self, *args, **keywords):
        raise URLError("no route to host")

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(
        ValueError, match=r"cannot build yolo11-cls-resnet18: a download failed \(no route to host\); conn"
    ):
        adapter.write_yaml("yolo11-cls-resnet18", Path("yolo11-cls-resnet18-shunted.yaml"))


@pytest.mark.slow
def test_yoloe_keeps_its_class_embeddings():
    trained = YOLO("yoloe-26n.yaml")
    trained.model.set_classes(["hat", "cat"], torch.randn(1, 2, 512))
    trained.model.names = {0: "hat", 1: "cat"}
    _, outputs = write_and_compare("yoloe-26n", trained)
    assert outputs.shape[1] == 4 + 2


def test_yolo_world_keeps_its_text_features():
    trained = YOLO("yolov8s-worldv2.yaml")
    trained.model.txt_feats, trained.model.model[-1].nc = torch.randn(1, 2, 512), 2  # as set by its set_classes
    trained.model.names = {0: "hat", 1: "cat"}
    written, outputs = write_and_compare("yolov8s-worldv2", trained)
    assert outputs.shape[1] == 4 + 2
    assert written.names == {0: "hat", 1: "cat"}


@pytest.mark.slow
def test_rtdetr_gets_the_neck_after_its_own_attention():
    written, _ = write_and_compare("rtdetr-l", RTDETR("rtdetr-l.yaml"))
    assert adapter.is_neck(build_layers("rtdetr-l-neck.yaml")[12])
    assert adapter.is_neck(written.model.model[12])


@pytest.mark.slow
def test_neck_trained_by_fit_is_loaded():
    task = DetectionTask(num_classes=2, neck={"depth": 1, "num_heads": 4}, neck_levels=[4], pyramid_channels=32)
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint("run.ckpt")
    trained = task.detector.backbone.body.necks["4"].state_dict()
    for name, neck in {"plain": {"identity_start": False}, "identity": {}, "scaled": {"layer_scale": 0.0}}.items():
        model, out = Path(f"{name}.yaml"), Path(f"{name}.pt")
        adapter.write_yaml(NANO, model, [6, 10], neck={"depth": 1, "num_heads": 4, **neck})
        if NANO == "yolo26n":  # layer 6 has 128 channels; layer 10 has 256, as level 4 of resnet18
            with pytest.raises(ValueError, match=mentions("do not fit", "cin=256")):
                adapter.write_weights(model, out, neck="run.ckpt", layer=7)
        adapter.write_weights(model, out, neck="run.ckpt", layer=12)
        loaded = YOLO(out).model.model[12].state_dict()
        for added in ("layer_scale.gamma", "out_proj.weight", "out_proj.bias"):
            assert not loaded.pop(added, torch.zeros(1)).any()
        assert loaded.keys() == trained.keys()
        for key, value in loaded.items():
            torch.testing.assert_close(value, trained[key], rtol=1e-3, atol=1e-4)  # a .pt holds half precision
    adapter.write_yaml(NANO, Path("two.yaml"), 10, neck={"depth": 1})
    with pytest.raises(ValueError, match=r"the neck of run.ckpt must have the 2 heads of layer 11, got 4"):
        adapter.write_weights(Path("two.yaml"), Path("two.pt"), neck="run.ckpt")


@pytest.mark.slow
def test_a_neck_leaves_a_yolo_and_enters_another_by_a_folder(with_neck):
    YOLO(with_neck / "neck.pt").model.model[11].save_pretrained("folder")
    neck = package.ShuntedTransformer.from_pretrained("folder", dtype=torch.float32)  # a .pt holds half precision
    assert neck.keywords() == package.ShuntedTransformer(256, identity_start=True, **SMALL).keywords()
    neck.save_pretrained("float32")
    adapter.write_weights(str(with_neck / "neck.yaml"), "out.pt", neck="float32/model.safetensors")
    loaded = YOLO("out.pt").model.model[11].state_dict()
    for name, value in neck.state_dict().items():
        torch.testing.assert_close(loaded[name].float(), value, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory, with_neck):
    """A folder with neck.yaml, a model YAML without a neck, and checkpoints of other models."""
    folder = tmp_path_factory.mktemp("mismatched")
    shutil.copy(with_neck / "neck.yaml", folder)
    (folder / "bare.yaml").write_text(yaml.safe_dump(tasks.yaml_model_load(f"{NANO}.yaml")))
    other = "yolov9t" if NANO == "yolo11n" else "yolo11n"
    for name, model in {"other": other, "shallow": "yolov8n", "segment": f"{NANO}-seg"}.items():
        YOLO(f"{model}.yaml").save(folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "weights must come from --base, --neck, or both, got neither"),
        ({"base": "none.pt"}, "none.pt is not a readable checkpoint of Ultralytics"),
        ({"base": "other.pt"}, "other.pt does not fit neck.yaml: the base (is another model|must have)"),
        ({"base": "shallow.pt"}, "the base must have the model's 2[34] layers without necks, got 23"),
        ({"base": "segment.pt"}, "segment.pt must be for the task of neck.yaml, 'detect', got 'segment'"),
        ({"base": "neck.yaml"}, "neck.yaml is not a readable checkpoint"),
        ({"base": "{base}", "model": Path("bare.yaml")}, "bare.yaml must have a neck, got none; .*yolo yaml"),
        ({"base": "{base}", "model": Path("none.yaml")}, "got 'none.yaml'"),
        ({"base": "{base}", "out": Path("neck.yaml")}, r"must end in \.pt"),
        ({"base": "{base}", "out": Path("other.pt")}, "other.pt .*already"),
        ({"neck": "other.pt"}, "other.pt.* not loaded"),
        ({"neck": "none.ckpt"}, mentions("none.ckpt")),
        ({"base": "{base}", "layer": 11}, "`layer` and `level` apply to a trained neck; .*--neck"),
        ({"neck": "none.ckpt", "layer": 10}, r"`layer` must be one of the model's necks, \[11\], got 10"),
    ],
)
def test_invalid_weights_raise(mismatched, base, keywords, message):
    shutil.copytree(mismatched, ".", dirs_exist_ok=True)
    keywords = {key: str(base) if value == "{base}" else value for key, value in keywords.items()}
    with pytest.raises(ValueError, match=message):
        adapter.write_weights(**{"model": Path("neck.yaml"), "out": Path("out.pt"), **keywords})
    assert not Path("out.pt").exists()


def test_base_with_a_neck_raises(with_neck):
    model = YOLO(with_neck / "neck.yaml").model
    with pytest.raises(ValueError, match=r"the base must have no neck; .* can be trained as it is"):
        adapter.transfer_weights(model, model)


# Commands


@pytest.fixture
def adapter_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "shunted_lit.ultralytics")
    monkeypatch.delattr(package, "ultralytics")


def test_missing_ultralytics_names_the_extra_to_install(adapter_not_imported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(
        ValueError, match=r"needs Ultralytics .* Install it: pip install -U 'shunted-lit\[ultralytics\]'"
    ):
        main(["yolo", "yaml", "--base", "yolo11n", "--out", "x.yaml"])
    main(["yolo", "--help"])
    assert "shunted-lit yolo weights" in capsys.readouterr().out


def test_old_ultralytics_raises(adapter_not_imported, monkeypatch):
    monkeypatch.setattr(ultralytics, "__version__", "8.3.9")
    with pytest.raises(ValueError, match=rf"must be {adapter.OLDEST} or newer, got 8\.3\.9\. Update it: pip install"):
        main(["yolo", "train"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "epoch=3"], "'epoch' is not a valid YOLO argument"),
        (["train", "model=none.yaml"], r"none\.yaml.* does not exist"),
        (["yaml", "--base", "yolo11n"], "required arguments are missing: out"),
    ],
)
def test_invalid_arguments_of_yolo_are_reported(words, message, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as raised:
        main(["yolo", *words])
    assert re.search(message, re.sub(r"\x1b\[[\d;]*m", "", str(raised.value) + capsys.readouterr().err))


@pytest.mark.slow
def test_error_is_one_line_without_traceback():
    words = ["yolo", "yaml", "--base", "yolo11n", "--out", "x.yaml", "--after", "99"]
    output = run_python("-m", "shunted_lit", *words, status=2)
    assert "Traceback" not in output
    assert "shunted-lit: error: `after` must be a layer of yolo11n from 0 to 22, got 99" in output
