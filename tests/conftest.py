"""Settings of all tests."""

import os
import tempfile

import matplotlib
import pytest
import torch

# Ultralytics reads these when it is imported, here and in the processes that tests start.
SETTINGS = tempfile.TemporaryDirectory()
os.environ.update(YOLO_CONFIG_DIR=SETTINGS.name, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")

matplotlib.use("agg")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # else workers wait for each other's threads


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Run each test in an empty folder of its own, so that none writes to the checkout."""
    monkeypatch.chdir(tmp_path)
