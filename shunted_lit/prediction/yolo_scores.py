"""Average precision of a YOLO by the size of objects, which Ultralytics' own `val` does not report."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor
from torchvision.ops import box_convert

from shunted_lit.data import YoloDataModule

# Areas in pixels of the image. COCO's, and below them objects of less than 16 x 16 pixels.
SIZES = {"all": (0, 1e10), "tiny": (0, 16**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
MAX_DETECTIONS = 1000  # COCO's 100 are fewer than some pictures have objects


def compute_scores(yolo: Any, data: str | Path, split: str, imgsz: int) -> dict[str, float | None]:
    """Compute average precision by name: of all objects, by size, and by class; None where there is no such object.

    Args:
        yolo: Ultralytics' `YOLO` or `RTDETR`.
        data: data.yaml of the data set.
        split: entry of data.yaml that names the images.
        imgsz: size that images are scaled to, as in Ultralytics.

    Raises:
        ValueError: the data are damaged or lack the split, or the model has other classes.
    """
    module = YoloDataModule(str(data), bad_boxes="drop")
    if not module.content.get(split):
        raise ValueError(f"{data}: `split` must be an entry of this file, but it has no {split}; add it.")
    dataset: Any = module.build_dataset(split, module.eval_transform)
    if len(yolo.names) != module.num_classes:
        raise ValueError(f"the model must have as many classes as {data}, {module.num_classes}, got {len(yolo.names)}.")
    images, truths, found = [], [], []
    for i in range(len(dataset)):
        image, target = dataset.read(i)
        height, width = image.shape[-2:]
        images.append({"id": i, "height": height, "width": width})
        truths += to_coco(target["boxes"].as_subclass(Tensor), target["labels"], i)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])  # Ultralytics takes BGR
        (result,) = yolo.predict(pixels, imgsz=imgsz, conf=0.001, max_det=MAX_DETECTIONS, verbose=False)
        boxes = to_coco(result.boxes.xyxy.cpu(), result.boxes.cls.int().cpu(), i)
        found += [{**box, "score": float(value)} for box, value in zip(boxes, result.boxes.conf, strict=True)]
    categories = [{"id": i, "name": name} for i, name in enumerate(module.class_names)]
    annotations = [{**truth, "id": i, "iscrowd": 0} for i, truth in enumerate(truths, 1)]
    return evaluate({"images": images, "annotations": annotations, "categories": categories}, found)


def to_coco(boxes: Tensor, labels: Tensor, image_id: int) -> list[dict[str, Any]]:
    """Return boxes (n, 4) as x1 y1 x2 y2 and their classes (n,) as entries of a COCO file."""
    return [
        {"image_id": image_id, "category_id": int(label), "bbox": box, "area": box[2] * box[3]}
        for box, label in zip(box_convert(boxes, "xyxy", "xywh").tolist(), labels, strict=True)
    ]


def evaluate(truth: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return average precision of detections `found`, by name: of all objects, by size, and by class."""
    ground = COCO(truth)
    names = [category["name"] for category in truth["categories"]]
    if not found:
        return dict.fromkeys(["AP", "AP50", *(f"AP {size}" for size in SIZES if size != "all"), *names], 0.0)
    evaluation = COCOeval_faster(ground, ground.loadRes(found), "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [1, 100, MAX_DETECTIONS]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [list(r) for r in SIZES.values()], list(SIZES)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = torch.as_tensor(evaluation.eval["precision"])[..., -1]  # thresholds, recalls, classes, sizes

    def mean(values: Tensor) -> float | None:
        values = values[values > -1]  # -1 marks classes without such an object
        return float(values.mean()) if len(values) else None

    scores = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, :, :, 0])}
    scores |= {f"AP {size}": mean(precision[..., i]) for i, size in enumerate(SIZES) if size != "all"}
    return scores | {name: mean(precision[:, :, i, 0]) for i, name in enumerate(names)}
