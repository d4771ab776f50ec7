"""The neck in Ultralytics' YOLO: model YAMLs, weights, and every way in which a new interpreter meets the neck."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
import ultralytics
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.data.augment import LetterBox
from ultralytics.nn import tasks

import shunted_lit as package
import shunted_lit.ultralytics as adapter
from shunted_lit.cli import main
from shunted_lit.data.scenes import write_scenes
from shunted_lit.export.formats import openvino_core
from shunted_lit.tasks import DetectionTask

ROOT = Path(__file__).parents[2]
FAMILIES = [
    family for family in ("yolo26", "yolo11") if list(Path(ultralytics.__file__).parent.rglob(f"{family}.yaml"))
]
NANO = f"{FAMILIES[0]}n"
NEW = hasattr(tasks, "_SafeLoad")  # not the Ultralytics of a year ago
SMALL = {"depth": 1, "mlp_ratios": 1}


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
        ("yolo11s", [10, 10], {}, "layer 10 of yolo11s would get two necks in a row"),
        ("has.yaml", 1, {}, "layer 1 of has.yaml would get two necks"),
        ("has.yaml", 2, {}, "layer 2 of has.yaml would get two necks"),
        ("yolo11s.pt", None, {}, "is a checkpoint; name the model, such as yolo11s, or its YAML"),
        ("rtdetr-l", None, {}, "by its name; rename out.yaml, so that it has 'rtdetr' in it"),
        ("yolo11s", 10, {"depth": "many"}, "the neck's depth is 'many', but int is needed"),
        ("yolo11s", 10, {"depth": 1.5}, "the neck's depth is 1.5, but int is needed"),
        ("yolo11s", 10, {"depth": 0}, "depth is 0, but at least 1 block is needed"),
        ("yolo11s", 10, {"layer_scale": "abc"}, r"the neck's layer_scale is 'abc', but float \| None is needed"),
        ("yolo11s", 10, {"norm_layer": "foo"}, "the neck's norm_layer is 'foo', but Callable"),
        ("yolo11s", 10, {"ratios": [4, "x"]}, r"the neck's ratios is \[4, 'x'\], but Sequence\[int\]"),
        ("yolo11s", 10, {"device": "cuda"}, "the neck's device is that of the layer before it; leave it out"),
        ("list.yaml", 1, {}, "layer 1 of list.yaml, .*CBLinear, returns tuple, but the neck takes one map"),
        ("yolo11s", 10, {"num_heads": 3}, "layer 10 of yolo11s has 512 channels: 512 channels do not split into 3"),
        ("yolo11n", [4, 10], {"num_heads": 256}, "layer 4 of yolo11n has 128 channels: .*into 256 heads"),
        ("yolo11s", 10, {"dept": 3}, "the neck has no keyword dept; it has .*depth"),
        ("yolo11s", 10, {"cin": 512}, "the neck's cin is that of the layer before it; leave it out"),
        ("none.yaml", None, {}, "'none.yaml' is no file"),
        ("data.yaml", None, {}, "data.yaml is no model YAML: it needs layers in backbone and head"),
        ("short.yaml", None, {}, r"short.yaml: layer 1 is \[-1, 'Conv'\], but \[from, repeats, module"),
        ("foreign.yaml", None, {}, "Ultralytics can't build foreign.yaml: KeyError, 'Foreign'"),
        ("broken.yaml", None, {}, "broken.yaml: not a readable model YAML"),
        ("yolo11q-cut.yaml", None, {}, "'yolo11q-cut.yaml' is no file"),
        ("yolo11x-cut.yaml", None, {}, "is scale 'x' by its name, but has n"),
    ],
)
def test_wrong_yamls_are_told(base, after, neck, message):
    layers = "backbone: [[-1, 1, Conv, [8]], [-1, 1, CBLinear, [[4, 4]]]], head: [[0, 1, Conv, [8]]]"
    Path("list.yaml").write_text(f"{{{layers}}}")
    Path("data.yaml").write_text("{train: images, names: [a]}")
    conv = "[-1, 1, Conv, [8]]"
    Path("has.yaml").write_text(
        f"{{backbone: [{conv}, {conv}, [-1, 1, ShuntedTransformer, [c2]]], head: [{conv}, {conv}]}}"
    )
    Path("broken.yaml").write_text("backbone: [")
    Path("short.yaml").write_text("{backbone: [[-1, 1, Conv, [8]], [-1, Conv]], head: [[-1, 1, Conv, [8]]]}")
    Path("foreign.yaml").write_text("{backbone: [[-1, 1, Foreign, [8]]], head: [[-1, 1, Conv, [8]]]}")
    Path("yolo11x-cut.yaml").write_text(f"{{scales: {{n: [1, 1, 1]}}, {layers}}}")
    with pytest.raises(ValueError, match=message):
        adapter.write_yaml(base, Path("out.yaml"), after, neck)
    assert not Path("out.yaml").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("there.yaml", "there.yaml already exists; remove it or choose another file"),
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


# --- weights that carry over


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_all_of_the_base_is_taken_with_classes_and_names(base, capsys, fine_tuned):
    start = YOLO(base)
    before = start.model
    start.model = type(before)({**before.yaml, "nc": 3}, verbose=False)
    if fine_tuned:  # Ultralytics then keeps the width that the head had for 80 classes
        start.model.load(before, verbose=False)
    start.model.names = {0: "a", 1: "b", 2: "c"}
    stir(start.model)
    start.save("mine.pt")
    adapter.write_yaml(NANO, Path("mine.yaml"), neck=SMALL)
    main(["yolo", "weights", "--model", "mine.yaml", "--base", "mine.pt", "--out", "new.pt"])
    count = len(start.model.state_dict())
    assert f"{count} of the {count} tensors of mine.pt are taken" in capsys.readouterr().out
    assert count == (708 if NANO == "yolo26n" else 499)
    new, old = YOLO("new.pt"), YOLO("mine.pt")
    assert new.names == {0: "a", 1: "b", 2: "c"}
    x = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(predict(new.model, x), predict(old.model, x), rtol=1e-5, atol=1e-4)
    others = adapter.transfer_weights(YOLO("mine.yaml").model, old.model)
    assert 0.8 * count < others[0] < others[1] == count, "a head for other classes gives what fits"


def carried_over(base, start):
    """What a model of `base` finds, once with a new neck and once as it was: the former's checkpoint, and outputs."""
    stir(start.model)
    start.save("mine.pt")
    model, found = Path(f"{base}-neck.yaml"), Path(f"{base}-neck.pt")
    adapter.write_yaml(base, model, neck=SMALL)
    adapter.write_weights(model, found, base="mine.pt")
    x = torch.rand(1, 3, 64, 96)
    expected = predict(YOLO("mine.pt").model, x)
    found = YOLO(found)
    torch.testing.assert_close(predict(found.model, x), expected, rtol=1e-5, atol=1e-4)
    return found, expected


