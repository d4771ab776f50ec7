"""Lightning's tuners, fine-tuning callbacks and Fabric, and training without the command line."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from helpers.runs import fit
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from nbclient import NotebookClient

from shunted_lit.data import ShapesDataModule
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask

TASKS = {
    "classification": (ClassificationTask, "class", {}),
    "detection": (DetectionTask, "boxes", {"extra_levels": 0, "pyramid_channels": 32, "min_size": 32, "max_size": 32}),
    "segmentation": (SegmentationTask, "map", {}),
}
EACH_TASK = ["classification", *(pytest.param(name, marks=pytest.mark.slow) for name in ("detection", "segmentation"))]
TRAINER = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
           "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 1}  # fmt: skip
FIT = ["--model=ClassificationTask", "--model.backbone=test_resnet", "--data=ShapesDataModule", "--data.size=32",
       "--data.train_size=64", "--data.val_size=4", "--data.batch_size=4", "--data.num_workers=0",
       "--trainer.max_epochs=2"]  # fmt: skip


def build(name, train_size=32, batch_size=4, **settings):
    torch.manual_seed(0)
    task_class, annotation, options = TASKS[name]
    data = ShapesDataModule(size=32, train_size=train_size, val_size=4, batch_size=batch_size, num_workers=0,
                            annotation=annotation)  # fmt: skip
    return task_class(data.num_classes, backbone="test_resnet", **options, **settings), data


@pytest.mark.parametrize("name", EACH_TASK)
def test_the_learning_rate_that_the_tuner_finds_is_used(name):
    task, data = build(name)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    trainer = Trainer(max_epochs=2, **TRAINER)
    finder = Tuner(trainer).lr_find(task, datamodule=data, num_training=14, early_stop_threshold=None)
    assert len(finder.results["loss"]) == 14
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items()), "weights are restored"
    found = finder.suggestion()
    assert task.lr == task.hparams.lr == task.optim.lr == found
    trainer.fit(task, data)
    assert max(trainer.lr_scheduler_configs[0].scheduler.base_lrs) == found


@pytest.mark.slow
def test_a_run_with_the_learning_rate_finder_equals_one_with_the_rate_that_it_found():
    tuned, _ = fit(*FIT, "--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=25",
                   "--trainer.callbacks.min_lr=1e-4", "--trainer.callbacks.max_lr=1e3")  # fmt: skip
    assert tuned.model.lr != 1e-3
    plain, _ = fit(*FIT, f"--model.lr={tuned.model.lr}")
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, tuned.model.state_dict()[key]), key
    assert tuned.trainer.global_step == 32


def test_a_learning_rate_below_the_minimum_lowers_the_minimum():
    task, _ = build("classification")
    task.lr = 1e-7
    assert (task.hparams.lr, task.hparams.min_lr) == (1e-7, 1e-7)


@pytest.mark.slow
def test_a_diverging_learning_rate_test_raises_no_error():
    task, data = build("classification")
    trainer = Trainer(max_epochs=2, callbacks=[LearningRateFinder(1.0, 1e30, 30)], **TRAINER)
    trainer.fit(task, data)
    assert trainer.global_step == 16
    assert all(value.isfinite().all() for value in task.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_batch_size_that_the_tuner_finds_is_used(name):
    task, data = build(name, train_size=16, lr_batch=4)
    trainer = Trainer(max_epochs=2, **TRAINER)
    found = Tuner(trainer).scale_batch_size(task, datamodule=data, max_trials=2, steps_per_trial=1)
    assert found == data.batch_size == 4
    trainer.fit(task, data)
    assert trainer.global_step == 8
    assert trainer.train_dataloader.batch_size == 4


def test_batch_size_finder_sets_loader_schedule_and_scaled_rate():
    task, data = build("classification", train_size=16, batch_size=2, lr=0.001, lr_batch=4)
    finder = BatchSizeFinder(max_trials=3, steps_per_trial=1)
    trainer = Trainer(max_epochs=2, callbacks=[finder], **TRAINER)
    trainer.fit(task, data)
    assert finder.optimal_batch_size == trainer.train_dataloader.batch_size == 8
    assert trainer.global_step == 4
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([0.002, 0.002])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6 * 2, rel=0.1), "the end of the schedule"


class UnfreezeSecond(BaseFinetuning):
    """Train the head alone in the first epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


@pytest.mark.parametrize("name", EACH_TASK)
def test_unfrozen_parameters_get_weight_decay_groups_and_follow_the_schedule(name):
    task, data = build(name, train_size=8, lr=0.01, weight_decay=0.3)
    rates = []
    trainer = Trainer(max_epochs=3, callbacks=[UnfreezeSecond()], **TRAINER)
    task.on_train_batch_end = lambda *_: rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])
    body = {key: value.clone() for key, value in task.backbone.named_parameters()}
    trainer.fit(task, data)
    groups = trainer.optimizers[0].param_groups
    start, added = groups[: len(rates[0])], groups[len(rates[0]) :]
    assert {id(p) for g in added for p in g["params"]} == {id(p) for p in task.backbone.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(task.parameters()))
    for group in (*start, *added):
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}
    assert len(rates[-1]) == len(rates[0]) + 2
    for step in rates[2:]:
        assert step[len(start) :] == pytest.approx([step[0] / 10] * 2, rel=1e-4)
    assert any(not torch.equal(value, body[key]) for key, value in task.backbone.named_parameters())


