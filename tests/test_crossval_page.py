"""The page of a crossvalidation in a real Chromium: both colour schemes, a phone, contrast, and no request."""

from __future__ import annotations

from pathlib import Path

import pytest

from micacl.crossval import jobs_of, outcome_of
from micacl.crossval_page import to_html
from micacl.crossval_table import rows_of
from micacl.crossval_text import Report
from micacl.recipes import tiny_cpu
from tests.chromium import a_page
from tests.test_report_browser import WIDE, _look
from tests.tiny_evaluation import LABELS, SHA256, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven recipes (more than there are tones), one with a name that breaks nowhere, and a failed run."""
    folder = tmp_path_factory.mktemp("page")
    names = ["base", *(f"recipe-{i}" for i in range(5)), "a-recipe-of-a-very-long-name-that-breaks-nowhere"]
    jobs = jobs_of(dict.fromkeys(names, tiny_cpu()), [None], [0, 1], str(folder / "cv"))
    outcomes = []
    for number, job in enumerate(jobs):
        if number == len(jobs) - 2:
            outcomes.append(
                outcome_of(job, "The loss of step 3 is not finite on the clips " + "0123456789abcdef_0" * 9)
            )
            continue
        write_run(job, skill=1 + 0.2 * (number % len(names)), clips=range(60), maps=job.seed == 0)
        outcomes.append(outcome_of(job))
    data = {"url": "s3://bucket/" + "deep/" * 30 + "ds", "version": 3, "sha256": SHA256}
    made = Report(dataset=data, labels=LABELS, folds=(None,), seeds=(0, 1), outcomes=outcomes, rows=rows_of(outcomes))
    file = folder / "report.html"
    file.write_text(to_html(made))
    return file


def test_both_schemes_are_readable_and_silent(page_file: Path, tmp_path: Path) -> None:
    with a_page(tmp_path) as page:
        paper = {scheme: _look(page, page_file, scheme) for scheme in ("light", "dark")}
        assert paper["light"] > 200
        assert paper["dark"] < 60
        assert page.said == []
        assert page.evaluate("document.querySelectorAll('svg').length") == 2 + 3 * 14
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        # Pictures take the page's colours: the ink of a title in the dark is the page's.
        inks = "[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)"
        assert "rgb(0, 0, 0)" not in page.evaluate(inks)
        assert page.evaluate("getComputedStyle(document.body).color") in page.evaluate(inks)


@pytest.mark.parametrize("width", [360, 1280])
def test_no_width_scrolls_sideways(page_file: Path, tmp_path: Path, width: int) -> None:
    with a_page(tmp_path) as page:
        page.open(page_file, width)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        outside = page.evaluate(WIDE.replace('closest(".scroll")', 'closest(".scroll, .plot")'))
        assert outside == []
