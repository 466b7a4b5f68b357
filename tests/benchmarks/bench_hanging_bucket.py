"""How long a rollback takes while the store's bucket accepts and never answers, with the host up and down.

The host, a router worker and the S3 server (moto's, stopped with SIGSTOP for the drills) are real; the engines are
stand-ins that the host starts with vLLM's command line. A drill is `mansard rollback --from A --to B` from a shell;
the next goes the other way. `moved` is from the command's start until the router answers a user by the other version,
`shell` the whole command, which looks at the bucket for two seconds at most after the move. The last line is JSON:
drills, {host_up, host_down} x {moved_ms_p50, moved_ms_max, shell_ms_p50, shell_ms_max}, limit_of_a_request_seconds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from serving_place import place_class

from mansard.release.journal import Journal
from mansard.site import load_site
from mansard.store.bucket import REQUEST_SECONDS
from mansard.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.mansard.s3_server import environment, make_bucket, s3_process  # noqa: E402 - a program, not a package


def two_versions(place: Any) -> None:
    """Versions 1 and 2 resident; 2 is stable. A rollout needs traffic; this is what it would have written."""
    with Journal.open(place.site.journal) as journal:
        for voice in "ab":
            version = place.register(voice=voice)
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))

    def is_in_service() -> bool:
        models = json.loads(place.site.split_file.read_bytes())["models"] if place.site.split_file.exists() else {}
        endpoints = [v["endpoint"] for v in models.get("demo", {}).get("versions", {}).values()]
        return len(endpoints) == 2 and None not in endpoints

    place.wait_for("both engines", is_in_service)
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))


def drill(place: Any, to: int) -> tuple[float, float]:
    """(milliseconds until a user was moved, of the whole command)."""
    words = ["rollback", "--from", str(3 - to), "--to", str(to), "--as", "ada", "--why", "drill", "--json"]
    command = [sys.executable, "-m", "flows.cli", *words, "--site", str(place.site.path)]
    begun = time.perf_counter()
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True) as process:
        place.wait_for("the move", lambda: place.ask()[1] == str(to))
        moved = time.perf_counter() - begun
        output, _ = process.communicate(timeout=120)
        shell = time.perf_counter() - begun
    told = json.loads(output)
    assert told["changed"] and any("was not checked" in warning for warning in told["warnings"]), told
    return moved * 1000, shell * 1000


def drills(place: Any, number: int, first: int) -> dict[str, float]:
    """`first` is where the first drill goes to."""
    times = [drill(place, first if n % 2 == 0 else 3 - first) for n in range(number)]
    moved, shell = zip(*times, strict=True)
    return {
        "moved_ms_p50": round(median(moved)),
        "moved_ms_max": round(max(moved)),
        "shell_ms_p50": round(median(shell)),
        "shell_ms_max": round(max(shell)),
    }


def run(place: Any, number: int) -> dict[str, Any]:
    with s3_process() as (url, server):
        os.environ.update(environment(url))
        make_bucket(url, "models")
        tree = {**json.loads(place.site.path.read_text()), "store": "s3://models/mansard"}
        place.site.path.write_text(json.dumps(tree))
        place.site = load_site(place.site.path)
        place.store = Store.of(place.site)
        place.start_host()
        place.start_router()
        two_versions(place)
        server.send_signal(signal.SIGSTOP)
        try:
            place.end_host(signal.SIGHUP)  # its engines go on
            without_host = drills(place, number | 1, 1)
            place.start_host()
            with_host = drills(place, number | 1, 2)
        finally:
            server.send_signal(signal.SIGCONT)
    return {"host_up": with_host, "host_down": without_host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=11, help="with the host, and as many without; made odd")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = place_class()(home)
    try:
        figures = run(place, options.drills)
    finally:
        place.close()
        shutil.rmtree(home)
    print(json.dumps({"drills": options.drills | 1, **figures, "limit_of_a_request_seconds": REQUEST_SECONDS}))


if __name__ == "__main__":
    main()
