"""The report in a real Chromium: both colour schemes, a phone, contrast, and nothing asked of anybody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.report import write_report
from tests.chromium import Page, a_page
from tests.test_verify import a_video, hash_near, place
from tests.tiny_dataset import make_dataset

pytestmark = pytest.mark.slow

LONG = "a/very/long/" + "name-without-a-break" * 8 + ".mp4"

CONTRAST = """(() => {
  const parse = text => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const light = ([r, g, b]) => {
    const f = x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour[3] === 1) return colour;
      if (colour[3] !== 0) throw new Error("a background that is half transparent");
    }
    return [255, 255, 255, 1];
  };
  const out = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), node = walk.currentNode.parentElement;
    if (!text || !node.getClientRects().length || node.closest("svg")) continue;
    const a = light(parse(getComputedStyle(node).color)), b = light(behind(node));
    out.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text.slice(0, 40)]);
  }
  return out.sort((p, q) => p[0] - q[0]);
})()"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pages that have every section: splits with quarantine and long names; pairs, leaks and a damaged bag."""
    folder = tmp_path_factory.mktemp("reports")
    lost = {f"lost/{LONG}": ("unreadable", "FFmpeg says " + "no" * 90), "lost/b.mp4": ("no_face", "no face")}
    counts = {"train": {"happy": 8, "fear": 2}, "val": {"happy": 1}, "test": {"happy": 3, "fear": 1}}
    first = make_dataset(folder / "one", counts, 0, prefix=f"{LONG}/", quarantined=lost)
    sides = [("a", "train"), ("b", "test"), (LONG, "val")]
    second = place(folder / "two", [(a_video(name, split, subject="s"), hash_near(1)) for name, split in sides])
    second.delete(next(e.key for e in second.list("shards/val")))
    pages = []
    for name, url in (("one", first), ("two", second.root)):
        pages.append(folder / f"{name}.html")
        pages[-1].write_bytes(write_report(url))
    return pages


def test_both_schemes_are_readable_and_silent(reports: list[Path], tmp_path: Path) -> None:
    """WCAG AA: 4.5 to 1 for every piece of text; light paper by day, dark by night; no message, no request."""
    with a_page(tmp_path) as page:
        for file in reports:
            paper = {scheme: _look(page, file, scheme) for scheme in ("light", "dark")}
            assert paper["light"] > 200
            assert paper["dark"] < 60
        assert page.said == []


def _look(page: Page, file: Path, scheme: str) -> float:
    """Check the contrast of all text; returns the brightness of the page's corner, 0 to 255."""
    page.open(file, 1280, scheme)
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 50
    assert [c for c in contrasts if c[0] < 4.5] == []
    return float(np.mean(page.screenshot()[:4, :4]))


WIDE = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_scrolls_sideways(reports: list[Path], tmp_path: Path, width: int) -> None:
    """Long names break; wide tables scroll in a frame of their own."""
    with a_page(tmp_path) as page:
        for file in reports:
            page.open(file, width)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(WIDE) == []


def test_pictures_are_shown_and_scripts_would_not_run(reports: list[Path], tmp_path: Path) -> None:
    """Every picture has decoded; a script that somebody slipped in is stopped by the page's own policy."""
    with a_page(tmp_path) as page:
        page.open(reports[0])
        sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
        assert len(sizes) == 4 * (6 + 3)
        assert all(complete and side > 0 for complete, side in sizes)
        evil = tmp_path / "evil.html"
        slipped = "<body><script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png'>"
        evil.write_text(reports[0].read_text().replace("<body>", slipped))
        page.open(evil)
        assert page.evaluate("document.title") != "run"
        assert any("Content Security Policy" in said for said in page.said)
