"""The journal's signed tip in MLflow, read with the standard library, so that `mansard verify` need not load mlflow.

The mirror writes it (registry.py), as a tag of each registered model.
"""

import http.client
import json
import urllib.parse

from mansard.page_password import authorization
from mansard.release.tip import Tip, parse_tip
from mansard.site import Site

TAG = "mansard_tip"
TIMEOUT_SECONDS = 5.0


def published_tips(site: Site) -> dict[str, Tip]:
    """Where it was found -> tip; models that MLflow does not know yet are left out.

    Raises OSError or HTTPException where MLflow does not answer, Corrupt for a tag that is no tip.
    """
    found = {}
    for model in site.models:
        text = _tag(site, model)
        if text is not None:
            where = f"MLflow's model {model}"
            found[where] = parse_tip(text.encode(), where)
    return found


def _tag(site: Site, model: str) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", site.ports.mlflow, timeout=TIMEOUT_SECONDS)
    try:
        name = urllib.parse.quote(model, safe="")
        connection.request("GET", f"/api/2.0/mlflow/registered-models/get?name={name}", headers=authorization(site))
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status == 404:
        return None
    if answer.status != 200:
        raise http.client.HTTPException(f"MLflow answered {answer.status}")
    try:
        tags = json.loads(body)["registered_model"].get("tags", [])
        return next((str(tag["value"]) for tag in tags if tag["key"] == TAG), None)
    except (ValueError, KeyError, TypeError) as error:
        raise http.client.HTTPException(f"MLflow's answer has no registered model: {error!r}") from error
