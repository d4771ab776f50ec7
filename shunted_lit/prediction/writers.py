"""What `shunted-lit predict` writes: pictures for people, and the same in the formats that other tools read."""

import csv
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from shunted_lit.data import ImagesDataModule
from shunted_lit.data.image_io import read_image
from shunted_lit.data.masks import encode_run_lengths
from shunted_lit.prediction.chunks import Chunks
from shunted_lit.tasks import BaseTask
from shunted_lit.utils.files import fingerprint
from shunted_lit.visualization.plots import picture_of_boxes, picture_of_class, picture_of_map, png_palette

log = logging.getLogger(__name__)

Record = dict[str, Any]
PARTS = ".parts"  # in the folder that is written to, until all images are done


class Writer:
    """Writes the predictions of a task on the images `names` (paths without suffix) into a folder.

    Args:
        out: the folder.
        names: of all images, by their number.
        class_names: name of each class.
        min_score: least score of what is written.
        pictures: whether to draw.
    """

    folders: Mapping[str, str]  # of the files an image, and their suffix
    tables: Sequence[str]  # files of all images together

    def __init__(
        self, out: Path, names: Sequence[str], class_names: Sequence[str], min_score: float, pictures: bool = True
    ):
        self.out, self.names, self.class_names, self.min_score = out, names, class_names, min_score
        if not pictures:
            self.folders = {folder: suffix for folder, suffix in self.folders.items() if folder != "pictures"}

    def path(self, folder: str, index: int) -> Path:
        return self.out / folder / f"{self.names[index]}{self.folders[folder]}"

    def forbid_others(self) -> None:
        """Raises ValueError where the folder holds what this run would not write: two runs would be mixed up."""
        mine = {self.path(folder, i) for folder in self.folders for i in range(len(self.names))}
        mine |= {self.out / table for table in self.tables}
        parts = self.out / PARTS
        others = sorted(p for p in self.out.rglob("*") if p.is_file() and p not in mine and parts not in p.parents)
        if others:
            raise ValueError(
                f"{others[0]}: is in the folder to write to, but not of these images ({len(others)} such files); "
                "name another folder by --predictions.out"
            )

    def keep(self, prediction: Any) -> Any:
        """What of a prediction is written and drawn, on the CPU."""
        raise NotImplementedError

    def write(self, index: int, size: tuple[int, int], kept: Any) -> Record:
        """Writes the files of an image of this height and width; returns what its tables need, plain values."""
        raise NotImplementedError

    def draw(self, image: Tensor, kept: Any) -> Image.Image:
        """The picture of what is kept on its image (3, H, W), uint8."""
        raise NotImplementedError

    def finish(self, records: Iterable[Record]) -> str:
        """Writes the tables, from the records of all images in order, read as often as needed; returns what was found,
        in words."""
        raise NotImplementedError

    def save(self, folder: str, index: int, picture: Image.Image) -> None:
        path = self.path(folder, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    def write_names(self) -> None:
        (self.out / "classes.txt").write_text("".join(f"{name}\n" for name in self.class_names), encoding="utf-8")

    def told(self, counts: "Counter[int]") -> str:
        """How many there are of each class, the frequent ones first."""
        first = ", ".join(f"{self.class_names[label]} {count}" for label, count in counts.most_common(5))
        return first + (", ..." if len(counts) > 5 else "")


class BoxWriter(Writer):
    """Pictures, `labels/NAME.txt` (YOLO: class cx cy w h score, in fractions of the image), `classes.txt`, their names,
    and `predictions.json`, in COCO's format with a `score` to each annotation, and run lengths where there are masks.
    Its categories are 1, 2, ... in the order of the classes: those of the data are not in a checkpoint."""

    folders = {"pictures": ".png", "labels": ".txt"}  # noqa: RUF012
    tables = ("predictions.json", "classes.txt")

    def keep(self, prediction: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = prediction["scores"] >= self.min_score
        if "masks" in prediction:
            kept &= prediction["masks"].flatten(1).any(1)  # one without a pixel is no object
        return {key: value[kept].cpu() for key, value in prediction.items()}

    def draw(self, image: Tensor, found: dict[str, Tensor]) -> Image.Image:
        return picture_of_boxes(image, found, self.class_names, self.min_score)

    def write(self, index: int, size: tuple[int, int], found: dict[str, Tensor]) -> Record:
        height, width = size
        corners = found["boxes"].float()
        fractions = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        fractions /= torch.tensor([width, height, width, height])
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
                entry |= {
                    "segmentation": encode_run_lengths(found["masks"][i].numpy()),
                    "area": int(found["masks"][i].sum()),
                }
            objects.append(entry)
        return {"width": width, "height": height, "objects": objects}

    def finish(self, records: Iterable[Record]) -> str:
        counts: Counter[int] = Counter()

        def images() -> Iterator[Record]:
            for number, record in enumerate(records, 1):
                yield {"id": number, **{key: record[key] for key in ("file_name", "width", "height")}}

        def annotations() -> Iterator[Record]:
            for number, record in enumerate(records, 1):
                for entry in record["objects"]:
                    counts[entry["category_id"] - 1] += 1
                    yield {"id": counts.total(), "image_id": number, **entry}

        categories = ({"id": i, "name": name} for i, name in enumerate(self.class_names, 1))
        lists = {"images": images(), "annotations": annotations(), "categories": categories}
        with (self.out / "predictions.json").open("w", encoding="utf-8") as file:  # as it comes: it may be large
            for name, entries in lists.items():
                file.write(f'{"{" if name == "images" else ", "}"{name}": [')
                for i, entry in enumerate(entries):
                    file.write((", " if i else "") + json.dumps(entry))
                file.write("]")
            file.write("}")
        self.write_names()
        total = counts.total()
        return f"{total} object{'' if total == 1 else 's'}{': ' if total else ''}{self.told(counts)}"


class MapWriter(Writer):
    """Pictures, `masks/NAME.png`, a class for each pixel, in the colours of the pictures, and `classes.txt`, a name a
    line: masks and names as `MaskFolderDataModule` reads them."""

    folders = {"pictures": ".png", "masks": ".png"}  # noqa: RUF012
    tables = ("classes.txt",)

    def keep(self, prediction: Tensor) -> Tensor:
        return prediction.byte().cpu()

    def draw(self, image: Tensor, label_map: Tensor) -> Image.Image:
        return picture_of_map(image, label_map, self.class_names)

    def write(self, index: int, size: tuple[int, int], label_map: Tensor) -> Record:
        mask = Image.fromarray(label_map.numpy(), mode="P")
        mask.putpalette(png_palette(len(self.class_names)))
        self.save("masks", index, mask)
        return {"pixels": torch.bincount(label_map.flatten().long(), minlength=len(self.class_names)).tolist()}

    def finish(self, records: Iterable[Record]) -> str:
        self.write_names()
        pixels = [0] * len(self.class_names)
        for record in records:
            pixels = [total + count for total, count in zip(pixels, record["pixels"], strict=True)]
        order = sorted(range(len(pixels)), key=lambda label: -pixels[label])
        shares = [f"{self.class_names[i]} {pixels[i] / sum(pixels):.1%}" for i in order[:5] if pixels[i]]
        count = sum(map(bool, pixels))
        return f"{count} class{'' if count == 1 else 'es'}: {', '.join(shares)}"


class ClassWriter(Writer):
    """Pictures, and `predictions.csv`: file, the best class and its probability, and those of the next four."""

    folders = {"pictures": ".png"}  # noqa: RUF012
    tables = ("predictions.csv",)

    def keep(self, prediction: Tensor) -> tuple[list[int], list[float]]:
        """The best labels, and their scores."""
        scores, labels = prediction.float().cpu().topk(min(5, len(self.class_names)))
        return labels.tolist(), scores.tolist()

    def draw(self, image: Tensor, best: tuple[list[int], list[float]]) -> Image.Image:
        return picture_of_class(image, *best, self.class_names)

    def write(self, index: int, size: tuple[int, int], best: tuple[list[int], list[float]]) -> Record:
        labels, scores = best
        names = [self.class_names[label] for label in labels]
        return {"label": labels[0], "row": [x for pair in zip(names, scores, strict=True) for x in pair]}

    def finish(self, records: Iterable[Record]) -> str:
        count = min(5, len(self.class_names))
        counts: Counter[int] = Counter()
        with (self.out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            heads = ("class", "probability"), *((f"class{i}", f"probability{i}") for i in range(2, count + 1))
            writer.writerow(["file", *(name for pair in heads for name in pair)])
            for record in records:
                row = (f"{value:.6f}" if isinstance(value, float) else value for value in record["row"])
                writer.writerow([record["file_name"], *row])
                counts[record["label"]] += 1
        return self.told(counts)


# By what a task learns from.
WRITERS: Mapping[str, type[Writer]] = {"boxes": BoxWriter, "masks": BoxWriter, "map": MapWriter, "class": ClassWriter}


class PredictionWriter(BasePredictionWriter):
    """Writes each image's files as soon as it is predicted, and tables and a line of summary at the end.

    Boxes and masks: pictures/*.png, labels/*.txt (YOLO's), classes.txt, predictions.json (COCO's). Label maps:
    pictures/*.png, masks/*.png, classes.txt. Classes: pictures/*.png, predictions.csv. The same images and checkpoint
    give the same files, byte for byte.

    Several devices share the images in parts, which `out/.parts` keeps until all are done: the same command goes on
    where one was cut off, with as many devices as there are then.

    Args:
        out: folder to write to; what it holds must be of the same images.
        min_score: least score of the boxes that are written and drawn; of several in one place the best is drawn.
        pictures: whether to draw pictures, which takes time and space where images are many.
    """

    def __init__(self, out: str = "predictions", min_score: float = 0.3, pictures: bool = True):
        super().__init__("batch")
        if not 0 <= min_score <= 1:
            raise ValueError(f"predictions.min_score is {min_score}, but 0 to 1 is possible")
        self.out, self.min_score, self.pictures = Path(out), min_score, pictures
        self.parts: Any = None
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
        self.began, self.summary, self.data = time.monotonic(), "", data
        kind = WRITERS[pl_module.annotation]
        self.writer = kind(self.out, data.names, pl_module.class_names, self.min_score, self.pictures)
        if data.would_read(self.out):
            raise ValueError(
                f"{self.out}: is within the images, {data.root}, and the next run would read what is written; name "
                "another folder by --predictions.out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out}: is there and no folder; name another by --predictions.out")
        if trainer.is_global_zero:
            self.writer.forbid_others()
        data.to_do = lambda: self.to_do(trainer, pl_module)

    def to_do(self, trainer: Trainer, pl_module: LightningModule) -> list[int]:
        """Images of this process; asked for once the weights are there, which tell whether parts are of them."""
        settings = {key: value for key, value in pl_module.hparams.items() if not key.startswith("_")}
        origin = {
            "weights": fingerprint(
                *(v.reshape(-1).view(torch.uint8).numpy(force=True) for v in pl_module.state_dict().values())
            ),
            **self.data.state(),
            "min_score": self.min_score,
            "pictures": self.pictures,
            **json.loads(json.dumps(settings)),
        }
        self.parts = Chunks(self.out / PARTS, len(self.data.names), origin)
        if trainer.is_global_zero:
            self.parts.begin(trainer.world_size)
        trainer.strategy.barrier()
        self.parts.join()
        images = self.parts.to_do(trainer.global_rank, trainer.world_size)
        trainer.strategy.barrier()  # before one of them has done a part
        if done := self.parts.done():
            log.info("%s: %d of %d parts were done before", self.out, done, len(self.parts.numbers))
        return images

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
        for image, index, found in zip(batch[0], map(int, batch[1]), prediction, strict=True):
            path, kept = self.data.paths[index], self.writer.keep(found)
            if self.pictures:
                self.writer.save("pictures", index, self.writer.draw(pil_to_tensor(read_image(path)), kept))
            record = self.writer.write(index, image.shape[-2:], kept)
            self.parts.add(index, {"file_name": path.relative_to(self.data.root).as_posix(), **record})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.parts is not None:
            self.parts.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Here, as Lightning calls nothing before where all parts were done; and the progress bar is closed."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        if (done := self.parts.done()) < len(self.parts.numbers):  # as limit_predict_batches may leave it
            self.parts.release()
            print(f"{done} of {len(self.parts.numbers)} parts are done; the same command goes on")
            return
        told, count = self.writer.finish(self.parts), self.parts.count
        self.parts.remove()
        files = ", ".join((*self.writer.folders, *self.writer.tables))
        images = f"{count} image{'' if count == 1 else 's'}"
        print(f"{images}, {told}; {files} in {self.out} ({time.monotonic() - self.began:.0f} s)")
