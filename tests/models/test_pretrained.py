"""`save_pretrained` and `from_pretrained`: a neck in a folder, as on the Hugging Face hub."""

import json
import subprocess
import sys
from functools import partial

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from torch import nn

from shunted_lit import ShuntedTransformer
from shunted_lit.models import weights

OPTIONS = {
    "cin": 24, "depth": 2, "num_heads": 6, "mlp_ratios": 2.5, "qkv_bias": False, "qk_scale": 0.3, "drop_rate": 0.1,
    "attn_drop_rate": 0.2, "drop_path_rate": 0.3, "ratios": (8, 4, 2), "aggregation": "linear",
    "local_enhancement": "after", "feed_forward": "conventional", "layer_scale": 0.5, "dtype": torch.bfloat16,
    "form": "light", "identity_start": False,
    "norm_layer": partial(nn.LayerNorm, eps=1e-3),
}  # fmt: skip


def save(options, folder="neck"):
    """Save a neck with random weights, and return it in eval mode."""
    torch.manual_seed(0)
    neck = ShuntedTransformer(**options)
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.1)
    neck.save_pretrained(folder)
    return neck.eval()


@pytest.mark.slow
def test_a_fresh_process_loads_a_saved_neck_with_all_keywords(tmp_path):
    neck = save(OPTIONS)
    x = torch.randn(2, 24, 9, 7, dtype=torch.bfloat16)
    torch.save(x, "x.pt")
    code = (
        "import torch, shunted_lit; neck = shunted_lit.ShuntedTransformer.from_pretrained('neck')\n"
        "assert not neck.training\n"
        "torch.save((neck(torch.load('x.pt')), neck.keywords()), 'result.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    output, keywords = torch.load("result.pt")
    torch.testing.assert_close(output, neck(x), rtol=0, atol=0)
    norm = {"name": "LayerNorm", "eps": 1e-3, "elementwise_affine": True, "bias": True}
    assert keywords == {**OPTIONS, "ratios": [8, 4, 2], "dtype": "bfloat16", "norm_layer": norm}
    assert json.loads((tmp_path / "neck/config.json").read_text()) == keywords


def test_a_loaded_neck_trains_as_the_saved_one():
    neck = save(OPTIONS)
    loaded, x = ShuntedTransformer.from_pretrained("neck"), torch.randn(2, 24, 5, 5, dtype=torch.bfloat16)
    outputs = []
    for model in (neck, loaded):
        torch.manual_seed(1)  # for dropout and stochastic depth
        outputs.append(model.train()(x))
    assert not torch.equal(outputs[0], neck.eval()(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert loaded.keywords() == neck.keywords()


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 64), st.floats(0.5, 8))
def test_hidden_channels_survive_for_any_width(cin, mlp_ratios):
    neck = ShuntedTransformer(
        cin, 1, num_heads=1, ratios=(2,), mlp_ratios=max(mlp_ratios, 1 / cin + 1e-6), device="meta"
    )
    again = ShuntedTransformer(**{**weights.decode_keywords(neck.keywords(), ""), "device": "meta"})
    assert again.block[0].mlp.fc1.out_features == neck.block[0].mlp.fc1.out_features


def test_keywords_override_those_of_the_folder():
    neck = save({"cin": 8, "depth": 1})
    assert next(ShuntedTransformer.from_pretrained("neck", dtype=torch.float64).parameters()).dtype == torch.float64
    assert ShuntedTransformer.from_pretrained("neck", drop_rate=0.5).keywords() == {**neck.keywords(), "drop_rate": 0.5}


def test_from_checkpoint_reads_the_file_of_a_folder():
    neck, x = save(OPTIONS), torch.randn(1, 24, 4, 4, dtype=torch.bfloat16)
    again = ShuntedTransformer.from_checkpoint("neck/model.safetensors")
    torch.testing.assert_close(again(x), neck(x), rtol=0, atol=0)
    assert again.keywords() == neck.keywords()


def test_push_to_hub_uploads_what_from_pretrained_downloads(monkeypatch, tmp_path):
    """The hub is replaced by a folder: a test cannot reach it."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **_):
            return folder_path.rename(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    calls = []
    monkeypatch.setattr(
        weights, "hf_hub_download", lambda *args, **options: calls.append((args, options)) or tmp_path / "hub" / args[1]
    )
    neck, x = ShuntedTransformer(cin=8, depth=1, identity_start=True).eval(), torch.randn(1, 8, 3, 3)
    neck.push_to_hub("user/neck")
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = ShuntedTransformer.from_pretrained("user/neck", revision="main")
    assert calls == [(("user/neck", name), {"revision": "main"}) for name in ("config.json", "model.safetensors")]
    torch.testing.assert_close(loaded(x), neck(x), rtol=0, atol=0)


class OwnNorm(nn.LayerNorm):
    """A norm that torch does not have."""


def write_other_model(tmp_path):
    save_for_hf(timm.create_model("test_resnet"), "neck", safe_serialization=True)


def change_config(change):
    def write(tmp_path):
        save({"cin": 8, "depth": 1})
        file = tmp_path / "neck/config.json"
        file.write_text(change(json.loads(file.read_text())))

    return write


def write_pickle(tmp_path):
    save({"cin": 8, "depth": 1})
    (tmp_path / "neck/model.safetensors").unlink()
    torch.save(ShuntedTransformer(8, 1).state_dict(), "neck/pytorch_model.bin")


def write_truncated_weights(tmp_path):
    save({"cin": 8, "depth": 1})
    file = tmp_path / "neck/model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def write_other_weights(tmp_path):
    save({"cin": 8, "depth": 1})
    safetensors.torch.save_file(ShuntedTransformer(8, 2).state_dict(), "neck/model.safetensors")


BAD_FOLDERS = {
    "of another model": (write_other_model, "config.json: must be that of a neck, but has no `cin`"),
    "without a config": (lambda path: path.joinpath("neck").mkdir(), "neck: a neck's folder must hold config.json"),
    "a pickle": (write_pickle, "neck: a neck's folder must hold model.safetensors"),
    "of other sizes": (
        change_config(lambda config: json.dumps({**config, "cin": 16})),
        r"\d+ of another shape .*cin=8",
    ),
    "of other depth": (write_other_weights, r"unexpected .*depth=2"),
    "damaged config": (change_config(lambda config: json.dumps(config)[:40]), "config.json: not a readable JSON file"),
    "a list": (change_config(lambda config: "[]"), "config.json: must be that of a neck"),
    "unknown keyword": (change_config(lambda c: json.dumps({**c, "dept": 1})), "no keyword 'dept'; did you mean depth"),
    "wrong type": (
        change_config(lambda c: json.dumps({**c, "depth": "1"})),
        "`depth` of the neck must be int, got '1'",
    ),
    "unknown dtype": (change_config(lambda c: json.dumps({**c, "dtype": "nn"})), "`dtype` must be a dtype of torch"),
    "truncated": (write_truncated_weights, "model.safetensors: not a readable checkpoint"),
    "own norm": (lambda path: save({"cin": 8, "norm_layer": OwnNorm}), "`norm_layer` is OwnNorm, .* give it"),
    "no folder": (lambda path: None, "neck must be a folder or a readable repository of the hub"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_holds_no_such_neck_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write, message = BAD_FOLDERS[case]
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        ShuntedTransformer.from_pretrained("neck")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_norm_of_another_package_is_given_at_loading():
    neck, x = save({"cin": 8, "norm_layer": OwnNorm}), torch.randn(1, 8, 3, 3)
    loaded = ShuntedTransformer.from_pretrained("neck", norm_layer=OwnNorm)
    torch.testing.assert_close(loaded(x), neck(x), rtol=0, atol=0)
