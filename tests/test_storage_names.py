"""File names that are no UTF-8, and what other clients of fsspec can and cannot do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.contract import MicaclError, Video, canonical_json, digest
from pipeline.storage import open_store, split_url
from tests.test_storage import operations

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
    put_raw(tmp_path, b"a\xff.mp4", b"stray")
    put_raw(tmp_path, b"a%FF.mp4", b"as it stands")
    assert open_store(str(tmp_path)).get("a%FF.mp4") == b"as it stands"
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
