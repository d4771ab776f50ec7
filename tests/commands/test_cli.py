"""The command line from end to end: help, configs, run folders, resuming, data formats and errors."""

import contextlib
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Union

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

from shunted_lit import ShuntedTransformer
from shunted_lit.cli import main
from shunted_lit.commands import COMMANDS, find_command, format_help
from shunted_lit.commands.fit import prefer_counts
from shunted_lit.data.scenes import write_scenes
from shunted_lit.tasks import DetectionTask

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TINY = [
    "--config",
    str(ROOT / "configs/neck.yaml"),
    "--model.neck={depth: 1, mlp_ratios: 1}",
    "--model.pyramid_channels=32",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--data.num_workers=0",
]
QUICK = [
    *TINY,
    "--data.train_size=32",
    "--data.val_size=16",
    "--data.size=64",
    "--model.min_size=64",
    "--data.batch_size=16",
]


def metrics(folder, name):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def fit(*args):
    cli = main(["fit", *args])
    return cli, Path(cli.trainer.log_dir)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_short_and_parse(config, capsys):
    assert len(config.read_text().splitlines()) <= 35
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(config), "--print_config"])
    assert done.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].startswith("shunted_lit.tasks.")


def test_run_folder_has_config_metrics_checkpoints_and_pictures():
    cli, folder = fit(
        *QUICK, "--trainer.max_epochs=3", "--data.train_size=64", "--data.val_size=4", "--data.batch_size=8"
    )
    assert folder == Path("runs/version_0")
    for name in ("config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0
    losses = metrics(folder, "train/loss")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), "the loss goes down"
    for name in ("map", "map_50", "map_small", "map_medium", "map_large"):
        assert len(metrics(folder, f"val/{name}")) == 3
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert "resnet18" in (folder / "config.yaml").read_text()

    # The checkpoint alone restores task and neck, with weights_only.
    path = folder / "checkpoints/last.ckpt"
    task = DetectionTask.load_from_checkpoint(path, weights_only=True).eval()
    neck = ShuntedTransformer.from_checkpoint(path)
    assert not neck.training
    x = torch.randn(1, 512, 5, 7)
    torch.testing.assert_close(neck(x), cli.model.detector.backbone.body.necks["5"].eval()(x), rtol=0, atol=0)
    image = [torch.rand(3, 128, 128)]
    torch.testing.assert_close(task(image), cli.model.eval()(image))
    assert task.class_names == ["circle", "triangle", "square", "star", "cross"]
    with pytest.raises(ValueError, match=r"`level` must be one of \['5'\], the levels with a neck, got 4"):
        ShuntedTransformer.from_checkpoint(path, level=4)


@pytest.mark.slow
def test_second_run_gets_a_new_folder_and_equal_seeds_equal_metrics():
    first, second = (fit(*QUICK, "--trainer.max_epochs=1")[1] for _ in range(2))
    assert (first.name, second.name) == ("version_0", "version_1")
    assert metrics(first, "train/loss") == metrics(second, "train/loss"), "equal seeds, equal runs"


