"""The store by hand: take, bring back, check, keep, free."""

import argparse
import json
from pathlib import Path

from flows.journal_proof import journal_text, verify_journal
from flows.screen import show
from mansard.errors import BadInput, Corrupt
from mansard.release.journal import Journal
from mansard.release.roots import version_roots
from mansard.site import find_site, load_site
from mansard.store import collection
from mansard.store.collection import Collected
from mansard.store.store import Store

HOUR_SECONDS = 3600.0


def snapshot(args: argparse.Namespace) -> int:
    """Take a folder; the id is the digest of its content, so the same folder twice is one snapshot."""
    store = _store(args)
    folder = Path(args.folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: not a folder; name the folder that holds the files to take")
    taken = store.snapshot(folder)
    files = store.manifest(taken).files
    size = sum(f.size_bytes for f in files.values())
    facts = {"snapshot": taken, "files": len(files), "bytes": size}
    _tell(args, facts, f"{taken}\nnext: mansard restore {taken[:12]} DIR")
    return 0


def restore(args: argparse.Namespace) -> int:
    """Bring a snapshot back into an empty or new folder, byte for byte."""
    store = _store(args)
    found = store.resolve(args.snapshot)
    store.restore(found, Path(args.folder))
    _tell(args, {"snapshot": found, "folder": args.folder}, f"{found[:12]} is in {args.folder}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read every byte of one snapshot, of all, or every entry of the journal."""
    site = load_site(find_site(args.site))
    if args.journal:
        facts = verify_journal(site)
        _tell(args, facts, journal_text(facts))
        return 0
    store = Store.of(site)
    damages = store.verify(store.resolve(args.snapshot) if args.snapshot else None)
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise Corrupt(f"{damages[0]}{more}")
    _tell(args, {"damages": []}, "every byte is as it was taken")
    return 0


def pin(args: argparse.Namespace) -> int:
    """Keep a snapshot that no version needs, or let it go; without an ID, list what is kept so."""
    store = _store(args)
    if args.snapshot is None:
        pins = store.pins()
        lines = [f"{snapshot[:12]} {why}".rstrip() for snapshot, why in sorted(pins.items())]
        _tell(args, {"pins": pins}, "\n".join(lines) or "nothing is pinned; versions and what led to them stay anyway")
        return 0
    if args.remove:
        pinned = [s for s in store.pins() if s.startswith(args.snapshot)]
        found = pinned[0] if len(pinned) == 1 else store.resolve(args.snapshot)
        store.unpin(found)
        _tell(args, {"snapshot": found, "pinned": False}, f"{found[:12]} is not pinned any more\nnext: mansard collect")
        return 0
    found = store.resolve(args.snapshot)
    store.pin(found, args.reason)
    _tell(args, {"snapshot": found, "pinned": True}, f"{found[:12]} stays until: mansard pin {found[:12]} --remove")
    return 0


def collect(args: argparse.Namespace) -> int:
    """Delete what no version, no pin and no work under way needs, and nobody used within the grace period."""
    if args.grace_hours < 0:
        raise BadInput(f"--grace-hours {args.grace_hours}: hours from 0 up are expected")
    site = load_site(find_site(args.site))
    store, grace_seconds = Store.of(site), args.grace_hours * HOUR_SECONDS

    def roots() -> set[str]:
        if isinstance(site.journal, Path) and not site.journal.exists():
            return set()
        with Journal.open(site.journal) as journal:
            return version_roots(journal, store)

    done = (collection.preview if args.dry_run else collection.collect)(store, roots, grace_seconds)
    facts = {
        "dry_run": args.dry_run,
        "freed_bytes": done.freed_bytes,
        "snapshots": list(done.snapshots),
        "objects": done.num_objects,
        "kept": dict(done.kept),
        "unfinished_bytes": done.unfinished_bytes,
    }
    _tell(args, facts, _collected_text(done, args.dry_run))
    return 0


def _collected_text(done: Collected, is_dry: bool) -> str:
    lines = [f"{'would go' if is_dry else 'gone'}: {snapshot}" for snapshot in done.snapshots]
    kept = ", ".join(f"{count} {name}" for name, count in done.kept.items())
    lines.append(f"snapshots kept: {kept}")
    if done.unfinished_bytes:
        lines.append(f"unfinished work: {done.unfinished_bytes:,} bytes, left alone")
    verb = "would free at least" if is_dry else "freed"
    lines.append(
        f"{verb} {done.freed_bytes:,} bytes: {len(done.snapshots)} snapshots, {done.num_objects} objects"
    )
    if is_dry:
        lines.append("next: mansard collect")
    return "\n".join(lines)


def _store(args: argparse.Namespace) -> Store:
    return Store.of(load_site(find_site(args.site)))


def _tell(args: argparse.Namespace, facts: dict[str, object], text: str) -> None:
    if args.json:
        print(json.dumps({"format": 1, **facts}))
    else:
        show(text)
