"""Folders of images as clips, the look at the upper folders, and the published counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contract import DFEW_LABELS, MicaclError
from pipeline.image_folders import fingerprints_of, folder_fingerprint, image_folders
from pipeline.sources import SourceOptions, find_source, list_videos
from pipeline.sources.published import DFEW, DFEW_ALL, FERV39K, PUBLISHED, differences
from pipeline.sources.tree import survey
from pipeline.storage import Entry, LocalStore, open_store
from pipeline.storage_s3 import S3Config, S3Store


@pytest.fixture
def raw(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def fill(store: LocalStore, *keys: str) -> LocalStore:
    for key in keys:
        store.put(key, key.encode())
    return store


# Folders of images.


@given(
    images=st.dictionaries(st.text("ab1_", min_size=1, max_size=5), st.text("xy", max_size=2), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_a_folders_fingerprint_is_of_its_images_in_any_order(images: dict[str, str], seed: int) -> None:
    entries = [Entry(f"c/{name}.jpg", 1, print_) for name, print_ in images.items()]
    mixed = random.Random(seed).sample(entries, len(entries))
    want = folder_fingerprint(entries)
    assert folder_fingerprint([*mixed, Entry("c/notes.txt", 1, "z"), Entry("c/._a.jpg", 1, "z")]) == want
    assert fingerprints_of({"c"}, mixed) == {"c": want}
    assert list(image_folders(mixed)) == [("c", want)]
    changed = [Entry(entries[0].key, 1, entries[0].fingerprint + "!"), *entries[1:]]
    renamed = [Entry("c/new.png", 1, entries[0].fingerprint), *entries[1:]]
    assert len({want, folder_fingerprint(changed), folder_fingerprint(renamed), folder_fingerprint(entries[1:])}) == 4


def test_folders_within_folders_are_clips_of_their_own() -> None:
    keys = ["top.jpg", "a/1.jpg", "a/b/1.jpg", "a/b/2.jpg", "a/b-c/1.jpg", "a/2.jpg", "d/notes.txt", "e/1.png"]
    for order in (keys, sorted(keys)):
        assert sorted(folder for folder, _ in image_folders(Entry(key, 1, "x") for key in order)) == [
            "a",
            "a/b",
            "a/b-c",
            "e",
        ]
    prints = dict(image_folders(Entry(key, 1, "x") for key in keys))
    assert prints["a"].startswith("2-")


def test_a_folder_is_out_as_soon_as_the_listing_has_left_it() -> None:
    asked = []

    def listing() -> Iterator[Entry]:
        for n in range(100):
            asked.append(n)
            yield Entry(f"clips/{'1' * (n // 2 + 1)}/{n % 2}.jpg", 1, "x")

    folders = image_folders(listing())
    assert [next(folders)[0] for _ in range(3)] == ["clips/1", "clips/11", "clips/111"]
    assert len(asked) == 7


def test_a_folder_of_a_class_holds_folders_of_images(raw: LocalStore) -> None:
    fill(
        raw, *(f"{label}/clip {n}/{i}.png" for label in ("Happy", "sad") for n in (1, 2) for i in range(3)), "happy.txt"
    )
    videos = list_videos(raw.root, "auto", SourceOptions(frames="aligned"))
    assert [(v.name, v.label, v.kind, v.cropped) for v in videos] == [
        (f"{label}/clip {n}", label.lower(), "frames", True) for label in ("Happy", "sad") for n in (1, 2)
    ]
    (one, *_) = list_videos(raw.root, "bucket", SourceOptions(frames="images"))
    assert (one.label, one.kind, one.cropped, one.fingerprint) == (None, "frames", False, videos[0].fingerprint)
    with pytest.raises(MicaclError, match=r"holds no video.*--frames images or --frames aligned"):
        list_videos(raw.root)
    with pytest.raises(MicaclError, match="--frames 16f is a folder of DFEW alone"):
        find_source(raw.root, "folder", options=SourceOptions(frames="16f"))


def test_images_right_in_the_folder_of_a_class_are_refused(raw: LocalStore) -> None:
    fill(raw, "happy/1.jpg", "happy/2.jpg")
    with pytest.raises(MicaclError, match=r"happy holds images itself.*<class>/<clip>/<number>\.jpg"):
        list_videos(raw.root, "folder", SourceOptions(frames="images"))


# The look at the upper folders.


def test_one_level_of_every_store(raw: LocalStore, s3: Callable[[str], str]) -> None:
    keys = ["a/b/1.txt", "a/b/2.txt", "a/c.txt", "a-b/x", "z.txt", *(f"many/{n}/x" for n in range(5))]
    small_pages = S3Store(s3("level"), S3Config(page_keys=2))
    for store in (raw, small_pages, open_store(f"memory://{raw.root}")):
        for key in keys:
            store.put(key, b"xy")
        assert sorted(e.key for e in store.children()) == ["a-b/", "a/", "many/", "z.txt"]
        below = {e.key: e for e in store.children("a/")}
        assert below["a/b/"] == Entry("a/b/", 0, "")
        assert below["a/c.txt"] in list(store.list("a/"))
        assert len(list(store.children("many/"))) == 5
        assert list(store.children("none/")) == []


def test_links_to_folders_are_looked_into(raw: LocalStore, tmp_path: Path) -> None:
    fill(LocalStore(str(tmp_path / "disk")), "happy/a.mp4")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "faces").symlink_to(tmp_path / "disk")
    assert list(survey(LocalStore(raw.url("raw"))).folders) == ["", "faces", "faces/happy"]


def test_a_folder_of_many_clips_is_not_looked_into(raw: LocalStore) -> None:
    fill(raw, *(f"clips/{n:05d}/1.jpg" for n in range(101)), "a/b/c.txt", "__MACOSX/a/._b.mp4", ".git/x")
    look = survey(raw)
    assert list(look.folders) == ["", "a", "clips", "a/b"]
    assert len(look.folders["clips"].folders) == 101
    assert look.whole


def test_a_wide_bucket_is_looked_at_in_part(raw: LocalStore) -> None:
    fill(raw, *(f"{a:02d}/{b}/x.mp4" for a in range(60) for b in range(4)))
    look = survey(raw)
    assert (len(look.folders), look.whole) == (200, False)
    assert all(f"{a:02d}" in look.folders for a in range(60))
    assert "only the upper 200 folders" in look.says()
    assert len(list_videos(raw.root)) == 240


# Published counts.


def test_the_published_tables_add_up() -> None:
    assert sum(DFEW_ALL.values()) == 11697
    assert [sum(DFEW[k]["test"].values()) for k in range(1, 6)] == [2341, 2341, 2340, 2339, 2336]
    assert [sum(DFEW[k]["train"].values()) for k in range(1, 6)] == [9356, 9356, 9357, 9358, 9361]
    assert [DFEW[4]["train"][label] for label in DFEW_LABELS] == [1956, 1515, 2135, 1739, 1175, 116, 722]
    assert [DFEW[5]["train"][label] for label in DFEW_LABELS] == [1956, 1516, 2136, 1739, 1176, 116, 722]
    for label in DFEW_LABELS:
        assert sum(DFEW[k]["test"][label] for k in DFEW) == DFEW_ALL[label]
    assert {part: sum(row.values()) for part, row in FERV39K.items()} == {"train": 31088, "test": 7847}


def test_what_differs_is_said() -> None:
    for kind, counts in PUBLISHED.items():
        assert differences(kind, counts) == []
    counts = {part: dict(row) for part, row in FERV39K.items()}
    del counts["test"]["fear"]
    counts["train"]["joy"] = 2
    counts["val"] = {"sad": 3}
    assert differences("ferv39k", counts) == [
        "train: 31090 clips, 31088 are published; joy 2 (0).",
        "test: 7416 clips, 7847 are published; fear 0 (431).",
        "val: 3 clips, the published lists have no such part.",
    ]
    assert len(differences("dfew", {})) == 5
    assert differences("ravdess", {f"fold-{k}": {"calm": 240} for k in range(1, 7)}) == []
    assert differences("mafw", {})[0] == "fold-1: 0 clips, 1839 are published."
    assert differences("folder", {"train": {"sad": 1}}) == []