def test_class_embeddings_of_the_base_are_taken():
    start = YOLO("yoloe-26n.yaml")
    start.model.set_classes(["hat", "cat"], torch.randn(1, 2, 512))
    start.model.names = {0: "hat", 1: "cat"}
    _, expected = carried_over("yoloe-26n", start)
    assert expected.shape[1] == 4 + 2


def test_text_of_yolo_world_is_taken():
    start = YOLO("yolov8s-worldv2.yaml")
    start.model.txt_feats, start.model.model[-1].nc = torch.randn(1, 2, 512), 2  # as its set_classes has them
    start.model.names = {0: "hat", 1: "cat"}
    found, expected = carried_over("yolov8s-worldv2", start)
    assert expected.shape[1] == 4 + 2
    assert found.names == {0: "hat", 1: "cat"}


def test_rt_detr_has_the_neck_after_its_own_attention():
    found, _ = carried_over("rtdetr-l", RTDETR("rtdetr-l.yaml"))
    assert layers_of("rtdetr-l-neck.yaml")[12].type.endswith("ShuntedTransformer")
    assert adapter.is_neck(found.model.model[12])


def test_a_neck_that_fit_trained_is_put_in_place():
    task = DetectionTask(num_classes=2, neck={"depth": 1, "num_heads": 4}, neck_levels=[4], pyramid_channels=32)
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(task)
    path = "run.ckpt"
    trainer.save_checkpoint(path)
    trained = task.detector.backbone.body.necks["4"].state_dict()
    for name, neck in {"plain": {"layer_scale": None}, "scaled": {}}.items():
        adapter.write_yaml(NANO, Path(f"{name}.yaml"), [6, 10], {"depth": 1, "num_heads": 4, **neck})
        if NANO == "yolo26n":  # layer 6 has 128 channels, layer 10 those of resnet18's level 4, 256
            with pytest.raises(ValueError, match=r"weights do not fit.*cin=256"):
                adapter.write_weights(Path(f"{name}.yaml"), Path(f"{name}.pt"), neck=path, layer=7)
        adapter.write_weights(Path(f"{name}.yaml"), Path(f"{name}.pt"), neck=path, layer=12)
        placed = YOLO(f"{name}.pt").model.model[12].state_dict()
        assert not placed.pop("layer_scale.gamma", torch.zeros(1)).any()
        assert placed.keys() == trained.keys()
        for key, value in placed.items():
            torch.testing.assert_close(value, trained[key], rtol=1e-3, atol=1e-4)  # a .pt holds half precision
    adapter.write_yaml(NANO, Path("two.yaml"), 10, {"depth": 1})
    with pytest.raises(ValueError, match="has 4 heads, but layer 11 has 2"):
        adapter.write_weights(Path("two.yaml"), Path("two.pt"), neck=path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "nothing to take weights from"),
        ({"base": "none.pt"}, "none.pt: no checkpoint of Ultralytics"),
        ({"base": "other.pt"}, "other.pt does not fit neck.yaml: the base (is another model|has 23 layers)"),
        ({"base": "shallow.pt"}, "the base has 21 layers, but the model has 2[34] besides its necks"),
        ({"base": "segment.pt"}, "segment.pt is for the task 'segment', but neck.yaml for 'detect'"),
        ({"base": "neck.yaml"}, "neck.yaml: no checkpoint"),
        ({"base": "{base}", "model": Path("bare.yaml")}, "bare.yaml has no neck"),
        ({"base": "{base}", "model": Path("none.yaml")}, "'none.yaml' is no file"),
        ({"base": "{base}", "out": Path("neck.yaml")}, r"must end in \.pt"),
        ({"base": "{base}", "out": Path("other.pt")}, "other.pt already exists; remove it or choose another file"),
        ({"neck": "other.pt"}, "other.pt: holds .* is not loaded"),
        ({"neck": "none.ckpt"}, "none.ckpt: no such file"),
        ({"base": "{base}", "layer": 11}, "layer and level say where a trained neck goes"),
        ({"neck": "none.ckpt", "layer": 10}, r"are the layers \[11\], and layer is 10"),
    ],
)
def test_wrong_weights_are_told(others, base, keywords, message):
    shutil.copytree(others, ".", dirs_exist_ok=True)
    keywords = {key: str(base) if value == "{base}" else value for key, value in keywords.items()}
    with pytest.raises(ValueError, match=message):
        adapter.write_weights(**{"model": Path("neck.yaml"), "out": Path("out.pt"), **keywords})
    assert not Path("out.pt").exists()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A model with the neck, one without, and checkpoints that do not fit."""
    folder = tmp_path_factory.mktemp("others")
    adapter.write_yaml(NANO, folder / "neck.yaml", neck=SMALL)
    (folder / "bare.yaml").write_text(yaml.safe_dump(tasks.yaml_model_load(f"{NANO}.yaml")))
    kinds = {"other": "yolov9t" if NANO == "yolo11n" else "yolo11n", "shallow": "yolov3-tiny", "segment": f"{NANO}-seg"}
    for name, kind in kinds.items():
        YOLO(f"{kind}.yaml").save(folder / f"{name}.pt")
    return folder


# --- new interpreters: each of these runs in one of its own

TRAIN = "epochs=1, imgsz=64, batch=4, workers=0, plots=False, device='cpu', exist_ok=True"


def run(*words, status=0, **environment):
    """Runs Python with these words in a new interpreter; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def yolo(path, call, before=""):
    """Runs a method of Ultralytics' YOLO in a new interpreter that knows of the neck by `before` or the file."""
    return run("-c", f"{before}\nfrom ultralytics import YOLO\nprint('result:', YOLO({str(path)!r}).{call})")


