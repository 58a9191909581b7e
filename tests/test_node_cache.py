"""The node's cache: once a node, bounded, and nothing lost, stuck or left behind by whoever is killed."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import node_cache
from pipeline.cached_files import place
from pipeline.node_cache import NodeCache
from tests.cache_users import Fetch, User, data_of, fetches

pytestmark = pytest.mark.slow

LIMIT = 10**6
TRAILER = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "fetched"


@pytest.fixture
def start() -> Iterator[Callable[..., User]]:
    """`start(folder, limit)` or `start(cache)`: another process; killed when the test ends."""
    users: list[User] = []

    def make(*how: object) -> User:
        users.append(User(how[0] if len(how) == 1 else how))  # type: ignore[arg-type]
        return users[-1]

    yield make
    for user in users:
        user.process.kill()
        user.process.join()


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, here and in the processes that a test starts."""
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setenv("TMPDIR", str(own))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return own


def usual(tmp: Path) -> Path:
    return tmp / f"micacl-cache-{os.geteuid()}"


def finished(folder: Path) -> list[int]:
    """Bytes of each object held, in order of size."""
    return sorted(p.stat().st_size - TRAILER for p in folder.iterdir() if len(p.name) == 64)


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def holds(folder: Path, *names: str) -> bool:
    return finished(folder) == sorted(len(data_of(name)) for name in names)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """What each returned or raised."""
    out: list[object] = [None] * count
    ready = threading.Barrier(count)

    def run(i: int) -> None:
        ready.wait()
        try:
            out[i] = work(i)
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


# Fetched once.


def test_threads_fetch_once(folder: Path, log: Path) -> None:
    with NodeCache(folder, LIMIT) as cache:
        got = in_threads(8, lambda _: cache.get("a", Fetch("a", log, seconds=0.2)))
    assert [bytes(view) for view in got] == [data_of("a")] * 8  # type: ignore[arg-type]
    assert fetches(log) == ["a"]
    assert holds(folder, "a")
    assert not parts(folder)


def test_processes_fetch_once(folder: Path, log: Path, start: Callable[..., User]) -> None:
    users = [start(folder, LIMIT) for _ in range(4)]
    for name in "abc":
        for user in users:
            user.ask("get", Fetch(name, log, seconds=0.2))
        assert [user.answer() for user in users] == [data_of(name)] * 4
    assert fetches(log) == ["a", "b", "c"]


def test_what_is_handed_out_is_read_only_and_private(folder: Path, log: Path) -> None:
    with NodeCache(folder, LIMIT) as cache:
        for _ in range(3):
            view = cache.get("a", Fetch("a", log))
            with pytest.raises(TypeError, match="read-only"):
                view[0] = 0
            view.release()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


