"""The public surface stays: commands, options, public names, and the configs saved by runs.

After an addition, `python tests/commands/test_public_surface.py` updates surface.json. A removal is a breaking
change and belongs in CHANGELOG.
"""

import importlib
import inspect
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from shunted_lit import __version__, ultralytics
from shunted_lit.cli import main
from shunted_lit.commands import COMMANDS
from shunted_lit.commands.yolo import score
from shunted_lit.data import BaseDataModule
from shunted_lit.tasks import BaseTask

HERE = Path(__file__).parents[1]
LIST = HERE / "commands/surface.json"
MODULES = ["shunted_lit", "shunted_lit.tasks", "shunted_lit.data"]
FURTHER = {  # documented names of modules without __all__
    "shunted_lit.visualization.attention": ["attention_costs", "attention_maps", "draw_attention", "record_attention"],
    "shunted_lit.training.checkpoint": ["RunCheckpoint"],
    "shunted_lit.models.detectors": ["DETECTORS", "Pyramid", "build_detector", "detect"],
    "shunted_lit.models.feature_path": ["FeaturePath"],
    "shunted_lit.prediction.writers": ["PredictionWriter"],
    "shunted_lit.training.report": ["RunReport"],
    "shunted_lit.models.segmenters": ["DECODERS", "Segmenter", "segment"],
    "shunted_lit.ultralytics": ["write_weights", "write_yaml"],
}


def arguments(thing):
    if inspect.isclass(thing) and issubclass(thing, (BaseTask, BaseDataModule)):  # with those of its base classes
        parser = ArgumentParser()
        parser.add_class_arguments(thing)
        return list(vars(parser.get_defaults()))
    parameters = inspect.signature(thing).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def surface():
    """Return public names and commands with their arguments."""
    found = {}
    for module in MODULES:
        found |= {f"{module}.{name}": getattr(importlib.import_module(module), name)
                  for name in importlib.import_module(module).__all__}  # fmt: skip
    for module, names in FURTHER.items():
        found |= {f"{module}.{name}": getattr(importlib.import_module(module), name) for name in names}
    names = {name: arguments(thing) if callable(thing) else sorted(thing) for name, thing in found.items()}
    commands = {name: arguments(command.load()) for name, command in COMMANDS.items()
                if command.from_signature}  # fmt: skip
    yolo_commands = {"yaml": ultralytics.write_yaml, "weights": ultralytics.write_weights, "score": score}
    commands |= {f"yolo {name}": arguments(function) for name, function in yolo_commands.items()}
    return {"names": names, "commands": {**commands, **{name: options(name) for name in OWN}}}


OWN = {
    "fit": ["checkpoint.last", "checkpoint.save_last", "report."],
    "validate": ["report."],
    "test": ["report."],
    "predict": ["predictions."],
    "check": [],
    "shard": ["out", "samples"],
}


def options(command):
    """Return the options of a command that this package adds to those of Lightning."""
    output = StringIO()
    with redirect_stdout(output), pytest.raises(SystemExit):
        main([command, "--help"])
    words = {word.split("=")[0].strip("[],") for word in output.getvalue().split() if word.startswith(("--", "[--"))}
    prefixes = tuple(f"--{group}" for group in OWN[command])
    plain = ("--config", "--ckpt_path", "--seed_everything", "--model", "--data", "--decode", "--loggers",
             "--optimizer", "--lr_scheduler")  # fmt: skip
    return sorted(word for word in words if word in plain or (prefixes and word.startswith(prefixes)))


def test_public_surface_is_unchanged():
    before, now = json.loads(LIST.read_text()), surface()
    for kind in before:
        for name, values in before[kind].items():
            assert name in now[kind], f"{name} is gone"
            gone = [value for value in values if value not in now[kind][name]]
            assert not gone, f"{name} has lost {gone}"
    assert now == before, "names were added: run python tests/commands/test_public_surface.py"


def test_positional_arguments_keep_their_order():
    before, now = json.loads(LIST.read_text())["names"], surface()["names"]
    for name, values in before.items():
        if name.endswith("Task"):
            assert (now[name][:2], values[:2]) == (["num_classes", "class_names"],) * 2
            continue
        kept = [value for value in now[name] if value in values]
        assert kept == values, name


def leaves(content, path=()):
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, content


@pytest.mark.parametrize("file", sorted(HERE.glob("saved_configs/*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_saved_config_is_read_unchanged(file, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={file}", "--print_config"])
    assert stop.value.code in (0, None)
    now = dict(leaves(yaml.safe_load(capsys.readouterr().out)))
    links = ("num_classes", "class_names", "annotation")  # linked between task and data
    for path, value in leaves(yaml.safe_load(file.read_text())):
        if path[-1] not in links:
            assert now.get(path, "nothing") == value, path


def test_this_release_has_saved_configs():
    assert len(list(HERE.glob(f"saved_configs/{__version__}/*.yaml"))) >= 5


if __name__ == "__main__":
    LIST.write_text(json.dumps(surface(), indent=1) + "\n")
    print(f"{LIST}: written", file=sys.stderr)