def has_neck(path, index=11):
    layer = YOLO(path).model.model[index]
    return isinstance(layer, adapter.ShuntedTransformer)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for i, name in enumerate("ab"):
        write_scenes(folder / name, train=8, val=4, size=64, seed=i)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / f"{NANO}-shunted.yaml"
    adapter.write_yaml(NANO, path, neck=SMALL)
    return path


@pytest.fixture(scope="module")
def best(tmp_path_factory, model, scenes):
    """The checkpoint of a run from the YAML, by `shunted-lit yolo train`, which knows the neck from the start."""
    project = tmp_path_factory.mktemp("run")
    words = [f"model={model}", f"data={scenes / 'a/data.yaml'}", f"project={project}", "name=x"]
    run("-m", "shunted_lit", "yolo", "train", *words, *TRAIN.replace("'", "").split(", "))
    return project / "x/weights/best.pt"


def test_train_from_the_yaml(best):
    assert has_neck(best)


def test_fine_tuning_from_best(best, scenes):
    yolo(best, f"train(data={str(scenes / 'b/data.yaml')!r}, {TRAIN}, project={os.getcwd()!r}, name='x')")
    tuned = YOLO("x/weights/best.pt").model
    assert has_neck("x/weights/best.pt")
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), YOLO(best).model.parameters(), strict=True)]
    assert any(moved)


