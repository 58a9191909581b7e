"""What `micacl doctor [URL]` looks at: one line a check, and for each failure what to do about it.

Three groups: this Python (version, packages against the pins the project declares), this machine (GPU, compiler,
disk, shared memory, loopback, detector weights), and, with a URL, that storage: a real round trip of the very calls
on which a dataset's commit rests. A store that takes a second conditional write is found here, not by two prepare
jobs that both believe they have won.

A doctor must outlive its patients: torch, onnxruntime and boto3 are imported inside the check that needs them, and a
check that raises anything is a failed check with the reason in words.
"""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.contract import MicaclError

if TYPE_CHECKING:
    from pipeline.storage import Store

PROJECT = "micacl"
PINNED = ("torch", "ray", "deepspeed", "av", "onnxruntime")
REINSTALL = "Run: pip install -c constraints.txt -e ."
MIN_DISK_GB = 10.0
"""Free space for shard caches, checkpoints and Ray's spill files."""
MIN_SHM_GB = 1.0
"""Ray's object store and the data loaders lie in /dev/shm; containers get 64 MB unless told otherwise."""
PORTS = {8000: "serve", 8265: "Ray dashboard"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str
    """What was found, e.g. `2.60.0` or the reason of the failure."""
    remedy: str = ""
    """What to do; empty when there is nothing to do."""


def run_checks(url: str | None = None) -> list[Check]:
    """All checks, in the order they are best read; with `url` (s3://bucket/prefix or a folder) also of that storage.

    Writes two small objects under `URL/doctor-check/` and deletes them. Raises nothing but KeyboardInterrupt.
    """
    checks = [_guarded("python", check_python)]
    checks += [_guarded(name, partial(check_package, name), REINSTALL) for name in PINNED]
    checks += [
        _guarded("gpu", check_gpu, "Check the driver with nvidia-smi."),
        _guarded("gpu bf16", check_gpu_bf16, "Train in fp32, and report the GPU and driver."),
        _guarded("compiler", check_compiler),
        _guarded("disk", check_disk),
        _guarded("shared memory", check_shared_memory),
        _guarded("loopback", check_loopback, "Check /etc/hosts and the firewall rules of the loopback interface."),
        _guarded("detector", check_detector, REINSTALL),
        _guarded("demo store", check_demo_store),
    ]
    return checks + (check_storage(url) if url else [])


def format_table(checks: Iterable[Check]) -> str:
    """The checks as aligned lines for a terminal; a remedy stands under its check."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"      {'':<{width}}  -> {check.remedy}")
    failed = sum(not check.ok for check in checks)
    lines.append(f"{len(checks)} checks, {failed} failed")
    return "\n".join(lines)


def _guarded(name: str, look: Callable[[], Check], remedy: str = "") -> Check:
    """`look()`, or a failed check that says what it raised."""
    try:
        return look()
    except MicaclError as error:
        return Check(name=name, ok=False, detail=f"{error.cause} {error.consequence}", remedy=error.remedy or remedy)
    except Exception as error:  # noqa: BLE001  (the reason is the finding)
        said = " ".join(str(error).split())[:300]
        return Check(name=name, ok=False, detail=f"{type(error).__name__}: {said}", remedy=remedy)


def check_python() -> Check:
    """The version against the project's requires-python."""
    wanted = importlib.metadata.metadata(PROJECT)["Requires-Python"]
    found = platform.python_version()
    ok = SpecifierSet(wanted).contains(found, prereleases=True)
    remedy = "" if ok else f"Make a virtual environment with Python {wanted} and install there."
    return Check(name="python", ok=ok, detail=f"{found} (wanted {wanted}) at {sys.prefix}", remedy=remedy)


def check_package(name: str) -> Check:
    """The installed version of `name` against the project's declared pin; nothing is imported."""
    pins = [Requirement(line) for line in importlib.metadata.requires(PROJECT) or ()]
    wanted = next((pin.specifier for pin in pins if pin.name == name), SpecifierSet())
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, ok=False, detail=f"not installed (wanted {wanted})", remedy=REINSTALL)
    ok = wanted.contains(found, prereleases=True)
    return Check(name=name, ok=ok, detail=f"{found} (wanted {wanted})", remedy="" if ok else REINSTALL)


