"""Writers of `shunted-lit predict`: pictures, and files in formats that other tools read."""

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
from shunted_lit.utils.checks import check_fraction
from shunted_lit.utils.files import fingerprint
from shunted_lit.visualization.plots import picture_of_boxes, picture_of_class, picture_of_map, png_palette

log = logging.getLogger(__name__)

Record = dict[str, Any]
CHUNKS = ".chunks"  # folder inside the output folder until all images are done
TOP_CLASSES = 5  # written for each image by a classifier


class Writer:
    """Base class: writes the predictions of one kind of task to a folder.

    Args:
        out: the folder.
        names: of the images: their paths without suffix.
        class_names: name of each class.
        min_score: lowest score that is written.
        pictures: whether pictures are written.
    """

    folders: Mapping[str, str]  # of the files written per image, with their suffix
    tables: Sequence[str]  # files written once

    def __init__(
        self, out: Path, names: Sequence[str], class_names: Sequence[str], min_score: float, pictures: bool = True
    ):
        self.out, self.names, self.class_names, self.min_score = out, names, class_names, min_score
        if not pictures:
            self.folders = {folder: suffix for folder, suffix in self.folders.items() if folder != "pictures"}

    def path(self, folder: str, index: int) -> Path:
        """Return the path of a file of image `index`; its folder is created."""
        path = self.out / folder / f"{self.names[index]}{self.folders[folder]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def check_folder(self) -> None:
        """Raise ValueError if the folder holds files that this run would not write: two runs would mix."""
        own = {self.out / table for table in self.tables}
        for folder, suffix in self.folders.items():
            own |= {self.out / folder / f"{name}{suffix}" for name in self.names}
        chunks = self.out / CHUNKS
        others = sorted(p for p in self.out.rglob("*") if p.is_file() and p not in own and chunks not in p.parents)
        if others:
            raise ValueError(
                f"{others[0]}: not a file of this prediction, and the output folder must hold no others "
                f"({len(others)} found); choose another --predictions.out."
            )

    def select(self, prediction: Any) -> Any:
        """Return what of a prediction is written and drawn, on the CPU."""
        raise NotImplementedError

    def write(self, index: int, size: tuple[int, int], selected: Any) -> Record:
        """Write the files of image `index`, of `size` (H, W); return what the tables need, as plain values."""
        raise NotImplementedError

    def draw(self, image: Tensor, selected: Any) -> Image.Image:
        """Draw what is selected on its image (3, H, W), uint8."""
        raise NotImplementedError

    def write_tables(self, records: Iterable[Record]) -> str:
        """Write the tables from the records of all images in order, iterated more than once; return a summary."""
        raise NotImplementedError

    def write_class_names(self) -> None:
        (self.out / "classes.txt").write_text("".join(f"{name}\n" for name in self.class_names), encoding="utf-8")

    def describe_counts(self, counts: "Counter[int]") -> str:
        """List the five most frequent classes with their counts."""
        frequent = ", ".join(f"{self.class_names[label]} {count}" for label, count in counts.most_common(5))
        return frequent + (", ..." if len(counts) > 5 else "")


