"""Random configs and command lines: they succeed, or print an error and exit with code 2."""

import copy
import functools
import logging
import random
import string
from pathlib import Path

import pytest
import yaml
from helpers.fuzzing import LONG, key_paths
from lightning.pytorch import Trainer

from shunted_lit.cli import command

ROOT = Path(__file__).parents[2]
SEEDS = range(2000) if LONG else [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 24))]

VALUES = [
    *(None, -1, 0, 1, 7, 3.5, -0.5, "x", "", [], {}, [1, "a"], {"a": 1}, True, "null", "..", "${x}", 1e-300, [[]], "0"),
    *(float("nan"), "shunted_lit.tasks.DetectionTask", "os.system", "DetectionTask", "\u00e9\u4e2d"),
]


def damage_config(text, dice):
    """Return a config with one to three random faults."""
    content = yaml.safe_load(text)
    for _ in range(dice.randint(1, 3)):
        *above, key = dice.choice(list(key_paths(content)) or [("trainer",)])
        inner = content
        for step in above:
            inner = inner[step]
        kind = dice.choice(["replace", "remove", "rename", "nest", "add"])
        if kind == "replace" or not isinstance(inner, dict):
            inner[key] = copy.deepcopy(dice.choice(VALUES))
        elif kind == "remove":
            del inner[key]
        elif kind == "rename":
            inner[f"{key}{dice.choice(string.ascii_lowercase)}"] = inner.pop(key)
        elif kind == "nest":
            inner[key] = {str(key): inner[key]}
        else:
            inner[dice.choice(["x", "class_path", "init_args", "neck", "1", ""])] = copy.deepcopy(dice.choice(VALUES))
    text = yaml.safe_dump(content, allow_unicode=True)
    if dice.random() < 0.25:
        at = dice.randrange(len(text))
        text = (
            text[:at]
            + dice.choice(["\t", ":", "{", "\0", "- ", "&a *a", "!!python/object:os.system", '"', "\x85"])
            + text[at:]
        )
    return text


CONFIGS = ["neck.yaml", "shapes/mask_rcnn.yaml", "shapes/semantic_fpn.yaml", "digits.yaml", "imagenet/shunted_t.yaml",
           "coco/retinanet_shunted_t.yaml", "ade20k/fpn_shunted_t.yaml"]  # fmt: skip


def check_command_line(words, monkeypatch, capsys):
    """Check that a command line, without its training, succeeds, or prints an error and exits with code 2."""
    monkeypatch.setattr(Trainer, "fit", functools.wraps(Trainer.fit)(lambda *_, **__: None))
    monkeypatch.setattr("sys.argv", ["shunted-lit", *words])
    monkeypatch.setattr(logging.root, "handlers", [])  # handlers of other tests may write to closed files
    try:
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    output = capsys.readouterr()
    assert code in (0, 2), output.err
    assert "Traceback" not in output.err
    assert code == 0 or "error: " in output.err
    return code


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_config_gives_an_error_message(seed, monkeypatch, capsys):
    dice = random.Random(seed)
    text = damage_config((ROOT / "configs" / CONFIGS[seed % len(CONFIGS)]).read_text(), dice)
    Path("damaged.yaml").write_text(text, encoding="utf-8")
    check_command_line(["fit", "--config=damaged.yaml", "--trainer.logger=false"], monkeypatch, capsys)


WORDS = [
    word.strip()
    for word in """
fit | validate | test | predict | check | cost | export | attention | benchmark | scenes | study | digits |
--help | --config | none.yaml | neck | --model | DetectionTask | --data | ShapesDataModule | --data.size=x |
--model.lr=-1 | --model.neck={depth: 0} | --trainer.max_epochs | 1 | --ckpt_path | last | --ckpt_path=a.ckpt |
--model.weights=a.pt | --data.batch_size=0 | --options | {cin: 3} | --out | . | --point | 1 | -x | <empty> | = |
--trainer.devices=9 | --model.detector | yolo | --model.backbone=resnet | --data.train_size=-4 | shunted_q |
--trainer.precision=8 | --trainer.accelerator | abacus | --seed_everything | --data.annotation=x
""".replace("<empty>", "").split("|")
]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_command_line_gives_an_error_message(seed, monkeypatch, capsys):
    dice = random.Random(seed)
    excluded = ("benchmark", "scenes", "digits", "study", "yolo")  # they may run for minutes, or belong to Ultralytics
    words = ["yolo"]
    while words[0] in excluded:
        words = dice.choices(WORDS, k=dice.randint(1, 6))
        if dice.random() < 0.7:
            words = ["fit", "--model=DetectionTask", "--data=ShapesDataModule", "--trainer.logger=false", *words]
    check_command_line(words, monkeypatch, capsys)
