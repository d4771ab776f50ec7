"""The neck in Ultralytics' YOLO: layers of model YAMLs, functions that write such YAMLs, and transfer of weights.

Importing this module registers layers of Ultralytics' model YAMLs: `ShuntedTransformer`, as in
`[-1, 1, ShuntedTransformer, [c2, {depth: 2, num_heads: 4}]]`, and `ShuntedPyramid`, the neck across levels. Ultralytics
replaces `c2` by the channels of the layer before, and `ch` by a list of the channels of all layers, at any width of the
model. Loading a .pt file of a model with the neck imports this module automatically.

Ultralytics is licensed under AGPL-3.0 (or commercially); its terms apply to what you build with this module. The rest
of the package does not import it and contains no file of Ultralytics: model YAMLs are derived from the installed ones.
"""

import difflib
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
import yaml
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from shunted_lit.models import pyramid, shunted, weights
from shunted_lit.models.feature_path import PYRAMID, check_neck_keywords, drop_form
from shunted_lit.utils.files import check_new_file

OLDEST = "8.3.228"  # the oldest tested version of Ultralytics, as in pyproject.toml
INSTALL = "pip install -U 'shunted-lit[ultralytics]'"
try:
    import ultralytics
except ImportError as error:
    raise ImportError(f"the neck in YOLO needs Ultralytics ({error}). Install it: {INSTALL}") from error
if Version(ultralytics.__version__) < Version(OLDEST):
    raise ImportError(f"Ultralytics must be {OLDEST} or newer, got {ultralytics.__version__}. Update it: {INSTALL}")

from ultralytics import RTDETR, YOLO  # noqa: E402 - older versions lack some of these
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.utils import dist  # noqa: E402

__all__ = ["ShuntedPyramid", "ShuntedTransformer", "insert_neck", "transfer_weights", "write_weights", "write_yaml"]

NECK, ACROSS = "ShuntedTransformer", "ShuntedPyramid"  # names of layers in a model YAML
LEVEL_HEADS = ("Detect", "v10Detect", "OBB", "Pose", "OBB26", "Pose26")  # heads whose branches are the same per level
LEVEL = re.compile(r"^(\w*cv\d\w*\.)(\d+)\.")  # start of the name of a tensor that belongs to a level of a head
FINER_LAYERS = 3  # that a finer level adds
Recipe = Literal["finer_level"]


class ShuntedTransformer(shunted.ShuntedTransformer):
    """The neck as a layer of a model YAML, with the arguments `[c2]` or `[c2, {keyword: value, ...}]`.

    A pickled model names the module of each class. Thanks to this subclass, loading such a model imports this module,
    which registers the neck before Ultralytics parses the model's YAML again for training.

    Args:
        cin: input and output channels; `c2` in a YAML.
        args, keywords: arguments of `shunted_lit.ShuntedTransformer`; a mapping at the end of `args` holds keywords.

    Raises:
        ValueError: A keyword is unknown or has a value that `shunted_lit.ShuntedTransformer` does not accept.
    """

    def __init__(self, cin: int = 512, *args: Any, **keywords: Any):
        if args and isinstance(args[-1], Mapping):
            *args, options = args  # type: ignore[assignment]
            keywords = {**options, **keywords}
        check_neck_keywords(keywords)
        super().__init__(cin, *args, **keywords)


class ReadsLayers(nn.Module):
    """A layer that reads other layers than its YAML line names; in a YAML, only Ultralytics' own may read several.

    Ultralytics sets `f` to the layer of the YAML, whose channels it counts, and later reads the inputs from `f`.
    """

    sources: int | list[int]

    @property
    def f(self) -> int | list[int]:
        return self.sources

    @f.setter
    def f(self, source: int) -> None:
        pass


