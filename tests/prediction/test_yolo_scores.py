"""Average precision of a YOLO by the size of objects, against pycocotools."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.yolo import NANO
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics import YOLO

from shunted_lit.cli import main
from shunted_lit.data.scenes import write_scenes
from shunted_lit.prediction.yolo_scores import evaluate, to_coco
from shunted_lit.ultralytics import write_yaml


def draw_objects(generator, images=6, classes=2):
    """Return a truth with objects of all sizes, and detections of them that are moved, lost, added and unsure."""
    truths, found = [], []
    for i in range(images):
        for _ in range(30):
            side = float(10 ** generator.uniform(0.6, 2.2))
            x, y = generator.uniform(0, 600, 2)
            label = torch.tensor([int(generator.integers(classes))])
            box = torch.tensor([[x, y, x + side, y + side]])
            truths += to_coco(box, label, i)
            if generator.uniform() < 0.8:
                moved = box + torch.tensor(generator.normal(0, 0.05 * side, 4)).float()
                found += [{**to_coco(moved, label, i)[0], "score": float(generator.uniform())}]
        found += [{**to_coco(torch.tensor([[5.0, 5, 30, 30]]), label, i)[0], "score": 0.3}]
    annotations = [{**truth, "id": i, "iscrowd": 0} for i, truth in enumerate(truths, 1)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(classes)]
    return {"images": [{"id": i} for i in range(images)], "annotations": annotations, "categories": categories}, found


def evaluate_with_pycocotools(truth, found, low, high, classes=None):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "info": {}}
        coco.createIndex()
        result = COCOeval(coco, coco.loadRes([dict(box) for box in found]), "bbox")
        result.params.maxDets, result.params.areaRng, result.params.areaRngLbl = [1000], [[low, high]], ["all"]
        if classes is not None:
            result.params.catIds = classes
        result.evaluate()
        result.accumulate()
    values = result.eval["precision"]
    return values[..., 0, 0]


def test_scores_equal_those_of_pycocotools():
    truth, found = draw_objects(np.random.default_rng(0))
    scores = evaluate(truth, found)
    bounds = {"AP": (0, 1e10), "AP tiny": (0, 256), "AP small": (0, 1024), "AP medium": (1024, 9216),
              "AP large": (9216, 1e10)}  # fmt: skip
    for name, (low, high) in bounds.items():
        precision = evaluate_with_pycocotools(truth, found, low, high)
        assert scores[name] == pytest.approx(precision[precision > -1].mean(), abs=1e-4), name
    assert scores["AP50"] == pytest.approx(evaluate_with_pycocotools(truth, found, 0, 1e10)[0].mean(), abs=1e-4)
    for label in range(2):
        expected = evaluate_with_pycocotools(truth, found, 0, 1e10, [label]).mean()
        assert scores[f"class {label}"] == pytest.approx(expected, abs=1e-4)
    assert len(set(scores.values())) == len(scores), "the sizes differ"


def test_sizes_without_objects_and_models_without_detections():
    truth, _ = draw_objects(np.random.default_rng(0))
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] < 1024]
    assert set(evaluate(truth, []).values()) == {0.0}
    exact = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for a in truth["annotations"]]
    scores = evaluate(truth, exact)
    assert scores["AP large"] is scores["AP medium"] is None
    assert scores["AP small"] == pytest.approx(1.0)


@pytest.fixture
def scenes():
    write_scenes(Path("set"), train=2, val=3, size=64)
    return Path("set/data.yaml")


def test_command_prints_and_writes_the_scores_of_a_split(scenes, capsys):
    write_yaml(NANO, f"{NANO}-shunted.yaml", neck={"form": "light"})
    Path(f"{NANO}-5.yaml").write_text(re.sub("nc: 80", "nc: 5", Path(f"{NANO}-shunted.yaml").read_text()))
    YOLO(f"{NANO}-5.yaml").save("model.pt")
    YOLO(f"{NANO}.yaml").save("other.pt")
    arguments = ["yolo", "score", "--model=model.pt", f"--data={scenes}", "--imgsz=64", "--split=train"]
    with pytest.raises(ValueError, match=r"the model must have as many classes as set/data\.yaml, 5, got 80"):
        main([*arguments[:2], "--model=other.pt", *arguments[3:]])
    main([*arguments, "--out=scores.json"])
    scores = json.loads(Path("scores.json").read_text())
    assert {"AP", "AP50", "AP tiny", "circle", "star"} <= set(scores)
    assert "AP tiny" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"scores\.json.* exists"):
        main([*arguments, "--out=scores.json"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split=test"], r"`split` must be an entry of this file, but it has no test; add it"),
        (["--imgsz=8"], "`imgsz` must be at least 32, got 8"),
        (["--model=none.pt"], "none.pt is not a readable model of Ultralytics"),
    ],
)
def test_wrong_arguments_are_one_line(scenes, arguments, message):
    YOLO(f"{NANO}.yaml").save("model.pt")
    with pytest.raises(ValueError, match=message):
        main(["yolo", "score", "--model=model.pt", f"--data={scenes}", *arguments])
