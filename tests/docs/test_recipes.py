"""The recipes of the documentation work: smaller, but built by the pages' own code."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from transformers import RTDetrResNetConfig

from shunted_lit.data import CocoDataModule

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def run_recipe(word, page="neck.md"):
    """Run the only Python block of a page with this word, and return the names that it defines."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    names: dict = {}
    exec(block, names)
    return names


def train_one_step(model, loss):
    """Return the names of the parameters without a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss.backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if p.grad is None}


def test_instance_maps_become_a_coco_file_with_the_same_masks():
    numbers = np.zeros((40, 50), np.uint16)
    for value, (y, x, side) in enumerate([(0, 0, 1), (3, 3, 9), (20, 30, 20), (12, 3, 5)], 300):
        numbers[y : y + side, x : x + side] = value
    numbers[25:30, 35:40] = 0  # a hole
    for folder in ("images", "maps"):
        Path(folder).mkdir()
    Image.new("RGB", (50, 40)).save("images/one.png")
    Image.fromarray(numbers).save("maps/one.png")
    run_recipe("def write_coco", "data.md")["write_coco"]("images", "maps", "all.json", "cell")
    data = CocoDataModule(".", train_images="images", train_annotations="all.json", val_images="images",
                          val_annotations="all.json", annotation="masks", num_workers=0)  # fmt: skip
    data.setup("validate")
    _, target = data.datasets["val"][0]
    assert data.class_names == ["cell"]
    expected = torch.stack([torch.from_numpy(numbers == value) for value in range(300, 304)])
    assert torch.equal(target["masks"], expected)
    assert target["boxes"][1].tolist() == [3, 3, 12, 12]


def test_rtdetr_with_the_neck_starts_as_its_base_and_trains():
    names = run_recipe("RTDetrV2")
    model_class, with_neck = names["RTDetrV2ForObjectDetection"], names["with_neck"]
    assert names["model"].model.encoder_input_proj[-1][-1].cin == 256
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = type(names["model"].config)(
        backbone_config=backbone, encoder_in_channels=[16, 32, 64], encoder_hidden_dim=32, d_model=32, num_labels=5,
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=20, decoder_layers=2,
    )  # fmt: skip
    base = model_class(config).eval()
    model = with_neck(copy.deepcopy(base))
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, base(x).logits)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    assert not train_one_step(model, model.train()(x, labels=labels).loss)
    assert model.model.encoder_input_proj[-1][-1].out_proj.weight.any()

    torch.save(model.state_dict(), "model.pt")
    loaded = with_neck(model_class(config))
    loaded.load_state_dict(torch.load("model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x).logits, model.eval()(x).logits, rtol=0, atol=0)


@pytest.mark.slow  # a ResNet-50; the same is tested on small networks in tests/tasks
def test_fcos_with_the_neck_trains_and_loads_from_its_checkpoint():
    task = run_recipe('detector="fcos"')["task"]
    task.detector.transform.min_size = (64,)  # a small image need not be enlarged here
    x = [torch.rand(3, 64, 96)]
    target = {"boxes": torch.tensor([[4.0, 6, 40, 50]]), "labels": torch.tensor([2])}
    assert not train_one_step(task, sum(task.train().detector(x, [target]).values()))
    assert task.detector.backbone.body.necks["5"].out_proj.weight.any()

    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint("task.ckpt")
    loaded = type(task).load_from_checkpoint("task.ckpt", weights_only=True).eval()
    loaded.detector.transform.min_size = (64,)
    torch.testing.assert_close(loaded(x), task.eval()(x), rtol=0, atol=0)
