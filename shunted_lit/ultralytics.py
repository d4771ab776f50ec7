"""The neck in Ultralytics' YOLO: a name that its model YAMLs may use, such YAMLs, and weights that carry over.

Importing this module is all that is needed: from then on `ShuntedTransformer` is a layer in a model YAML, as in
`[-1, 1, ShuntedTransformer, [c2, {depth: 2, num_heads: 4}]]`, where `c2` stands for the channels of the layer before,
whatever the model's width. A model with the neck, saved as .pt, imports this module by itself wherever it is loaded.

Ultralytics is licensed under AGPL-3.0 (or bought): what runs through this module is under its terms. Nothing else in
this package imports it, and none of its files is included: model YAMLs are derived from those that are installed.
"""

import difflib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from shunted_lit.models import shunted, weights
from shunted_lit.models.feature_path import check_neck_keywords
from shunted_lit.utils.files import check_new_file

OLDEST = "8.3.228"  # Ultralytics that is tried; pyproject.toml says the same
FAMILIES = ("-world", "yoloe", "rtdetr")  # which Ultralytics tells by the file's name alone
INSTALL = "pip install -U 'shunted-lit[ultralytics]'"
try:
    import ultralytics
except ImportError as error:
    raise ImportError(f"the neck in YOLO needs Ultralytics ({error}): {INSTALL}") from error
if Version(ultralytics.__version__) < Version(OLDEST):
    raise ImportError(f"Ultralytics is {ultralytics.__version__}, but {OLDEST} is the oldest that works: {INSTALL}")

from ultralytics import RTDETR, YOLO  # noqa: E402 - once the version is known to have all of this
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.utils import dist  # noqa: E402

__all__ = ["ShuntedTransformer", "insert_neck", "transfer_weights", "write_weights", "write_yaml"]


class ShuntedTransformer(shunted.ShuntedTransformer):
    """The neck, as a model YAML may name it: `[c2]`, or `[c2, {keyword: value, ...}]`.

    It has a class of its own, in this module, so that whatever loads a pickled model with it imports this module, and
    its YAML, which Ultralytics reads again for training, is understood.

    Args:
        cin: channels in and out; `c2` in a YAML.
        args, keywords: as for `shunted_lit.ShuntedTransformer`; a mapping at the end of `args` is read as keywords.

    Raises:
        ValueError: as `shunted_lit.ShuntedTransformer`, and an unknown keyword.
    """

    def __init__(self, cin: int = 512, *args: Any, **keywords: Any):
        if args and isinstance(args[-1], Mapping):
            *args, options = args  # type: ignore[assignment]
            keywords = {**options, **keywords}
        check_neck_keywords(keywords)
        super().__init__(cin, *args, **keywords)


def with_this_module(generate: Callable[..., str]) -> Callable[..., str]:
    """Ultralytics trains on several GPUs by a file that it writes and runs; there, this module is to be imported."""

    @functools.wraps(generate)
    def generate_ddp_file(trainer: Any) -> str:
        path = Path(generate(trainer))
        lines = f"import sys\nsys.path = {sys.path!r}\nimport {__name__}\n"
        path.write_text(lines + path.read_text(encoding="utf-8"), encoding="utf-8")
        return str(path)

    return generate_ddp_file


