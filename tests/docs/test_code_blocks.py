"""The shell and Python blocks of README and docs run, or are parsed where they need data, a GPU or time.

The blocks of a page run in order, in one folder and in this process, with the smaller settings of `SMALLER`. Commands
of other programs do not run: the files, extras and options that they name must exist.
"""

import re
import shlex
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import shunted_lit.data
from shunted_lit.cli import main

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]}
SLOW = {"classification", "experiments", "export", "systems"}  # pages whose blocks take long to run
NEEDS = {"data", "gpu", "time"}
LANGUAGES = {"bibtex", "html", "python", "sh", "text", "yaml"}
# Options that make a command, or a network, small.
TRAINING = "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 1 --data.batch_size 2"
EVALUATION = "--trainer.limit_val_batches 1 --data.num_workers 0 --trainer.enable_progress_bar false"
SMALLER = {
    "configs/neck.yaml": "--model.backbone test_resnet --model.neck.depth 1 --model.pyramid_channels 32",
    "neck.yaml": "--model.backbone test_resnet --model.neck.depth 1 --model.pyramid_channels 32",
    "check": "--data.num_workers 0",
    "fit": f"{TRAINING} {EVALUATION} --report.images 1",
    "predict": "--trainer.enable_progress_bar false --data.num_workers 0",
    "scenes": "--train 2 --val 2 --size 96",
    "validate": EVALUATION,
}
FIRST_RUN = ["shunted-lit", "fit", "--config", "configs/neck.yaml"]
TASKS = ["ClassificationTask", "DetectionTask", "SegmentationTask"]
COMMANDS = [
    "attention",
    "benchmark",
    "check",
    "configs",
    "cost",
    "digits",
    "export",
    "fit",
    "predict",
    "scenes",
    "shard",
    "study",
]


@dataclass
class Block:
    """A fenced code block of a page.

    Args:
        language: the word after the fence.
        needs: what a test does not have, or None where the block runs.
        text: its lines.
    """

    language: str
    needs: str | None
    text: str

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        split = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")]
        return [words for words in split if words]


def read_blocks(path: Path) -> list[Block]:
    pattern = r"(?:^<!-- needs: (\w+) -->\n)?^```(\w+)\n(.*?)^```$"
    found = re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, needs or None, text) for needs, language, text in found]


