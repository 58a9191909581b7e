"""A bad network in front of a real S3 server: every call of an S3Store ends right, or in words."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from urllib.parse import parse_qs

import pytest

from pipeline.contract import MicaclError
from pipeline.object_store import ObjectStore
from pipeline.storage_s3 import S3Config, S3Store, _s3_client
from tests.fault_proxy import Fault, FaultProxy, Request

pytestmark = pytest.mark.slow

BIG = os.urandom(3 * 2**20)
FAST = S3Config(attempts=4, connect_s=5, read_s=10, pause_s=0.001, pause_max_s=0.01, page_keys=10)
SHORT = dataclasses.replace(FAST, read_s=1)
PARTS = dataclasses.replace(FAST, attempts=2, multipart_bytes=6 * 2**20, part_bytes=5 * 2**20)
HUGE = os.urandom(12 * 2**20)  # three parts, and S3 wants 5 MiB of all but the last


@pytest.fixture(scope="module")
def one_proxy(s3_server: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.ports[0]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        _s3_client.cache_clear()
        yield proxy
    _s3_client.cache_clear()


@pytest.fixture
def proxy(one_proxy: FaultProxy) -> FaultProxy:
    one_proxy.calm()
    return one_proxy


@pytest.fixture
def store(proxy: FaultProxy, s3: Callable[[str], str]) -> S3Store:
    return S3Store(s3("network"), FAST)


def with_config(store: S3Store, config: S3Config) -> S3Store:
    return S3Store(store.root, config)


# Every call, every fault that any call can meet.

CALLS: dict[str, Callable[[S3Store], object]] = {
    "get": lambda store: store.get("old"),
    "read_range": lambda store: store.read_range("old", 2, 3),
    "put": lambda store: (store.put("new", b"new"), store.get("new"))[1],
    "put_if_absent": lambda store: (store.put_if_absent("new", b"new"), store.get("new")),
    "put_if_absent, taken": lambda store: store.put_if_absent("old", b"new"),
    "list": lambda store: sorted(e.key for e in store.list()),
    "stat": lambda store: store.stat("old").size,
    "stat of nothing": lambda store: store.stat("nothing"),
    "delete": lambda store: (store.delete("old"), store.stat("old"))[1],
    "check": lambda store: store.check(),
}
RESULTS = {
    "get": b"0123456789",
    "read_range": b"234",
    "put": b"new",
    "put_if_absent": (True, b"new"),
    "put_if_absent, taken": False,
    "list": ["old", *(f"page/{i}" for i in range(10, 35))],
    "stat": 10,
    "stat of nothing": None,
    "delete": None,
    "check": None,
}
BEFORE_THE_REPLY = ("500", "503", "reset", "lost")
IN_THE_REPLY = ("cut_down", "reset_down", "slow_down")


def filled(store: S3Store) -> S3Store:
    for key in RESULTS["list"]:
        store.put(key, b"0123456789")
    return store


@pytest.mark.parametrize("call", CALLS)
def test_a_fault_that_passes_is_not_seen(proxy: FaultProxy, store: S3Store, call: str) -> None:
    filled(store)
    for kind in (*BEFORE_THE_REPLY, *IN_THE_REPLY, "cut_up"):
        store.put("old", b"0123456789")
        store.delete("new")
        proxy.plan(Fault(kind, times=1), Fault(kind, after=3, at=0.1))
        got = CALLS[call](store)
        assert (sorted(got) if call == "list" else got) == sorted_result(call), kind
        assert set(proxy.injected) <= {kind}


def sorted_result(call: str) -> object:
    return sorted(RESULTS["list"]) if call == "list" else RESULTS[call]


@pytest.mark.parametrize("call", CALLS)
def test_a_fault_that_stays_is_an_error_in_words(proxy: FaultProxy, store: S3Store, call: str) -> None:
    filled(store)
    for kind in (*BEFORE_THE_REPLY, "cut_down", "reset_down", "cut_up"):
        store.put("old", b"0123456789")
        store.delete("new")
        proxy.plan(Fault(kind, times=1000))
        got, error = outcome(CALLS[call], store)
        if error:
            tries = 2 if call == "check" else FAST.attempts
            assert proxy.injected == {kind: tries}
            assert error.cause.startswith(store.root)
            assert f"the last of {tries} attempts" in error.cause
            assert "run the same command again" in error.remedy
        else:  # the fault is none for this call
            assert not proxy.injected or kind == "lost"
            assert (sorted(got) if call == "list" else got) == sorted_result(call)
        proxy.plan()
        assert call == "delete" or store.get("old") == b"0123456789"
        assert store.stat("new") is None or store.get("new") == b"new"


def outcome(call: Callable[[S3Store], object], store: S3Store) -> tuple[object, MicaclError | None]:
    try:
        return call(store), None
    except MicaclError as error:
        return None, error


def test_every_call_can_meet_a_fault(proxy: FaultProxy, store: S3Store) -> None:
    filled(store)
    for call in CALLS.values():
        proxy.plan(Fault("503", times=1000))
        with pytest.raises(MicaclError, match=r"answered (SlowDown|503), the last of"):
            call(store)


# Bodies that break off.


@pytest.mark.parametrize("kind", ["cut_down", "reset_down"])
@pytest.mark.parametrize("at", [0.001, 0.8])
def test_a_read_that_breaks_off_is_resumed(proxy: FaultProxy, store: S3Store, at: float, kind: str) -> None:
    store.put("big", BIG)
    proxy.plan(Fault(kind, at=at))
    assert store.get("big") == BIG
    first, second = proxy.asked("GET")
    assert "range" not in first.headers
    if kind == "cut_down":  # what was read is kept, the rest asked for by range, of the same object only
        start = int(second.headers.get("range", "bytes=0-")[len("bytes=") : -1])
        assert int(at * len(BIG)) - 2**20 < start <= at * len(BIG)
        assert ("if-match" in second.headers) == bool(proxy.injected)


@pytest.mark.parametrize("kind", ["cut_down", "reset_down", "stall", "slow_down"])
def test_a_range_that_breaks_off_is_resumed(proxy: FaultProxy, store: S3Store, kind: str) -> None:
    store = with_config(store, SHORT)
    store.put("big", BIG)
    proxy.plan(Fault(kind, at=0.7), Fault(kind, after=1))
    assert store.read_range("big", 1000, 2_500_000) == BIG[1000:2_501_000]
    assert proxy.injected[kind] >= 1


@pytest.mark.parametrize("kind", ["cut_down", "reset_down"])
def test_two_versions_of_an_object_are_never_mixed(proxy: FaultProxy, store: S3Store, kind: str) -> None:
    other = BIG[::-1]
    store.put("big", BIG)
    proxy.plan(Fault(kind, at=0.8))
    proxy.alter = replace_once(proxy, lambda: store.put("big", other))
    assert store.get("big") == other
    assert len(proxy.asked("GET")) == (3 if kind == "cut_down" else len(proxy.asked("GET")))


def replace_once(proxy: FaultProxy, put: Callable[[], None]) -> Callable[..., bytes]:
    """Runs `put` while the first answer is on its way."""

    def alter(request: object, body: bytes) -> bytes:
        proxy.alter = lambda _, body: body
        put()
        return body

    return alter


def test_an_object_that_is_replaced_at_every_read_is_an_error_in_words(proxy: FaultProxy, store: S3Store) -> None:
    store.put("big", BIG)
    proxy.plan(*(Fault("cut_down", after=i, at=0.8, method="GET") for i in range(20)))
    proxy.on_fault = lambda _: store.put("big", os.urandom(len(BIG)))
    with pytest.raises(MicaclError, match=r"big: the request failed with \w+, the last of 4 attempts"):
        store.get("big")


def test_a_stalled_read_is_given_up_and_resumed(proxy: FaultProxy, store: S3Store) -> None:
    store = with_config(store, SHORT)
    store.put("big", BIG)
    proxy.plan(Fault("stall", at=0.8))
    assert store.get("big") == BIG
    assert proxy.injected["stall"] == 1


def test_a_flipped_bit_is_noticed(proxy: FaultProxy, store: S3Store) -> None:
    store.put("big", BIG)
    proxy.plan(Fault("flip", at=0.9))
    assert store.get("big") == BIG
    proxy.plan(Fault("flip", times=1000))
    with pytest.raises(MicaclError, match="FlexibleChecksumError"):
        store.get("big")


# Writes.


@pytest.mark.parametrize("size", [10, len(BIG)])
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_an_upload_that_breaks_off_is_sent_again_whole(proxy: FaultProxy, store: S3Store, size: int, at: float) -> None:
    store.put("a", b"before")
    proxy.plan(Fault("cut_up", at=at, times=2))
    store.put("a", BIG[:size])
    assert proxy.injected["cut_up"] == 2
    assert [r.size for r in proxy.asked("PUT")] == [size] * 3
    assert store.get("a") == BIG[:size]


def test_an_upload_that_never_passes_leaves_what_was_there(proxy: FaultProxy, store: S3Store) -> None:
    store.put("a", b"before")
    proxy.plan(Fault("cut_up", at=0.9, times=1000))
    for write in (store.put, store.put_if_absent):
        for key in ("a", "b"):
            with pytest.raises(MicaclError, match="may or may not have been done"):
                write(key, BIG)
    assert [(e.key, e.size) for e in store.list()] == [("a", 6)]


def test_an_upload_may_take_longer_than_the_time_to_connect(proxy: FaultProxy, store: S3Store) -> None:
    store, data = with_config(store, dataclasses.replace(FAST, connect_s=1, attempts=3)), os.urandom(16 * 2**20)
    proxy.pause_s = 0.2
    proxy.plan(Fault("slow_up", times=1000))
    store.put("a", data)
    assert proxy.injected["slow_up"] >= 1
    assert store.get("a") == data


@pytest.mark.parametrize("kind", ["lost", "409", "412", "500", "503", "reset", "cut_up"])
def test_a_commit_is_ours_whatever_the_network_says(proxy: FaultProxy, store: S3Store, kind: str) -> None:
    proxy.plan(Fault(kind, times=2))
    assert store.put_if_absent("versions/000001.json", b"ours")
    assert proxy.injected[kind] == 2
    assert store.get("versions/000001.json") == b"ours"
    proxy.plan(Fault(kind, times=2))
    assert not store.put_if_absent("versions/000001.json", b"theirs")
    assert proxy.injected
    assert store.get("versions/000001.json") == b"ours"


@pytest.mark.parametrize(("kind", "words"), [("409", "ConditionalRequestConflict"), ("412", "exists and that it does")])
def test_a_server_that_never_decides_is_an_error_in_words(
    proxy: FaultProxy, store: S3Store, kind: str, words: str
) -> None:
    proxy.plan(Fault(kind, times=1000))
    with pytest.raises(MicaclError, match=words):
        store.put_if_absent("a", b"1")
    assert not store.exists("a")


# Listings.


def test_a_listing_is_fetched_page_by_page(proxy: FaultProxy, store: S3Store) -> None:
    filled(store)
    proxy.plan()
    listing = store.list("page/")
    assert not proxy.requests
    next(listing)
    assert len(proxy.requests) == 1
    assert len(list(listing)) == 24
    assert len(proxy.requests) == 3


@pytest.mark.parametrize("kind", ["503", "reset", "cut_down", "reset_down", "stall", "slow_down"])
def test_a_page_that_breaks_is_asked_for_again(proxy: FaultProxy, store: S3Store, kind: str) -> None:
    store = with_config(filled(store), SHORT)
    for page in range(3):
        proxy.plan(Fault(kind, after=page))
        assert sorted(e.key for e in store.list("page/")) == RESULTS["list"][1:]
        assert proxy.injected == {kind: 1}


@pytest.mark.parametrize("page", [0, 1])
def test_a_page_that_is_no_listing(proxy: FaultProxy, store: S3Store, page: int) -> None:
    filled(store)
    bad = 2

    def garble(_: object, body: bytes) -> bytes:
        nonlocal bad
        bad -= len(proxy.requests) > page
        return body[: len(body) // 2] if len(proxy.requests) > page and bad >= 0 else body

    proxy.plan()
    proxy.alter = garble
    assert sorted(e.key for e in store.list("page/")) == RESULTS["list"][1:]
    assert bad < 0
    bad = 1000
    with pytest.raises(MicaclError, match="answered 500"):  # botocore's word for a reply that is no XML
        list(store.list("page/"))


@pytest.mark.parametrize("way", ["no token", "the same token"])
def test_a_listing_that_does_not_go_on_is_an_error_in_words(proxy: FaultProxy, store: S3Store, way: str) -> None:
    filled(store)

    def lead_astray(request: Request, body: bytes) -> bytes:
        asked = parse_qs(request.path).get("continuation-token")
        token = rb"<NextContinuationToken>.*?</NextContinuationToken>"
        if asked and way == "the same token":
            return re.sub(token, f"<NextContinuationToken>{asked[0]}</NextContinuationToken>".encode(), body)
        return re.sub(token, b"", body) if way == "no token" else body

    proxy.alter = lead_astray
    with pytest.raises(MicaclError, match="not where"):
        list(store.list("page/"))


# Large objects.


def open_uploads(store: S3Store) -> list[str]:
    found = store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(store.prefix)]


def test_a_large_object_goes_in_parts(proxy: FaultProxy, store: S3Store) -> None:
    store = with_config(store, PARTS)
    store.put("big", HUGE)
    assert sorted(r.size for r in proxy.asked("PUT")) == [2 * 2**20, 5 * 2**20, 5 * 2**20]
    assert store.get("big") == HUGE
    assert store.size("big") == len(HUGE)
    store.put("small", HUGE[: PARTS.multipart_bytes])
    assert len(proxy.asked("PUT")) == 4
    assert open_uploads(store) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("500", path="partNumber=2"),
        Fault("503", path="partNumber=1"),
        Fault("cut_up", path="partNumber=2", at=0.9),
        Fault("reset", path="partNumber=3"),
        Fault("lost", path="partNumber=1"),
        Fault("lost", method="POST", path="uploads"),
        Fault("500", method="POST", path="uploadId"),
        Fault("lost", method="POST", path="uploadId"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.method} {fault.path}",
)
def test_parts_are_sent_again(proxy: FaultProxy, store: S3Store, fault: Fault) -> None:
    store = with_config(store, PARTS)
    store.put("big", b"before")
    proxy.plan(dataclasses.replace(fault))
    store.put("big", HUGE)
    assert proxy.injected == {fault.kind: 1}
    assert store.get("big") == HUGE
    if fault.path != "uploads":  # nobody knows the name of an upload whose first answer was lost
        assert open_uploads(store) == []


def test_a_large_object_whose_end_is_said_to_be_none_is_put_again(proxy: FaultProxy, store: S3Store) -> None:
    store = with_config(store, PARTS)
    proxy.plan(Fault("lost", method="POST", path="uploadId"), Fault("404", after=1, method="POST"))
    store.put("big", HUGE)
    assert proxy.injected == {"lost": 1, "404": 1}
    assert store.get("big") == HUGE
    assert open_uploads(store) == []


def test_a_part_that_never_passes_leaves_no_open_upload(proxy: FaultProxy, store: S3Store) -> None:
    store = with_config(store, PARTS)
    store.put("big", b"before")
    proxy.plan(Fault("500", path="partNumber=2", times=1000))
    with pytest.raises(MicaclError, match=r"big: the object store answered InternalError, the last of 2 attempts"):
        store.put("big", HUGE)
    assert proxy.asked("POST")
    assert proxy.asked("DELETE")
    assert open_uploads(store) == []
    assert store.get("big") == b"before"


def put_huge(root: str) -> None:
    S3Store(root, PARTS).put("big", HUGE)


def test_a_killed_upload_is_not_visible(proxy: FaultProxy, store: S3Store) -> None:
    store = with_config(store, PARTS)
    child = get_context("fork").Process(target=put_huge, args=(store.root,))
    proxy.plan(Fault("slow_up", path="partNumber=2"))
    proxy.on_fault = lambda _: os.kill(child.pid or 0, signal.SIGKILL)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not store.exists("big")
    assert list(store.list()) == []
    assert open_uploads(store) == [f"{store.prefix}big"]  # for the bucket's lifecycle rule: docs/decisions/0005
    store.put("big", HUGE)
    assert store.get("big") == HUGE
