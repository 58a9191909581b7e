"""The report: right numbers, self-contained, hostile names harmless, damage said."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.dataset import open_dataset
from pipeline.forget import forget
from pipeline.report import BAGS_PER_CLASS, write_report
from pipeline.storage import LocalStore
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
    assert not page.of("a")
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
    assert len(page.of("caption")) == len(page.of("table")) == 3
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
