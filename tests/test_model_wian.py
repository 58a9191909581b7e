"""WIAN: formulas written out, what the weights mean, masks, one instance, gradients; M3DFEL's DLIAM beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model import WIAN, WIANConfig, parameter_count
from micacl.model.dliam import DLIAM, DMIN
from pipeline.contract import MicaclError
from tests.model_inputs import WIANS, a_mask, random_bags, spoilt, variant

torch.set_num_threads(1)


def wian_of(config: WIANConfig, instances: int = 3, features: int = 4) -> WIAN:
    torch.manual_seed(0)
    return WIAN(config, instances, features).double()


# ---- every kind


@pytest.mark.parametrize("config", WIANS, ids=variant)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(config: WIANConfig, masked: bool) -> None:
    wian = wian_of(replace(config, hidden=3, heads=2, lstm_layers=1), features=2)
    h, valid = random_bags(bags=2, features=2, grad=True), a_mask()[1:3] if masked else None
    both = slice(0, 1 if config.kind == "dliam" else 2)  # DLIAM's weights explain, they have no gradient
    assert torch.autograd.gradcheck(lambda h_BND, *_: wian(h_BND, valid)[both], (h, *wian.parameters()))


@pytest.mark.parametrize("config", WIANS, ids=variant)
def test_weights_sum_to_one_and_are_zero_for_missing_instances(config: WIANConfig) -> None:
    for valid in (None, a_mask()):
        bag, weights = wian_of(config)(random_bags(), valid)
        assert bag.shape == (4, config.bag_features(4))
        torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
        assert (weights >= 0).all()
        if valid is not None:
            assert torch.equal(weights > 0, valid)


@pytest.mark.parametrize("config", WIANS, ids=variant)
def test_values_of_missing_instances_change_nothing(config: WIANConfig) -> None:
    valid, results = a_mask(), []
    for h in (random_bags(grad=True), spoilt(random_bags(grad=True), a_mask())):
        wian = wian_of(config)
        bag, weights = wian(h, valid)
        bag.square().sum().backward()
        assert h.grad is not None
        results.append([bag, weights, h.grad, *(p.grad for p in wian.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("config", WIANS, ids=variant)
def test_a_full_mask_is_no_mask(config: WIANConfig) -> None:
    wian, h = wian_of(config), random_bags()
    for one, two in zip(wian(h), wian(h, torch.ones(4, 3, dtype=torch.bool)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("config", WIANS, ids=variant)
def test_a_bag_of_one_instance(config: WIANConfig) -> None:
    h = random_bags(instances=1, grad=True)
    bag, weights = wian_of(config, instances=1)(h)
    assert torch.isfinite(bag).all()
    assert torch.equal(weights, torch.ones(4, 1, dtype=torch.float64))
    if config.kind != "dliam":
        torch.testing.assert_close(bag, h[:, 0])
    bag.sum().backward()
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("config", WIANS, ids=variant)
def test_bags_do_not_hear_each_other(config: WIANConfig) -> None:
    """Also a batch of one bag: nothing is squeezed away."""
    wian, h = wian_of(config), random_bags()
    for whole, alone in zip(wian(h, a_mask()), wian(h[1:2], a_mask()[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone)


def test_configs_refuse_in_words() -> None:
    for field, value in (("kind", "max"), ("hidden", 0), ("lstm_layers", 0), ("heads", 0)):
        with pytest.raises(MicaclError, match=rf"wian\.{field.replace('_', '-')} is "):
            WIANConfig(**{field: value})
    with pytest.raises(MicaclError, match=r"wian\.heads is 3, and dliam has 8 features"):
        WIAN(WIANConfig(kind="dliam", heads=3), 3, 4)


# ---- attention and mean


@pytest.mark.parametrize("kind", ["attention", "gated"])
def test_attention_with_loops(kind: str) -> None:
    torch.manual_seed(0)
    wian = WIAN(WIANConfig(kind=kind, hidden=4), instances=3, features=3)
    h = random_bags(bags=2, features=3).float()
    bag, weights = wian(h)
    for b in range(2):
        scores = []
        for n in range(3):
            units = torch.tanh(wian.units.weight @ h[b, n] + wian.units.bias)
            if kind == "gated":
                assert wian.gates is not None
                units = units * torch.sigmoid(wian.gates.weight @ h[b, n] + wian.gates.bias)
            scores.append((wian.score.weight @ units)[0].exp().item())
        want = [score / sum(scores) for score in scores]
        torch.testing.assert_close(weights[b], torch.tensor(want))
        torch.testing.assert_close(bag[b], sum((want[n] * h[b, n] for n in range(3)), torch.zeros(3)))


def test_mean_is_the_mean_over_valid_instances() -> None:
    wian, h, valid = wian_of(WIANConfig(kind="mean")), random_bags(), a_mask()
    bag, weights = wian(h, valid)
    torch.testing.assert_close(bag, torch.stack([h[b][valid[b]].mean(0) for b in range(4)]))
    torch.testing.assert_close(weights, valid / valid.double().sum(1, keepdim=True))
    assert parameter_count(wian) == 0


@pytest.mark.parametrize("kind", ["mean", "attention", "gated"])
def test_the_order_of_instances_is_not_seen(kind: str) -> None:
    wian, h, order = wian_of(WIANConfig(kind=kind)), random_bags(), [2, 0, 1]
    bag, weights = wian(h)
    other, moved = wian(h[:, order])
    torch.testing.assert_close(bag, other)
    torch.testing.assert_close(weights[:, order], moved)


# ---- DLIAM


def test_dliam_has_the_parameters_of_m3dfels() -> None:
    """BiLSTM, qkv, DMIN and the convolution of the released code at 4 instances of 512 features."""
    with torch.device("meta"):
        dliam = DLIAM(instances=4, features=512, lstm_layers=2, heads=8)
    parts = {name: parameter_count(part) for name, part in dliam.named_children()}
    assert parts == {"lstm": 10_502_144, "attention": 3_145_728, "dmin": 2_052, "conv": 13}


def reference_dmin(dmin: DMIN, x_BNE: Tensor) -> Tensor:
    """The released code's steps: features before instances, torch.var."""
    x_BEN = x_BNE.transpose(1, 2)
    mean_in, var_in = x_BEN.mean(-1, keepdim=True), x_BEN.var(-1, keepdim=True)
    mean_ln = mean_in.mean(1, keepdim=True)
    var_ln = (var_in + mean_in**2).mean(1, keepdim=True) - mean_ln**2
    m, s = dmin.mean_mix.softmax(0), dmin.var_mix.softmax(0)
    normed = (x_BEN - m[0] * mean_in - m[1] * mean_ln) / (s[0] * var_in + s[1] * var_ln + 1e-5).sqrt()
    return normed.transpose(1, 2) * dmin.weight_E + dmin.bias_E


