"""The picture of the work on Prefect's page is not worth the work, whatever answers in Prefect's place."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPORTS = """
from itertools import count
from tasks.derivation import PrefectProgress, metrics_to

class Sent:
    def add(self, metrics, step):
        print(metrics, step)

clock = count(0, 60)
show, send = PrefectProgress("a title", clock=lambda: next(clock)), metrics_to(Sent())
odd = {"done": float("nan"), "total": "many", "metrics": {"loss": "high", "norm": 10**400, "rate": 0.5}}
for progress in ({"done": 1, "total": None, "unit": "loads", "text": ""}, {"done": 1, "total": 0}, {}, None, odd) * 4:
    show("prove", progress)
    send("prove", progress)
print("work is complete")
"""


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[str]:
    """A server that gives these answers in turn, whatever it is asked."""
    following = itertools.cycle(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = next(following)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()
            thread.join()


def test_no_answer_of_prefects_server_and_no_report_ends_a_stage() -> None:
    with answering((200, "<html>"), (200, "{}"), (404, "{}"), (500, "?")) as url:
        variables = {**os.environ, "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        command = [sys.executable, "-W", "ignore", "-c", REPORTS]
        result = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["{'rate': 0.5} 0"] * 4 + ["work is complete"]
