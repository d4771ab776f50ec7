"""Classification: the recipe piece by piece, training runs, weights to start from, and image folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from helpers.golden_cases import CASES, reference_weights
from helpers.runs import fit, read_metric
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from shunted_lit.cli import main
from shunted_lit.data import ImageFolderDataModule
from shunted_lit.tasks import ClassificationTask

ROOT = Path(__file__).parents[2]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "set"
    main(["digits", str(folder)])
    return folder


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    """Three classes, eight images each to train and four to validate."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 8), ("val", 4)):
        for name in "012":
            (folder / split / name).mkdir(parents=True)
            for path in sorted((digits / split / name).iterdir())[:count]:
                shutil.copy(path, folder / split / name)
    return folder


@pytest.fixture
def folder(few, tmp_path):
    """A copy to damage."""
    return shutil.copytree(few, tmp_path / "set")


def data(folder, **keywords):
    module = ImageFolderDataModule(str(folder), **{"image_size": 32, "batch_size": 8, "num_workers": 0, **keywords})
    module.setup("fit")
    return module


def small_run(folder, *args):
    """Return the words of a short run on `folder` with a small Shunted Transformer."""
    return [
        "--model=ClassificationTask", "--data=ImageFolderDataModule", f"--data.root={folder}", "--data.image_size=32",
        "--data.batch_size=8", "--data.num_workers=0", "--data.crop_pct=1.0", "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1", "--model.backbone_options={depths: [1, 1, 1, 1], stem: patch4}", *args,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def short_run(few, tmp_path_factory):
    """The folder of a run of three steps."""
    return fit(*small_run(few, f"--trainer.default_root_dir={tmp_path_factory.mktemp('short')}"))[1]


# --- training


@pytest.mark.slow
def test_shunted_t_learns_the_digits(digits):
    _, folder = fit(f"--config={ROOT / 'configs/digits.yaml'}", f"--data.root={digits}", "--trainer.max_epochs=6",
                    "--report.images=9")  # fmt: skip
    assert max(read_metric(folder, "val/acc1")) >= 0.97
    assert read_metric(folder, "val/acc5")[-1] >= 0.99
    assert read_metric(folder, "val/loss")[-1] < read_metric(folder, "val/loss")[0]
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50


@torch.no_grad()
def test_a_checkpoint_loads_into_timm(short_run, few):
    """Repeat the logged accuracy without the loaders and metrics of the package."""
    best = str(short_run / "checkpoints/best.ckpt")
    paths = sorted(few.glob("val/*/*.png"))
    pixels = [Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for path in paths]
    labels = torch.tensor([int(path.parent.name) for path in paths])
    config = timm.get_pretrained_cfg("shunted_t").to_dict()
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std

    main(["export", best, "--out", "exported", "--format=safetensors"])
    exported = timm.create_model("local-dir:exported", pretrained=True)
    models = [
        timm.create_model("shunted_t", num_classes=3, checkpoint_path=best, depths=[1, 1, 1, 1], stem="patch4"),
        ClassificationTask.load_from_checkpoint(best, weights_only=True).model,
        exported,
    ]
    for model in models:
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
        assert accuracy == pytest.approx(max(read_metric(short_run, "val/acc1")), abs=1e-6)
    config = exported.pretrained_cfg
    assert (tuple(config["input_size"]), config["crop_pct"], config["num_classes"]) == ((3, 32, 32), 1.0, 3)
    assert config["label_names"] == list("012")


def test_fine_tuning_starts_from_weights_with_other_classes(short_run, folder, caplog):
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "2")
    best = str(short_run / "checkpoints/best.ckpt")
    settings = ["--model.layer_decay=0.7", "--model.lr=1e-9", "--model.min_lr=0"]
    with caplog.at_level("INFO"):
        cli, run = fit(*small_run(folder, *settings, f"--model.weights={best}"))
    assert "not loaded: the head (the file has other classes)" in caplog.text
    trained = torch.load(best, weights_only=True)["state_dict"]
    for name, value in cli.model.model.named_parameters():
        assert name.startswith("head.") or torch.allclose(value, trained[f"model.{name}"], atol=1e-5), name

    # The checkpoint does not need the file that training started from.
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert "weights" not in saved["hyper_parameters"]
    ClassificationTask.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)


# --- the recipe


def small_task(**keywords):
    torch.manual_seed(0)
    return ClassificationTask(num_classes=3, **keywords)


