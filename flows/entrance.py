"""`python -m flows.entrance prefect|mlflow --site FILE`: Prefect's or MLflow's server behind one entrance.

Guarantees: a request reaches the server only with a loopback name as Host (against DNS rebinding), without an Origin or
with the server's own, and with the site's password (HTTP Basic) on every path but the health check. Cookies count for
nothing. Prefect's websockets authenticate in their first message, by its own auth string; Host and Origin count there
too. Not covered: TLS; both listen on loopback only.
"""

import argparse
import hmac
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mansard.page_password import authorization, login
from mansard.site import Site, load_site

LOOPBACK = "127.0.0.1"
HOSTS = [LOOPBACK, "localhost"]
SHUTDOWN_SECONDS = 10


class Entrance:
    """An ASGI app around another. `header` is the Authorization that is expected; None lets everybody in."""

    def __init__(self, app: ASGIApp, header: str | None, health_path: str) -> None:
        self.app = app
        self.header = header
        self.health_path = health_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if is_foreign(scope, headers):
            refusal = PlainTextResponse("a page of another origin may not ask here\n", 403)
        elif scope["type"] == "http" and not self._is_authorized(scope, headers):
            challenge = {"WWW-Authenticate": 'Basic realm="mansard", charset="UTF-8"'}
            refusal = PlainTextResponse("user and password: mansard status names their file\n", 401, challenge)
        else:
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal(scope, receive, send)

    def _is_authorized(self, scope: Scope, headers: Headers) -> bool:
        if self.header is None or (scope["path"] == self.health_path and scope["method"] == "GET"):
            return True
        sent_headers = headers.getlist("authorization")
        return len(sent_headers) == 1 and hmac.compare_digest(sent_headers[0].encode(), self.header.encode())


def is_foreign(scope: Scope, headers: Headers) -> bool:
    """Whether a browser says that a page of another origin sent the request; following a link to a page is none."""
    own = f"http://{headers.get('host', '')}"
    if any(origin != own for origin in headers.getlist("origin")):
        return True
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return not (is_link and scope.get("method") == "GET")


def guard(app: ASGIApp, site: Site, health_path: str) -> ASGIApp:
    """`app` behind the site's entrance."""
    entrance = Entrance(app, authorization(site).get("Authorization"), health_path)
    return TrustedHostMiddleware(entrance, HOSTS, www_redirect=False)


def prefect_app(site: Site) -> ASGIApp:
    """Prefect's server, its services included. Its own authentication is on as well: websockets need it."""
    os.environ.update(
        {
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{site.ports.prefect}",
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
            "PREFECT_SERVER_API_HOST": LOOPBACK,
            "PREFECT_SERVER_API_PORT": str(site.ports.prefect),
            "PREFECT_UI_API_URL": "/api",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        }
    )
    pair = login(site)
    if pair is not None:
        os.environ.update({"PREFECT_SERVER_API_AUTH_STRING": pair, "PREFECT_API_AUTH_STRING": pair})
    from prefect.server.api.server import create_app  # Prefect reads its settings when it is imported

    return guard(create_app(final=True), site, "/api/health")


def mlflow_app(site: Site) -> ASGIApp:
    """MLflow's tracking server with its artifacts, as `mlflow server --serve-artifacts` sets it up."""
    from mlflow.server import constants

    database = f"sqlite:///{site.home / 'mlflow' / 'mlflow.sqlite3'}"
    artifact_root = "mlflow-artifacts:/"
    os.environ.update(
        {
            constants.BACKEND_STORE_URI_ENV_VAR: database,
            constants.REGISTRY_STORE_URI_ENV_VAR: database,
            constants.ARTIFACT_ROOT_ENV_VAR: artifact_root,
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
            constants.ARTIFACTS_DESTINATION_ENV_VAR: (site.home / "mlflow" / "artifacts").as_uri(),
            "_MLFLOW_SGI_NAME": "uvicorn",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{site.ports.mlflow}",
        }
    )
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(database, database, artifact_root)
    from mlflow.server.fastapi_app import app

    return guard(app, site, "/health")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.entrance", description=__doc__)
    parser.add_argument("server", choices=("prefect", "mlflow"))
    parser.add_argument("--site", required=True, type=Path)
    args = parser.parse_args(arguments)
    site = load_site(args.site)
    app, port = (prefect_app, site.ports.prefect) if args.server == "prefect" else (mlflow_app, site.ports.mlflow)
    uvicorn.run(
        app(site), host=LOOPBACK, port=port, access_log=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