class ShuntedPyramid(pyramid.ShuntedPyramid, ReadsLayers):
    """The neck across levels as a layer of a model YAML, such as `[22, 1, ShuntedPyramid, [ch, [16, 19, 22], {}]]`.

    Args:
        channels: output channels of all layers before; `ch` in a YAML.
        sources: layers whose maps it reads, from the finest level to the coarsest; the last one starts its YAML line.
        keywords: further keywords of `shunted_lit.ShuntedPyramid`.
    """

    def __init__(self, channels: Sequence[int], sources: Sequence[int], keywords: Mapping[str, Any]):
        super().__init__([channels[source] for source in sources], **keywords)
        self.sources = list(sources)


class PyramidMap(ReadsLayers):
    """One of the maps of a `ShuntedPyramid`, in a model YAML: `[16, 1, PyramidMap, [23, 0]]` is the first of layer 23.

    Its YAML line starts with the layer that has this map's channels; for the last map, with the `ShuntedPyramid`.
    """

    def __init__(self, layer: int, index: int):
        super().__init__()
        self.sources, self.index = layer, index

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[self.index]


def register() -> None:
    """Register the necks with Ultralytics, which has no public way to add a layer. Repeated calls change nothing.

    1. The YAML parser looks for layers among the globals of `ultralytics.nn.tasks`.
    2. Restricted loading (`weights_only`) accepts only classes on torch's list of safe globals. A pickled neck also
       holds its hook for the parameter names of the reference implementation, which torch wraps in a private class.
    3. Training on several GPUs runs a generated script in new processes, which have to import this module first.
    """
    own = (ShuntedTransformer, ShuntedPyramid, PyramidMap)
    for layer in own:
        setattr(tasks, layer.__name__, layer)
    known = [*vars(shunted).values(), *vars(pyramid).values()]
    layers = [value for value in known if isinstance(value, type) and issubclass(value, nn.Module)]
    torch.serialization.add_safe_globals([*own, *layers, weights.load_reference_names, _WrappedHook])
    original = getattr(dist.generate_ddp_file, "__wrapped__", dist.generate_ddp_file)

    @functools.wraps(original)
    def generate_ddp_file(trainer: Any) -> str:
        path = Path(original(trainer))
        lines = f"import sys\nsys.path = {sys.path!r}\nimport {__name__}\n"
        path.write_text(lines + path.read_text(encoding="utf-8"), encoding="utf-8")
        return str(path)

    dist.generate_ddp_file = generate_ddp_file


register()


@contextmanager
def explain_errors(problem: str) -> Iterator[None]:
    """Turn any error into a ValueError that starts with `problem`; Ultralytics raises errors of many types."""
    try:
        yield
    except URLError as error:  # of weights of torchvision, which a few models start from
        raise ValueError(f"{problem}: a download failed ({error.reason}); connect to the network.") from error
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{problem}: {reason}") from error


def insert_neck(base: str | Path = "yolo26n", after: int | Sequence[int] | None = None,
                neck: Mapping[str, Any] | None = None, recipe: Recipe | None = None) -> dict[str, Any]:  # fmt: skip
    """Return the content of a model YAML of the installed Ultralytics with the neck inserted.

    Args:
        base, after, neck, recipe: as in `write_yaml`.

    Raises:
        ValueError: The base is unknown, or has no place for the recipe. A layer does not exist, is the last one, is
            named twice, has a neck already, or does not return one map (B, C, H, W). The neck does not accept its
            keywords or the map's channels.
    """
    base = str(base)
    content = read_yaml(base)
    if recipe is not None:
        content = add_finer_level(base, content)
        if neck is None and after is None:
            return finish_yaml(content, {"backbone": content["backbone"], "head": content["head"]})
    layers = all_layers(content)
    given = dict(neck or {})
    if given.get("form") == PYRAMID:
        return insert_pyramid(base, content, after, drop_form(given))
    if after is None:  # RT-DETR's own attention (AIFI), or the coarsest map, on which attention costs least
        after = max((i for i, layer in enumerate(layers) if layer[2] == "AIFI"), default=len(content["backbone"]) - 1)
    positions = [after] if isinstance(after, int) else sorted(after)
    if not positions:
        raise ValueError("`after` must name at least one layer, got none; omit it for the default.")
    for i in positions:
        if not 0 <= i < len(layers) - 1:
            raise ValueError(f"`after` must be a layer of {base} from 0 to {len(layers) - 2}, got {i}.")
        if positions.count(i) > 1 or NECK in (layers[i][2], layers[i + 1][2]):
            raise ValueError(f"layer {i} of {base} must get one neck, not several; set a greater `depth` instead.")
    keywords = {"identity_start": given.get("layer_scale") is None, **given}
    for i, channels in zip(positions, find_channels(base, content, positions, keywords), strict=True):
        with explain_errors(f"layer {i} of {base} has {channels} channels"):
            ShuntedTransformer(channels, **keywords, device="meta")

    sections: dict[str, list[Any]] = {"backbone": [], "head": []}
    for i, (source, *layer) in enumerate(layers):
        section = sections["backbone" if i < len(content["backbone"]) else "head"]
        section.append([renumber(source, i, positions), *layer])
        if i in positions:
            section.append([-1, 1, NECK, ["c2", dict(keywords)]])
    return finish_yaml(content, sections)


