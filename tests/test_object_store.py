"""The demo's S3 server: signed access, conditional writes, restart, and nothing left behind. Starts real servers."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import numpy as np
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from pipeline import object_store
from pipeline.contract import MicaclError
from pipeline.object_store import INSTALL, PACKAGE, ObjectStore, ObjectStoreConfig, find_weed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

try:
    find_weed()
except MicaclError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]


def client_of(environment: dict[str, str]) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}),
    )


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int) -> bool:
    """Running, and not a zombie that waits for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until_gone(pid: int) -> bool:
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("store"), ObjectStoreConfig(stop_s=0)) as running:
        running.make_bucket("raw")
        yield running


def test_the_servers_socket_files_are_where_we_tidy(store: ObjectStore) -> None:
    assert len(list(object_store._socket_files(store.ports[0]))) >= 5


def test_all_ports_are_on_loopback_and_outside_rays_range(store: ObjectStore) -> None:
    assert len(set(store.ports)) == 10
    assert all(is_open(port) for port in store.ports)
    assert not any(10002 <= port <= 19999 or port > 65535 for port in store.ports)
    listening = {
        (line.split()[1].split(":")[0], int(line.split()[1].split(":")[1], 16))
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    loopback = "0100007F"
    assert {(loopback, port) for port in store.ports} <= listening
    assert not {(address, port) for address, port in listening if port in store.ports and address != loopback}


def test_the_environment_is_all_a_client_needs(store: ObjectStore, tmp_path: Path) -> None:
    script = (
        "import boto3; s = boto3.client('s3'); s.put_object(Bucket='raw', Key='k', Body=b'hello');"
        "print(s.get_object(Bucket='raw', Key='k')['Body'].read().decode())"
    )
    stale = {"AWS_SESSION_TOKEN": "left in the shell"}
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin", **stale, **store.environment()}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "hello", done.stderr[-2000:]


def test_a_wrong_secret_is_refused(store: ObjectStore) -> None:
    wrong = {**store.environment(), "AWS_SECRET_ACCESS_KEY": "0" * 40}
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client_of(wrong).list_buckets()


def test_the_second_conditional_put_is_refused(store: ObjectStore) -> None:
    client = client_of(store.environment())
    client.put_object(Bucket="raw", Key="once", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="raw", Key="once", Body=b"second", IfNoneMatch="*")
    assert client.get_object(Bucket="raw", Key="once")["Body"].read() == b"first"


def test_a_bucket_is_made_once_and_a_missing_one_is_an_error(store: ObjectStore) -> None:
    store.make_bucket("raw")
    with pytest.raises(ClientError, match="NoSuchBucket"):
        client_of(store.environment()).put_object(Bucket="typing-error", Key="k", Body=b"")


def test_no_credential_on_the_command_line_in_a_file_or_in_a_repr(store: ObjectStore) -> None:
    command = Path(f"/proc/{store.pid}/cmdline").read_bytes()
    assert b"mini" in command
    written = b"".join(path.read_bytes() for path in store.folder.rglob("*") if path.is_file())
    assert len(written) > 1000
    for secret in (store.access_key, store.secret_key):
        assert secret.encode() not in command
        assert secret not in repr(store)
    assert store.secret_key.encode() not in written


def test_a_folder_has_one_server(store: ObjectStore) -> None:
    with pytest.raises(MicaclError, match="already serves"), ObjectStore(store.folder):
        pass
    assert client_of(store.environment()).list_buckets()["Buckets"]


@pytest.mark.slow
def test_objects_survive_an_orderly_stop_and_a_kill_and_nothing_is_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wanted = {f"{turn}/{i}": rng.bytes(10_000 + i) for turn in range(2) for i in range(20)}
    for turn, stop_s in enumerate((15.0, 0.0)):  # 0 is SIGTERM and SIGKILL at once
        with ObjectStore(tmp_path, ObjectStoreConfig(stop_s=stop_s)) as store:
            store.make_bucket("kept")
            client = client_of(store.environment())
            for key, data in wanted.items():
                if key.startswith(f"{turn}/"):
                    client.put_object(Bucket="kept", Key=key, Body=data)
            pid, ports = store.pid, store.ports
        assert pid is not None
        assert not is_alive(pid)
        assert not any(is_open(port) for port in ports)
        assert list(object_store._socket_files(ports[0])) == []
        assert store.pid is None
        assert "stopped" in repr(store)
    with ObjectStore(tmp_path, ObjectStoreConfig(stop_s=0)) as store:
        client = client_of(store.environment())
        for key, data in wanted.items():
            assert client.get_object(Bucket="kept", Key=key)["Body"].read() == data, key


def test_the_server_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from pipeline.object_store import ObjectStore\n"
        f"with ObjectStore(Path({str(tmp_path)!r})) as store:\n"
        "    print(store.pid, store.ports[0], flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        assert is_alive(pid)
    finally:
        parent.kill()
        parent.wait(30)
    assert wait_until_gone(pid)
    for left in object_store._socket_files(port):  # what nobody was left to tidy
        left.unlink()


@pytest.mark.slow
def test_a_taken_port_is_tried_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        free = object_store._free_port()
        taken.bind(("127.0.0.1", free))
        taken.listen()
        real, found = object_store._free_port, [free]  # what it would say just before another program takes the port
        monkeypatch.setattr(object_store, "_free_port", lambda: found.pop() if found else real())
        with ObjectStore(tmp_path, ObjectStoreConfig(stop_s=0)) as store:
            assert store.ports[0] != free
            assert client_of(store.environment()).list_buckets()["Buckets"] == []
    assert not found


def test_an_error_inside_the_block_stops_the_server(tmp_path: Path) -> None:
    pid = None
    with pytest.raises(KeyError), ObjectStore(tmp_path, ObjectStoreConfig(stop_s=0)) as store:
        pid = store.pid
        raise KeyError
    assert pid is not None
    assert not is_alive(pid)


def test_a_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PACKAGE", f"{PACKAGE}-not-here")
    with pytest.raises(MicaclError) as caught, ObjectStore(tmp_path):
        pass
    assert INSTALL in caught.value.remedy
    assert (ROOT / INSTALL.split()[-1]).is_file()


def test_another_machine_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(MicaclError, match="aarch64"):
        find_weed()


def test_the_requirements_file_pins_the_installed_version_by_hash() -> None:
    text = (ROOT / "requirements-demo.txt").read_text()
    assert f"{PACKAGE}=={importlib.metadata.version(PACKAGE)} " in text
    assert "--hash=sha256:3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d" in text


def test_bad_settings_are_refused() -> None:
    with pytest.raises(MicaclError, match="attempts 0"):
        ObjectStoreConfig(attempts=0)


def test_the_server_is_in_a_group_of_its_own(store: ObjectStore) -> None:
    """So that Ctrl-C in a terminal reaches us first, and the group can be ended as a whole."""
    assert store.pid is not None
    assert os.getpgid(store.pid) == store.pid != os.getpgrp()