def register() -> None:
    """Makes the neck known to Ultralytics: its YAML parser, its safe loader, and its training on several GPUs."""
    tasks.ShuntedTransformer = ShuntedTransformer
    layers = [kind for kind in vars(shunted).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    torch.serialization.add_safe_globals([ShuntedTransformer, *layers, weights.load_reference_names, _WrappedHook])
    if not hasattr(dist.generate_ddp_file, "__wrapped__"):
        dist.generate_ddp_file = with_this_module(dist.generate_ddp_file)


register()


def insert_neck(
    base: str = "yolo26n", after: int | Sequence[int] | None = None, neck: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of a model YAML of the installed Ultralytics, with the neck in it.

    Args:
        base: name of the model with its scale, such as yolo26s or yolo11m-seg, or a model YAML of one's own.
        after: index of the layer whose map the neck takes, or several. All layers that read this map read the neck's
            instead. By default the backbone's last: the coarsest map, where attention over the whole image is cheap,
            and where YOLO11 and YOLO26 (C2PSA) have theirs; in RT-DETR after AIFI, which is its own.
        neck: keywords of `shunted_lit.ShuntedTransformer` over its defaults, but for `layer_scale`, which is 0 here
            (null for the source's): the model starts with the outputs of its base.

    Raises:
        ValueError: an unknown base; a layer that is not there, is the last, gives no map (B, C, H, W), or is named
            twice or has a neck already; heads that do not divide a map's channels, and whatever else
            `ShuntedTransformer` does not take.
    """
    content = read_yaml(base)
    del content["yaml_file"]
    if (scale := content.pop("scale")) and "scales" in content:
        content["scales"] = {scale: content["scales"][scale], **content["scales"]}  # the first is the default
    layers = [*content["backbone"], *content["head"]]
    last = len(content["backbone"]) - 1
    own = [i for i, layer in enumerate(layers) if layer[2] == "AIFI"]
    places = sorted((own[-1:] or [last]) if after is None else [after] if isinstance(after, int) else after)
    if not places:
        raise ValueError("after names no layer; give the index of one at least, or leave it out")
    for place in places:
        if not 0 <= place < len(layers) - 1:
            raise ValueError(
                f"{base} has no layer {place} that a neck could follow: the layers 0 to {len(layers) - 2} may have one"
            )
        if places.count(place) > 1 or ShuntedTransformer.__name__ in (layers[place][2], layers[place + 1][2]):
            raise ValueError(f"layer {place} of {base} would get two necks in a row; give one a greater depth instead")
    keywords = {"layer_scale": 0.0, **(neck or {})}
    check_neck_keywords(keywords)
    for name in ("cin", "device", "dtype"):
        if name in keywords:
            raise ValueError(f"the neck's {name} is that of the layer before it; leave it out")
    for place, channels in zip(places, channels_of(base, content, places), strict=True):
        try:
            ShuntedTransformer(channels, **keywords, device="meta")
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {place} of {base} has {channels} channels: {error}") from None

    def moved(index: int) -> int:
        """Where the map of a layer of the base stands now: its neck, if it has one."""
        return index + sum(place <= index for place in places)

    sections: dict[str, list[Any]] = {"backbone": [], "head": []}
    for i, (source, *layer) in enumerate(layers):
        section = sections["backbone" if i <= last else "head"]
        # -1 stays: what comes just before. Other numbers are made absolute, as necks may come in between.
        sources = [f if f == -1 else moved(f % i) for f in ([source] if isinstance(source, int) else source)]
        section.append([sources[0] if isinstance(source, int) else sources, *layer])
        if i in places:
            section.append([-1, 1, ShuntedTransformer.__name__, ["c2", dict(keywords)]])
    return {**content, **sections}


def read_yaml(name: str) -> dict[str, Any]:
    """A model YAML as Ultralytics reads it: the scale, which it takes from the file's name, is one of the entries."""
    if Path(name).suffix == ".pt":
        raise ValueError(
            f"{name} is a checkpoint; name the model, such as {Path(name).stem}, or its YAML: the weights come in by "
            "`shunted-lit yolo weights` then"
        )
    path = name if Path(name).suffix in (".yaml", ".yml") else f"{name}.yaml"
    try:
        content = tasks.yaml_model_load(path)
    except FileNotFoundError:
        folder = Path(ultralytics.__file__).parent / "cfg/models"
        close = difflib.get_close_matches(Path(name).stem.lower(), [file.stem for file in folder.rglob("*.yaml")], n=3)
        raise ValueError(
            f"{name!r} is no file, and no model of Ultralytics {ultralytics.__version__}; close names: "
            f"{', '.join(close) or 'none'}, with the letter of the scale after the number, as in yolo26s"
        ) from None
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name}: not a readable model YAML ({error})") from None
    layers = [content.get(key) for key in ("backbone", "head")]
    if not all(isinstance(some, list) and some for some in layers):
        raise ValueError(f"{name} is no model YAML: it needs layers in backbone and head")
    for number, layer in enumerate([*layers[0], *layers[1]]):
        if not isinstance(layer, list) or len(layer) != 4:
            raise ValueError(f"{name}: layer {number} is {layer}, but [from, repeats, module, [arguments]] is needed")
    if content["scale"] and content["scale"] not in content.get("scales", {content["scale"]: None}):
        raise ValueError(f"{name} is scale {content['scale']!r} by its name, but has {', '.join(content['scales'])}")
    return content


def channels_of(base: str, content: dict[str, Any], places: Sequence[int]) -> list[int]:
    """Channels of the maps (B, C, H, W) of some layers, found by a run on torch's meta device: no memory, no time."""
    size, scales = content.get("channels", 3), content.get("scales")
    named = {**deepcopy(content), "scale": next(iter(scales))} if scales else deepcopy(content)
    try:
        with torch.device("meta"):
            layers, _ = tasks.parse_model(named, ch=size, verbose=False)
            x = torch.empty(1, size, 256, 256)
    except Exception as error:  # whatever Ultralytics says to a layer that it does not know, or wrong arguments
        raise ValueError(f"Ultralytics can't build {base}: {type(error).__name__}, {error}") from error
    maps: list[Any] = []
    for i, layer in enumerate(layers[: max(places) + 1].eval()):
        sources = [layer.f] if isinstance(layer.f, int) else layer.f
        inputs = [x if f == -1 else maps[f] for f in sources]
        try:
            x = layer(inputs[0] if isinstance(layer.f, int) else inputs)
        except Exception as error:  # whatever a layer says that needs more than maps, such as text
            raise ValueError(f"layer {i} of {base}, {layer.type}, does not run on maps alone: {error}") from error
        maps.append(x)
    for place in places:
        if not isinstance(maps[place], Tensor) or maps[place].dim() != 4:
            shape = type(maps[place]).__name__ if not isinstance(maps[place], Tensor) else list(maps[place].shape)
            raise ValueError(
                f"layer {place} of {base}, {layers[place].type}, returns {shape}, but the neck takes one map "
                "(B, C, H, W); choose another layer"
            )
    return [maps[place].shape[1] for place in places]


def write_yaml(base: str, out: Path, after: int | list[int] | None = None, neck: dict[str, Any] | None = None) -> None:
    """Write a model YAML for Ultralytics: one of the installed package's own, with the neck in it.

    Args:
        base: name of the model with its scale, such as yolo26s or yolo11m-seg, or a model YAML of your own.
        out: file to write, such as yolo26s-shunted.yaml; must not exist. Ultralytics takes the scale from its name;
            where the name has none, it is the base's.
        after: index of the layer that the neck comes after, or several, [4, 6, 10]; by default the backbone's last
            (10 in YOLO11 and YOLO26), and AIFI in RT-DETR.
        neck: keywords of ShuntedTransformer, such as depth, num_heads (which must divide the channels), ratios.
            `layer_scale` is 0 unless named: the model starts with the outputs of its base; null is the source's neck.

    Raises:
        ValueError: an unknown base; a layer that is not there or gives no map; heads that do not divide its channels;
            a file that exists, or whose name says another scale or family.
    """
    content = insert_neck(base, after, neck)
    check_new_file(out, ".yaml")
    for family in FAMILIES:
        if family in Path(base).stem and family not in out.stem:
            raise ValueError(f"Ultralytics knows {base} by its name; rename {out}, so that it has {family!r} in it")
    mine, theirs = next(iter(content.get("scales") or {}), ""), tasks.guess_model_scale(out)
    if mine and theirs and theirs != mine:
        raise ValueError(
            f"{out} is a name that Ultralytics reads as scale {theirs!r}, but {base} is scale {mine!r}; rename it"
        )

    def line(value: Any) -> str:
        return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=sys.maxsize).strip()[1:-1]

    text = [
        f"# {base} of Ultralytics {ultralytics.__version__} with the neck of shunted-lit.",
        "# Derived from a file of Ultralytics, AGPL-3.0: https://ultralytics.com/license",
        *(f"{key}: {line(value)}" for key, value in content.items() if key not in ("backbone", "head")),
    ]
    number = 0
    for section in ("backbone", "head"):
        text += ["", f"{section}:"]
        for layer in content[section]:
            text.append(f"  - {line(layer)}  # {number}")
            number += 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text) + "\n", encoding="utf-8")
    necks = [i for i, layer in enumerate([*content["backbone"], *content["head"]]) if layer[2] == "ShuntedTransformer"]
    print(f"{out}: the neck is layer {', '.join(map(str, necks))}")


