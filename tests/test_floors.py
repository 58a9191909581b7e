"""The stairs hold: lower floors do not load the libraries of upper ones, even indirectly."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import micacl
import pipeline


def loaded_by(modules: list[str], suspects: list[str]) -> str:
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print([s for s in {suspects!r} if s in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def modules_of(package: object, *, without: tuple[str, ...] = ()) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")  # type: ignore[attr-defined]
    return [m.name for m in found if m.name not in without and not m.name.endswith("__main__")]


def test_pipeline_loads_no_torch() -> None:
    assert loaded_by(modules_of(pipeline), ["torch", "deepspeed", "micacl", "cluster"]) == "[]"


def test_ray_is_loaded_by_its_two_doors_alone() -> None:
    doors = ("pipeline.prepare", "pipeline.ray_stream")
    assert loaded_by(modules_of(pipeline, without=doors), ["ray"]) == "[]"
    assert all(loaded_by([door], ["ray"]) == "['ray']" for door in doors)


def test_micacl_loads_no_ray_and_no_deepspeed() -> None:
    assert loaded_by(modules_of(micacl), ["ray", "deepspeed", "cluster"]) == "[]"


@pytest.mark.parametrize("module", ["pipeline.cli", "cluster.cli"])
def test_the_command_starts_without_the_heavy_libraries(module: str) -> None:
    assert loaded_by([module], ["torch", "ray", "deepspeed", "av", "cv2", "onnxruntime"]) == "[]"


def test_no_library_reports_home(tmp_path: Path) -> None:
    """Reports are prepared in the home folder: onnxruntime, left alone, makes a database and a device id there."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    code = "import pipeline.detector, sys; assert sys.modules['onnxruntime']"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert [str(path) for path in tmp_path.rglob("*") if path.is_file()] == []


def test_import_contracts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_parquet_is_read_in_one_room() -> None:
    """Arrow's threads can end a short command with exit code 134: pipeline/parquet.py does without them."""
    for path in (Path(__file__).parents[1] / "pipeline").rglob("*.py"):
        if path.name != "parquet.py":
            assert "pq.read_table" not in path.read_text(), path