def test_predict(best, scenes):
    out = yolo(best, f"predict({str(scenes / 'a/images/val/000000.png')!r}, conf=0.0)[0].boxes.shape")
    assert re.search(r"result: .*\[[1-9]\d*, 6\]", out)


def test_val(best, scenes):
    out = yolo(best, f"val(data={str(scenes / 'a/data.yaml')!r}, imgsz=64, workers=0, plots=False).box.map")
    assert re.search(r"result: \d", out)


def test_export(best, tmp_path):
    shutil.copy(best, tmp_path)
    yolo(tmp_path / "best.pt", "export(format='torchscript', imgsz=64)")
    assert (tmp_path / "best.torchscript").stat().st_size > 1e6


IMPORT = "import shunted_lit.ultralytics"


@pytest.mark.skipif(not NEW, reason="this Ultralytics trains on one data set at a time")
def test_data_sets_in_a_row(model, scenes):
    data = [str(scenes / name / "data.yaml") for name in "ab"]
    yolo(model, f"train(data={data}, {TRAIN}, project={os.getcwd()!r})", IMPORT)
    found = sorted(Path().rglob("best.pt"))
    assert len(found) == 2
    assert all(map(has_neck, found))


@pytest.mark.skipif(not NEW, reason="the tuner of this Ultralytics stops at a model that finds nothing yet")
def test_tune(model, scenes):
    data = str(scenes / "a/data.yaml")
    yolo(model, f"tune(data={data!r}, {TRAIN}, iterations=1, project={os.getcwd()!r}, val=False)", IMPORT)
    found = list(Path().rglob("tune*/weights/best.pt"))
    assert len(found) == 1
    assert has_neck(found[0])


def test_a_worker_of_several_gpus(model, scenes):
    """Ultralytics writes a file and starts it once a GPU; here it is written by one process and run by another."""
    out = run("-c", f"""{IMPORT}
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.dist import generate_ddp_file
data = {str(scenes / "a/data.yaml")!r}
trainer = DetectionTrainer(overrides=dict(model={str(model)!r}, data=data, {TRAIN}, project={os.getcwd()!r}, name='x'))
print('file:', generate_ddp_file(trainer))
""")  # fmt: skip
    run(re.search("^file: (.+)$", out, re.MULTILINE)[1])
    assert has_neck("x/weights/best.pt")


@pytest.mark.skipif(not hasattr(tasks, "_SafeLoad"), reason="this Ultralytics has no restricted loading")
def test_restricted_loading(best, scenes):
    image = scenes / "a/images/val/000000.png"
    words = ["predict", f"model={best}", f"source={image}", "imgsz=64", "save=False"]
    out = run("-m", "shunted_lit", "yolo", *words, ULTRALYTICS_SAFE_LOAD="1")
    assert "000000.png" in out


