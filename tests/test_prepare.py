"""The Ray Data job: the same version from any number of workers, after any kill, and never two at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.contract import digest
from pipeline.storage import LocalStore
from pipeline.verify import verify_dataset
from tests.cli import Done, micacl

pytestmark = pytest.mark.slow

LABELS = ("happy", "sad", "fear")
VIDEOS = 18
CROP = ("--crop.size", "64", "--pack.max-bags", "4")
Draw = Callable[..., bytes]


def write_raw(folder: Path, draw: Draw, first: int = 0, last: int = VIDEOS) -> str:
    """Videos first .. last - 1 in class folders; two of each dozen are broken or empty."""
    for i in range(first, last):
        data = draw(LABELS[i % 3], 12, 120, i % 4)
        path = folder / LABELS[i % 3] / f"{i:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if i % 12 == 5 else data[:700] if i % 12 == 11 else data)
        os.utime(path, (1, 1))
    return str(folder)


def tree(url: str) -> dict[str, str]:
    """Everything that readers see, by content: shards, index files, records, quarantine list and versions."""
    store = LocalStore(url)
    seen = ("shards/", "index/", "versions/", "quarantine/", "records/")
    return {e.key: digest(store.get(e.key)) for prefix in seen for e in store.list(prefix)}


def prepare(raw: str, url: str, *more: str, **environment: str) -> Done:
    return micacl("prepare", raw, url, *CROP, *more, module="pipeline", **environment)


class Running:
    """`micacl prepare` under way."""

    def __init__(self, raw: str, url: str, *more: str, **environment: str) -> None:
        command = [sys.executable, "-m", "pipeline", "prepare", raw, url, *CROP, *more]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)
        self.store = LocalStore(url)

    def wait_for(self, prefix: str, count: int) -> bool:
        """Until that many objects are there. False if the command ended first."""
        while self.process.poll() is None:
            if sum(1 for e in self.store.list(prefix) if e.key.endswith((".tar", ".parquet"))) >= count:
                return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """SIGKILL of the driver, and the end of its tasks."""
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, face_video: Draw) -> str:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw", face_video)


@pytest.fixture(scope="module")
def whole(raw: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run with one worker."""
    url = str(tmp_path_factory.mktemp("whole") / "dataset")
    done = prepare(raw, url, "--workers", "1")
    assert done.code == 0, done.stderr
    return {"tree": tree(url), **done.result}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray with two cores that several commands can join."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield cluster.address
        cluster.shutdown()


def test_every_video_is_accounted_for(whole: Mapping[str, Any]) -> None:
    assert whole["videos"] == {"listed": VIDEOS, "written": VIDEOS - 3, "quarantined": 3}
    assert whole["videos_decoded"] == VIDEOS
    assert sum(n for of_split in whole["bags"].values() for n in of_split.values()) == VIDEOS - 3


def test_four_workers_make_the_same_bytes(raw: str, whole: Mapping[str, Any], tmp_path: Path) -> None:
    assert prepare(raw, str(tmp_path), "--workers", "4").code == 0
    assert tree(str(tmp_path)) == whole["tree"]


@pytest.mark.parametrize(("prefix", "count"), [("listing/", 1), ("crops/", 1), ("crops/", VIDEOS), ("shards/", 2)])
def test_a_killed_driver_loses_nothing(
    raw: str, whole: Mapping[str, Any], tmp_path: Path, prefix: str, count: int, ray_cluster: str
) -> None:
    url = str(tmp_path)
    running = Running(raw, url, "--address", ray_cluster)
    assert running.wait_for(prefix, count), running.end()
    running.kill()
    cropped = sum(1 for _ in LocalStore(url).list("crops/"))
    done = prepare(raw, url, "--address", ray_cluster)
    assert done.code == 0, done.stderr
    assert done.result["videos_decoded"] <= VIDEOS - cropped, "finished work was done again"
    assert tree(url) == whole["tree"]


