"""The benchmark's figures against what is known of them; how fast anything is, is never asserted."""

import json
from pathlib import Path

import pytest
import torch
from helpers.golden_cases import CASES, build, draw
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.commands import benchmark
from shunted_lit.commands.benchmark import Candidate, PlainNeck, interleave

TINY = ["--size=8", "--image_size=64", "--image_batch=1", "--train_batch=1", "--rounds=2", "--neck={cin: 16, depth: 1}"]


@pytest.mark.parametrize("name", ["neck_small_sr8", "neck_small_sr4", "neck_small_sr2", "neck_small_sr1"])
def test_plain_neck_equals_the_neck(name):
    neck = build(CASES[name])
    plain = PlainNeck(cin=neck.cin)
    plain.neck = neck
    x = draw(1, CASES[name]["input_shape"])
    for part in (x, x[..., :5, :7]):
        with torch.no_grad():
            torch.testing.assert_close(plain(part), neck(part), rtol=1e-4, atol=1e-5)


def test_a_run_and_what_it_leaves(capsys):
    Path("mine.py").write_text("import torch\ndef factory():\n    return torch.nn.Conv2d(16, 16, 3)\n")
    words = ["--necks=[neck]", "--backbones=[resnet18]", "--against=[mine:factory]", "--sizes=[4, 8]"]
    main(["benchmark", *TINY, *words, "--backends=[eager, onnx, openvino]", "--memory=false"])
    content = json.loads(Path("benchmark/benchmark.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert set(content["tables"]) == {
        "necks, inference", "necks, training", "backbones, inference", "backbones, training"
    }  # fmt: skip
    rows = content["tables"]["necks, inference"]
    assert {(r["model"], r["backend"], r["precision"]) for r in rows} == {
        (model, backend, precision)
        for model in ("neck", "mine:factory")
        for backend, precision in (("eager", "float32"), ("eager", "bfloat16"), ("onnx", "float32"),
                                   ("openvino", "float32"), ("openvino", "bfloat16"))
    }  # fmt: skip
    for row in (row for table in content["tables"].values() for row in table):
        assert row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
        assert row["images_per_second"] == pytest.approx(row["shape"][0] / row["seconds"])
        rate = row["matrix_product_flops_per_second"]
        assert row["share_of_matrix_product"] == pytest.approx(row["flops"] / row["seconds"] / rate)
        assert row["peak_memory"] is None
    mine = next(row for row in rows if row["model"] == "mine:factory")
    assert mine["flops"] == 2 * 16 * 16 * 9 * 6 * 6
    trained = content["tables"]["necks, training"][0]
    assert trained["flops"] == 3 * rows[0]["flops"]
    assert [[point["size"] for point in points] for points in content["sizes"].values()] == [[4, 8]] * 2
    assert all(0 <= point["peak_memory"] < 1e9 for points in content["sizes"].values() for point in points)
    with Image.open("benchmark/benchmark.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert "images/s" in capsys.readouterr().out


def test_flops_are_those_of_the_paper():
    assert Candidate("neck").flops() == pytest.approx(50.9e9, rel=0.005)
    assert Candidate("neck").flops() == Candidate("plain neck").flops()
    assert Candidate("shunted_s", shape=(1, 3, 224, 224)).flops() == pytest.approx(2 * 4.99e9, rel=0.01)


def test_peak_memory_counts_what_a_step_takes():
    Path("mine.py").write_text(
        "import torch\nclass Wide(torch.nn.Module):\n"
        "    def forward(self, x):\n        return (x.repeat(1, 50, 1, 1) * 2).sum()\n"
    )
    peak = Candidate("mine:Wide", shape=(1, 16, 128, 128)).peak_memory("cpu")
    assert peak == pytest.approx(2 * 50 * 16 * 128 * 128 * 4, rel=0.1)


def test_memory_that_cannot_be_measured_is_told(caplog):
    Path("mine.py").write_text(
        "import torch\nclass Greedy(torch.nn.Module):\n"
        "    def forward(self, x):\n        raise MemoryError('too much')\n"
    )
    assert Candidate("mine:Greedy", shape=(1, 16, 8, 8)).peak_memory("cpu") is None
    assert "the memory of mine:Greedy on [1, 16, 8, 8] is not known: MemoryError: too much" in caplog.text


def test_mixed_precision_is_autocast(monkeypatch):
    """Weights stay in float32 there, and products are in bfloat16; a training step in bfloat16 is the same."""
    seen = []
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        out = linear(x, weight, bias)
        seen.append((weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    full, low = torch.float32, torch.bfloat16
    for mode, precision, expected in [
        ("inference", "float32", (full, full)), ("inference", "bfloat16", (low, low)),
        ("inference", "mixed", (full, low)), ("training", "mixed", (full, low)), ("training", "bfloat16", (full, low)),
    ]:  # fmt: skip
        seen.clear()
        Candidate("neck", mode, "eager", precision, (1, 16, 4, 4), {"cin": 16}).prepare("cpu", Path())()
        assert set(seen) == {expected}
    rows = benchmark.variants(["neck"], "training", ["eager"], ["bfloat16", "mixed"], (1, 16, 4, 4), None)
    assert [row.precision for row in rows] == ["bfloat16"]


def test_candidates_take_turns():
    calls = []
    one, two = Candidate("neck"), Candidate("plain neck")
    times = interleave({one: lambda: calls.append(1), two: lambda: calls.append(2)}, 3, "cpu", "test")
    assert calls == [1, 2] * 5, "two rounds do not count"
    assert [len(seconds) for seconds in times.values()] == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbones=[shunted_q]"], "timm has no model 'shunted_q'; close names: shunted_"),
        (["--against=[nowhere:factory]"], "nowhere:factory can't be built .No module named 'nowhere'"),
        (["--against=[os:getcwd]"], "os:getcwd gives a str, but an nn.Module is needed"),
        (["--rounds=0"], "rounds is 0, but at least 1 is needed"),
        (["--modes=[]"], "there is nothing to time"),
        (["--neck={foo: 9}"], "the neck has no keyword foo"),
        (["--neck={cin: 9}"], "9 channels do not split into 2 heads"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(ValueError, match=message):
        main(["benchmark", *words])
    assert not Path("benchmark").exists()


def test_missing_runtime_names_its_extra(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None, raising=False)
    with pytest.raises(ValueError, match=r"openvino needs .*: pip install 'shunted-lit\[export\]'"):
        main(["benchmark", "--backends=[openvino]"])
