"""What engines may take of a GPU is stated in GiB; nvidia-smi is a program beside us that says what the card has."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mansard.errors import BadInput, StageFailed
from mansard.serving.engine.card_memory import check_card, engine_memory, engines_at_most
from mansard.site import Site, load_site

ROOT = Path(__file__).parents[4]
GPU_SITE = (ROOT / "configs/site/gpu.yaml").read_text()
H200 = "{}, GPU-{}2f1, 143771, 606, {}"

ShowCards = Callable[..., None]


@pytest.fixture
def show_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShowCards:
    """show_cards(LINES...): nvidia-smi, first on PATH, prints them."""

    def show(*lines: str, code: int = 0) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        text = "\n".join(lines)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return show


def site_with(tmp_path: Path, old: str = "", new: str = "") -> Site:
    assert old in GPU_SITE
    path = tmp_path / "gpu.yaml"
    path.write_text(GPU_SITE.replace(old, new, 1) if old else GPU_SITE)
    return load_site(path)


def test_gib_become_the_share_of_the_card_that_programs_can_have(tmp_path: Path, show_cards: ShowCards) -> None:
    show_cards(H200.format(0, "a", 120000))
    (argument,) = engine_memory(site_with(tmp_path, "gpu_memory_gib: 8", "gpu_memory_gib: 30"), 1)
    share = float(argument.removeprefix("--gpu-memory-utilization="))
    assert share * 139.81 == pytest.approx(28.5, abs=0.02)  # the rest are CUDA context and graphs


def test_a_card_with_less_free_than_asked_is_one_line_with_both_numbers(tmp_path: Path, show_cards: ShowCards) -> None:
    show_cards(H200.format(0, "a", 7168))
    with pytest.raises(StageFailed, match=r"may take 8 GiB, card 0 has 7.0 GiB free of 139.8; end what") as refused:
        engine_memory(site_with(tmp_path), 1)
    assert "\n" not in str(refused.value)


def test_engines_that_do_not_fit_a_card_together_are_refused(tmp_path: Path, show_cards: ShowCards) -> None:
    show_cards(H200.format(0, "a", 143000))
    fits = site_with(tmp_path, "gpu_memory_gib: 8", "gpu_memory_gib: 34")
    assert engines_at_most(fits) == 4
    check_card(fits)
    with pytest.raises(BadInput, match=r"4 engines \(stable and rollback_window 2, one candidate\) of 42 GiB are 168 "
                       r"GiB, card 0 has 139.8; lower it to 34, or rollback_window"):  # fmt: skip
        check_card(site_with(tmp_path, "gpu_memory_gib: 8", "gpu_memory_gib: 42"))


def test_what_is_advised_for_a_small_card_is_not_refused_in_its_turn(tmp_path: Path, show_cards: ShowCards) -> None:
    show_cards("0, GPU-a, 8192, 0, 8000")
    with pytest.raises(BadInput, match=r"card 0 has 8.0; lower rollback_window, or take a larger card: an engine"):
        check_card(site_with(tmp_path))


def test_the_card_is_the_one_that_engines_see(
    tmp_path: Path, show_cards: ShowCards, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards(H200.format(0, "a", 1024), H200.format(1, "b", 140000))
    for visible in ("1", "GPU-b2f1", "1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert engine_memory(site_with(tmp_path), 1)
    with pytest.raises(StageFailed, match=r"card 0 has 1\.0 GiB free"):
        engine_memory(site_with(tmp_path), 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BadInput, match="nvidia-smi shows no card"):
        engine_memory(site_with(tmp_path), 1)


def test_no_nvidia_smi_and_one_that_fails_are_one_line(
    tmp_path: Path, show_cards: ShowCards, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cards("NVIDIA-SMI has failed", code=9)
    with pytest.raises(BadInput, match=r"nvidia-smi does not say what the card has \(.*exit status 9"):
        check_card(site_with(tmp_path))
    show_cards("0, GPU-a, [N/A], [N/A], [N/A]")
    with pytest.raises(BadInput, match="no total in"):
        check_card(site_with(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=r"\(No such file or directory\); install NVIDIA's driver, or leave the key out"):
        check_card(site_with(tmp_path))


def test_a_site_that_states_no_memory_asks_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_with(tmp_path, "  gpu_memory_gib: 8 ", "  kv_cache_gib: 1 ")
    monkeypatch.setenv("PATH", str(tmp_path))
    check_card(site)
    assert engine_memory(site, 1) == []


@pytest.mark.parametrize("arguments", ['[--gpu-memory-utilization, "0.3"]', "[--gpu_memory_utilization=0.3]"])
def test_a_fraction_of_the_card_is_refused_with_the_new_key(tmp_path: Path, arguments: str) -> None:
    with pytest.raises(BadInput, match=r"engine.arguments: --gpu.* state engine.gpu_memory_gib, the GiB that"):
        site_with(tmp_path, "arguments: []", f"arguments: {arguments}")


def test_too_little_for_any_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"engine.gpu_memory_gib: 2 is not a number from 3 up"):
        site_with(tmp_path, "gpu_memory_gib: 8", "gpu_memory_gib: 2")


def test_up_refuses_a_card_that_is_too_small_with_exit_code_2(tmp_path: Path, show_cards: ShowCards) -> None:
    show_cards("0, GPU-a, 24564, 400, 24000")
    site = site_with(tmp_path, "home: ../../.mansard ", f"home: {tmp_path / 'home'} ")
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up", "--site", str(site.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"4 engines .* of 8 GiB are 32 GiB, card 0 has 23.6; lower it to 5", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()


def test_status_says_that_the_engines_do_not_fit_the_card(
    tmp_path: Path, show_cards: ShowCards
) -> None:
    def status() -> list[str]:
        command = [sys.executable, "-m", "flows.cli", "status", "--site", str(site.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith("warning: ")]

    site = site_with(tmp_path, "home: ../../.mansard ", f"home: {tmp_path / 'home'} ")
    show_cards("0, GPU-a, 24564, 400, 24000")
    (line,) = status()
    assert "4 engines" in line and "are 32 GiB, card 0 has 23.6; lower it to 5" in line
    show_cards(H200.format(0, "a", 143000))
    assert status() == []
    show_cards("NVIDIA-SMI has failed", code=9)
    assert status() == []
