"""Shunted Transformer (CVPR 2022): the neck, the backbones, and their training with PyTorch Lightning.

Importing this package costs next to nothing: its names are imported when they are first used, and its backbones are
registered with timm as soon as timm is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from shunted_lit.utils.imports import ImportAfter

if TYPE_CHECKING:
    from shunted_lit.models.pyramid import ShuntedPyramid
    from shunted_lit.models.shunted import (
        DetailSpecificFeedForward,
        ShuntedBackbone,
        ShuntedSelfAttention,
        ShuntedTransformer,
    )
    from shunted_lit.models.timm_registry import shunted_b, shunted_s, shunted_t

__version__ = "0.1.0"

__all__ = [
    "DetailSpecificFeedForward",
    "ShuntedBackbone",
    "ShuntedPyramid",
    "ShuntedSelfAttention",
    "ShuntedTransformer",
    "shunted_b",
    "shunted_s",
    "shunted_t",
]

ImportAfter("timm", "shunted_lit.models.timm_registry").install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"ShuntedPyramid": "pyramid"}.get(name, "timm_registry" if name.startswith("shunted_") else "shunted")
    return getattr(importlib.import_module(f"shunted_lit.models.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
