"""Train, evaluate and predict with each shipped downstream config, on drawn shapes."""

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import QUIET, read_metric
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.data import ShapesDataModule
from shunted_lit.data.scenes import write_scenes
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask

ROOT = Path(__file__).parents[2]
SHAPES = ["--data=ShapesDataModule", "--data.size=64", "--data.num_workers=0", "--data.batch_size=8"]
# Settings for a few steps; all else is as shipped.
QUICK = [
    *QUIET,
    "--report.images=0",
    "--trainer.precision=32-true",
    "--trainer.log_every_n_steps=1",
    "--model.warmup_epochs=0",
    "--model.lr=0.001",
    "--model.lr_batch=null",
]
DETECTOR = ["--model.min_size=64", "--model.max_size=96", "--model.pyramid_channels=64"]
FEW_PROPOSALS = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 32}
SYSTEMS = {
    "coco/retinanet_shunted_t": (DetectionTask, DETECTOR),
    "coco/mask_rcnn_shunted_t": (
        DetectionTask,
        [*DETECTOR, "--model.anchor_scale=0.5", f"--model.detector_options={FEW_PROPOSALS}"],
    ),
    "ade20k/fpn_shunted_t": (SegmentationTask, ["--model.short_side=null"]),
    "ade20k/upernet_shunted_t": (
        SegmentationTask,
        ["--model.short_side=64", "--model.decoder_options={decoder_channels: 64}"],
    ),
    "ade20k/segformer_shunted_t": (SegmentationTask, ["--model.short_side=null"]),
    "imagenet/shunted_t": (ClassificationTask, []),
}


FAST = ("coco/mask_rcnn_shunted_t", "ade20k/upernet_shunted_t", "imagenet/shunted_t")
FAST_AND_SLOW = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]


