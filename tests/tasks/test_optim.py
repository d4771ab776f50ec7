"""Learning rate schedules, scaled rates, parameter groups, and the checks of their settings."""

import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import fit
from lightning.pytorch import Callback, Trainer

from shunted_lit.cli import main
from shunted_lit.data import ShapesDataModule
from shunted_lit.tasks import BaseTask, ClassificationTask, DetectionTask, SegmentationTask
from shunted_lit.tasks.optim import OptimizerConfig


class RecordRates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[1]["lr"])


def train(settings, *, batch_size=4, ckpt_path=None, **options):
    """Train on 16 images; return the trainer and the learning rate of each step."""
    record = RecordRates()
    trainer = Trainer(callbacks=[record], logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", limit_val_batches=0, **options)  # fmt: skip
    task = ClassificationTask(5, backbone="test_resnet", lr=0.001, **settings)
    data = ShapesDataModule(size=32, train_size=16, val_size=4, batch_size=batch_size, num_workers=0,
                            annotation="class")  # fmt: skip
    trainer.fit(task, data, ckpt_path=ckpt_path)
    return trainer, record.rates


def test_milestones_divide_the_rate_after_a_linear_warmup():
    settings = {"schedule": "constant", "milestones": [1, 2.5], "warmup_epochs": 0.5}
    _, rates = train(settings, max_epochs=3)
    expected = [1 / 3, 2 / 3, 1, 1, *[0.1] * 6, 0.01, 0.01]  # warm-up of 2 steps, then epochs of 4
    assert rates == pytest.approx([0.001 * rate for rate in expected], rel=1e-5)


def test_poly_falls_to_the_minimum_rate():
    _, rates = train({"schedule": "poly", "power": 0.9, "warmup_epochs": 0, "min_lr": 0.0001}, max_epochs=2)
    assert rates == pytest.approx([0.0001 + 0.0009 * (1 - step / 8) ** 0.9 for step in range(8)], rel=1e-5)


def test_cosine_falls_from_the_peak_to_the_minimum_rate():
    factor = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_lr=0.1, warmup_epochs=1).lr_factors(12, 2)
    assert [factor(step) for step in (0, 1, 2, 7, 12)] == pytest.approx([0.4, 0.7, 1.0, 0.6, 0.2])


def test_rates_are_scaled_to_the_effective_batch_size(caplog):
    with caplog.at_level("INFO"):
        trainer, _ = train({"lr_batch": 16}, accumulate_grad_batches=2, max_epochs=1)
    assert trainer.optimizers[0].defaults["lr"] == pytest.approx(0.001 * 8 / 16)
    assert "effective batch size 8: the learning rate is 0.001 x 0.5 = 0.0005" in caplog.text


def test_a_resumed_run_scales_its_rate_to_its_own_batch_size():
    settings = {"lr_batch": 8, "warmup_epochs": 0}
    train(settings, batch_size=8, max_epochs=1)[0].save_checkpoint("last.ckpt")
    resumed, _ = train(settings, batch_size=16, max_epochs=2, ckpt_path="last.ckpt")
    assert resumed.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(2e-3)
    assert resumed.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([2e-3, 2e-3])


def test_max_steps_alone_ends_training():
    trainer, _ = train({}, max_epochs=-1, max_steps=5)
    assert trainer.global_step == 5
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)


def test_a_milestone_after_the_end_is_reported(caplog):
    with caplog.at_level("INFO"):
        train({"milestones": [3]}, max_epochs=1)
    assert "training ends after 1 epochs, before the last of the milestones [3]" in caplog.text


def test_endless_training_is_refused():
    with pytest.raises(ValueError, match=r"Training has no end, .*: set --trainer\.max_epochs"):
        train({}, max_epochs=-1)


def test_no_training_batch_is_refused():
    with pytest.raises(ValueError, match="There is no training batch: raise `limit_train_batches`"):
        train({}, max_epochs=1, limit_train_batches=0)


