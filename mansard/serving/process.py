"""Processes known by pid, start time and boot, so that a pid used again is never taken for the old process. Linux only.

Guarantees: nothing is signalled that is not the process (or its group) that was identified. Standard library only.
"""

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """`start_ticks` are clock ticks since boot (field 22 of /proc/PID/stat); `boot` is the kernel's boot id."""

    pid: int
    start_ticks: int
    boot: str

    def is_running(self) -> bool:
        """The very process is there and not a zombie."""
        return identify(self.pid) == self


def identify(pid: int) -> ProcessIdentity | None:
    """The running process with this pid; None when there is none or it is a zombie."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in parentheses and may hold spaces and parentheses itself.
    fields = stat[stat.rindex(")") + 2 :].split()
    state, start_ticks = fields[0], int(fields[19])
    if state in ("Z", "X"):
        return None
    return ProcessIdentity(pid, start_ticks, (PROC / "sys/kernel/random/boot_id").read_text().strip())


def with_output_below(folder: Path) -> list[ProcessIdentity]:
    """Processes of this user whose standard output is a file below `folder`: how orphans are found without a record."""
    prefix = f"{folder.resolve()}/"
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                target = str((entry / "fd" / "1").readlink())
            except OSError:  # it ended meanwhile, or belongs to another user
                continue
            identity = identify(int(entry.name)) if target.startswith(prefix) else None
            if identity is not None:
                found.append(identity)
    return found


async def wait_for_end(process: ProcessIdentity) -> None:
    """Return when the process has ended, be it a child of ours or not."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if not process.is_running():
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


def group_of(process: ProcessIdentity) -> int | None:
    """The process group it is in; None when it has ended."""
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def members_named(leader: ProcessIdentity, prefix: str) -> list[ProcessIdentity]:
    """Other processes of the group that `leader` leads whose name (15 bytes of it) begins with `prefix`."""
    members = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == leader.pid:
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            is_member = os.getpgid(int(entry.name)) == leader.pid
            identity = identify(int(entry.name)) if is_member else None
            if identity is not None and (entry / "comm").read_text(errors="replace").startswith(prefix):
                members.append(identity)
    return members


async def wait_for_first_end(processes: list[ProcessIdentity]) -> None:
    """Return when one of them has ended."""
    waits = [asyncio.create_task(wait_for_end(process)) for process in processes]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def send(process: ProcessIdentity, number: signal.Signals) -> None:
    """Signal the process if it still runs."""
    if process.is_running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def kill_group(leader: ProcessIdentity) -> None:
    """SIGKILL to the group that `leader` leads or led; a pid stays reserved while its group has members."""
    now = identify(leader.pid)
    if now is not None and now != leader:
        return  # the pid, and so the group, belongs to somebody else
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)
