"""`shunted-lit attention` draws trained networks of each task, and rejects wrong arguments."""

from pathlib import Path

import pytest
import torch
from helpers.exports import SMALL, save_checkpoint
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.commands import attention as command
from shunted_lit.tasks import DetectionTask

TINY = ["--data.train_size=8", "--data.val_size=4", "--data.size=64", "--data.batch_size=4", "--data.num_workers=0",
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
SMALL_NECK = ["--model.neck={depth: 2, mlp_ratios: 1}", "--model.pyramid_channels=32", "--model.max_size=160"]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--point=1,1"], "--ckpt must be a checkpoint of `shunted-lit fit` or one of shunted_t"),
        (["a.png", "--ckpt=shunted_t", "--point=1"], "`point` must be x,y in pixels, such as 120,80, got '1'"),
        (["a.png", "--ckpt=shunted_t", "--point=50,3"], "`point` must be inside the 50 x 40 pixels, got 50,3"),
        (["a.png", "--ckpt=shunted_t", "--point=3,-1"], "`point` must be inside .*, got 3,-1"),
        (["b.png", "--ckpt=shunted_t", "--point=1,1"], "b.png: no such image"),
        (["a.png", "--ckpt=none.ckpt", "--point=1,1"], "none.ckpt: no such file"),
        (["a.png", "--ckpt=foreign.pth", "--point=1,1"], "foreign.pth must be a checkpoint of `shunted-lit fit`"),
        (["a.png", "--ckpt=shunted_t", "--point=1,1", "--out=a.png"], r"a\.png`? (is there already|already exists)"),
        (["a.png", "--ckpt=shunted_t", "--point=1,1", "--out=a.jpg"], r"must end in \.png"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message):
    Image.new("RGB", (50, 40)).save("a.png")
    torch.save({"a": torch.zeros(1)}, "foreign.pth")
    with pytest.raises(ValueError, match=message):
        main(["attention", *arguments])
    assert {path.name for path in Path().iterdir()} == {"a.png", "foreign.pth"}


def test_variant_by_name_is_drawn():
    Image.new("RGB", (64, 64)).save("a.png")
    main(["attention", "a.png", "--ckpt=shunted_t", "--point=3,4", "--out=out.png"])
    assert Path("out.png").is_file()


def check_pictures(checkpoint, stages, monkeypatch):
    """Draw a checkpoint's network for the last blocks, for every block, and for a thin image."""
    Image.new("RGB", (90, 60), (200, 30, 30)).save("a.png")
    calls = []
    draw = command.draw_attention
    monkeypatch.setattr(command, "draw_attention", lambda *args: calls.append(args) or draw(*args))
    main(["attention", "a.png", f"--ckpt={checkpoint}", "--point=80,50", "--out=folder/picture.png"])
    with Image.open("folder/picture.png") as picture:
        assert min(picture.size) > 150
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    _, _, maps, _, scale = calls[0]
    assert len({attention.name.partition("block.")[0] for attention in maps}) == stages
    assert all(a.token == (int(80 * scale / a.stride), int(50 * scale / a.stride)) for a in maps)
    main(["attention", "a.png", f"--ckpt={checkpoint}", "--point=80,50", "--out=all.png", "--every_block=true"])
    last, every = ({attention.name.rpartition(".groups")[0] for attention in call[2]} for call in calls)
    assert last < every
    Image.new("RGB", (400, 1), (200, 30, 30)).save("thin.png")  # the detector pads it
    main(["attention", "thin.png", f"--ckpt={checkpoint}", "--point=300,0", "--out=thin_picture.png"])
    _, _, maps, _, scale = calls[2]
    assert all(attention.token[0] == int(300 * scale / attention.stride) for attention in maps)


def test_neck_of_a_detector_is_drawn(monkeypatch):
    task = DetectionTask(2, **{**SMALL, "neck": {"depth": 2, "mlp_ratios": 1}})
    check_pictures(save_checkpoint(task, "best.ckpt"), 1, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "stages"),
    [("neck", SMALL_NECK, 1), ("shapes/semantic_fpn", [], 4), ("digits", ["--data=ShapesDataModule"], 4)],
)
def test_trained_network_is_drawn(config, options, stages, monkeypatch):
    cli = main(["fit", f"--config={CONFIGS}/{config}.yaml", *options, *TINY])
    check_pictures(f"{cli.trainer.log_dir}/checkpoints/last.ckpt", stages, monkeypatch)


def test_checkpoint_without_shunted_attention_is_reported():
    save_checkpoint(DetectionTask(2, **{**SMALL, "neck": None}), "last.ckpt")
    Image.new("RGB", (90, 60)).save("a.png")
    with pytest.raises(ValueError, match=r"last\.ckpt: `model` must contain a neck or a shunted backbone; .* does not"):
        main(["attention", "a.png", "--ckpt=last.ckpt", "--point=8,5"])
