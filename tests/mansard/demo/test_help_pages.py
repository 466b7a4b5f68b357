"""Help pages become text, and no page or long run of words is both learned and judged on."""

import json
from pathlib import Path

import pytest

from mansard.demo.help_pages import beginning, files_of, is_held_out, read_pages, split_pages, word_runs
from mansard.errors import BadInput

PAGE = """<!DOCTYPE html><html><head><title>T</title><script>var x = 1;</script></head><body>
<header><p>Help of everything</p></header>
<div id="DisplayArea"><h1><a name="x"></a>{title}</h1>
<p class="paragraph">An <span class="emph">anchor</span> holds
 it &amp; more.</p><div class="note"><div class="noteicon"><img src="a.svg"></div><div><p>{note}</p></div></div>
<table><tr><td><p>one</p></td><td><p>two</p></td></tr></table>
<pre><code>Sub Main
  MsgBox 1
End Sub</code></pre></div>
<div id="SearchFrame"></div><div id="DonationFrame"><p>give</p></div><footer><div id="DEBUG"><p>debug</p></div></footer>
</body></html>"""


def test_a_page_is_its_paragraphs_without_what_every_page_has(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.html").write_text(PAGE.format(title="Anker", note="Über alles"))
    (tmp_path / "empty.html").write_text("<html><body><p>outside</p></body></html>")
    assert read_pages(tmp_path) == {
        "a/b.html": ["Anker", "An anchor holds it & more.", "Über alles", "one", "two", "Sub Main\n  MsgBox 1\nEnd Sub"]
    }
    with pytest.raises(BadInput, match=r"no help pages .*install or unpack the Debian package"):
        read_pages(tmp_path / "a/none")


def pages(count: int = 80) -> dict[str, list[str]]:
    """Every page has words of its own, a paragraph that all share, one of its neighbour, and a run over an end."""
    shared = "this paragraph stands in every page of the help and is long enough to be counted as one"
    own = [[f"page{i}word{j}" for j in range(120)] for i in range(count)]
    return {
        f"{i}.html": [
            "Title", shared, " ".join(own[i]), " ".join(own[i - 1][:40]), " ".join(own[i - 1][40:48]),
            " ".join(own[i - 1][48:56]),
        ]
        for i in range(count)
    }  # fmt: skip


def test_learned_and_held_out_pages_share_no_long_run_of_words() -> None:
    train, held_out = split_pages(pages())
    assert train and held_out and not train.keys() & held_out.keys()
    assert all(is_held_out(name) for name in held_out) and not any(is_held_out(name) for name in train)
    learned = set().union(*(word_runs(text) for text in train.values()))
    assert not learned & set().union(*(word_runs(text) for text in held_out.values()))
    assert sum("stands in every page" in text for text in [*train.values(), *held_out.values()]) == 1


def test_two_languages_hold_out_the_same_pages_and_the_files_are_the_same_each_time() -> None:
    files = files_of("german", pages())
    assert files == files_of("german", pages())
    rows = {n: [json.loads(line) for line in content.splitlines()] for n, content in files.items()}
    names = {row["file"] for row in rows["german-bits.jsonl"]}
    assert names == {row["file"] for row in rows["german.held-out.jsonl"]}
    assert not names & {row["file"] for row in rows["german.train.jsonl"]}
    assert all(len(row["text"]) <= 700 for row in rows["german-bits.jsonl"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("short", "short"), ("word " * 10, "word word word word"), ("first line\nsecond line", "first line")],
)
def test_an_item_ends_with_a_line_or_a_word(text: str, expected: str) -> None:
    assert beginning(text, 20) == expected
