"""Trained models out of their checkpoints, in formats that others read."""

from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from shunted_lit.data.digits import check_new
from shunted_lit.shunted import VARIANTS
from shunted_lit.tasks import ClassificationTask
from shunted_lit.weights import from_source_names, read_checkpoint


def export(source: str, out: Path, format: Literal["safetensors"] = "safetensors") -> None:
    """Write a trained classifier or backbone to a new folder, for use without this package's tasks.

    Args:
        source: a checkpoint of `shunted-lit fit`, or weights of a shunted_t, _s or _b, such as the authors'.
        out: folder to write; must not exist, or be empty.
        format: "safetensors": model.safetensors and config.json, as Hugging Face's hub has them; once shunted_lit is
            imported, `timm.create_model("local-dir:OUT", pretrained=True)` loads them.

    Raises:
        ValueError: a file that holds no classifier and no backbone.
    """
    check_new(out)
    content = read_checkpoint(source)
    if content.get("task") == ClassificationTask.__name__:
        task = ClassificationTask.load_from_checkpoint(source, map_location="cpu", weights_only=True)
        model, names, options = task.model, task.class_names, task.hparams["backbone_options"]
    elif "task" in content:
        raise ValueError(f"{source} is of {content['task']}, but only classifiers and backbones can be written")
    else:
        model, names, options = backbone_of(source, content), None, None
    data = content.get("datamodule_hyper_parameters", {})
    size = {"input_size": (3, data["image_size"], data["image_size"])} if "image_size" in data else {}
    kept = {key: data[key] for key in ("crop_pct", "interpolation") if key in data}
    if kept.get("interpolation") == "random":
        kept["interpolation"] = "bicubic"  # as in validation
    save_for_hf(
        model.to(memory_format=torch.contiguous_format),
        str(out),
        model_config={"label_names": names} if names else None,
        model_args=options or None,
        safe_serialization=True,
        data_config={**size, **kept} or None,
    )
    print(f"{out / 'model.safetensors'}, {out / 'config.json'}")


def backbone_of(path: str, content: dict[str, Any]) -> nn.Module:
    """The variant whose weights these are, with as many classes as they have."""
    weights = from_source_names(content)
    depths = {name: options["depths"] for name, options in VARIANTS.items()}
    found = tuple(
        len({name.split(".")[3] for name in weights if name.startswith(f"stages.{i}.block.")}) for i in range(4)
    )
    variants = [name for name in VARIANTS if depths[name] == found]
    if not variants:
        raise ValueError(f"{path} holds no backbone: blocks a stage are {found}, but {depths} are known")
    classes = len(weights["head.fc.bias"]) if "head.fc.bias" in weights else 0
    stem = weights.get("stages.0.patch_embed.conv.0.weight")
    channels = 3 if stem is None else stem.shape[1]
    model = timm.create_model(variants[0], num_classes=classes, in_chans=channels)
    model.load_state_dict(weights)
    return model
