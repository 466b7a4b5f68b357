"""The command `mansard`: argument parsing and exit codes. A verb's module is imported only when that verb runs.

On-call verbs (rollback, status, history, why) load the standard library, PyYAML and BLAKE3 only.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from mansard.errors import MansardError
from mansard.private_files import use_private_umask
from tasks import standard_streams

EPILOG = "Exit codes: 0 done, 1 infrastructure failed, 2 bad input, 3 verdict fail or inconclusive, 4 aborted, 5 not \
approved or not allowed, 6 corrupt, 7 nothing to go back to, baseline moved or a rollout runs."

VERBS: dict[str, tuple[str, str]] = {
    "up": ("flows.verbs_stack:up", "start the local stack: Prefect, MLflow, host, router; idempotent"),
    "down": ("flows.verbs_stack:down", "stop the local stack"),
    "status": ("flows.verbs_on_call:status", "what serves, what runs, and where to look"),
    "adopt": ("flows.verbs_model:adopt", "take a first base into service as version 1"),
    "upgrade": ("flows.verbs_model:upgrade", "insert, train, fuse, quantize, evaluate, gate, register"),
    "customize": ("flows.verbs_model:customize", "capture, train a branch, compose, evaluate, gate, register"),
    "gate": ("flows.verbs_model:gate", "judge a version again against today's stable and anchor"),
    "remove-storey": ("flows.verbs_model:remove_storey", "a version without one of its storeys, judged as a candidate"),
    "review": ("flows.verbs_review:review", "the evidence behind a version"),
    "approve": ("flows.verbs_review:approve", "sign that a version may be released"),
    "reject": ("flows.verbs_review:reject", "sign that it may not"),
    "keygen": ("flows.verbs_review:keygen", "make a key pair for a person"),
    "release": ("flows.verbs_model:release", "deploy, canary, promote or abort"),
    "rollback": ("flows.verbs_on_call:rollback", "previous is stable again, or a running rollout is aborted"),
    "history": ("flows.verbs_on_call:history", "the journal"),
    "why": ("flows.verbs_on_call:why", "the chain of evidence behind a version"),
    "snapshot": ("flows.verbs_store:snapshot", "take a folder into the store"),
    "restore": ("flows.verbs_store:restore", "bring a snapshot back, byte for byte"),
    "pin": ("flows.verbs_store:pin", "keep a snapshot that no version needs"),
    "collect": ("flows.verbs_store:collect", "delete what no version, pin or running work needs"),
    "verify": ("flows.verbs_store:verify", "find flipped bits in the store, or edits in the journal"),
}


def parser() -> argparse.ArgumentParser:
    """The contract of design.md, as argparse."""
    top = argparse.ArgumentParser(prog="mansard", description="Adds a storey to a model in service.", epilog=EPILOG)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    made = {name: _verb(verbs, name, text) for name, (_, text) in VERBS.items()}
    for name in ("adopt", "upgrade", "customize"):
        made[name].add_argument("spec", metavar="SPEC", help="a YAML file, e.g. configs/upgrade/demo.yaml")
    for name in ("gate", "remove-storey", "review", "approve", "reject", "release", "why"):
        made[name].add_argument("version", metavar="VERSION", type=int)
    made["remove-storey"].add_argument("storey", metavar="STOREY", type=int, help="1 is the oldest; `why` lists them")
    for name in ("approve", "reject"):
        made[name].add_argument("--reason", required=True, metavar="TEXT")
    for name in ("remove-storey", "approve", "reject", "release", "rollback"):
        made[name].add_argument("--as", dest="person", metavar="NAME", help="who you are (default: MANSARD_PERSON)")
    made["keygen"].add_argument("name", metavar="NAME")
    made["rollback"].add_argument("--from", dest="from_version", type=int, metavar="VERSION")
    made["rollback"].add_argument("--to", dest="to_version", type=int, metavar="VERSION")
    made["rollback"].add_argument("--hard", action="store_true", help="move at once, even when nothing answers")
    made["rollback"].add_argument("--why", dest="reason", default="", metavar="TEXT")
    made["snapshot"].add_argument("folder", metavar="DIR")
    made["restore"].add_argument("snapshot", metavar="ID")
    made["restore"].add_argument("folder", metavar="DIR")
    made["pin"].add_argument("snapshot", metavar="ID", nargs="?", help="without it, list what is pinned")
    made["pin"].add_argument("--remove", action="store_true", help="let it go again")
    made["pin"].add_argument("--reason", default="", metavar="TEXT")
    made["collect"].add_argument("--dry-run", action="store_true", help="show what would go")
    made["collect"].add_argument(
        "--grace-hours", type=float, default=24.0, metavar="H", help="keep what was used in the last H hours (24)"
    )
    made["verify"].add_argument("snapshot", metavar="ID", nargs="?")
    made["verify"].add_argument("--journal", action="store_true")
    return top


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    made = verbs.add_parser(name, help=text, description=text, epilog=EPILOG)
    made.add_argument("--site", metavar="FILE", help="default: MANSARD_SITE, else configs/site/local.yaml")
    made.add_argument("--model", metavar="NAME", help="default: the site's only one")
    made.add_argument("--json", action="store_true", help="for programs")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; every MansardError becomes one line and its exit code. Who reads what it prints changes no code."""
    standard_streams.prepare()
    use_private_umask()
    args = parser().parse_args(arguments)
    module, function = VERBS[args.verb][0].split(":")
    verb: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), function)
    try:
        status = verb(args)
        sys.stdout.flush()  # a full disk is told of here, not when the interpreter ends
        return status
    except MansardError as error:
        standard_streams.say(f"mansard {args.verb}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        standard_streams.say(
            f"mansard {args.verb}: interrupted; the same command goes on where this one stopped"
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
