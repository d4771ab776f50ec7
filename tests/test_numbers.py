"""Numbers that go wrong: a run stops before they reach the weights, and tells where; what is no fault goes on."""

from pathlib import Path

import pytest
import torch

from shunted_lit.cli import main
from shunted_lit.data import ShapesDataModule
from shunted_lit.data.scenes import write_scenes
from shunted_lit.tasks import BaseTask, DetectionTask

BOXES = ["fit", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=2",
         "--model=DetectionTask", "--model.backbone=test_resnet", "--model.extra_levels=0",
         "--model.pyramid_channels=32", "--model.min_size=64", "--model.max_size=64",
         "--seed_everything=3"]  # fmt: skip
FEW = ["--data.num_workers=0", "--data.batch_size=4"]
SCENES = ["--data=ShapesDataModule", *FEW, "--data.size=64", "--data.train_size=12", "--data.val_size=4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def at_step(step, act, monkeypatch):
    """Has a task do something before a step."""
    start = BaseTask.on_train_batch_start

    def changed(self, batch, batch_idx):
        start(self, batch, batch_idx)
        if self.global_step == step:
            act(self)

    monkeypatch.setattr(BaseTask, "on_train_batch_start", changed)


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch):
    write_scenes(Path("set"), train=12, val=4, size=64)
    at_step(4, lambda task: task.detector.backbone.fpn.inner_blocks[0][0].bias.data.fill_(torch.nan), monkeypatch)
    words = [*BOXES, "--data=YoloDataModule", "--data.data=set/data.yaml", *FEW]
    with pytest.raises(ValueError, match="the loss is nan in step 4") as caught:
        main(words)
    told = str(caught.value)
    assert "epoch 1, batch 1" in told
    assert "learning rate" in told
    saved = torch.load("runs/version_0/nonfinite_rank_0.pt", weights_only=True)
    assert len(saved["names"]) == 4
    assert all(name in told and Path(name).is_file() for name in saved["names"])
    last = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())

    task = DetectionTask.load_from_checkpoint("runs/version_0/checkpoints/last.ckpt")
    images, targets = saved["batch"]
    losses = task.train().detector(images, targets)
    assert all(loss.isfinite() for loss in losses.values()), "replayed with weights that are sound"
    for image, name in zip(images, saved["names"], strict=True):
        assert image.shape[0] == 3, name


def test_names_are_those_of_the_batch():
    data = ShapesDataModule(train_size=20, size=64, batch_size=4, num_workers=0, annotation="boxes")
    data.setup("fit")
    for i, (_, targets) in enumerate(data.train_dataloader()):
        assert data.names_of(0, i) == [f"scene {target['image_id']}" for target in targets]


def test_gradients_that_are_no_numbers_stop_the_run(monkeypatch):
    def poison(task):
        weight = next(task.parameters())
        weight.register_hook(lambda gradient: gradient * torch.inf)

    at_step(2, poison, monkeypatch)
    before = {}
    at_step(2, lambda task: before.update({k: v.clone() for k, v in task.named_parameters()}), monkeypatch)
    tasks = []
    at_step(0, tasks.append, monkeypatch)
    with pytest.raises(ValueError, match=r"the norm of the gradients is (nan|inf) in step 2"):
        main([*BOXES, *SCENES])
    assert all(torch.equal(value, before[name]) for name, value in tasks[0].named_parameters()), "no step was taken"


def test_images_without_an_object_train():
    write_scenes(Path("set"), train=8, val=4, size=64)
    for file in sorted(Path("set/labels/train").glob("*.txt"))[:7]:
        file.write_text("")
    cli = main([*BOXES, "--data=YoloDataModule", "--data.data=set/data.yaml", *FEW, "--data.batch_size=2"])
    assert cli.trainer.global_step == 8
    assert all(value.isfinite().all() for value in cli.model.parameters())
