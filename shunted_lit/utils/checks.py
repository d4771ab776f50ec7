"""Checks of arguments: one wording for the errors that users see."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin


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


def check_lengths(unit: str, **values: Sequence[Any]) -> None:
    """Raise ValueError unless all sequences have the same length, one entry per `unit`."""
    counts = [len(value) for value in values.values()]
    if len(set(counts)) > 1:
        raise ValueError(f"{', '.join(values)} must have one entry per {unit}, got {counts} entries.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError, with close names, where `value` is not one of `choices`."""
    known = sorted(choices)
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}{hint}")


def check_keywords(what: str, keywords: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise ValueError unless `function` accepts each keyword, with a value of the annotated type.

    Args:
        what: name of the thing that takes the keywords, for messages.
        keywords: keywords and values, such as those of a YAML file.
        function: function or class whose signature counts.
    """
    parameters = inspect.signature(function).parameters
    for name, value in keywords.items():
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(parameters))}."
            raise ValueError(f"{what} has no keyword {name!r}; {hint}")
        kind = parameters[name].annotation
        if not is_of_type(value, kind):
            raise ValueError(f"`{name}` of {what} must be {describe_type(kind)}, got {value!r}.")


def is_of_type(value: Any, kind: Any) -> bool:
    """Return whether a value fits an annotation made of plain types, unions, sequences and callables."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(is_of_type(value, option) for option in arguments)
    if origin is Sequence:
        return isinstance(value, (list, tuple)) and all(is_of_type(item, arguments[0]) for item in value)
    if origin is Callable:
        return callable(value)
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    return origin in (Any, inspect.Parameter.empty) or isinstance(value, origin)


def describe_type(kind: Any) -> str:
    """Return an annotation as users write it."""
    return inspect.formatannotation(kind).replace("collections.abc.", "")


def check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError where `owner` has no option of one of these names."""
    known = sorted(known)
    if unknown := sorted(set(options).difference(known)):
        raise ValueError(f"{owner} has no option {', '.join(unknown)}; choose from {', '.join(known)}.")
