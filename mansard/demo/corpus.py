"""The demo's text: two domains cut from a listed part of the standard library, split by file.

`docstrings` is what the base in service knows, `code` (docstrings removed by source position, comments kept) is the new
domain. A file is wholly held out or wholly training text in both domains, and training documents that share much text
with a held-out one are left out. Same Python version, same seed: same bytes. Nothing of it is committed.
"""

import ast
import json
import random
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mansard.demo.items import bits_items, next_line_items, shingles
from mansard.errors import BadInput, MansardError

DOMAINS = ("docstrings", "code")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LISTED_PACKAGES = _names("""
    asyncio collections concurrent ctypes curses dbm email html http importlib json logging multiprocessing re
    sqlite3 tomllib unittest urllib wsgiref xml xmlrpc zoneinfo
""")

LISTED_MODULES = _names("""
    __future__ _collections_abc _compat_pickle _compression _markupbase _py_abc _pydecimal _pyio _sitebuiltins
    _strptime _threading_local _weakrefset abc aifc argparse ast asynchat asyncore base64 bdb bisect bz2 cProfile
    calendar cgi cgitb chunk cmd code codecs codeop colorsys compileall configparser contextlib contextvars copy
    copyreg crypt csv dataclasses datetime decimal difflib dis doctest enum filecmp fileinput fnmatch fractions
    ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac imaplib imghdr imp
    inspect io ipaddress linecache locale lzma mailbox mailcap mimetypes modulefinder netrc nntplib ntpath
    nturl2path numbers opcode operator optparse os pathlib pdb pickle pickletools pipes pkgutil platform plistlib
    poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random reprlib rlcompleter runpy
    sched secrets selectors shelve shlex shutil signal site smtpd smtplib sndhdr socket socketserver sre_compile
    sre_constants sre_parse ssl stat statistics string stringprep struct subprocess sunau symtable sysconfig
    tabnanny tarfile telnetlib tempfile textwrap threading timeit token tokenize trace traceback tracemalloc tty
    types typing uu uuid warnings wave weakref webbrowser xdrlib zipapp zipfile zipimport
""")

DROPPED_IN_3_12 = frozenset({"asynchat", "asyncore", "imp", "smtpd"})
ADDED_IN_3_12 = ("_pydatetime",)
"""What datetime.py held before. (zipfile is a package since then; a listed name may be either.)"""

TABLES = frozenset({"html/entities.py", "curses/ascii.py", "stringprep.py", "_compat_pickle.py"})
"""Files that are lists of numbers and names, not text to learn from."""

TEST_FOLDERS = frozenset({"test", "tests"})

HELD_OUT_FILES = 120
"""Enough clusters for a bootstrap over files; the gate needs at least 100 (51 and 62 gave wide intervals, facts.md)."""

HELD_OUT_BYTES = {"docstrings": range(700, 8_000), "code": range(700, 40_000)}
"""A held-out file has at least one window in each domain, and the largest files stay with the training text."""

NEAR_DUPLICATE = 0.15
"""Share of the smaller document's 13-word shingles; above it two documents are near-duplicates."""

BOILERPLATE_FILES = 4
"""A shingle of at least so many documents (a licence) says nothing about two of them."""


@dataclass(frozen=True, slots=True)
class Document:
    """One source file's text in one domain."""

    file: str
    text: str


