"""Non-finite losses and gradients: a run stops before they reach the weights, and saves the batch."""

from pathlib import Path

import pytest
import torch
from helpers.runs import fit
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision

from shunted_lit.data import ShapesDataModule
from shunted_lit.data.scenes import write_scenes
from shunted_lit.tasks import BaseTask, ClassificationTask, DetectionTask

BOXES = ["--trainer.max_epochs=2",
         "--model=DetectionTask", "--model.backbone=test_resnet", "--model.extra_levels=0",
         "--model.pyramid_channels=32", "--model.min_size=64", "--model.max_size=64",
         "--seed_everything=3"]  # fmt: skip
LOADER = ["--data.num_workers=0", "--data.batch_size=4"]
SCENES = ["--data=ShapesDataModule", *LOADER, "--data.size=64", "--data.train_size=12", "--data.val_size=4"]


def call_before_step(step, function, monkeypatch):
    """Call a function of the task before a training step."""
    original = BaseTask.on_train_batch_start

    def changed(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.global_step == step:
            function(self)

    monkeypatch.setattr(BaseTask, "on_train_batch_start", changed)


def test_a_nonfinite_loss_stops_the_run_and_saves_the_batch(monkeypatch):
    write_scenes(Path("set"), train=12, val=4, size=64)
    call_before_step(
        4, lambda task: task.detector.backbone.fpn.inner_blocks[0][0].bias.data.fill_(torch.nan), monkeypatch
    )
    with pytest.raises(ValueError, match="The loss is nan in step 4") as caught:
        fit(*BOXES, "--data=YoloDataModule", "--data.data=set/data.yaml", *LOADER)
    message = str(caught.value)
    assert "epoch 1, batch 1" in message
    assert "learning rate" in message
    assert "The batch is saved in runs/version_0/nonfinite_rank_0.pt; read it with torch.load" in message
    assert "Try a lower learning rate, a longer warm-up or `gradient_clip_val`" in message
    saved = torch.load("runs/version_0/nonfinite_rank_0.pt", weights_only=True)
    assert len(saved["names"]) == 4
    assert all(name in message and Path(name).is_file() for name in saved["names"])
    last = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())

    task = DetectionTask.load_from_checkpoint("runs/version_0/checkpoints/last.ckpt")
    images, targets = saved["batch"]
    losses = task.train().detector(images, targets)
    assert all(loss.isfinite() for loss in losses.values()), "the saved batch with finite weights"
    for image, name in zip(images, saved["names"], strict=True):
        assert image.shape[0] == 3, name


def test_names_of_a_batch_follow_its_order():
    data = ShapesDataModule(train_size=20, size=64, batch_size=4, num_workers=0, annotation="boxes")
    data.setup("fit")
    for i, (_, targets) in enumerate(data.train_dataloader()):
        assert data.names_of(0, i) == [f"scene {target['image_id']}" for target in targets]


def test_nonfinite_gradients_stop_the_run_before_the_step(monkeypatch):
    def poison(task):
        weight = next(task.parameters())
        weight.register_hook(lambda gradient: gradient * torch.inf)

    call_before_step(2, poison, monkeypatch)
    before = {}
    call_before_step(2, lambda task: before.update({k: v.clone() for k, v in task.named_parameters()}), monkeypatch)
    tasks = []
    call_before_step(0, tasks.append, monkeypatch)
    with pytest.raises(ValueError, match=r"The norm of the gradients is (nan|inf) in step 2"):
        fit(*BOXES, *SCENES)
    assert all(torch.equal(value, before[name]) for name, value in tasks[0].named_parameters()), "no step was taken"


def test_images_without_an_object_train():
    write_scenes(Path("set"), train=8, val=4, size=64)
    for file in sorted(Path("set/labels/train").glob("*.txt"))[:7]:
        file.write_text("")
    cli, _ = fit(*BOXES, "--data=YoloDataModule", "--data.data=set/data.yaml", *LOADER, "--data.batch_size=2")
    assert cli.trainer.global_step == 8
    assert all(value.isfinite().all() for value in cli.model.parameters())


def test_float16_that_always_overflows_stops_the_run():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-5)
    task = ClassificationTask(5, backbone="test_resnet", lr=1e-3)
    task.model.fc.bias.data.fill_(torch.nan)
    data = ShapesDataModule(size=32, train_size=80, val_size=4, batch_size=4, num_workers=0, annotation="class")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = Trainer(accelerator="cpu", plugins=[plugin], max_epochs=1, num_sanity_val_steps=0, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    with pytest.raises(ValueError, match=r"float16 still overflows at a loss scale of 0\.000488281 in step 6"):
        trainer.fit(task, data)
    assert len(torch.load("nonfinite_rank_0.pt", weights_only=True)["names"]) == 4


def test_float16_skips_a_step_that_overflows_and_lowers_the_scale():
    """A scaler on the CPU, where Lightning itself would choose bfloat16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    task = ClassificationTask(5, backbone="test_resnet", lr=1e-3)
    data = ShapesDataModule(size=32, train_size=24, val_size=4, batch_size=4, num_workers=0, annotation="class")
    record = {}

    class Recorder(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            record["before"] = {key: value.clone() for key, value in module.named_parameters()}
            if trainer.current_epoch == 0 and batch_idx == 2:
                self.handle = module.model.register_forward_hook(lambda *_: _[-1] * 1e8)  # beyond float16

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            after = dict(module.named_parameters())
            moved = any(not value.equal(record["before"][key]) for key, value in after.items())
            record.setdefault("moved", []).append(moved)
            record.setdefault("scale", []).append(scaler.get_scale())
            assert all(value.isfinite().all() for value in after.values())
            if trainer.current_epoch == 0 and batch_idx == 2:
                self.handle.remove()

    trainer = Trainer(accelerator="cpu", plugins=[plugin], max_epochs=2, logger=False, callbacks=[Recorder()],
                      enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(task, data)
    assert record["moved"] == [number != 2 for number in range(12)]
    assert record["scale"] == [1024.0] * 2 + [512.0] * 10
