"""The on-call's verbs: thin clients of the host; with it down they read the files and move the pointer themselves.

Standard library, PyYAML and BLAKE3 only.
"""

import argparse
import getpass
import json
import os
import time
from typing import TYPE_CHECKING, Any

from flows.screen import columns, show
from mansard.errors import JournalDamaged, JournalDown, MansardError
from mansard.release import oncall
from mansard.release.direct_rollback import Request, rollback_directly
from mansard.release.oncall_text import history_text, status_text, why_text
from mansard.serving.client import HostClient, HostDown
from mansard.serving.host.when_down import end_engine, engine_answers, follow_pointers, traffic_split
from mansard.serving.worker_splits import lag_lines, lagging_workers
from mansard.site import Site, find_site, load_site

if TYPE_CHECKING:
    from mansard.store.store import Store

ROLLBACK_TIMEOUT_SECONDS = 1800.0
"""A cold previous version is started first while stable goes on serving."""
WORKER_SECONDS = 1.0
SIDES = ("canary", "stable")
HOST_TIMEOUT_SECONDS = 10.0
"""A host that hangs is taken for down after this; terms and compare-and-swap make that safe."""


def status(args: argparse.Namespace) -> int:
    """Pointers, versions and traffic; with --json also the engines and every process of the stack."""
    site = load_site(find_site(args.site))
    names = [site.model_named(args.model)] if args.model else list(site.models)
    models: dict[str, Any] = {}
    problem = ""  # of the journal: it is waited for once
    for name in names:
        models[name] = oncall.remembered_status(site, name, problem) if problem else oncall.status(site, name)
        problem = models[name]["journal"].get("problem", "")
    host, trouble = _host_status(site)
    card = _card_warning(site)
    workers, lag = lag_lines(site, WORKER_SECONDS)
    if args.json:
        facts = {"format": 1, "models": models, "host": host, "card": card or None, "processes": _processes(site)}
        print(json.dumps({**facts, "workers": workers}))
        return 0
    for found in models.values():
        show(status_text(found, columns()))
    if card:
        show(f"warning: {card}")
    show(trouble if host is None else _engines_text(host))
    for line in lag:
        show(f"warning: {line}")
    return 0


def _host_status(site: Site) -> tuple[dict[str, Any] | None, str]:
    """What the host says, or None and why it says nothing."""
    try:
        return HostClient(site.host_socket).call("GET", "/status", timeout_seconds=HOST_TIMEOUT_SECONDS), ""
    except HostDown:
        return None, "host: down (mansard up starts it); rollback works without it"
    except MansardError as error:  # it hangs, or has no journal to read
        return None, f"host: runs, but cannot answer: {error}; rollback works without it"


def _card_warning(site: Site) -> str:
    """Engines that do not fit the GPU together: one line, where the site states their memory."""
    if site.engine.gpu_memory_gib is None:
        return ""
    from mansard.serving.engine.card_memory import card_warning  # starts nvidia-smi

    return card_warning(site)


def _is_host_alive(site: Site) -> bool:
    """Whether it answers at all, whatever its journal does."""
    try:
        HostClient(site.host_socket).call("GET", "/alive", timeout_seconds=HOST_TIMEOUT_SECONDS)
    except MansardError:
        return False
    return True


def _processes(site: Site) -> list[dict[str, Any]]:
    from flows.stack import status_of_processes  # asks every server, so only where a program wants to know

    return status_of_processes(site)


def _engines_text(host: dict[str, Any]) -> str:
    lines = [f"host: {host['state']}, pid {host['pid']}"]
    for engine in host["engines"]:
        lines.append(f"engine {engine['artifact'][:12]}: {engine['state']}, {engine['endpoint']}, pid {engine['pid']}")
    for name, model in host["models"].items():
        for version, facts in model["versions"].items():
            seconds = facts["start_seconds"]
            last = "" if seconds is None else f", its last start took {seconds:.0f} s"
            lines.append(f"{name} version {version}: {facts['state']}{last}")
        lines += _canary_lines(name, model["rollout"])
    return "\n".join(lines)


def _canary_lines(name: str, walk: dict[str, Any]) -> list[str]:
    """How the running rollout does: what both sides had since the step began, and what the last look found."""
    if walk["state"] not in ("starting", "canary"):
        return []
    lines = [f"{name} rollout of version {walk['version']}: {walk['reason']}"]
    seen = walk["observations"]
    sides = [f"{side} {seen[side]['requests']}, {seen[side]['errors']} failed" for side in SIDES if side in seen]
    if sides:
        lines.append(f"  requests in {seen['seconds_in_step']:.0f} s: {'; '.join(sides)}")
    told = [*(finding["text"] for finding in seen["findings"]), seen["engines"]["text"]]
    return lines + [f"  {text}" for text in told if text]


