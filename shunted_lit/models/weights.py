"""Initial weights, reading and checking of files, and the reference implementation's parameter names."""

import functools
import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

log = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # of a neck in a folder or on the hub
HUB_OPTIONS = {"revision", "cache_dir", "force_download", "local_files_only", "token"}


# The reference implementation's `sr_ratio`, one number per stage, in terms of the ratios r_i of the head groups.
SR_RATIOS = {8: (8, 4), 4: (4, 2), 2: (2, 1), 1: (1,)}


def parse_ratios(ratios: int | Sequence[int]) -> tuple[int, ...]:
    """Return the ratio r_i of each head group, from a sequence of them or the reference's `sr_ratio`, after checks."""
    if isinstance(ratios, int):
        if ratios not in SR_RATIOS:
            raise ValueError(
                f"`sr_ratio` must be one of {sorted(SR_RATIOS)}, as in the reference implementation, got {ratios}; "
                f"for other ratios, give that of each head group, such as ({ratios}, 1)."
            )
        return SR_RATIOS[ratios]
    if not ratios or any(not isinstance(r, int) or r < 1 for r in ratios):
        raise ValueError(f"`ratios` must hold a whole number of at least 1 per head group, got {tuple(ratios)}.")
    return tuple(ratios)


def init_weights(module: nn.Module) -> None:
    """Initialize as the reference does: truncated normal (Linear), normal by fan-out (Conv2d), norms at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)


def read_checkpoint(path: str | PathLike) -> dict[str, Any]:
    """Read a checkpoint or a .safetensors file to the CPU. Code in a file is never run (`weights_only`).

    Raises:
        ValueError: the file is missing, cannot be read, or holds nothing by name.
    """
    compressed = False
    try:
        if str(path).endswith(".safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                keywords = (file.metadata() or {}).get("neck")  # written by `shunted-lit export`
            if keywords:
                content = {"state_dict": content, "hyper_parameters": {"neck": json.loads(keywords)}}
        else:
            compressed = is_compressed(path)
            content = None if compressed else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file.") from None
    except UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {blocked[1]}, which is more than weights" if blocked else "is not a checkpoint"
        raise ValueError(f"{path}: {what}; it is not loaded, because such files can run code.") from error
    except Exception as error:  # a damaged file can make torch's and safetensors' readers raise almost anything
        reason = "it is truncated" if is_truncated(path) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason}).") from error
    if compressed:
        raise ValueError(f"{path}: not a checkpoint; it is not loaded, because compressed files can grow to any size.")
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: holds no weights by name.")
    return dict(content)


def is_truncated(path: str | PathLike) -> bool:
    """Return whether a file begins as a zip archive, which is what torch writes, but does not end as one."""
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"PK" and not zipfile.is_zipfile(path)
    except OSError:
        return False


def is_compressed(path: str | PathLike) -> bool:
    """Return whether a file is a zip archive with compressed entries; torch writes them uncompressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def flatten(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint by name, averaged ones if it has them, without the prefixes of wrappers."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # timm's order
        if isinstance(checkpoint.get(key), Mapping):
            return flatten(checkpoint[key])
    if not all(isinstance(name, str) for name in checkpoint):
        raise ValueError(f"A checkpoint must hold weights by name, got the keys {list(checkpoint)[:3]}.")
    return {re.sub(r"^((module|model|_orig_mod)\.)+", "", name): value for name, value in checkpoint.items()}


def from_reference_names(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint of the reference implementation, or of this package, under our names."""

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
    """Rename the reference's parameters in `state_dict` in place.

    A pre-hook of `load_state_dict`, so that it also works inside a larger model.
    """
    own = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({prefix + name: value for name, value in from_reference_names(own).items()})


def infer_neck_keywords(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the keywords of `ShuntedTransformer` from a neck's weights.

    `num_heads`, `qk_scale`, `norm_layer` and ablation variants cannot be inferred. If the neck has a layer scale,
    `layer_scale` is 0: the initial value is unknown, and loading replaces it. A light neck is taken for one that adds
    its input.
    """
    first = weights["patch_embed.proj.weight"]
    cin, (hidden, dim) = len(first), weights["block.0.mlp.fc1.weight"].shape
    ratio = hidden / dim
    pattern = re.compile(r"block\.0\.attn\.groups\.(\d+)\.sr\.weight")
    adds_input = {"identity_start": True} if "out_proj.weight" in weights else {}
    groups = sorted((int(match[1]), name) for name in weights if (match := pattern.fullmatch(name)))
    return {
        "cin": cin,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("block.")}),
        "mlp_ratios": ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim,  # a quotient may be rounded down
        "qkv_bias": "block.0.attn.q.bias" in weights,
        "ratios": tuple(weights[name].shape[-1] for _, name in groups) or (1,),
        **({"form": "light"} if first.shape[-1] == 1 else {}),
        **({"layer_scale": 0.0} if "layer_scale.gamma" in weights else adds_input),
    }


