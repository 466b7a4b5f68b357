"""What a site file may not say, beyond keys and types: BadInput names file, key and value, and what would be right."""

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mansard.errors import BadInput

if TYPE_CHECKING:
    from mansard.site import Site

ROUTER_PLANES = ("workers", "haproxy")
SHOW_VERSION = ("operators", "always")
NODE_KINDS = ("pooling", "serving")
NODE_QUANTIZATIONS = ("awq", "compressed-tensors", "fp8", "none")
WHEN_STABLE_IS_DEAD = ("wait", "previous")
ROLES = ("author", "reviewer", "operator")
LEAST_GPU_GIB = 3
"""Half of it is the CUDA context and captured graphs."""
RESERVED_NAMES = ("host",)
"""Not for people: what the journal says where the host itself decided."""


def check(site: "Site") -> None:
    if "default" not in site.stages:
        raise BadInput(f"{site.path}: stages.default: name the environment that runs stages")
    for stage, name in [*site.stages.items(), ("engine", site.engine.environment)]:
        if name not in site.environments:
            known = ", ".join(site.environments)
            raise BadInput(f"{site.path}: {stage}: environment {name!r} is not one of: {known}")
    if site.training.processes < 1:
        raise BadInput(f"{site.path}: training.processes: {site.training.processes} is not a number from 1 up")
    if site.training.processes > 1 and site.training.deepspeed is None:
        raise BadInput(f"{site.path}: training.deepspeed: {site.training.processes} processes need a DeepSpeed "
                       "configuration, e.g. ../deepspeed/zero2.json")  # fmt: skip
    _check_people(site)
    if site.journal_url:
        _check_journal(site)
    if site.when_stable_is_dead not in WHEN_STABLE_IS_DEAD:
        raise BadInput(f"{site.path}: when_stable_is_dead: {site.when_stable_is_dead!r} is not one of "
                       f"{', '.join(WHEN_STABLE_IS_DEAD)}")  # fmt: skip
    if site.router.plane not in ROUTER_PLANES:
        raise BadInput(f"{site.path}: router.plane: {site.router.plane!r} is not one of {', '.join(ROUTER_PLANES)}")
    if site.router.show_version not in SHOW_VERSION:
        raise BadInput(f"{site.path}: router.show_version: {site.router.show_version!r} is not one of "
                       f"{', '.join(SHOW_VERSION)}")  # fmt: skip
    _check_engine(site)
    if site.engine.branch_slots < 0:
        raise BadInput(f"{site.path}: engine.branch_slots: {site.engine.branch_slots} is not a number from 0 up")
    if site.engine.branch_slots and site.router.plane != "workers":
        raise BadInput(f"{site.path}: engine.branch_slots: {site.router.plane} cannot tell an engine which branch is "
                       "asked; take router.plane workers, or engine.branch_slots 0")  # fmt: skip
    if site.router.workers < 1:
        raise BadInput(f"{site.path}: router.workers: {site.router.workers} is not a number from 1 up")
    for node in site.nodes:
        if node.kind not in NODE_KINDS:
            raise BadInput(f"{site.path}: nodes: kind {node.kind!r} is not one of {', '.join(NODE_KINDS)}")
        if node.quantization is not None and node.quantization not in NODE_QUANTIZATIONS:
            raise BadInput(f"{site.path}: nodes: quantization {node.quantization!r} is not one of "
                           f"{', '.join(NODE_QUANTIZATIONS)}")  # fmt: skip
    if not site.models:
        raise BadInput(f"{site.path}: models: name at least one model")
    if site.store_url is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^/\s]+)*/?", site.store_url):
        raise BadInput(f"{site.path}: store: {site.store_url!r} is not of the form s3://BUCKET or s3://BUCKET/PREFIX")


def _check_engine(site: "Site") -> None:
    where = f"{site.path}: engine"
    gib = site.engine.gpu_memory_gib
    if gib is not None and gib < LEAST_GPU_GIB:
        raise BadInput(f"{where}.gpu_memory_gib: {gib} is not a number from {LEAST_GPU_GIB} up (GiB of the card that "
                       "one engine may take)")  # fmt: skip
    for argument in site.engine.arguments:
        if argument.partition("=")[0].replace("_", "-") == "--gpu-memory-utilization":
            raise BadInput(f"{where}.arguments: {argument} is a fraction of a card that engines share; take it out and "
                           "state engine.gpu_memory_gib, the GiB that one engine may take")  # fmt: skip


def _check_people(site: "Site") -> None:
    for name, person in site.people.items():
        where = f"{site.path}: people.{name}"
        if name in RESERVED_NAMES:
            raise BadInput(f"{where}: the journal names the host so; take another name")
        for role in person.roles:
            if role not in ROLES:
                raise BadInput(f"{where}.roles: {role!r} is not one of {', '.join(ROLES)}")
        begins, ends = person.valid_from, person.valid_until
        if begins is not None and ends is not None and begins >= ends:
            raise BadInput(f"{where}.valid_until: {ends} is not after valid_from {begins}")
    for key in ("approvals", "days"):
        if getattr(site.approval, key) < 1:
            raise BadInput(f"{site.path}: approval.{key}: {getattr(site.approval, key)} is less than 1")


def _check_journal(site: "Site") -> None:
    try:
        url = urlsplit(site.journal_url)
        is_known = url.scheme in ("postgresql", "postgres")
    except ValueError:  # a port that is no number, brackets that do not close
        is_known = False
    if not is_known:
        raise BadInput(
            f"{site.path}: journal: {site.journal_url!r} is not postgresql://USER@HOST/DATABASE; "
            "leave the key out for a file of SQLite under home"
        )
    if url.password is not None or "password" in url.query:
        raise BadInput(f"{site.path}: journal: a password in the URL; leave it out and set PGPASSWORD where it runs")
