"""Shunted Transformer (CVPR 2022): the neck, the backbones, and their training with PyTorch Lightning."""

from shunted_lit.models import ablations  # noqa: F401 - makes their names known
from shunted_lit.models.shunted import (
    DetailSpecificFeedForward,
    ShuntedBackbone,
    ShuntedSelfAttention,
    ShuntedTransformer,
    shunted_b,
    shunted_s,
    shunted_t,
)

__version__ = "0.1.0"

__all__ = [
    "DetailSpecificFeedForward",
    "ShuntedBackbone",
    "ShuntedSelfAttention",
    "ShuntedTransformer",
    "shunted_b",
    "shunted_s",
    "shunted_t",
]
