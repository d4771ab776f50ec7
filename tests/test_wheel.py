"""A wheel is enough: it holds the configs, and a run starts from an empty folder without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from shunted_lit.commands.configs import shipped_files

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def build(kind, source, out):
    """Build with the backend of pyproject.toml, without an environment of its own, which would be a download."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the wheel that is built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "docs", "notebooks", "__pycache__", "runs")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return build("wheel", next((folder / "unpacked").iterdir()), folder)


def test_wheel_has_all_modules_and_configs(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "shunted_lit").rglob("*.py")}
    configs = {f"shunted_lit/configs/{name}" for name in shipped_files()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {*modules, *configs, "shunted_lit/py.typed"}


def test_installed_wheel_lists_configs_and_trains_in_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        f"--target={target}",
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    empty.mkdir()

    def run(*words):
        command, env = [target / "bin/shunted-lit", *words], {**os.environ, "PYTHONPATH": str(target)}
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=300)

    listed = run("configs")
    assert len(listed.stdout.splitlines()) == len(shipped_files()), listed.stderr
    done = run("fit", "--config", "neck.yaml", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"neck.yaml: using the shipped {target}/shunted_lit/configs/neck.yaml" in done.stderr
    assert not list(empty.iterdir()), "fast_dev_run writes nothing"
