"""Suite items cut from held-out documents: windows for bits per byte, and "which line really follows".

Items are spread round robin over the files, so that every file is a cluster of the gate's bootstrap. Text that the
training set also holds is passed over.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

WINDOW_BYTES = 600
CONTEXT_BYTES = 400
CHOICES = 4
SHINGLE_WORDS = 13
LINE_CHARACTERS = range(20, 100)
"""Lines that can be an answer: long enough to tell apart, short enough to be scored cheaply."""

LEAKED = 0.2
"""A window of which more than this share of shingles is in the training text is no held-out text."""

Item = dict[str, Any]


def shingles(text: str) -> frozenset[int]:
    """Hashes of every run of 13 words; only their equality counts, so the process's hash seed does not matter."""
    words = text.split()
    return frozenset(hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1))


def windows(text: str, size_bytes: int) -> Iterator[str]:
    """Consecutive windows of about `size_bytes`, cut at line ends; a rest below two thirds of it is dropped."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= size_bytes:
            yield "".join(lines)
            lines, size = [], 0
    if size >= size_bytes * 2 // 3:
        yield "".join(lines)


def bits_items(
    domain: str, documents: Sequence[tuple[str, str]], seen: frozenset[int], count: int, seed: int
) -> list[Item]:
    """Up to `count` items {"id", "file", "text"} from (file, text) pairs; `seen` are the training text's shingles."""

    def of(file: str, text: str) -> Iterator[Item]:
        numbered = list(enumerate(windows(text, WINDOW_BYTES)))
        random.Random(f"{seed}:{domain}:{file}").shuffle(numbered)  # noqa: S311 - a sample, not a secret
        for number, window in numbered:
            if not _leaks(window, seen) and len(window.encode()) <= 2 * WINDOW_BYTES:
                yield {"id": f"{domain}-bits:{file}:{number}", "file": file, "text": window}

    return _round_robin(documents, of, count)


def next_line_items(
    domain: str, documents: Sequence[tuple[str, str]], seen: frozenset[int], count: int, seed: int
) -> list[Item]:
    """Up to `count` items {"id", "file", "context", "choices", "answer"}; wrong choices are lines of the same file."""

    def of(file: str, text: str) -> Iterator[Item]:
        draw = random.Random(f"{seed}:{domain}:{file}")  # noqa: S311 - a sample, not a secret
        lines = text.splitlines(keepends=True)
        usable = sorted({line for line in lines if len(line.strip()) in LINE_CHARACTERS})
        starts = [i for i, line in enumerate(lines) if line in usable and _context_before(lines, i)]
        draw.shuffle(starts)
        for start in starts:
            context = _context_before(lines, start)
            others = [o for o in usable if o.strip() != lines[start].strip() and o not in context]
            if len({o.strip() for o in others}) >= CHOICES - 1 and not _leaks(context + lines[start], seen):
                choices = _distinct(draw, others)
                answer = draw.randrange(CHOICES)
                choices.insert(answer, lines[start])
                yield {
                    "id": f"{domain}-next-line:{file}:{start}",
                    "file": file,
                    "context": context,
                    "choices": choices,
                    "answer": answer,
                }

    return _round_robin(documents, of, count)


def _context_before(lines: Sequence[str], index: int) -> str:
    """The lines before `index` that together hold about CONTEXT_BYTES; empty when there are too few."""
    context, start = "", index
    while start > 0 and len(context.encode()) < CONTEXT_BYTES:
        start -= 1
        context = lines[start] + context
    return context if CONTEXT_BYTES <= len(context.encode()) <= 2 * CONTEXT_BYTES else ""


def _distinct(draw: random.Random, lines: Sequence[str]) -> list[str]:
    """CHOICES - 1 lines that differ in more than indentation."""
    by_text = {line.strip(): line for line in lines}
    return [by_text[text] for text in draw.sample(sorted(by_text), CHOICES - 1)]


def _leaks(text: str, seen: frozenset[int]) -> bool:
    mine = shingles(text)
    return len(mine & seen) > LEAKED * len(mine)


def _round_robin(
    documents: Sequence[tuple[str, str]], of: Callable[[str, str], Iterator[Item]], count: int
) -> list[Item]:
    """One item of every file, then a second of every file, and so on up to `count`."""
    rounds = zip_longest(*(of(file, text) for file, text in documents))
    return list(islice((item for row in rounds for item in row if item is not None), count))
