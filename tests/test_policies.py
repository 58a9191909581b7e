"""Shares of the classes: policies, the floor, the schedule, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract import MicaclError
from pipeline.plan import EpochPlan, PlanConfig, PlanIndex, class_weights
from pipeline.policies import POLICIES, UNIT, shares
from tests.plan_checks import DFEW, make_rows


def config_of(policy: str, classes: int, **rest: Any) -> PlanConfig:
    weights = tuple(range(1, classes + 1)) if "custom" in (policy, rest.get("then")) else ()
    return PlanConfig(policy=policy, weights=weights, **rest)


def test_policies_go_from_natural_to_the_tail() -> None:
    def tail(policy: str, **rest: Any) -> float:
        return float(class_weights([1000, 10], PlanConfig(policy=policy, **rest))[1])

    assert tail("effective", beta=0.0) == tail("power", power=1.0) == tail("natural")
    assert tail("power", power=0.0) == tail("uniform") == 0.5
    assert tail("power", power=0.5) == tail("sqrt")
    order = [tail("natural"), tail("power", power=0.7), tail("sqrt"), tail("effective"), tail("uniform")]
    assert order == sorted(order)
    assert len(set(order)) == 5
    assert tail("power", power=-1.0) == pytest.approx(100 / 101)
    assert tail("effective", beta=0.9999999) == pytest.approx(0.5, abs=1e-4)
    assert tail("custom", weights=(1.0, 3.0)) == 0.75


@pytest.mark.parametrize("counts", [[1, 10**8], [10**8, 1, 1], [7, 5, 3], [1] * 1000, [10**8] * 49])
@pytest.mark.parametrize("policy", POLICIES)
def test_shares_sum_to_exactly_one_and_none_is_zero(counts: list[int], policy: str) -> None:
    for power in (-4.0, 0.5, 4.0):
        units = shares(counts, config_of(policy, len(counts), power=power))
        assert units.sum() == UNIT
        assert units.min() >= 1


def test_weights_are_a_ratio_however_large_or_small() -> None:
    for scale in (1e-300, 1.0, 1e308):
        weights = (0.25 * scale, 1.0 * scale, 0.75 * scale)
        units = shares([5, 6, 7], PlanConfig(policy="custom", weights=weights))
        assert (units * 8).tolist() == [UNIT, 4 * UNIT, 3 * UNIT]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 5000), min_size=2, max_size=9),
    policy=st.sampled_from(["natural", "sqrt", "uniform", "power"]),
    floor=st.integers(1, 4),
    spare=st.integers(0, 60),
)
def test_the_floor_lifts_the_small_and_keeps_the_ratio_of_the_others(
    counts: list[int], policy: str, floor: int, spare: int
) -> None:
    clips = floor * len(counts) + spare
    plain_C = class_weights(counts, PlanConfig(policy=policy, power=1.7))
    lifted_C = class_weights(counts, PlanConfig(policy=policy, power=1.7, clips_per_class=floor, global_batch=clips))
    assert np.all(lifted_C * clips > floor - 1e-6)
    above = lifted_C * clips > floor + 1e-6
    ratio_C = lifted_C[above] / plain_C[above]
    assert np.all(ratio_C <= 1 + 1e-6)
    assert not above.any() or ratio_C.max() == pytest.approx(ratio_C.min(), rel=1e-6)
    assert lifted_C.sum() == 1


def test_a_floor_that_fills_the_batch_leaves_nothing_to_the_policy() -> None:
    for classes in range(2, 60):
        for floor in (1, 3):
            config = PlanConfig(policy="natural", clips_per_class=floor, global_batch=floor * classes)
            index = PlanIndex.of_columns(np.arange(classes).repeat(3), np.arange(classes).repeat(3), classes)
            for epoch in (0, 5):
                assert set(EpochPlan(index, config, epoch).draws_C.tolist()) == {-(-3 // floor) * floor}


def test_a_schedule_moves_in_equal_steps() -> None:
    config = PlanConfig(policy="natural", then="uniform", then_from=3, then_over=4)
    tail_E = [float(class_weights(DFEW, config, epoch)[5]) for epoch in range(12)]
    natural, uniform = 116 / sum(DFEW), 1 / 7
    assert tail_E[:3] == pytest.approx([natural] * 3)
    assert tail_E[7:] == pytest.approx([uniform] * 5)
    assert np.diff(tail_E[2:8]) == pytest.approx([(uniform - natural) / 5] * 5)
    at_once = PlanConfig(policy="natural", then="uniform", then_from=3)
    assert [float(class_weights(DFEW, at_once, e)[5]) for e in (2, 3)] == pytest.approx([natural, uniform])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"policy": "even"}, r"--plan\.policy is 'even'\..*natural, sqrt, power, effective, uniform, custom"),
        ({"then": "even"}, r"--plan\.then is 'even'"),
        ({"beta": 1.0}, r"--plan\.beta is 1\.0.*0 <= beta < 1"),
        ({"beta": float("nan")}, r"--plan\.beta is nan"),
        ({"power": float("nan")}, r"--plan\.power is nan"),
        ({"power": 4.5}, r"--plan\.power is 4\.5.*-4 to 4"),
        ({"second": "video"}, r"--plan\.second is 'video'.*subject or scene"),
        ({"global_batch": 0}, r"--plan\.global-batch is 0.*1 or more"),
        ({"steps_per_epoch": 0}, r"--plan\.steps-per-epoch is 0"),
        ({"shard_window": 0}, r"--plan\.shard-window is 0"),
        ({"clips_per_class": -1}, r"--plan\.clips-per-class is -1"),
        ({"then_from": -1}, r"--plan\.then-from is -1"),
        ({"then_over": -1}, r"--plan\.then-over is -1"),
        ({"seed": -1}, r"--plan\.seed is -1"),
        ({"policy": "custom"}, r"'custom' has the weights \[\].*one weight above 0 for each class"),
        ({"weights": (1.0, 2.0)}, r"'uniform' has the weights \[1\.0, 2\.0\].*other policies none"),
        ({"policy": "custom", "weights": (1.0, 0.0)}, r"has the weights \[1\.0, 0\.0\]"),
        ({"policy": "custom", "weights": (1.0, float("nan"))}, r"has the weights"),
        ({"policy": "custom", "weights": (1.0, float("inf"))}, r"has the weights"),
        ({"policy": "custom", "weights": ("a", "b")}, r"--plan\.weights is \('a', 'b'\).*numbers"),
        ({"policy": "custom", "weights": 3}, r"--plan\.weights is 3"),
        ({"global_batch": 6.0}, r"--plan\.global-batch is 6\.0.*whole number"),
        ({"seed": 1.5}, r"--plan\.seed is 1\.5.*whole number"),
        ({"steps_per_epoch": True}, r"--plan\.steps-per-epoch is True.*whole number"),
        ({"global_batch": "6"}, r"--plan\.global-batch is '6'"),
        ({"global_batch": None}, r"--plan\.global-batch is None"),
        ({"global_batch": 10**9}, r"--plan\.global-batch is 1000000000\..*1 to 1048576"),
        ({"steps_per_epoch": 2**62}, r"--plan\.steps-per-epoch is 46.*1 to"),
        ({"then_over": 10**7}, r"--plan\.then-over is 10000000\..*0 to 10000"),
        ({"power": "0.5"}, r"--plan\.power is '0\.5'"),
    ],
)
def test_bad_settings_are_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MicaclError, match=words) as caught:
        PlanConfig(**fields)
    assert caught.value.consequence == "No epoch can be planned."
    assert caught.value.remedy


def test_numbers_of_numpy_and_lists_are_the_same_config() -> None:
    plain = PlanConfig(policy="custom", weights=(1.0, 2.0, 3.0), seed=3, global_batch=6, steps_per_epoch=2)
    for weights in ([1, 2, 3], np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3], np.int32)):
        whole = {"seed": np.int64(3), "global_batch": np.int32(6), "steps_per_epoch": np.uint8(2)}
        config = PlanConfig(policy="custom", weights=weights, **whole)  # type: ignore[arg-type]
        assert config == plain
        rows = make_rows([20, 4, 9])
        assert rows.plan(config).hash == rows.plan(plain).hash


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clips_per_class": 3, "global_batch": 8}, r"3 for 3 classes needs a global batch of 9, it is 8\..*Raise"),
        ({"policy": "custom", "weights": (1.0,)}, r"has 1 weights for 3 classes.*order of the label set"),
        ({"then": "custom", "weights": (1.0,) * 4, "then_from": 2}, r"has 4 weights for 3 classes"),
    ],
)
def test_settings_that_do_not_fit_the_classes_are_refused_at_the_first_epoch(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(MicaclError, match=words):
        make_rows([20, 4, 9]).plan(PlanConfig(**fields))
