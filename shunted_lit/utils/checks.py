"""Checks of arguments: one wording for the errors that users see."""

import difflib
from collections.abc import Iterable
from typing import Any


def check_minimum(minimum: float, **values: Any) -> None:
    """Raise ValueError for the first value that is below `minimum`; None passes."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def check_positive(**values: Any) -> None:
    """Raise ValueError for the first value that is not above 0; None passes."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")


def check_fraction(**values: Any) -> None:
    """Raise ValueError for the first value that is not between 0 and 1; None passes."""
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")


def check_range(**values: tuple[float, float]) -> None:
    """Raise ValueError for the first pair that is not a range: two numbers above 0, the first not the greater."""
    for name, (low, high) in values.items():
        if not 0 < low <= high:
            raise ValueError(f"`{name}` must be two numbers above 0 in ascending order, got {low} and {high}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError, with close names, where `value` is not one of `choices`."""
    known = sorted(choices)
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}{hint}")
