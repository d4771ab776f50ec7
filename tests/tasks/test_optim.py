"""Learning rate schedules, scaled rates, parameter groups, and the checks of their settings."""

from dataclasses import asdict, fields

import pytest
from lightning.pytorch import Callback, Trainer

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
