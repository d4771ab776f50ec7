"""Random numbers that follow from the run's seed and a place in the run, not from what was drawn before.

So a run that was cut off goes on, in mid-epoch too, as if it had not been, and the number of workers changes nothing.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def derive_seeds(*key: int) -> list[int]:
    """Three seeds of 32 bits, from whole numbers of 0 or more."""
    return np.random.SeedSequence(key).generate_state(3).tolist()


def seed_generators(seed_torch: Callable[[int], Any], *key: int) -> None:
    python, numpy, torchs = derive_seeds(*key)
    random.seed(python)
    np.random.seed(numpy)
    seed_torch(torchs)


def seed_sample(*key: int) -> None:
    """Sets the generators that data are augmented by: Python's, numpy's, and torch's on the CPU."""
    seed_generators(torch.default_generator.manual_seed, 0, *key)


def seed_step(*key: int) -> None:
    """Sets all generators of a process, those of its devices too."""
    seed_generators(torch.manual_seed, 1, *key)