def test_a_relative_folder_stays_where_it_is(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with NodeCache(Path("here"), LIMIT) as cache:
        monkeypatch.chdir("/")
        cache.get("name with \udcff", Fetch("a", log))
        assert holds(tmp_path / "here", "a")
        assert pickle.loads(pickle.dumps(cache)).folder == tmp_path / "here"


def test_an_empty_object(folder: Path) -> None:
    for _ in range(2):
        with NodeCache(folder, LIMIT) as cache:
            assert cache.get("nothing", lambda: b"") == b""
            assert cache.get("nothing", lambda: b"another") == b""


# Fetchers that die or fail.


def test_a_waiter_takes_over_from_a_killed_fetcher(folder: Path, log: Path, start: Callable[..., User]) -> None:
    fetcher, waiter = start(folder, LIMIT), start(folder, LIMIT)
    fetcher.ask("get", Fetch("a", log, hang=True))
    wait_for(lambda: fetches(log) == ["a"])
    parts(folder)[0].write_bytes(b"x" * 9000)  # half an object, longer than the whole
    waiter.ask("get", Fetch("a", log))
    assert not waiter.pipe.poll(0.3)
    assert fetches(log) == ["a"]
    fetcher.kill()
    assert waiter.answer() == data_of("a")
    assert fetches(log) == ["a", "a"]
    assert holds(folder, "a")
    assert not parts(folder)


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
def test_processes_killed_at_random(given: bool, tmp: Path, folder: Path, start: Callable[..., User]) -> None:
    order = random.Random(5)
    users: list[User] = []
    for turn in range(24):
        users.append(start(folder if given else None, 12_000).ask("get for ever", turn))
        if len(users) == 4:
            time.sleep(order.random() * 0.1)
            victim = users.pop(order.randrange(4))
            victim.kill()
            assert victim.process.exitcode == -signal.SIGKILL
    with NodeCache(folder if given else None, 12_000) as cache:
        for name in "abcdefghijklmnop":
            assert cache.get(name, Fetch(name, Path(os.devnull))) == data_of(name)
        for user in users:
            user.kill()
            assert user.process.exitcode == -signal.SIGKILL
    with NodeCache(folder if given else None, 12_000):
        left = folder if given else usual(tmp)
        assert not parts(left)
        assert sum(size + TRAILER for size in finished(left)) <= 12_000
    assert not list(tmp.iterdir())


class Down(OSError):
    pass


def test_a_failure_goes_through_and_is_not_remembered(folder: Path, log: Path) -> None:
    error = Down("store")

    def fail() -> bytes:
        raise error

    with NodeCache(folder, LIMIT) as cache:
        with pytest.raises(Down) as caught:
            cache.get("a", fail)
        assert caught.value is error
        assert error.__cause__ is error.__context__ is None
        assert not parts(folder)
        assert holds(folder)
        assert cache.get("a", Fetch("a", log)) == data_of("a")


def test_a_waiting_thread_tries_again_itself(folder: Path) -> None:
    tries: list[float] = []

    def first_fails() -> bytes:
        tries.append(0)
        if len(tries) == 1:
            time.sleep(0.2)
            raise Down("store")
        return b"data"

    with NodeCache(folder, LIMIT) as cache:
        got = in_threads(4, lambda _: bytes(cache.get("a", first_fails)))
    assert len(tries) == 2
    assert sorted(map(repr, got)) == ["Down('store')", "b'data'", "b'data'", "b'data'"]


# Bounded.


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    limit=st.integers(0, 20_000),
    order=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=30),
    caches=st.integers(1, 3),
)
def test_the_files_are_bounded(limit: int, order: list[str], caches: int) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        many = [NodeCache(folder, limit) for _ in range(caches)]
        for i, name in enumerate(order):
            assert many[i % caches].get(name, lambda name=name: data_of(name)) == data_of(name)  # type: ignore[misc]
            sizes = [size + TRAILER for size in finished(folder)]
            assert sum(sizes) <= limit or len(sizes) == 1
        for cache in many:
            cache.close()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(limit=st.integers(0, 20_000), orders=st.lists(st.permutations("abcdefghij"), min_size=4, max_size=4))
def test_the_files_are_bounded_at_every_moment(limit: int, orders: list[list[str]]) -> None:
    seen: list[int] = []

    with tempfile.TemporaryDirectory() as base, NodeCache(Path(base), limit) as cache:

        def work(i: int) -> None:
            for name in orders[i]:
                assert cache.get(name, Fetch(name, Path(os.devnull))) == data_of(name)
                there = [p for p in Path(base).iterdir() if len(p.name) == 64]
                seen.append(sum(map(size_of, there)) if len(there) > 1 else 0)

        assert in_threads(4, work) == [None] * 4
        total = sum(size + TRAILER for size in finished(Path(base)))
        assert total <= limit or len(finished(Path(base))) == 1
    assert max(seen) <= limit


