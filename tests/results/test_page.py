"""The page that every report is written as."""

import base64
from html.parser import HTMLParser

from jaxhess.results.page import Link, Picture, Section, Table, page

HOSTILE = "</title><script>alert('1')</script> & \"co\""


class Reader(HTMLParser):
    """Raises when a tag closes another one than the last opened; collects texts by tag, and addresses."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.addresses = [], {}, []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def test_every_text_is_shown_as_it_is_and_none_becomes_markup():
    table = Table([HOSTILE], [[HOSTILE], [Link(HOSTILE, "other.html")]], HOSTILE)
    picture = Picture(HOSTILE, b"\x89PNG", HOSTILE)
    html = page(HOSTILE, [Section(HOSTILE, [HOSTILE, table, picture])], [HOSTILE], [HOSTILE])
    assert "<script" not in html
    found = Reader(html).texts
    for tag, times in {"title": 1, "h1": 1, "h2": 1, "h3": 1, "th": 1, "a": 1, "figcaption": 1, "p": 3}.items():
        assert found[tag] == [HOSTILE] * times, tag
    assert found["td"] == [HOSTILE, ""]


def test_parts_keep_their_order_and_pictures_are_embedded():
    parts = ["first", Table(["n"], [["second"]]), "third", Picture("fourth", b"bytes"), "fifth"]
    html = page("title", [Section("one", parts), Section("two", [])])
    places = [html.index(word) for word in ("one", "first", "second", "third", "fourth", "fifth", "two")]
    assert places == sorted(places)
    (source,) = Reader(html).addresses
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == b"bytes"


def test_a_table_may_be_empty():
    texts = Reader(page("title", [Section("s", [Table(["a", "b"], [])])])).texts
    assert texts["th"] == ["a", "b"]
    assert "td" not in texts
