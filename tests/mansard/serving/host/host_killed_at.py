"""The real host, in which kill -9 strikes just before or just after one move is in the journal.

`python host_killed_at.py SITE KIND NTH before|after PID`: at the NTH move of KIND the process PID is killed, 0 for the
host itself. Nothing else of the host is changed; a kill can strike there, and here it does each time.
"""

import itertools
import os
import signal
import sys
from typing import Any

from mansard.release.journal import Journal
from mansard.serving.host import host


def strike_at(kind: str, nth: int, moment: str, pid: int) -> None:
    """Wrap the one place through which every move of a pointer goes."""
    move = Journal._move
    seen = itertools.count(1)

    def killing(self: Journal, moved: str, *more: Any, **named: Any) -> int:
        is_here = moved == kind and next(seen) == nth
        if is_here and moment == "before":
            os.kill(pid or os.getpid(), signal.SIGKILL)
        term = move(self, moved, *more, **named)
        if is_here and moment == "after":
            os.kill(pid or os.getpid(), signal.SIGKILL)
        return term

    Journal._move = killing  # type: ignore[method-assign]


if __name__ == "__main__":
    site, kind, nth, moment, pid = sys.argv[1:]
    strike_at(kind, int(nth), moment, int(pid))
    sys.exit(host.main(["--site", site]))
