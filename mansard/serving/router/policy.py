"""What the router lets through, and by which key: pure rules on one request's head.

Guarantees: only the paths of ALLOWED reach an engine, compared byte by byte as the client wrote them (no decoding, no
normalisation, so `//`, `%2e` and absolute URIs match nothing). Not covered: who is resident (split.py), who may ask
(keys.py), how often (rates.py).
"""

import ipaddress
import json
from collections.abc import Iterable, Mapping

from mansard.errors import MansardError
from mansard.serving.router.user_field import model_of, user_of

ALLOWED = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/models": "GET",
    "/health": "GET",
}

VERSION_HEADER = "x-mansard-version"
OPERATOR_HEADER = "x-mansard-operator"
"""One of the site's operator_tokens: while a canary runs only its holders are told versions, and pin one."""
MODEL_HEADER = "x-mansard-model"
SERVED_NAME_HEADER = "x-mansard-served-name"
"""To an engine with slots: which branch to ask, whatever model the body names (infra/vllm-plugin). A client's own is
not passed on."""
STICKY_HEADERS = ("x-mansard-session", "x-user-id")

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    b" transfer-encoding upgrade".split()
)
_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"authorization", b"cookie"}
_OWN_PREFIX = b"x-mansard-"


class Refused(MansardError):
    """The router's own answer to a request that no engine answers. `kind` is OpenAI's error type."""

    def __init__(self, status: int, kind: str, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        self.body = error_body(kind, message, status)


def error_body(kind: str, message: str, code: int) -> bytes:
    """An error as the OpenAI API writes it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def check_path(method: str, target: str) -> str:
    """The allowed path of a request target; its query is not part of it and goes no further."""
    path = target.partition("?")[0]
    wanted = ALLOWED.get(path)
    if wanted is None:
        raise Refused(404, "not_found_error", f"no such path; known: {', '.join(ALLOWED)}")
    if method != wanted:
        raise Refused(405, "invalid_request_error", f"{path} takes {wanted}, not {method[:20]}")
    return path


def sticky_key(tenant: str | None, headers: Mapping[str, str], body: bytes, address: str) -> str:
    """What ties a user to a version: the session header, else the user header, else the body's `user` (the same user as
    in that header), within the tenant when keys are on.

    Without any of them: the tenant, or where nobody needs a key the client's address without its port.
    """
    for name in STICKY_HEADERS:
        value = headers.get(name)
        if value:
            return f"{tenant or ''}/{name}/{value}"
    user = user_of(body)
    if user:
        return f"{tenant or ''}/{STICKY_HEADERS[-1]}/{user}"
    return f"tenant/{tenant}" if tenant is not None else f"address/{address}"


def tenant_key(tenant: str | None, address: str) -> str:
    """Whose observations are one's: the tenant's, or where nobody needs a key the address's. Who has one address of
    IPv6 has all of its /64."""
    if tenant is not None:
        return f"tenant/{tenant}"
    if ":" not in address:
        return f"address/{address}"
    try:
        whole = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return f"address/{address}"
    return f"address/{whole.ipv4_mapped or int(whole) >> 64}"


def pinned_version(headers: Mapping[str, str]) -> int | None:
    """The version that a tester asks for."""
    text = headers.get(VERSION_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise Refused(400, "invalid_request_error", f"{VERSION_HEADER}: {text[:40]!r} is not a version number")
    return int(text)


PARSED_BYTES = 64 * 1024
"""A larger body is not parsed: a megabyte would hold up everybody for 10 ms and more."""


async def model_named(models: Iterable[str], body: bytes) -> str:
    """The only model, without a look at the body; of several, the one that the body's `model` names."""
    known = list(models)
    if len(known) == 1:
        return known[0]
    if not known:
        raise Refused(503, "service_unavailable", "no model is released yet", retry_after_seconds=5)
    name = await model_of(body) if len(body) > PARSED_BYTES else _parsed_model(body)
    if not isinstance(name, str) or name not in known:
        raise Refused(404, "not_found_error", f"model {str(name)[:80]!r} does not exist; known: {', '.join(known)}")
    return name


def _parsed_model(body: bytes) -> object:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_request_error", f"the body is not JSON: {str(error)[:100]}") from error
    return tree.get("model") if isinstance(tree, dict) else None


def asked_by_name(payload: bytes, model: str, served_name: str) -> bytes:
    """The request for an engine where the version has another name than the model."""
    if served_name == model:
        return payload
    line, _, rest = payload.partition(b"\r\n")
    return b"%b\r\n%b: %b\r\n%b" % (line, SERVED_NAME_HEADER.encode(), served_name.encode(), rest)


def engine_request(path: str, method: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """The request as an engine gets it: a new head, framed by length, without hop-by-hop headers and credentials.

    An engine never sees the client's framing, so there is nothing to smuggle a second request in.
    """
    kept = list(headers)
    listed = {t.strip() for name, value in kept if name.lower() == b"connection" for t in value.lower().split(b",")}
    lines = [f"{method} {path} HTTP/1.1".encode(), b"host: engine"]
    for name, value in kept:
        low = name.lower()
        if low not in _NOT_FORWARDED and low not in listed and not low.startswith(_OWN_PREFIX):
            lines.append(low + b": " + value)
    lines.append(b"content-length: %d" % len(body))
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1 or b"\0" in head:
        raise Refused(400, "invalid_request_error", "a header holds a control character")
    return head + b"\r\n\r\n" + body
