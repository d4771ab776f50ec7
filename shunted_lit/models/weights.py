"""Weights on disk and in dictionaries: the authors' names, what a file holds, and whether it fits."""

import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pickle import UnpicklingError
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def read_checkpoint(path: str | PathLike) -> dict[str, Any]:
    """Content of a checkpoint or a .safetensors file, on the CPU. Code in a file is never run (`weights_only`).

    Raises:
        ValueError: a file that is not there, can't be read, or holds nothing by name.
    """
    packed = False
    try:
        if str(path).endswith(".safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                keywords = (file.metadata() or {}).get("neck")  # as `shunted-lit export` writes them
            if keywords:
                content = {"state_dict": content, "hyper_parameters": {"neck": json.loads(keywords)}}
        else:
            packed = is_compressed(path)
            content = None if packed else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {blocked[1]}, which is more than weights" if blocked else "is no checkpoint"
        raise ValueError(f"{path}: {what}, and is not loaded, as such files can run code") from error
    except Exception as error:  # whatever a damaged file makes of torch's and safetensors' readers
        told = "it is cut off" if is_truncated(path) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({told})") from error
    if packed:
        raise ValueError(f"{path}: is no checkpoint, and is not loaded, as such files may unpack to any size")
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: holds no weights by name")
    return dict(content)


def is_truncated(path: str | PathLike) -> bool:
    """Whether a file begins as an archive, which is what torch writes, and does not end as one."""
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"PK" and not zipfile.is_zipfile(path)
    except OSError:
        return False


def is_compressed(path: str | PathLike) -> bool:
    """Whether a file is an archive with compressed parts: torch stores, and these may unpack to any size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def flatten(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of a checkpoint by name, the averaged ones where it has them, without wrappers' prefixes."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # timm's order
        if isinstance(checkpoint.get(key), Mapping):
            return flatten(checkpoint[key])
    if not all(isinstance(name, str) for name in checkpoint):
        raise ValueError(f"there are no weights by name, but {list(checkpoint)[:3]}")
    return {re.sub(r"^((module|model|_orig_mod)\.)+", "", name): value for name, value in checkpoint.items()}


def from_reference_names(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names of the authors' checkpoints, or of this package, under those of this package."""

    def rename(name: str) -> str:
        name = re.sub(r"^(patch_embed|block|norm)(\d+)\.", lambda m: f"stages.{int(m[2]) - 1}.{m[1]}.", name)
        name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
        name = re.sub(
            r"\battn\.(sr|norm|kv|local_conv)(\d*)\.",
            lambda m: f"attn.groups.{int(m[2] or 1) - 1}.{m[1]}.",
            name,
        )
        return name.replace(".dwconv.dwconv.", ".dwconv.")

    return {rename(name): value for name, value in flatten(checkpoint).items()}


def load_reference_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`, so that the source's checkpoints load as they are, wherever the module sits."""
    mine = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({prefix + name: value for name, value in from_reference_names(mine).items()})


def infer_neck_keywords(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keywords of `ShuntedTransformer` that can be read off a neck's weights: all but `num_heads` and `qk_scale`.

    Where there is a `layer_scale`, its starting value can't: any number makes the place that the weights fill.
    """
    cin = len(weights["patch_embed.proj.weight"])
    groups = sorted(name for name in weights if re.fullmatch(r"block\.0\.attn\.groups\.\d+\.sr\.weight", name))
    return {
        "cin": cin,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("block.")}),
        "mlp_ratios": len(weights["block.0.mlp.fc1.weight"]) / cin,
        "qkv_bias": "block.0.attn.q.bias" in weights,
        "ratios": tuple(weights[name].shape[-1] for name in groups) or (1,),
        **({"layer_scale": 0.0} if "layer_scale.gamma" in weights else {}),
    }


def describe_mismatch(mine: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """What of `weights` is missing, unexpected or of another shape than in `mine`: how many, and the first three."""
    given = {name: getattr(value, "shape", None) for name, value in weights.items()}
    faults = {
        # torch itself adds the counts that old checkpoints lack.
        "missing": [name for name in mine.keys() - given.keys() if not name.endswith("num_batches_tracked")],
        "unexpected": list(given.keys() - mine.keys()),
        "of another shape": [
            f"{name} {list(given[name] or ())}, but {list(mine[name].shape)} is needed"
            for name in mine.keys() & given.keys()
            if mine[name].shape != given[name]
        ],
    }
    told = []
    for fault, names in faults.items():
        if names:
            first = "; ".join(sorted(names)[:3])
            told.append(f"{len(names)} {fault} ({first}{'; ...' if len(names) > 3 else ''})")
    return ", ".join(told)


def load_matching_weights(
    model: nn.Module, weights: Mapping[str, Any], source: str, heads: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Loads `weights`, and tells how many; parts of the model that may start anew do so where they have to.

    Args:
        model: what starts from them.
        weights: by the names of the model.
        source: the file, for messages.
        heads: names of layers that are of a number of classes: all of them start anew where one has another shape.
        optional: names of parts that start anew where the file has nothing of them.

    Raises:
        ValueError: what is of no such part and does not fit.
    """
    mine = model.state_dict()

    def of(some: Mapping[str, Any], parts: Sequence[str], inside: bool = True) -> dict[str, Any]:
        prefixes = tuple(f"{part}." for part in parts)
        return {name: value for name, value in some.items() if name.startswith(prefixes) is inside}

    left_out = [part for part in optional if of(mine, [part]) and not of(weights, [part])]
    told_anew = list(left_out)
    heads = [head for head in heads if not head.startswith(tuple(f"{part}." for part in left_out))]
    if describe_mismatch(of(mine, heads), of(weights, heads)):
        left_out += heads
        told_anew += ["the head, as the file has " + ("one of other classes" if of(weights, heads) else "none")]
    wanted, given = (of(some, left_out, inside=False) for some in (mine, weights))
    if told := describe_mismatch(wanted, given):
        advice = model.weights_advice(given) if isinstance(model, ReferenceWeightsMixin) else ""
        raise ValueError(f"{source}: weights do not fit: {told}. {advice}".rstrip())
    model.load_state_dict(given, strict=False)
    rest = f"; anew: {', '.join(told_anew)}" if told_anew else ""
    log.info("%s: %d of the model's %d tensors start from it%s", source, len(wanted), len(mine), rest)


class ReferenceWeightsMixin(nn.Module):
    """What neck and backbone share: the authors' checkpoints load by `load_state_dict` as they are."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.register_load_state_dict_pre_hook(load_reference_names)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, under the authors' names as well; flat, or under "model" or "state_dict".

        Raises:
            ValueError: where `strict`, weights that do not fit; says which, and what they would fit.
        """
        if strict:
            self.check_weights(from_reference_names(state_dict))
        return super().load_state_dict(state_dict, strict, assign)

    def check_weights(self, weights: Mapping[str, Any], mine: Mapping[str, Tensor] | None = None) -> None:
        """Raises ValueError where names (this package's) or shapes are not this module's, or not those of `mine`."""
        if told := describe_mismatch(self.state_dict() if mine is None else mine, weights):
            advice = self.weights_advice(weights)
            raise ValueError(f"weights do not fit this {type(self).__name__}: {told}. {advice}")

    def weights_advice(self, weights: Mapping[str, Any]) -> str:
        """What these weights would fit."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: norms and biases, all of one dimension."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
