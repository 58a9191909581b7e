"""Changes of a trained classifier: their formulas, what is refused, and that a bundle carries them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from micacl.bundle import BUNDLE, Bundle, export_bundle, load_bundle, load_model, run_state
from micacl.config import RunConfig
from micacl.loss import LossConfig
from micacl.model.micacl import MICACL, build_model
from micacl.posthoc import PostHoc, adjusted, apply, posthoc_of, tau_normalised
from micacl.recipes import tiny_cpu
from micacl.train.checkpoint import Checkpoint, write_checkpoint
from pipeline.contract import CropConfig, MicaclError
from pipeline.plan import PlanState
from pipeline.storage import open_store

COUNTS = [1956.0, 1515.0, 2135.0, 1738.0, 1175.0, 116.0, 721.0]


def test_tau_normalisation_by_hand() -> None:
    """Lengths 1 and 4: at tau 1 both become their geometric mean 2, at 0.5 the ratio 4 becomes 2."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(tau_normalised(weight, 1.0), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    half = tau_normalised(weight, 0.5).norm(dim=1)
    assert float(half[1] / half[0]) == pytest.approx(2.0)
    assert torch.equal(tau_normalised(weight, 0.0), weight)


def test_tau_normalisation_predicts_as_published() -> None:
    """w / |w|^tau up to one factor for all classes."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 5, generator=rng), torch.randn(50, 5, generator=rng)
    for tau in (0.3, 1.0, 2.0):
        published = x @ (weight / weight.norm(dim=1, keepdim=True) ** tau).T
        ours = x @ tau_normalised(weight, tau).T
        factor = ours / published
        torch.testing.assert_close(factor, factor.flatten()[0].expand_as(factor), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(tau_normalised(torch.zeros(2, 3), 1.0)).all()


def test_adjustment_takes_the_prior_out() -> None:
    """A model that says the training prior whatever it sees says uniform after it."""
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    torch.testing.assert_close(adjusted(prior.log()[None], COUNTS, 1.0).softmax(1), torch.full((1, 7), 1 / 7))
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adjusted(logits, COUNTS, 0.0), logits)
    torch.testing.assert_close(adjusted(logits, COUNTS, 0.5), logits - 0.5 * prior.log())
    with pytest.raises(MicaclError, match=r"--adjust cannot weigh a class by a count of 0"):
        adjusted(logits, [0.0, *COUNTS[1:]], 1.0)


def clips() -> Tensor:
    return torch.rand(2, 4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(model: MICACL) -> Tensor:
    return model.eval()(clips()).logits_BK


def test_both_changes_reach_the_scores() -> None:
    config = tiny_cpu().model
    plain = build_model(config, 0)
    posthoc = PostHoc(tau_norm=0.7, adjust=0.5, counts=tuple(COUNTS))
    changed = apply(build_model(config, 0), posthoc)
    with torch.inference_mode():
        bag = plain.eval()(clips()).bag_BD
        want = adjusted(bag @ tau_normalised(plain.head.weight, 0.7).T, COUNTS, 0.5)
    torch.testing.assert_close(logits_of(changed), want)
    assert torch.equal(logits_of(apply(build_model(config, 0), PostHoc())), logits_of(build_model(config, 0)))
    assert changed.head.weight.shape == plain.head.weight.shape


def test_what_makes_no_sense_is_refused() -> None:
    for name in ("balanced_softmax", "logit_adjusted"):
        with pytest.raises(MicaclError, match=f"--adjust is 1 and the model was trained with --loss.name {name}"):
            posthoc_of(0.0, 1.0, name, {"seen": COUNTS})
    with pytest.raises(MicaclError, match="does not say how many clips"):
        posthoc_of(0.0, 1.0, "ce", {})
    assert posthoc_of(1.0, 0.0, "balanced_softmax", {}) == PostHoc(tau_norm=1.0)
    for said in ({"tau_norm": -1.0}, {"adjust": float("nan")}):
        with pytest.raises(MicaclError, match="Use a number from 0 to 10"):
            PostHoc(**said)
    model = build_model(tiny_cpu().model, 0)
    model.add_module("head", nn.Sequential(model.head))
    with pytest.raises(MicaclError, match=r"--tau-norm is 1 and the model's head is a Sequential"):
        apply(model, PostHoc(tau_norm=1.0))


# ---- in a bundle

SEEN = {"dataset": [int(n) for n in COUNTS], "seen": COUNTS}


def a_run(folder: Path, config: RunConfig, counts: dict[str, Any] | None) -> str:
    """A checkpoint as training leaves it."""
    crop, plan = CropConfig(), PlanState(version="1", plan="0", epoch=1, step=0, global_batch=4)
    state = run_state(config, {**asdict(crop), "hash": crop.hash}, {"url": "d", "version": 1}, plan, counts)
    write_checkpoint(open_store(str(folder)), Checkpoint(3, build_model(config.model, 0).state_dict(), {}, state))
    return str(folder)


def test_a_bundle_carries_its_changes(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", tiny_cpu(), SEEN)
    plain = export_bundle(run, str(tmp_path / "plain"))
    made = export_bundle(run, str(tmp_path / "made"), tau_norm=0.7, adjust=0.5)
    assert json.loads((tmp_path / "made" / BUNDLE).read_text())["posthoc"] == {
        "tau_norm": 0.7, "adjust": 0.5, "counts": COUNTS,
    }  # fmt: skip
    assert made.posthoc == load_bundle(made.url).posthoc == PostHoc(tau_norm=0.7, adjust=0.5, counts=tuple(COUNTS))
    assert made.id != plain.id
    assert all(torch.equal(t, plain.weights[name]) for name, t in made.weights.items())  # those of training
    want = logits_of(apply(build_model(tiny_cpu().model, 0), made.posthoc))
    torch.testing.assert_close(logits_of(made.build()), want)
    assert not torch.allclose(logits_of(plain.build()), want)


def test_a_run_or_a_bundle_is_changed_for_an_evaluation(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", tiny_cpu(), SEEN)
    made = export_bundle(run, str(tmp_path / "made"), tau_norm=0.7)
    changed: list[Bundle] = [load_model(url).changed(0.0, 1.0) for url in (run, made.url)]
    assert changed[0].posthoc == changed[1].posthoc == PostHoc(adjust=1.0, counts=tuple(COUNTS))
    assert len({made.id, changed[0].id, changed[1].id}) == 3
    torch.testing.assert_close(logits_of(changed[0].build()), logits_of(changed[1].build()))


def test_an_export_refuses_before_it_writes(tmp_path: Path) -> None:
    balanced = replace(tiny_cpu(), loss=LossConfig(name="balanced_softmax"))
    for name, config, counts, match in (
        ("balanced", balanced, SEEN, "trained with --loss.name balanced_softmax"),
        ("old", tiny_cpu(), None, "does not say how many clips"),
    ):
        run = a_run(tmp_path / name, config, counts)
        with pytest.raises(MicaclError, match=match):
            export_bundle(run, str(tmp_path / f"{name}-bundle"), adjust=1.0)
        assert not (tmp_path / f"{name}-bundle" / BUNDLE).exists()
        export_bundle(run, str(tmp_path / f"{name}-bundle"))
