"""Batches of a plan: the same clips at any number of ranks and workers, resumed behind any batch."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from micacl.torch_loader import TorchLoader
from pipeline import PlanConfig, StreamConfig, open_dataset
from pipeline.contract import MicaclError
from pipeline.dataset import Dataset
from pipeline.loader import ClipBatch, EvalLoader, Loader, batch_of_bags
from pipeline.plan import EpochPlan
from pipeline.rows import split_rows
from pipeline.stream import BagStream
from tests.gloo import run_ranks
from tests.tiny_dataset import INSTANCES, SIZE, make_dataset

COUNTS = {"train": {"sad": 11, "happy": 18, "neutral": 1}, "test": {"sad": 2, "happy": 5, "unlabelled": 3}}
PLAN = PlanConfig(policy="uniform", global_batch=24, steps_per_epoch=4, seed=3)
STREAM = StreamConfig(frames=2, lookahead=8, prefetch=16, threads=2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("loader"), COUNTS, 0, max_bags=4)


@pytest.fixture(scope="module")
def dataset(url: str) -> Dataset:
    return open_dataset(url)


def loader_of(dataset: Dataset, rank: int = 0, ranks: int = 1, plan: PlanConfig = PLAN, **rest: Any) -> Loader:
    return dataset.loader("train", plan, stream=STREAM, rank=rank, ranks=ranks, **rest)


def seen(batches: Iterable[ClipBatch]) -> dict[tuple[int, int], tuple[str, tuple[int, ...], bytes]]:
    """(epoch, position) -> key, rng key and pixels."""
    return {
        (batch.epoch, int(position)): (key, tuple(rng_key.tolist()), frames.tobytes())
        for batch in batches
        for position, key, rng_key, frames in zip(
            batch.positions_B, batch.keys, batch.rng_keys_B2, batch.frames_BNTHWC, strict=True
        )
    }


@pytest.fixture(scope="module")
def two_epochs(dataset: Dataset) -> dict[tuple[int, int], tuple[str, tuple[int, ...], bytes]]:
    with loader_of(dataset) as loader:
        return seen(loader.batches(2))


def test_a_batch_is_what_the_plan_says(dataset: Dataset) -> None:
    loader = loader_of(dataset)
    keys, labels = (dataset.split("train")[name].to_pylist() for name in ("key", "label"))
    plan = EpochPlan(loader.index, PLAN, 0)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    for step, batch in enumerate(batches):
        assert batch.rows_B.tolist() == plan.batch(step).tolist()
        assert list(batch.keys) == [keys[row] for row in batch.rows_B]
        assert [dataset.labels[n] for n in batch.labels_B] == [labels[row] for row in batch.rows_B]
        assert np.bincount(batch.labels_B).tolist() == [8, 8, 8]
        assert batch.frames_BNTHWC.shape == (24, INSTANCES, 2, SIZE, SIZE, 3)
        assert batch.frames_BNTHWC.dtype == np.uint8
        assert batch.positions_B.tolist() == list(range(24 * step, 24 * step + 24))
        assert batch.mask_B.all()
        assert (batch.epoch, batch.step) == (0, step)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_share_the_same_sequence(dataset: Dataset, two_epochs: dict[Any, Any], ranks: int) -> None:
    together: dict[Any, Any] = {}
    for rank in range(ranks):
        with loader_of(dataset, rank, ranks) as loader:
            mine = seen(loader.batches(2))
        assert {position % ranks for _, position in mine} == {rank}
        assert not together.keys() & mine.keys()
        together |= mine
    assert together == two_epochs


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6, 7, 8])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 3), (2, 1)])
def test_a_run_resumes_at_another_number_of_ranks(
    dataset: Dataset, two_epochs: dict[Any, Any], stop: int, before: int, after: int
) -> None:
    """At the start, in the middle, before the last batch, at the boundary of epochs, at the end."""
    together, states = {}, set()
    for rank in range(before):
        with loader_of(dataset, rank, before) as loader:
            batches = list(islice(loader.batches(2), stop))
            together |= seen(batches)
            states |= {json.dumps(loader.state_dict()), *[json.dumps(batch.state) for batch in batches[-1:]]}
    (state,) = states  # the same on every rank, and the one that came with the last batch
    assert len(together) == 24 * stop
    for rank in range(after):
        with loader_of(dataset, rank, after) as loader:
            loader.load_state_dict(json.loads(state))
            rest = seen(loader.batches(2))
            assert not together.keys() & rest.keys()
            together |= rest
    assert together == two_epochs


def test_iterating_takes_epoch_after_epoch(dataset: Dataset, two_epochs: dict[Any, Any]) -> None:
    with loader_of(dataset) as loader:
        first = next(iter(loader))
        rest = list(loader)
        second = list(loader)
    assert [batch.step for batch in (first, *rest)] == [0, 1, 2, 3]
    assert [(batch.epoch, batch.step) for batch in second] == [(1, step) for step in range(4)]
    assert seen([first, *rest, *second]) == two_epochs


def test_read_ahead_moves_no_position(dataset: Dataset) -> None:
    with loader_of(dataset) as loader:
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 0)
        batches = iter(loader)
        next(batches)
        assert loader.state_dict()["step"] == 1
        *_, last = batches
    assert (last.state["epoch"], last.state["step"]) == (1, 0)
    assert loader.state_dict() == last.state


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"global_batch": 48}, "global batch 24 and this run has 48"),
        ({"policy": "sqrt"}, "with plan"),
        ({"seed": 4}, "with plan"),
        ({"steps_per_epoch": 5}, "with plan"),
        ({"clips_per_class": 1}, "with plan"),
    ],
)
def test_another_plan_is_refused_or_begins_its_epoch_anew(dataset: Dataset, change: dict[str, Any], cause: str) -> None:
    with loader_of(dataset) as loader:
        list(islice(loader.batches(9), 6))
        state = loader.state_dict()
    other = loader_of(dataset, plan=PlanConfig(**{"global_batch": 24, "steps_per_epoch": 4, "seed": 3, **change}))
    with pytest.raises(MicaclError, match=rf"{cause}.*left out or seen twice.*start a new run"):
        other.load_state_dict(state)
    other.load_state_dict(state, restart_epoch=True)
    assert (other.state_dict()["epoch"], other.state_dict()["step"]) == (1, 0)
    loader.load_state_dict(state, restart_epoch=True)
    assert loader.state_dict() == state


def test_another_version_is_refused(dataset: Dataset, url: str, tmp_path: Path) -> None:
    state = loader_of(dataset).state_dict()
    other = open_dataset(make_dataset(tmp_path, COUNTS, 1, max_bags=4))
    with pytest.raises(MicaclError, match="dataset version"):
        loader_of(other).load_state_dict(state)
    filtered = open_dataset(url, where="subject not in ('s0', 's1')")
    with pytest.raises(MicaclError, match="dataset version"):
        loader_of(filtered).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, None, {"a": "b"}])
def test_what_is_no_state_is_refused(dataset: Dataset, state: Any) -> None:
    with pytest.raises(MicaclError, match="does not have the parts version, plan, epoch"):
        loader_of(dataset).load_state_dict(state)


def test_a_batch_that_ranks_cannot_share_is_refused(dataset: Dataset) -> None:
    with pytest.raises(MicaclError, match=r"24 is not a multiple of 5 ranks.*such as 25"):
        loader_of(dataset, 0, 5)


def test_unlabelled_clips_are_refused(dataset: Dataset) -> None:
    with pytest.raises(MicaclError, match="unlabelled"):
        dataset.loader("test", PLAN)


def test_subjects_take_turns(dataset: Dataset) -> None:
    plan = PlanConfig(global_batch=6, second="subject")
    subjects = dataset.split("train")["subject"].to_pylist()
    with loader_of(dataset, plan=plan) as loader:
        uses: dict[tuple[int, str], int] = {}
        for batch in loader:
            for row, label in zip(batch.rows_B, batch.labels_B, strict=True):
                uses[int(label), subjects[row]] = uses.get((int(label), subjects[row]), 0) + 1
    for label in range(3):
        of_class = [n for (of, _), n in uses.items() if of == label]
        assert max(of_class) - min(of_class) <= 1


# Evaluation.


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("clips_per_batch", [1, 4, 16])
def test_every_row_is_evaluated_once(dataset: Dataset, ranks: int, clips_per_batch: int) -> None:
    rows, lengths = [], set()
    for rank in range(ranks):
        loader = EvalLoader(
            split_rows(dataset, "test"), STREAM, clips_per_batch=clips_per_batch, rank=rank, ranks=ranks
        )
        batches = list(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        assert {len(batch.keys) for batch in batches} <= {clips_per_batch}
        rows += [int(row) for batch in batches for row in batch.rows_B[batch.mask_B]]
    assert sorted(rows) == list(range(10))
    assert len(lengths) == 1


def test_evaluation_frames_do_not_depend_on_the_draw(dataset: Dataset) -> None:
    once, again = (seen(dataset.eval_loader("test", stream=STREAM, clips_per_batch=n)) for n in (3, 10))
    assert {value[2] for value in once.values()} == {value[2] for value in again.values()}


def test_bags_in_memory_are_decoded_as_an_evaluation_decodes_them(dataset: Dataset) -> None:
    rows = split_rows(dataset, "test")
    with BagStream(dataset, rows, STREAM) as stream:
        bags = [stream.bag(row) for row in range(len(rows))]
    batch, (wanted,) = batch_of_bags(bags, STREAM), list(EvalLoader(rows, STREAM, clips_per_batch=len(rows)))
    assert batch.frames_BNTHWC.dtype == np.uint8
    assert np.array_equal(batch.frames_BNTHWC, wanted.frames_BNTHWC)
    assert batch.keys == wanted.keys


# Other processes.


def test_a_loader_can_be_sent_to_another_process(dataset: Dataset, two_epochs: dict[Any, Any]) -> None:
    loader = loader_of(dataset)
    next(iter(loader))
    there = pickle.loads(pickle.dumps(loader))
    assert there.state_dict() == loader.state_dict()
    assert seen(there.batches(2)).items() <= two_epochs.items()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_torch_workers_keep_the_order_and_the_state(dataset: Dataset, two_epochs: dict[Any, Any], workers: int) -> None:
    whole = loader_of(dataset)
    next(iter(whole))  # threads run when the workers are made
    torch_loader = TorchLoader(whole, workers=workers)
    batches = [*torch_loader, *torch_loader]
    assert [(b.epoch, b.step) for b in batches] == [(0, 1), (0, 2), (0, 3), *((1, step) for step in range(4))]
    assert all(b.frames_BNTHWC.dtype == torch.uint8 and b.labels_B.dtype == torch.int64 for b in batches)
    found = {
        (b.epoch, int(p)): (key, tuple(k.tolist()), f.numpy().tobytes())
        for b in batches
        for p, key, k, f in zip(b.positions_B, b.keys, b.rng_keys_B2, b.frames_BNTHWC, strict=True)
    }
    assert found == {place: value for place, value in two_epochs.items() if place >= (0, 24)}
    assert torch_loader.state_dict() == batches[-1].state


def test_a_loader_in_a_data_loader_of_torch(dataset: Dataset) -> None:
    """Without our wrapper of it: batches as they are, in this process."""

    class Plain(torch.utils.data.IterableDataset[ClipBatch]):
        def __iter__(self) -> Any:
            return iter(loader_of(dataset))

    batches = list(DataLoader(Plain(), batch_size=None))
    assert [batch.step for batch in batches] == [0, 1, 2, 3]


def take_ranks(rank: int, ranks: int, url: str, state: dict[str, Any] | None, stop: int | None) -> dict[str, Any]:
    """What one gloo rank sees; all ranks are in step, as training is."""
    with loader_of(open_dataset(url), rank, ranks) as loader:
        if state is not None:
            loader.load_state_dict(state)
        found = []
        for batch in loader.batches(2):
            keys: list[Any] = [None] * ranks
            mine = [(int(p), key) for p, key in zip(batch.positions_B, batch.keys, strict=True)]
            torch.distributed.all_gather_object(keys, mine)
            found.append([batch.epoch, sorted(pair for part in keys for pair in part)])
            if stop is not None and len(found) == stop:
                break
        return {"found": found, "state": loader.state_dict()}


@pytest.mark.slow
def test_gloo_ranks_see_one_sequence_through_a_kill(url: str, two_epochs: dict[Any, Any], tmp_path: Path) -> None:
    """4 ranks stop after 3 steps, of 2 one is killed at its second step, 1 goes on: the sequence is that of one run."""
    expected = [
        [epoch, [[place, two_epochs[epoch, place][0]] for place in range(24 * step, 24 * step + 24)]]
        for epoch in (0, 1)
        for step in range(4)
    ]
    first = run_ranks(take_ranks, 4, tmp_path / "four", url, None, 3)
    assert [part["found"] for part in first] == [expected[:3]] * 4
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(die_at, 2, tmp_path / "two", url, first[0]["state"], str(tmp_path / "saved.json"))
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert (saved["epoch"], saved["step"]) == (1, 0)
    (last,) = run_ranks(take_ranks, 1, tmp_path / "one", url, saved, None)
    assert last["found"] == expected[4:]


def die_at(rank: int, ranks: int, url: str, state: dict[str, Any], saved: str) -> None:
    """Saves its state after one step, as training does, and dies in the next."""
    with loader_of(open_dataset(url), rank, ranks) as loader:
        loader.load_state_dict(state)
        for done, batch in enumerate(loader.batches(2)):
            torch.distributed.barrier()
            if done and rank:
                os.kill(os.getpid(), 9)
            if not rank and not done:
                Path(saved).write_text(json.dumps(batch.state))


# Misuse, as it happens in notebooks.


def places(batches: Iterable[ClipBatch]) -> list[tuple[int, int]]:
    return [(batch.epoch, batch.step) for batch in batches]


def test_iterating_goes_on_behind_the_end_of_batches(dataset: Dataset) -> None:
    with loader_of(dataset) as loader:
        assert places(loader.batches(1)) == [(0, step) for step in range(4)]
        assert places(loader) == [(1, step) for step in range(4)]
        next(part := loader.batches(3))
        assert places(loader.batches(4)) == [*((2, step) for step in range(1, 4)), *((3, step) for step in range(4))]
        assert places(part) == []


def test_two_iterators_share_one_position(dataset: Dataset) -> None:
    with loader_of(dataset) as loader:
        one, other = iter(loader), iter(loader)
        assert places([next(one), next(other)]) == [(0, 0), (0, 1)]
        assert places(one) == [(0, 2), (0, 3)]
        assert places(other) == [], "the epoch is over for both"


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_state_may_be_loaded_while_iterating(dataset: Dataset, step: int) -> None:
    with loader_of(dataset) as loader:
        states = [loader.state_dict(), *(batch.state for batch in loader)]
        loader.load_state_dict(states[0])
        batches = iter(loader)
        next(batches)
        next(batches)
        loader.load_state_dict(states[step])
        assert places(batches) == [(0, at) for at in range(step, 4)]
        loader.load_state_dict(states[1])
        next(batches := iter(loader))
        loader.load_state_dict(states[4])
        assert places(batches) == [], "of another epoch"
        assert places(loader) == [(1, at) for at in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_loader_goes_on_from_a_state_that_is_loaded_while_iterating(dataset: Dataset, workers: int) -> None:
    with loader_of(dataset) as plain:
        loader = TorchLoader(plain, workers=workers)
        batches = iter(loader)
        first = next(batches)
        next(batches)
        loader.load_state_dict(first.state)
        assert [(b.epoch, b.step) for b in batches] == [(0, 1), (0, 2), (0, 3)]
        one, other = iter(loader), iter(loader)
        taken = [next(one), next(other), next(one), *other, *one]
        assert [(b.epoch, b.step) for b in taken] == [(1, step) for step in range(4)]