def processes_of(mark: str) -> list[psutil.Process]:
    """Those that were started below a command with `mark` in its PYTHONPATH, sandboxes and Ray's own too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.environ().get("PYTHONPATH", "") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("how", ["done", "terminated", "killed"])
def test_no_process_outlives_the_command(raw: str, tmp_path: Path, how: str) -> None:
    mark = str(tmp_path / "mark")
    path = os.pathsep.join([*map(os.path.abspath, sys.path), mark])
    running = Running(raw, str(tmp_path / "dataset"), "--workers", "2", PYTHONPATH=path)
    assert running.wait_for("crops/", 1), running.end()
    names = [" ".join(process.cmdline()) for process in processes_of(mark)]
    assert any("pipeline.sandbox_child" in name for name in names)
    assert any("raylet" in name for name in names)
    if how == "terminated":
        running.process.terminate()
    elif how == "killed":
        running.process.kill()
    code, _, err = running.end()
    assert code == {"done": 0, "terminated": 130, "killed": -signal.SIGKILL}[how], err
    end_s = time.monotonic() + (30 if how == "killed" else 2)
    while (left := processes_of(mark)) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert left == []


def test_a_killed_worker_is_replaced(raw: str, whole: Mapping[str, Any], tmp_path: Path) -> None:
    running = Running(raw, str(tmp_path), "--workers", "2")
    assert running.wait_for("crops/", 2), running.end()
    below = psutil.Process(running.process.pid).children(recursive=True)
    workers = [p for p in below if "MapBatches" in p.cmdline()[0]]
    assert workers, "no worker was found to kill"
    workers[0].send_signal(signal.SIGKILL)
    code, _, err = running.end()
    assert code == 0, err
    assert tree(str(tmp_path)) == whole["tree"]


def test_a_lost_node_is_outlived(raw: str, whole: Mapping[str, Any], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
            cluster.wait_for_nodes()
            running = Running(raw, str(tmp_path), "--address", cluster.address)
            assert running.wait_for("crops/", 3), running.end()
            cluster.remove_node(nodes[0], allow_graceful=False)
            code, _, err = running.end()
        finally:
            cluster.shutdown()
    assert code == 0, err
    assert tree(str(tmp_path)) == whole["tree"]


def test_two_different_runs_at_once_one_wins(raw: str, tmp_path: Path, face_video: Draw, ray_cluster: str) -> None:
    more = write_raw(tmp_path / "more", face_video, 100, 106)
    url = str(tmp_path / "dataset")
    both = [Running(one, url, "--address", ray_cluster, "--max-quarantined", "1") for one in (raw, more)]
    ended = [one.end() for one in both]
    assert sorted(code for code, _, _ in ended) == [0, 2], [err for _, _, err in ended]
    (loser,) = (err for code, _, err in ended if code == 2)
    assert "Somebody else committed version 1" in loser
    assert "bags in" in loser
    assert verify_dataset(url)["ok"]
    assert [e.key for e in LocalStore(url).list("versions/")] == ["versions/000001.json"]


def test_two_equal_runs_at_once_agree(raw: str, whole: Mapping[str, Any], tmp_path: Path, ray_cluster: str) -> None:
    both = [Running(raw, str(tmp_path), "--address", ray_cluster) for _ in range(2)]
    for code, _, err in [one.end() for one in both]:
        assert code == 0, err
    assert tree(str(tmp_path)) == whole["tree"]


def test_appended_videos_are_all_that_is_worked_on(tmp_path: Path, face_video: Draw) -> None:
    raw, url = write_raw(tmp_path / "raw", face_video), str(tmp_path / "dataset")
    first = prepare(raw, url).result
    write_raw(tmp_path / "raw", face_video, VIDEOS, VIDEOS + 2)
    second = prepare(raw, url).result
    assert (second["version"], second["videos_decoded"]) == (2, 2)
    assert second["shards_written"] <= 4 < first["shards"], "a new bag changes at most the shard that it falls into"
    assert verify_dataset(url)["ok"]
    write_raw(tmp_path / "fresh", face_video, 0, VIDEOS + 2)
    assert prepare(str(tmp_path / "fresh"), str(tmp_path / "other")).code == 0
    kinds = ("shards/", "index/", "records/", "quarantine/")
    fresh, grown = tree(str(tmp_path / "other")), tree(url)
    assert all(grown[key] == value for key, value in fresh.items() if key.startswith(kinds))
