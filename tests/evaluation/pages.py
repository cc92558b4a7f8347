"""Reads a page as a test needs it: its tags and texts, and what a page that opens anywhere must not have."""

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags, texts and attributes, and checks that tags nest. `tables_outside`: tables that are in no box that
    scrolls; `elsewhere`: what would be fetched or run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables_outside, self.viewport, self.elsewhere = 0, False, []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        known = dict(attrs)
        if tag == "table":
            self.tables_outside += ("div", {"class": "wide"}) not in self.open
        self.viewport |= known.get("name") == "viewport" and "width=device-width" in known["content"]
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.elsewhere.append(tag)
        for name, value in attrs:
            far = name in ("src", "href", "srcset", "action", "data") and not (value or "").startswith("data:image/")
            if far or name.startswith("on"):
                self.elsewhere.append(f"{name}={value}")
        if tag not in VOID:
            self.open.append((tag, known))

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1][0] == "style" and re.search(r"url\(|@import", data):
            self.elsewhere.append("style")


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    return page
