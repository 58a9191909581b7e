"""The promises of a Store, on a folder, in memory and on a real S3 server. See also test_storage_network.py."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline import storage_s3
from pipeline.contract import MicaclError, Video, canonical_json, digest
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


def test_a_dangling_link_does_not_stop_a_listing(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "real.mp4").write_bytes(b"1")
    assert [e.key for e in open_store(str(tmp_path)).list()] == ["real.mp4"]


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


# File names that are no UTF-8.

STRAY = b"caf\xe9 \xff.mp4"


def put_raw(folder: Path, name: bytes, data: bytes = b"1") -> None:
    path = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def test_a_stray_name_has_a_key_of_text_that_finds_it(tmp_path: Path) -> None:
    put_raw(tmp_path, b"d\xfcr/" + STRAY, b"data")
    put_raw(tmp_path, b"d\xfcr/100%FF%C3%A9.mp4", b"other")
    store = open_store(str(tmp_path))
    keys = {e.key: e.size for e in store.list()}
    assert keys == {"d%FCr/caf%E9 %FF.mp4": 4, "d%FCr/100%FF%C3%A9.mp4": 5}
    for key, data in (("d%FCr/caf%E9 %FF.mp4", b"data"), ("d%FCr/100%FF%C3%A9.mp4", b"other")):
        assert Video(url=store.url(key), name=key).id == digest(key.encode())[:16]
        assert json.loads(canonical_json([key]).encode()) == [key]
        assert store.get(key) == data
        assert store.read_range(key, 1, 2) == data[1:3]
        assert store.stat(key) in list(store.list("d%FCr/"))
        root, name = split_url(store.url(key))
        assert open_store(root).get(name) == data
        assert [e.key for e in open_store(root).list()] != []
    store.put("d%FCr/caf%E9 %FF.mp4", b"new")
    assert os.listdir(os.fsencode(tmp_path)) == [b"d\xfcr"]
    assert (tmp_path / os.fsdecode(b"d\xfcr/" + STRAY)).read_bytes() == b"new"
    store.delete("d%FCr/caf%E9 %FF.mp4")
    assert not store.exists("d%FCr/caf%E9 %FF.mp4")


def test_a_folder_given_by_a_stray_name(tmp_path: Path) -> None:
    put_raw(tmp_path, b"\xff/" + STRAY)
    store = open_store(str(tmp_path / os.fsdecode(b"\xff")))
    assert store.root == f"{tmp_path}/%FF"
    assert [e.key for e in store.list()] == ["caf%E9 %FF.mp4"]
    store.put("b", b"2")
    assert sorted(os.listdir(os.fsencode(tmp_path) + b"/\xff")) == [b"b", STRAY]


def test_a_name_that_looks_escaped_stays_what_it_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for name in ("%FF.mp4", "caf%C3%A9.mp4", "100%.mp4", "%25FF", "%ff", "café.mp4"):
        store.put(name, name.encode())
        assert (tmp_path / name).read_bytes() == store.get(name) == name.encode()
    assert len({e.key for e in store.list()}) == 6
    store.delete("caf%C3%A9.mp4")
    assert not store.exists("caf%C3%A9.mp4")  # and is not found as café.mp4


def test_two_names_of_one_key_are_an_error_in_words(tmp_path: Path) -> None:
    put_raw(tmp_path, b"a\xff.mp4")
    put_raw(tmp_path, b"a%FF.mp4")
    with pytest.raises(MicaclError, match=r"two files with the key 'a%FF\.mp4'"):
        list(open_store(str(tmp_path)).list())


# fsspec.


class Plain(MemoryFileSystem):
    """A client that inherits fsspec's write with mode="create", in which two can win."""

    protocol = "plain"
    store: ClassVar[dict] = {}
    pipe_file = AbstractFileSystem.pipe_file


class Broken(AbstractFileSystem):
    protocol = "broken"

    def _open(self, path: str, *args: object, **kwargs: object) -> object:
        raise TimeoutError("the network is down")

    info = rm_file = cat_file = _open

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list:
        if path == "/p":
            return [{"name": "/p/a", "type": "directory", "size": 0}]
        raise TimeoutError("the network is down")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        raise TimeoutError("the network is down")


class Bare(AbstractFileSystem):
    protocol = "bare"

    def _open(self, path: str, *args: object, **kwargs: object) -> object:
        raise NotImplementedError


fsspec.register_implementation("plain", Plain, clobber=True)
fsspec.register_implementation("broken", Broken, clobber=True)
fsspec.register_implementation("bare", Bare, clobber=True)


def test_a_commit_needs_a_write_that_one_wins() -> None:
    store = open_store("plain://p")
    store.put("a", b"1")
    with pytest.raises(MicaclError, match=r"plain://p/b.*must not exist.*cannot be done there.*Use s3:// or a folder"):
        store.put_if_absent("b", b"1")
    assert [e.key for e in store.list()] == ["a"]


@pytest.mark.parametrize(
    ("url", "words"), [("broken://p", "TimeoutError: the network is down"), ("bare://p", "cannot be done there")]
)
def test_errors_of_an_fsspec_client_are_errors_in_words(url: str, words: str) -> None:
    store = open_store(url)
    for operation in (*operations(store)[1:], lambda: store.exists("a")):
        with pytest.raises(MicaclError, match=f"{url}.*{words}"):
            operation()


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