def describe_mismatch(expected: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """Describe how `weights` differ from `expected` in names and shapes: counts and the first three; "" if they fit."""
    given = {name: getattr(value, "shape", None) for name, value in weights.items()}
    mismatches = {
        # torch itself adds the counts that old checkpoints lack.
        "missing": [name for name in expected.keys() - given.keys() if not name.endswith("num_batches_tracked")],
        "unexpected": list(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(given[name] or ())}, but {list(expected[name].shape)} is needed"
            for name in expected.keys() & given.keys()
            if expected[name].shape != given[name]
        ],
    }
    return ", ".join(
        f"{len(names)} {kind} ({'; '.join(sorted(names)[:3])}{'; ...' if len(names) > 3 else ''})"
        for kind, names in mismatches.items()
        if names
    )


def select(weights: Mapping[str, Any], modules: Sequence[str], inside: bool = True) -> dict[str, Any]:
    """Return the weights of the named modules, or where not `inside`, all others."""
    prefixes = tuple(f"{module}." for module in modules)
    return {name: value for name, value in weights.items() if name.startswith(prefixes) is inside}


def load_matching_weights(
    model: nn.Module,
    weights: Mapping[str, Any],
    source: str,
    *,
    classifiers: Sequence[str],
    optional: Sequence[str] = (),
) -> None:
    """Load `weights` into a model, log how many, and leave the named modules untrained where the weights do not fit.

    Args:
        model: the model to load into.
        weights: weights under the model's names.
        source: name of the file, for messages.
        classifiers: layers that depend on the number of classes; if one does not fit, none is loaded.
        optional: modules that stay untrained where the file has no weights for them.

    Raises:
        ValueError: other weights that do not fit.
    """
    own = model.state_dict()
    untrained = [module for module in optional if select(own, [module]) and not select(weights, [module])]
    reasons = list(untrained)
    classifiers = [layer for layer in classifiers if not layer.startswith(tuple(f"{name}." for name in untrained))]
    if describe_mismatch(select(own, classifiers), select(weights, classifiers)):
        untrained += classifiers
        reasons.append(f"the head (the file has {'other classes' if select(weights, classifiers) else 'none'})")
    expected, given = (select(some, untrained, inside=False) for some in (own, weights))
    if mismatch := describe_mismatch(expected, given):
        advice = model.weights_advice(given) if isinstance(model, ReferenceWeightsMixin) else ""
        raise ValueError(f"{source}: weights do not fit: {mismatch}. {advice}".rstrip())
    model.load_state_dict(given, strict=False)
    rest = f"; not loaded: {', '.join(reasons)}" if reasons else ""
    log.info("%s: loaded %d of the model's %d tensors%s", source, len(expected), len(own), rest)