def size_of(path: Path) -> int:
    """0 if it was deleted since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_the_least_recently_used_goes_first(folder: Path, log: Path) -> None:
    room = sum(len(data_of(name)) + TRAILER for name in "abc")
    with NodeCache(folder, room) as cache, NodeCache(folder, room) as other:
        for name in "abc":
            cache.get(name, Fetch(name, log))
        for i, name in enumerate("abc"):
            os.utime(place(folder, name), (i + 1, i + 1))
        other.get("a", Fetch("a", log))
        other.get("d", lambda: b"d")
        assert finished(folder) == sorted([1, len(data_of("a")), len(data_of("c"))])
    assert fetches(log) == ["a", "b", "c"]


def test_a_mapped_file_that_is_used_stays(folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = sum(len(data_of(name)) + TRAILER for name in "ab")
    with NodeCache(folder, room) as cache:
        for name in "ab":
            cache.get(name, Fetch(name, log))
        for name in "ab":
            os.utime(place(folder, name), (1, 1))
        monkeypatch.setattr(node_cache, "TOUCH_S", 0.0)
        cache.get("a", Fetch("a", log))
        cache.get("d", lambda: b"d")
        assert finished(folder) == sorted([1, len(data_of("a"))])


def test_an_object_larger_than_the_limit(folder: Path, log: Path) -> None:
    with NodeCache(folder, 10) as cache:
        for name in "ab":
            assert cache.get(name, Fetch(name, log)) == data_of(name)
            assert holds(folder, name)


def test_views_outlive_their_file_and_the_cache(folder: Path, log: Path) -> None:
    cache = NodeCache(folder, 10)
    views = {name: cache.get(name, Fetch(name, log))[1:-1] for name in "abcdefgh"}
    assert holds(folder, "h")
    cache.close()
    del cache
    gc.collect()
    assert {name: bytes(view) for name, view in views.items()} == {n: data_of(n)[1:-1] for n in "abcdefgh"}


def test_the_map_of_an_evicted_file_is_given_up(folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with NodeCache(folder, 10) as one, NodeCache(folder, 10) as other:
        one.get("a", Fetch("a", log))
        other.get("b", Fetch("b", log))
        assert holds(folder, "b")
        monkeypatch.setattr(node_cache, "TOUCH_S", 0.0)
        assert one.get("a", Fetch("a", log)) == data_of("a")
        assert fetches(log) == ["a", "b", "a"]
        other.get("c", Fetch("c", log))
        assert list(other._maps) == ["c"]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_leaks(folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "MAPS", 5)
    before = descriptors()
    with NodeCache(folder, 20_000) as cache:
        for i in range(200):
            cache.get(str(i % 30), Fetch(str(i % 30), log))
            assert descriptors() <= before + 5
    with NodeCache(None, 10) as cache:
        with pytest.raises(ZeroDivisionError):
            cache.get("a", lambda: bytes(1 // 0))
        cache.get("a", Fetch("a", log))
    assert descriptors() == before


# The folder of no name.


def test_the_last_user_leaves_nothing(tmp: Path, log: Path, start: Callable[..., User]) -> None:
    one, two = start(None, LIMIT), start(None, LIMIT)
    one.get("a", log)
    two.get("a", log)
    assert fetches(log) == ["a"]
    assert one.ask("close").answer() == "closed"
    assert holds(usual(tmp), "a")
    two.end()
    assert not list(tmp.iterdir())
    one.end()


def test_an_opener_clears_what_the_killed_left(tmp: Path, log: Path, start: Callable[..., User]) -> None:
    users = [start(None, LIMIT) for _ in range(2)]
    users[0].get("a", log)
    users[1].ask("get", Fetch("b", log, hang=True))
    wait_for(lambda: fetches(log) == ["a", "b"])
    with NodeCache(None, LIMIT):
        assert holds(usual(tmp), "a")
        assert len(parts(usual(tmp))) == 1
    for user in users:
        user.kill()
    assert holds(usual(tmp), "a")
    assert len(parts(usual(tmp))) == 1
    with NodeCache(None, LIMIT) as cache:
        assert holds(usual(tmp))
        assert not parts(usual(tmp))
        cache.get("c", Fetch("c", log))
        assert holds(usual(tmp), "c")
    assert not list(tmp.iterdir())


def test_many_come_and_go(tmp: Path) -> None:
    def work(i: int) -> None:
        for turn in range(60):
            with NodeCache(None, LIMIT) as cache:
                name = "abcd"[(i + turn) % 4]
                assert cache.get(name, Fetch(name, Path(os.devnull))) == data_of(name)
                assert (usual(tmp) / "users.lock").exists()

    assert in_threads(6, work) == [None] * 6
    assert not list(tmp.iterdir())


def loose(path: Path) -> None:
    path.mkdir(mode=0o755)


def a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


def a_file(path: Path) -> None:
    path.touch(0o600)


def of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("make", [loose, a_link, a_file, of_another_user])
def test_a_folder_that_is_not_safely_ours_is_not_used(
    make: Callable[[Path], None], tmp: Path, log: Path, start: Callable[..., User]
) -> None:
    make(usual(tmp))
    before = sorted(tmp.rglob("*"))
    with NodeCache(None, LIMIT) as cache:
        assert cache.get("a", Fetch("a", log)) == data_of("a")
        (own,) = tmp.glob(f"{usual(tmp).name}-*")
        assert own.stat().st_mode & 0o777 == 0o700
        assert holds(own, "a")
    assert sorted(tmp.rglob("*")) == before
    killed = start(None, LIMIT)
    killed.get("a", log)
    killed.kill()
    assert sorted(tmp.rglob("*")) != before
    NodeCache(None, LIMIT).close()
    assert sorted(tmp.rglob("*")) == before


# A given folder.


def test_a_given_folder_is_kept(folder: Path, log: Path, start: Callable[..., User]) -> None:
    folder.mkdir()
    (folder / "notes.part").write_text("of the user")
    with NodeCache(folder, 10) as cache:
        for name in "ab":
            cache.get(name, Fetch(name, log))
    killed, living = start(folder, LIMIT), start(folder, LIMIT)
    killed.ask("get", Fetch("dead", log, hang=True))
    living.ask("get", Fetch("alive", log, hang=True))
    wait_for(lambda: len(parts(folder)) == 3 and len(fetches(log)) == 4)
    killed.kill()
    with NodeCache(folder, LIMIT) as cache:
        assert len(parts(folder)) == 2
        assert cache.get("b", Fetch("b", log)) == data_of("b")
    assert sorted(fetches(log)) == sorted(["a", "b", "dead", "alive"])
    assert (folder / "notes.part").read_text() == "of the user"


@pytest.mark.parametrize("keep", [0, 1, TRAILER, 0.5, -TRAILER, -1])
@pytest.mark.parametrize("zeros", [False, True], ids=["short", "zeros"])
def test_a_file_cut_short_is_fetched_again(keep: float, zeros: bool, folder: Path, log: Path) -> None:
    with NodeCache(folder, LIMIT) as cache:
        cache.get("a", Fetch("a", log))
    path = place(folder, "a")
    whole = path.stat().st_size
    os.truncate(path, int(whole * keep if 0 < keep < 1 else keep % whole))
    if zeros:
        os.truncate(path, whole)
    for _ in range(2):
        with NodeCache(folder, LIMIT) as cache:
            assert cache.get("a", Fetch("a", log)) == data_of("a")
    assert fetches(log) == ["a", "a"]


def test_what_a_reader_found_wrong_is_fetched_again(folder: Path, log: Path) -> None:
    with NodeCache(folder, LIMIT) as cache:
        cache.get("a", lambda: b"rotten")
        cache.forget("a")
        assert cache.get("a", Fetch("a", log)) == data_of("a")
        cache.forget("never seen")


# A disk that refuses.


def test_a_file_where_the_folder_should_be(folder: Path, log: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING), NodeCache(folder, LIMIT) as cache:
        for name in "abab":
            assert cache.get(name, Fetch(name, log)) == data_of(name)
    assert len(caplog.messages) == 1
    assert "cannot be written" in caplog.text
    assert folder.read_text() == "a file"


UNWRITABLE = """
import os, pathlib, resource, sys
from pipeline.node_cache import NodeCache
from tests.cache_users import data_of
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
with NodeCache(folder, 10**6) as cache:
    assert cache.get("before", lambda: data_of("before")) == data_of("before")
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    elif how == "read only":
        folder.chmod(0o555)
        for file in folder.iterdir():
            file.chmod(0o644)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
    elif how == "gone":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    for name in "abab":
        view = cache.get(name, lambda: data_of(name))
        assert view == data_of(name) and view.readonly
