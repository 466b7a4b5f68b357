"""The one exception tree. Each class carries the exit code of the CLI contract.

A message is one line: what was wrong, with the value, and what would be right.
"""


class MansardError(Exception):
    """Infrastructure failed: a process, a server, a disk. Exit 1."""

    exit_code = 1


class StageFailed(MansardError):
    """A stage's process ended badly; the message holds its last line and the log's path."""


class JournalDown(MansardError):
    """The journal's database does not answer, or cannot write: `mansard rollback` works without it. Exit 1."""


class BadInput(MansardError, ValueError):
    """A spec, site, file or argument is wrong. Exit 2."""

    exit_code = 2


class NotAllowed(MansardError):
    """Not approved, or this person may not do this. Exit 5."""

    exit_code = 5


class Corrupt(MansardError):
    """Stored bytes do not match their digest. Exit 6."""

    exit_code = 6


class JournalDamaged(Corrupt):
    """The journal's own database: `mansard rollback` works without it. Exit 6."""


class Conflict(MansardError):
    """The world moved: another baseline, a rollout that runs, nothing to go back to. Exit 7."""

    exit_code = 7


_BY_NAME = {
    kind.__name__: kind
    for kind in (BadInput, NotAllowed, Corrupt, JournalDamaged, Conflict, JournalDown, StageFailed, MansardError)
}


def error_named(name: str, message: str, otherwise: type[MansardError] = MansardError) -> MansardError:
    """The error that another process raised, by its class's name; `otherwise` where the name is not of the tree."""
    return _BY_NAME.get(name, otherwise)(message)
