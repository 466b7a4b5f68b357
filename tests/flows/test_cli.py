"""Bad input through the command: one line on standard error, the documented exit code, nothing lost."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from mansard.site import Site
from mansard.store.store import Store

ITEM = '{"id": "1", "file": "a.py", "text": "some text"}\n'
LINE = '{"text": "some text", "file": "a.py"}\n'


def no_pickle(site: Site) -> None:
    base = site.data / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"x")


def no_code(site: Site) -> None:
    base = site.data / "base"
    base.mkdir()
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "m.M"}}')
    (base / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")


def misspelt(site: Site) -> None:
    edit(site, "quantize:", "quantise:")


def unknown_source(site: Site) -> None:
    edit(site, "source: docstrings", "source: poems")


def no_data(site: Site) -> None:
    (site.data / "corpus/docstrings.train.jsonl").unlink()


def empty_data(site: Site) -> None:
    (site.data / "corpus/docstrings.train.jsonl").write_text("")


def not_utf8(site: Site) -> None:
    (site.data / "corpus/docstrings.train.jsonl").write_bytes(LINE.encode() + b"\xff\xfe\n")


def no_items(site: Site) -> None:
    (site.data / "corpus/code-bits.jsonl").write_text("")


def doubled_items(site: Site) -> None:
    path = site.data / "corpus/code-bits.jsonl"
    path.write_text(ITEM + ITEM.replace('"id": "1"', '"id": "2"'))


def edit(site: Site, old: str, new: str) -> None:
    spec = site.path.parent.parent / "adopt/demo.yaml"
    assert old in spec.read_text()
    spec.write_text(spec.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (misspelt, "unknown key 'quantise'; did you mean 'quantize'?"),
        (unknown_source, "quantize.source 'poems' is not one of data.sources"),
        (no_data, "docstrings.train.jsonl"),
        (empty_data, "docstrings.train.jsonl is empty"),
        (not_utf8, "is not UTF-8"),
        (no_items, "code-bits.jsonl"),
        (doubled_items, "code-bits.jsonl:2: the same item as on line 1"),
        (lambda site: None, "base"),
        (no_pickle, "pytorch_model.bin"),
        (no_code, "auto_map"),
    ],
    ids=["misspelt", "source", "no-data", "empty", "utf8", "no-items", "doubled", "no-base", "pickle", "auto-map"],
)
def test_bad_input_of_adopt_is_one_line_and_exit_2(
    site: Site, capsys: pytest.CaptureFixture[str], harm: Callable[[Site], None], words: str
) -> None:
    harm(site)
    spec = site.path.parent.parent / "adopt/demo.yaml"
    assert main(["adopt", str(spec), "--site", str(site.path)]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told
    assert told.startswith("mansard adopt: ")
    assert "\n" not in told
    assert not site.journal.exists() or not Store(site.store).snapshots()


def test_a_flipped_bit_is_named_and_is_exit_6(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.txt").write_text("some content")
    assert main(["snapshot", str(folder), "--site", str(site.path)]) == 0
    taken = capsys.readouterr().out.split()[0]
    assert main(["restore", taken[:8], str(tmp_path / "back"), "--site", str(site.path)]) == 0
    assert (tmp_path / "back/a.txt").read_text() == "some content"
    assert main(["verify", "--site", str(site.path)]) == 0
    stored = next(p for p in (site.store / "objects").rglob("*") if p.is_file())
    stored.chmod(0o644)
    stored.write_text("some kontent")
    capsys.readouterr()
    assert main(["verify", taken, "--site", str(site.path)]) == 6
    assert "a.txt" in capsys.readouterr().err


def test_pin_and_collect_by_hand(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--site", str(site.path), "--json"]

    def told(*words: str) -> dict[str, Any]:
        assert main([*words, *where]) == 0
        facts: dict[str, Any] = json.loads(capsys.readouterr().out)
        return facts

    ids = []
    for name in ("kept", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name * 1000)
        ids.append(told("snapshot", str(tmp_path / name))["snapshot"])
    told("pin", ids[0][:12], "--reason", "for the paper")
    assert told("pin")["pins"] == {ids[0]: "for the paper"}
    assert told("collect")["snapshots"] == []  # both were taken just now
    for path in site.store.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
    would = told("collect", "--dry-run")
    assert (would["snapshots"], would["objects"]) == ([ids[1]], 1)
    done = told("collect")
    assert (done["snapshots"], done["objects"], done["kept"]["pins"]) == ([ids[1]], 1, 1)
    assert done["freed_bytes"] >= 4000
    assert Store(site.store).snapshots() == [ids[0]]
    told("pin", ids[0][:12], "--remove")
    assert main(["pin", "abc", *where]) == 2
    assert main(["collect", "--grace-hours", "-1", *where]) == 2


def test_a_full_disk_is_one_line_and_exit_1_and_the_same_command_then_goes_on(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(os.urandom(1_500_000))
    site.store.mkdir(parents=True)
    disk = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(site.store)]
    if subprocess.run(disk, capture_output=True).returncode != 0:
        pytest.skip("left out: a small disk cannot be mounted here")
    try:
        (site.store / "ballast").write_bytes(bytes(1_000_000))
        command = ["snapshot", str(tmp_path / "tree"), "--site", str(site.path)]
        assert main(command) == 1
        told = capsys.readouterr().err.strip()
        assert told.startswith("mansard snapshot: ")
        assert "the disk is full" in told and "\n" not in told
        assert not any(p.is_file() for p in (site.store / "objects").rglob("*"))
        (site.store / "ballast").unlink()
        assert main(command) == 0
        assert main(["verify", "--site", str(site.path)]) == 0
    finally:
        subprocess.run(["umount", str(site.store)], check=True)


def test_on_call_verbs_on_a_site_where_nothing_happened(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--site", str(site.path)]
    assert main(["status", *where]) == 0
    assert main(["history", *where]) == 0
    assert main(["rollback", "--as", "grace", *where]) == 7
    assert main(["why", "1", *where]) == 2
    assert main(["review", "1", *where]) == 2
    assert main(["approve", "1", "--as", "grace", "--reason", "x", *where]) == 2
    assert main(["rollback", "--model", "other", *where]) == 2
    assert main(["status", "--site", "nowhere.yaml"]) == 2
