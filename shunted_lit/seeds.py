"""Random numbers that follow from the run's seed and a place in the run, not from what was drawn before.

So a run that was cut off goes on, in mid-epoch too, as if it had not been, and the number of workers changes nothing.
"""

import random

import numpy as np
import torch


def mixed(*key: int) -> list[int]:
    """Three seeds of 32 bits, from whole numbers of 0 or more."""
    return np.random.SeedSequence(key).generate_state(3).tolist()


def seed_sample(*key: int) -> None:
    """Sets the generators that data are augmented by: Python's, numpy's, and torch's on the CPU."""
    python, numpy, torchs = mixed(0, *key)
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torchs)


def seed_step(*key: int) -> None:
    """Sets all generators of a process, those of its devices too."""
    python, numpy, torchs = mixed(1, *key)
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torchs)
