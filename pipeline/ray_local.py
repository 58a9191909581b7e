"""Join the Ray cluster we were told of, or start a private one on this machine and leave nothing behind.

A private cluster asks for a token that only this process tree knows, keeps its files in a temporary folder of its own
that only this user can enter, and is gone with the folder when the block ends. Ray's processes listen on all
interfaces whatever address they are given (measured with 2.60): the token is the protection, and on a shared network a
firewall. `RAY_ADDRESS` (set inside
`ray job submit`) or a given address means: join.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.contract import MicaclError
from pipeline.ray_leftovers import OWNER, PREFIX, end_processes, sweep, who

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextlib.contextmanager
def ray_session(
    *, address: str | None = None, num_cpus: int | None = None, object_store_mb: int = 400
) -> Iterator[str]:
    """Yield `joined` or `private`. Everything that was started here is stopped at the end.

    Args:
        num_cpus: of a private cluster; None takes all cores.
        object_store_mb: shared memory of a private cluster. Rows are small here, so little is needed.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        import ray

        address = address or os.environ["RAY_ADDRESS"]
        _require_answer(address)
        if ray.is_initialized():
            yield "joined"
            return
        with _in_words(f"The Ray cluster at {address} was not joined"), _sigterm_as_before():
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        try:
            yield "joined"
        finally:
            ray.shutdown()
        return
    with _private_files() as folder:
        import ray

        try:
            with _in_words("Ray did not start on this machine"), _sigterm_as_before():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    object_store_memory=object_store_mb * 2**20,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,  # what a person should read comes back as results and progress lines
                    _temp_dir=str(folder),
                )
            yield "private"
        finally:
            with _undisturbed():
                ray.shutdown()


@contextlib.contextmanager
def _private_files() -> Iterator[Path]:
    """A short folder (Unix sockets allow 107 bytes) with a token in it, and the environment that points there."""
    short = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()  # noqa: S108  (mkdtemp makes a private folder in it)
    sweep(Path(short))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=short))
    (folder / OWNER).write_text(who(os.getpid()))
    inner = folder / "ray"  # Ray opens its own folder to everybody; the one around it stays closed
    inner.mkdir()
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    wanted = {**_QUIET, "RAY_TMPDIR": str(inner), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    _read_auth_again()
    try:
        yield inner
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        _read_auth_again()
        with _undisturbed():
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C waits: cleaning up takes seconds, and leaves nothing behind only if it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _sigterm_as_before() -> Iterator[None]:
    """What the caller does on SIGTERM stays. Ray's own handler aborts the process 3 s later, whatever it is cleaning up
    by then (measured with 2.60).
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    """A Ray that does not come up is no failure of ours. Raises MicaclError."""
    try:
        yield
    except Exception as error:  # Ray raises plain Exceptions too; all of them are told
        raise MicaclError(
            f"{what}: {next(iter(str(error).splitlines()), type(error).__name__)}",
            "Nothing was run.",
            "Check --workers and --address; a busy machine can be too slow for it: run the same command again.",
        ) from error


def _require_answer(address: str) -> None:
    """Refuse a cluster that does not answer; Ray would wait for it. Raises MicaclError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # `auto`, or a name that Ray knows
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise MicaclError(
            f"No Ray cluster answers at {address} ({error}).",
            "Nothing was run.",
            "Check --address or RAY_ADDRESS; without them a private Ray is started.",
        ) from error


def _read_auth_again() -> None:
    """Ray reads its authentication mode once, when it is imported, which may have been before our token was there.

    These two names are internal to Ray 2.60; its own tests use them for the same purpose.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