def insert_pyramid(base: str, content: dict[str, Any], levels: int | Sequence[int] | None,
                   keywords: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Return the content of a model YAML with a neck across the maps that its head reads, or some of them.

    Raises:
        ValueError: The head does not read these maps, or the neck does not accept its keywords.
    """
    *before, (sources, *head) = all_layers(content)
    read = [sources] if isinstance(sources, int) else sources
    levels = sorted(read) if levels is None else sorted([levels] if isinstance(levels, int) else levels)
    if len(levels) < 2 or len(set(levels)) < len(levels) or not set(levels) <= set(read):
        problem = f"a neck across levels needs two or more of the layers {read}, whose maps the head of {base} reads"
        raise ValueError(f"{problem}, got {levels}.")
    if ACROSS in [layer[2] for layer in before]:
        raise ValueError(f"{base} must get one neck across levels, but has one; set a greater `depth` instead.")
    channels = find_channels(base, content, levels, {**keywords, "form": PYRAMID})
    with explain_errors(f"layers {levels} of {base} have {channels} channels"), torch.device("meta"):
        pyramid.ShuntedPyramid(channels, **keywords)
    layer = len(before)
    maps = [[source, 1, "PyramidMap", [layer, i]] for i, source in enumerate(levels)]
    maps[-1][0] = layer
    renumbered = [layer + 1 + levels.index(source) if source in levels else source for source in read]
    across = [levels[-1], 1, ACROSS, ["ch", levels, dict(keywords)]]
    last = [*content["head"][:-1], across, *maps, [renumbered, *head]]
    return finish_yaml(content, {"backbone": content["backbone"], "head": last})


def has_finer_level(content: Mapping[str, Any]) -> bool:
    """Return whether `add_finer_level` has changed a model."""
    *before, (sources, *_) = all_layers(content)
    kinds = [layer[2] for layer in before[-FINER_LAYERS:-1]]
    return isinstance(sources, list) and sources[0] == len(before) - 1 and kinds == ["nn.Upsample", "Concat"]


def finish_yaml(content: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Return a model YAML with new layers: the scale that `read_yaml` chose comes first, as Ultralytics' default."""
    if scales := content.get("scales"):
        content["scales"] = {content["scale"]: scales[content["scale"]], **scales}
    return {**{key: value for key, value in content.items() if key not in ("scale", "yaml_file")}, **sections}


def read_yaml(name: str) -> dict[str, Any]:
    """Return a checked model YAML as Ultralytics reads it: with "scale" from the file's name, or the default scale."""
    path = Path(name)
    if path.suffix == ".pt":
        remedy = "its weights are loaded by `shunted-lit yolo weights`."
        raise ValueError(f"{name} is a checkpoint; name the model, such as {path.stem}, or its YAML: {remedy}")
    try:
        content = tasks.yaml_model_load(name if path.suffix in (".yaml", ".yml") else f"{name}.yaml")
    except FileNotFoundError:
        known = [file.stem for file in (Path(ultralytics.__file__).parent / "cfg/models").rglob("*.yaml")]
        close = ", ".join(difflib.get_close_matches(path.stem.lower(), known, n=3)) or "none"
        raise ValueError(
            f"the base must be a file or a model of Ultralytics {ultralytics.__version__}, got {name!r}; close names: "
            f"{close}, with the letter of the scale after the number, as in yolo26s."
        ) from None
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name} is not a readable model YAML: {error}") from None
    if not all(isinstance(content.get(key), list) and content[key] for key in ("backbone", "head")):
        raise ValueError(f"{name} is not a model YAML: it must list layers under backbone and head.")
    for i, layer in enumerate(all_layers(content)):
        if not isinstance(layer, list) or len(layer) != 4:
            raise ValueError(f"{name}: layer {i} must be [from, repeats, module, [arguments]], got {layer}.")
    scales = content.get("scales") or {}
    content["scale"] = content["scale"] or next(iter(scales), "")  # the first scale is the default
    if scales and content["scale"] not in scales:
        raise ValueError(f"{name} must define its scale, {content['scale']!r}, got {', '.join(scales)}; rename it.")
    return content