class BoxWriter(Writer):
    """Writes pictures, `labels/NAME.txt` (YOLO), `predictions.json` (COCO) and `classes.txt`.

    A line of YOLO's is `class cx cy w h score`, in fractions of the image. COCO annotations have a `score`, and run
    lengths for masks. Category ids are 1, 2, ... in class order: a checkpoint does not store those of the data.
    """

    folders = {"pictures": ".png", "labels": ".txt"}  # noqa: RUF012
    tables = ("predictions.json", "classes.txt")

    def select(self, prediction: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = prediction["scores"] >= self.min_score
        if "masks" in prediction:
            kept &= prediction["masks"].flatten(1).any(1)  # an empty mask is no object
        return {key: value[kept].cpu() for key, value in prediction.items()}

    def draw(self, image: Tensor, selected: dict[str, Tensor]) -> Image.Image:
        return picture_of_boxes(image, selected, self.class_names, self.min_score)

    def write(self, index: int, size: tuple[int, int], selected: dict[str, Tensor]) -> Record:
        height, width = size
        boxes = selected["boxes"].float()
        fractions = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        fractions /= torch.tensor([width, height, width, height])
        labels, scores = selected["labels"].tolist(), selected["scores"].tolist()
        lines = (
            f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n"
            for label, box, score in zip(labels, fractions.tolist(), scores, strict=True)
        )
        self.path("labels", index).write_text("".join(lines))
        objects = []
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            entry: Record = {
                "category_id": labels[i] + 1,
                "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                "area": round((x2 - x1) * (y2 - y1), 2),
                "iscrowd": 0,
                "score": round(scores[i], 6),
            }
            if "masks" in selected:
                mask = selected["masks"][i]
                entry |= {"segmentation": encode_run_lengths(mask.numpy()), "area": int(mask.sum())}
            objects.append(entry)
        return {"width": width, "height": height, "objects": objects}

    def write_tables(self, records: Iterable[Record]) -> str:
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
        with (self.out / "predictions.json").open("w", encoding="utf-8") as file:  # streamed: it may be large
            for name, entries in lists.items():
                file.write(f'{"{" if name == "images" else ", "}"{name}": [')
                for i, entry in enumerate(entries):
                    file.write((", " if i else "") + json.dumps(entry))
                file.write("]")
            file.write("}")
        self.write_class_names()
        total = pluralize(counts.total(), "object", "objects")
        return f"{total}: {self.describe_counts(counts)}" if counts else total


class MapWriter(Writer):
    """Writes pictures, `masks/NAME.png` (the class of each pixel, with a palette) and `classes.txt`.

    `MaskFolderDataModule` reads these masks and names.
    """

    folders = {"pictures": ".png", "masks": ".png"}  # noqa: RUF012
    tables = ("classes.txt",)

    def select(self, prediction: Tensor) -> Tensor:
        return prediction.byte().cpu()

    def draw(self, image: Tensor, selected: Tensor) -> Image.Image:
        return picture_of_map(image, selected, self.class_names)

    def write(self, index: int, size: tuple[int, int], selected: Tensor) -> Record:
        mask = Image.fromarray(selected.numpy(), mode="P")
        mask.putpalette(png_palette(len(self.class_names)))
        mask.save(self.path("masks", index))
        return {"pixels": torch.bincount(selected.flatten().long(), minlength=len(self.class_names)).tolist()}

    def write_tables(self, records: Iterable[Record]) -> str:
        self.write_class_names()
        pixels: Counter[int] = Counter()
        for record in records:
            pixels.update(dict(enumerate(record["pixels"])))
        shares = [f"{self.class_names[label]} {n / pixels.total():.1%}" for label, n in pixels.most_common(5) if n]
        return f"{pluralize(len(+pixels), 'class', 'classes')}: {', '.join(shares)}"


class ClassWriter(Writer):
    """Writes pictures and `predictions.csv`: file, and the most probable classes with their probabilities."""

    folders = {"pictures": ".png"}  # noqa: RUF012
    tables = ("predictions.csv",)

    def select(self, prediction: Tensor) -> tuple[list[int], list[float]]:
        """Return the best labels and their scores."""
        scores, labels = prediction.float().cpu().topk(min(TOP_CLASSES, len(self.class_names)))
        return labels.tolist(), scores.tolist()

    def draw(self, image: Tensor, selected: tuple[list[int], list[float]]) -> Image.Image:
        return picture_of_class(image, *selected, self.class_names)

    def write(self, index: int, size: tuple[int, int], selected: tuple[list[int], list[float]]) -> Record:
        return dict(zip(("labels", "scores"), selected, strict=True))

    def write_tables(self, records: Iterable[Record]) -> str:
        counts: Counter[int] = Counter()
        with (self.out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            ranks = ["", *range(2, min(TOP_CLASSES, len(self.class_names)) + 1)]
            writer.writerow(["file", *(f"{column}{rank}" for rank in ranks for column in ("class", "probability"))])
            for record in records:
                row = [record["file_name"]]
                for label, score in zip(record["labels"], record["scores"], strict=True):
                    row += [self.class_names[label], f"{score:.6f}"]
                writer.writerow(row)
                counts[record["labels"][0]] += 1
        return self.describe_counts(counts)


# By what a task learns from.
WRITERS: Mapping[str, type[Writer]] = {"boxes": BoxWriter, "masks": BoxWriter, "map": MapWriter, "class": ClassWriter}


class PredictionWriter(BasePredictionWriter):
    """Write the files of each image once it is predicted, and tables and a summary at the end.

    - Boxes and masks: `pictures/*.png`, `labels/*.txt` (YOLO), `classes.txt`, `predictions.json` (COCO).
    - Label maps: `pictures/*.png`, `masks/*.png`, `classes.txt`.
    - Classes: `pictures/*.png`, `predictions.csv`.

    The same images and checkpoint give the same files, byte for byte.

    Images are divided into chunks, which devices share and `out/.chunks` keeps until all are done: after an
    interruption the same command resumes, with any number of devices.

    Args:
        out: Folder to write to; may hold only files of the same prediction.
        min_score: Lowest score of boxes that are written and drawn; of overlapping boxes only the best is drawn.
        pictures: Whether to draw pictures, which take time and space for many images.
    """

    def __init__(self, out: str = "predictions", min_score: float = 0.3, pictures: bool = True):
        super().__init__("batch")
        check_fraction(**{"predictions.min_score": min_score})
        self.out, self.min_score, self.pictures = Path(out), min_score, pictures
        self.chunks: Any = None
        self.writer: Any = None
        self.start_time = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImagesDataModule) or not isinstance(pl_module, BaseTask):
            raise ValueError(
                f"predict takes images by --data.images, got {type(data).__name__}; a checkpoint is enough, leave out "
                "--config and --data."
            )
        self.start_time, self.data = time.monotonic(), data
        writer = WRITERS[pl_module.annotation]
        self.writer = writer(self.out, data.names, pl_module.class_names, self.min_score, self.pictures)
        if data.would_read(self.out):
            raise ValueError(
                f"--predictions.out must not be inside the images {data.root}, got {self.out}: the next run would read "
                "what is written; choose another folder."
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--predictions.out must be a folder, but {self.out} is a file; choose another name.")
        if trainer.is_global_zero:
            self.writer.check_folder()
        data.to_do = lambda: self.remaining_images(trainer, pl_module)

    def remaining_images(self, trainer: Trainer, pl_module: LightningModule) -> list[int]:
        """Return the images of this rank; called once the weights are loaded, which stored chunks must belong to."""
        weights = (v.reshape(-1).view(torch.uint8).numpy(force=True) for v in pl_module.state_dict().values())
        hparams = {key: value for key, value in pl_module.hparams.items() if not key.startswith("_")}
        settings = {
            "weights": fingerprint(*weights),
            **self.data.state(),
            "min_score": self.min_score,
            "pictures": self.pictures,
            **json.loads(json.dumps(hparams)),
        }
        self.chunks = Chunks(self.out / CHUNKS, len(self.data.names), settings)
        if trainer.is_global_zero:
            self.chunks.start(trainer.world_size)
        trainer.strategy.barrier()
        self.chunks.load()
        images = self.chunks.remaining_images(trainer.global_rank, trainer.world_size)
        trainer.strategy.barrier()  # no rank may complete a chunk before all have listed them
        if complete := self.chunks.count_complete():
            log.info("%s: resuming after %d of %d chunks", self.out, complete, len(self.chunks.all_chunks))
        return images

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        for image, index, output in zip(batch[0], map(int, batch[1]), prediction, strict=True):
            path, selected = self.data.paths[index], self.writer.select(output)
            if self.pictures:
                picture = self.writer.draw(pil_to_tensor(read_image(path)), selected)
                picture.save(self.writer.path("pictures", index))
            record = self.writer.write(index, image.shape[-2:], selected)
            self.chunks.write(index, {"file_name": path.relative_to(self.data.root).as_posix(), **record})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.chunks is not None:
            self.chunks.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the tables once all chunks are complete; Lightning calls no earlier hook if no image is left."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        complete, total = self.chunks.count_complete(), len(self.chunks.all_chunks)
        if complete < total:  # such as after limit_predict_batches
            self.chunks.release()
            print(f"{complete} of {total} chunks are complete; run the same command again to resume")
            return
        summary = self.writer.write_tables(self.chunks)
        self.chunks.remove()
        files = ", ".join((*self.writer.folders, *self.writer.tables))
        images = pluralize(self.chunks.count, "image", "images")
        print(f"{images}, {summary}; {files} in {self.out} ({time.monotonic() - self.start_time:.0f} s)")


def pluralize(count: int, singular: str, plural: str) -> str:
    return f"{count} {singular if count == 1 else plural}"