def check_gpu() -> Check:
    """GPUs and cuDNN as torch sees them. No GPU is fine; a GPU that torch cannot use is not."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        versions = f"CUDA {torch.version.cuda}, cuDNN {cudnn}"
        return Check(name="gpu", ok=True, detail=f"{len(names)} seen: {', '.join(names)}; {versions}")
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return Check(name="gpu", ok=True, detail="none; everything runs on CPU, training slowly")
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Check(
        name="gpu",
        ok=False,
        detail=f"{', '.join(devices)} here, but torch {torch.__version__}, built {built}, sees no GPU",
        remedy="Install a torch built with CUDA, or a driver new enough for it (nvidia-smi shows what it supports).",
    )


def check_gpu_bf16() -> Check:
    """A bf16 Conv3d on the GPU against fp32 on the CPU; skipped without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return Check(name="gpu bf16", ok=True, detail="not tried: no GPU")
    error = conv3d_error("cuda")
    ok = error < 0.02
    remedy = "" if ok else "Update the driver; until then train in fp32."
    return Check(name="gpu bf16", ok=ok, detail=f"Conv3d differs from fp32 by {error:.4f} (limit 0.02)", remedy=remedy)


def conv3d_error(device: str) -> float:
    """Relative L2 difference between a bf16 Conv3d on `device` and the same in fp32 on the CPU; about 0.002 is right.

    Both see the same numbers, already rounded to bf16, so only the arithmetic differs.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    x_NCTHW = torch.randn(2, 16, 8, 28, 28, generator=generator).bfloat16()
    weight_OCTHW = torch.randn(32, 16, 3, 3, 3, generator=generator).bfloat16()
    wanted = torch.nn.functional.conv3d(x_NCTHW.float(), weight_OCTHW.float(), padding=1)
    got = torch.nn.functional.conv3d(x_NCTHW.to(device), weight_OCTHW.to(device), padding=1).float().cpu()
    return float((got - wanted).norm() / wanted.norm())


def check_compiler() -> Check:
    """C++ compiler and ninja. On CPU nothing is compiled; on a GPU DeepSpeed may build operators on first use."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    beside = Path(sys.executable).with_name("ninja")
    ninja = shutil.which("ninja") or (str(beside) if beside.is_file() else None)
    detail = f"C++ {compiler or 'absent'}, ninja {ninja or 'absent'}; not needed on CPU"
    if compiler and ninja:
        return Check(name="compiler", ok=True, detail=detail)
    remedy = "Only if a DeepSpeed GPU operator asks for it: apt-get install g++; pip install ninja."
    return Check(name="compiler", ok=True, detail=detail, remedy=remedy)


def check_disk() -> Check:
    """Free space in the working folder and in the folder for temporary files."""
    free = {str(folder): _free_gb(folder) for folder in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir())))}
    ok = min(free.values()) >= MIN_DISK_GB
    detail = ", ".join(f"{gb:.1f} GB free in {folder}" for folder, gb in free.items())
    remedy = "" if ok else f"Free some space (at least {MIN_DISK_GB:g} GB), or set TMPDIR to a larger disk."
    return Check(name="disk", ok=ok, detail=detail, remedy=remedy)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:  # noqa: S108  (looked at, not written to)
    """Free space in /dev/shm."""
    if not folder.is_dir():
        return Check(name="shared memory", ok=True, detail=f"no {folder}; Ray uses the temporary folder, more slowly")
    free = _free_gb(folder)
    ok = free >= MIN_SHM_GB
    remedy = "" if ok else "In a container: docker run --shm-size=8g. Else end what fills it (`df -h`, `ls`)."
    return Check(name="shared memory", ok=ok, detail=f"{free:.1f} GB free in {folder}", remedy=remedy)


def _free_gb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9


def check_loopback() -> Check:
    """A TCP connection to ourselves, what `localhost` means, and who sits on the ports that we use by default."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5) as sender:
        receiver, _ = server.accept()
        with receiver:
            receiver.settimeout(5)
            sender.sendall(b"ping")
            if receiver.recv(4) != b"ping":
                raise ConnectionError("what was sent to 127.0.0.1 did not arrive")
    addresses = {str(info[4][0]) for info in socket.getaddrinfo("localhost", None)}
    strange = addresses - {"127.0.0.1", "::1"}
    if strange:
        raise ConnectionError(f"localhost means {', '.join(sorted(strange))}")
    taken = [f"{port} ({what}) is in use" for port, what in PORTS.items() if _is_taken(port)]
    return Check(name="loopback", ok=True, detail=", ".join(["127.0.0.1 answers", *taken]))


def _is_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_detector() -> Check:
    """The face detector's weights: there, and with the right sha256."""
    from pipeline import detector

    size = len(detector.yunet_weights())  # checks the sha256
    detail = f"{detector.YUNET_FILE}, {size} bytes, sha256 {detector.YUNET_SHA256[:12]}…"
    return Check(name="detector", ok=True, detail=detail)


