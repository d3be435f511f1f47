"""JSON that others wrote: read strictly, and its values compared with a table of what they must be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxhess.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value must be.

    Attributes:
        says: Completes "it must be ...".
        fits: Whether a value is of this kind.
    """

    says: str
    fits: Callable[[Any], bool]


def integer(low: int, high: int = 2**31 - 1) -> Kind:
    """An integer within bounds; true and 2.0 are none."""
    says = f"a{' positive' if low == 1 else 'n'} integer" + (f" of at least {low}" if low > 1 else "")
    return Kind(f"{says} up to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """A finite number within bounds; an integer is one, true is none."""
    return Kind(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def optional(kind: Kind) -> Kind:
    """This kind, or null."""
    return Kind(f"{kind.says} or null", lambda value: value is None or kind.fits(value))


def only(*values: Any) -> Kind:
    """One of these values."""
    return Kind(" or ".join(json.dumps(value) for value in values), lambda value: value in values)


FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
ANYTHING = Kind("anything", lambda value: True)
NUMBERS = Kind(
    "a list of positive numbers",
    lambda v: isinstance(v, list) and all(type(x) in (int, float) and 0 < x <= 1e30 for x in v),
)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: There is no such file (a device or a pipe is none), or it cannot be read; it does not hold a JSON
            object, or one that names a key twice.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}.")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    data = parse_json(text, path)
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    return data


def parse_json(text: bytes, name: str | Path) -> Any:
    """The value of a JSON text, called `name` in errors.

    Raises:
        InputError: It is not valid JSON, nested too deeply, or an object names a key twice.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise InputError(f"{name} is nested too deeply for JSON that describes a checkpoint.") from None
    except ValueError as error:  # also of what is not UTF-8, and of an integer with thousands of digits
        raise InputError(f"{name} is not valid JSON: {one_line(error)}.") from error


def check(data: Mapping[str, Any], kinds: Mapping[str, Kind], file: str | Path) -> None:
    """Raises InputError with file, key, value and what would be right for the first value that is not of its kind."""
    for key, kind in kinds.items():
        if key in data and not kind.fits(data[key]):
            raise InputError(f"{file} has {key} {shown(data[key])}; it must be {kind.says}.")


def shown(value: Any) -> str:
    """A foreign value for a sentence: on one line, and not longer than 60 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def one_line(error: Exception, length: int = 300) -> str:
    """What another library's error says, on one line, without a full stop at its end."""
    text = " ".join(str(error).split())[:length].rstrip(" .") or type(error).__name__
    return f"it lacks {text}" if isinstance(error, KeyError) else text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"it names {shown(next(name for name in names if names.count(name) > 1))} twice")
    return data
