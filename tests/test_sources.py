"""Raw buckets -> Video rows: tables, folders, plain buckets; labels and splits."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import DFEW_LABELS, MicaclError, Video
from pipeline.sources import assign_split, choose_labels, list_videos, open_source
from pipeline.storage import LocalStore, open_store


@pytest.fixture
def raw(tmp_path: Path) -> LocalStore:
    store = LocalStore(str(tmp_path))
    for key in ("happy/a.mp4", "Sad /deep/b.MKV", "c.webm", "happy/notes.txt", "README.md"):
        store.put(key, key.encode())
    return store


def table(store: LocalStore, text: str, name: str = "t.csv") -> list[Video]:
    store.put(name, text.encode())
    return list_videos(store.url(name))


def parquet(store: LocalStore, columns: dict[str, Any]) -> list[Video]:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    store.put("t.parquet", out.getvalue())
    return list_videos(store.url("t.parquet"))


# Tables.


def test_a_table_says_what_it_knows(raw: LocalStore) -> None:
    videos = table(raw, "subject,path,label,split,score\ns1,happy/a.mp4,happy,test,3\n,c.webm,,,\n")
    c, a = videos
    assert (a.name, a.url, a.label, a.split, a.subject) == (
        "happy/a.mp4",
        raw.url("happy/a.mp4"),
        "happy",
        "test",
        "s1",
    )
    assert (c.name, c.label, c.split, c.subject) == ("c.webm", None, None, None)
    known = {e.key: e.fingerprint for e in raw.list()}
    assert (a.fingerprint, c.fingerprint) == (known["happy/a.mp4"], known["c.webm"])


def test_a_table_of_parquet_is_the_same(raw: LocalStore) -> None:
    columns = {
        "path": ["c.webm", "happy/a.mp4"],
        "label": [None, "happy"],
        "split": [None, "test"],
        "subject": [None, "s1"],
    }
    lines = "path,label,split,subject\nc.webm,,,\nhappy/a.mp4,happy,test,s1\n"
    assert parquet(raw, columns) == table(raw, lines)


def test_a_subject_that_looks_like_a_number_stays_text(raw: LocalStore) -> None:
    assert table(raw, "path,subject,label\nc.webm,007,1\n")[0].subject == "007"
    assert table(raw, "path,subject,label\nc.webm,007,1\n")[0].label == "1"


def test_a_number_of_parquet_becomes_text_or_an_error_in_words(raw: LocalStore) -> None:
    try:
        (video,) = parquet(raw, {"path": ["c.webm"], "subject": [7], "label": ["happy"]})
    except MicaclError:
        return
    assert video.subject == "7"
    assert assign_split(video, 0.5) in ("train", "test")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_paths(raw: LocalStore, kind: str) -> None:
    with pytest.raises(MicaclError, match=r"has the columns file, label.*path, label"):
        if kind == "csv":
            table(raw, "file,label\na,happy\n")
        else:
            parquet(raw, {"file": ["a"], "label": ["happy"]})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,label\nc.webm,happy\nx.mp4,sad\nc.webm,sad\n", r"lists 'c\.webm' twice"),
        ("path,split\nc.webm,train\nx.mp4,dev\n", r"line 3 has split 'dev'.*train, val, test"),
        ("path,label\nc.webm,happy\n,sad\n", "line 3 has an empty path"),
        ("path,label\nc.webm,happy,7\n", "CSV with a header"),
        ("", "CSV with a header"),
        ("path,label\n", "holds no video"),
    ],
)
def test_a_table_with_a_mistake(raw: LocalStore, text: str, match: str) -> None:
    with pytest.raises(MicaclError, match=match) as caught:
        table(raw, text)
    assert raw.url("t.csv") in str(caught.value)


def test_files_that_are_no_table(raw: LocalStore) -> None:
    with pytest.raises(MicaclError, match="or Parquet"):
        table(raw, "path\nc.webm\n", "t.parquet")
    raw.put("t.csv", b"path\n\xff\xfe\n")
    with pytest.raises(MicaclError, match=r"t\.csv"):
        list_videos(raw.url("t.csv"))
    with pytest.raises(MicaclError, match=r"none\.csv does not exist"):
        list_videos(raw.url("none.csv"))


def test_a_folder_is_no_table(raw: LocalStore) -> None:
    with pytest.raises(MicaclError):
        list_videos(raw.url("happy"), "table")


def test_a_listed_file_that_is_missing_is_kept(raw: LocalStore) -> None:
    (video,) = table(raw, "path,label\ngone.mp4,happy\n")
    assert (video.name, video.label, video.fingerprint) == ("gone.mp4", "happy", "")


def test_full_urls_and_absolute_paths_are_taken_as_they_are(raw: LocalStore) -> None:
    videos = table(raw, "path\ns3://b/x.mp4\n/data/y.mp4\n")
    assert [v.url for v in videos] == ["/data/y.mp4", "s3://b/x.mp4"]


def test_a_byte_order_mark_is_no_part_of_a_name(raw: LocalStore) -> None:
    raw.put("t.csv", b"\xef\xbb\xbfpath,label\r\nc.webm,happy\r\n")
    assert list_videos(raw.url("t.csv"))[0].label == "happy"


# Folders and buckets.


def test_a_folder_names_its_class(raw: LocalStore) -> None:
    assert [(v.name, v.label) for v in list_videos(raw.root)] == [
        ("Sad /deep/b.MKV", "sad"),
        ("c.webm", None),
        ("happy/a.mp4", "happy"),
    ]
    assert list_videos(raw.root) == list_videos(raw.root, "folder")


def test_a_bucket_has_no_labels(raw: LocalStore) -> None:
    videos = list_videos(raw.root, "bucket")
    assert [v.name for v in videos] == ["Sad /deep/b.MKV", "c.webm", "happy/a.mp4"]
    assert {v.label for v in videos} == {None}
    assert len({v.id for v in videos}) == 3
    assert [open_store(raw.root).get(v.name) for v in videos] == [v.name.encode() for v in videos]


def test_a_bucket_on_s3_lists_as_a_folder_does(raw: LocalStore, s3: Callable[[str], str]) -> None:
    url = s3("raw")
    for entry in raw.list():
        open_store(url).put(entry.key, raw.get(entry.key))
    there, here = list_videos(url), list_videos(raw.root)
    assert [(v.name, v.label, v.id) for v in there] == [(v.name, v.label, v.id) for v in here]
    assert all(v.url == f"{url}/{v.name}" and v.fingerprint for v in there)


def test_an_empty_bucket(s3: Callable[[str], str], tmp_path: Path) -> None:
    for url in (s3("empty"), str(tmp_path / "none")):
        with pytest.raises(MicaclError, match=r"holds no video.*extension"):
            list_videos(url)
    with pytest.raises(MicaclError, match="NoSuchBucket"):
        list_videos("s3://no-such-bucket")


def test_an_unknown_kind_of_source(raw: LocalStore) -> None:
    with pytest.raises(MicaclError, match=r"--source is 'tabel'.*auto, table, folder, bucket"):
        list_videos(raw.root, "tabel")


# Labels and splits.


def videos_of(*labels: str | None) -> list[Video]:
    return [Video(url="/x", name=f"{i}.mp4", label=label) for i, label in enumerate(labels)]


def test_the_label_set_is_dfews_unless_said() -> None:
    assert choose_labels(videos_of("sad", None), (), "t.csv") == DFEW_LABELS
    assert choose_labels(videos_of("b", "a"), ("b", "c", "a"), "t.csv") == ("b", "c", "a")
    assert choose_labels(videos_of("b", None, "a", "b"), ("auto",), "t.csv") == ("a", "b")


def test_an_unknown_label_is_said_with_the_nearest_names(raw: LocalStore) -> None:
    with pytest.raises(
        MicaclError, match=r"'hapy' in .*t\.csv.*Did you mean happy\?.*label set is happy, sad"
    ) as caught:
        choose_labels(videos_of("sad", "hapy"), (), "t.csv")
    assert "--labels" in str(caught.value)
    raw.put("t.csv", b"path,label\nc.webm,suprise\n")
    with pytest.raises(MicaclError, match="surprise"):
        open_source(raw.url("t.csv"), "auto", ())


def test_a_named_split_is_kept() -> None:
    for split in ("train", "val", "test"):
        assert assign_split(Video(url="", name="a", label="happy", split=split), 0.5) == split
    assert assign_split(Video(url="", name="a"), 0.0) == "test"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(subjects=st.lists(st.text(max_size=8), min_size=1, max_size=30), share=st.floats(0, 1))
def test_a_subject_is_in_one_split(subjects: list[str], share: float) -> None:
    splits = defaultdict(set)
    for i, subject in enumerate(subjects * 2):
        video = Video(url=f"/{i}", name=f"{i}.mp4", label=DFEW_LABELS[i % 7], subject=subject or None)
        splits[subject or i].add(assign_split(video, share))
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_about_the_share_is_held_out(share: float) -> None:
    videos = [Video(url="", name=f"{i}.mp4", label="happy", subject=f"s{i}") for i in range(2000)]
    held_out = [v for v in videos if assign_split(v, share) == "test"]
    assert abs(len(held_out) / 2000 - share) < 0.04  # 3.5 standard deviations at 0.5
    assert {v.name for v in videos if assign_split(v, share / 2) == "test"} <= {v.name for v in held_out}
