"""The doctor finds what is wrong, says why, and leaves nothing behind. The S3 case runs a real server."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from cluster import doctor
from cluster.doctor import Check, check_storage, format_table, run_checks
from pipeline import storage, storage_s3
from pipeline.contract import MicaclError
from pipeline.object_store import ObjectStore, ObjectStoreConfig, find_weed
from pipeline.storage import Entry, LocalStore

FAULTS = ("write", "conditional write", "range read", "list", "delete")
STEPS = ["storage", *(f"storage {name}" for name in (*FAULTS[:-1], "uploads", "delete"))]


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def forget_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next S3 call read the environment again: boto3's default session keeps what it once read."""
    storage_s3._s3_client.cache_clear()
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_this_environment_is_healthy_and_every_failure_would_have_a_remedy(tmp_path: Path) -> None:
    checks = by_name(run_checks(str(tmp_path)))
    for name in ("python", *doctor.PINNED, "gpu", "gpu bf16", "compiler", "loopback", "detector", *STEPS):
        assert checks[name].ok, checks[name]
    assert {"disk", "shared memory", "demo store"} < set(checks)
    assert all(check.ok or check.remedy for check in checks.values())
    assert importlib.metadata.version("ray") in checks["ray"].detail
    assert files(tmp_path) == []


def test_without_a_url_no_storage_is_touched() -> None:
    assert not [check for check in run_checks(None) if check.name.startswith("storage")]


def test_a_version_outside_the_pin_and_a_missing_package_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.59.1")
    wrong = doctor.check_package("ray")
    assert not wrong.ok
    assert "2.59.1" in wrong.detail
    assert "2.60" in wrong.detail
    monkeypatch.undo()
    assert not doctor.check_package("no-such-package").ok
    assert "not installed" in doctor.check_package("no-such-package").detail


def test_a_local_build_of_torch_satisfies_its_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor.check_package("torch").ok
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.14.0+cu130")
    assert not doctor.check_package("torch").ok


def test_an_old_python_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.14")
    assert not doctor.check_python().ok


def test_little_room_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_gb", lambda folder: 0.064)  # what a container gets for /dev/shm
    assert not doctor.check_shared_memory(tmp_path).ok
    assert "--shm-size" in doctor.check_shared_memory(tmp_path).remedy
    assert not doctor.check_disk().ok
    assert doctor.check_shared_memory(tmp_path / "absent").ok


def test_bf16_convolution_is_compared_with_fp32() -> None:
    assert 1e-5 < doctor.conv3d_error("cpu") < 0.02


def test_other_detector_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.detector.YUNET_SHA256", "0" * 64)
    (check,) = [c for c in run_checks() if c.name == "detector"]
    assert not check.ok
    assert "sha256" in check.detail
    assert check.remedy


def test_a_check_that_raises_is_a_finding_with_the_reason() -> None:
    def broken() -> Check:
        raise ZeroDivisionError("seven by nothing")

    check = doctor._guarded("sums", broken, "Buy another abacus.")
    assert check == Check(
        name="sums", ok=False, detail="ZeroDivisionError: seven by nothing", remedy="Buy another abacus."
    )


def test_a_url_that_cannot_be_opened_is_a_finding() -> None:
    failed = [check for check in check_storage("nosuchprotocol://bucket/x") if not check.ok]
    assert failed
    assert all("nosuchprotocol" in check.detail and check.remedy for check in failed)


class Forgetful(LocalStore):
    """A store with one fault at a time."""

    fault = ""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.fault == "conditional write":  # like a server that ignores If-None-Match
            self.put(key, data)
            return True
        return super().put_if_absent(key, data)

    def put(self, key: str, data: bytes) -> None:
        if self.fault == "write":
            raise MicaclError("The bucket is read only.", "Nothing was written.", "Ask for rights.")
        super().put(key, data)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        data = super().read_range(key, offset, size)
        return data[::-1] if self.fault == "range read" else data

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return iter(()) if self.fault == "list" else super().list(prefix)

    def delete(self, key: str) -> None:
        if self.fault != "delete":
            super().delete(key)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_store_is_found_and_nothing_else(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Forgetful(str(tmp_path))
    store.fault = fault
    monkeypatch.setattr(storage, "open_store", lambda url: store)
    checks = check_storage("anything")
    assert [check.name for check in checks if not check.ok] == [f"storage {fault}"]
    assert all(check.ok or check.remedy for check in checks)
    assert (files(tmp_path) == []) == (fault != "delete")
    assert checks[-1].name == "storage delete"


def test_a_real_s3_server_passes_and_a_missing_bucket_and_a_wrong_secret_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        find_weed()
    except MicaclError as missing:
        pytest.skip(str(missing))
    with ObjectStore(tmp_path, ObjectStoreConfig(stop_s=0)) as server:
        server.make_bucket("checked")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        forget_clients(monkeypatch)
        assert {check.name: check.ok for check in check_storage("s3://checked/deep/prefix")} == dict.fromkeys(
            STEPS, True
        )
        assert by_name(check_storage("s3://checked"))["storage uploads"].detail == "none in parts was left open"
        for key in ("deep/prefix/a", "deep/prefix/b", "deeper/c"):
            storage_s3.S3Store("s3://checked")._client.create_multipart_upload(Bucket="checked", Key=key)
        uploads = by_name(check_storage("s3://checked/deep/prefix"))["storage uploads"]
        assert (uploads.ok, uploads.detail) == (True, "2 in parts are open")
        assert "lifecycle" in uploads.remedy
        (missing_bucket,) = check_storage("s3://not-there")
        assert not missing_bucket.ok
        assert "NoSuchBucket" in missing_bucket.detail
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
        forget_clients(monkeypatch)
        (wrong_secret,) = check_storage("s3://checked")
        assert not wrong_secret.ok
        assert server.secret_key not in format_table([wrong_secret])
    forget_clients(monkeypatch)


def test_to_be_refused_a_list_of_uploads_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: LocalStore) -> int:
        raise MicaclError("AccessDenied.", "Nothing was read.", "Ask for rights.")

    monkeypatch.setattr(LocalStore, "open_uploads", refuse)
    uploads = by_name(check_storage(str(tmp_path)))["storage uploads"]
    assert (uploads.ok, uploads.detail) == (True, "not told: AccessDenied.")
    assert "s3:ListBucketMultipartUploads" in uploads.remedy


def test_the_table_marks_failures_and_puts_the_remedy_below() -> None:
    table = format_table(
        [
            Check(name="python", ok=True, detail="3.11.9"),
            Check(name="shared memory", ok=False, detail="0.1 GB", remedy="Give it more."),
        ]
    )
    assert table.splitlines() == [
        "ok    python         3.11.9",
        "FAIL  shared memory  0.1 GB",
        "                     -> Give it more.",
        "2 checks, 1 failed",
    ]