def parse(words: list[str]) -> None:
    """Parse a command, without running it; raise an error for what does not exist."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # an environment variable
        words = words[1:]
    if words and words[0] == "torchrun":
        words = ["shunted-lit", *words[words.index("-m") + 2 :]]
    match words:
        case ["shunted-lit", "yolo", "train", *settings]:
            from ultralytics.cfg import DEFAULT_CFG_DICT

            assert {setting.partition("=")[0] for setting in settings} <= DEFAULT_CFG_DICT.keys()
        case ["shunted-lit", *words]:
            with pytest.raises(SystemExit) as exit:
                main([*words, "--print_config"])
            assert exit.value.code == 0
        case ["pip", "install", *words]:
            assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= declared_extras()
        case ["pytest" | "python" | "sbatch" | "sphinx-build", *words]:
            for word in words:
                if word.startswith(("tests/", "configs/", "docs/")) and "_build" not in word:
                    assert list(ROOT.glob(word)), f"{word} does not exist"
        case ["export" | "source" | "pre-commit" | ".ci/run" | ".ci/lowest_versions", *_] | []:
            pass
        case _:
            raise AssertionError(f"no check for the command {shlex.join(words)}")


def declared_extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def run(words: list[str]) -> Any:
    """Run a command of this package, made small; parse those of others."""
    if words[0] != "shunted-lit":
        return parse(words)
    smaller = [option for word in words[1:] for option in SMALLER.get(word, "").split()]
    if not any("help" in word for word in words):
        return main([*words[1:], *smaller])
    with pytest.raises(SystemExit) as exit:
        main(words[1:])
    assert exit.value.code == 0


@pytest.fixture
def configs(in_tmp_path, monkeypatch):
    """Name the configs as in a clone of the repository."""
    Path("configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """Return the folder of runs after the command with which several pages begin."""
    folder = tmp_path_factory.mktemp("first_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("configs").symlink_to(ROOT / "configs")
        run(FIRST_RUN)
    return folder / "runs"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_known_language_and_need(page):
    blocks = read_blocks(PAGES[page])
    assert {block.language for block in blocks} <= LANGUAGES
    assert {block.needs for block in blocks} <= {*NEEDS, None}
    text = PAGES[page].read_text(encoding="utf-8")
    assert len(re.findall(r"^<!-- needs", text, re.MULTILINE)) == sum(block.needs is not None for block in blocks) + (
        page == "CONTRIBUTING"  # which shows the comment itself
    )


def has_yolo26():
    return (Path(find_spec("ultralytics").origin).parent / "cfg/models/26").is_dir()


@pytest.mark.parametrize(
    ("page", "with_export"),
    [(page, False) for page in PAGES if page not in SLOW]
    + [pytest.param(page, True, marks=pytest.mark.slow) for page in ["README", *sorted(SLOW)]],
)
def test_blocks_of_a_page_run_in_order(page, with_export, configs, first_run):
    if "yolo26" in PAGES[page].read_text(encoding="utf-8") and not has_yolo26():
        pytest.skip("yolo26 needs Ultralytics 8.4")
    names: dict = {}
    for block in read_blocks(PAGES[page]):
        if block.needs is None and block.language == "python":
            exec(block.text, names)
        elif block.needs is None and block.language == "sh":
            for words in block.commands():
                if words == FIRST_RUN:
                    shutil.copytree(first_run, "runs")
                elif words[:2] == ["shunted-lit", "export"] and not with_export:
                    parse(words)
                else:
                    run(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_understood(page, configs):
    for block in read_blocks(PAGES[page]):
        if block.language == "python":
            compile(block.text, page, "exec")
        for words in block.commands() if block.language == "sh" and (block.needs or page in SLOW) else []:
            if words[:2] in (["shunted-lit", "predict"], ["shunted-lit", "validate"]):
                # Without a config, the checkpoint would be read.
                data = ["--data", "ImagesDataModule"] if words[1] == "predict" else []
                words[2:2] = ["--config", "configs/neck.yaml", *data]
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_files_in_the_text_exist(page):
    text = PAGES[page].read_text(encoding="utf-8")
    names = re.findall(r"`((?:tests|configs|docs|notebooks|shunted_lit)/[\w./]+)`", text)
    assert not [name for name in names if not (ROOT / name).exists()]


def test_options_in_the_text_exist(configs, capsys):
    mentioned = {
        option
        for path in PAGES.values()
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text(encoding="utf-8"))
        if path.stem != "CONTRIBUTING"
        for option in re.findall(r"(?:^| )--([a-z][\w.-]*)", code)
    }
    calls = [[command, "--help"] for command in COMMANDS]
    calls += [["yolo", "yaml", "--help"], ["yolo", "weights", "--help"]]
    calls += [["fit", "--model.help", name] for name in TASKS]
    calls += [["fit", "--data.help", name] for name in shunted_lit.data.__all__ if not name.startswith("Base")]
    calls += [
        ["fit", "--optimizer.help", "SGD"],
        ["fit", "--lr_scheduler.help", "lightning.pytorch.cli.ReduceLROnPlateau"],
    ]
    for words in calls:
        with pytest.raises(SystemExit):
            main(words)
    known = set(re.findall(r"--([a-z][\w.-]*)", capsys.readouterr().out))
    # Keywords of the neck and of other programs have no help of their own here.
    others = {"max-restarts", "trainer.strategy.ddp_comm_hook", "trainer.callbacks.decay", "logdir"}
    unknown = {option for option in mentioned - known - others if not re.match(r"(model\.)?neck\.", option)}
    assert len(mentioned) > 40
    assert not unknown
