"""Processes that import vLLM (a stand-in here) before there is anything to serve: used, refused, expired, killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import MansardError
from mansard.serving.process import identify, with_output_below

pytestmark = pytest.mark.slow


def prepare(place: Any) -> int:
    return int(place.client.call("POST", "/engines/prepare", {"architecture": "LlamaForCausalLM"})["pid"])


def test_the_next_engine_is_the_prepared_process_with_its_own_log_and_record(place: Any) -> None:
    place.start_host()
    prepared = prepare(place)
    assert prepare(place) == prepared  # one at a time
    engine = place.start_engine(place.artifact(voice="a"))
    assert (engine["pid"], engine["state"], engine["cores"]) == (prepared, "ready", "0")
    assert Path(engine["log"]).read_text().startswith("cores 0")
    assert Path(f"/proc/{prepared}/fd/1").readlink() == Path(engine["log"])
    assert Path(f"/proc/{prepared}/fd/0").readlink() == Path(os.devnull)
    assert os.getsid(prepared) == prepared
    (record,) = (place.site.run / "engines").glob("*.json")
    assert json.loads(record.read_text())["process"]["pid"] == prepared
    assert place.start_engine(place.artifact(voice="b"))["pid"] != prepared


def test_an_engine_of_a_prepared_process_is_adopted_by_the_next_host(place: Any) -> None:
    place.start_host()
    prepared = prepare(place)
    place.start_engine(place.artifact())
    place.end_host(signal.SIGKILL)
    place.start_host()
    assert place.start_engine(place.artifact())["pid"] == prepared


def test_a_prepared_process_that_was_killed_costs_only_time(place: Any) -> None:
    place.start_host()
    prepared = prepare(place)
    os.kill(prepared, signal.SIGKILL)
    place.wait_for("its end", lambda: identify(prepared) is None)
    engine = place.start_engine(place.artifact())
    assert engine["pid"] != prepared
    assert engine["state"] == "ready"


def test_what_a_prepared_process_cannot_start_is_tried_once_more_plainly(place: Any) -> None:
    place.start_host()
    prepare(place)
    with pytest.raises(MansardError, match=r"ValueError: the head is missing from the checkpoint.*its log: "):
        place.start_engine(place.artifact(start="die"))
    logs = [log.name for log in (place.site.logs / "engines").iterdir() if "-prepared-" not in log.name]
    assert len(logs) == 2
    assert place.status()["engines"] == []
    assert with_output_below(place.site.logs / "engines") == []


def test_a_start_that_the_card_refuses_leaves_the_prepared_process_to_the_next_engine(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi is a program beside us that says what the card has free."""

    def show_card(free_mib: int) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho 0, GPU-a, 143771, 606, {free_mib}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    show_card(1024)
    tree = json.loads(place.site.path.read_text())
    tree["engine"]["gpu_memory_gib"] = 8
    place.site.path.write_text(json.dumps(tree))
    place.start_host()
    prepared = prepare(place)
    with pytest.raises(MansardError, match=r"card 0 has 1\.0 GiB free"):
        place.start_engine(place.artifact())
    show_card(140_000)
    assert place.start_engine(place.artifact())["pid"] == prepared


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_prepared_process_ends_with_its_host(place: Any, number: signal.Signals) -> None:
    place.start_host()
    prepared = prepare(place)
    place.end_host(number)
    place.wait_for("its end", lambda: identify(prepared) is None)


def test_a_prepared_process_that_nobody_needs_is_ended(place: Any) -> None:
    place.start_host_script(Path(__file__).parent / "host_forgetful.py")
    prepared = prepare(place)
    place.wait_for("its end", lambda: identify(prepared) is None)
    assert place.start_engine(place.artifact())["state"] == "ready"
