"""The report: right numbers, self-contained, hostile names harmless, damage said."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.codec import encode_jpeg
from pipeline.contract import FOLDS, canonical_json, digest
from pipeline.crop import CropRecord
from pipeline.dataset import open_dataset
from pipeline.forget import forget
from pipeline.histograms import BINS, HEIGHT, MEASURES, WIDTH, histogram
from pipeline.report import BAGS_PER_CLASS, MAX_SUSPECTS, write_report
from pipeline.shards import write_members
from pipeline.storage import LocalStore
from tests.test_verify import a_video, edit_version, hash_near, place
from tests.tiny_dataset import make_dataset

HOSTILE = "<script>alert('x')</script>\"onerror=\"x"
COUNTS = {"train": {"happy": 8, "fear": 2}, "test": {"happy": 3, "fear": 1}}


class Page(HTMLParser):
    """Tags, attributes and the cells of each table."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def url(tmp_path: Path) -> str:
    lost = {f"{HOSTILE}/lost.mp4": ("unreadable", "FFmpeg says <b>no</b>")}
    return make_dataset(tmp_path, COUNTS, 0, prefix=f"{HOSTILE}/", quarantined=lost)


def test_hostile_names_stay_text(url: str) -> None:
    data = write_report(url)
    page = Page(data)
    assert not page.of("script")
    assert not page.of("b")
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
    assert HOSTILE in "".join(page.text)
    assert any(HOSTILE in str(img["alt"]) for img in page.of("img"))


def test_nothing_is_loaded_from_elsewhere(url: str) -> None:
    data = write_report(url)
    page = Page(data)
    images = page.of("img")
    assert len(images) == (BAGS_PER_CLASS + 3) * 4  # happy has more bags than are shown, fear has three
    assert all(str(img["src"]).startswith("data:image/jpeg;base64,") and img["alt"] for img in images)
    assert not page.of("link")
    assert all(str(a["href"]).startswith("#") for a in page.of("a"))
    assert b"://" not in re.sub(rb"[A-Za-z0-9+/=]{200,}", b"", data)
    assert b"url(" not in data
    assert b"default-src 'none'" in data


def test_numbers_are_those_of_the_version(url: str) -> None:
    data = write_report(url)
    text = data.decode()
    assert "Imbalance of train: 4.0 (happy 8, fear 2)." in text
    assert '<th scope="row">happy</th><td class="n">8</td><td class="n">3</td><td class="n">11</td>' in text
    assert '<th scope="row">Total</th><td class="n">10</td><td class="n">4</td><td class="n">14</td>' in text
    assert "1 unreadable." in text
    assert open_dataset(url).sha256 in text


def test_it_can_be_read_without_eyes_and_at_night(url: str) -> None:
    data = write_report(url)
    page = Page(data)
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("caption")) == len(page.of("table")) == 4
    assert all(svg["role"] == "img" and "median" in str(svg["aria-label"]) for svg in page.of("svg"))
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {str(a["href"])[1:] for a in page.of("a")} <= targets
    assert all(th.get("scope") in ("row", "col") for th in page.of("th"))
    assert b"prefers-color-scheme: dark" in data
    assert "width=device-width" in str([m.get("content") for m in page.of("meta")])


def test_same_version_same_bytes(url: str) -> None:
    first = write_report(url)
    forget(url, subjects=["s0"])
    assert write_report(url, 1) == first
    newer = write_report(url)
    assert newer != first
    assert b"Forgotten" in newer


def test_a_damaged_or_missing_shard_is_said_on_the_page(url: str) -> None:
    store = LocalStore(url)
    shards = {s["label"]: s for s in open_dataset(url).body["shards"] if s["split"] == "train"}
    data = store.get(shards["happy"]["path"])
    store.put(shards["happy"]["path"], data.replace(b"\xff\xd9", b"\xff\xd8"))
    store.delete(shards["fear"]["path"])
    store.delete(open_dataset(url).body["quarantine"]["path"])
    text = write_report(url).decode()
    assert "not the ones that were written" in text
    assert "Its shard is missing" in text
    assert "The list cannot be shown" in text


def test_a_class_without_train_bags_is_said(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, {"train": {"happy": 2}, "test": {"fear": 1}}, 0)
    assert "No bag in train for: fear." in write_report(url).decode()


def test_an_unlabelled_dataset_has_a_page(tmp_path: Path) -> None:
    text = write_report(make_dataset(tmp_path, {"test": {"unlabelled": 2}}, 0)).decode()
    assert "There is no train split." in text
    assert text.count("<img") == 8


MEASURE = {measure.column: measure for measure in MEASURES}


