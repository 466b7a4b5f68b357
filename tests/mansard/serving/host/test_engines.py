"""The host's engines with a stand-in for vLLM: started, shared, adopted and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mansard.errors import BadInput, MansardError
from mansard.release.journal import Journal
from mansard.serving.engine.command import EngineIdentity, command, variables
from mansard.serving.engine.log import last_words
from mansard.serving.process import identify
from mansard.specs.whole import Serve
from tests.mansard.serving.conftest import engine_statuses

pytestmark = pytest.mark.slow


def wait_for(place: Any, what: str, found: Any) -> Any:
    """conftest's `wait_for`, which a test module cannot import."""
    return place.wait_for(what, found)


def test_two_who_ask_for_one_engine_get_the_same_process(place: Any) -> None:
    place.start_host()
    first = place.start_engine(place.artifact(voice="a"))
    assert place.start_engine(place.artifact(voice="a"))["pid"] == first["pid"]
    assert (first["served_name"], first["state"], first["cores"]) == ("demo", "ready", "0")
    assert Path(first["log"]).read_text().startswith("cores 0")


def test_an_engine_that_does_not_come_up_shows_its_last_lines_and_the_host_goes_on(place: Any) -> None:
    place.start_host()
    with pytest.raises(MansardError, match=r"ValueError: the head is missing from the checkpoint.*its log: "):
        place.start_engine(place.artifact(start="die"))
    assert place.status()["engines"] == []
    assert place.start_engine(place.artifact())["state"] == "ready"


def test_an_engine_that_cannot_answer_one_request_is_refused(place: Any) -> None:
    place.start_host()
    with pytest.raises(MansardError, match="answered 500"):
        place.start_engine(place.artifact(fail_completions=True))
    assert place.status()["engines"] == []


def test_a_taken_port_is_stepped_over(place: Any) -> None:
    with socket.create_server(("127.0.0.1", place.site.ports.engines_from)):
        place.start_host()
        engine = place.start_engine(place.artifact())
    assert engine["endpoint"] != f"http://127.0.0.1:{place.site.ports.engines_from}"


def test_only_as_many_extra_engines_as_allowed_stay(place: Any) -> None:
    place.start_host()
    first = place.start_engine(place.artifact(voice="a"))
    second = place.start_engine(place.artifact(voice="b"))
    assert [e["pid"] for e in place.status()["engines"]] == [second["pid"]]
    assert identify(first["pid"]) is None
    artifact = place.artifact(voice="b")
    assert place.client.call("POST", "/engines/stop", {"artifact": artifact})["stopped"] == [second["key"]]
    assert place.status()["engines"] == []


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/engines", {"model": "demo", "artifact": "0" * 64, "serve": {}}, "0{64}"),
        ("/engines", {"model": "demo", "artifact": "x", "serve": {"dtype": "int3"}}, "serve.dtype: 'int3'"),
        ("/engines", {"model": "nobody", "artifact": "x", "serve": {}}, "model 'nobody'"),
        ("/engines", {"model": "demo", "serve": {}}, "key 'artifact' is missing"),
        ("/rollouts", {"model": "demo", "version": 7, "who": "ada", "why": ""}, "no version 7"),
        ("/rollouts", {"model": "demo", "version": True, "who": "ada", "why": ""}, "version: True is not of type int"),
        ("/rollback", {"model": "demo", "who": "otto", "fast": True}, "fast: True is not expected; known keys"),
        ("/nothing", {}, "POST /nothing: Not Found"),
    ],
)
def test_bad_requests_are_refused_in_one_line(shared: Any, path: str, body: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        shared.client.call("POST", path, body, timeout_seconds=60)
    assert "\n" not in str(refused.value)


def test_there_is_one_host_per_site(shared: Any) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "mansard.serving.host.host", "--site", str(shared.site.path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[4])},
    )
    assert second.returncode == 1
    assert f"runs already, process {shared.host.pid}" in second.stderr
    assert shared.site.host_socket.stat().st_mode & 0o777 == 0o600


def test_a_killed_hosts_engine_is_adopted_with_its_process(place: Any) -> None:
    place.start_host()
    engine = place.start_engine(place.artifact())
    place.end_host(signal.SIGKILL)
    place.start_host()
    assert [e["pid"] for e in place.status()["engines"]] == [engine["pid"]]
    assert place.start_engine(place.artifact())["pid"] == engine["pid"]


def test_an_engine_without_a_record_is_ended_by_the_next_host(place: Any) -> None:
    place.start_host()
    engine = place.start_engine(place.artifact())
    place.end_host(signal.SIGKILL)
    (record,) = (place.site.run / "engines").glob("*.json")
    record.unlink()
    place.start_host()
    wait_for(place, "the orphan's end", lambda: identify(engine["pid"]) is None)
    assert place.status()["engines"] == []


