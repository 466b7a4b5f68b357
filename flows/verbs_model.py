"""The platform team's verbs: adopt, upgrade, customize, gate, remove-storey, release. They start the stack where it
is down."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flows import stack
from flows.person import person
from flows.screen import show
from mansard.errors import MansardError
from mansard.models.remove_storey import check_removable
from mansard.site import Site, find_site, load_site
from mansard.specs.whole import AdoptSpec, CustomizeSpec, UpgradeSpec
from mansard.store.store import Store
from mansard.worker_start import fork_servers
from tasks.evidence import check_suites_unchanged, recorded_evidence, recorded_version
from tasks.intake import check_author, read_order

if TYPE_CHECKING:
    from flows.outcome import Outcome

T = TypeVar("T")
EXIT_OF_VERDICT = {"pass": 0, "baseline": 0, "fail": 3, "inconclusive": 3}


def adopt(args: argparse.Namespace) -> int:
    """A first base becomes a version."""
    site = _ready(args, AdoptSpec)
    with fork_servers(site, "quantize"):
        from flows.adopt import adopt as flow  # prefect and mlflow read their settings when they are imported

        outcome = _followed(flow, str(Path(args.spec).resolve()), str(site.path), _author(), args.model)
    return _tell(args, outcome)


def upgrade(args: argparse.Namespace) -> int:
    """One storey."""
    site = _ready(args, UpgradeSpec)
    with fork_servers(site, "train"):
        from flows.upgrade import upgrade as flow

        outcome = _followed(flow, str(Path(args.spec).resolve()), str(site.path), _author(), args.model)
    return _tell(args, outcome)


def customize(args: argparse.Namespace) -> int:
    """A branch on a base in service."""
    site = _ready(args, CustomizeSpec)
    with fork_servers(site, "train-branch"):
        from flows.customize import customize as flow

        outcome = _followed(flow, str(Path(args.spec).resolve()), str(site.path), _author(), args.model)
    return _tell(args, outcome)


def gate(args: argparse.Namespace) -> int:
    """Judge a registered version against today's stable and anchor."""
    site = load_site(find_site(args.site))
    registration = recorded_version(site, site.model_named(args.model), args.version)
    check_suites_unchanged(site, recorded_evidence(site, registration), args.version)
    site = _ready(args, None)
    from flows.gate import gate as flow

    return _tell(args, _followed(flow, args.version, str(site.path), args.model))


def remove_storey(args: argparse.Namespace) -> int:
    """A version without one of its storeys; what forbids it is told before anything starts."""
    site = load_site(find_site(args.site))
    name, author = site.model_named(args.model), person(args)
    check_author(site, author)
    registration = recorded_version(site, name, args.version)
    check_removable(Store.of(site), registration.model, args.storey)
    check_suites_unchanged(site, recorded_evidence(site, registration), args.version)
    site = _ready(args, None)
    from flows.remove_storey import remove_storey as flow

    return _tell(args, _followed(flow, args.version, args.storey, str(site.path), author, args.model))


def release(args: argparse.Namespace) -> int:
    """Deploy, canary, promote or abort; the host walks on if this command is ended."""
    site = _ready(args, None)
    who = person(args)
    from flows.release import release as flow

    done = _followed(flow, args.version, str(site.path), who, args.model)
    is_promoted = done.state == "promoted"
    if args.json:
        ended = {"version": args.version, "state": done.state, "reason": done.reason, "users": done.users}
        print(json.dumps({"format": 1, **ended}))
    else:
        show(f"version {args.version} is {done.state}{'' if is_promoted else f': {done.reason}'}")
        show("next: mansard status" if is_promoted else "next: mansard history")
    return 0 if is_promoted else 4


def _ready(args: argparse.Namespace, kind: type[AdoptSpec] | type[UpgradeSpec] | type[CustomizeSpec] | None) -> Site:
    """Everything that can be wrong in spec, site and files is found before anything starts."""
    site = load_site(find_site(args.site))
    site.model_named(args.model)
    if kind is not None:
        read_order(kind, Path(args.spec), site.path, args.model, _author())
    if not stack.is_up(site):
        stack.up(site)
    stack.use_servers(site)
    return site


def _followed(flow: Callable[..., T], *arguments: object) -> T:
    """The flow's result; a Prefect server that went away meanwhile is one line."""
    import httpx
    from prefect.exceptions import PrefectException

    try:
        return flow(*arguments)
    except (httpx.HTTPError, PrefectException) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise MansardError(f"Prefect's server: {what}; mansard up, then the same command goes on") from error


def _author() -> str | None:
    return os.environ.get("MANSARD_PERSON")


def _tell(args: argparse.Namespace, outcome: "Outcome") -> int:
    """Suites, pages, next command; the last line is version and verdict."""
    if args.json:
        print(json.dumps(_facts(outcome)))
        return EXIT_OF_VERDICT[outcome.verdict]
    for derivation in outcome.derivations:
        how = "reused" if derivation.reused else f"{derivation.seconds:.1f} s"
        show(f"{derivation.stage:12} {derivation.snapshot[:12]} {how}")
    for suite in outcome.suites:
        show(_suite_line(asdict(suite)))
    show(f"report: {outcome.report}\nchart:  {outcome.chart}")
    for name, url in outcome.urls.items():
        show(f"{name}: {url}")
    version = outcome.version
    show(f"next: mansard review {version}")
    show(f"version {version} of {outcome.model_name}: {outcome.verdict}")
    return EXIT_OF_VERDICT[outcome.verdict]


def _suite_line(suite: dict[str, Any]) -> str:
    before = "" if suite["before"] is None else f"{suite['before']:.4f} -> "
    interval = suite["interval"]
    change = "" if interval is None else f", change {suite['effect']:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{suite['role']:7} {suite['suite']}: {before}{suite['after']:.4f}{change}: {suite['verdict']}"


def _facts(outcome: "Outcome") -> dict[str, Any]:
    return {
        "format": 1,
        "model": outcome.model_name,
        "version": outcome.version,
        "verdict": outcome.verdict,
        "stages": [
            {"name": d.stage, "snapshot": d.snapshot, "seconds": round(d.seconds, 2), "reused": d.reused}
            for d in outcome.derivations
        ],
        "suites": [asdict(s) for s in outcome.suites],
        "report": outcome.report,
        "chart": outcome.chart,
        "urls": outcome.urls,
    }
