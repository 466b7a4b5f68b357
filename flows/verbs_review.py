"""The reviewer's verbs: see the evidence, sign for or against it, make a key pair.

They load neither prefect and mlflow nor numpy, scipy and matplotlib: the figures were computed when they were judged.
"""

import argparse
import json
from typing import Any

from flows.person import person
from flows.screen import show
from mansard.release import approval, keys
from mansard.release.advice import next_of_version
from mansard.release.events import DECISIONS
from mansard.release.journal import Journal
from mansard.release.pointer import approvals_in_force
from mansard.site import find_site, load_site
from mansard.store.store import Store


def review(args: argparse.Namespace) -> int:
    """Verdict, suites with intervals and the items that changed most, cost, attempts, mixture, lineage, decisions."""
    from mansard.evaluation.published import measured_cost, write_report  # signing and keys need none of it

    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    store = Store.of(site)
    with Journal.open(site.journal) as journal:
        registration = journal.registration(model, args.version)
        entries, pointers = journal.entries(model), journal.pointers(model)
    decisions = [e for e in entries if e.kind in DECISIONS and e.version == args.version]
    verdict: dict[str, Any] = json.loads(store.read_file(registration.verdict_record, "verdict.json"))
    report = write_report(store, registration, args.version, site.reports)
    facts = {
        "format": 1,
        "model": model,
        "version": args.version,
        "registration": registration.as_json(),
        "verdict": verdict,
        "cost": measured_cost(store, registration),
        "report": str(report / "report.md"),
        "page": str(report / "report.html"),
        "chart": str(report / "chart.png"),
        "decisions": [{"kind": e.kind, "who": e.who, "at": e.at, "why": e.why} for e in decisions],
        "next": next_of_version(registration, args.version, entries, pointers, site.approval.approvals),
    }
    if args.json:
        print(json.dumps(facts))
    else:
        from flows.review_text import show_on_standard_output

        show_on_standard_output(facts, verdict, registration)
    return 0


def approve(args: argparse.Namespace) -> int:
    """Sign that the version may be released."""
    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    who = person(args)
    with Journal.open(site.journal) as journal:
        made = approval.approve(site, journal, Store.of(site), model, args.version, who, args.reason)
        given = {e.who for e in approvals_in_force(journal.entries(model), model, args.version)}
    missing = site.approval.approvals - len(given)
    following = f"mansard release {args.version}" if missing <= 0 else f"{missing} more: mansard review {args.version}"
    text = f"{model} version {args.version} is approved by {who}, until {made.expires_at[:10]}\nnext: {following}"
    _tell(args, made.payload(), text)
    return 0


def reject(args: argparse.Namespace) -> int:
    """Sign that the version may not be released."""
    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    who = person(args)
    with Journal.open(site.journal) as journal:
        made = approval.reject(site, journal, model, args.version, who, args.reason)
    _tell(args, made.payload(), f"{model} version {args.version} is rejected by {who}")
    return 0


def keygen(args: argparse.Namespace) -> int:
    """Make a key pair; the site file names the public half."""
    site = load_site(find_site(args.site))
    private, public = keys.generate_key(args.name, site)
    text = f"private key: {private} (keep it to yourself)\npublic key:  {public}"
    if args.name not in site.people:
        text += f"\nnext: put it under people in {site.path}:\n  {args.name}: {{roles: [...], public_key: {public}}}"
    _tell(args, {"format": 1, "private_key": str(private), "public_key": public}, text)
    return 0


def _tell(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps(facts))
    else:
        show(text)
