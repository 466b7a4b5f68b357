"""Pages of an installed HTML help (LibreOffice's Debian packages) as training text, held-out text and suite items.

A page is wholly held out or wholly training text, the same way in every language, since languages translate each other.
A paragraph stands in one page of a language only, and training text has no 13 words in a row of a held-out page, which
is what the gate looks for. Same files, same bytes. Nothing of the text is committed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

from mansard.errors import BadInput

HELD_OUT_EVERY = 8
"""Of 2,560 pages some 320 are held out: more than the 100 files that a guard on means should have."""
ITEM_CHARACTERS = 700
MIN_PAGE_CHARACTERS = 300
LONG_PARAGRAPH_CHARACTERS = 40
"""Shorter ones are headings that every page has; they may recur."""
NGRAM_WORDS = 13

Pages = dict[str, list[str]]
"""Page name -> its paragraphs."""

_BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "li", "td", "th", "tr", "table", "div", "br"})
_HIDDEN = frozenset({"script", "style", "noscript", "button"})
_BEGIN, _ENDS = "DisplayArea", frozenset({"SearchFrame", "DonationFrame", "DEBUG"})


class _Paragraphs(HTMLParser):
    """The paragraphs of a page's display area."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._is_inside = False
        self._hidden = 0
        self._is_code = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id")
        if name == _BEGIN:
            self._is_inside = True
        elif name in _ENDS:
            self._flush()
            self._is_inside = False
        self._hidden += tag in _HIDDEN
        if tag in _BLOCKS:
            self._flush()
        self._is_code = self._is_code or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN
        if tag in _BLOCKS:
            self._flush()
        self._is_code = self._is_code and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._is_inside and not self._hidden:
            self._text.append(data)

    def _flush(self) -> None:
        whole = "".join(self._text)
        lines = [line.rstrip() for line in whole.splitlines()] if self._is_code else [" ".join(whole.split())]
        text = "\n".join(line for line in lines if line.strip())
        if text:
            self.paragraphs.append(text)
        self._text = []


def read_pages(folder: Path) -> Pages:
    """Every page below `folder`, by its path there; BadInput where there is none."""
    pages: Pages = {}
    for file in sorted(folder.rglob("*.html")):
        reader = _Paragraphs()
        reader.feed(file.read_text(encoding="utf-8"))
        reader.close()
        if reader.paragraphs:
            pages[file.relative_to(folder).as_posix()] = reader.paragraphs
    if not pages:
        raise BadInput(f"{folder}: no help pages (*.html); install or unpack the Debian package of the help")
    return pages


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_EVERY == 0


def split_pages(pages: Pages) -> tuple[dict[str, str], dict[str, str]]:
    """(training, held-out) text by page: no paragraph twice, no long run of words in both."""
    occurring: set[str] = set()
    held_out = {n: _first_time(p, occurring) for n, p in pages.items() if is_held_out(n)}
    runs = {run for paragraphs in held_out.values() for run in word_runs("\n".join(paragraphs))}
    train = {}
    for name, paragraphs in pages.items():
        if not is_held_out(name):
            new = _first_time(paragraphs, occurring)
            train[name] = _without_runs(new, runs)
    return _long_enough(train), _long_enough(held_out)


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Every run of 13 words, as the gate's search for contamination counts words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


def files_of(language: str, pages: Pages) -> dict[str, bytes]:
    """LANGUAGE.train.jsonl, LANGUAGE.held-out.jsonl and LANGUAGE-bits.jsonl (an item a held-out page)."""
    train, held_out = split_pages(pages)
    items = [
        {"id": f"{language}:{name}", "file": name, "text": text}
        for name, text in sorted((n, beginning(t)) for n, t in held_out.items())
    ]
    return {
        f"{language}.train.jsonl": _lines({"text": t, "file": n} for n, t in _shuffled(train)),
        f"{language}.held-out.jsonl": _lines({"text": t, "file": n} for n, t in _shuffled(held_out)),
        f"{language}-bits.jsonl": _lines(items),
    }


def beginning(text: str, characters: int = ITEM_CHARACTERS) -> str:
    """The text up to the end of the last line, or else word, that `characters` hold whole."""
    if len(text) <= characters:
        return text
    head = text[:characters]
    return head[: max(head.rfind("\n"), head.rfind(" ", 0, characters) if head.rfind("\n") < characters // 2 else 0)]


def _first_time(paragraphs: Sequence[str], occurring: set[str]) -> list[str]:
    """The paragraphs without the long ones that stood in an earlier page; those that are new are remembered."""
    new = []
    for paragraph in paragraphs:
        if len(paragraph) < LONG_PARAGRAPH_CHARACTERS:
            new.append(paragraph)
        elif paragraph not in occurring:
            occurring.add(paragraph)
            new.append(paragraph)
    return new


def _without_runs(paragraphs: Sequence[str], runs: set[tuple[str, ...]]) -> list[str]:
    """The paragraphs without those that complete a run of a held-out page, also across the ends of paragraphs."""
    clean: list[str] = []
    for paragraph in paragraphs:
        tail = " ".join(" ".join(clean[-NGRAM_WORDS:]).split()[-4 * NGRAM_WORDS :])
        if not word_runs(f"{tail}\n{paragraph}") & runs:
            clean.append(paragraph)
    return clean


def _long_enough(pages: Mapping[str, Sequence[str]]) -> dict[str, str]:
    texts = {name: "\n".join(paragraphs) for name, paragraphs in pages.items()}
    return {name: text for name, text in texts.items() if len(text) >= MIN_PAGE_CHARACTERS}


def _shuffled(pages: Mapping[str, str]) -> list[tuple[str, str]]:
    """In an order that has nothing to do with subjects, the same each time."""
    return sorted(pages.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _lines(rows: Iterable[Mapping[str, str]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