def test_a_histogram_counts_every_bag_once() -> None:
    values = np.random.default_rng(0).gamma(9, 14, 1000)
    chart = histogram(pa.chunked_array([values]), MEASURE["face_px"])
    assert chart is not None
    assert sum(int(bar.words.split()[0]) for bar in chart.bars) == 1000
    assert max(bar.height for bar in chart.bars) == HEIGHT
    assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH and bar.y >= 0 for bar in chart.bars)
    assert chart.numbers[2] == f"{np.median(values):.0f}"
    assert chart.missing == 0


def test_what_was_not_measured_is_left_out_and_counted() -> None:
    yaw = histogram(pa.chunked_array([pa.array([0.5, None, -0.5, None, 0.0])]), MEASURE["yaw"])
    assert yaw is not None
    assert (yaw.missing, yaw.numbers, yaw.low, yaw.high) == (2, ("-0.5", "-0.25", "0", "0.25", "0.5"), "-1", "1")
    face = histogram(pa.chunked_array([[0.0, 0.0, 50.0]]), MEASURE["face_px"])
    assert face is not None
    assert face.missing == 2
    assert histogram(pa.chunked_array([[0.0, 0.0]]), MEASURE["face_px"]) is None
    assert histogram(pa.chunked_array([pa.array([], pa.float64())]), MEASURE["seconds"]) is None


def test_one_long_clip_does_not_flatten_the_chart() -> None:
    chart = histogram(pa.chunked_array([[*np.linspace(1, 3, 499), 900.0]]), MEASURE["seconds"])
    assert chart is not None
    assert chart.high == "3 and more"
    assert chart.numbers[4] == "900"
    assert len(chart.bars) > BINS / 2
    assert "and more" in chart.bars[-1].words


@pytest.mark.parametrize("value", [0.0, 1.0, -0.4, 12345.678])
def test_equal_values_have_a_chart(value: float) -> None:
    for measure in MEASURES:
        chart = histogram(pa.chunked_array([[value] * 3]), measure)
        assert chart is None or len(chart.bars) == 1


def test_pairs_that_look_alike_are_shown_side_by_side(tmp_path: Path) -> None:
    videos = [
        (a_video(f"{HOSTILE}{n}", ("train", "test")[n % 2]), hash_near(n // 2)) for n in range(2 * MAX_SUSPECTS + 4)
    ]
    data = write_report(place(tmp_path, videos).root)
    text = data.decode()
    assert text.count('class="pair"') == MAX_SUSPECTS
    assert "2 more pairs are named by" in text
    assert not Page(data).of("script")
    assert "one clip in two files" in text


def test_leaks_are_on_the_page(tmp_path: Path) -> None:
    videos = [(a_video(n, FOLDS, fold=k, subject="s7"), "") for n, k in (("a", 1), ("b", 10), ("c", 2))]
    text = write_report(place(tmp_path, videos).root).decode()
    assert "the subject &#39;s7&#39; is in fold-1 and fold-10 and fold-2 (3 bags)." in text
    heads = re.findall(r'<th scope="col" class="n">(fold-\d+)</th>', text)
    assert heads == ["fold-1", "fold-2", "fold-10"]
    assert "Imbalance of all folds together" in text or "No bag in all folds together for: sad" in text


def test_layout_of_the_source_is_on_the_page(url: str) -> None:
    edit_version(
        LocalStore(url), lambda body: body.update(source={"kind": "folder", "layout": "One <folder> a class."})
    )
    text = write_report(url).decode()
    assert "<li>One &lt;folder&gt; a class.</li>" in text


def test_quarantined_videos_have_their_picture(tmp_path: Path) -> None:
    """Lines name their crop; what it holds is shown if it is a JPEG, and nothing else is."""
    grey = encode_jpeg(np.full((64, 64, 3), 90, np.uint8), 80)
    thumbs = {"good.mp4": grey, "none.mp4": None, "bad.mp4": b"<svg onload=alert(1)>"}
    lost = dict.fromkeys((*thumbs, "gone.mp4"), ("no_face", "no face"))
    store = LocalStore(make_dataset(tmp_path, {"train": {"happy": 1}}, 0, quarantined=lost))
    name_objects(store)
    for name, thumb in thumbs.items():
        record = CropRecord(video=name, object=name, reason="no_face").to_json().encode()
        members = [("record.json", record), *([("thumb.jpg", thumb)] if thumb else [])]
        store.put(name, write_members(members) + b"\0" * 1024)
    page = Page(write_report(store.root))
    assert [img["alt"] for img in page.of("img") if "A frame of" in str(img["alt"])] == ["A frame of good.mp4"]


def name_objects(store: LocalStore) -> None:
    """Give each line of the quarantine list its video's name as `object`."""

    def change(body: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in store.get(body["quarantine"]["path"]).decode().splitlines()]
        data = "".join(canonical_json({**line, "object": line["video"]}) + "\n" for line in lines).encode()
        store.put(path := f"quarantine/{digest(data)[:32]}.jsonl", data)
        body["quarantine"] = {"path": path, "sha256": digest(data)}

    edit_version(store, change)
