"""An array is used again only when nobody holds it."""

from __future__ import annotations

import random
import threading

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.buffers import Buffers

SHAPE = (4, 8, 3)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_free_array_is_used_again() -> None:
    buffers = Buffers(4)
    first = buffers.take(SHAPE)
    place = address(first)
    del first
    assert address(buffers.take(SHAPE)) == place
    assert address(buffers.take((8, 4, 3))) == place  # the same bytes in another shape


def test_an_array_that_is_held_in_any_way_is_left_alone() -> None:
    buffers = Buffers(8)
    arrays = [buffers.take(SHAPE) for _ in range(4)]
    places = [address(array) for array in arrays]
    assert len(set(places)) == 4
    held = [arrays[0][1:2], torch.from_numpy(arrays[1])[0], memoryview(arrays[2]), arrays[3].reshape(-1).view(np.int8)]
    del arrays
    assert not {address(buffers.take(SHAPE)) for _ in range(3)} & set(places)
    del held
    assert {address(buffers.take(SHAPE)) for _ in range(1)} <= set(places)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(most=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_what_is_kept_keeps_its_bytes(most: int, seed: int) -> None:
    buffers, rng = Buffers(most), random.Random(seed)
    kept: dict[int, np.ndarray] = {}
    for number in range(60):
        array = buffers.take(SHAPE)
        array[:] = number
        if rng.random() < 0.3:
            kept[number] = array[rng.randrange(4) :]
        if kept and rng.random() < 0.2:
            del kept[rng.choice(list(kept))]
        assert all((array == number).all() for number, array in kept.items())


def test_threads_never_share_an_array() -> None:
    buffers = Buffers(6)

    def work(number: int) -> None:
        for _ in range(400):
            array = buffers.take(SHAPE)
            array[:] = number
            assert (array == number).all()

    errors: list[BaseException] = []

    def watched(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=watched, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
