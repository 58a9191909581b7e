"""What the documents tell a user to type exists: verbs, flags, files, recipes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import VERBS
from micacl.recipes import RECIPES, expand
from pipeline.cli import VERBS as PIPELINE_VERBS
from pipeline.cli import run
from pipeline.contract import DFEW_LABELS
from tests.tiny_dataset import make_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `micacl ...` line in a code block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line.split("  #")[0].strip() for line in block.splitlines()]
            found += [(page.name, line) for line in lines if re.match(r"(ray job|micacl|python -m pipeline) ", line)]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_parse(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag of a documented command is one that its verb has."""
    words = shlex.split(command.rsplit(" -- ", maxsplit=1)[-1].replace("[flags]", ""))
    verbs = PIPELINE_VERBS if words[0] == "python" else VERBS
    verb, *rest = words[3:] if words[0] == "python" else words[1:]
    assert verb in verbs, f"{page}: {command}"
    flags = [word for word in rest if word.startswith("--")]
    named = rest[0] if verb in ("train", "model", "crossval") else ""
    if named and not named.startswith("RECIPE"):
        assert expand(named), f"{page}: {command}"
    recipe = [named if named and not named.startswith("RECIPE") else "tiny-cpu"] if named else []
    assert run(verbs, "micacl", [verb, *recipe, "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in flags:
        assert flag in shown, f"{page}: {command}"


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:pipeline|micacl|cluster)/[\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_every_room_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## The rooms", 1)[1].split("\n## ", 1)[0]
    for stair in ("pipeline", "micacl", "cluster"):
        rows = " ".join(row for row in text.splitlines() if row.startswith(f"| `{stair}/"))
        named = {name.rpartition("/")[2] for name in re.findall(r"`([\w./]+)`", rows)}
        rooms = {path.name for path in (ROOT / stair).glob("*.py") if not path.name.startswith("__")}
        assert rooms <= named, rooms - named


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds(name: str) -> None:
    from micacl.config import RunConfig, from_dict, to_dict
    from micacl.model.micacl import build_model

    config = RECIPES[name]()
    assert from_dict(RunConfig, to_dict(config)) == config
    assert build_model(config.model, seed=0).training


def test_no_page_names_a_private_path() -> None:
    for page in [*PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md"))]:
        assert not re.search(r"/(root|home|opt)/|file://", page.read_text()), page.name


# The examples of the stream's page, as they stand but for the dataset's place.


def examples() -> list[str]:
    page = (ROOT / "docs" / "stream.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3), ids=["torch", "lightning", "ray"])
def test_the_examples_of_the_stream_run(number: int, tmp_path: Path) -> None:
    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(DFEW_LABELS, 4)}, 0)
    assert len(examples()) == 3
    code = examples()[number].replace("s3://my-bucket/dataset", url)
    (tmp_path / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}
    command = [sys.executable, "example.py"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
