"""Bad input ends with one clear error, exit code 2, JSON on the last line and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.cli import run
from pipeline.demo import DemoConfig, write_raw_bucket
from pipeline.storage import open_store
from tests.cli import micacl
from tests.tiny_dataset import make_dataset


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `micacl ...` in this process; returns the error text of exit code 2."""
    from cluster.cli import VERBS

    def call(*arguments: str) -> str:
        assert run(VERBS, "micacl", list(arguments)) == 2
        shown = capsys.readouterr()
        error = json.loads(shown.out.strip().splitlines()[-1])["error"]
        assert set(error) == {"cause", "consequence", "remedy"}
        assert all(error.values())
        assert error["cause"] in shown.err
        return " ".join(error.values())

    return call


def test_an_empty_bucket(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    assert "holds no video" in said("prepare", str(tmp_path / "raw"), str(tmp_path / "ds"))
    assert not (tmp_path / "ds").exists()


def test_a_missing_bucket(said: Callable[..., str], s3: Callable[[str], str], tmp_path: Path) -> None:
    s3("known")
    assert "NoSuchBucket" in said("prepare", "s3://no-such-bucket-here/raw", str(tmp_path / "ds"))
    assert "NoSuchBucket" in said("status", "s3://no-such-bucket-here/ds")


def test_wrong_credentials(s3: Callable[[str], str]) -> None:
    url = s3("secret")
    done = micacl("status", url, AWS_SECRET_ACCESS_KEY="wrong")
    assert done.code == 2
    assert "SignatureDoesNotMatch" in done.result["error"]["cause"]
    assert "AWS_SECRET_ACCESS_KEY" in done.result["error"]["remedy"]


def test_an_unknown_label(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\na.mp4,hapy\n")
    text = said("prepare", str(tmp_path / "labels.csv"), str(tmp_path / "ds"))
    assert "Unknown label 'hapy'" in text
    assert "Did you mean happy" in text


def test_a_dataset_without_a_version(said: Callable[..., str], tmp_path: Path) -> None:
    for verb in (["train", "tiny-cpu"], ["verify"], ["report"]):
        rest = [str(tmp_path / "run")] if verb[0] == "train" else []
        assert "no version" in said(*verb, str(tmp_path / "nothing"), *rest)


def test_a_bundle_of_another_schema(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text('{"schema": 7}')
    for verb, rest in (("predict", [str(tmp_path), str(tmp_path / "out")]), ("serve", [])):
        assert "schema 7" in said(verb, str(tmp_path / "bundle"), *rest)


def test_a_table_without_paths_or_with_a_bad_split(said: Callable[..., str], tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label\na.mp4,happy\n")
    assert "columns file, label" in said("prepare", str(table), str(tmp_path / "ds"))
    table.write_text("path,label,split\na.mp4,happy,dev\n")
    assert "split 'dev'" in said("prepare", str(table), str(tmp_path / "ds"))
    assert "does not exist" in said("prepare", str(tmp_path / "none.csv"), str(tmp_path / "ds"))


def test_a_run_of_another_configuration(said: Callable[..., str], tmp_path: Path) -> None:
    from cluster.scaling import ScalingConfig
    from cluster.train import check_run
    from micacl.recipes import tiny_cpu
    from pipeline.contract import DFEW_LABELS

    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(DFEW_LABELS, 2)}, seed=0)
    check_run(url, str(tmp_path / "run"), tiny_cpu(), ScalingConfig(), None)
    text = said("train", "tiny-cpu", url, str(tmp_path / "run"), "--train.lr", "0.5")
    assert "another configuration (train.lr: " in text
    assert "no multiple of" in said("train", "tiny-cpu", url, str(tmp_path / "r"), "--scaling.workers", "3")


def test_unknown_verbs_recipes_and_flags_name_the_nearest(said: Callable[..., str]) -> None:
    assert "Did you mean prepare" in said("prepar")
    assert "Choose one of: tiny-cpu" in said("train", "tiny")
    done = micacl("train", "tiny-cpu", "a", "b", "--train.lrr", "1")
    assert done.code == 2
    assert "--train.lr" in done.stderr


def test_bad_values_name_their_flag(said: Callable[..., str], tmp_path: Path) -> None:
    for flag, value in (("--crop.faces", "two"), ("--crop.min-frames", "1")):
        done = micacl("prepare", str(tmp_path), str(tmp_path / "ds"), flag, value)
        assert done.code == 2, done.stderr
        assert flag in done.stderr


def test_a_temperature_of_other_scores(said: Callable[..., str], tmp_path: Path) -> None:
    flags = ("--temperature", "auto", "--tau-norm", "1")
    assert "fitted to the unchanged scores" in said("export", str(tmp_path / "run"), str(tmp_path / "bundle"), *flags)


def test_the_demo_does_not_empty_a_folder_it_did_not_make(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert "was not made by the demo" in said("demo", "--out", str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.slow
def test_bad_input_that_a_ray_data_worker_meets_comes_out_as_itself(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nbogus://x/y.mp4,happy\n")
    done = micacl("prepare", str(table), str(tmp_path / "ds"))
    assert done.code == 2
    assert "bogus" in done.result["error"]["cause"]


@pytest.mark.slow
def test_bad_input_that_a_training_worker_meets_comes_out_as_itself(tmp_path: Path) -> None:
    from pipeline.contract import DFEW_LABELS

    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(DFEW_LABELS, 2)}, seed=0)
    shard = next((tmp_path / "ds" / "shards" / "train" / "happy").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    done = micacl("train", "tiny-cpu", url, str(tmp_path / "run"), "--plan.global-batch", "4", "--train.epochs", "1")
    assert done.code == 2
    assert "does not have the sha256 that the index lists" in done.result["error"]["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_so_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_raw_bucket(open_store(str(raw)), DemoConfig(train_clips=(36, 12, 22, 16, 8, 2, 4), frames=(14, 16), side=160))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "prepare", str(raw / "labels.csv"), str(tmp_path / "ds")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("cropped"):
            break
    started = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out.strip().splitlines()[-1])["error"]["cause"] == "Interrupted."
    assert "Traceback" not in err
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], timeout=30)
    assert not alive


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["verify", "/no/such/dataset"], 2)])
def test_a_reader_that_has_gone_is_no_error(words: list[str], code: int) -> None:
    """As `micacl ... 2>&1 | head` does once head has seen enough."""
    read, write = os.pipe()
    os.close(read)
    module = [sys.executable, "-m", "pipeline"]
    done = subprocess.run([*module, *words], check=False, stdout=write, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, "BrokenPipe" in done.stderr, "Traceback" in done.stderr) == (code, False, False)
    assert subprocess.run([*module, *words], check=False, stdout=write, stderr=write).returncode == code
    os.close(write)