with NodeCache(folder, 10**6) as cache:
    if how != "gone":
        assert cache.get("before", lambda: b"") == data_of("before")
    assert cache.get("a", lambda: data_of("a")) == data_of("a")
"""


@pytest.mark.parametrize("how", ["full", "read only", "gone"])
def test_fetched_bytes_where_the_disk_refuses(how: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder = Path(base) / "cache"
        done = subprocess.run(
            [sys.executable, "-c", UNWRITABLE, folder, how], check=False, capture_output=True, text=True
        )
        folder.chmod(0o700)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("cannot be written") == (1 if how == "gone" else 2)
        assert not parts(folder)


# Other processes that come from this one.


def test_a_pickled_cache_opens_the_same_folder(folder: Path, log: Path, start: Callable[..., User]) -> None:
    with NodeCache(folder, LIMIT) as cache:
        cache.get("a", Fetch("a", log))
        assert start(cache).get("a", log) == data_of("a")
        with pickle.loads(pickle.dumps(cache)) as again:
            assert (again.folder, again.limit_bytes) == (folder, LIMIT)
    assert fetches(log) == ["a"]


def test_a_forked_child_does_not_hold_the_locks_of_its_parent(tmp: Path, log: Path, start: Callable[..., User]) -> None:
    parent, waiter = start(None, LIMIT), start(None, LIMIT)
    parent.get("seen", log)
    parent.ask("get in a thread", Fetch("a", log, hang=True)).answer()
    wait_for(lambda: fetches(log) == ["seen", "a"])
    child = parent.ask("fork", None).answer()
    try:
        parent.kill()
        assert waiter.get("a", log) == data_of("a")
        waiter.end()
        assert not list(tmp.iterdir())  # it was the last user, though the child lives
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_is_a_user_of_its_own(tmp: Path, log: Path, start: Callable[..., User]) -> None:
    parent = start(None, LIMIT)
    child = parent.ask("fork", Fetch("a", log)).answer()
    try:
        parent.kill()
        with NodeCache(None, LIMIT) as cache:
            assert cache.get("a", Fetch("a", log)) == data_of("a")
        assert holds(usual(tmp), "a")
    finally:
        os.kill(child, signal.SIGKILL)
    assert fetches(log) == ["a"]


def test_the_locks_of_the_parent_outlive_a_child(tmp: Path, log: Path, start: Callable[..., User]) -> None:
    parent = start(None, LIMIT)
    parent.get("a", log)
    assert parent.ask("get in a forked worker", Fetch("b", log)).answer() == 0
    assert parent.ask("close in a forked worker").answer() == 0
    with NodeCache(None, LIMIT):
        assert holds(usual(tmp), "a", "b")
    assert holds(usual(tmp), "a", "b")
    parent.end()
    assert not list(tmp.iterdir())


def test_a_forked_worker_that_ends_last_leaves_nothing(tmp: Path, log: Path, start: Callable[..., User]) -> None:
    parent = start(None, LIMIT)
    parent.ask("close").answer()
    parent.end()
    code = (
        "import multiprocessing as mp\nfrom pipeline.node_cache import NodeCache\n"
        "def work(cache, go):\n    cache.get('a', lambda: b'a')\n    go.wait(30)\n"
        "cache, go = NodeCache(None, 100), mp.get_context('fork').Event()\n"
        "worker = mp.get_context('fork').Process(target=work, args=(cache, go))\n"
        "worker.start()\ncache.get('a', lambda: b'a')\ncache.close()\ngo.set()\nworker.join()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not list(tmp.iterdir())


def test_a_closed_cache_says_so(folder: Path) -> None:
    cache = NodeCache(folder, LIMIT)
    cache.close()
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        cache.get("a", lambda: b"")


def test_a_fetch_that_outlives_its_folder_names_no_file_of_the_next_user(tmp_path: Path, tmp: Path) -> None:
    """Closing does not wait for fetches. The late one must not give a finished name to what another is writing."""
    begun, go_on, late = threading.Event(), threading.Event(), []
    first = NodeCache(None, LIMIT)

    def slow() -> bytes:
        begun.set()
        go_on.wait()
        return data_of("a")

    thread = threading.Thread(target=lambda: late.append(first.get("a", slow)))
    thread.start()
    begun.wait()
    first.close()
    assert not usual(tmp).exists()
    with NodeCache(None, LIMIT) as second:

        def meanwhile() -> bytes:
            go_on.set()
            thread.join()
            assert finished(usual(tmp)) == []
            return data_of("a")

        assert second.get("a", meanwhile) == data_of("a")
        assert holds(usual(tmp), "a")
    assert late == [data_of("a")]
