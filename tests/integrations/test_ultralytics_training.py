"""Training, prediction and export of a YOLO with the neck, in new processes: how each of them finds the neck."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from helpers.yolo import (
    HAS_RESTRICTED_LOADING,
    INSTALLED,
    NANO,
    SMALL,
    has_neck,
    predict,
    run_python,
    run_yolo,
    write_task_data,
)
from PIL import Image
from torch import nn
from ultralytics import YOLO
from ultralytics.data.augment import LetterBox

import shunted_lit.ultralytics as adapter
from shunted_lit.data.scenes import write_scenes
from shunted_lit.export.formats import openvino_core

pytestmark = pytest.mark.slow
IMPORT = "import shunted_lit.ultralytics"
TRAIN = "epochs=1, imgsz=64, batch=4, workers=0, plots=False, device='cpu', exist_ok=True"
needs_new_version = pytest.mark.skipif(not HAS_RESTRICTED_LOADING, reason="not in the oldest supported Ultralytics")


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
    """The checkpoint of a run of `shunted-lit yolo train`, which imports the neck before Ultralytics starts."""
    project = tmp_path_factory.mktemp("run")
    words = [f"model={model}", f"data={scenes / 'a/data.yaml'}", f"project={project}", "name=x"]
    run_python("-m", "shunted_lit", "yolo", "train", *words, *TRAIN.replace("'", "").split(", "))
    return project / "x/weights/best.pt"


def test_train_command_accepts_the_model_yaml(best):
    assert has_neck(best)


def test_checkpoint_can_be_fine_tuned(best, scenes):
    run_yolo(best, f"train(data={str(scenes / 'b/data.yaml')!r}, {TRAIN}, project={os.getcwd()!r}, name='x')")
    tuned, start = YOLO("x/weights/best.pt").model, YOLO(best).model
    assert has_neck("x/weights/best.pt")
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), start.parameters(), strict=True))


def test_checkpoint_predicts(best, scenes):
    output = run_yolo(best, f"predict({str(scenes / 'a/images/val/000000.png')!r}, conf=0.0)[0].boxes.shape")
    assert re.search(r"result: .*\[[1-9]\d*, 6\]", output)


def test_checkpoint_validates(best, scenes):
    output = run_yolo(best, f"val(data={str(scenes / 'a/data.yaml')!r}, imgsz=64, workers=0, plots=False).box.map")
    assert re.search(r"result: \d", output)


def test_checkpoint_exports_in_a_new_process(best, tmp_path):
    shutil.copy(best, tmp_path)
    run_yolo(tmp_path / "best.pt", "export(format='torchscript', imgsz=64)")
    assert (tmp_path / "best.torchscript").stat().st_size > 1e6


@needs_new_version
def test_training_on_several_data_sets_keeps_the_neck(model, scenes):
    data = [str(scenes / name / "data.yaml") for name in "ab"]
    run_yolo(model, f"train(data={data}, {TRAIN}, project={os.getcwd()!r})", IMPORT)
    checkpoints = sorted(Path().rglob("best.pt"))
    assert len(checkpoints) == 2
    assert all(map(has_neck, checkpoints))


@needs_new_version
def test_tuning_keeps_the_neck(model, scenes):
    data = str(scenes / "a/data.yaml")
    run_yolo(model, f"tune(data={data!r}, {TRAIN}, iterations=1, project={os.getcwd()!r}, val=False)", IMPORT)
    (checkpoint,) = Path().rglob("tune*/weights/best.pt")
    assert has_neck(checkpoint)


def test_ddp_worker_trains_the_neck(model, scenes):
    """For several GPUs, Ultralytics writes a script and runs it once a GPU: here in one process after another."""
    output = run_python("-c", f"""{IMPORT}
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.dist import generate_ddp_file
data = {str(scenes / "a/data.yaml")!r}
trainer = DetectionTrainer(overrides=dict(model={str(model)!r}, data=data, {TRAIN}, project={os.getcwd()!r}, name='x'))
print('file:', generate_ddp_file(trainer))
""")  # fmt: skip
    run_python(re.search("^file: (.+)$", output, re.MULTILINE)[1])
    assert has_neck("x/weights/best.pt")


@needs_new_version
def test_command_predicts_with_restricted_loading(best, scenes):
    words = ["predict", f"model={best}", f"source={scenes / 'a/images/val/000000.png'}", "imgsz=64", "save=False"]
    output = run_python("-m", "shunted_lit", "yolo", *words, ULTRALYTICS_SAFE_LOAD="1")
    assert "000000.png" in output


@pytest.fixture(scope="module")
def scaled(best, tmp_path_factory):
    """The trained detector with a neck that changes its outputs visibly."""
    path = tmp_path_factory.mktemp("scaled") / "scaled.pt"
    yolo = YOLO(best)
    nn.init.dirac_(yolo.model.model[11].out_proj.weight)
    yolo.save(path)
    return path


def load_torchscript(path):
    return torch.jit.load(path)


def load_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def load_openvino(path):
    (file,) = Path(path).glob("*.xml")
    # OpenVINO computes in bfloat16 by default on CPUs that support it.
    model = openvino_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(model(x.numpy())[0])


STATIC, DYNAMIC = [(640, 416)], [(640, 416), (416, 640), (20, 640), (31, 45)]


@pytest.mark.parametrize(
    ("load", "options", "sizes"),
    [
        (load_torchscript, {"format": "torchscript", "imgsz": (640, 416)}, STATIC),
        (load_onnx, {"format": "onnx", "imgsz": (640, 416), "simplify": False}, STATIC),
        (load_onnx, {"format": "onnx", "dynamic": True, "simplify": False}, DYNAMIC),
        (load_openvino, {"format": "openvino", "dynamic": True}, DYNAMIC),
    ],
    ids=["torchscript", "onnx", "onnx dynamic", "openvino dynamic"],
)
def test_exports_equal_the_model(scaled, tmp_path, load, options, sizes):
    """For a photograph of these sizes (H, W), padded to multiples of 32 as Ultralytics does."""
    model = YOLO(scaled).model.fuse().eval()
    shutil.copy(scaled, tmp_path / "model.pt")
    exported = load(YOLO(tmp_path / "model.pt").export(**options))
    for height, width in sizes:
        photograph = Image.fromarray(skimage.data.astronaut()).resize((width, height))
        padded = LetterBox((640, 640), auto=True, stride=32)(image=np.asarray(photograph))
        x = torch.from_numpy(padded.transpose(2, 0, 1).copy())[None].float() / 255
        torch.testing.assert_close(exported(x), predict(model, x), rtol=1e-5, atol=1e-3)  # boxes in pixels, scores 0..1


P2 = f"{NANO}-p2" if "yolo26-p2" in INSTALLED else "yolov8n-p2"


@pytest.mark.parametrize("name", [P2, *(f"{NANO}-{task}" for task in ("seg", "pose", "obb", "cls"))])
def test_each_task_trains_predicts_and_exports_with_the_neck(name, tmp_path):
    train_predict_and_export(name, SMALL, tmp_path)


@pytest.mark.parametrize(("form", "recipe"), [("light", None), ("pyramid", None), ("light", "finer_level")])
def test_each_form_of_the_neck_trains_predicts_and_exports(form, recipe, tmp_path):
    train_predict_and_export(NANO, {"form": form}, tmp_path, recipe)


def train_predict_and_export(name, neck, tmp_path, recipe=None):
    adapter.write_yaml(name, Path(f"{name}-shunted.yaml"), neck=neck, recipe=recipe)
    yolo = YOLO(f"{name}-shunted.yaml")
    data = write_task_data(tmp_path / "data", yolo.task)
    yolo.train(data=data, epochs=1, imgsz=64, batch=4, workers=0, plots=False, device="cpu", project=str(tmp_path))
    (checkpoint,) = tmp_path.rglob("best.pt")
    trained = YOLO(checkpoint)
    projections = [p for n, p in trained.model.named_parameters() if ".out_proj." in n and p.ndim == 4]
    assert projections
    assert all(projection.any() for projection in projections), "training has reached the neck"
    (image, *_) = sorted((tmp_path / "data").rglob("*.png"))
    (result,) = trained.predict(image, imgsz=64, conf=0.0, verbose=False)
    fields = {"segment": "masks", "pose": "keypoints", "obb": "obb", "classify": "probs"}
    assert len(getattr(result, fields.get(yolo.task, "boxes")).data) > 0
    for projection in projections:
        nn.init.dirac_(projection)
    x = torch.rand(1, 3, 64, 64)
    expected = predict(trained.model, x)
    trained.ckpt_path = str(tmp_path / "model.pt")  # Ultralytics writes the ONNX file next to it
    exported = load_onnx(trained.export(format="onnx", imgsz=64, simplify=False))
    while not isinstance(expected, torch.Tensor):
        expected = expected[0]
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-3)