class ReferenceWeightsMixin(nn.Module):
    """Let the reference implementation's checkpoints load by `load_state_dict` as they are."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.register_load_state_dict_pre_hook(load_reference_names)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does, also under the reference's names; flat, or under "model" or "state_dict".

        Raises:
            ValueError: if `strict`, weights that do not fit, with the model that they would fit.
        """
        if strict:
            self.check_weights(from_reference_names(state_dict))
        return super().load_state_dict(state_dict, strict, assign)

    def check_weights(self, weights: Mapping[str, Any], expected: Mapping[str, Tensor] | None = None) -> None:
        """Raise ValueError where names (ours) or shapes differ from this module's, or from `expected`."""
        if mismatch := describe_mismatch(self.state_dict() if expected is None else expected, weights):
            advice = self.weights_advice(weights)
            raise ValueError(f"weights do not fit this {type(self).__name__}: {mismatch}. {advice}")

    def weights_advice(self, weights: Mapping[str, Any]) -> str:
        """Return a sentence on the model that `weights` would fit."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: norms and biases, all of one dimension."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}


def find_file(source: str, name: str, options: Mapping[str, Any]) -> Path:
    """Return the path of a file in a folder, or in a repository of the Hugging Face hub, from which it is downloaded.

    Raises:
        ValueError: there is no such folder, file or repository, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        if not (file := Path(source) / name).is_file():
            raise ValueError(f"{source}: a neck's folder must hold {name}; write it with `save_pretrained`.")
        return file
    try:
        return Path(hf_hub_download(source, name, **options))
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source} must be a folder or a readable repository of the hub: {reason}") from error


def describe_norm(norm: nn.Module) -> dict[str, Any]:
    """Return a norm's class and options as JSON; only the name of a class that torch does not have."""
    options: dict[str, Any] = {}
    if isinstance(norm, nn.LayerNorm):
        options = {"eps": norm.eps, "elementwise_affine": norm.elementwise_affine, "bias": norm.bias is not None}
    elif isinstance(norm, nn.RMSNorm):
        options = {"eps": norm.eps, "elementwise_affine": norm.elementwise_affine}
    return {"name": type(norm).__name__, **options}


