"""Sections of a site file, as people write them. Standard library only."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback TCP ports. Engines take the first free one from `engines_from` up."""

    prefect: int = 4200
    mlflow: int = 5000
    router: int = 8000
    engines_from: int = 8100


@dataclass(frozen=True, slots=True)
class Environment:
    """An interpreter and the lock file that says which versions it holds."""

    python: Path
    lock: Path
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineSite:
    """How engines run here. `cores` lists one core set per slot, e.g. ["0", "1"]; empty lets vLLM choose.

    `kv_cache_gib` is an engine's KV cache on a CPU; `gpu_memory_gib` is all that one engine may take of a GPU: weights,
    activations, KV cache, CUDA context and graphs.

    `branch_slots`: so many carry-on branches of one base and shape are served by one engine; 0: each by its own.
    """

    environment: str = "serve"
    cores: tuple[str, ...] = ()
    kv_cache_gib: int = 1
    gpu_memory_gib: int | None = None
    start_timeout_seconds: int = 900
    arguments: tuple[str, ...] = ()
    branch_slots: int = 0


@dataclass(frozen=True, slots=True)
class TrainingSite:
    """Where training runs: in one process, or in `processes` ranks under the DeepSpeed configuration `deepspeed`.

    `launcher` are the words that start the ranks (torchrun's, with nodes and rendezvous; none: torchrun on this
    machine); a rank that says nothing for `hang_seconds` hangs.
    """

    processes: int = 1
    deepspeed: Path | None = None
    launcher: tuple[str, ...] = ()
    hang_seconds: int = 1800


@dataclass(frozen=True, slots=True)
class RouterSite:
    """`plane` is `workers` (Mansard's own, so many processes on one socket) or `haproxy`.

    An engine that gives no first byte for `first_byte_seconds`, or after it makes no progress for `silent_seconds`, has
    failed; an answer that is not streamed has its first byte when all of it is generated.

    `show_version`: to whom answers name their version, and who may pin one, while a canary runs: `operators` (who send
    one of the site's operator_tokens) or `always`.
    """

    plane: str = "workers"
    workers: int = 2
    first_byte_seconds: int = 300
    silent_seconds: int = 60
    show_version: str = "operators"


@dataclass(frozen=True, slots=True)
class Person:
    """`public_key` is the key itself (64 hex digits, raw Ed25519) or the path of a file that holds it.

    The key counts from `valid_from` to just before `valid_until`, and never once `revoked` says why it does not.
    """

    roles: tuple[str, ...]
    public_key: str
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    revoked: str = ""


@dataclass(frozen=True, slots=True)
class ApprovalPolicy:
    """So many different reviewers must approve a version, and so long an approval counts."""

    approvals: int = 1
    days: int = 30


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cron line on which the upgrade of `spec` runs, signed by the service key of `author`."""

    name: str
    spec: Path
    cron: str
    author: str


@dataclass(frozen=True, slots=True)
class InferenceNode:
    """A vLLM engine that gives states away for carry-ons: http://HOST:PORT, and its served name.

    `kind` is `pooling` (an engine in pooling mode) or `serving` (one that serves users, with the plugin's connector).
    `quantization` is the method that it must serve (`quant_method` of a checkpoint's config.json: awq,
    compressed-tensors, fp8; none: weights as they were trained). Left out, a node that says its own is held to the
    base's.
    """

    endpoint: str
    served_name: str
    kind: str = "pooling"
    quantization: str | None = None