def rollback(args: argparse.Namespace) -> int:
    """Previous is stable again, or the running rollout is aborted."""
    began = time.perf_counter()
    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    who = args.person or os.environ.get("MANSARD_PERSON") or getpass.getuser()
    body = {
        "model": model,
        "from": args.from_version,
        "to": args.to_version,
        "hard": args.hard,
        "who": who,
        "why": args.reason,
    }
    if _is_host_alive(site):
        done = _through_host(site, model, args, who, body)
    else:
        done = _without_host(site, model, args, who)
    if args.json:
        print(json.dumps(done))
        return 0
    total_ms = (time.perf_counter() - began) * 1000
    show(done["message"])
    for warning in done["warnings"]:
        show(f"warning: {warning}")
    if done["changed"]:
        show(f"pointer and split moved in {done['milliseconds']:.0f} ms, everything in {total_ms:.0f} ms")
    show("next: mansard history")
    return 0


def _through_host(
    site: Site, model: str, args: argparse.Namespace, who: str, body: dict[str, Any]
) -> dict[str, Any]:
    try:
        return HostClient(site.host_socket).call("POST", "/rollback", body, timeout_seconds=ROLLBACK_TIMEOUT_SECONDS)
    except (HostDown, JournalDown, JournalDamaged):  # it died meanwhile, or has no journal to write to
        return _without_host(site, model, args, who)


def _without_host(site: Site, model: str, args: argparse.Namespace, who: str) -> dict[str, Any]:
    request = Request(model, args.from_version, args.to_version, args.hard, who, args.reason)
    before = traffic_split(site)
    done = rollback_directly(
        site,
        request,
        answers=lambda name, version: engine_answers(site, name, version),
        write_split=lambda name, pointers, term: follow_pointers(site, name, pointers, term),
        end_engine=lambda name, left, stable: end_engine(site, before, name, left, stable),
    )
    if done["changed"] and site.notify:
        from mansard.release.notify import notify  # the host does that where it runs

        event = "abort" if done["action"] == "abort" else "rollback"
        told = notify(site, event, model, f"{done['message']} (by {who})", who=who, why=args.reason, host="down")
        done["warnings"] += [told] if told else []
    if done["changed"]:
        done["warnings"] += lagging_workers(site, done["term"])
    return done


def history(args: argparse.Namespace) -> int:
    """The journal, oldest first."""
    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    try:
        entries = oncall.history(site, model)
    except (JournalDown, JournalDamaged):
        known = oncall.remembered_history(site, model)
        print(json.dumps(known) if args.json else f"{history_text(known, columns())}\nthese moves are remembered here")
        raise
    print(json.dumps(entries) if args.json else history_text(entries, columns()))
    return 0


def why(args: argparse.Namespace) -> int:
    """From the live pointer to approval, verdict, stages, data and the first base."""
    from mansard.store.store import Store  # BLAKE3 is loaded only where evidence is read

    site = load_site(find_site(args.site))
    store = Store.of(site)
    found = oncall.why(site, site.model_named(args.model), args.version, store)
    _add_storeys(store, found)
    _add_carry_ons(store, found)
    print(json.dumps(found) if args.json else why_text(found, columns()))
    return 0


def _add_carry_ons(store: "Store", found: dict[str, Any]) -> None:
    """Base artifact, branch and alpha of the versions of the chain that are carry-ons."""
    from mansard.composition.compose import composition_of

    for link in found["chain"]:
        try:
            made = composition_of(store, link["artifact"])
        except MansardError as error:
            found["problems"].append(f"artifact of version {link['version']}: {error}")
            continue
        if made is not None:
            link["carry_on"] = {"base": made.base, "branch": made.branch, "alpha": made.alpha}


def _add_storeys(store: "Store", found: dict[str, Any]) -> None:
    """The storeys of each version of the chain, with the oldest of these versions that holds each."""
    from mansard.models.storeys import told_storeys

    first: dict[str, int] = {}
    for link in reversed(found["chain"]):
        link["storeys"] = []
        try:
            link["storeys"] = told_storeys(store, link["model"])
        except MansardError as error:
            found["problems"].append(f"storeys of version {link['version']}: {error}")
        for storey in link["storeys"]:
            storey["added_by"] = first.setdefault(storey["tensors"], link["version"])