def decode_keywords(keywords: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the keywords of a neck, with objects in place of the names that a file holds for `norm_layer` and `dtype`.

    Raises:
        ValueError: a norm that torch does not have, or an unknown dtype.
    """
    decoded = dict(keywords)
    norm, dtype = decoded.get("norm_layer"), decoded.get("dtype")
    if isinstance(norm, Mapping):
        name, options = norm.get("name"), {key: value for key, value in norm.items() if key != "name"}
        if name not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"{source}: `norm_layer` is {name}, which a file cannot hold; give it as a keyword.")
        decoded["norm_layer"] = functools.partial(getattr(nn, name), **options)
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{source}: `dtype` must be a dtype of torch, such as float32, got {dtype!r}.")
        decoded["dtype"] = getattr(torch, dtype)
    return decoded


class NeckWeights(
    ReferenceWeightsMixin,
    PyTorchModelHubMixin,
    library_name="shunted-lit",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2111.15193",
):
    """Read and write a neck: folders and repositories of the Hugging Face hub, and checkpoints of detectors.

    huggingface_hub provides `save_pretrained(folder)` and `push_to_hub(name)`.
    """

    if TYPE_CHECKING:
        patch_embed: Any
        block: Any
        norm: nn.Module
        layer_scale: Any
        adds_input: bool
        variants: dict[str, str]

    def keywords(self) -> dict[str, Any]:
        """Return the constructor's keywords of this neck, as JSON holds them."""
        block = self.block[0]
        heads = block.attn.groups
        return {
            **infer_neck_keywords(self.state_dict()),
            **self.variants,
            "num_heads": block.attn.num_heads,
            "ratios": [group.ratio for group in heads],
            "qk_scale": heads[0].scale,
            "drop_rate": block.attn.proj_drop.p,
            "attn_drop_rate": heads[0].attn_drop,
            "drop_path_rate": round(getattr(self.block[-1].drop_path, "drop_prob", 0.0), 6),  # was float32
            "identity_start": self.adds_input and isinstance(self.layer_scale, nn.Identity),
            "layer_scale": getattr(self.layer_scale, "init_values", None),
            "norm_layer": describe_norm(self.norm),
            "dtype": str(self.patch_embed.proj.weight.dtype).removeprefix("torch."),
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and keywords; `save_pretrained` and `push_to_hub` call this hook."""
        keywords = self.keywords()
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS_FILE, {"neck": json.dumps(keywords)})
        (save_directory / CONFIG_FILE).write_text(json.dumps(keywords, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **keywords: Any) -> Self:
        """Load a neck that `save_pretrained`, `push_to_hub` or `shunted-lit export` wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hugging Face hub.
            keywords: `revision`, `cache_dir`, `force_download`, `local_files_only` and `token` are passed to
                huggingface_hub; all others override the constructor's keywords in the folder, such as `dtype`.

        Raises:
            ValueError: a folder, repository or file that is missing or cannot be read, the folder of another model, or
                weights that do not fit. Only safetensors are read, which cannot run code.
        """
        from shunted_lit.models.feature_path import check_neck_keywords  # here, because it imports this module

        source = str(pretrained_model_name_or_path)
        options = {name: keywords.pop(name) for name in HUB_OPTIONS & keywords.keys()}
        config, weights = (find_file(source, name, options) for name in (CONFIG_FILE, WEIGHTS_FILE))
        try:
            known = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{config}: not a readable JSON file ({error}).") from None
        if not isinstance(known, Mapping) or "cin" not in known:
            raise ValueError(f"{config}: must be that of a neck, but has no `cin`; it is of another model.")
        decoded = decode_keywords({**known, **keywords}, str(config))
        check_neck_keywords(decoded)
        neck = cls(**decoded)
        neck.load_state_dict(read_checkpoint(weights))
        return neck.eval()

    @classmethod
    def from_checkpoint(cls, path: str | PathLike, level: int | None = None, **keywords: Any) -> Self:
        """Load a trained neck from a checkpoint of `shunted-lit fit` or of the reference, in eval mode.

        Args:
            path: a file that `torch.load` reads with `weights_only=True`, or .safetensors.
            level: level of the neck (an entry of `neck_levels`), where the checkpoint has several.
            keywords: override the constructor's keywords in the checkpoint. Bare weights, such as the reference's, do
                not record `num_heads`, `qk_scale` and `norm_layer`: give them where they differ from the defaults.

        Raises:
            ValueError: no neck in the file, several without `level`, or weights that do not fit.
        """
        content = read_checkpoint(path)
        weights = from_reference_names(content)
        first = "patch_embed.proj.weight"
        prefixes = {m[2]: m[1] for name in weights if (m := re.match(rf"(|.*\bnecks\.(\d+)\.){first}$", name))}
        if any(".necks.pyramid." in name for name in weights):
            raise ValueError(f"{path}: its neck is one across levels; load it with `ShuntedPyramid.from_checkpoint`.")
        if not prefixes:
            raise ValueError(f"{path}: holds no neck; none of its {len(weights)} tensors is named [...]{first}.")
        key = None if level is None else str(level)
        if key is None and len(prefixes) == 1:
            (key,) = prefixes
        if key not in prefixes:
            raise ValueError(f"{path}: `level` must be one of {sorted(prefixes)}, the levels with a neck, got {level}.")
        prefix = prefixes[key]
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        inferred, trained = infer_neck_keywords(weights), content.get("hyper_parameters", {}).get("neck")
        known = inferred if trained is None else {"cin": inferred["cin"], **trained}
        neck = cls(**decode_keywords({**known, **keywords}, str(path)))
        neck.load_state_dict(weights)
        return neck.eval()

    def weights_advice(self, weights: Mapping[str, Any]) -> str:
        try:
            keywords = infer_neck_keywords(weights)
        except KeyError:
            return "They are not those of a neck."
        return f"They fit ShuntedTransformer({', '.join(f'{name}={value}' for name, value in keywords.items())})."
