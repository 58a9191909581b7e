"""The promises of a Store, on a folder, in memory and on a real S3 server; and what a bad network does to them."""

from __future__ import annotations

import os
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline import storage_s3
from pipeline.contract import MicaclError
from pipeline.object_store import ObjectStore
from pipeline.storage import LocalStore, Store, open_store, split_url
from tests.fault_proxy import FaultProxy

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
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"


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


def test_a_dangling_link_does_not_stop_a_listing(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "real.mp4").write_bytes(b"1")
    assert [e.key for e in open_store(str(tmp_path)).list()] == ["real.mp4"]


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
    monkeypatch.setattr(storage_s3, "ATTEMPTS", 1)  # with the usual six boto3 waits some 15 s between them
    s3_environment(AWS_ENDPOINT_URL=endpoint)
    for operation in operations(open_store("s3://tests/p")):
        with pytest.raises(MicaclError, match="Check AWS_ENDPOINT_URL"):
            operation()


def test_a_malformed_endpoint_is_an_error_in_words(s3_environment: Callable[..., None]) -> None:
    s3_environment(AWS_ENDPOINT_URL="localhost:8333")
    with pytest.raises(MicaclError, match="AWS_ENDPOINT_URL"):
        open_store("s3://tests/p").check()


# A bad network in front of the real server.

BIG = os.urandom(3 * 2**20)


@pytest.fixture
def proxy(s3_server: ObjectStore, s3_environment: Callable[..., None]) -> object:
    with FaultProxy(s3_server.ports[0]) as proxy:
        s3_environment(AWS_ENDPOINT_URL=proxy.endpoint)
        yield proxy


ENDS = pytest.mark.parametrize("reset", [pytest.param(False, id="end"), pytest.param(True, id="reset")])


@ENDS
@pytest.mark.parametrize("cut_after", [5_000, 2_500_000])
def test_a_read_that_breaks_off_is_resumed(
    proxy: FaultProxy, s3: Callable[[str], str], cut_after: int, reset: bool
) -> None:
    store = open_store(s3("cut"))
    store.put("big", BIG)
    proxy.sent, proxy.cut_after, proxy.reset = b"", cut_after, reset
    assert store.get("big") == BIG
    assert proxy.cuts == 1
    assert proxy.sent.count(b"GET ") == 2
    if cut_after > 2**20 and not reset:  # what was read is kept, the rest asked for by range, of the same object only
        assert (found := re.search(rb"Range: bytes=(\d+)-\r", proxy.sent, re.IGNORECASE))
        assert 2**20 <= int(found[1]) <= cut_after
        assert b"if-match: " in proxy.sent.lower()


@ENDS
def test_a_range_that_breaks_off_is_resumed(proxy: FaultProxy, s3: Callable[[str], str], reset: bool) -> None:
    store = open_store(s3("cut"))
    store.put("big", BIG)
    proxy.cut_after, proxy.reset = 2_000_000, reset
    assert store.read_range("big", 1000, 2_500_000) == BIG[1000:2_501_000]
    assert proxy.cuts == 1


@ENDS
def test_two_versions_of_an_object_are_never_mixed(proxy: FaultProxy, s3: Callable[[str], str], reset: bool) -> None:
    store, other = open_store(s3("mixed")), BIG[::-1]
    store.put("big", BIG)
    proxy.cut_after, proxy.reset, proxy.on_cut = 2_500_000, reset, lambda: store.put("big", other)
    assert store.get("big") == other
    assert proxy.cuts == 1


def test_a_busy_server_is_asked_again(proxy: FaultProxy, s3: Callable[[str], str]) -> None:
    store = open_store(s3("busy"))
    proxy.refusals = 2
    store.put("a", b"1")
    assert proxy.refused == 2
    assert store.get("a") == b"1"


def test_a_commit_whose_answer_was_lost_is_ours(proxy: FaultProxy, s3: Callable[[str], str]) -> None:
    store = open_store(s3("lost"))
    proxy.cut_after = 10
    assert store.put_if_absent("versions/000001.json", b"ours")
    assert proxy.cuts == 1
    assert not store.put_if_absent("versions/000001.json", b"theirs")


@ENDS
def test_a_server_that_stays_broken_is_an_error_in_words(
    proxy: FaultProxy, s3: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(storage_s3, "ATTEMPTS", 2)
    store = open_store(s3("broken"))
    store.put("big", BIG)
    proxy.cut_after, proxy.reset = 1_500_000, reset
    proxy.on_cut = lambda: setattr(proxy, "cut_after", 1_000)
    with pytest.raises(MicaclError, match=r"broke 2 times, \d+ bytes were read.*network"):
        store.get("big")
    assert proxy.cuts >= 2  # a reset can come before the headers; boto3 asks again by itself then
