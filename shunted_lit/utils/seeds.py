"""Random seeds derived from the run's seed and a position in the run.

Random numbers do not depend on what was drawn before. A resumed run therefore continues as if it had not been
interrupted, in mid-epoch too, and the number of workers changes nothing.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def derive_seeds(*key: int) -> list[int]:
    """Return three 32-bit seeds that depend on the key, integers of at least 0."""
    return np.random.SeedSequence(key).generate_state(3).tolist()


def seed_generators(seed_torch: Callable[[int], Any], *key: int) -> None:
    python_seed, numpy_seed, torch_seed = derive_seeds(*key)
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    seed_torch(torch_seed)


def seed_sample(*key: int) -> None:
    """Seed the generators that augmentation uses: Python's, NumPy's, and PyTorch's on the CPU."""
    seed_generators(torch.default_generator.manual_seed, 0, *key)


def seed_step(*key: int) -> None:
    """Seed all generators of the process, including those of its devices."""
    seed_generators(torch.manual_seed, 1, *key)