def test_a_record_of_another_process_is_not_believed(place: Any) -> None:
    place.start_host()
    engine = place.start_engine(place.artifact())
    place.end_host(signal.SIGKILL)
    (file,) = (place.site.run / "engines").glob("*.json")
    record = json.loads(file.read_text())
    record["process"]["start_ticks"] += 1
    file.write_text(json.dumps(record))
    place.start_host()
    wait_for(place, "the stranger's record to go", lambda: not file.exists())
    wait_for(place, "the unknown process's end", lambda: identify(engine["pid"]) is None)


def test_a_hang_up_ends_the_host_and_leaves_its_engines(place: Any) -> None:
    place.start_host()
    engine = place.start_engine(place.artifact())
    place.end_host(signal.SIGHUP)
    assert identify(engine["pid"]) is not None
    place.start_host()
    place.end_host(signal.SIGTERM)
    assert identify(engine["pid"]) is None


def test_an_engine_answers_the_user_that_runs_it_and_no_page(place: Any) -> None:
    place.start_host()
    port = urlsplit(place.start_engine(place.artifact())["endpoint"]).port
    assert port is not None
    page = ({"origin": "http://evil.example"}, {"sec_fetch_site": "cross-site"})
    assert [engine_statuses(port, os.getuid(), **headers) for headers in page] == [{401}, {401}]
    if os.getuid() == 0:
        assert engine_statuses(port, 65534) == {401}
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


# Without a process


def test_the_command_line_names_everything_that_changes_answers(place: Any) -> None:
    serve = Serve(dtype="float32", max_model_len=77, enforce_eager=False, tensor_parallel=2)
    line = command(EngineIdentity("a" * 64, "demo", serve), Path("/tree"), 8123, place.site)
    assert line[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for part in ("--model=/tree", "--port=8123", "--dtype=float32", "--max-model-len=77", "--tensor-parallel-size=2"):
        assert part in line
    assert "--enforce-eager" not in line
    assert "--host=127.0.0.1" in line
    assert variables(place.site, "1")["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in variables(place.site, "")


def test_engine_keys_tell_artifact_name_and_serve_arguments_apart() -> None:
    keys = {
        EngineIdentity(artifact, name, Serve(max_model_len=length)).key
        for artifact in ("a" * 64, "b" * 64)
        for name in ("demo", "other")
        for length in (256, 512)
    }
    assert len(keys) == 8


def test_last_words_name_the_first_error_the_first_exception_and_the_end(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "INFO start\nWARNING like `OSError: [Errno 24] Too many open files`\n"
        "(EngineCore pid=1) ERROR 11-22 [executor.py:1] Worker died unexpectedly\n"
        "(EngineCore pid=1) ERROR 11-22 [core.py:2] RuntimeError: cancelled\nTraceback\nlast but one\nlast\n"
    )
    words = last_words(log)
    assert "Too many open files" not in words
    assert words.startswith("(EngineCore pid=1) ERROR 11-22 [executor.py:1] Worker died unexpectedly | ")
    assert "RuntimeError: cancelled | Traceback | last but one | last" in words
    assert last_words(tmp_path / "absent.log") == "it printed nothing"


def test_on_a_card_an_engine_gets_its_share_and_one_without_room_is_not_started(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi shows 40 GiB; free is what the test writes into a file."""
    free_mib = tmp_path / "free"
    free_mib.write_text("40000")
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\necho "0, GPU-a, 40960, 0, $(cat {free_mib})"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tree = json.loads(place.site.path.read_text())
    tree["engine"]["gpu_memory_gib"] = 10
    place.site.path.write_text(json.dumps(tree))
    place.start_host()
    first = place.start_engine(place.artifact(voice="a"))
    assert "share of the card 0.2125" in Path(first["log"]).read_text()
    free_mib.write_text("5120")
    with pytest.raises(MansardError, match=r"may take 10 GiB, card 0 has 5.0 GiB free of 40.0"):
        place.start_engine(place.artifact(voice="b"))
    assert place.status()["engines"] == []  # the first one was idle and in nobody's service: it made room in vain


def test_engines_that_start_together_have_ports_of_their_own(place: Any) -> None:
    """As after `mansard up`: stable and previous at once. vLLM binds early and listens late; two on one port answer
    for each other."""
    place.start_host()
    place.start_router()
    for voice in ("one", "two"):
        mark = place.home / f"slow-{voice}"
        version = place.register(voice=voice, slow_once=str(mark), start_seconds=1.0)
        with Journal.open(place.site.journal) as journal:
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        wait_for(place, f"version {version}", lambda version=version: place.ask() == (200, str(version)))
    place.end_host(signal.SIGTERM)
    logs = place.site.logs / "engines"
    before = set(logs.iterdir())
    place.start_host()
    ready = wait_for(
        place,
        "both engines",
        lambda: [e["state"] for e in place.status()["engines"]] == ["ready"] * 2 and place.status()["engines"],
    )
    assert len({e["endpoint"] for e in ready}) == 2
    ports = sorted(file.stem.rpartition("-")[2] for file in set(logs.iterdir()) - before)
    assert len(ports) == len(set(ports)) == 2, "the first choice of each was its own"
