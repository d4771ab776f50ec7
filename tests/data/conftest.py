"""Scenes on disk, shared by the tests of the readers."""

import shutil

import pytest

from shunted_lit.data.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """6 training and 3 validation scenes of 96 x 96 pixels, in each format; not to be changed."""
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, train=6, val=3, size=96)
    return folder


@pytest.fixture
def folder(scenes, tmp_path):
    """A copy of the scenes to damage."""
    return shutil.copytree(scenes, tmp_path / "set")
