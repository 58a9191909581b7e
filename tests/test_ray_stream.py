"""The plan decoded by Ray Data: batch for batch the same as by the threads of the rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.scaling import ScalingConfig, require_cpus
from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.contract import DFEW_LABELS, MicaclError
from pipeline.loader import Loader
from pipeline.ray_local import ray_session
from pipeline.ray_stream import ray_batches
from tests.cli import micacl
from tests.tiny_dataset import make_dataset

pytestmark = pytest.mark.slow

COUNTS = {"train": {"sad": 11, "happy": 18, "neutral": 1}}
PLAN = PlanConfig(global_batch=12, steps_per_epoch=5, seed=3)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def loader_of(folder: Path, rank: int = 0, ranks: int = 1) -> Loader:
    dataset = open_dataset(make_dataset(folder, COUNTS, 0, max_bags=4))
    return dataset.loader("train", PLAN, stream=StreamConfig(frames=2, threads=1), rank=rank, ranks=ranks)


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(("ranks", "start"), [(1, (0, 0)), (2, (0, 3)), (3, (1, 0))])
def test_ray_data_gives_the_same_batches(tmp_path: Path, ranks: int, start: tuple[int, int]) -> None:
    loaders = [loader_of(tmp_path, ranks - 1, ranks) for _ in range(2)]
    for loader in loaders:
        loader.seek(*start)
    there, here = list(ray_batches(loaders[0], 2, actors=1)), list(loaders[1].batches(2))
    assert len(there) == len(here) == 10 - 5 * start[0] - start[1]
    for one, other in zip(there, here, strict=True):
        assert (one.keys, one.epoch, one.step, one.state) == (other.keys, other.epoch, other.step, other.state)
        for name in ("frames_BNTHWC", "labels_B", "rows_B", "positions_B", "rng_keys_B2", "mask_B"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
            assert getattr(one, name).dtype == getattr(other, name).dtype
    assert loaders[0].state_dict() == loaders[1].state_dict()


@pytest.mark.usefixtures("ray")
def test_more_decoders_than_cpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MicaclError, match=r"want 3 CPUs, the Ray cluster has 2.*wait for ever.*--scaling.decoders"):
        next(ray_batches(loader_of(tmp_path), 1, actors=3))


@pytest.mark.usefixtures("ray")
def test_workers_and_decoders_that_do_not_fit_are_refused() -> None:
    require_cpus(ScalingConfig(workers=2))
    require_cpus(ScalingConfig(workers=1, decoders=1))
    with pytest.raises(MicaclError, match=r"2 workers with 1 CPUs and 1 decoders each want 4 CPUs.*has 2"):
        require_cpus(ScalingConfig(workers=2, decoders=1))


def test_training_with_decoders(tmp_path: Path) -> None:
    """That the batches are those of the threads is tested above."""
    url = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(DFEW_LABELS, 3)}, seed=0)
    flags = ["--plan.global-batch", "4", "--train.epochs", "1", "--batch.side", "24", "--stream.frames", "2"]
    flags += ["--scaling.engine", "plain", "--scaling.workers", "1", "--train.log-every", "1"]
    done = micacl("train", "tiny-cpu", url, str(tmp_path / "run"), *flags, "--scaling.decoders", "1")
    assert done.code == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