def is_neck(layer: nn.Module) -> bool:
    """Whether a layer of a YOLO is the neck, or several in a row."""
    return isinstance(layer[0] if isinstance(layer, nn.Sequential) and len(layer) else layer, ShuntedTransformer)


def transfer_weights(model: Any, base: Any) -> tuple[int, int]:
    """Gives a detector with necks the weights of the one without, whose layers have other numbers.

    Args:
        model: Ultralytics' DetectionModel (or of another task) with necks: `YOLO(...).model`.
        base: the same without them. Its head may be for other classes; what fits of it is taken.

    Returns:
        How many of the base's tensors were taken, and how many it has.

    Raises:
        ValueError: a base that is of another model, outside the head.
    """
    places = [i for i, layer in enumerate(model.model) if not is_neck(layer)]
    count = len(base.model)
    if any(map(is_neck, base.model)):
        raise ValueError("the base has a neck itself, and is a model to train from as it is")
    if count != len(places):
        raise ValueError(f"the base has {count} layers, but the model has {len(places)} besides its necks")
    given = {}
    for name, value in base.state_dict().items():
        _, index, rest = name.split(".", 2)
        given[f"model.{places[int(index)]}.{rest}"] = value
    head, necks = f"model.{places[-1]}.", tuple(f"model.{i}." for i in set(range(len(model.model))) - set(places))
    mine = {name: value for name, value in model.state_dict().items() if not name.startswith(necks)}
    if told := weights.describe_mismatch(
        {name: value for name, value in mine.items() if not name.startswith(head)},
        {name: value for name, value in given.items() if not name.startswith(head)},
    ):
        raise ValueError(f"the base is another model: {told}")
    fitting = {name: v for name, v in given.items() if name in mine and mine[name].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(given)


def take_head(model: Any, base: Any) -> None:
    """Puts the base's own head into a model with necks, with what goes with it, such as embeddings of class names.

    One built for the classes is not the same: trained before on others, a head keeps the width that it had for those.
    """
    mine, head = model.model[-1], base.model[-1]
    if type(mine) is type(head):  # else `transfer_weights` tells that the base is another model
        head.i, head.f = mine.i, mine.f
        model.model[-1] = head
        for name, value in vars(base).items():
            if isinstance(value, Tensor):
                setattr(model, name, value)


def write_weights(
    model: Path,
    out: Path,
    base: str | None = None,
    neck: str | None = None,
    layer: int | None = None,
    level: int | None = None,
) -> None:
    """Write a checkpoint to train from: a model YAML with the weights of its base, of a trained neck, or of both.

    Args:
        model: the model YAML with the neck, as `shunted-lit yolo yaml` writes it.
        out: file to write, such as yolo26s-shunted.pt; must not exist.
        base: checkpoint of the same model without the neck, such as yolo26s.pt, which Ultralytics fetches. Classes and
            their names are taken from it.
        neck: checkpoint of `shunted-lit fit`, or of the source; its neck is put in place.
        layer: which layer of the model gets that neck, where it has several.
        level: which neck of that checkpoint, where it has several.

    Raises:
        ValueError: neither base nor neck; a base of another model; a neck that does not fit; a file that exists.
    """
    check_new_file(out, ".pt")
    if base is None and neck is None:
        raise ValueError("nothing to take weights from: name --base, --neck, or both")
    if neck is None and (layer is not None or level is not None):
        raise ValueError("layer and level say where a trained neck goes, and which; name it by --neck")
    content = read_yaml(str(model))
    if not any(layer[2] == ShuntedTransformer.__name__ for layer in (*content["backbone"], *content["head"])):
        raise ValueError(f"{model} has no neck; `shunted-lit yolo yaml` writes one that has")
    try:
        yolo = RTDETR(str(model)) if "rtdetr" in model.stem else YOLO(str(model))
    except Exception as error:  # as in channels_of
        raise ValueError(f"Ultralytics can't build {model}: {type(error).__name__}, {error}") from error
    if base is not None:
        start = read_base(base)
        if start.task != yolo.task:
            raise ValueError(f"{base} is for the task {start.task!r}, but {model} for {yolo.task!r}")
        channels = start.yaml.get("channels", 3)
        yolo.model = type(start)(content, ch=channels, nc=len(start.names), verbose=False)
        yolo.model.names, yolo.model.task = start.names, start.task
        take_head(yolo.model, start)
        try:
            taken, total = transfer_weights(yolo.model, start)
        except ValueError as error:
            raise ValueError(f"{base} does not fit {model}: {error}") from None
        print(f"{taken} of the {total} tensors of {base} are taken")
    if neck is not None:
        place_neck(yolo.model, neck, layer, level)
    out.parent.mkdir(parents=True, exist_ok=True)
    yolo.save(str(out))
    print(out)


def read_base(path: str) -> Any:
    """The network in a checkpoint of Ultralytics, its averaged weights where there are such."""
    try:
        return tasks.load_checkpoint(path)[0]
    except Exception as error:  # what is not there, can't be fetched, or is another kind of file
        raise ValueError(f"{path}: no checkpoint of Ultralytics could be read ({error})") from error


def place_neck(model: Any, path: str, layer: int | None, level: int | None) -> None:
    """Gives a neck of `model`, the first where several are in a row, the weights of a trained one."""
    places = [i for i, module in enumerate(model.model) if is_neck(module)]
    if layer is None and len(places) == 1:
        (layer,) = places
    if layer not in places:
        raise ValueError(f"the necks of the model are the layers {places}, and layer is {layer}; name one of them")
    mine = next(module for module in model.model[layer].modules() if isinstance(module, ShuntedTransformer))
    # A checkpoint of `fit` says how many heads it has; weights alone do not.
    known = (weights.read_checkpoint(path).get("hyper_parameters") or {}).get("neck") is not None
    trained = shunted.ShuntedTransformer.from_checkpoint(path, level, **({} if known else {"num_heads": heads(mine)}))
    if heads(trained) != heads(mine):
        raise ValueError(f"the neck in {path} has {heads(trained)} heads, but layer {layer} has {heads(mine)}")
    state = trained.state_dict()
    if mine.layer_scale is not None and trained.layer_scale is None:
        state["layer_scale.gamma"] = mine.state_dict()["layer_scale.gamma"]
        print(f"the neck in {path} has no layer scale; that of layer {layer} keeps its start")
    mine.load_state_dict(state)
    print(f"the neck in {path} is layer {layer}")


def heads(neck: shunted.ShuntedTransformer) -> int:
    attention: Any = neck.block[0].attn
    return attention.num_heads