def all_layers(content: Mapping[str, Any]) -> list[Any]:
    return [*content["backbone"], *content["head"]]


def renumber(source: Any, layer: int, positions: Sequence[int]) -> Any:
    """Return `source`, the layer(s) that layer number `layer` reads, in the numbering with necks after `positions`."""
    if isinstance(source, list):
        return [renumber(each, layer, positions) for each in source]
    index = source if source >= -1 else source + layer  # -1 stays: the layer before, or its neck
    return index + sum(position <= index for position in positions)


def find_channels(base: str, content: Mapping[str, Any], positions: Sequence[int],
                  keywords: Mapping[str, Any]) -> list[int]:  # fmt: skip
    """Return the channels of the maps of the layers in `positions`, which get necks with `keywords`.

    Raises:
        ValueError: Ultralytics cannot build the base, a layer returns no map, or a keyword is unknown.
    """
    check_neck_keywords(keywords)
    for name in {"cin", "channels", "device", "dtype"} & keywords.keys():
        raise ValueError(f"the neck's `{name}` follows from the layer before it, got {keywords[name]!r}; omit it.")
    outputs = run_layers(base, content, max(positions) + 1)
    for i in positions:
        shape = list(outputs[i].shape) if isinstance(outputs[i], Tensor) else type(outputs[i]).__name__
        if len(shape) != 4 or isinstance(shape, str):
            problem = f"layer {i} of {base}, {all_layers(content)[i][2]}, must return one map (B, C, H, W) for a neck"
            raise ValueError(f"{problem}, got {shape}; choose another layer.")
    return [outputs[i].shape[1] for i in positions]


def run_layers(base: str, content: Mapping[str, Any], count: int, side: int = 256) -> list[Any]:
    """Return the outputs of the first layers of a model, on an image of `side` x `side` pixels, as meta tensors."""
    channels = content.get("channels", 3)
    with explain_errors(f"Ultralytics cannot build {base}"), torch.device("meta"):  # shapes without memory and time
        layers, _ = tasks.parse_model(deepcopy(dict(content)), ch=channels, verbose=False)
    image = torch.empty(1, channels, side, side, device="meta")
    outputs: list[Any] = []
    for i, layer in enumerate(layers[:count].eval()):
        inputs = [outputs[j] if outputs else image for j in ([layer.f] if isinstance(layer.f, int) else layer.f)]
        with explain_errors(f"layer {i} of {base}, {layer.type}, cannot run on maps alone"):
            outputs.append(layer(inputs[0] if isinstance(layer.f, int) else inputs))
    return outputs


