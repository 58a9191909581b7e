"""Raw buckets -> Video rows: tables, folders, plain buckets; labels and splits."""

from __future__ import annotations

import dataclasses
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.contract import DFEW_LABELS, FOLDS, MicaclError, Video, canonical_json
from pipeline.sources import (
    assign_split,
    check_label,
    choose_labels,
    find_source,
    label_set,
    list_videos,
    open_source,
)
from pipeline.storage import Entry, LocalStore, open_store, split_url


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
    assert (a.fingerprint, c.fingerprint) == ("", "")  # the task that takes up a clip asks for it


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


def test_numbers_of_parquet_become_text(raw: LocalStore) -> None:
    columns = {"path": ["c.webm", "d.webm"], "subject": [7.0, None], "label": [3, 4], "fold": [1.0, 2.0]}
    c, d = parquet(raw, {**columns, "cropped": [True, None], "start_s": [1.5, None], "box": [[1, 2, 30.5, 4], None]})
    assert (c.subject, c.label, c.fold, c.cropped, c.start_s, c.box) == ("7", "3", 1, True, 1.5, (1.0, 2.0, 30.5, 4.0))
    assert (d.subject, d.label, d.fold, d.cropped, d.start_s, d.box) == (None, "4", 2, False, None, None)


def test_a_table_says_folds_scenes_parts_and_boxes(raw: LocalStore) -> None:
    a, b, c, d = table(
        raw,
        "path,fold,scene,cropped,start_s,end_s,box\n"
        "a.mp4,3,War,,,,\n"
        "a.mp4,1,,no,0,2.5,\n"
        'a.mp4,1,,,2.5,,"10,20,64,48"\n'
        "faces/00001/,2,,TRUE,,,\n",
    )
    assert (a.name, a.split, a.fold, a.scene, a.kind, a.cropped) == ("a.mp4", FOLDS, 3, "War", "video", False)
    assert (b.name, b.url, b.start_s, b.end_s) == ("a.mp4#0-2.5", raw.url("a.mp4"), 0.0, 2.5)
    assert (c.name, c.start_s, c.end_s, c.box) == ("a.mp4#2.5-,box=10,20,64,48", 2.5, None, (10.0, 20.0, 64.0, 48.0))
    assert (d.name, d.url, d.kind, d.cropped, d.fold) == ("faces/00001", raw.url("faces/00001"), "frames", True, 2)
    assert len({v.id for v in (a, b, c, d)}) == 4


def test_a_folder_of_images_is_told_by_its_name_or_the_column(raw: LocalStore) -> None:
    said = {v.name: v.kind for v in table(raw, "path,kind\nx,\ny.d/00001,\nz.v2/,\nw.v2,frames\nv,video\nu.mp4,\n")}
    assert said == {
        "x": "frames",
        "y.d/00001": "frames",
        "z.v2": "frames",
        "w.v2": "frames",
        "v": "video",
        "u.mp4": "video",
    }


def test_columns_that_are_not_used_are_said(raw: LocalStore) -> None:
    raw.put("t.csv", b"path,lable,clip_quality\nc.webm,sad,1\n")
    source = find_source(raw.url("t.csv"))
    assert source.notes == (
        "The column 'lable' is not used (did you mean label?).",
        "The column 'clip_quality' is not used.",
    )
    assert source.kind == "table"
    assert "with the columns path" in source.layout