def test_imagenet_configs_hold_the_recipe():
    numbers = {"shunted_t": (0.1, None), "shunted_s": (0.2, None), "shunted_b": (0.3, 1.0)}
    for name, (drop_path, clip) in numbers.items():
        config = yaml.safe_load((ROOT / f"configs/imagenet/{name}.yaml").read_text())
        model, images, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
        assert (model["backbone"], model["drop_path_rate"]) == (name, drop_path)
        assert trainer.get("gradient_clip_val") == clip
        assert trainer["max_epochs"] == 300
        # The reference implementation's, for its effective batch size of 8 x 128.
        scale = 1024 / model["lr_batch"]
        rates = [scale * model[key] for key in ("lr", "warmup_lr", "min_lr")]
        assert rates == pytest.approx([1e-3, 1e-6, 1e-5])
        assert (model["warmup_epochs"], model["weight_decay"]) == (5, 0.05)
        assert (model["mixup"], model["cutmix"], model["label_smoothing"], model["random_erasing"]) == (
            0.8,
            1.0,
            0.1,
            0.25,
        )
        assert (images["auto_augment"], images["color_jitter"], images["repeats"]) == ("rand-m9-mstd0.5-inc1", 0.4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["shunted_t", "shunted_s", "shunted_b"])
def test_imagenet_configs_run_at_small_sizes(variant, few):
    small = [f"--data.root={few}", "--data.image_size=32", "--data.batch_size=8", "--data.num_workers=0"]
    cli, folder = fit(
        f"--config={ROOT}/configs/imagenet/{variant}.yaml", *small, "--trainer.max_epochs=1", "--trainer.precision=32"
    )
    assert len(read_metric(folder, "val/acc1")) == 1
    assert cli.trainer.optimizers[0].defaults["lr"] == pytest.approx(5e-4 * 8 / 512)
    tuned, _ = fit(
        f"--config={ROOT}/configs/imagenet/{variant}.yaml", f"--config={ROOT}/configs/imagenet/finetune_384.yaml",
        *small, "--data.image_size=48", "--trainer.max_epochs=1", "--trainer.precision=32",
        f"--model.weights={folder}/checkpoints/last.ckpt",
    )  # fmt: skip
    assert tuned.model.hparams.backbone == variant
    assert tuned.datamodule.hparams.crop_pct == 1.0
    assert tuned.trainer.optimizers[0].defaults["lr"] == pytest.approx(2e-5 * 8 / 512)


def test_training_starts_from_weights_of_the_reference(tmp_path):
    torch.save({"model": reference_weights(CASES["shunted_t"])}, tmp_path / "ckpt_T.pth")
    model = ClassificationTask(3, weights=str(tmp_path / "ckpt_T.pth")).model
    expected = timm.create_model("shunted_t", checkpoint_path=str(tmp_path / "ckpt_T.pth"))
    torch.testing.assert_close(model.stages.state_dict(), expected.stages.state_dict(), rtol=0, atol=0)