@pytest.mark.slow
def test_default_root_dir_and_other_loggers(tmp_path):
    _, folder = fit(
        *QUICK, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'here'}",
        "--trainer.logger+=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'other'}",
    )  # fmt: skip
    assert folder == tmp_path / "here/version_0"
    assert (folder / "metrics.csv").is_file()
    assert list((tmp_path / "other").rglob("metrics.csv"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", [Union[float, int, None], Union[int, float, None]])  # noqa: UP007 - typing's own
def test_a_limit_of_1_is_one_batch_in_either_order_of_types(kind):
    """With torch 2.9, Lightning's annotation is `float | int`, and `1` would be all batches, as 1.0 is."""

    class Trained:
        def __init__(self, limit: kind = None): ...

    Trained.__init__.__annotations__["limit"] = kind
    prefer_counts(Trained.__init__)
    parser = LightningArgumentParser()
    parser.add_class_arguments(Trained, "trainer")
    for word, value in (("1", 1), ("1.0", 1.0), ("3", 3), ("0.5", 0.5), ("null", None)):
        limit = parser.parse_args([f"--trainer.limit={word}"]).trainer.limit
        assert (limit, type(limit)) == (value, type(value))


def test_fast_dev_run_writes_no_files():
    main(["fit", *QUICK, "--trainer.fast_dev_run=true"])
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "necks"),
    [
        pytest.param(["--model.neck=null"], set(), marks=pytest.mark.slow),
        pytest.param(["--model.backbone=shunted_t", "--model.neck=null"], set(), marks=pytest.mark.slow),
        pytest.param(["--model.backbone=shunted_t"], {"5"}, marks=pytest.mark.slow),
        (["--model.neck_levels=[4,5]", "--model.neck={depth: 1, num_heads: 4, ratios: [4, 1]}"], {"4", "5"}),
        (["--model.detector=retinanet", "--model.extra_levels=2"], {"5"}),
    ],
    ids=["no neck", "shunted_t alone", "shunted_t and neck", "two necks", "retinanet"],
)
def test_backbone_and_neck_combine_freely(change, necks):
    cli, folder = fit(*QUICK, "--trainer.max_epochs=1", "--data.batch_size=16", *change)
    assert set(cli.model.detector.backbone.body.necks) == necks
    assert len(metrics(folder, "val/map")) == 1
    DetectionTask.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True)


@pytest.mark.slow
def test_frozen_backbone_trains_only_neck_and_head():
    cli, folder = fit(*QUICK, "--trainer.max_epochs=1", "--model.freeze_backbone=true")
    start = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    optimized = sum(p.numel() for group in cli.trainer.optimizers[0].param_groups for p in group["params"])
    body = cli.model.detector.backbone.body
    total, frozen = (sum(p.numel() for p in module.parameters()) for module in (cli.model, body.backbone))
    assert optimized == total - frozen
    running = [value for name, value in start["state_dict"].items() if name.endswith("bn1.running_mean")]
    assert running
    assert all(not value.any() for value in running), "BatchNorm statistics stay frozen"


def test_resuming_by_path_continues_in_a_new_folder():
    steps = [*QUICK, "--data.train_size=8", "--data.val_size=2", "--data.batch_size=4"]
    _, first = fit(*steps, "--trainer.max_epochs=1")
    resumed, second = fit(*steps, "--trainer.max_epochs=2", f"--ckpt_path={first}/checkpoints/last.ckpt")
    assert first != second
    assert resumed.trainer.current_epoch == 2
    assert resumed.trainer.global_step == 4
    assert len(metrics(second, "val/map")) == 1, "only the second epoch ran"