def test_a_table_is_read_as_a_stream(raw: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table larger than what is read at once, and of the bucket around it nothing."""
    for name, data in {"t.csv": b"path\n" + b"".join(b"clips/%07d.mp4\n" % n for n in range(80_000))}.items():
        raw.put(name, data)
    asked: list[int] = []
    ranges = LocalStore.read_range
    monkeypatch.setattr(LocalStore, "read_range", lambda s, k, o, n: asked.append(n) or ranges(s, k, o, n))
    monkeypatch.setattr(LocalStore, "get", None)
    monkeypatch.setattr(LocalStore, "list", None)
    rows = find_source(raw.url("t.csv")).videos()
    assert next(rows).name == "clips/0000000.mp4"
    assert len(asked) < 4
    assert sum(1 for _ in rows) == 79_999
    assert max(asked) <= 2**20


def test_a_table_that_changes_meanwhile_is_refused(raw: LocalStore) -> None:
    raw.put("t.csv", b"path\n" + b"a.mp4\n" * 3)
    rows = find_source(raw.url("t.csv")).videos()
    next(rows)
    raw.put("t.csv", b"path\n" + b"b.mp4\n" * 4)
    with pytest.raises(MicaclError, match=r"t\.csv changed while it was read"):
        list(rows)


def test_a_table_on_s3(s3: Callable[[str], str]) -> None:
    store = open_store(s3("tables"))
    store.put("sub/t.csv", b"path,label,start_s,end_s\na.mp4,sad,0,1\na.mp4,sad,1,2\ns3://other/b.mp4,happy,,\n")
    out = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.mp4"] * 2, "start_s": [0, 1], "end_s": [1.0, 2.0]}), out)
    store.put("sub/t.parquet", out.getvalue())
    videos = list_videos(store.url("sub/t.csv"))
    assert [(v.name, v.url) for v in videos] == [
        ("a.mp4#0-1", store.url("sub/a.mp4")),
        ("a.mp4#1-2", store.url("sub/a.mp4")),
        ("s3://other/b.mp4", "s3://other/b.mp4"),
    ]
    assert [v.id for v in list_videos(store.url("sub/t.parquet"))] == [v.id for v in videos[:2]]


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["t.csv", "t.parquet"]),
    data=st.one_of(
        st.binary(max_size=80),
        st.lists(
            st.sampled_from(["path", "box", ",", "\n", "a.mp4", "1", "nan", '"', "\0", "-1", "\r", "é", "fold"])
        ).map(lambda words: ("path,box,fold,end_s\n" + "".join(words)).encode()),
    ),
)
def test_whatever_a_table_holds_is_read_or_refused_in_words(raw: LocalStore, name: str, data: bytes) -> None:
    raw.put(name, data)
    try:
        videos = list_videos(raw.url(name))
    except MicaclError as error:
        assert raw.url(name) in str(error)  # noqa: PT017  (an error, or rows)
    else:
        assert all(v.name and (v.fold is None or v.split == FOLDS) for v in videos)


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
        ("path,label\n\n\nc.webm,\n,sad\n", "line 5 has an empty path"),
        ('path,label\n"c\nd.webm",\n,sad\n', "line 4 has an empty path"),
        ("path,fold\nc.webm,0\n", "line 2 has fold '0'.*from 1 to 1000"),
        ("path,fold\nc.webm,1\nd.webm,\n", "line 3 has no fold, unlike the lines before"),
        ("path,fold,split\nc.webm,1,test\n", "line 2 has split 'test'.*Leave `split` out"),
        ("path,split\nc.webm,folds\n", "line 2 has split 'folds'"),
        ("path,start_s\nc.webm,-1\n", "line 2 has start_s '-1'"),
        ("path,start_s\nc.webm,inf\n", "line 2 has start_s 'inf'"),
        ("path,start_s,end_s\nc.webm,3,2\n", "line 2 has end_s '2'.*after start_s"),
        ("path,box\nc.webm,1 2 3\n", "line 2 has box '1 2 3'.*`x y w h`"),
        ("path,box\nc.webm,1 2 0 4\n", "line 2 has box '1 2 0 4'"),
        ("path,cropped\nc.webm,maybe\n", "line 2 has cropped 'maybe'.*true, false"),
        ("path,kind\nc.webm,clip\n", "line 2 has kind 'clip'"),
        ("path,path\nc.webm,clip\n", "has a column twice"),
        ("path,start_s,end_s\na.mp4,1,2\na.mp4,1.0,2.0\n", r"lists 'a\.mp4#1-2' twice"),
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
    with pytest.raises(MicaclError, match=r"--source is 'tabel'.*auto, table, folder, bucket, dfew"):
        list_videos(raw.root, "tabel")


def test_a_folder_names_its_split_and_class(raw: LocalStore, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "x"))
    for key in ("Train/happy/a.mp4", "validation/Sad/deep/b.mp4", "test/c.mp4"):
        store.put(key, b"x")
    assert {(v.name, v.split, v.label) for v in list_videos(store.root)} == {
        ("Train/happy/a.mp4", "train", "happy"),
        ("validation/Sad/deep/b.mp4", "val", "sad"),
        ("test/c.mp4", "test", None),
    }
    assert "<split>/<class>/" in find_source(store.root).layout
    store.put("d.mp4", b"x")
    with pytest.raises(MicaclError, match=r"d\.mp4 lies beside the folders of the splits"):
        list_videos(store.root)


def test_names_that_are_no_utf8_are_listed_and_found_again(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "raw") + b"/fr\xf6hlich"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/caf\xe9.mp4")).write_bytes(b"x")
    Path(os.fsdecode(folder + "/größe%E9.mp4".encode())).write_bytes(b"y")
    url = str(tmp_path / "raw")
    one, two = list_videos(url)
    assert (one.name, one.label) == ("fr%F6hlich/caf%E9.mp4", "fr%f6hlich")
    assert two.name == "fr%F6hlich/größe%E9.mp4"
    for video, data in ((one, b"x"), (two, b"y")):
        root, key = split_url(video.url)
        assert open_store(root).get(key) == data
        assert len(video.id) == 16
        assert canonical_json(dataclasses.asdict(video)).encode()


def test_what_macos_leaves_in_archives_is_no_video(raw: LocalStore) -> None:
    raw.put("happy/._a.mp4", b"x")
    raw.put("__MACOSX/happy/a.mp4", b"x")
    assert len(list_videos(raw.root)) == 3


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


def test_labels_are_checked_row_by_row(raw: LocalStore) -> None:
    source = find_source(raw.root)
    assert label_set((), source) == DFEW_LABELS
    assert label_set((), dataclasses.replace(source, labels=("b", "a"))) == ("b", "a")
    assert label_set(("auto",), source) == ("auto",)
    with pytest.raises(MicaclError, match="--labels b b says a label twice"):
        label_set(("b", "b"), source)
    for word, labels in (("a", ("a",)), (None, ("a",)), ("x", ("auto",))):
        check_label(word, labels, "row")
    with pytest.raises(MicaclError, match=r"Unknown label 'hapy' in c\.mp4.*Did you mean happy"):
        check_label("hapy", DFEW_LABELS, "c.mp4")


def test_rows_stream(raw: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second entry of a listing is asked for after the first row is out."""
    asked = []

    def listing(_: LocalStore, prefix: str = "") -> Iterator[Entry]:
        for n in range(10**6):
            asked.append(n)
            yield Entry(f"{prefix}happy/{n}.mp4", 1, "x")

    monkeypatch.setattr(LocalStore, "list", listing)
    for kind in ("bucket", "folder"):
        asked.clear()
        assert next(find_source(raw.root, kind).videos()).name == "happy/0.mp4"
        assert asked == [0]


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
