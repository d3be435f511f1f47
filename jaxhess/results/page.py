"""One self-contained HTML page for every report: sections of paragraphs, tables and embedded figures."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from jaxhess.files.run_folder import dotted


class Link(NamedTuple):
    """A table's cell that links to another page."""

    text: str
    address: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under a heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, and how to read it."""

    name: str
    png: bytes
    caption: str = ""

    @property
    def base64(self) -> str:
        """The image as text, as a page embeds it."""
        return base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what follows it, in order; a string is a paragraph."""

    title: str
    parts: Sequence[str | Table | Picture]


def facts(values: Mapping[str, Any], title: str = "") -> Table:
    """A table of names and values; those of nested dictionaries are named with dots, unknown ones left out."""
    return Table(("name", "value"), list(_rows(values)), title)


def page(title: str, sections: Iterable[Section], notes: Iterable[str] = (), warnings: Iterable[str] = ()) -> str:
    """The HTML of a page: title, notes, warnings, sections. It needs no other file, and all text is escaped.

    Examples:
        >>> html = page("Two < three", [Section("Numbers", [Table(("n", "n²"), [("2", "4"), ("3", "9")])])])
        >>> "<title>Two &lt; three</title>" in html, "<td>9</td>" in html
        (True, True)
    """
    return _template().render(title=title, sections=sections, notes=notes, warnings=warnings)


def _rows(values: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Names and values, without unknown ones; dictionaries in a list are numbered."""
    for name, value in dotted(values):
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield from _rows({f"{name}.{number}": item for number, item in enumerate(value)})
        elif value not in (None, []):
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("jaxhess.results")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "page.html"
    )