@pytest.mark.slow
def test_backbone_finetuning_from_the_command_line_unfreezes_and_resumes():
    words = [*FIT, "--data.train_size=8", "--trainer.callbacks+=BackboneFinetuning",
             "--trainer.callbacks.unfreeze_backbone_at_epoch=1"]  # fmt: skip
    cli, _ = fit(*words)
    assert len(cli.trainer.optimizers[0].param_groups) == 3, "the convolutions; norms are trained from the start"
    assert any(isinstance(callback, BackboneFinetuning) for callback in cli.trainer.callbacks)
    resumed, _ = fit(*words, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert resumed.trainer.global_step == 6
    assert all(parameter.requires_grad for parameter in resumed.model.parameters())
    assert len(resumed.trainer.optimizers[0].param_groups) == 3


SCRIPTS = {
    "trainer": """
from lightning.pytorch import Trainer
from shunted_lit.data import ShapesDataModule
from shunted_lit.tasks import DetectionTask

data = ShapesDataModule(size=32, train_size=8, val_size=4, batch_size=4, num_workers=0, annotation="boxes")
options = {"min_size": 32, "max_size": 32, "extra_levels": 0}
task = DetectionTask(data.num_classes, data.class_names, backbone="test_resnet", **options)
trainer = Trainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
trainer.fit(task, data)
trainer.save_checkpoint("last.ckpt")
DetectionTask.load_from_checkpoint("last.ckpt")
print("steps", trainer.global_step, "score", float(trainer.callback_metrics["val/map"]) >= -1)
""",
    "fabric task": """
import torch
from lightning.fabric import Fabric
from shunted_lit.data import ShapesDataModule
from shunted_lit.tasks import ClassificationTask

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
data = ShapesDataModule(size=32, train_size=64, val_size=4, batch_size=8, num_workers=0, annotation="class")
data.setup("fit")
task = ClassificationTask(data.num_classes, data.class_names, backbone="test_resnet")
model, optimizer = fabric.setup(task, torch.optim.AdamW(task.parameter_groups(), lr=1e-3))
loader = fabric.setup_dataloaders(data.train_dataloader())
steps, losses = 0, []
for epoch in range(4):
    loader.sampler.set_epoch(epoch)
    for index, batch in enumerate(loader):
        optimizer.zero_grad()
        loss = model.training_step(batch, index)
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(loss))
        steps += 1
print("steps", steps, "score", sum(losses[-8:]) < sum(losses[:8]))
""",
    "fabric networks": """
import torch
from lightning.fabric import Fabric
import shunted_lit, timm
from shunted_lit import ShuntedTransformer

fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
steps = 0
for network, shape in ((ShuntedTransformer(cin=32, num_heads=4), (2, 32, 8, 8)),
                       (timm.create_model("shunted_t", num_classes=3), (2, 3, 32, 32))):
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
    before = [p.detach().clone() for p in network.parameters()]
    loss = model(torch.randn(shape)).square().mean()
    fabric.backward(loss)
    optimizer.step()
    steps += any(not torch.equal(old, new) for old, new in zip(before, network.parameters()))
print("steps", steps, "score", True)
""",
    "fabric ranks": """
import os
import torch
from lightning.fabric import Fabric
from shunted_lit.data import ShapesDataModule

def main(fabric):
    data = ShapesDataModule(size=32, train_size=8, val_size=4, batch_size=4, num_workers=0, annotation="boxes")
    data.setup("fit")
    loader = fabric.setup_dataloaders(data.train_dataloader())
    seen = [target["image_id"] for _, targets in loader for target in targets]
    everything = [None, None]
    torch.distributed.all_gather_object(everything, seen)
    if fabric.global_rank == 0:
        print("steps", sum(map(len, everything)), "score", len(set(sum(everything, []))) == 8)

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    main(fabric)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [
    ("trainer", 2), ("fabric task", 32), ("fabric networks", 2), ("fabric ranks", 8),
])  # fmt: skip
def test_a_script_trains_without_the_command_line(name, steps):
    Path("script.py").write_text(SCRIPTS[name])
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"steps {steps} score True" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("trainer", 2), ("fabric task", 32)])
def test_a_notebook_trains_without_the_command_line(name, steps):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SCRIPTS[name])])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert f"steps {steps} score True" in "".join(output.get("text", "") for output in notebook.cells[0].outputs)
