"""Shipped configs are listed, copied, and found by name in any folder."""

import logging
import re
from pathlib import Path

import pytest
import yaml

from shunted_lit.cli import main
from shunted_lit.commands.configs import shipped_folder

ROOT = Path(__file__).parents[2]
SHIPPED = {
    path.relative_to(ROOT / "configs").as_posix(): path for path in sorted((ROOT / "configs").rglob("*.*"))
}  # a checkout ships all of its configs; an installed package holds copies


def print_config(capsys, *words):
    """Return the settings that `fit` would use."""
    with pytest.raises(SystemExit) as done:
        main(["fit", *words, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_each_shipped_config_is_listed_with_its_first_comment(capsys):
    main(["configs"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == SHIPPED.keys()
    for name, description in lines.items():
        first = SHIPPED[name].read_text().removeprefix("#!/bin/bash\n").splitlines()[0]
        assert first == f"# {description}"
        assert description.endswith("."), "a whole sentence"


def test_a_config_is_copied_but_never_overwritten(capsys):
    main(["configs", "--copy=neck.yaml"])
    assert Path("neck.yaml").read_bytes() == SHIPPED["neck.yaml"].read_bytes()
    main(["configs", "--copy=coco/schedule_1x.yaml", "--out=new/mine"])
    assert Path("new/mine/schedule_1x.yaml").is_file()
    Path("neck.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"neck\.yaml already exists; choose another folder with --out"):
        main(["configs", "--copy=configs/neck.yaml"])
    assert Path("neck.yaml").read_text() == "mine"


@pytest.mark.parametrize("words", [["--config=neck.yaml"], ["--config", "configs/neck.yaml"], ["-c", "neck.yaml"]])
def test_a_shipped_config_is_found_by_name_and_logged(words, capsys, caplog):
    caplog.set_level(logging.INFO)
    assert print_config(capsys, *words) == print_config(capsys, f"--config={SHIPPED['neck.yaml']}")
    name = re.escape(words[-1].removeprefix("--config="))
    found = re.search(rf"{name}: using the shipped (.+/configs/neck\.yaml)", caplog.text)[1]
    assert Path(found).read_bytes() == SHIPPED["neck.yaml"].read_bytes()


def test_a_config_in_the_current_folder_comes_first(capsys, caplog):
    caplog.set_level(logging.INFO)
    Path("neck.yaml").write_text(SHIPPED["neck.yaml"].read_text().replace("max_epochs: 4", "max_epochs: 77"))
    assert print_config(capsys, "--config=neck.yaml")["trainer"]["max_epochs"] == 77
    assert "shipped" not in caplog.text


def test_settings_in_place_of_a_file_reach_the_parser(capsys):
    assert (
        print_config(capsys, "--config=neck.yaml", "--config={trainer: {max_epochs: 9}}")["trainer"]["max_epochs"] == 9
    )


def test_data_commands_and_study_find_shipped_configs(capsys, monkeypatch):
    main(["check", "--config=neck.yaml", "--data.train_size=2", "--data.val_size=1", "--data.num_workers=0"])
    assert "3 images, no errors" in capsys.readouterr().out
    trained = []

    def train(run):
        trained.append(run.config)
        run.folder.mkdir(parents=True)
        run.done.write_text('{"val/map": 0.5}')

    monkeypatch.setattr("shunted_lit.commands.study.StudyRun.train", train)
    main(["study", "[configs/comparison, neck.yaml]", "--seeds=1"])
    comparison = [name for name in SHIPPED if name.startswith("comparison/")]
    assert [path.relative_to(shipped_folder()).as_posix() for path in trained] == [*comparison, "neck.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--config=nekc.yaml"], r"nekc\.yaml does not exist, .* did you mean neck\.yaml\?"),
        (["fit", "--config", "neck"], r"neck does not exist, .* did you mean neck\.yaml\?"),
        (["fit", "--config=mask_rcnn_shunted_s.yaml"], r"did you mean coco/mask_rcnn_shunted_s\.yaml"),
        (["fit", "--config=comparison"], "comparison does not exist"),  # `fit` takes no folder
        (["study", "[configs/comparisons]"], "configs/comparisons does not exist, .* did you mean comparison"),
        (["configs", "--copy=zzz"], r"no shipped config has this name; `shunted-lit configs` lists them"),
    ],
)
def test_a_misspelt_name_gets_close_names(words, message):
    with pytest.raises(ValueError, match=message):
        main(words)
