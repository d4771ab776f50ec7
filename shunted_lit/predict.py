"""What `shunted-lit predict` writes: pictures for people, and the same in the formats that other tools read."""

import csv
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from shunted_lit.data import ImagesDataModule
from shunted_lit.data.image_folder import in_validation
from shunted_lit.data.reading import read_image
from shunted_lit.data.segments import run_lengths
from shunted_lit.pictures import picture_of_boxes, picture_of_class, picture_of_map, png_palette
from shunted_lit.tasks import BaseTask
from shunted_lit.weights import read_checkpoint

Record = dict[str, Any]


class Writer:
    """Writes the predictions of a task on the images `names` (paths without suffix) into a folder.

    Args:
        out: the folder.
        names: of all images, by their number.
        class_names: name of each class.
        min_score: least score of what is written.
    """

    folders: Mapping[str, str]  # of the files an image, and their suffix
    tables: Sequence[str]  # files of all images together

    def __init__(self, out: Path, names: Sequence[str], class_names: Sequence[str], min_score: float):
        self.out, self.names, self.class_names, self.min_score = out, names, class_names, min_score

    def path(self, folder: str, index: int) -> Path:
        return self.out / folder / f"{self.names[index]}{self.folders[folder]}"

    def forbid_others(self) -> None:
        """Raises ValueError where the folder holds what this run would not write: two runs would be mixed up."""
        mine = {self.path(folder, i) for folder in self.folders for i in range(len(self.names))}
        mine |= {self.out / table for table in self.tables}
        others = sorted(path for path in self.out.rglob("*") if path.is_file() and path not in mine)
        if others:
            raise ValueError(
                f"{others[0]}: is in the folder to write to, but not of these images ({len(others)} such files); "
                "name another folder by --predictions.out"
            )

    def write(self, index: int, image: Image.Image, prediction: Any) -> Record:
        """Writes the files of an image; returns what its tables need."""
        raise NotImplementedError

    def finish(self, records: Sequence[Record]) -> str:
        """Writes the tables, from the records of all images in order; returns what was found, in words."""
        raise NotImplementedError

    def save(self, folder: str, index: int, picture: Image.Image) -> None:
        path = self.path(folder, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    def write_names(self) -> None:
        (self.out / "classes.txt").write_text("".join(f"{name}\n" for name in self.class_names), encoding="utf-8")

    def told(self, labels: Sequence[int]) -> str:
        """How many there are of each class, the frequent ones first."""
        counts = Counter(labels).most_common()
        first = ", ".join(f"{self.class_names[label]} {count}" for label, count in counts[:5])
        return first + (", ..." if len(counts) > 5 else "")


class BoxWriter(Writer):
    """Pictures, `labels/NAME.txt` (YOLO: class cx cy w h score, in fractions of the image), `classes.txt`, their names,
    and `predictions.json`, in COCO's format with a `score` to each annotation, and run lengths where there are masks.
    Its categories are 1, 2, ... in the order of the classes: those of the data are not in a checkpoint."""

    folders = {"pictures": ".png", "labels": ".txt"}  # noqa: RUF012
    tables = ("predictions.json", "classes.txt")

    def write(self, index: int, image: Image.Image, prediction: dict[str, Tensor]) -> Record:
        kept = prediction["scores"] >= self.min_score
        if "masks" in prediction:
            kept &= prediction["masks"].flatten(1).any(1)  # one without a pixel is no object
        found = {key: value[kept].cpu() for key, value in prediction.items()}
        self.save("pictures", index, picture_of_boxes(pil_to_tensor(image), found, self.class_names, self.min_score))
        size = torch.tensor([image.width, image.height])
        corners = found["boxes"].float()
        fractions = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        fractions /= torch.cat([size, size])
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        path = self.path("labels", index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n"
                for label, box, score in zip(labels, fractions.tolist(), scores, strict=True)
            )
        )
        objects = []
        for i, (x1, y1, x2, y2) in enumerate(corners.tolist()):
            entry: Record = {
                "category_id": labels[i] + 1,
                "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                "area": round((x2 - x1) * (y2 - y1), 2),
                "iscrowd": 0,
                "score": round(scores[i], 6),
            }
            if "masks" in found:
                entry |= {"segmentation": run_lengths(found["masks"][i].numpy()), "area": int(found["masks"][i].sum())}
            objects.append(entry)
        return {"width": image.width, "height": image.height, "objects": objects}

    def finish(self, records: Sequence[Record]) -> str:
        images: list[Record] = []
        annotations: list[Record] = []
        for index, record in enumerate(records):
            size = {"width": record["width"], "height": record["height"]}
            images.append({"id": index + 1, "file_name": record["file_name"], **size})
            for entry in record["objects"]:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **entry})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.class_names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (self.out / "predictions.json").write_text(json.dumps(content), encoding="utf-8")
        self.write_names()
        labels = [entry["category_id"] - 1 for entry in annotations]
        return f"{len(labels)} object{'' if len(labels) == 1 else 's'}{': ' if labels else ''}{self.told(labels)}"