def listed_files(library: Path, version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """Paths of the listed source files, relative to the standard library of Python `version`; MansardError when one is
    missing."""
    names = [*LISTED_MODULES, *LISTED_PACKAGES]
    if version >= (3, 12):
        names = [n for n in names if n not in DROPPED_IN_3_12] + list(ADDED_IN_3_12)
    packages = [n for n in names if (library / n / "__init__.py").is_file()]
    modules = [n for n in names if n not in packages]
    if missing := [n for n in modules if not (library / f"{n}.py").is_file()]:
        raise MansardError(
            f"{library}: this Python's library lacks {', '.join(missing)}, which the demo's text is cut from; "
            f"install a complete Python (Debian: libpython{version[0]}.{version[1]}-stdlib)"
        )
    files = [f"{name}.py" for name in modules]
    for package in packages:
        for path in (library / package).rglob("*.py"):
            relative = path.relative_to(library)
            if not TEST_FOLDERS & set(relative.parts[:-1]):
                files.append(relative.as_posix())
    return sorted(set(files) - TABLES)


def read_domains(library: Path, files: Sequence[str]) -> dict[str, list[Document]]:
    """Both domains' documents, empty ones left out, in the order of `files`."""
    domains: dict[str, list[Document]] = {domain: [] for domain in DOMAINS}
    for file in files:
        with tokenize.open(library / file) as source:
            text = source.read()
        tree = ast.parse(text, file)
        for domain, part in (("docstrings", docstrings_of(tree)), ("code", code_without_docstrings(text, tree))):
            if part.strip():
                domains[domain].append(Document(file, part))
    return domains


def docstrings_of(tree: ast.Module) -> str:
    """The cleaned docstrings of module, classes and functions in source order, a blank line between."""
    holders = sorted(_docstring_holders(tree), key=lambda node: node.body[0].lineno)
    found = [ast.get_docstring(node, clean=True) for node in holders]
    return "\n\n".join(text.strip() for text in found if text and text.strip()) + "\n"


def code_without_docstrings(text: str, tree: ast.Module) -> str:
    """The source with its docstrings cut out where they stand; a body that would be empty gets `pass`."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    for node in sorted(_docstring_holders(tree), key=lambda n: n.body[0].lineno, reverse=True):
        statement = node.body[0]
        assert statement.end_lineno is not None and statement.end_col_offset is not None
        first, last = statement.lineno - 1, statement.end_lineno - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            lines[first : last + 1] = [before + b"pass" + after]
        elif before.strip() or after.strip():
            lines[first : last + 1] = [before + after.lstrip(b" ;")]
        else:
            blank_follows = last + 1 < len(lines) and not lines[last + 1].strip()
            lines[first : last + 1 + blank_follows] = []
    return b"".join(lines).decode().strip("\n") + "\n"


def _docstring_holders(tree: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """In no particular order. Expressions hold no docstrings and are not walked."""
    if (
        isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(tree, clean=False) is not None
    ):
        yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _docstring_holders(child)


def held_out_files(domains: Mapping[str, Sequence[Document]], seed: int) -> list[str]:
    """The files held out in both domains: drawn with `seed` among those of a fit size in each."""
    sizes = {domain: {d.file: len(d.text.encode()) for d in documents} for domain, documents in domains.items()}
    eligible = sorted(f for f in sizes["code"] if all(sizes[d].get(f, 0) in HELD_OUT_BYTES[d] for d in DOMAINS))
    return sorted(random.Random(seed).sample(eligible, HELD_OUT_FILES))  # noqa: S311 - a split, not a secret


def without_near_duplicates(candidates: Sequence[Document], of: Sequence[Document]) -> list[Document]:
    """`candidates` that share less than NEAR_DUPLICATE with every document of `of` and with every one kept before."""
    found = {d.file: shingles(d.text) for d in (*candidates, *of)}
    counts = Counter(shingle for mine in found.values() for shingle in mine)
    telling = {file: [s for s in mine if counts[s] < BOILERPLATE_FILES] for file, mine in found.items()}
    holders: dict[int, list[str]] = {}

    def hold(document: Document) -> None:
        for shingle in telling[document.file]:
            holders.setdefault(shingle, []).append(document.file)

    def is_new(document: Document) -> bool:
        mine = telling[document.file]
        shared = Counter(other for shingle in mine for other in holders.get(shingle, ()))
        return all(n <= NEAR_DUPLICATE * min(len(mine), len(telling[other])) for other, n in shared.items())

    for document in of:
        hold(document)
    kept = []
    for document in candidates:
        if is_new(document):
            hold(document)
            kept.append(document)
    return kept


def up_to(documents: Sequence[Document], size_bytes: int | None, seed: int) -> list[Document]:
    """Documents drawn with `seed` until they hold `size_bytes` (None: all), in file order."""
    if size_bytes is None:
        return list(documents)
    drawn = list(documents)
    random.Random(seed).shuffle(drawn)  # noqa: S311 - a sample, not a secret
    taken, total = [], 0
    for document in drawn:
        if total >= size_bytes:
            break
        taken.append(document)
        total += len(document.text.encode())
    return sorted(taken, key=lambda d: d.file)


def corpus_files(
    library: Path, seed: int, train_bytes: Mapping[str, int | None], items_per_suite: int, choice_items: int
) -> dict[str, bytes]:
    """The data tree, name -> bytes. BadInput when the held-out text holds fewer items than asked for."""
    domains = read_domains(library, listed_files(library))
    held = frozenset(held_out_files(domains, seed))
    files: dict[str, bytes] = {}
    for domain, documents in domains.items():
        held_out = [d for d in documents if d.file in held]
        train = without_near_duplicates([d for d in documents if d.file not in held], held_out)
        train = up_to(train, train_bytes[domain], seed)
        texts = [(d.file, d.text) for d in held_out]
        seen = frozenset().union(*(shingles(d.text) for d in train))
        bits = bits_items(domain, texts, seen, items_per_suite, seed)
        choice = next_line_items(domain, texts, seen, choice_items, seed)
        for name, items, wanted in (("bits", bits, items_per_suite), ("next-line", choice, choice_items)):
            if len(items) < wanted:
                raise BadInput(f"corpus: {domain} has {len(items)} {name} items held out, {wanted} were asked for")
            files[f"{domain}-{name}.jsonl"] = _jsonl(items)
        files[f"{domain}.train.jsonl"] = _jsonl({"file": d.file, "text": d.text} for d in train)
        files[f"{domain}.held-out.jsonl"] = _jsonl({"file": d.file, "text": d.text} for d in held_out)
    return files


def _jsonl(rows: Iterable[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n" for row in rows)
