"""The promises of a Store, on a folder, in memory and on a real S3 server. See also test_storage_{names,network}.py."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline import storage_s3
from pipeline.contract import MicaclError
from pipeline.storage import LocalStore, Store, open_store, split_url
from pipeline.storage_s3 import S3Config

KEYS = ("a.bin", "versions/000001.json", "deep/er/a b é+~#%.mp4")
WRITERS = 16


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3")("storage"))
    return open_store(str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}/p")


def race(store: Store, key: str, contents: list[bytes]) -> list[bool]:
    gate, won = threading.Barrier(len(contents)), [False] * len(contents)

    def write(i: int) -> None:
        gate.wait()
        won[i] = store.put_if_absent(key, contents[i])

    threads = [threading.Thread(target=write, args=(i,)) for i in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("data", [b"", b"0123456789", bytes(range(256)) * 5000])
def test_what_was_put_is_what_is_got(store: Store, key: str, data: bytes) -> None:
    assert not store.exists(key)
    store.put(key, b"old, and of another length")
    before = {e.key: e.fingerprint for e in store.list()}
    store.put(key, data)
    assert store.get(key) == data
    assert store.size(key) == len(data)
    assert [(e.key, e.size) for e in store.list()] == [(key, len(data))]
    assert {e.key: e.fingerprint for e in store.list()} != before
    store.delete(key)
    store.delete(key)
    assert not store.exists(key)
    assert list(store.list()) == []


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 10), (0, 4), (3, 4), (8, 10), (9, 1), (10, 1), (25, 5), (3, 0), (0, 0)]
)
def test_a_range_is_a_slice(store: Store, offset: int, size: int) -> None:
    store.put("a", b"0123456789")
    assert store.read_range("a", offset, size) == b"0123456789"[offset : offset + size]


def test_a_range_of_an_empty_object(store: Store) -> None:
    store.put("a", b"")
    assert store.read_range("a", 0, 5) == b""


def test_a_missing_key(store: Store) -> None:
    for read in (lambda: store.get("no"), lambda: store.read_range("no", 0, 5)):
        with pytest.raises(FileNotFoundError):
            read()
    assert store.size("no") is None
    assert list(store.list("no")) == []


def test_a_list_keeps_to_its_prefix(store: Store) -> None:
    keys = {"crops/ab/1.tar", "crops/ab/2.tar", "crops/cd/1.tar", "cropsy", "versions/000001.json"}
    for key in keys:
        store.put(key, key.encode())
    for prefix in ("", "crops/", "crops/ab/", "crops/a", "crops", "versions/0", "nothing/"):
        assert {e.key for e in store.list(prefix)} == {k for k in keys if k.startswith(prefix)}, prefix


def test_one_writer_wins(store: Store) -> None:
    contents = [bytes([i]) * (100 + i) for i in range(WRITERS)]
    won = race(store, "versions/000001.json", contents)
    assert won.count(True) == 1
    assert store.get("versions/000001.json") == contents[won.index(True)]
    assert len(list(store.list())) == 1


def test_equal_writers_all_win(store: Store) -> None:
    assert race(store, "a", [b"same"] * WRITERS) == [True] * WRITERS
    assert store.put_if_absent("a", b"same")
    assert not store.put_if_absent("a", b"other")
    assert store.get("a") == b"same"


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.put("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get("a") == b"1"
    assert vars(copy) == vars(store)


def test_a_folder_name_is_no_object(store: Store) -> None:
    store.put("folder/a", b"1")
    assert store.size("folder") is None


def test_a_key_cannot_leave_the_store(store: Store) -> None:
    for key in ("../a", "b/../../a", ".."):
        with pytest.raises((ValueError, MicaclError)):
            store.put(key, b"1")
        with pytest.raises((ValueError, MicaclError)):
            store.get(key)


def test_an_absolute_key_cannot_leave_a_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"1")
    with pytest.raises((MicaclError, FileNotFoundError)):
        open_store(str(tmp_path / "store")).get(str(outside))


# Folders.


def test_a_put_that_fails_is_not_listed(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a/b", b"1")
    with pytest.raises(OSError, match="directory"):
        store.put("a", b"2")
    assert [e.key for e in store.list()] == ["a/b"]
    assert store.get("a/b") == b"1"


def test_a_put_that_fails_leaves_no_file(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a/b", b"1")
    with pytest.raises(OSError, match="directory"):
        store.put("a", b"2")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["b"]


def test_temporary_files_of_a_killed_writer_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store._temporary(tmp_path / "crops" / "a.tar", b"half")
    assert list(store.list()) == []


def test_putting_leaves_nothing_but_the_object(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a/b", b"1")
    store.put_if_absent("a/b", b"2")
    store.put_if_absent("a/c", b"2")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b", "c"]


def test_links_that_lead_nowhere_are_listed_and_are_not_there(tmp_path: Path) -> None:
    """So a video behind one is quarantined as missing, not passed over; and no link stops a listing."""
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "real.mp4").write_bytes(b"1")
    store = open_store(str(tmp_path))
    for entries in (store.list(), store.children()):
        assert sorted((e.key, e.size) for e in entries) == [("link.mp4", 0), ("loop.mp4", 0), ("real.mp4", 1)]
    assert store.stat("link.mp4") is None
    assert store.stat("loop.mp4") is None


def test_linked_folders_are_listed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/a.mp4").write_bytes(b"1")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw/self").symlink_to(tmp_path / "raw")
    store = open_store(str(tmp_path / "raw"))
    assert [e.key for e in store.list()] == ["link/deep/a.mp4"]
    assert store.get("link/deep/a.mp4") == b"1"


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LocalStore(str(tmp_path)).put("closed/a", b"1")
    scandir = os.scandir

    def refuse(path: str) -> object:  # what the kernel does to all but root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        list(LocalStore(str(tmp_path)).list())


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("data/")
    monkeypatch.chdir("/")
    store.put("a", b"1")
    assert (tmp_path / "data" / "a").read_bytes() == b"1"
    assert open_store(f"file://{tmp_path}/data").get("a") == b"1"


@pytest.mark.parametrize(
    ("url", "root", "key"),
    [
        ("s3://b/p/x.mp4", "s3://b/p", "x.mp4"),
        ("s3://b/x.mp4", "s3://b", "x.mp4"),
        ("/data/x.mp4", "/data", "x.mp4"),
        ("x.mp4", ".", "x.mp4"),
        ("/x.mp4", "/", "x.mp4"),
    ],
)
def test_a_url_splits_into_store_and_key(url: str, root: str, key: str) -> None:
    assert split_url(url) == (root, key)


def test_urls_that_cannot_be_opened() -> None:
    with pytest.raises(MicaclError, match="empty"):
        open_store("")
    with pytest.raises(MicaclError, match="zz"):
        open_store("zz://bucket").get("a")


# Refusals of an S3 server, in words.


def operations(store: Store) -> list[Callable[[], object]]:
    return [
        store.check,
        lambda: store.get("a"),
        lambda: store.read_range("a", 0, 5),
        lambda: store.put("a", b"1"),
        lambda: store.put_if_absent("a", b"1"),
        lambda: list(store.list()),
        lambda: store.delete("a"),
    ]


@pytest.mark.usefixtures("s3_server")
def test_a_missing_bucket_is_an_error_in_words() -> None:
    for operation in operations(open_store("s3://no-such-bucket/p")):
        with pytest.raises(MicaclError, match=r"s3://no-such-bucket/p.*NoSuchBucket.*Create the bucket"):
            operation()


@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_wrong_credentials_are_an_error_in_words(
    s3: Callable[[str], str], s3_environment: Callable[..., None], variable: str, code: str
) -> None:
    store = open_store(s3("private"))
    s3_environment(**{variable: "wrong"})
    for operation in operations(store):
        with pytest.raises(MicaclError, match=f"{code}.*Check {variable}"):
            operation()
    with pytest.raises(MicaclError, match=r"403.*Check the credentials"):
        store.exists("a")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid:80"])
def test_an_unknown_endpoint_is_an_error_in_words(
    s3_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(storage_s3, "CONFIG", S3Config(attempts=1))
    s3_environment(AWS_ENDPOINT_URL=endpoint)
    for operation in operations(open_store("s3://tests/p")):
        with pytest.raises(MicaclError, match="Check AWS_ENDPOINT_URL"):
            operation()


def test_a_malformed_endpoint_is_an_error_in_words(s3_environment: Callable[..., None]) -> None:
    s3_environment(AWS_ENDPOINT_URL="localhost:8333")
    with pytest.raises(MicaclError, match="AWS_ENDPOINT_URL"):
        open_store("s3://tests/p").check()