@pytest.mark.slow
def test_weight_decay_skips_norms_and_biases_and_rate_follows_schedule():
    cli, _ = fit(
        *QUICK, "--data.batch_size=4", "--trainer.max_epochs=2", "--model.warmup_epochs=0.5", "--model.lr=0.01"
    )
    optimizer = cli.trainer.optimizers[0]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in cli.model.named_parameters():
        assert decays[id(parameter)] == (0 if parameter.ndim <= 1 else 0.05), name
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)

    configured = cli.model.configure_optimizers()
    rates = []
    for _ in range(16):
        rates.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    rising = [0.01 * (i + 1) / 5 for i in range(4)]
    falling = [1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    assert rates == pytest.approx(rising + falling, rel=1e-4)


def test_endless_training_is_rejected():
    with pytest.raises(ValueError, match="max_epochs"):
        fit(*QUICK, "--trainer.max_epochs=-1")


@pytest.mark.slow
def test_resumed_run_follows_its_longer_schedule():
    steps = [*QUICK, "--data.batch_size=8", "--model.warmup_epochs=0"]
    _, first = fit(*steps, "--trainer.max_epochs=1")
    _, second = fit(
        *steps, "--trainer.max_epochs=3", f"--ckpt_path={first}/checkpoints/last.ckpt",
        "--trainer.callbacks+=LearningRateMonitor",
    )  # fmt: skip
    expected = [1e-6 + (0.002 - 1e-6) * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(4, 12)]
    assert metrics(second, "lr-AdamW/pg1") == pytest.approx(expected)


@pytest.mark.slow
def test_settings_that_a_checkpoint_overrides_are_reported(caplog):
    _, first = fit(*QUICK, "--trainer.max_epochs=1")
    resumed, _ = fit(*QUICK, "--trainer.max_epochs=2", "--model.lr=0.5", f"--ckpt_path={first}/checkpoints/last.ckpt")
    assert resumed.model.optim.lr == 0.002
    assert "`model.lr` is 0.002 as in the checkpoint, not 0.5" in caplog.text


@pytest.mark.slow
def test_mixed_precision_with_clipping():
    cli, _ = fit(*QUICK, "--trainer.max_epochs=1", "--trainer.precision=bf16-mixed")
    assert cli.trainer.gradient_clip_val == 5


@pytest.mark.parametrize("subcommand", [pytest.param("validate", marks=pytest.mark.slow), "test"])
def test_evaluation_needs_a_checkpoint(subcommand):
    _, first = fit(*QUICK, "--data.train_size=8", "--data.val_size=4", "--data.batch_size=4", "--trainer.max_epochs=1")
    with pytest.raises(ValueError, match="needs trained weights; pass a checkpoint with --ckpt_path"):
        main([subcommand, *QUICK])
    cli = main([subcommand, *QUICK, "--data.val_size=4", f"--ckpt_path={first}/checkpoints/best.ckpt"])
    stage = {"validate": "val", "test": "test"}[subcommand]
    assert metrics(Path(cli.trainer.log_dir), f"{stage}/map") == pytest.approx(metrics(first, "val/map")[-1:], abs=1e-6)


# --- data sets of users


READERS = {
    "yolo": ["--data=YoloDataModule", "--data.data={folder}/data.yaml"],
    "coco": [
        "--data=CocoDataModule",
        "--data.root={folder}",
        "--data.train_images=images/train",
        "--data.train_annotations=annotations/train.json",
        "--data.val_images=images/val",
        "--data.val_annotations=annotations/val.json",
    ],
}


def user_data(reader, folder):
    config = yaml.safe_load((ROOT / "configs/neck.yaml").read_text())
    config.pop("data")
    Path("own.yaml").write_text(yaml.safe_dump(config))
    tiny = [word if not word.endswith("neck.yaml") else "own.yaml" for word in TINY]
    data = [word.format(folder=folder) for word in READERS[reader]]
    at = next(i for i, word in enumerate(tiny) if word.startswith("--data."))
    return [*tiny[:at], *data, *tiny[at:], "--data.batch_size=8", "--model.min_size=64", "--model.max_size=96"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "set"
    write_scenes(folder, train=32, val=8, size=64)
    return folder


@pytest.mark.slow
def test_yolo_and_coco_data_train_alike(folder):
    results = {}
    for reader in READERS:
        args = user_data(reader, folder)
        cli, run = fit(*args, "--trainer.max_epochs=2")
        assert cli.model.class_names == ["circle", "triangle", "square", "star", "cross"]
        results[reader] = {name: metrics(run, name) for name in ("train/loss", "val/map", "val/map_50")}
        resumed, _ = fit(*args, "--trainer.max_epochs=3", f"--ckpt_path={run}/checkpoints/last.ckpt")
        assert resumed.trainer.global_step == 12
        results[reader]["weights"] = sum(p.double().sum().item() for p in cli.model.parameters())
    assert results["yolo"] == results["coco"]


def run(*args):
    return subprocess.run([sys.executable, "-m", "shunted_lit", *args], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_ends_in_one_line_and_exit_code_2(folder, tmp_path, workers):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "images/train/000001.png").write_bytes(b"nothing")
    done = run("fit", *user_data("yolo", damaged), f"--data.num_workers={workers}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "shunted-lit: error: " in done.stderr
    assert "000001.png: not a readable image" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.neck.num_heads=3"], "got 3 heads and 512 channels"),
        (["--model.detector_options={foo: 1}"], "fcos .* foo"),
        (["--model.min_size=1024"], r"`min_size` must be between 1 and `max_size` \(96\), got 1024; lower it or raise"),
        (["--model.min_size=0"], "min_size.* 0"),
        (["--model.neck={mlp_ratios: -1}"], "-1 .*512"),
        (["--model.neck={depth: many}"], "depth.*'?many'?"),
    ],
)
def test_invalid_settings_are_rejected(args, message):
    """Further ones are in bad_input.yaml."""
    with pytest.raises((ValueError, SystemExit), match=message):
        fit(*QUICK, *args)


@pytest.mark.slow
def test_run_without_logger_keeps_existing_config_and_prints_scores(capsys):
    Path("config.yaml").write_text("mine: 1")
    main(["fit", *QUICK, "--trainer.max_steps=1", "--trainer.logger=false"])
    assert Path("config.yaml").read_text() == "mine: 1"
    assert not list(Path().glob("*.png")), "there is no run folder for pictures"
    table = capsys.readouterr().out.split("data     ShapesDataModule")[1]
    assert re.search(r"train/loss +│ \d\.\d{4}", table)


def test_scenes_writes_coco_annotations(tmp_path):
    main(["scenes", str(tmp_path / "set"), "--train=3", "--val=2", "--size=48"])
    content = json.loads((tmp_path / "set/annotations/train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["000000.png", "000001.png", "000002.png"]
    with pytest.raises(ValueError, match="not empty; choose a new folder"):
        main(["scenes", str(tmp_path / "set")])


# --- help

IN_HELP = ["fit", "validate", "test", "predict", "export", "benchmark", "attention", "cost", "study", "check", "scenes",
           "digits", "shard", "yolo", "configs"]  # fmt: skip


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_by_group(args, capsys):
    assert main(args) is None
    assert capsys.readouterr().out == format_help() + "\n"
    assert sorted(COMMANDS) == sorted(IN_HELP)
    for command in COMMANDS.values():
        assert re.search(rf"^  {command.name} +{re.escape(command.summary)}$", format_help(), re.MULTILINE)
        assert f"\n{command.group}:\n" in format_help()
    assert "shunted-lit COMMAND --help" in format_help()


@pytest.mark.parametrize("name", IN_HELP)
def test_each_command_has_its_own_help(name, capsys):
    assert callable(find_command(name).load())
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: shunted-lit {name}")
    assert "Lightning Trainer command line tool" not in text
    if name in ("fit", "validate", "test", "predict"):
        assert f"examples:\n  shunted-lit {name} --" in text


def test_help_of_a_command_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["help", "scenes"])
    assert capsys.readouterr().out.startswith("usage: shunted-lit scenes")


def test_similar_commands_are_suggested():
    with pytest.raises(ValueError, match=r"no command 'vaildate'; did you mean 'validate'\?.*--help"):
        main(["vaildate"])


def test_help_imports_nothing_heavy():
    code = "import sys; from shunted_lit.cli import main; main([]); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "config",
    ["trainer: 5", "trainer: null", "trainer: [1]", "checkpoint: [1]", "checkpoint: null", "report: 3",
     "trainer: {limit_train_batches: 0}", "trainer: {check_val_every_n_epoch: 0}"],
)  # fmt: skip
def test_invalid_sections_of_a_config_are_rejected(config):
    Path("config.yaml").write_text(config)
    with pytest.raises((ValueError, SystemExit)) as raised:
        main([*SCENES_FIT, "--config=config.yaml"])
    assert raised.type is ValueError or raised.value.code == 2


SCENES_FIT = ["fit", "--model=DetectionTask", "--model.backbone=test_resnet", "--model.pyramid_channels=64",
              "--model.min_size=32", "--model.max_size=32", "--data=ShapesDataModule", "--data.size=32",
              "--data.train_size=8", "--data.val_size=2", "--data.num_workers=0"]  # fmt: skip


def test_base_class_of_data_modules_is_rejected(capsys):
    with pytest.raises((ValueError, SystemExit)) as raised:
        main(["fit", "--model=DetectionTask", "--data=DetectionDataModule"])
    assert re.search("DetectionDataModule .*base", str(raised.value) + capsys.readouterr().err)
