"""What `shunted-lit benchmark` measures and writes; no speed is asserted."""

import json
from pathlib import Path

import pytest
import torch
from helpers.golden_cases import CASES, build, draw
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.commands.benchmark import make_candidates
from shunted_lit.export import formats, measurement
from shunted_lit.export.measurement import Candidate, check_plain_neck, measure_size, time_interleaved
from shunted_lit.models.plain_neck import PlainNeck

TINY = ["--size=8", "--image_size=64", "--image_batch=1", "--train_batch=1", "--rounds=2", "--neck={cin: 16, depth: 1}"]


@pytest.mark.parametrize("name", ["neck_small_sr8", "neck_small_sr4", "neck_small_sr2", "neck_small_sr1"])
def test_plain_neck_equals_the_neck(name):
    neck = build(CASES[name])
    plain = PlainNeck(cin=neck.cin)
    plain.neck = neck
    x = draw(1, CASES[name]["input_shape"])
    for features in (x, x[..., :5, :7]):
        with torch.no_grad():
            torch.testing.assert_close(plain(features), neck(features), rtol=1e-4, atol=1e-5)


BACKENDS = {"eager": ["float32", "bfloat16"], "onnx": ["float32"], "openvino": ["float32", "bfloat16"]}


@pytest.mark.parametrize("backends", [["eager"], pytest.param([*BACKENDS], marks=pytest.mark.slow)])
def test_run_writes_tables_sizes_and_a_picture(backends, capsys, monkeypatch):
    monkeypatch.setitem(measurement.DEVICES, "cpu", measurement.DEVICES["cpu"]._replace(matmul_side=256))
    if "openvino" not in backends:  # without a process for each measurement
        monkeypatch.setattr(Candidate, "measure_memory", lambda self, device: 10**6)
    Path("mine.py").write_text("import torch\ndef factory():\n    return torch.nn.Conv2d(16, 16, 3)\n")
    networks = ["--necks=[neck, light, pyramid]", "--backbones=[test_resnet]", "--against=[mine:factory]"]
    main(["benchmark", *TINY, *networks, "--sizes=[4, 8]", f"--backends=[{', '.join(backends)}]", "--memory=false"])
    content = json.loads(Path("benchmark/benchmark.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert set(content["tables"]) == {
        "necks, inference", "necks, training", "backbones, inference", "backbones, training"
    }  # fmt: skip
    rows = content["tables"]["necks, inference"]
    assert {(row["model"], row["backend"], row["precision"]) for row in rows} == {
        (model, backend, precision)
        for model in ("neck", "light", "pyramid", "mine:factory")
        for backend in backends
        for precision in BACKENDS[backend]
    }
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
    assert [[point["size"] for point in points] for points in content["sizes"].values()] == [[4, 8]] * 4
    assert all(0 <= point["peak_memory"] < 1e9 for points in content["sizes"].values() for point in points)
    with Image.open("benchmark/benchmark.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert "images/s" in capsys.readouterr().out


def test_flops_equal_the_papers():
    assert Candidate("neck").count_flops() == pytest.approx(50.9e9, rel=0.005)
    counts = [Candidate(name, shape=(1, 512, 9, 8)).count_flops() for name in ("neck", "plain neck")]
    assert counts[0] == counts[1]
    assert Candidate("shunted_s", shape=(1, 3, 224, 224)).count_flops() == pytest.approx(2 * 4.99e9, rel=0.01)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_step():
    Path("mine.py").write_text(
        "import torch\nclass Wide(torch.nn.Module):\n"
        "    def forward(self, x):\n        return (x.repeat(1, 50, 1, 1) * 2).sum()\n"
    )
    peak = Candidate("mine:Wide", shape=(1, 16, 128, 128)).measure_memory("cpu")
    assert peak == pytest.approx(2 * 50 * 16 * 128 * 128 * 4, rel=0.1)


@pytest.mark.slow
def test_memory_that_cannot_be_measured_is_reported(caplog):
    Path("mine.py").write_text(
        "import torch\nclass Greedy(torch.nn.Module):\n"
        "    def forward(self, x):\n        raise MemoryError('too much')\n"
    )
    assert Candidate("mine:Greedy", shape=(1, 16, 8, 8)).measure_memory("cpu") is None
    assert "The memory of mine:Greedy on [1, 16, 8, 8] could not be measured: MemoryError: too much" in caplog.text


def test_mixed_precision_is_autocast(monkeypatch):
    """Weights are float32 and products bfloat16, also when training in bfloat16."""
    dtypes = []
    linear = torch.nn.functional.linear

    def recorded_linear(x, weight, bias=None):
        out = linear(x, weight, bias)
        dtypes.append((weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", recorded_linear)
    full, low = torch.float32, torch.bfloat16
    for mode, precision, expected in [
        ("inference", "float32", (full, full)), ("inference", "bfloat16", (low, low)),
        ("inference", "mixed", (full, low)), ("training", "mixed", (full, low)), ("training", "bfloat16", (full, low)),
    ]:  # fmt: skip
        dtypes.clear()
        Candidate("neck", mode, "eager", precision, (1, 16, 4, 4), {"cin": 16}).prepare("cpu", Path())()
        assert set(dtypes) == {expected}
    rows = make_candidates(["neck"], "training", ["eager"], ["bfloat16", "mixed"], (1, 16, 4, 4))
    assert [row.precision for row in rows] == ["bfloat16"]


def test_candidates_take_turns():
    calls = []
    one, two = Candidate("neck"), Candidate("plain neck")
    times = time_interleaved({one: lambda: calls.append(1), two: lambda: calls.append(2)}, 3, "cpu", "test")
    assert calls == [1, 2] * 5, "two rounds are for warming up"
    assert [len(seconds) for seconds in times.values()] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbones=[shunted_q]"], "shunted_q.*shunted_"),
        (
            ["--against=[nowhere:factory]"],
            "nowhere:factory cannot be built .No module named 'nowhere'.; name a module:factory",
        ),
        (["--against=[os:getcwd]"], "os:getcwd must return an nn.Module, got str"),
        (["--rounds=0"], "`rounds` must be at least 1, got 0"),
        (["--modes=[]"], "There is nothing to time; choose --necks"),
        (["--neck={foo: 9}"], "the neck has no keyword 'foo'"),
        (["--neck={cin: 9}"], "got 2 heads and 9 channels"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["benchmark", *arguments])
    assert not Path("benchmark").exists()


def test_missing_runtime_names_its_extra(monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"openvino needs .*: pip install 'shunted-lit\[export\]'"):
        main(["benchmark", "--backends=[openvino]"])


def test_plain_neck_that_differs_is_rejected(monkeypatch):
    options = {"cin": 32, "depth": 1}
    check_plain_neck(options, "cpu")
    monkeypatch.setattr(PlainNeck, "forward", lambda self, x: self.neck(x) + 1)
    with pytest.raises(ValueError, match=r"must equal the neck within 1e-9, got a difference of 1\.0e"):
        check_plain_neck(options, "cpu")


def test_sizes_that_do_not_fit_into_memory_are_skipped(caplog):
    assert measure_size(Candidate("plain neck", shape=(1, 32, 10_000, 10_000)), "cpu") == []
    assert "plain neck at 10000 x 10000 is skipped: it may need 120000000 GB" in caplog.text