def check_demo_store() -> Check:
    """The local S3 server. Only the demo and the storage tests use it, so its absence is no failure."""
    from pipeline.object_store import PACKAGE, find_weed

    try:
        find_weed()
    except MicaclError as error:
        return Check(
            name="demo store", ok=True, detail=f"{error.cause} Only `micacl demo` needs it.", remedy=error.remedy
        )
    return Check(name="demo store", ok=True, detail=f"{PACKAGE} {importlib.metadata.version(PACKAGE)}")


def check_storage(url: str) -> list[Check]:
    """A round trip at `url`: write, conditional write, range read, list, delete. What depends on a failure is left out.

    The keys are random, so two doctors do not meet.
    """
    opened: list[Store] = []

    def look() -> Check:
        from pipeline.storage import open_store

        store = open_store(url)
        store.check()
        opened.append(store)
        return Check(name="storage", ok=True, detail=f"{store!r} answers")

    checks = [_guarded("storage", look, "Check the URL and the credentials.")]
    if not opened:
        return checks
    store, prefix = opened[0], f"doctor-check/{secrets.token_hex(8)}"
    try:
        for name, step, remedy in _STEPS:
            checks.append(_guarded(f"storage {name}", partial(step, store, prefix, name), remedy))
            if not checks[-1].ok and name == "write":
                break
        checks.append(_guarded("storage uploads", lambda: _open_uploads(store)))
    finally:
        checks.append(_guarded("storage delete", lambda: _delete(store, prefix), "Allow s3:DeleteObject, or clean up."))
    return checks


_BODY = bytes(range(256)) * 40


def _write(store: Store, prefix: str, name: str) -> Check:
    key = f"{prefix}-body"
    store.put(key, _BODY)
    got = store.get(key)
    return _compare(f"storage {name}", got == _BODY, f"{len(_BODY)} bytes written, {len(got)} read back")


def _conditional_write(store: Store, prefix: str, name: str) -> Check:
    key = f"{prefix}-once"
    first, second = store.put_if_absent(key, b"first"), store.put_if_absent(key, b"second")
    kept = store.get(key)
    ok = first and not second and kept == b"first"
    told = f"first {'taken' if first else 'refused'}, second {'taken' if second else 'refused'}, kept {kept!r}"
    remedy = "Two writers could both commit a version here: use a store with If-None-Match, or only one writer ever."
    return _compare(f"storage {name}", ok, told, remedy)


def _range_read(store: Store, prefix: str, name: str) -> Check:
    got = store.read_range(f"{prefix}-body", 1000, 300)
    return _compare(f"storage {name}", got == _BODY[1000:1300], f"300 bytes asked for at 1000, {len(got)} came")


def _list(store: Store, prefix: str, name: str) -> Check:
    found = {entry.key: entry.size for entry in store.list(prefix)}
    ok = found.get(f"{prefix}-body") == len(_BODY)
    return _compare(f"storage {name}", ok, f"{len(found)} objects of this check")


def _open_uploads(store: Store) -> Check:
    """Parts of large objects whose process died are invisible and cost money. Not to be told of them is no failure."""
    name = "storage uploads"
    try:
        found = store.open_uploads()
    except MicaclError as error:
        remedy = "To be told of uploads that were left open, allow s3:ListBucketMultipartUploads."
        return Check(name=name, ok=True, detail=f"not told: {error.cause}", remedy=remedy)
    if not found:
        detail = "this storage knows none" if found is None else "none in parts was left open"
        return Check(name=name, ok=True, detail=detail)
    remedy = "If nothing is running, killed processes left them: a lifecycle rule ends them (docs/decisions/0005)."
    return Check(name=name, ok=True, detail=f"{found}{'+' * (found >= 1000)} in parts are open", remedy=remedy)


def _delete(store: Store, prefix: str) -> Check:
    keys = [f"{prefix}-{name}" for name in ("body", "once")]
    for key in keys:
        store.delete(key)
    left = [key for key in keys if store.exists(key)]
    return _compare("storage delete", not left, f"left over: {', '.join(left)}" if left else "nothing is left over")


def _compare(name: str, ok: bool, detail: str, remedy: str = "Do not keep a dataset here; report the store.") -> Check:
    return Check(name=name, ok=ok, detail=detail, remedy="" if ok else remedy)


_STEPS: tuple[tuple[str, Callable[[Store, str, str], Check], str], ...] = (
    ("write", _write, "Allow s3:PutObject and s3:GetObject on this prefix."),
    ("conditional write", _conditional_write, "The store must support If-None-Match: *."),
    ("range read", _range_read, "The store must answer Range requests."),
    ("list", _list, "Allow s3:ListBucket."),
)