def run(command, system, *args):
    options = [f"--config={ROOT}/configs/{system}.yaml", *SHAPES, *QUICK, *SYSTEMS[system][1]]
    return main([command, *options, *args])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains a system for two steps at its first call, and returns the folder of the run."""
    folders = {}

    def folder(system):
        if system not in folders:
            root = tmp_path_factory.mktemp("run")
            cli = run("fit", system, "--trainer.max_epochs=1", "--data.train_size=8", "--data.batch_size=4",
                      "--data.val_size=4", "--report.images=4", f"--trainer.default_root_dir={root}")  # fmt: skip
            folders[system] = Path(cli.trainer.log_dir)
        return folders[system]

    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    module = ShapesDataModule(size=64, annotation="map", num_workers=0)
    module.setup("validate")
    (folder / "below").mkdir()
    for i, name in enumerate(("b", "a", "below/c")):
        image = (module.datasets["val"][i][0] * 255).byte()[:, : 64 - 7 * i, : 64 - 9 * i]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_fall(system):
    cli = run("fit", system, "--trainer.max_epochs=1", "--trainer.max_steps=36", "--data.train_size=288",
              "--data.val_size=8")  # fmt: skip
    losses = read_metric(cli.trainer.log_dir, "train/loss")
    assert len(losses) == 36
    # The losses of a classifier with mixup vary; the others fall far in 36 steps.
    assert sum(losses[-6:]) < (1.02 if "imagenet" in system else 0.85) * sum(losses[:6])


@pytest.mark.parametrize("system", FAST_AND_SLOW)
def test_a_run_leaves_scores_pictures_and_checkpoints(system, trained):
    folder = trained(system)
    assert len(read_metric(folder, "train/loss")) == 2
    task = SYSTEMS[system][0]
    assert read_metric(folder, task.monitor)
    assert len(read_metric(folder, "val/mask_map_50")) == ("mask_rcnn" in system)
    assert (folder / "class_iou.csv").is_file() == (task is SegmentationTask)
    with Image.open(folder / "predictions.png") as picture:
        assert min(picture.size) > 150
        assert len(picture.convert("RGB").getcolors(2**24)) > 500
    model = task.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True)
    assert model.class_names[-5:] == ["circle", "triangle", "square", "star", "cross"]


@pytest.mark.parametrize("system", FAST_AND_SLOW)
def test_predict_needs_only_a_checkpoint_and_is_repeatable(system, trained, pictures, capsys):
    words = ["predict", f"--data.images={pictures}", "--ckpt_path", f"{trained(system)}/checkpoints/last.ckpt",
             "--trainer.accelerator=cpu", "--data.num_workers=0"]  # fmt: skip
    main(words)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len([line for line in lines if line.startswith("3 images, ")]) == 1, "one line of summary"
    files = {
        path.relative_to("predictions"): path.read_bytes() for path in Path("predictions").rglob("*") if path.is_file()
    }
    expected = {f"pictures/{name}.png" for name in ("a", "b", "below/c")} | {
        ClassificationTask: {"predictions.csv"},
        DetectionTask: {"predictions.json", "classes.txt", *(f"labels/{name}.txt" for name in ("a", "b", "below/c"))},
        SegmentationTask: {"classes.txt", *(f"masks/{name}.png" for name in ("a", "b", "below/c"))},
    }[SYSTEMS[system][0]]
    assert {path.as_posix() for path in files} == expected
    main(words)
    repeated = {
        path.relative_to("predictions"): path.read_bytes() for path in Path("predictions").rglob("*") if path.is_file()
    }
    assert repeated == files
    assert not Path("runs").exists()
    assert not Path("config.yaml").exists()
    if SYSTEMS[system][0] is SegmentationTask:
        with Image.open(pictures / "below/c.png") as image, Image.open("predictions/masks/below/c.png") as mask:
            assert image.size == mask.size
    if SYSTEMS[system][0] is DetectionTask:
        content = json.loads(Path("predictions/predictions.json").read_text())
        assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png", "below/c.png"]


def test_validate_repeats_the_scores_of_the_last_validation(trained):
    system = "ade20k/upernet_shunted_t"
    folder = trained(system)
    cli = run("validate", system, "--data.val_size=4", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    log_dir = Path(cli.trainer.log_dir)
    assert read_metric(log_dir, "val/miou") == pytest.approx(read_metric(folder, "val/miou"), abs=1e-6)
    assert (log_dir / "class_iou.csv").read_text() == (folder / "class_iou.csv").read_text()


def test_validate_needs_only_a_checkpoint(trained, capsys):
    folder = trained("ade20k/upernet_shunted_t")
    words = [f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.accelerator=cpu"]
    cli = main(["validate", *words])
    assert read_metric(cli.trainer.log_dir, "val/miou") == pytest.approx(read_metric(folder, "val/miou"), abs=1e-6)
    output = capsys.readouterr().out
    assert "val/miou" in output
    assert "circle" in output
    assert "DataLoader 0" not in output


def test_evaluation_may_change_evaluation_settings_only(trained, caplog):
    folder = trained("ade20k/upernet_shunted_t")
    words = [f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.accelerator=cpu"]
    with caplog.at_level("INFO"):
        cli = main(["validate", *words, "--model.short_side=null", "--model.window=32", "--model.lr=0.5"])
    assert cli.model.evaluation == {"short_side": None, "window": 32, "stride": None}
    assert cli.model.optim.lr == 0.001
    assert "`model.window` is 32; in training it was" in caplog.text
    assert "`model.lr` is 0.001 as in the checkpoint, not 0.5" in caplog.text
    with pytest.raises((ValueError, SystemExit), match="`window` must be at least 1, got 0"):
        main(["test", *words, "--model.window=0"])


@pytest.mark.slow
def test_evaluation_may_change_single_detector_options(trained, capsys):
    folder = trained("coco/mask_rcnn_shunted_t")
    words = [f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.accelerator=cpu"]
    cli = main(["validate", *words, "--model.detector_options={box_score_thresh: 0.999}"])
    assert cli.model.hparams.detector_options == {**FEW_PROPOSALS, "box_score_thresh": 0.999}
    scores = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if "mask_map" in line]
    assert scores[:2] == ["0.0000", "0.0000"], "there are objects, but no prediction"


def test_scores_of_absent_sizes_are_not_numbers(trained, capsys):
    folder = trained("coco/mask_rcnn_shunted_t")
    main(["validate", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.accelerator=cpu"])
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "val/" in line}
    assert "no such object" in rows["val/map_large"], "shapes of 64 pixels"
    assert "-1" not in rows["val/map_large"]


# --- training options


@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("coco/mask_rcnn_shunted_t", "ade20k/fpn_shunted_t")],
)
def test_precision_averaging_and_checkpointing_are_set_in_yaml(system):
    Path("more.yaml").write_text(
        "trainer:\n  precision: bf16-mixed\n  accumulate_grad_batches: 2\n"
        "  callbacks: [{class_path: EMAWeightAveraging, init_args: {decay: 0.5}}]\n"
        f"model:\n  class_path: {SYSTEMS[system][0].__name__}\n  init_args:\n    grad_checkpointing: true\n"
    )
    options = [word for word in QUICK if "precision" not in word]
    cli = main(["fit", f"--config={ROOT}/configs/{system}.yaml", "--config=more.yaml", *SHAPES, *options,
                *SYSTEMS[system][1], "--trainer.max_epochs=1", "--trainer.max_steps=-1", "--data.train_size=32",
                "--data.val_size=8"])  # fmt: skip
    assert cli.trainer.precision == "bf16-mixed"
    assert cli.trainer.global_step == 2, "4 batches, 2 a step"
    body = cli.model.detector.backbone.body if "coco" in system else cli.model.segmenter.features
    stages = [module for module in body.modules() if type(module).__name__ == "Stage"]
    assert len(stages) == 4
    assert all(stage.grad_checkpointing for stage in stages)
    content = torch.load(Path(cli.trainer.log_dir) / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = content["state_dict"], content["current_model_state"]
    moved = [name for name, value in current.items() if not torch.equal(averaged[name], value)]
    assert len(moved) > 50, "the checkpoint's weights are averages"
    losses = read_metric(cli.trainer.log_dir, "train/loss")
    assert all(0 < loss < 1e4 for loss in losses)


# --- tasks and data


@pytest.mark.parametrize(
    ("system", "data", "message"),
    [
        ("ade20k/fpn_shunted_t", "YoloDataModule", "`annotation` of YoloDataModule must be boxes or masks, got 'map'"),
        (
            "coco/mask_rcnn_shunted_t",
            "ADE20KDataModule",
            "DetectionTask learns from masks, but ADE20KDataModule has map",
        ),
        (
            "imagenet/shunted_t",
            "ADE20KDataModule",
            "ClassificationTask learns from class, but ADE20KDataModule has map",
        ),
        (
            "coco/mask_rcnn_shunted_t",
            "ImagesDataModule",
            "ImagesDataModule has no classes and is only for predict; choose other data",
        ),
    ],
)
def test_data_with_other_annotations_are_refused(system, data, message):
    Path("data.yaml").write_text("train: .\nval: .\nnames: [a, b]\n")
    Path("a.png").write_bytes(b"")
    own = {"YoloDataModule": "--data.data=data.yaml", "ImagesDataModule": "--data.images=."}.get(data, "--data.root=.")
    with pytest.raises((ValueError, SystemExit), match=message):
        main(["fit", f"--config={ROOT}/configs/{system}.yaml", f"--data={data}", own, *QUICK])


def test_predict_reports_what_is_missing(trained, pictures):
    checkpoint = f"--ckpt_path={trained('imagenet/shunted_t')}/checkpoints/last.ckpt"
    images = f"--data.images={pictures}"
    with pytest.raises(ValueError, match=r"predict needs trained weights; pass a checkpoint with --ckpt_path"):
        main(["predict", images])
    with pytest.raises(ValueError, match="predict needs images; pass an image or a folder of images with --data"):
        main(["predict", checkpoint])
    with pytest.raises(ValueError, match=r"none\.ckpt: no such file"):
        main(["predict", images, "--ckpt_path=none.ckpt"])
    with pytest.raises(ValueError, match="got ShapesDataModule; a checkpoint is enough"):
        main(["predict", "--data=ShapesDataModule", checkpoint])
    with pytest.raises(ValueError, match=r"must not be inside the images .*: the next run would read"):
        main(["predict", images, checkpoint, f"--predictions.out={pictures}/out"])
    with pytest.raises(ValueError, match="nowhere: no such folder or image"):
        main(["predict", "--data.images=nowhere", checkpoint])
    torch.save({"state_dict": {"a": torch.zeros(1)}}, "foreign.ckpt")
    with pytest.raises(ValueError, match="holds no run of `shunted-lit fit`, so its task is unknown"):
        main(["predict", images, "--ckpt_path=foreign.ckpt"])


@pytest.mark.slow
def test_short_side_of_training_and_evaluation_may_differ(tmp_path):
    write_scenes(tmp_path / "set", train=4, val=2, size=64)
    words = ["--data=MaskFolderDataModule", f"--data.root={tmp_path / 'set'}", "--data.crop_size=64"]
    words += ["--data.short_side=64", "--model.short_side=48", "--data.batch_size=2", "--data.num_workers=0"]
    words += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    cli = main(["fit", f"--config={ROOT / 'configs/shapes/semantic_fpn.yaml'}", *words])
    assert (cli.datamodule.hparams.short_side, cli.model.hparams.short_side) == (64, 48)