class MapWriter(Writer):
    """Pictures, `masks/NAME.png`, a class for each pixel, in the colours of the pictures, and `classes.txt`, a name a
    line: masks and names as `MaskFolderDataModule` reads them."""

    folders = {"pictures": ".png", "masks": ".png"}  # noqa: RUF012
    tables = ("classes.txt",)

    def write(self, index: int, image: Image.Image, prediction: Tensor) -> Record:
        label_map = prediction.byte().cpu()
        mask = Image.fromarray(label_map.numpy(), mode="P")
        mask.putpalette(png_palette(len(self.class_names)))
        self.save("masks", index, mask)
        self.save("pictures", index, picture_of_map(pil_to_tensor(image), label_map, self.class_names))
        return {"pixels": torch.bincount(label_map.flatten().long(), minlength=len(self.class_names)).tolist()}

    def finish(self, records: Sequence[Record]) -> str:
        self.write_names()
        pixels = [sum(counts) for counts in zip(*(record["pixels"] for record in records), strict=True)]
        order = sorted(range(len(pixels)), key=lambda label: -pixels[label])
        shares = [f"{self.class_names[i]} {pixels[i] / sum(pixels):.1%}" for i in order[:5] if pixels[i]]
        count = sum(map(bool, pixels))
        return f"{count} class{'' if count == 1 else 'es'}: {', '.join(shares)}"


