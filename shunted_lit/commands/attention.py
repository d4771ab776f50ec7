"""`shunted-lit attention`: draw what a network attends to from a point of an image."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_dtype

from shunted_lit.data.image_io import read_image
from shunted_lit.models.detectors import pad_narrow_image
from shunted_lit.models.timm_registry import VARIANTS
from shunted_lit.models.weights import read_checkpoint
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask
from shunted_lit.utils.files import check_new_file
from shunted_lit.visualization.attention import attention_maps, check_point, draw_attention, keep_last_blocks


def attention(
    image: Path, ckpt: str = "", point: str = "", *, out: Path = Path("attention.png"), every_block: bool = False
) -> None:
    """Draw what a network attends to from a point of an image, coarse and fine heads side by side.

    Args:
        image: The image.
        ckpt: Checkpoint of `shunted-lit fit` with the neck or a shunted backbone; or shunted_t, shunted_s or shunted_b
            for random weights, which show the granularities alone.
        point: x,y in pixels from the top left, such as 120,80.
        out: PNG file to write; must not exist.
        every_block: Draw a row for every block instead of the last block of each stage.

    Raises:
        ValueError: The point is outside the image, the checkpoint has no shunted attention, or the file exists.
    """
    check_new_file(out, ".png")
    if not ckpt:
        raise ValueError(f"--ckpt must be a checkpoint of `shunted-lit fit` or one of {', '.join(VARIANTS)}.")
    try:
        x, y = map(float, point.split(","))
    except ValueError:
        raise ValueError(f"`point` must be x,y in pixels, such as 120,80, got {point!r}.") from None
    pixels = to_dtype(pil_to_tensor(read_image(image)), torch.float32, scale=True)
    check_point((x, y), pixels.shape[2], pixels.shape[1])
    network, inputs, scale = prepare_network(ckpt, pixels)
    try:
        maps = attention_maps(network, inputs, (x * scale, y * scale))
    except ValueError as error:
        raise ValueError(f"{ckpt}: {error}") from None
    draw_attention(out, pixels, maps if every_block else keep_last_blocks(maps), (x, y), scale)
    print(out)


class PreparedNetwork(NamedTuple):
    """A network, its input (1, C, H, W), and pixels of that input per pixel of the image."""

    network: nn.Module
    inputs: Tensor
    scale: float = 1.0


def prepare_network(source: str, image: Tensor) -> PreparedNetwork:
    """Load a network by name or from a checkpoint, and prepare an image (3, H, W) in 0..1 as its task does."""
    if source in VARIANTS and not Path(source).is_file():
        return prepare_classifier(timm.create_model(source), image)
    name = read_checkpoint(source).get("task")
    tasks = {task.__name__: task for task in (ClassificationTask, DetectionTask, SegmentationTask)}
    if name not in tasks:
        raise ValueError(f"{source} must be a checkpoint of `shunted-lit fit` or one of {', '.join(VARIANTS)}.")
    task: Any = tasks[name].load_from_checkpoint(source, map_location="cpu", weights_only=True).eval()
    if isinstance(task, SegmentationTask):
        return PreparedNetwork(task.segmenter, image[None])
    if isinstance(task, ClassificationTask):
        return prepare_classifier(task.model, image)
    image = pad_narrow_image(task.detector, image)
    images, _ = task.detector.transform([image])
    return PreparedNetwork(task.detector.backbone, images.tensors, images.image_sizes[0][1] / image.shape[2])


def prepare_classifier(model: Any, image: Tensor) -> PreparedNetwork:
    config = model.pretrained_cfg
    return PreparedNetwork(model, normalize(image, list(config["mean"]), list(config["std"]))[None])
