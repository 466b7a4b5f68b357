"""A real S3 server (moto's, from PyPI) on a free port of this machine, for as long as a context lasts."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.free_ports import free_port

DEADLINE_SECONDS = 300.0


@contextmanager
def s3_server(log: int = subprocess.DEVNULL) -> Iterator[str]:
    """Its URL. Buckets are made by `make_bucket`; what it holds is gone with it."""
    with s3_process(log) as (url, _):
        yield url


@contextmanager
def s3_process(log: int = subprocess.DEVNULL) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The same with its process: one that is stopped (SIGSTOP) accepts and never answers."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log, stderr=log, env={**os.environ, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": "16777216"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=10):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, "the S3 server ended"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.05)
        yield url, server
    finally:
        server.kill()
        server.wait(60)


def make_bucket(url: str, name: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=60):
        pass


def environment(url: str) -> dict[str, str]:
    """What names the server to the store, and nothing of this machine's own credentials."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",  # the server asks for no real one
        "AWS_REGION": "us-east-1",
    }
