"""How an upgrade, adoption or judgement ended: what the command prints and Prefect shows."""

from dataclasses import dataclass

from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows.stack import urls
from mansard.evaluation.published import write_report
from mansard.records import Derivation, Registration
from tasks import tracking
from tasks.derivation import Work
from tasks.reports import SuiteResult, results_of


@dataclass(frozen=True, slots=True)
class Outcome:
    """`derivations` in the order they ran; `report` and `chart` are files; `urls` name pages to open."""

    model_name: str
    version: int
    verdict: str
    registration: Registration
    derivations: tuple[Derivation, ...]
    suites: tuple[SuiteResult, ...]
    report: str
    chart: str
    urls: dict[str, str]


def outcome_of(
    work: Work, version: int, registration: Registration, derivations: tuple[Derivation, ...]
) -> Outcome:
    report = write_report(work.store, registration, version, work.site.reports)
    pages = {**urls(work.site), "run": tracking.run_url(work.run)}
    page = url_for("flow-run", obj_id=flow_run.id) if flow_run.id else None
    if page is not None:
        pages["flow"] = page
    return Outcome(
        model_name=registration.model_name,
        version=version,
        verdict=registration.verdict,
        registration=registration,
        derivations=derivations,
        suites=results_of(work.store, registration.verdict_record),
        report=str(report / "report.html"),
        chart=str(report / "chart.png"),
        urls=pages,
    )
