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


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError, with close names, where `value` is not one of `choices`."""
    known = sorted(choices)
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}{hint}")


def check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError where `owner` has no option of one of these names."""
    known = sorted(known)
    if unknown := sorted(set(options).difference(known)):
        raise ValueError(f"{owner} has no option {', '.join(unknown)}; choose from {', '.join(known)}.")
