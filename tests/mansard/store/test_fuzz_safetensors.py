"""Five hundred cases of `make fuzz`, and large hostile headers: clear refusals, no crash, bounded memory."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """fuzz_safetensors.py, which is a program and in no package."""
    spec = importlib.util.spec_from_file_location("fuzz_safetensors", ROOT / "tests/benchmarks/fuzz_safetensors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_safetensors"] = module
    spec.loader.exec_module(module)
    return module


def test_files_broken_on_purpose_are_read_as_the_reference_reads_them_or_refused_in_one_line(fuzz: ModuleType) -> None:
    found = fuzz.campaign(500)
    assert found.crashes == [] and found.disagreements == []
    assert found.refused > 250 and found.accepted > 25


def test_a_reader_that_crashes_or_lets_something_through_is_noticed(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Path) -> object:
        if len(path.read_bytes()) < 8:
            raise KeyError(path)
        return "", ()

    found = fuzz.Found()
    monkeypatch.setattr(fuzz, "parse_safetensors_header", careless)
    for number in range(100):
        fuzz.try_case(number, tmp_path / "case", found)
    assert found.crashes and found.disagreements


def test_a_large_hostile_header_takes_little_more_memory_than_its_bytes(fuzz: ModuleType) -> None:
    grown = fuzz.largest_growth(8 << 20)
    assert grown["tensors"] < 15 and grown["metadata"] < 25, grown  # of which the reader takes 10 MB at most
    assert all(ratio < 5 for kind, ratio in grown.items() if kind not in ("tensors", "metadata")), grown


def test_the_case_whose_refusal_was_five_thousand_characters_long_is_one_line(fuzz: ModuleType, tmp_path: Path) -> None:
    found = fuzz.Found()
    fuzz.try_case(2607, tmp_path / "case", found)
    assert (found.refused, found.crashes) == (1, [])
