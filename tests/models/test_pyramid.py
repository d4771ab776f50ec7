"""The neck across levels, against plain formulas and in a feature path."""

import pytest
import torch
from helpers import plain_shunted as plain
from helpers.exports import save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shunted_lit import ShuntedPyramid, ShuntedTransformer
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.tasks import DetectionTask

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=4)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**31))
def test_it_equals_the_formulas_for_maps_of_any_sizes(sizes, heads, depth, batch, seed):
    torch.manual_seed(seed)
    levels = len(sizes)
    channels, ratios = [2 + i for i in range(levels)], torch.randint(1, 5, (levels,)).tolist()
    model = ShuntedPyramid(channels, depth, dim=3 * heads * levels, num_heads=heads * levels, ratios=ratios).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    maps = [torch.randn(batch, c, h, w, dtype=torch.float64) for c, (h, w) in zip(channels, sizes, strict=True)]
    with torch.no_grad():
        results = model.eval()(maps)
        expected = plain.pyramid(maps, model.state_dict(), depth, heads * levels, ratios)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def maps_of(channels, size=12):
    return [torch.randn(2, c, size // 2**i, size // 2**i) for i, c in enumerate(channels)]


def test_it_starts_as_an_identity_and_then_learns():
    torch.manual_seed(0)
    model, maps = ShuntedPyramid([8, 16, 24]), maps_of([8, 16, 24])
    assert all(map(torch.equal, model(maps), maps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        sum((out * torch.randn_like(out)).sum() for out in model(maps)).backward()
        still = {name for name, p in model.named_parameters() if not p.grad.any()}
        assert bool(still) is (step == 0), f"step {step}: no gradient in {still}"
        optimizer.step()
    for out, x in zip(model(maps), maps, strict=True):
        assert not torch.equal(out, x)


def test_each_level_sees_all_levels():
    torch.manual_seed(0)
    model = ShuntedPyramid([8, 16, 24])
    for layer in model.out_proj:
        nn.init.normal_(layer.weight)
    maps = [x.requires_grad_() for x in maps_of([8, 16, 24])]
    for out in model(maps):
        gradients = torch.autograd.grad(out[..., 0, 0].sum(), maps, retain_graph=True)
        assert all(gradient[0, :, -1, -1].any() for gradient in gradients), "the corner opposite, at each level"


def test_saved_copies_exports_and_checkpointing_give_the_same_output():
    torch.manual_seed(0)
    model, maps = ShuntedPyramid([8, 16], depth=2, ratios=[4, 1]).eval(), maps_of([8, 16], 16)
    for layer in model.out_proj:
        nn.init.normal_(layer.weight)
    model.save_pretrained("pyramid")
    loaded = ShuntedPyramid.from_pretrained("pyramid")
    program = torch.export.export(model, (maps,)).module()
    checkpointed = ShuntedPyramid([8, 16], depth=2, ratios=[4, 1]).eval()
    checkpointed.load_state_dict(model.state_dict())
    checkpointed.grad_checkpointing = True
    expected = model(maps)
    for twin in (loaded, program, checkpointed):
        torch.testing.assert_close(twin(maps), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_feature_path_has_one_across_its_levels(checkpointing):
    torch.manual_seed(0)
    path = FeaturePath("resnet18", neck={"form": "pyramid"}, neck_levels=(5, 3), grad_checkpointing=checkpointing)
    x = torch.randn(2, 3, 64, 96)
    maps = dict(zip("345", path.eval().backbone(x), strict=True))
    nn.init.normal_(path.necks["pyramid"].out_proj[0].weight)
    features = path(x)
    torch.testing.assert_close(features["4"], maps["4"], rtol=0, atol=0)
    changed = path.necks["pyramid"]([maps["3"], maps["5"]])
    torch.testing.assert_close([features["3"], features["5"]], changed)
    assert not torch.equal(features["3"], maps["3"])


def test_a_detector_starts_with_the_weights_of_one_without_it(tmp_path):
    torch.manual_seed(0)
    small = {"backbone": "resnet18", "min_size": 64, "max_size": 64, "pyramid_channels": 32}
    plain_task = DetectionTask(2, **small).eval()
    torch.save({"state_dict": plain_task.state_dict(), "task": "DetectionTask", "class_names": ["0", "1"],
                "hyper_parameters": {}}, tmp_path / "plain.ckpt")  # fmt: skip
    keywords = {"neck": {"form": "pyramid"}, "neck_levels": [3, 4, 5]}
    task = DetectionTask(2, weights=str(tmp_path / "plain.ckpt"), **keywords, **small).eval()
    x = [torch.rand(3, 64, 64)]
    torch.testing.assert_close(task.detector(x), plain_task.detector(x))


def test_it_is_loaded_from_a_checkpoint_of_a_detector(tmp_path):
    task = DetectionTask(2, backbone="resnet18", neck={"form": "pyramid", "depth": 2}, neck_levels=[4, 5])
    neck = task.detector.backbone.body.necks["pyramid"].eval()
    for layer in neck.out_proj:
        nn.init.normal_(layer.weight)
    path = save_checkpoint(task, tmp_path / "best.ckpt")
    maps = maps_of([256, 512])
    torch.testing.assert_close(ShuntedPyramid.from_checkpoint(path)(maps), neck(maps), rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"its neck is one across levels; load it with `ShuntedPyramid\.from_checkpoint`"
    ):
        ShuntedTransformer.from_checkpoint(path)
    without = save_checkpoint(DetectionTask(2, backbone="resnet18"), tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match=r"holds no neck across levels; train one with --model\.neck"):
        ShuntedPyramid.from_checkpoint(without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [8]}, "`levels` must be at least 2, got 1"),
        ({"ratios": [2, 1]}, r"channels, ratios must have one entry per level, got \[3, 2\] entries"),
        ({"num_heads": 2, "dim": 12}, "`num_heads` must be a multiple of the number of `ratios`, got 2"),
        ({"dim": 32}, "`num_heads` must divide the channels, got 3 heads and 32 channels"),
        ({"depth": 0}, "`depth` must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShuntedPyramid(**{"channels": [8, 16, 24], **options})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"form": "pyramid", "dept": 1}, "the neck across levels has no keyword 'dept'; did you mean depth"),
        (
            {"form": "pyramid", "channels": [1, 2, 3]},
            r"`channels` must be \[128, 256, 512\], got \[1, 2, 3\]; omit them",
        ),
        (
            {"form": "pyramids"},
            "`form` must be one of light, pyramid, reference, got 'pyramids'; did you mean 'pyramid'",
        ),
    ],
)
def test_feature_paths_with_wrong_keywords_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        FeaturePath("resnet18", neck=keywords, neck_levels=(3, 4, 5))


def test_other_maps_are_refused():
    model = ShuntedPyramid([8, 16])
    with pytest.raises(ValueError, match="The input must be 2 maps, one per level, got 1"):
        model(maps_of([8]))
    with pytest.raises(ValueError, match=r"The input must have the shape \(B, 16, H, W\)"):
        model(maps_of([8, 8]))
