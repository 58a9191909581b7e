"""Predictions -> scores.json: every number of an evaluation, how sure each is, and of what it is.

war, uar, macro_f1, recall, f1, matrix      micacl.metrics
intervals                                   95 %, by subject: micacl.bootstrap
groups                                      recall of head, mid and tail, where the training counts are known
calibration                                 ECE, class-wise ECE and NLL, before and after a temperature
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from micacl.bootstrap import DRAWS, LEVEL, Interval, Units, intervals
from micacl.calibration import (
    BINS,
    LEAST,
    MOST,
    Floats,
    Ints,
    at_temperature,
    classwise_ece,
    ece,
    fit_temperature,
    nll,
    reliability,
)
from micacl.metrics import Scores, group_recalls, long_tail_groups
from micacl.predictions import BEST, LAST, SCORES, Predictions, folder_of
from pipeline.contract import MicaclError, expecting, json_object, require_between
from pipeline.storage import open_store

OF_BUNDLE = "of the bundle"
FEW_CLIPS = 100
"""Of validation, for a temperature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """A temperature and whose it is."""

    value: float | None
    """None: validation did not decide one (micacl.calibration)."""
    split: str
    """On which it was fitted, or OF_BUNDLE: it was given at export."""
    clips: int
    step: int
    """Of the checkpoint; a temperature belongs to one set of weights."""

    @classmethod
    def fit(cls, predictions: Predictions, split: str, step: int) -> Temperature:
        value = fit_temperature(predictions.p_NK, predictions.truth_N)
        return cls(value=value, split=split, clips=len(predictions), step=step)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Temperature:
        return cls(**{name: said[name] for name in ("value", "split", "clips", "step")})

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "split": self.split, "clips": self.clips, "step": self.step}


def summarise(
    predictions: Predictions,
    scores: Scores,
    *,
    train_clips: Mapping[str, int] | None = None,
    temperature: Temperature | None = None,
) -> dict[str, Any]:
    """The numbers of scores.json."""
    groups = None if train_clips is None else long_tail_groups(train_clips)
    return {
        **scores.to_dict(),
        "intervals": interval_fields(predictions),
        "train_clips": None if train_clips is None else dict(train_clips),
        "groups": None
        if groups is None
        else {name: {"classes": groups[name], "recall": r} for name, r in group_recalls(scores.recall, groups).items()},
        "calibration": calibration_fields(predictions.p_NK, predictions.truth_N, temperature),
    }


def interval_fields(predictions: Predictions) -> dict[str, Any]:
    """Intervals in plain values, and what was drawn."""
    units = Units.of(predictions.keys, predictions.subjects)
    found = intervals(units, predictions.truth_N, predictions.predicted_N, len(predictions.labels))
    recall = zip(predictions.labels, found.pop("recall"), strict=True)
    return {
        "level": LEVEL,
        "draws": DRAWS,
        "by": units.kind,
        "units": units.units,
        "note": units.note,
        **{name: _plain(x) for name, x in found.items()},
        "recall": {word: _plain(x) for word, x in recall},
    }


def _plain(interval: Interval) -> list[float] | None:
    return None if interval is None else list(interval)


def calibration_fields(p_NK: Floats, truth_N: Ints, temperature: Temperature | None) -> dict[str, Any]:
    """ECE and NLL before, and after if validation has decided a temperature."""
    value = None if temperature is None else temperature.value
    return {
        "bins": BINS,
        "temperature": None if temperature is None else temperature.to_dict(),
        "before": _calibration(p_NK, truth_N),
        "after": None if value is None else _calibration(at_temperature(p_NK, value), truth_N),
    }


def _calibration(p_NK: Floats, truth_N: Ints) -> dict[str, Any]:
    return {
        "ece": ece(p_NK, truth_N),
        "classwise_ece": classwise_ece(p_NK, truth_N),
        "nll": nll(p_NK, truth_N),
        "reliability": reliability(p_NK, truth_N).to_dict(),
    }


def to_text(scores: Scores, fields: Mapping[str, Any], *, changed: bool = False) -> str:
    """Lines for people, in percent. `changed`: the classifier is not as it was trained."""
    found = fields["intervals"]
    lines = [scores.to_text()]
    spans = ((name.upper(), found[name]) for name in ("war", "uar"))
    said = [f"{name} {100 * x[0]:.1f} to {100 * x[1]:.1f}" for name, x in spans if x is not None]
    if said:
        lines.append(f"95 % by {found['by']} ({found['units']}): {', '.join(said)}. {found['note']}".rstrip())
    lines.append(_calibration_text(fields["calibration"], changed=changed))
    return "\n".join(lines)


def _calibration_text(fields: Mapping[str, Any], *, changed: bool) -> str:
    before, after, temperature = fields["before"]["ece"], fields["after"], fields["temperature"]
    text = f"ECE {100 * before:.2f}"
    if temperature is None and changed:
        return f"{text} (no temperature: those of validation are of the unchanged scores)"
    if temperature is None:
        return f"{text} (no temperature: `micacl evaluate ... --split val` fits one, if the run has validation clips)"
    if after is None:
        return f"{text} (no temperature: any is as good on {temperature['split']})"
    few = "" if temperature["clips"] >= FEW_CLIPS else ", which is few: it may do harm"
    fitted = f"fitted on {temperature['clips']} clips of {temperature['split']}{few}"
    where = f"T {temperature['value']:.3f}, {OF_BUNDLE if temperature['split'] == OF_BUNDLE else fitted}"
    return f"{text}, {100 * after['ece']:.2f} at {where}"


def stored_temperature(model_url: str, step: int) -> Temperature | None:
    """What an evaluation on `val` has fitted for these weights; None if there is none. Raises MicaclError."""
    for which in (LAST, BEST):
        store = open_store(model_url)
        key = f"{folder_of('val', which)}/{SCORES}"
        if not store.exists(key):
            continue
        with expecting(store.url(key)):
            said = json_object(store.get(key), store.url(key))["calibration"]["temperature"]
        if said is not None and said["step"] == step:
            return Temperature.of(said)
    return None


def temperature_of(run_url: str, step: int, said: str) -> float:
    """What `--temperature` means: `none`, `auto` (of validation, for this checkpoint), a number. Raises MicaclError."""
    if said == "none":
        return 1.0
    if said == "auto":
        found = stored_temperature(run_url, step)
        if found is None or found.value is None:
            cause = "has no temperature" if found is None else "was right on all validation clips, so no temperature"
            raise MicaclError(
                f"Step {step} of {run_url} {cause}{'' if found is None else ' is told from another'}.",
                "No bundle was written.",
                f"Fit one with `micacl evaluate {run_url} DATASET --split val`, or leave --temperature out.",
            )
        return found.value
    try:
        value = float(said)
    except ValueError as error:
        raise MicaclError(
            f"--temperature is {said!r}.", "No bundle was written.", "Use none, auto or a number."
        ) from error
    require_between(LEAST, MOST, "--temperature", value)
    return value


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of those that are there; None of none."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None