# --- exports of the whole detector


@pytest.fixture(scope="module")
def awake(best, tmp_path_factory):
    """The trained detector, its neck with a say."""
    path = tmp_path_factory.mktemp("awake") / "awake.pt"
    yolo = YOLO(best)
    nn.init.constant_(yolo.model.model[11].layer_scale.gamma, 0.5)
    yolo.save(path)
    return path


def run_torchscript(path):
    program = torch.jit.load(path)
    return lambda x: program(x)


def run_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def run_openvino(path):
    (file,) = Path(path).glob("*.xml")
    # On CPUs that have it, OpenVINO calculates in bfloat16 unless told otherwise.
    model = openvino_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(model(x.numpy())[0])


STATIC, DYNAMIC = [(640, 416)], [(640, 416), (416, 640), (20, 640), (31, 45)]


@pytest.mark.parametrize(
    ("runner", "options", "sizes"),
    [
        (run_torchscript, {"format": "torchscript", "imgsz": (640, 416)}, STATIC),
        (run_onnx, {"format": "onnx", "imgsz": (640, 416), "simplify": False}, STATIC),
        (run_onnx, {"format": "onnx", "dynamic": True, "simplify": False}, DYNAMIC),
        (run_openvino, {"format": "openvino", "dynamic": True}, DYNAMIC),
    ],
    ids=["torchscript", "onnx", "onnx dynamic", "openvino dynamic"],
)
def test_exports_detect_alike(awake, tmp_path, runner, options, sizes):
    """On a photograph of these sizes (H, W), padded to multiples of 32 as Ultralytics does."""
    model = YOLO(awake).model.fuse().eval()
    shutil.copy(awake, tmp_path / "model.pt")
    detect = runner(YOLO(tmp_path / "model.pt").export(**options))
    for height, width in sizes:
        photograph = Image.fromarray(skimage.data.astronaut()).resize((width, height))
        padded = LetterBox((640, 640), auto=True, stride=32)(image=np.asarray(photograph))
        x = torch.from_numpy(padded.transpose(2, 0, 1).copy())[None].float() / 255
        expected, found = predict(model, x), detect(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)  # boxes in pixels, scores in 0..1


# --- errors as they are seen


@pytest.fixture
def not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "shunted_lit.ultralytics")
    monkeypatch.delattr(package, "ultralytics")


def test_a_missing_package_is_told(not_imported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ValueError, match=r"needs Ultralytics .*: pip install -U 'shunted-lit\[ultralytics\]'"):
        main(["yolo", "yaml", "--base", "yolo11n", "--out", "x.yaml"])
    main(["yolo", "--help"])
    assert "shunted-lit yolo weights" in capsys.readouterr().out


def test_a_package_that_is_too_old_is_told(not_imported, monkeypatch):
    monkeypatch.setattr(ultralytics, "__version__", "8.3.9")
    with pytest.raises(ValueError, match=rf"is 8\.3\.9, but {adapter.OLDEST} is the oldest that works: pip"):
        main(["yolo", "train"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "epoch=3"], "'epoch' is not a valid YOLO argument"),
        (["train", "model=none.yaml"], r"none\.yaml.* does not exist"),
        (["yaml", "--base", "yolo11n"], "required: out|--out"),
    ],
)
def test_wrong_words_are_told(words, message, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as raised:
        main(["yolo", *words])
    assert re.search(message, re.sub(r"\x1b\[[\d;]*m", "", str(raised.value) + capsys.readouterr().err))


def test_a_line_and_no_traceback():
    out = run("-m", "shunted_lit", "yolo", "yaml", "--base", "yolo11n", "--out", "x.yaml", "--after", "99", status=2)
    assert "Traceback" not in out
    assert "shunted-lit: error: yolo11n has no layer 99" in out


def test_the_core_does_not_import_it():
    run("-c", "import sys, shunted_lit, shunted_lit.cli; sys.exit('ultralytics' in sys.modules)")
