"""A report that has everything in it, and its page."""

import pytest

from clip_pgs.evaluation.report.command import write_report
from support.reports import EVIL_NAME, Page, make_result, paper_results, save_results, save_run


@pytest.fixture(scope="session")
def scored(tmp_path_factory):
    """Three seeds on sets of their own; one of them also on some of the paper's, one set failed."""
    logs = tmp_path_factory.mktemp("logs")
    for number in range(3):
        save_run(logs, number)
    failed = make_result(
        "shape_grey",
        "robustness",
        status="failed",
        error="OSError: <cut> | off",
        samples=0,
        model="demo_1",
        weights_digest="d1",
    )
    save_results(logs / "demo_1/eval", [failed])
    save_results(logs / "cc12m", paper_results(model=EVIL_NAME))
    return logs


@pytest.fixture(scope="module")
def report(scored, tmp_path_factory):
    """The report on `scored`; its pictures, which take seconds to draw, are empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_pgs.plots.picture", lambda *_, **__: b"")
        return write_report([scored], tmp_path_factory.mktemp("out") / "report")


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "report.html").read_text())