def add_finer_level(base: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a model YAML whose head also reads a map of half the stride, P2 in most models.

    The new map joins the finest one of the head, upsampled, with the last map of that size in the backbone, by another
    block of the kind and width that made the finest one. All else stays, and so do the outputs of the other levels.

    Raises:
        ValueError: The head is no detection head over maps, or the backbone has no such map.
    """
    *before, (sources, *head) = all_layers(content)
    if head[1] not in LEVEL_HEADS or isinstance(sources, int):
        kinds = ", ".join(LEVEL_HEADS)
        raise ValueError(f"{base} must end in one of {kinds} for a finer level, got {head[1]}; choose another base.")
    outputs = run_layers(base, content, len(before))
    finest = max(sources, key=lambda i: outputs[i].shape[-1])
    side = 2 * outputs[finest].shape[-1]
    sides = [out.shape[-1] if isinstance(out, Tensor) and out.dim() == 4 else 0 for out in outputs]
    joined = max((i for i in range(len(content["backbone"])) if sides[i] == side), default=None)
    if joined is None or side >= 128:  # of an image of 256 pixels: stride 2 has too many places
        problem = f"the backbone of {base} must have a map for a level finer than stride {2 * 256 // side}"
        raise ValueError(f"{problem}, got none of stride 4 or more; choose a base whose finest level has stride 8.")
    layer = len(before)
    finer = [
        [finest, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[layer, joined], 1, "Concat", [1]],
        [layer + 1, *before[finest][1:]],
    ]
    content["head"] = [*content["head"][:-1], *finer, [[layer + 2, *sources], *head]]
    return content


def write_yaml(base: str | Path, out: str | Path, after: int | list[int] | None = None, *,
               neck: dict[str, Any] | None = None, recipe: Recipe | None = None) -> None:  # fmt: skip
    """Write a model YAML for Ultralytics: one of the installed package with the neck inserted.

    Args:
        base: name of the model with its scale, such as yolo26s or yolo11m-seg, or path of a model YAML.
        out: file to write, such as yolo26s-shunted.yaml; must not exist. Ultralytics takes the scale from this name;
            a name without a scale keeps that of the base.
        after: index of the layer that the neck follows, or several, [4, 6, 10]. All layers that read such a layer then
            read its neck. Default: the last layer of the backbone (10 in YOLO11 and YOLO26), and AIFI in RT-DETR.
        neck: keywords of ShuntedTransformer, such as form, depth, ratios, num_heads, which must divide the channels.
            `identity_start` defaults to true, such that the model starts with the outputs of its base; false builds the
            neck of the reference implementation. With `form: pyramid`, keywords of ShuntedPyramid: one neck across
            the maps that the head reads, or across some of these, named by `after`.
        recipe: "finer_level" lets the head also read a map of half the stride, P2 in most models. It then has no
            neck, unless `after` or `neck` is given.

    Raises:
        ValueError: As in `insert_neck`; the file exists, or its name implies another scale or model family.
    """
    base, out = str(base), Path(out)
    check_new_file(out, ".yaml")
    content = insert_neck(base, after, neck, recipe)
    for family in ("-world", "yoloe", "rtdetr"):
        if family in Path(base).stem and family not in out.stem:
            raise ValueError(
                f"{out} must have {family!r} in its name, from which Ultralytics derives the family; rename it."
            )
    scale, out_scale = next(iter(content.get("scales") or {}), ""), tasks.guess_model_scale(out)
    if scale and out_scale and out_scale != scale:
        raise ValueError(f"{out} must have the scale of {base} in its name, {scale!r}, got {out_scale!r}; rename it.")

    def one_line(value: Any) -> str:
        return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=sys.maxsize).strip()[1:-1]

    text = [
        f"# {base} of Ultralytics {ultralytics.__version__}, changed by shunted-lit.",
        "# Derived from a file of Ultralytics, AGPL-3.0: https://ultralytics.com/license",
        *(f"{key}: {one_line(value)}" for key, value in content.items() if key not in ("backbone", "head")),
    ]
    for section, first in (("backbone", 0), ("head", len(content["backbone"]))):
        layers = enumerate(content[section], start=first)
        text += ["", f"{section}:", *(f"  - {one_line(layer)}  # {i}" for i, layer in layers)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text) + "\n", encoding="utf-8")
    *before, (sources, *_) = all_layers(content)
    necks = [str(i) for i, layer in enumerate(before) if layer[2] in (NECK, ACROSS)]
    changes = [f"the head also reads layer {sources[0]}"] if recipe else []
    changes += [f"the neck is layer {', '.join(necks)}"] if necks else []
    print(f"{out}: {'; '.join(changes)}")


def is_neck(layer: nn.Module) -> bool:
    """Return whether a YOLO layer is a neck, a sequence that starts with one, or part of a neck across levels."""
    first = layer[0] if isinstance(layer, nn.Sequential) and len(layer) else layer
    return isinstance(first, (ShuntedTransformer, ReadsLayers))


def transfer_weights(model: Any, base: Any) -> tuple[int, int]:
    """Load the weights of a detector into the same detector with necks or a finer level, whose layers are renumbered.

    Args:
        model: detector with necks or a finer level, an Ultralytics DetectionModel (or that of another task):
            `YOLO(...).model`.
        base: the same detector without. Its head, the last layer, may have other classes and is loaded in part.

    Returns:
        The number of tensors that were loaded, and the number of tensors of the base.

    Raises:
        ValueError: The base has a neck, or differs from the model in a layer other than the head.
    """
    if any(map(is_neck, base.model)):
        raise ValueError("the base must have no neck; a model with a neck can be trained as it is.")
    *layers, head = [layer for layer in model.model if not is_neck(layer)]
    levels = getattr(head, "nl", 0) - getattr(base.model[-1], "nl", 0)
    if levels > 0:
        layers = layers[: -FINER_LAYERS * levels]
    if len(layers) + 1 != len(base.model):
        raise ValueError(
            f"the base must have the model's {len(layers) + 1} layers without necks, got {len(base.model)}."
        )
    states = [(own.state_dict(), given.state_dict()) for own, given in zip([*layers, head], base.model, strict=True)]
    if levels > 0:
        own, given = states[-1]
        states[-1] = own, {LEVEL.sub(lambda m: f"{m[1]}{int(m[2]) + levels}.", name): x for name, x in given.items()}
    for i, (own, given) in enumerate(states[:-1]):
        if mismatch := weights.describe_mismatch(own, given):
            raise ValueError(f"the base is another model; the weights of its layer {i} do not fit: {mismatch}")
    loaded = total = 0
    for layer, (own, given) in zip([*layers, head], states, strict=True):
        fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
        layer.load_state_dict(fitting, strict=False)
        loaded, total = loaded + len(fitting), total + len(given)
    return loaded, total


def take_head(model: Any, base: Any) -> None:
    """Move the head of the base, and tensors such as class embeddings, into a model with necks."""
    # A new head may differ: a fine-tuned one keeps the width that it had for the classes before fine-tuning.
    own, head = model.model[-1], base.model[-1]
    same_levels = getattr(own, "nl", 0) == getattr(head, "nl", 0)
    if type(own) is type(head) and same_levels:  # `transfer_weights` loads what fits of any other head
        head.i, head.f = own.i, own.f
        model.model[-1] = head
        vars(model).update({name: value for name, value in vars(base).items() if isinstance(value, Tensor)})


def write_weights(model: str | Path, out: str | Path, *, base: str | Path | None = None,
                  neck: str | Path | None = None, layer: int | None = None,
                  level: int | None = None) -> None:  # fmt: skip
    """Write a checkpoint to fine-tune: a model YAML with the weights of its base, of a trained neck, or of both.

    Args:
        model: the model YAML, as written by `shunted-lit yolo yaml`.
        out: file to write, such as yolo26s-shunted.pt; must not exist.
        base: checkpoint of the same model without the neck, such as yolo26s.pt, which Ultralytics downloads. The number
            of classes and their names are those of this checkpoint.
        neck: checkpoint of `shunted-lit fit` or of the reference implementation whose neck is used.
        layer: index of the layer that gets the trained neck; needed where the model has several necks.
        level: level of the trained neck; needed where its checkpoint has several.

    Raises:
        ValueError: Neither base nor neck is given, the base is another model, the trained neck does not fit, or the
            file exists.
    """
    model, out = Path(model), Path(out)
    check_new_file(out, ".pt")
    if base is None and neck is None:
        raise ValueError("weights must come from --base, --neck, or both, got neither.")
    if neck is None and (layer is not None or level is not None):
        raise ValueError("`layer` and `level` apply to a trained neck; name its checkpoint with --neck.")
    content = read_yaml(str(model))
    if all(layer[2] not in (NECK, ACROSS) for layer in all_layers(content)) and (neck or not has_finer_level(content)):
        raise ValueError(f"{model} must have a neck, got none; write a model YAML with `shunted-lit yolo yaml`.")
    yolo = load_model(model)
    if base is not None:
        with explain_errors(f"{base} is not a readable checkpoint of Ultralytics"):
            trained = tasks.load_checkpoint(str(base))[0]  # the averaged weights where the file has them
        if trained.task != yolo.task:
            raise ValueError(f"{base} must be for the task of {model}, {yolo.task!r}, got {trained.task!r}.")
        yolo.model = type(trained)(content, ch=trained.yaml.get("channels", 3), nc=len(trained.names), verbose=False)
        yolo.model.names, yolo.model.task = trained.names, trained.task
        take_head(yolo.model, trained)
        with explain_errors(f"{base} does not fit {model}"):
            loaded, total = transfer_weights(yolo.model, trained)
        print(f"{base}: loaded {loaded} of {total} tensors")
    if neck is not None:
        load_neck(yolo.model, str(neck), layer, level)
    out.parent.mkdir(parents=True, exist_ok=True)
    yolo.save(str(out))
    print(out)


def load_model(path: str | Path) -> Any:
    """Return the `YOLO` or `RTDETR` of a checkpoint or a model YAML.

    Raises:
        ValueError: It cannot be read.
    """
    with explain_errors(f"{path} is not a readable model of Ultralytics"):
        return RTDETR(str(path)) if "rtdetr" in Path(path).stem else YOLO(str(path))


def load_neck(model: Any, path: str, layer: int | None, level: int | None) -> None:
    """Load a trained neck into layer number `layer` of a detector; where this holds several necks, into the first."""
    necks = [i for i, module in enumerate(model.model) if is_neck(module) and not isinstance(module, ReadsLayers)]
    layer = necks[0] if layer is None and len(necks) == 1 else layer
    if layer not in necks:
        raise ValueError(f"`layer` must be one of the model's necks, {necks}, got {layer}.")
    neck: Any = next(module for module in model.model[layer].modules() if isinstance(module, ShuntedTransformer))
    heads = neck.block[0].attn.num_heads
    # A checkpoint of `fit` contains the number of heads; a file of weights alone does not.
    has_keywords = (weights.read_checkpoint(path).get("hyper_parameters") or {}).get("neck") is not None
    keywords = {} if has_keywords else {"num_heads": heads}
    trained: Any = shunted.ShuntedTransformer.from_checkpoint(path, level, **keywords)
    if (trained_heads := trained.block[0].attn.num_heads) != heads:
        raise ValueError(f"the neck of {path} must have the {heads} heads of layer {layer}, got {trained_heads}.")
    state = trained.state_dict()
    start = {name: value for name, value in neck.state_dict().items() if name.startswith(("out_proj", "layer_scale"))}
    if start and not start.keys() & state.keys():
        state.update(start)
        print(f"{path}: its neck does not add its input; layer {layer} keeps its identity start")
    neck.load_state_dict(state)
    print(f"{path}: its neck is loaded into layer {layer}")
