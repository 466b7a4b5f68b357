"""The demo's text: cut where it stands, split by file, the same every time."""

import ast
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from mansard.demo.corpus import (
    LISTED_MODULES,
    LISTED_PACKAGES,
    Document,
    code_without_docstrings,
    corpus_files,
    docstrings_of,
    listed_files,
    up_to,
    without_near_duplicates,
)
from mansard.demo.items import shingles, windows
from mansard.errors import BadInput, MansardError

LIBRARY = Path(sysconfig.get_path("stdlib"))

SOURCE = '''"""Module text."""

import os


class A:
    """Class text."""


def f(x):
    """First line.

    More — with a dash.
    """

    return x  # kept


def g(): "inline"


async def h():
    "one"; return 2
'''


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return corpus_files(LIBRARY, 0, {"code": 200_000, "docstrings": None}, 200, 200)


def rows(data: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def test_code_keeps_its_shape_when_docstrings_are_cut() -> None:
    expected = "import os\n\n\nclass A:\n    pass\n\n\ndef f(x):\n    return x  # kept\n\n\n"
    expected += "def g(): pass\n\n\nasync def h():\n    return 2\n"
    assert code_without_docstrings(SOURCE, ast.parse(SOURCE)) == expected


def test_docstrings_are_joined_in_source_order() -> None:
    joined = docstrings_of(ast.parse(SOURCE))
    assert joined == "Module text.\n\nClass text.\n\nFirst line.\n\nMore — with a dash.\n\ninline\n\none\n"


def test_every_listed_file_compiles_without_its_docstrings() -> None:
    for file in listed_files(LIBRARY)[::7]:
        text = (LIBRARY / file).read_text(encoding="utf-8")
        cut = code_without_docstrings(text, ast.parse(text))
        compile(cut, file, "exec")
        assert docstrings_of(ast.parse(cut)).strip() == ""


def test_a_later_python_is_read_without_the_modules_that_it_dropped(tmp_path: Path) -> None:
    for name in {*LISTED_MODULES, *LISTED_PACKAGES, "_pydatetime"} - {"asynchat", "asyncore", "imp", "smtpd"}:
        is_package = name in LISTED_PACKAGES or name == "zipfile"  # zipfile.py became a folder in 3.12
        if is_package:
            (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py" if is_package else tmp_path / f"{name}.py").touch()
    files = listed_files(tmp_path, (3, 12))
    assert {"argparse.py", "zipfile/__init__.py", "_pydatetime.py", "asyncio/__init__.py"} < set(files)
    with pytest.raises(MansardError, match="lacks asynchat, asyncore, imp, smtpd, which"):
        listed_files(tmp_path, (3, 11))


def test_a_library_that_lacks_a_listed_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MansardError, match=r"lacks .*argparse.*install a complete Python"):
        listed_files(tmp_path)


def test_no_file_is_both_training_and_held_out(files: dict[str, bytes]) -> None:
    held = {r["file"] for domain in ("code", "docstrings") for r in rows(files[f"{domain}.held-out.jsonl"])}
    assert len(held) >= 100
    for domain in ("code", "docstrings"):
        assert not held & {r["file"] for r in rows(files[f"{domain}.train.jsonl"])}
        for suite in ("bits", "next-line"):
            assert {r["file"] for r in rows(files[f"{domain}-{suite}.jsonl"])} <= held


def test_suites_stand_on_at_least_100_files_and_distinct_ids(files: dict[str, bytes]) -> None:
    for domain in ("code", "docstrings"):
        for suite in ("bits", "next-line"):
            items = rows(files[f"{domain}-{suite}.jsonl"])
            assert len({i["file"] for i in items}) >= 100
            assert len({i["id"] for i in items}) == len(items) == 200


def test_choices_are_distinct_and_the_answer_follows_the_context(files: dict[str, bytes]) -> None:
    held_out = {r["file"]: str(r["text"]) for r in rows(files["code.held-out.jsonl"])}
    items = rows(files["code-next-line.jsonl"])
    for item in items:
        choices, answer = item["choices"], item["answer"]
        assert isinstance(choices, list) and isinstance(answer, int)
        assert len({c.strip() for c in choices}) == 4
        assert f"{item['context']}{choices[answer]}" in held_out[str(item["file"])]
    assert min(Counter(i["answer"] for i in items).values()) > 25


def test_training_text_stops_at_the_bytes_asked_for(files: dict[str, bytes]) -> None:
    sizes = [len(str(r["text"]).encode()) for r in rows(files["code.train.jsonl"])]
    assert 200_000 <= sum(sizes) < 200_000 + max(sizes)


def test_a_subset_is_the_same_every_time() -> None:
    documents = [Document(f"{i}.py", "x" * 10) for i in range(20)]
    assert up_to(documents, 50, 1) == up_to(documents, 50, 1) != up_to(documents, 50, 2)


def test_near_duplicates_of_held_out_documents_are_left_out() -> None:
    words = [f"word{i}" for i in range(400)]
    held_out = Document("a.py", " ".join(words))
    copy = Document("b.py", " ".join([*words[:300], "changed"]))
    other = Document("c.py", " ".join(reversed(words)))
    assert without_near_duplicates([copy, other], [held_out]) == [other]


def test_windows_hold_every_byte_but_a_short_rest() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    assert text.startswith("".join(windows(text, 100)))
    assert all(100 <= len(w.encode()) < 110 for w in list(windows(text, 100))[:-1])


def test_shingles_are_of_thirteen_words() -> None:
    assert len(shingles("w " * 12)) == 0
    assert len(shingles(" ".join(map(str, range(15))))) == 3


def test_more_items_than_there_are_is_refused() -> None:
    with pytest.raises(BadInput, match="items held out, 1000000 were asked for"):
        corpus_files(LIBRARY, 0, {"code": 1000, "docstrings": 1000}, 1_000_000, 10)