class ClassWriter(Writer):
    """Pictures, and `predictions.csv`: file, the best class and its probability, and those of the next four."""

    folders = {"pictures": ".png"}  # noqa: RUF012
    tables = ("predictions.csv",)

    def write(self, index: int, image: Image.Image, prediction: Tensor) -> Record:
        scores, labels = (part.tolist() for part in prediction.float().cpu().topk(min(5, len(self.class_names))))
        names = [self.class_names[label] for label in labels]
        self.save("pictures", index, picture_of_class(pil_to_tensor(image), labels, scores, self.class_names))
        return {"label": labels[0], "row": [x for pair in zip(names, scores, strict=True) for x in pair]}

    def finish(self, records: Sequence[Record]) -> str:
        count = min(5, len(self.class_names))
        with (self.out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            heads = ("class", "probability"), *((f"class{i}", f"probability{i}") for i in range(2, count + 1))
            writer.writerow(["file", *(name for pair in heads for name in pair)])
            for record in records:
                row = (f"{value:.6f}" if isinstance(value, float) else value for value in record["row"])
                writer.writerow([record["file_name"], *row])
        return self.told([record["label"] for record in records])


# By what a task learns from.
WRITERS: Mapping[str, type[Writer]] = {"boxes": BoxWriter, "masks": BoxWriter, "map": MapWriter, "class": ClassWriter}


class PredictionWriter(BasePredictionWriter):
    """Writes each image's files as soon as it is predicted, and tables and a line of summary at the end.

    Boxes and masks: pictures/*.png, labels/*.txt (YOLO's), classes.txt, predictions.json (COCO's). Label maps:
    pictures/*.png, masks/*.png, classes.txt. Classes: pictures/*.png, predictions.csv. The same images and checkpoint
    give the same files, byte for byte.

    Args:
        out: folder to write to; what it holds must be of the same images.
        min_score: least score of the boxes that are written and drawn; of several in one place the best is drawn.
    """

    def __init__(self, out: str = "predictions", min_score: float = 0.3):
        super().__init__("batch")
        if not 0 <= min_score <= 1:
            raise ValueError(f"predictions.min_score is {min_score}, but 0 to 1 is possible")
        self.out, self.min_score = Path(out), min_score
        self.records: dict[int, Record] = {}
        self.writer: Any = None
        self.began = 0.0
        self.summary = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImagesDataModule) or not isinstance(pl_module, BaseTask):
            raise ValueError(
                f"predict takes images by --data.images FOLDER, but the data are {type(data).__name__}; a "
                "checkpoint is enough, leave --config and --data out"
            )
        self.records, self.began = {}, time.monotonic()
        self.data = data
        self.writer = WRITERS[pl_module.annotation](self.out, data.names, pl_module.class_names, self.min_score)
        if data.would_read(self.out):
            raise ValueError(
                f"{self.out}: is within the images, {data.root}, and the next run would read what is written; name "
                "another folder by --predictions.out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out}: is there and no folder; name another by --predictions.out")
        if trainer.is_global_zero:
            self.writer.forbid_others()
        self.out.mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for index, found in zip(map(int, batch[1]), prediction, strict=True):
            path = self.data.paths[index]
            record = self.writer.write(index, read_image(path), found)
            self.records[index] = {"file_name": path.relative_to(self.data.root).as_posix(), **record}

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = [self.records]
        if dist.is_available() and dist.is_initialized():
            parts = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(parts, self.records)
        if not trainer.is_global_zero:
            return
        records = {index: record for part in parts for index, record in part.items()}
        told = self.writer.finish([records[index] for index in sorted(records)])
        files = ", ".join((*self.writer.folders, *self.writer.tables))
        images = f"{len(records)} image{'' if len(records) == 1 else 's'}"
        self.summary = f"{images}, {told}; {files} in {self.out} ({time.monotonic() - self.began:.0f} s)"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.summary:
            print(self.summary)  # here, as it would stand above the progress bar otherwise


def of_checkpoint(path: str, predicts: bool = True) -> dict[str, Any]:
    """The settings that a checkpoint of `shunted-lit fit` knows: its task, and its data.

    Args:
        path: the checkpoint.
        predicts: images are to be named by the user, and only prepared as in training; else the data are its own.

    Raises:
        ValueError: a file that is no such checkpoint.
    """
    content = read_checkpoint(path)
    if "task" not in content or "hyper_parameters" not in content:
        raise ValueError(f"{path} holds no run of shunted-lit fit, and does not tell its task")
    arguments = {name: value for name, value in content["hyper_parameters"].items() if not name.startswith("_")}
    trained = content.get("datamodule_hyper_parameters", {})
    data: dict[str, Any] = {"class_path": "shunted_lit.data.ImagesDataModule", "init_args": {}}
    if predicts and content["task"] == "ClassificationTask":
        size = trained.get("image_size", trained.get("size"))
        data["init_args"] = {**in_validation(trained), "image_size": size}
    if not predicts:
        linked = ("num_classes", "class_names", "annotation")  # which task and data have from each other
        arguments = {name: value for name, value in arguments.items() if name not in linked}
        known = {k: value for k, value in trained.items() if not k.startswith("_") and k not in linked}
        data = {"class_path": trained.get("_class_path"), "init_args": known}
    settings = {
        "model": {"class_path": f"shunted_lit.tasks.{content['task']}", "init_args": arguments},
        "data": data,
    }
    return settings if data["class_path"] else {"model": settings["model"]}
