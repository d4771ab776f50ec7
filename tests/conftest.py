"""Settings of all tests."""

import matplotlib
import torch

matplotlib.use("agg")
torch.set_num_threads(2)