@pytest.mark.parametrize(("settings", "message"), [
    ({"schedule": "linear"}, "`schedule` must be one of constant, cosine, poly, got 'linear'"),
    ({"milestones": [8, 3]}, r"`milestones` must be increasing epochs above 0, got \[8, 3\]"),
    ({"milestones": [0, 3]}, r"`milestones` must be increasing epochs above 0, got \[0, 3\]"),
    ({"lr": 0}, "`lr` must be above 0, got 0"),
    ({"power": 0}, "`power` must be above 0, got 0"),
    ({"lr_batch": 0}, "`lr_batch` must be at least 1, got 0"),
    ({"warmup_epochs": -0.5}, "`warmup_epochs` must be at least 0, got -0.5"),
    ({"weight_decay": -1.0}, "`weight_decay` must be at least 0, got -1.0"),
    ({"warmup_lr": 1.0}, r"`warmup_lr` must be between 0 and `lr` \(0.0001\), got 1.0"),
    ({"min_lr": 1.0}, r"`min_lr` must be between 0 and `lr` \(0.0001\), got 1.0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_every_setting_is_documented():
    for field in fields(OptimizerConfig):
        assert f"        {field.name}: " in OptimizerConfig.__doc__


@pytest.mark.parametrize(("task", "defaults"), [
    (lambda: ClassificationTask(2, backbone="test_resnet"), {"lr": 1e-3, "warmup_epochs": 1.0}),
    (lambda: DetectionTask(2, backbone="test_resnet", extra_levels=0), {}),
    (lambda: SegmentationTask(2, backbone="test_resnet"), {"min_lr": 0.0, "schedule": "poly"}),
], ids=["classification", "detection", "segmentation"])  # fmt: skip
def test_hyperparameters_hold_every_setting(task, defaults):
    task = task()
    assert task.optim == OptimizerConfig(**defaults)
    assert asdict(task.optim).items() <= task.hparams.items()


def test_weight_decay_spares_what_a_model_asks_for():
    for options in ({}, {"layer_decay": 0.9}):
        task = ClassificationTask(3, backbone="vit_tiny_patch16_224", backbone_options={"img_size": 32}, **options)
        decayed = [group for group in task.parameter_groups() if group["weight_decay"]]
        shapes = [tuple(parameter.shape) for group in decayed for parameter in group["params"]]
        assert shapes
        assert (1, 1, 192) not in shapes, "the class token"


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        BaseTask(2, learning_rate=0.1)


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


def named(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def test_an_optimizer_class_has_its_own_rate_and_decay_and_keeps_the_groups():
    optimizer = named("torch.optim.SGD", lr=0.1, momentum=0.9, weight_decay=0.2)
    trainer, rates = train(
        {"optimizer": optimizer, "warmup_epochs": 0, "min_lr": 0.0, "layer_decay": 0.5}, max_epochs=1
    )
    (sgd,) = trainer.optimizers
    assert type(sgd) is torch.optim.SGD
    assert {group["momentum"] for group in sgd.param_groups} == {0.9}
    assert {group["weight_decay"] for group in sgd.param_groups} == {0.0, 0.2}
    assert {group["initial_lr"] for group in sgd.param_groups} == {
        0.1 * group["lr_scale"] for group in sgd.param_groups
    }
    first = next(iter(sgd.param_groups))
    assert first["lr_scale"] < 1
    scale = sgd.param_groups[1]["lr_scale"]
    assert rates == pytest.approx([0.1 * scale * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)], rel=1e-5)


def test_an_optimizer_class_without_a_rate_takes_that_of_the_task():
    trainer, _ = train({"optimizer": {"class_path": "timm.optim.Lamb"}, "weight_decay": 0.3}, max_epochs=1)
    lamb = trainer.optimizers[0]
    assert type(lamb).__name__ == "Lamb"
    assert lamb.defaults["lr"] == 0.001
    assert {group["weight_decay"] for group in lamb.param_groups} == {0.0, 0.3}


SCHEDULERS = {
    "epoch": (named("torch.optim.lr_scheduler.StepLR", step_size=1, gamma=0.5), [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]),
    "one cycle": (
        named("torch.optim.lr_scheduler.OneCycleLR", max_lr=0.01, total_steps=8, pct_start=0.5, div_factor=10.0,
              final_div_factor=1.0, anneal_strategy="linear"),
        [1, 4, 7, 10, 7.75, 5.5, 3.25, 1],
    ),
    "cyclic": (
        named("torch.optim.lr_scheduler.CyclicLR", base_lr=0.001, max_lr=0.003, step_size_up=2, cycle_momentum=False),
        [1, 2, 3, 2, 1, 2, 3, 2],
    ),
    "plateau": (  # no loss beats this threshold
        named("lightning.pytorch.cli.ReduceLROnPlateau", monitor="train/loss", patience=0, threshold=1e9, factor=0.5),
        [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["epoch", *(pytest.param(name, marks=pytest.mark.slow)
                                                          for name in ("one cycle", "cyclic", "plateau"))])  # fmt: skip
def test_a_scheduler_class_steps_at_its_interval(name):
    scheduler, expected = SCHEDULERS[name]
    _, rates = train({"lr_scheduler": scheduler}, max_epochs=2)
    assert rates == pytest.approx([0.001 * rate for rate in expected], rel=1e-5)


def test_one_cycle_keeps_layer_decay():
    scheduler = named("torch.optim.lr_scheduler.OneCycleLR", max_lr=0.01, total_steps=4)
    trainer, _ = train({"lr_scheduler": scheduler, "layer_decay": 0.5}, max_epochs=1)
    groups = trainer.optimizers[0].param_groups
    assert [group["max_lr"] for group in groups] == pytest.approx([0.01 * group["lr_scale"] for group in groups])
    assert len({group["max_lr"] for group in groups}) > 1


def test_a_resumed_run_restores_the_state_of_optimizer_and_scheduler():
    scheduler = named("torch.optim.lr_scheduler.MultiStepLR", milestones=[1, 2], gamma=0.1)
    settings = {"optimizer": named("torch.optim.SGD", lr=0.1, momentum=0.9), "lr_scheduler": scheduler}
    torch.manual_seed(3)
    whole, rates = train(settings, max_epochs=3)
    torch.manual_seed(3)
    train(settings, max_epochs=2)[0].save_checkpoint("last.ckpt")
    torch.load("last.ckpt", weights_only=True)
    resumed, rest = train(settings, max_epochs=3, ckpt_path="last.ckpt")
    assert rates[8:] == rest == pytest.approx([0.001] * 4)
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(states[0], states[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "NAdam", "RMSprop", "Rprop", "Adamax", "SGD", "Lion", "AdaBelief",
                                  "LaProp", "NvNovoGrad", "AdafactorBigVision", "MADGRAD", "Adan"])  # fmt: skip
def test_optimizers_of_torch_and_timm_train(name):
    module = "torch.optim" if hasattr(torch.optim, name) else "timm.optim"
    trainer, _ = train({"optimizer": named(f"{module}.{name}")}, max_epochs=1)
    trainer.save_checkpoint("last.ckpt")
    torch.load("last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in trainer.lightning_module.state_dict().values())


@pytest.mark.parametrize(("settings", "message"), [
    ({"optimizer": "SGD"}, r"`optimizer` must be a mapping \{class_path: CLASS, init_args: \{...\}\}, got 'SGD'"),
    ({"optimizer": {"class_path": "torch.optim.SDG"}}, "a subclass of Optimizer.*got 'torch.optim.SDG'"),
    ({"lr_scheduler": {"class_path": "torch.optim.SGD"}}, "`lr_scheduler.class_path` must be .*LRScheduler"),
    ({"optimizer": named(f"{__name__}.NoRate")}, "`optimizer` must be a class with an argument `lr`.*got NoRate"),
    ({"optimizer": named("torch.optim.SGD", lr=-1)}, "`lr` must be above 0, got -1"),
    ({"optimizer": named("torch.optim.SGD", momentun=1)}, "`optimizer.init_args` must be arguments of SGD.*momentun"),
    ({"lr_scheduler": named("torch.optim.lr_scheduler.StepLR")}, "arguments of StepLR.*step_size"),
    ({"lr_scheduler": named("torch.optim.lr_scheduler.OneCycleLR", max_lr=1.0, total_steps=3)},
     "`lr_scheduler.total_steps` of OneCycleLR must be at least the 4 steps of this run, got 3"),
    ({"lr_scheduler": named("torch.optim.lr_scheduler.ReduceLROnPlateau")}, "must name the score"),
])  # fmt: skip
def test_faulty_optimizers_and_schedulers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(settings, max_epochs=1)


def test_the_command_line_takes_optimizer_and_scheduler_and_resumes_with_those_of_the_checkpoint():
    words = ["--model=ClassificationTask", "--model.backbone=test_resnet", "--data=ShapesDataModule", "--data.size=32",
             "--data.train_size=8", "--data.val_size=4", "--data.batch_size=4", "--data.num_workers=0"]  # fmt: skip
    Path("a.yaml").write_text("optimizer: {class_path: Lion, init_args: {lr: 0.003}}\n")
    cli, folder = fit("--config=a.yaml", *words, "--trainer.max_epochs=1", "--lr_scheduler=StepLR",
                      "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5")  # fmt: skip
    assert type(cli.trainer.optimizers[0]).__name__ == "Lion"
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0015)
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["init_args"]["lr"] == 0.003
    resumed, _ = fit(*words, "--trainer.max_epochs=2", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert type(resumed.trainer.optimizers[0]).__name__ == "Lion"
    assert resumed.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.00075)
    main(["validate", "--trainer.accelerator=cpu", f"--ckpt_path={folder}/checkpoints/last.ckpt"])
    main(["validate", "--trainer.accelerator=cpu", f"--config={folder}/config.yaml",
          f"--ckpt_path={folder}/checkpoints/last.ckpt"])  # fmt: skip
