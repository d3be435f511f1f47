"""JSON that is read into dataclasses: types, names and nesting are checked at once, by pydantic."""

from __future__ import annotations

import functools
import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready

T = TypeVar("T")


def read_as(kind: type[T], data: Any) -> T:
    """The data of a JSON file as this (nested) dataclass. Nothing is converted: no text to number, no number to bool.

    Raises:
        InputError: A field has another type or value, is missing, or is not known. Names the first one.
    """
    text = json.dumps(json_ready(data))
    try:
        return _adapter(kind).validate_json(text, strict=True, extra="forbid")  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise InputError(f"{where}: {first['msg'].removeprefix('Value error, ')}"[:300]) from None
    except RecursionError:
        raise InputError("it is nested too deeply") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)
