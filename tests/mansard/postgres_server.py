"""A PostgreSQL server of the tests' own, from the system's binaries."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import psycopg


class PostgresServer:
    """A private server: data and socket in a folder of its own, run by a user without rights, no TCP port."""

    def __init__(self, binaries: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mansard-pg-"))
        self._binaries = binaries
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, object] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses root
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        words = ["initdb", "-D", "data", "-U", "mansard", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"]
        self._call(*words)

    def _call(self, program: str, *words: str) -> None:
        command = [str(self._binaries / program), *words]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, **self._as)  # type: ignore[call-overload]

    def start(self) -> None:
        command = [str(self._binaries / "postgres"), "-D", "data", "-k", str(self.folder), "-c", "listen_addresses="]
        command += ["-c", "fsync=off", "-c", "max_connections=60"]  # our own disk's promises are not what is tested
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url("postgres")):
                return
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # immediate shutdown
            self._process.wait(60)
            self._process = None

    def freeze(self) -> None:
        """It accepts and never answers, with every process of its own: as on a machine that hangs."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)  # first, so that no process is added meanwhile
        for pid in self._children():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        for pid in (*self._children(), self._process.pid):
            os.kill(pid, signal.SIGCONT)

    def _children(self) -> list[int]:
        assert self._process is not None
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / ".s.PGSQL.5432"

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://mansard@/{database}?host={self.folder}"

    def new_journal(self) -> str:
        """A URL that leads to an empty schema of its own, which is cheaper than a database."""
        name = f"journal_{uuid.uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self.url('postgres')}&options=-csearch_path%3D{name}"


def postgres_binaries() -> Path | None:
    """Where the newest initdb of the system is; Debian keeps it off the path."""
    found = [Path(p) for p in [shutil.which("initdb")] if p] + sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None
