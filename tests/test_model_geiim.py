"""GEIIM: adjacencies, mixers, orders: formulas written out with loops, masks, any number of instances, gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from micacl.model import GEIIM, GEIIMConfig
from micacl.model.adjacency import DynamicAdjacency, MixedAdjacency, StaticAdjacency
from micacl.model.geiim import GEIIMLayer
from micacl.model.state_space import DiagonalStateSpace, MultiScaleStateSpace
from pipeline.contract import MicaclError
from tests.model_inputs import GEIIMS, a_mask, generator, random_bags, spoilt, variant

torch.set_num_threads(1)


def geiim_of(config: GEIIMConfig, instances: int = 3, features: int = 4) -> GEIIM:
    torch.manual_seed(0)
    return GEIIM(config, instances, features).double()


# ---- every variant


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(config: GEIIMConfig, masked: bool) -> None:
    geiim, x = geiim_of(config, features=2), random_bags(bags=2, features=2, grad=True)
    valid = a_mask()[1:3] if masked else None
    assert torch.autograd.gradcheck(lambda x_BND, *_: geiim(x_BND, valid), (x, *geiim.parameters()))


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
def test_values_of_missing_instances_change_nothing(config: GEIIMConfig) -> None:
    valid, results = a_mask(), []
    for x in (random_bags(grad=True), spoilt(random_bags(grad=True), a_mask())):
        geiim = geiim_of(config)
        out = geiim(x, valid)
        assert (out[~valid] == 0).all()
        out.square().sum().backward()
        assert x.grad is not None
        assert (x.grad[~valid] == 0).all()
        results.append([out, x.grad, *(p.grad for p in geiim.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
def test_missing_instances_at_the_end_make_a_shorter_bag(config: GEIIMConfig) -> None:
    """Missing instances are the zeros of the padding at every step, not only at the first."""
    long, short = geiim_of(config, instances=4), geiim_of(config, instances=2)
    cut = {"source_Nd": lambda t: t[:2], "target_dN": lambda t: t[:, :2]}
    weights = {name: cut.get(name.rpartition(".")[2], lambda t: t)(t) for name, t in long.state_dict().items()}
    short.load_state_dict(weights)
    x = random_bags(bags=1, instances=4)
    out = long(x, torch.tensor([[True, True, False, False]]))
    torch.testing.assert_close(out[:, :2], short(x[:, :2]))


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
def test_a_full_mask_is_no_mask(config: GEIIMConfig) -> None:
    geiim, x = geiim_of(config), random_bags()
    torch.testing.assert_close(geiim(x), geiim(x, torch.ones(4, 3, dtype=torch.bool)))


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
@pytest.mark.parametrize("instances", [1, 2, 5, 9])
def test_any_number_of_instances(config: GEIIMConfig, instances: int) -> None:
    out = geiim_of(config, instances)(random_bags(instances=instances))
    assert out.shape == (4, instances, 4)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("mixer", ["conv", "ssm"])
def test_a_dynamic_module_takes_bags_of_any_size(mixer: str) -> None:
    config = GEIIMConfig(adjacency="dynamic", mixer=mixer)
    geiim = geiim_of(config)
    assert config.any_instances
    assert [tuple(geiim(random_bags(instances=n)).shape) for n in (1, 3, 7)] == [(4, 1, 4), (4, 3, 4), (4, 7, 4)]


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
def test_bags_do_not_hear_each_other(config: GEIIMConfig) -> None:
    geiim, x = geiim_of(config), random_bags()
    torch.testing.assert_close(geiim(x)[2:3], geiim(x[2:3]))


@pytest.mark.parametrize("config", GEIIMS, ids=variant)
def test_instances_do_hear_each_other(config: GEIIMConfig) -> None:
    geiim, x = geiim_of(config), random_bags()
    changed = x.clone()
    changed[:, 1] += 1.0
    assert ((geiim(changed) - geiim(x))[:, [0, 2]].abs().amax((1, 2)) > 1e-6).all()


def test_two_layers_are_one_after_the_other() -> None:
    geiim, x = geiim_of(GEIIMConfig(layers=2)), random_bags()
    torch.testing.assert_close(geiim(x, a_mask()), geiim.layers[1](geiim.layers[0](x, a_mask()), a_mask()))


def test_configs_refuse_in_words() -> None:
    for field, value in (
        ("adjacency", "none"),
        ("mixer", "rnn"),
        ("activation", "step"),
        ("order", "conv_first"),
        ("layers", 0),
        ("node_dim", 0),
        ("query_dim", 0),
        ("state", 0),
        ("kernels", (2,)),
        ("kernels", ()),
        ("dilations", (0, 1)),
        ("dilations", ()),
    ):
        with pytest.raises(MicaclError, match=rf"geiim\.{field.replace('_', '-')} is "):
            GEIIMConfig(**{field: value})


# ---- adjacency


@pytest.mark.parametrize("instances", range(1, 6))
def test_static_rows_sum_to_one_and_no_entry_is_zero(instances: int) -> None:
    """Softmax after ReLU: an entry that ReLU sets to 0 still weighs e^0."""
    torch.manual_seed(0)
    adjacency = StaticAdjacency(instances, 10)
    a_NN = adjacency(torch.zeros(1, instances, 4))
    torch.testing.assert_close(a_NN.sum(1), torch.ones(instances))
    assert (a_NN > 0).all()
    scores = adjacency.source_Nd @ adjacency.target_dN
    floor = 1 / functional.relu(scores).exp().sum(1, keepdim=True).expand_as(scores)
    torch.testing.assert_close(a_NN[scores < 0], floor[scores < 0])


def test_dynamic_is_its_formula_with_loops() -> None:
    torch.manual_seed(0)
    adjacency, x = DynamicAdjacency(4, 5).double(), random_bags(bags=2)
    a_BNN = adjacency(x)
    for b in range(2):
        for n in range(3):
            q = adjacency.query.weight @ x[b, n]
            scores = [max(0.0, (q @ (adjacency.key.weight @ x[b, m])).item() / math.sqrt(5)) for m in range(3)]
            want = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
            torch.testing.assert_close(a_BNN[b, n], torch.tensor(want, dtype=torch.float64))
    assert (a_BNN > 0).all()
    assert not torch.allclose(a_BNN[0], a_BNN[1])


@pytest.mark.parametrize("kind", [StaticAdjacency, DynamicAdjacency, MixedAdjacency])
def test_masked_adjacency_leaves_columns_out_and_rows_still_sum_to_one(kind: type) -> None:
    torch.manual_seed(0)
    arguments = {StaticAdjacency: (3, 10), DynamicAdjacency: (4, 5), MixedAdjacency: (3, 4, 10, 5)}[kind]
    a_BNN = kind(*arguments).double()(random_bags(), a_mask())
    torch.testing.assert_close(a_BNN.sum(2), torch.ones(4, 3, dtype=torch.float64))
    assert torch.equal(a_BNN == 0, ~a_mask()[:, None, :].expand_as(a_BNN))


def test_the_mix_goes_from_static_to_dynamic_by_its_gate() -> None:
    torch.manual_seed(0)
    mix, x = MixedAdjacency(3, 4, 10, 5).double(), random_bags()
    static, dynamic = mix.static(x), mix.dynamic(x)
    gate = torch.sigmoid(x @ mix.gate.weight[0] + mix.gate.bias)[..., None]
    torch.testing.assert_close(mix(x), gate * static + (1 - gate) * dynamic)
    for bias, want in ((50.0, static.expand_as(dynamic)), (-50.0, dynamic)):
        torch.nn.init.constant_(mix.gate.bias, bias)
        torch.testing.assert_close(mix(x), want)


def test_dynamic_with_kernels_of_one_does_not_know_the_order_of_instances() -> None:
    geiim, x, order = geiim_of(GEIIMConfig(adjacency="dynamic", kernels=(1,))), random_bags(), [2, 0, 1]
    torch.testing.assert_close(geiim(x)[:, order], geiim(x[:, order]))


@pytest.mark.parametrize("change", [{"kernels": (1, 3)}, {"mixer": "ssm"}, {"adjacency": "static"}])
def test_the_others_do_know_the_order(change: dict[str, object]) -> None:
    config = replace(GEIIMConfig(adjacency="dynamic", kernels=(1,)), **change)
    geiim, x, order = geiim_of(config), random_bags(), [2, 0, 1]
    assert not torch.allclose(geiim(x)[:, order], geiim(x[:, order]))


def test_graph_step_is_a_x_w() -> None:
    """Written out with loops: graph_first, no residual, no norm, and a mixer that does nothing but gelu."""
    torch.manual_seed(0)
    layer = GEIIMLayer(GEIIMConfig(residual=False, norm=False, kernels=(1,)), instances=3, features=2)
    x = torch.rand(1, 3, 2, generator=generator())
    for name, p in layer.mixer.named_parameters():
        (torch.nn.init.dirac_ if name.endswith("weight") else torch.nn.init.zeros_)(p)
    a, w = layer.adjacency(x), layer.graph.weight.T
    want = torch.stack([sum((a[n, m] * (x[0, m] @ w) for m in range(3)), torch.zeros(2)) for n in range(3)])
    torch.testing.assert_close(layer(x)[0], functional.gelu(functional.gelu(want)))


# ---- state space


def one_step_at_a_time(space: DiagonalStateSpace, u_ND: Tensor) -> Tensor:
    """The recurrence in plain Python numbers, state by state."""
    dt, rates = space.log_dt_D.exp().tolist(), space.log_rates.exp().view_as(space.readout_DS).tolist()
    c, skip, k = space.readout_DS.tolist(), space.skip_D.tolist(), space.dilation
    out = torch.zeros_like(u_ND)
    for d in range(u_ND.shape[1]):
        for s, rate in enumerate(rates[d]):
            decay = math.exp(-k * dt[d] * rate)
            h: list[float] = []
            for n, u in enumerate(u_ND[:, d].tolist()):
                before = h[n - k] if n >= k else 0.0
                h.append(decay * before + (1 - decay) / rate * u)
                out[n, d] += c[d][s] * h[n]
        out[:, d] += skip[d] * u_ND[:, d]
    return out


@settings(max_examples=15, deadline=None)
@given(
    instances=st.integers(1, 9),
    dilation=st.integers(1, 4),
    state=st.integers(1, 5),
    features=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_the_scan_is_the_recurrence_step_by_step(
    instances: int, dilation: int, state: int, features: int, seed: int
) -> None:
    torch.manual_seed(seed)
    space = DiagonalStateSpace(features, state, dilation).double()
    for p in space.parameters():
        torch.nn.init.normal_(p)
    u = torch.randn(2, instances, features, dtype=torch.float64)
    want = torch.stack([one_step_at_a_time(space, u_ND) for u_ND in u])
    torch.testing.assert_close(space(u).detach(), want.detach())


def test_an_impulse_decays_in_steps_of_the_dilation() -> None:
    torch.manual_seed(0)
    space = DiagonalStateSpace(1, 1, dilation=2).double()
    u = torch.zeros(1, 6, 1, dtype=torch.float64)
    u[0, 0] = 1.0
    a, b = (float(t) for t in space.coefficients())
    c, skip = float(space.readout_DS), float(space.skip_D)
    want = [c * b + skip, 0.0, c * a * b, 0.0, c * a * a * b, 0.0]
    torch.testing.assert_close(space(u)[0, :, 0], torch.tensor(want, dtype=torch.float64))


def test_a_long_constant_input_settles_at_its_gain() -> None:
    """Zero-order hold: the steady state of h' = -r h + u is u / r, whatever the time step."""
    torch.manual_seed(0)
    space = DiagonalStateSpace(3, 4, dilation=1).double()
    out = space(torch.ones(1, 400, 3, dtype=torch.float64))[0, -1]
    rates_DS = space.log_rates.exp().view(3, 4)
    torch.testing.assert_close(out, (space.readout_DS / rates_DS).sum(1) + space.skip_D)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_direction_is_causal_and_two_see_the_whole_bag(bidirectional: bool) -> None:
    torch.manual_seed(0)
    space = MultiScaleStateSpace(4, (1, 2), 3, functional.gelu, bidirectional=bidirectional).double()
    x = random_bags(instances=6)
    changed = x.clone()
    changed[:, 4:] += 1.0
    before = (space(changed) - space(x))[:, :4].abs().amax()
    assert (before > 1e-6) == bidirectional


def test_reversing_a_bag_swaps_the_directions() -> None:
    torch.manual_seed(0)
    space = MultiScaleStateSpace(4, (1, 2), 3, functional.gelu, bidirectional=True).double()
    x = random_bags(instances=5)
    out = space(x)
    space.forwards, space.backwards = space.backwards, space.forwards
    torch.testing.assert_close(space(x.flip(1)).flip(1), out)


def test_half_precision_keeps_the_scan_in_float32() -> None:
    torch.manual_seed(0)
    space = DiagonalStateSpace(4, 3, 1)
    u = torch.randn(2, 5, 4, generator=generator())
    out = space.bfloat16()(u.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), space.float()(u.bfloat16().float()), rtol=2e-2, atol=2e-2)
