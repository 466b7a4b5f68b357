"""The reviewer's verbs: see the evidence, sign for or against it, make a key pair. Loads neither prefect nor mlflow."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.person import person
from mansard.records import Registration
from mansard.release import approval, keys
from mansard.release.journal import Journal
from mansard.release.pointer import approvals_in_force
from mansard.site import find_site, load_site
from mansard.store import Store


def review(args: argparse.Namespace) -> int:
    """Verdict, suites with intervals, cost, report and chart, decisions so far."""
    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    store = Store.of(site)
    with Journal.open(site.journal) as journal:
        registration = journal.registration(model, args.version)
        entries = journal.entries(model, kinds=("approved", "rejected"))
    decisions = [e for e in entries if e.version == args.version]
    verdict: dict[str, Any] = json.loads(store.read_file(registration.verdict_record, "verdict.json"))
    cost = _cost(store, registration)
    evidence = store.materialize(registration.verdict_record)
    facts = {
        "format": 1,
        "model": model,
        "version": args.version,
        "registration": registration.as_json(),
        "verdict": verdict,
        "cost": cost,
        "report": str(evidence / "report.md"),
        "page": _page(evidence),
        "chart": str(evidence / "chart.png"),
        "decisions": [{"kind": e.kind, "who": e.who, "at": e.at, "why": e.why} for e in decisions],
    }
    if args.json:
        print(json.dumps(facts))
    else:
        _show(facts, registration)
    return 0


def _show(facts: dict[str, Any], registration: Registration) -> None:
    out = Console(width=max(Console().width, 110))
    against = registration.baseline_version
    out.print(
        f"[bold]{facts['model']} version {facts['version']}[/bold]: verdict [bold]{registration.verdict}[/bold], "
        f"by {registration.author}, from version {registration.base_version}, judged against "
        f"{'nothing (first version)' if against is None else f'version {against}'}",
        soft_wrap=True,
    )
    table = Table()
    for column in ("suite", "role", "n", "before", "after", "change (interval)", "says"):
        table.add_column(column, no_wrap=True)
    for suite in facts["verdict"]["suites"]:
        table.add_row(*_row(suite))
    out.print(table)
    if facts["cost"] is not None:
        out.print(_cost_table(facts["cost"]))
    for line in _asides(facts["verdict"]):
        out.print(line, soft_wrap=True)
    for decision in facts["decisions"]:
        out.print(f"{decision['kind']} by {decision['who']} at {decision['at']}: {decision['why']}", soft_wrap=True)
    page = facts["page"] or facts["report"]
    out.print(f"report: {page}\nchart:  {facts['chart']}", soft_wrap=True)
    if registration.verdict in ("pass", "baseline"):
        out.print(f'next: mansard approve {facts["version"]} --as NAME --reason "..."', soft_wrap=True)
    else:
        out.print("next: mend the upgrade; a version that did not pass cannot be approved")


def _page(evidence: Path) -> str | None:
    """The one-page report; records from before there was one have none."""
    page = evidence / "report.html"
    return str(page) if page.exists() else None


def _asides(verdict: dict[str, Any]) -> list[str]:
    """Reason, attempt, and what suites share with training text."""
    number = verdict["attempts"].get("number", 1)
    lines = [f"why: {verdict['reason']}", f"attempt {number}, judged at {verdict['alpha_spent']:.4g} one-sided"]
    for name, found in (verdict.get("contamination") or {}).items():
        if found["num_shared"]:
            shared = f"{found['num_shared']} of {found['num_items']} items"
            lines.append(f"{name}: {shared} share 13 words in a row with training text")
    return lines


def _row(suite: dict[str, Any]) -> list[str]:
    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.4f}"

    compared = suite["baseline"]
    effect = {"value": None, "low": None, "high": None} if compared is None else compared["effect"]
    interval = "" if effect["low"] is None else f" ({effect['low']:+.4f} to {effect['high']:+.4f})"
    return [
        suite["suite"],
        suite["role"],
        str(suite["num_items"]),
        number(None if compared is None else compared["before"]["value"]),
        number(suite["after"]["value"]),
        number(effect["value"], "+") + interval,
        suite["verdict"],
    ]


def _cost(store: Store, registration: Registration) -> dict[str, Any] | None:
    for stage, _, snapshot in registration.stages:
        if stage == "cost":
            found: dict[str, Any] = json.loads(store.read_file(snapshot, "cost.json"))
            return found
    return None


def _cost_table(cost: dict[str, Any]) -> Table:
    """Latency in milliseconds, memory in MB, measured side by side when the version was evaluated."""
    columns = [c for c in ("baseline", "candidate", "ratio") if c in cost]
    table = Table(title=f"cost, {cost['prompts']} prompts, {cost['concurrency']} at once")
    for column in ("figure", *columns):
        table.add_column(column)
    for key in cost["candidate"]:
        table.add_row(key, *(f"{cost[c][key]:,.2f}" if key in cost[c] else "" for c in columns))
    return table


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
    print(json.dumps(made.payload()) if args.json else text)
    return 0


def reject(args: argparse.Namespace) -> int:
    """Sign that the version may not be released."""
    site = load_site(find_site(args.site))
    model = site.model_named(args.model)
    who = person(args)
    with Journal.open(site.journal) as journal:
        made = approval.reject(site, journal, model, args.version, who, args.reason)
    print(json.dumps(made.payload()) if args.json else f"{model} version {args.version} is rejected by {who}")
    return 0


def keygen(args: argparse.Namespace) -> int:
    """Make a key pair; the site file names the public half."""
    site = load_site(find_site(args.site))
    private, public = keys.generate_key(args.name, site)
    if args.json:
        print(json.dumps({"format": 1, "private_key": str(private), "public_key": public}))
        return 0
    print(f"private key: {private} (keep it to yourself)\npublic key:  {public}")
    if args.name not in site.people:
        print(f"next: put it under people in {site.path}:\n  {args.name}: {{roles: [...], public_key: {public}}}")
    return 0