def reference_dliam(dliam: DLIAM, h_BND: Tensor) -> Tensor:
    """The released code's steps, with torch's own modules."""
    x = dliam.lstm(h_BND)[0]
    b, n, features = x.shape
    q, k, v = (t.view(b, n, dliam.attention.heads, -1).transpose(1, 2) for t in dliam.attention.qkv(x).chunk(3, -1))
    attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, features)
    gate = reference_dmin(dliam.dmin, attended).sigmoid()
    return nn.functional.conv1d(x * gate, dliam.conv.weight, dliam.conv.bias, padding=1)[:, 0]


def test_dliam_is_the_released_codes_steps() -> None:
    torch.manual_seed(0)
    dliam = DLIAM(instances=3, features=4, lstm_layers=2, heads=4).double()
    for p in dliam.parameters():
        nn.init.normal_(p)
    torch.testing.assert_close(dliam(random_bags())[0], reference_dliam(dliam, random_bags()))


@pytest.mark.parametrize("instances", [2, 3, 6])
def test_dmin_is_the_released_codes_steps(instances: int) -> None:
    torch.manual_seed(0)
    dmin, x = DMIN(4).double(), random_bags(instances=instances)
    for p in dmin.parameters():
        nn.init.normal_(p)
    torch.testing.assert_close(dmin(x), reference_dmin(dmin, x))


@pytest.mark.parametrize("missing", [[1], [0], [2], [0, 1]])
def test_dliam_without_an_instance_is_the_dliam_of_the_others(missing: list[int]) -> None:
    """In the middle too: the LSTM does not step over a gap as if something were there."""
    long = wian_of(WIANConfig(kind="dliam", heads=4))
    there = [n for n in range(3) if n not in missing]
    short = wian_of(WIANConfig(kind="dliam", heads=4), instances=len(there))
    weights = long.state_dict()
    weights["dliam.conv.weight"] = weights["dliam.conv.weight"][:, there]
    short.load_state_dict(weights)
    h, valid = random_bags(bags=2), torch.ones(2, 3, dtype=torch.bool)
    valid[:, missing] = False
    bag, shares = long(h, valid)
    want_bag, want_shares = short(h[:, there])
    torch.testing.assert_close(bag, want_bag)
    torch.testing.assert_close(shares[:, there], want_shares)


def test_dliams_weights_are_the_shares_of_what_each_instance_adds() -> None:
    torch.manual_seed(0)
    dliam = DLIAM(instances=3, features=4, lstm_layers=1, heads=4).double()
    bag, shares = dliam(random_bags(), a_mask())
    added = dliam.parts(random_bags(), a_mask())
    torch.testing.assert_close(added.sum(1) + dliam.conv.bias, bag)
    lengths = torch.stack([added[:, n].norm(dim=1) for n in range(3)], 1)
    torch.testing.assert_close(shares, lengths / lengths.sum(1, keepdim=True))
    assert (added[~a_mask()] == 0).all()
    assert not shares.requires_grad


def test_dmin_of_instances_that_are_all_the_same_is_finite() -> None:
    dmin = DMIN(4)
    assert torch.isfinite(dmin(torch.ones(2, 3, 4))).all()
    x = torch.zeros(1, 1, 4, requires_grad=True)
    dmin(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