class FixedLogits(torch.nn.Module):
    """A network that records its input and returns fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        self.images = x
        return self.logits[: len(x)]


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_loss_equals_that_of_timm(mixup):
    model = small_task(mixup=mixup, label_smoothing=0.1)
    model.log = lambda *_, **__: None
    images, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 2, 1, 1])
    logits = torch.randn(4, 3)
    model.model = FixedLogits(logits)
    np.random.seed(3)
    loss = model.training_step((images, labels), 0)
    if not mixup:
        torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(0.1)(logits, labels))
        return
    np.random.seed(3)
    timm_mixup = timm.data.Mixup(mixup, 0.0, label_smoothing=0.1, num_classes=3)
    mixed, targets = timm_mixup(model.normalize(images / 255), labels)
    torch.testing.assert_close(model.model.images, mixed)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, targets))


def test_cutmix_and_random_erasing_change_training_images_only():
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    for keywords in ({"cutmix": 1.0}, {"random_erasing": 1.0}):
        model = small_task(**keywords)
        model.log = model.log_dict = lambda *_, **__: None
        model.model = FixedLogits(torch.randn(8, 3))
        model.training_step((images, labels), 0)
        changed = (model.model.images != model.normalize(images)).any(dim=1)
        assert 0 < changed.float().mean() < 1, "some of the pixels"
        model.validation_step((images, labels), 0)
        assert torch.equal(model.model.images, model.normalize(images))


def test_accuracies_are_logged():
    model = small_task()
    model.log = lambda *_, **__: None
    logged = {}
    model.log_dict = lambda metrics, **_: logged.update(metrics)
    model.model = FixedLogits(torch.eye(3)[[0, 1, 2, 2]])
    model.validation_step((torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])), 0)
    values = {name: metric.compute().item() for name, metric in logged.items()}
    assert values == {"val/acc1": 0.75, "val/acc5": 1.0}


def test_layer_decay_scales_the_rate_of_each_block(few):
    model = small_task(layer_decay=0.5, lr=1e-3, lr_batch=16, warmup_epochs=0)
    trainer = Trainer(max_epochs=1, accumulate_grad_batches=4, **QUIET)
    trainer.fit(model, data(few))
    groups = trainer.optimizers[0].param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    rates = {id(p): g["initial_lr"] for g in groups for p in g["params"]}
    named = {name: rates[id(p)] for name, p in model.model.named_parameters()}
    assert named["head.fc.weight"] == pytest.approx(1e-3 * 32 / 16)
    order = [named[f"stages.{i}.block.{j}.norm1.weight"] for i, n in enumerate((1, 2, 4, 1)) for j in range(n)]
    assert order == pytest.approx([2e-3 * 0.5 ** (8 - i) for i in range(8)])


def test_drop_path_reaches_the_blocks():
    rates = [m.drop_prob for m in small_task(drop_path_rate=0.2).modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.2)


@pytest.mark.slow
def test_checkpoints_hold_averaged_weights(few):
    """EMAWeightAveraging keeps the mean of the weights, validates it and writes it to checkpoints."""
    averaging = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    cli, folder = fit(*small_run(few, "--trainer.max_epochs=2", "--model.lr=0.01", *averaging))
    assert any(isinstance(callback, EMAWeightAveraging) for callback in cli.trainer.callbacks)
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = saved["state_dict"], saved["current_model_state"]
    name = "model.stages.0.block.0.attn.q.weight"
    assert not torch.equal(averaged[name], current[f"module.{name}" if f"module.{name}" in current else name])
    ClassificationTask.load_from_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True)


def test_gradient_checkpointing_changes_no_gradient():
    x, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    gradients = []
    for checkpointing in (False, True):
        model = small_task(grad_checkpointing=checkpointing)
        F.cross_entropy(model(x), labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_any_timm_model_is_a_backbone():
    other = small_task(backbone="resnet18", backbone_options={"drop_rate": 0.1})
    assert other(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"backbone": "shunted_x"}, "`backbone` must be a timm model, got 'shunted_x'; close names: shunted_"),
        ({"label_smoothing": 1.5}, "`label_smoothing` must be between 0 and 1, got 1.5"),
        ({"mixup": -1.0}, "`mixup` must be at least 0, got -1.0"),
        ({"lr_batch": 0}, "`lr_batch` must be at least 1, got 0"),
        ({"weights": "a.pth", "pretrained": True}, r"`pretrained` must be false where `weights` is given \(a\.pth\)"),
        ({"min_lr": 1.0}, r"`min_lr` must be between 0 and `lr` \(0.001\), got 1.0"),
        ({"layer_decay": 0.0}, "`layer_decay` must be above 0, got 0"),
        ({"drop_path_rate": 0.1, "backbone_options": {"drop_path_rate": 0.0}}, "give it once"),
        ({"backbone_options": {"num_classes": 7}}, "`backbone_options` must not contain num_classes"),
    ],
)
def test_wrong_arguments_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        small_task(**keywords)


def test_mixup_of_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="need an even batch size, got 5 images; choose an even `batch_size`"):
        small_task(mixup=0.8).training_step((torch.rand(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64)), 0)


# --- runs and their checkpoints


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(few):
    args = small_run(few, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--data.repeats=3")
    done = subprocess.run(
        [sys.executable, "-m", "shunted_lit", "fit", *args, "--trainer.accelerator=cpu"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("metrics.csv", "curves.png", "predictions.png", "checkpoints/best.ckpt"):
        assert Path("runs/version_0", name).is_file()
    assert len(read_metric(Path("runs/version_0"), "train/loss")) == 3, "24 images, 2 x 4 in each step"
    assert len(list(Path("runs").iterdir())) == 1


def test_each_rank_draws_its_own_random_numbers(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    model, drawn = small_task(), []
    for rank in (0, 1):
        torch.manual_seed(5)
        trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=0, optimizers=[])
        monkeypatch.setattr(ClassificationTask, "trainer", trainer)
        model._trainer = trainer
        model.on_train_start()
        model.on_train_batch_start(None, 0)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]
    assert os.environ["PL_GLOBAL_SEED"] == "5"


def test_a_checkpoint_of_other_classes_is_refused(folder, digits, short_run):
    checkpoint = f"--ckpt_path={short_run}/checkpoints/best.ckpt"
    for split in ("train", "val"):
        (folder / split / "1").rename(folder / split / "9")
    with pytest.raises(ValueError, match="Class 1 is '1' in the checkpoint, but '2' in the data"):
        main(["validate", *small_run(folder, checkpoint)])
    with pytest.raises(ValueError, match="The checkpoint has 3 classes, but the data have 10"):
        main(["validate", *small_run(digits, checkpoint)])


def test_a_checkpoint_of_another_task_is_refused(few, short_run, tmp_path):
    with pytest.raises(ValueError, match="the checkpoint is of ClassificationTask, not of DetectionTask"):
        fit(f"--config={ROOT / 'configs/neck.yaml'}", f"--ckpt_path={short_run}/checkpoints/last.ckpt")
    torch.save(reference_weights(CASES["shunted_t"]), tmp_path / "t.pth")
    with pytest.raises(ValueError, match=r"t\.pth holds no run to resume; pass it as --model\.weights"):
        fit(*small_run(few, f"--ckpt_path={tmp_path}/t.pth"))


@pytest.mark.slow
def test_a_saved_config_validates_without_the_initial_weights(few, short_run):
    start = Path(shutil.copy(short_run / "checkpoints/best.ckpt", "start.ckpt"))
    _, folder = fit(*small_run(few, f"--model.weights={start}"))
    start.unlink()
    cli = main(["validate", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt"])
    assert read_metric(Path(cli.trainer.log_dir), "val/acc1") == pytest.approx(
        read_metric(folder, "val/acc1"), abs=1e-6
    )


@pytest.mark.slow
def test_class_names_may_hold_any_characters(folder):
    for split in ("train", "val"):
        (folder / split / "1").rename(folder / split / "$1_a_b$")
    _, run = fit(*small_run(folder, "--trainer.default_root_dir=run[/x]", "--report.images=4"))
    assert (run / "predictions.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("bf16-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_low_precision_trains(few, precision):
    _, folder = fit(*small_run(few, f"--trainer.precision={precision}"))
    assert np.isfinite(read_metric(folder, "train/loss")).all()


# --- weights to start from


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"<html>", "is not a checkpoint; it is not loaded, because such files can run code"),
        (torch.zeros(3), "holds no weights by name"),
        ({}, "holds no weights by name"),
        (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, which is more than weights; it is not loaded"),
        ({"fc.weight": torch.zeros(3, 4)}, "not those of a Shunted Transformer"),
    ],
)
def test_files_without_weights_are_refused(content, message, tmp_path):
    path = write(tmp_path / "file.pth", content)
    with pytest.raises(ValueError, match=message):
        small_task(weights=path)


def test_truncated_files_are_refused(tmp_path):
    whole = Path(write(tmp_path / "whole.pth", reference_weights(CASES["neck_small_sr2"]))).read_bytes()
    safe = tmp_path / "cut.safetensors"
    safe.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for path in (write(tmp_path / "cut.pth", whole[:-500]), str(safe), str(tmp_path / "none.pth")):
        with pytest.raises(ValueError, match=rf"{Path(path).name}: (not a readable checkpoint|no such file)"):
            small_task(weights=path)


@pytest.mark.parametrize("backbone", ["resnet18", "shunted_s"])
def test_weights_of_another_model_are_refused(backbone, tmp_path):
    path = write(tmp_path / "t.pth", reference_weights(CASES["shunted_t"]))
    with pytest.raises(ValueError, match=r"weights do not fit: \d+ missing"):
        small_task(backbone=backbone, weights=path)


def test_weights_with_a_missing_tensor_are_refused(tmp_path):
    weights = reference_weights(CASES["shunted_t"])
    del weights["patch_embed1.conv.0.weight"]
    path = write(tmp_path / "t.pth", weights)
    with pytest.raises(ValueError, match=r"1 missing \(stages\.0\.patch_embed\.conv\.0\.weight\)"):
        small_task(weights=path)
    with pytest.raises(ValueError, match=r"1 missing \(stages\.0\.patch_embed\.conv\.0\.weight\)"):
        timm.create_model("shunted_t", pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=7)


@pytest.mark.parametrize("backbone", ["shunted_t", "resnet18", "levit_128s"])
def test_a_head_of_the_same_size_is_loaded(backbone, tmp_path):
    trained = small_task(backbone=backbone, backbone_options={})
    path = write(tmp_path / "trained.pth", trained.model.state_dict())
    torch.testing.assert_close(
        small_task(backbone=backbone, weights=path).model.state_dict(), trained.model.state_dict(), rtol=0, atol=0
    )
    if backbone == "shunted_t":
        other = timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=3)
        torch.testing.assert_close(other.state_dict(), trained.model.state_dict(), rtol=0, atol=0)


# --- image folders


def test_samples(few):
    module = data(few, flip=0.0, scale=(1.0, 1.0), crop_pct=1.0)
    assert (module.class_names, module.num_classes) == (["0", "1", "2"], 3)
    assert [len(module.datasets[split]) for split in ("train", "val")] == [24, 12]
    image, label = module.datasets["val"][5]
    path, expected = module.datasets["val"].samples[5]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.uint8, expected)
    with Image.open(path) as file:
        wanted = np.asarray(file.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), wanted)
    images, labels = next(iter(module.train_dataloader()))
    assert (images.shape, labels.shape) == ((8, 3, 32, 32), (8,))


def test_rand_augment_and_the_cut_are_timms(few):
    transforms = data(few, auto_augment="rand-m9-mstd0.5-inc1").train_transform.transforms
    policy = next(t for t in transforms if isinstance(t, RandAugment))
    assert {op.magnitude for op in policy.ops} == {9}
    assert {op.magnitude_std for op in policy.ops} == {0.5}
    assert transforms[0].scale == (0.08, 1.0)
    assert not any(isinstance(t, RandAugment) for t in data(few).train_transform.transforms)


def test_repeated_augmentation(few):
    module = data(few, repeats=3)
    for epoch in (0, 1):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        indices = [index for index, *_ in loader.sampler]
        assert len(indices) == 24, "as long an epoch"
        counts = np.bincount(indices, minlength=24)
        assert set(counts) == {0, 3}
    trainer = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(small_task(), module)
    assert trainer.train_dataloader.sampler.repeats == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "train"), "set/train: no such folder; expected a folder with one folder"),
        (lambda f: [shutil.rmtree(f / "train" / n) for n in "012"], "set/train: has no folders"),
        (lambda f: shutil.rmtree(f / "val/1"), r"val/1: no such folder, but .*train/1 exists \(1 of 3 classes"),
        (lambda f: shutil.rmtree(f / "train/1"), r"train/1: no such folder, but .*val/1 exists"),
        (lambda f: [p.unlink() for p in (f / "train/2").iterdir()], "train/2: no images in this class; add some"),
        (lambda f: [p.unlink() for p in (f / "val/0").iterdir()], "val/0: no images in this class"),
        (lambda f: [p.rename(p.with_suffix(".gif")) for p in (f / "val/0").iterdir()], r"val/0: .*\.jpg"),
    ],
)
def test_damaged_folders_are_told(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        data(folder)


def test_unread_files_are_told(folder, caplog):
    (folder / "train/0/notes.txt").write_text("to do")
    data(folder)
    assert "skipping 1 files that are not images of a class, such as" in caplog.text
    assert "notes.txt" in caplog.text
    shutil.copy(next((folder / "train/0").glob("*.png")), folder / "train/stray.png")
    data(folder)
    assert "skipping 2 files" in caplog.text


def test_hidden_folders_are_no_classes(folder):
    for split in ("train", "val"):
        shutil.copytree(folder / split / "0", folder / split / ".ipynb_checkpoints")
        shutil.copytree(folder / split / "0", folder / split / "0/.ipynb_checkpoints")
    module = data(folder)
    assert module.class_names == ["0", "1", "2"]
    assert len(module.datasets["train"]) == 24


@pytest.mark.parametrize("content", [b"nothing", None], ids=["not an image", "truncated"])
def test_corrupt_images_are_told(folder, content):
    path = sorted((folder / "train/1").iterdir())[3]
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(ValueError, match=rf"{path.name}: not a readable image"):
        list(data(folder).train_dataloader())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"crop_pct": 1.5}, "`crop_pct` must be between 0 and 1, got 1.5"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"scale": (1.0, 0.5)}, "`scale` must be two numbers above 0 in ascending order, got 1.0 and 0.5"),
        ({"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ({"flip": 2.0}, "`flip` must be between 0 and 1, got 2.0"),
        ({"scale": (2.0, 3.0)}, "`scale` must be between 0 and 1, got 3.0"),
        ({"val": "train"}, "`val` must be a held-out folder, got .*train, the folder of `train`"),
    ],
)
def test_wrong_sizes_are_told(few, keywords, message):
    with pytest.raises(ValueError, match=message):
        data(few, **keywords)
