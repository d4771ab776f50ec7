"""What processes that train together tell each other, besides their gradients."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of the processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def loss_denominator(count: Tensor) -> Tensor:
    """What a process divides its summed loss by, from its count, such as that of its labelled pixels; all have to ask.

    Gradients are averaged over processes: only over the count of all, at least 1, is the loss that of a single process.
    """
    if world_size() == 1:
        return count.clamp(min=1)
    total = count.detach().double()
    dist.all_reduce(total)
    return total.clamp(min=1) / world_size()


def gather_lists(values: list[Any]) -> list[Any]:
    """Those of all processes, in their order; any number of each."""
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def check_equal_on_all_ranks(facts: Mapping[str, Any]) -> None:
    """Raises ValueError, in all processes, where they do not have the same; else they would wait for each other."""
    if world_size() == 1:
        return
    of_all = gather_lists([facts])
    for name, first in of_all[0].items():
        for rank, theirs in enumerate(of_all):
            if theirs[name] != first:
                raise ValueError(f"{name}: {first} in rank 0, but {theirs[name]} in rank {rank}; all need the same")
