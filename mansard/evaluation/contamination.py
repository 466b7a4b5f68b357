"""Training text that shares 13-grams of words with suite items: such an item tells less than it seems to.

Words are runs of letters, digits and underscores, in lower case (Brown et al. 2020, appendix C, have 13-grams too). One
pass over the training text with rolling sums over whole arrays: some 5 MB of text a second. A shared 13-gram is a hint
and no proof: licences and set phrases recur, and a text copied with every word changed a little is not found. Items of
built-in tasks are not in the store and so not looked at.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mansard.errors import BadInput
from mansard.evaluation.suites import Item

NGRAM_WORDS = 13
ITEMS_LISTED = 50
_WORD = re.compile(r"\w+")
_UNKNOWN = 0
"""The number of every word that no item holds."""

Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Shared:
    """An item's 13-grams that training text holds too. `fraction` is of all its 13-grams."""

    item: str
    cluster: str
    fraction: float
    sources: tuple[str, ...]
    passage: str


@dataclass(frozen=True, slots=True)
class Found:
    """What one suite shares; `shared` the greatest fraction first. `num_short` items have no 13-gram to look for."""

    num_items: int
    num_short: int
    shared: tuple[Shared, ...]

    @property
    def shared_fraction(self) -> float:
        return len(self.shared) / self.num_items if self.num_items else 0.0


class Index:
    """The 13-grams of all suites' items. Training text is then put through `seen_in`."""

    def __init__(self, suites: Mapping[str, Sequence[Item]]) -> None:
        self._suites = suites
        self._numbers: dict[str, int] = {}
        drawn = np.random.default_rng(0).integers(1, 1 << 63, NGRAM_WORDS, dtype=np.uint64)
        self._factors = drawn * np.uint64(2) + np.uint64(1)  # odd: no bit is lost
        keys = [self._keys(self._learn(text_of(item))) for items in suites.values() for item in items]
        self._wanted: Keys = np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.uint64)

    def seen_in(self, texts: Iterator[str]) -> set[int]:
        """Keys of the items' 13-grams that these texts hold. None crosses from one text to the next."""
        seen: set[int] = set()
        for text in texts:
            keys = self._keys([self._numbers.get(w, _UNKNOWN) for w in words_of(text)])
            if len(keys) and len(self._wanted):
                place = np.minimum(np.searchsorted(self._wanted, keys), len(self._wanted) - 1)
                seen.update(keys[self._wanted[place] == keys].tolist())
        return seen

    def found(self, seen: Mapping[str, set[int]]) -> dict[str, Found]:
        """What each suite shares with each source, from `seen_in` by source."""
        found = {}
        for name, items in self._suites.items():
            shared = sorted(self._shared(items, seen), key=lambda s: (-s.fraction, s.item))
            num_short = sum(len(words_of(text_of(item))) < NGRAM_WORDS for item in items)
            found[name] = Found(len(items), num_short, tuple(shared))
        return found

    def _shared(self, items: Sequence[Item], seen: Mapping[str, set[int]]) -> Iterator[Shared]:
        for item in items:
            words = words_of(text_of(item))
            keys = self._keys([self._numbers[w] for w in words]).tolist()
            hits = [i for i, key in enumerate(keys) if any(key in found for found in seen.values())]
            if hits:
                sources = tuple(name for name, found in seen.items() if any(keys[i] in found for i in hits))
                passage = " ".join(words[hits[0] : hits[0] + NGRAM_WORDS])
                yield Shared(item["id"], item["file"], round(len(hits) / len(keys), 4), sources, passage)

    def _learn(self, text: str) -> list[int]:
        return [self._numbers.setdefault(w, len(self._numbers) + 1) for w in words_of(text)]

    def _keys(self, numbers: Sequence[int]) -> Keys:
        """One 64-bit key for each run of 13 words that are all known; two different runs share one by mistake with a
        probability near 2**-64."""
        if len(numbers) < NGRAM_WORDS:
            return np.zeros(0, np.uint64)
        array = np.asarray(numbers, dtype=np.uint64)
        mixed = (array * np.uint64(0x9E3779B97F4A7C15)) ^ (array * np.uint64(0xC2B2AE3D27D4EB4F) >> np.uint64(29))
        last = len(array) - NGRAM_WORDS + 1
        keys = np.zeros(last, np.uint64)
        for offset in range(NGRAM_WORDS):
            keys += mixed[offset : offset + last] * self._factors[offset]
        return keys


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def text_of(item: Item) -> str:
    """The item as a model reads it, with its right answer."""
    return str(item["text"]) if "text" in item else f"{item['context']} {item['choices'][item['answer']]}"


def texts_of(lines: Iterable[bytes]) -> Iterator[str]:
    """The texts of a training file's lines."""
    for line in lines:
        if line.strip():
            yield str(json.loads(line)["text"])


def check_shared(found: Mapping[str, Any], max_fraction: float) -> None:
    """BadInput for the first suite of contamination.json with more shared items than `max_fraction` of all."""
    for name, suite in found["suites"].items():
        if suite["shared_fraction"] > max_fraction:
            items = ", ".join(i["item"] for i in suite["listed"][:3])
            raise BadInput(
                f"suite {name}: {suite['num_shared']} of {suite['num_items']} items share {NGRAM_WORDS} words in a row "
                f"with training text (most: {items}), gate.max_shared_fraction allows {max_fraction:g}; take that text "
                "out of the training files, or take other items"
            )


def as_json(found: Mapping[str, Found]) -> dict[str, Any]:
    """contamination.json; the most shared items of each suite are listed, all are counted."""
    return {
        "format": 1,
        "ngram_words": NGRAM_WORDS,
        "suites": {
            name: {
                "num_items": f.num_items,
                "num_short": f.num_short,
                "num_shared": len(f.shared),
                "shared_fraction": round(f.shared_fraction, 6),
                "listed": [{**asdict(s), "sources": list(s.sources)} for s in f.shared[:ITEMS_LISTED]],
            }
            for name, f in found.items()
        },
    }
