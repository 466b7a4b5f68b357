"""HAProxy's configuration for a site, from infra/haproxy/haproxy.cfg."""

import os
import string
from pathlib import Path

from mansard.errors import BadInput
from mansard.serving.router.keys import KeyFile
from mansard.serving.router.public import Limits
from mansard.serving.router.user_field import MAX_USER_BYTES
from mansard.site import Site

SOCKET_PATH_BYTES = 97
"""HAProxy's own limit; the system's is ten more."""
TEMPLATE = Path(__file__).resolve().parents[3] / "infra/haproxy/haproxy.cfg"


def runtime_socket(site: Site) -> Path:
    return site.run / "haproxy.sock"


def routes_file(site: Site) -> Path:
    """HAProxy reads it at its start and knows the map by this name; after that it lives in HAProxy."""
    return site.run / "haproxy-routes.map"


def salt_file(site: Site) -> Path:
    """A map of text: HAProxy takes the other one's values for numbers."""
    return site.run / "haproxy-salt.map"


def log_socket(site: Site) -> Path:
    return site.run / "haproxy-log.sock"


def config_text(site: Site, port: int) -> str:
    """The whole file. BadInput for a site of several models (HAProxy does not look into bodies to choose one), or for a
    home whose path is too long for HAProxy's sockets."""
    if len(site.models) != 1:
        raise BadInput(f"{site.path}: router.plane haproxy serves one model, the site has {', '.join(site.models)}")
    too_many = len(os.fsencode(log_socket(site))) - SOCKET_PATH_BYTES
    if too_many > 0:
        raise BadInput(f"{site.path}: home {site.home}: {too_many} bytes too long for HAProxy's sockets; shorten it")
    values = {
        "socket": runtime_socket(site),
        "log": log_socket(site),
        "map": routes_file(site),
        "salt_map": salt_file(site),
        "threads": os.cpu_count() or 1,
        "port": port,
        "first_byte_seconds": site.router.first_byte_seconds,
        "body_bytes": Limits().body_bytes,
        "user_bytes": MAX_USER_BYTES,
        "model": site.models[0],
        "is_operator": _operator_condition(site),
    }
    return string.Template(TEMPLATE.read_text()).substitute(values)


def _operator_condition(site: Site) -> str:
    """HAProxy's words for who is told versions while a canary runs; tokens are read when HAProxy starts."""
    if site.router.show_version == "always":
        return "{ always_true }"
    tokens = None if site.operator_tokens is None else KeyFile(site.operator_tokens)
    if tokens is not None:
        tokens.read()
    digests = [] if tokens is None else tokens.digests()
    if not digests:
        return "{ always_false }"
    return "{ req.hdr(x-mansard-operator),sha2(256),hex,lower -m str " + " ".join(digests) + " }"
