"""What is shown of attention, against plain formulas and torch's own count; and that showing it costs nothing else."""

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shunted_lit  # noqa: F401 - timm then knows shunted_t
from shunted_lit.cli import main
from shunted_lit.commands.benchmark import Candidate
from shunted_lit.models.shunted import PlainHeads, ShuntedBackbone, ShuntedTransformer
from shunted_lit.visualization import attention as module
from shunted_lit.visualization.attention import attention_costs, attention_maps

SMALL = {"cin": 16, "depth": 2, "num_heads": 4, "mlp_ratios": 1}
TINY = ["--data.train_size=8", "--data.val_size=4", "--data.size=64", "--data.batch_size=4", "--data.num_workers=0",
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
ROOT = Path(__file__).parents[2]


@given(
    ratios=st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda ratios: 4 % len(ratios) == 0),
    height=st.integers(1, 12), width=st.integers(1, 12), batch=st.integers(1, 2), data=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_maps_are_what_attention_used(ratios, height, width, batch, data):
    torch.manual_seed(0)
    neck = ShuntedTransformer(**SMALL, ratios=tuple(ratios), dtype=torch.float64).eval()
    x = torch.randn(batch, 16, height, width, dtype=torch.float64)
    column, row = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    used, values = [], []

    def note(heads, q, k, v):
        out = PlainHeads.attend(heads, q, k, v)
        used.append(out[:, row * width + column])
        values.append(v.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2))
        return out

    for heads in (group for block in neck.block for group in block.attn.groups):
        heads.attend = lambda q, k, v, heads=heads: note(heads, q, k, v)
    with torch.no_grad():
        neck(x)
    for heads in (group for block in neck.block for group in block.attn.groups):
        del heads.attend
    maps = attention_maps(neck, x, (column + 0.5, row + 0.5))
    assert [found.ratio for found in maps] == [*ratios, *ratios]
    for found, out, v in zip(maps, used, values, strict=True):
        assert found.token == (column, row)
        assert found.weights.shape[2:] == (-(-height // found.ratio), -(-width // found.ratio))
        torch.testing.assert_close(found.weights.sum((2, 3)), torch.ones(found.weights.shape[:2]))
        again = torch.einsum("bhn,bhnd->bhd", found.weights.flatten(2).double(), v).flatten(1)
        torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)


def test_a_picture_has_one_scale():
    """Equal attention is grey at any granularity; a key that gets more than its share is red, the others blue."""
    peak = torch.full((1, 2, 4, 4), 0.5 / 15)
    peak[..., 0, 0] = 0.5
    maps = [
        module.AttentionMap("block.0.attn.groups.0", 8, 4, (0, 0), torch.full((1, 2, 2, 2), 1 / 4)),
        module.AttentionMap("block.0.attn.groups.1", 4, 4, (0, 0), peak),
    ]
    torch.testing.assert_close(maps[0].over_equal(), torch.ones(1, 2, 2))
    torch.testing.assert_close(maps[1].over_equal()[0, 0, :2], torch.tensor([8, 8 / 15]))
    module.draw_attention(Path("a.png"), torch.full((3, 64, 64), 0.5), maps, (63, 63))
    with Image.open("a.png") as picture:
        shown = picture.convert("RGB")
    side, middle = shown.width / 3.3, shown.height // 2  # three panels and the bar
    equal = shown.getpixel((int(1.4 * side), middle))
    assert max(equal) - min(equal) < 12
    across = [shown.getpixel((int(2 * side + i), int(0.2 * shown.height))) for i in range(int(0.9 * side))]
    assert max(red - blue for red, _, blue in across) > 60
    assert min(red - blue for red, _, blue in across) < -20


@pytest.mark.parametrize(("height", "width"), [(3000, 8), (8, 3000), (200, 1), (1, 200)])
def test_thin_images_are_drawn_at_a_size_that_can_be_seen(height, width):
    found = module.AttentionMap("block.0.attn.groups.0", 1, 1, (0, 0), torch.full((1, 1, height, width), 1e-4))
    module.draw_attention(Path("a.png"), torch.rand(3, height, width), [found], (0, 0))
    with Image.open("a.png") as picture:
        assert 150 < min(picture.size) <= max(picture.size) < 1500
    with pytest.raises(ValueError, match="there is no attention to draw"):
        module.draw_attention(Path("b.png"), torch.rand(3, height, width), [], (0, 0))


def test_recording_leaves_the_network_as_it_was():
    neck = ShuntedTransformer(**SMALL).train()
    x, before = torch.randn(1, 16, 9, 7), {name: len(vars(part)) for name, part in neck.named_modules()}
    expected = neck(x)
    attention_maps(neck, x, (3, 4))
    assert neck.training
    assert {name: len(vars(part)) for name, part in neck.named_modules()} == before
    assert not any(part._forward_pre_hooks for part in neck.modules())
    torch.testing.assert_close(neck(x), expected, rtol=0, atol=0)


def test_the_token_of_a_point_in_each_stage():
    model = timm.create_model("shunted_t", num_classes=0)
    maps = attention_maps(model, torch.rand(1, 3, 97, 131), (130, 96))
    last = {found.name.partition(".block")[0]: (found.stride, found.token) for found in maps}
    assert last == {
        "stages.0": (4, (32, 24)), "stages.1": (8, (16, 12)), "stages.2": (16, (8, 6)), "stages.3": (32, (4, 3)),
    }  # fmt: skip


@pytest.mark.parametrize("ratios", [(8, 4, 2, 1), (2, 1), (1,), (3,)])
@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_costs_are_torchs_own_count(ratios, size):
    costs = check_costs(ShuntedTransformer(**SMALL, ratios=ratios), size)
    assert len(costs) == 2 * len(ratios)
    for found in costs:
        keys = -(-size[0] // found.ratio) * -(-size[1] // found.ratio)
        assert (found.queries, found.keys, found.heads) == (size[0] * size[1], keys, 4 // len(ratios))


def check_costs(neck, size):
    x = torch.rand(1, 16, *size)
    neck.eval()
    costs = attention_costs(neck, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        neck(x)
    counts = counter.get_flop_counts()
    for found in costs:
        assert sum(found.flops.values()) == sum(counts[f"ShuntedTransformer.{found.name}"].values())
    return costs


@pytest.mark.parametrize("aggregation", ["avg", "linear", "conv"])
@pytest.mark.parametrize("local_enhancement", ["after", "before", "none"])
def test_costs_of_other_parts(aggregation, local_enhancement):
    parts = {"aggregation": aggregation, "local_enhancement": local_enhancement}
    check_costs(ShuntedTransformer(**SMALL, **parts, ratios=(3, 1)), (7, 6))


def test_costs_need_no_memory():
    with torch.device("meta"):
        neck = ShuntedTransformer()
        assert [found.keys for found in attention_costs(neck, torch.empty(1, 512, 4096, 4096))][:2] == [2**22, 2**24]


def test_any_number_of_granularities_in_a_stage_of_the_backbone():
    model = ShuntedBackbone(depths=(1, 1, 1, 1), num_heads=(4, 4, 8, 16), ratios=((8, 4, 2, 1), (4, 2), 2, 1))
    maps = attention_maps(model, torch.rand(1, 3, 64, 64), (5, 5))
    assert [found.ratio for found in maps] == [8, 4, 2, 1, 4, 2, 2, 1, 1]


# --- the commands


def test_cost_command(capsys):
    options = {"ratios": [8, 4, 2, 1], "num_heads": 4, "depth": 1}
    main(["cost", "neck", f"--options={options}", "--height=20", "--width=20"])
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if line.strip().startswith("block.0")]
    assert [row[:5] for row in rows] == [
        ["block.0", "8", "1", "400", "9"], ["block.0", "4", "1", "400", "25"],
        ["block.0", "2", "1", "400", "100"], ["block.0", "1", "1", "400", "400"],
    ]  # fmt: skip
    heads = sum(float(number) for row in rows for number in row[5:])
    whole = Candidate("neck", shape=(1, 512, 20, 20), options=options).flops() / 1e6
    assert f"together {heads:.0f} of the network's {whole:.0f} MFLOPs" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost", "shunted_u"], "'shunted_u' is none of neck, shunted_t, shunted_s, shunted_b"),
        (["cost", "neck", "--height=0"], "height is 0 and width 40, but 1 is the least"),
        (["cost", "neck", "--options={ratio: 2}"], "the neck has no keyword ratio"),
        (["attention", "a.png", "--point=1,1"], "name a checkpoint of `shunted-lit fit` by --ckpt"),
        (["attention", "a.png", "--ckpt=shunted_t", "--point=1"], "point is '1', but x,y in pixels is needed"),
        (["attention", "a.png", "--ckpt=shunted_t", "--point=50,3"], "50,3 is not within the image of 50 x 40 pixels"),
        (["attention", "a.png", "--ckpt=shunted_t", "--point=3,-1"], "3,-1 is not within"),
        (["attention", "b.png", "--ckpt=shunted_t", "--point=1,1"], "b.png: no such image"),
        (["attention", "a.png", "--ckpt=none.ckpt", "--point=1,1"], "none.ckpt: no such file"),
        (["attention", "a.png", "--ckpt=foreign.pth", "--point=1,1"], "foreign.pth holds no run of shunted-lit fit"),
        (
            ["attention", "a.png", "--ckpt=shunted_t", "--point=1,1", "--out=a.png"],
            "a.png already exists; remove it",
        ),
        (["attention", "a.png", "--ckpt=shunted_t", "--point=1,1", "--out=a.jpg"], r"must end in \.png"),
    ],
)
def test_wrong_words_are_told(words, message):
    Image.new("RGB", (50, 40)).save("a.png")
    torch.save({"a": torch.zeros(1)}, "foreign.pth")
    with pytest.raises(ValueError, match=message):
        main(words)
    assert {path.name for path in Path().iterdir()} == {"a.png", "foreign.pth"}


@pytest.mark.parametrize(
    ("config", "options", "places"),
    [
        (
            "neck",
            ["--model.neck={depth: 2}", "--model.pyramid_channels=32", "--model.max_size=160"],
            1,
        ),
        ("shapes/semantic_fpn", [], 4),
        ("digits", ["--data=ShapesDataModule"], 4),
    ],
)
def test_picture_of_a_trained_network(config, options, places, monkeypatch):
    cli = main(["fit", f"--config={ROOT}/configs/{config}.yaml", *options, *TINY])
    checkpoint = f"{cli.trainer.log_dir}/checkpoints/last.ckpt"
    Image.new("RGB", (90, 60), (200, 30, 30)).save("a.png")
    drawn = []
    draw = module.draw_attention
    monkeypatch.setattr(module, "draw_attention", lambda *args: drawn.append(args) or draw(*args))
    main(["attention", "a.png", f"--ckpt={checkpoint}", "--point=80,50", "--out=seen/picture.png"])
    with Image.open("seen/picture.png") as picture:
        assert min(picture.size) > 150
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    _, _, maps, _, scale = drawn[0]
    assert len({found.name.partition("block.")[0] for found in maps}) == places
    assert all(found.token == (int(80 * scale / found.stride), int(50 * scale / found.stride)) for found in maps)
    rows = {found.name.rpartition(".groups")[0] for found in maps}
    main(["attention", "a.png", f"--ckpt={checkpoint}", "--point=80,50", "--out=all.png", "--every_block=true"])
    every = {found.name.rpartition(".groups")[0] for found in drawn[1][2]}
    assert rows < every
    Image.new("RGB", (400, 1), (200, 30, 30)).save("thin.png")  # which the detector, too, is given wider
    main(["attention", "thin.png", f"--ckpt={checkpoint}", "--point=300,0", "--out=thin_seen.png"])
    assert all(found.token[0] == int(300 * drawn[2][4] / found.stride) for found in drawn[2][2])


def test_a_network_without_it_is_told():
    main(["fit", f"--config={ROOT}/configs/neck.yaml", *TINY, "--model.neck=null"])
    Image.new("RGB", (90, 60)).save("a.png")
    with pytest.raises(ValueError, match=r"last\.ckpt: .* has no shunted attention in it: neither a neck nor"):
        main(["attention", "a.png", "--ckpt=runs/version_0/checkpoints/last.ckpt", "--point=8,5"])
    with pytest.raises(ValueError, match="no shunted attention"):
        attention_maps(torch.nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4), (1, 1))
    with pytest.raises(ValueError, match="4,1 is not within the image of 4 x 4"):
        attention_maps(ShuntedTransformer(**SMALL), torch.rand(1, 16, 4, 4), (4, 1))


@pytest.mark.parametrize("options", [{"bogus": 1}, {"pretrained": True}])
def test_costs_of_options_that_do_not_fit_are_told(options):
    with pytest.raises(ValueError, match="do not fit shunted_t"):
        module.cost("shunted_t", options)
