"""Settings of all tests."""

import os
import tempfile

import matplotlib
import torch

# Ultralytics reads these when it is imported, here and in the processes that tests start.
SETTINGS = tempfile.TemporaryDirectory()
os.environ.update(YOLO_CONFIG_DIR=SETTINGS.name, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")

matplotlib.use("agg")
torch.set_num_threads(2)
