"""Values that the ranks (processes) of a distributed run exchange in addition to gradients."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 outside a distributed run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def loss_denominator(count: Tensor) -> Tensor:
    """Return what a rank divides its summed loss by. All ranks must call it.

    Gradients are averaged over ranks. Only with this denominator is the average the gradient of a single process that
    sees all images.

    Args:
        count: Number of terms in this rank's sum, such as its labelled pixels; a scalar.

    Returns:
        The number of terms on all ranks, at least 1, divided by the world size; a scalar.
    """
    if world_size() == 1:
        return count.clamp(min=1)
    total = count.detach().double()
    dist.all_reduce(total)
    return total.clamp(min=1) / world_size()


def gather_lists(values: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks, in rank order. Their lengths may differ."""
    per_rank: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(per_rank, values)
    return [value for rank_values in per_rank for value in rank_values]


def check_equal_on_all_ranks(values: Mapping[str, Any]) -> None:
    """Raise ValueError, on all ranks, where a named value differs between them: they would wait for each other."""
    if world_size() == 1:
        return
    per_rank = gather_lists([values])
    for name, first in per_rank[0].items():
        for rank, other in enumerate(per_rank):
            if other[name] != first:
                raise ValueError(
                    f"{name} must be the same on all ranks, but rank 0 has {first} and rank {rank} has {other[name]}."
                )
