"""Chapter 03: the four coefficients, Eq. 7, sigma_data. No data files, no training."""
import copy
import itertools
import json
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edm_nb.preconditioning as module
from edm_nb.adapters import check_sigma_data, network_dtype, value_step
from edm_nb.framework import LINEAR, TABLE_1, GaussianDenoiser, ode_derivative, vp_schedule
from edm_nb.ode_solvers import edm_sigmas, euler, sample_ode
from edm_nb.preconditioning import (
    FLOW,
    SCALINGS,
    Parametrisation,
    Preconditioned,
    Suggestion,
    edm_scalings,
    edm_weight,
    estimate_sigma_data,
    flow_scalings,
    iddpm_scalings,
    loss_weight,
    start_divergence,
    suggest_settings,
    v_scalings,
    ve_scalings,
    vp_scalings,
)

LEVELS = torch.logspace(-3, 3, 25, dtype=torch.float64)
ORACLE = GaussianDenoiser(torch.tensor([0.3, -0.2], dtype=torch.float64), 0.4)
TABLE = ("edm", "vp", "ve", "iddpm")
every_row = pytest.mark.parametrize("name", SCALINGS)
table_row = pytest.mark.parametrize("name", TABLE)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def exact_levels(M=1000, C_1=0.001, C_2=0.008):
    "iDDPM's levels from the solved recursion, u_j² + 1 = product of all later ratios; the package steps through the recursion."
    j = torch.arange(M + 1, dtype=torch.float64)
    bar = torch.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2
    product = (bar[:-1] / bar[1:]).clamp(min=C_1).flip(0).cumprod(0).flip(0).reciprocal()
    return torch.cat([(product - 1).sqrt(), torch.zeros(1, dtype=torch.float64)])


def iddpm_level(c_noise):
    return exact_levels()[999 - c_noise.round().long()]


# What a network of each row has to do to find sigma, written without the module's own functions.
SIGMA_OF = {
    "edm": lambda c: torch.exp(4 * c),
    "vp": lambda c: torch.sqrt(torch.expm1(0.5 * 19.9 * (c / 999) ** 2 + 0.1 * c / 999)),
    "ve": lambda c: 2 * torch.exp(c),
    "iddpm": iddpm_level,
    "v": lambda c: torch.tan(c * math.pi / 2),
    "flow": lambda c: c / (1 - c),
}
# The same for the target: what F is to predict, from the clean y and the noise epsilon, and the input it sees.
SEES = {
    "edm": lambda y, n, s: (y + s * n) / (s**2 + 0.25) ** 0.5,
    "vp": lambda y, n, s: (y + s * n) / (s**2 + 1) ** 0.5,
    "ve": lambda y, n, s: y + s * n,
    "iddpm": lambda y, n, s: (y + s * n) / (s**2 + 1) ** 0.5,
    "v": lambda y, n, s: (y + s * n) / (s**2 + 1) ** 0.5,
    "flow": lambda y, n, s: (y + s * n) / (1 + s),
}
PREDICTS = {
    "edm": lambda y, n, s: (y * s**2 - 0.25 * s * n) / (0.5 * s * (s**2 + 0.25) ** 0.5),
    "vp": lambda y, n, s: n,
    "ve": lambda y, n, s: -n,
    "iddpm": lambda y, n, s: n,
    "v": lambda y, n, s: (n - s * y) / (1 + s**2) ** 0.5,
    "flow": lambda y, n, s: n - y,
}


class Perfect(nn.Module):
    "The F that makes D exact for ORACLE; it knows only its input and c_noise."
    def __init__(self, name):
        super().__init__()
        self.name, self.p = name, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, inputs, c_noise):
        sigma = SIGMA_OF[self.name](c_noise)[:, None]
        factor = SEES[self.name](torch.ones((), dtype=torch.float64), 0.0, sigma)
        x = inputs / factor
        D = ORACLE(x, sigma[:, 0])
        return PREDICTS[self.name](D, (x - D) / sigma, sigma)


class Recorder(nn.Module):
    "A network that notes what it was given and answers zeros of a chosen shape."
    def __init__(self, channels=None, label_dim=None, dtype=torch.float32):
        super().__init__()
        self.p, self.channels, self.calls = nn.Parameter(torch.zeros(1, dtype=dtype)), channels, []
        if label_dim is not None:
            self.label_dim = label_dim

    def forward(self, x, c_noise, **cond):
        self.calls.append((x, c_noise, cond))
        return x.new_zeros(len(x), self.channels or x.shape[1], *x.shape[2:])


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, c_noise):
        return self.conv(x) + c_noise.to(x.dtype)[:, None, None, None]


# ---------------------------------------------------------------- the coefficients

@table_row
def test_the_rows_are_table_1(name):
    for ours, cell in zip(SCALINGS[name](LEVELS), TABLE_1[name].scalings(LEVELS), strict=True):
        torch.testing.assert_close(ours, cell, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss_weight(LEVELS, SCALINGS[name]), TABLE_1[name].weight(LEVELS), rtol=1e-12, atol=0)


def test_edm_at_a_point_worked_by_hand():
    # sigma = 1.2, sigma_data = 0.5: sigma² + sigma_data² = 1.69 = 1.3²
    c_skip, c_out, c_in, c_noise = (float(c) for c in edm_scalings(1.2, 0.5))
    assert c_skip == pytest.approx(0.25 / 1.69, rel=1e-14)
    assert c_out == pytest.approx(0.6 / 1.3, rel=1e-14)
    assert c_in == pytest.approx(1 / 1.3, rel=1e-14)
    assert c_noise == pytest.approx(0.25 * math.log(1.2), rel=1e-14)
    assert float(edm_weight(1.2, 0.5)) == pytest.approx(1.69 / 0.36, rel=1e-14)


def test_other_rows_at_a_point_worked_by_hand():
    assert [float(c) for c in ve_scalings(2.0)] == pytest.approx([1, 2, 1, 0])
    vp = [float(c) for c in vp_scalings(0.75)]
    assert vp[:3] == pytest.approx([1, -0.75, 0.8])
    t = vp[3] / 999
    assert math.expm1(0.5 * 19.9 * t * t + 0.1 * t) == pytest.approx(0.75**2, rel=1e-12)
    u = exact_levels()
    assert [float(c) for c in iddpm_scalings(float(u[8]))] == pytest.approx([1, -80.2037, 1 / math.hypot(80.2037, 1), 991], rel=1e-6)
    assert [float(c) for c in v_scalings(1.0)] == pytest.approx([0.5, -math.sqrt(0.5), math.sqrt(0.5), 0.5])
    assert [float(c) for c in flow_scalings(3.0, time_scale=1000)] == pytest.approx([0.25, -0.75, 0.25, 750])


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_the_four_requirements(sigma, sigma_data):
    c_skip, c_out, c_in, _ = (float(c) for c in edm_scalings(sigma, sigma_data))
    assert c_in**2 * (sigma**2 + sigma_data**2) == pytest.approx(1, rel=1e-10)                     # unit input variance
    cost = lambda c: (1 - c) ** 2 * sigma_data**2 + c**2 * sigma**2
    assert cost(c_skip) / c_out**2 == pytest.approx(1, rel=1e-9)                                   # unit target variance
    step = 1e-3
    assert cost(c_skip) < min(cost(c_skip - step), cost(c_skip + step))                            # least amplification
    assert float(edm_weight(sigma, sigma_data)) * c_out**2 == pytest.approx(1, rel=1e-10)          # equal weight
    assert c_out <= min(sigma, sigma_data) * (1 + 1e-12)


def test_lambda_has_a_product_and_not_a_sum():
    weight = edm_weight(LEVELS, 0.5)
    torch.testing.assert_close(weight * edm_scalings(LEVELS, 0.5)[1] ** 2, torch.ones_like(weight), rtol=1e-12, atol=0)
    misread = (LEVELS**2 + 0.25) / (LEVELS + 0.5) ** 2
    assert (misread / weight).max() < 0.3


@pytest.mark.parametrize("sigma_data", [0.05, 0.5, 20.0])
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 1e3])
def test_input_and_target_have_unit_variance_for_any_distribution(sigma, sigma_data):
    y = sigma_data * math.sqrt(12) * (torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5)
    x = y + sigma * normal(200_000)
    c_skip, c_out, c_in, _ = edm_scalings(sigma, sigma_data)
    assert (c_in * x).std().item() == pytest.approx(1, abs=0.01)
    assert ((y - c_skip * x) / c_out).std().item() == pytest.approx(1, abs=0.01)


@every_row
def test_shapes_and_dtypes_follow_sigma(name):
    for sigma in (torch.rand(3, 2) + 0.1, torch.rand((), dtype=torch.float64) + 0.1, torch.rand(4).bfloat16() + 0.1, 2.0, 3):
        coefficients = SCALINGS[name](sigma)
        assert len(coefficients) == 4
        for c in coefficients:
            assert c.shape == torch.as_tensor(sigma).shape
            assert c.dtype == (torch.float32 if torch.is_tensor(sigma) and sigma.dtype != torch.float64 else torch.float64)
            assert c.isfinite().all()


@every_row
def test_coefficients_do_not_share_memory(name):
    sigma = torch.rand(5, dtype=torch.float64) + 0.1
    before = sigma.clone()
    for c in SCALINGS[name](sigma):
        c.add_(1)
    assert torch.equal(sigma, before)


def test_vp_is_told_its_own_time_also_where_numbers_are_small():
    t = torch.logspace(-8, 0, 60, dtype=torch.float64)
    sigma = torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t).sqrt()          # written out, not the module's
    torch.testing.assert_close(vp_scalings(sigma)[3] / 999, t, rtol=1e-9, atol=0)
    other = vp_schedule(10.0, 0.3).sigma(0.5)
    assert vp_scalings(other, 10.0, 0.3, M=11)[3].item() == pytest.approx(5.0, rel=1e-12)


def test_scaling_the_data_scales_the_coefficients():
    a = 37.0
    for was, now, factor in zip(edm_scalings(LEVELS, 0.5), edm_scalings(a * LEVELS, 0.5 * a), (1, a, 1 / a)):
        torch.testing.assert_close(now, was * factor, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- Eq. 7

@every_row
def test_a_perfect_network_makes_a_perfect_denoiser(name):
    D = Preconditioned(Perfect(name), SCALINGS[name])
    sigma = D.round_sigma(torch.logspace(-1.9, 1.9, 40, dtype=torch.float64))
    x = ORACLE.sample(40, 0.0, torch.Generator().manual_seed(0)) + sigma[:, None] * normal(40, 2)
    torch.testing.assert_close(D(x, sigma), ORACLE(x, sigma), rtol=1e-8, atol=1e-8)
    for i in (0, 20, 39):
        torch.testing.assert_close(D(x, sigma[i]), ORACLE(x, sigma[i]), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(D(x, float(sigma[i])), D(x, sigma[i].expand(40)), rtol=0, atol=0)


@every_row
def test_the_loss_is_a_plain_regression_of_f(name):
    # Eq. 8: lambda (D - y)² = (F - target)², with every row's target written out independently.
    y, n, sigma = normal(50, 2), normal(50, 2, seed=1), torch.logspace(-1.9, 1.9, 50, dtype=torch.float64)
    F = normal(50, 2, seed=2)
    D = Preconditioned(lambda x, c_noise: F, SCALINGS[name])
    s = sigma[:, None]
    weighted = D.loss_weight(sigma)[:, None] * (D(y + s * n, sigma) - y) ** 2
    torch.testing.assert_close(weighted, (F - PREDICTS[name](y, n, s)) ** 2, rtol=1e-6, atol=1e-8)


def test_sigma_per_sample_equals_one_at_a_time():
    D, x, sigma = Preconditioned(Conv()), normal(5, 3, 4, 4), torch.tensor([0.01, 0.3, 1.0, 9.0, 70.0])
    with torch.no_grad():
        one = torch.cat([D(x[i:i + 1], sigma[i]) for i in range(5)])
        torch.testing.assert_close(D(x, sigma), one, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(D(x, sigma.reshape(5, 1, 1, 1)), D(x, sigma), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2), torch.ones(1, 4), -1.0, float("nan"), 0.0])
def test_bad_noise_levels_are_refused(bad):
    with pytest.raises(ValueError, match="sigma|noise"):
        Preconditioned(Conv())(normal(4, 3, 4, 4), bad)


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="floating"):
        Preconditioned(Conv())(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 1.0)


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_side_keeps_its_precision(net_dtype, dtype):
    net = Recorder(dtype=net_dtype)
    D = Preconditioned(net, iddpm_scalings)
    out = D(torch.ones(2, 3, 4, 4, dtype=dtype), float(exact_levels()[1]))
    inputs, c_noise, _ = net.calls[0]
    assert inputs.dtype == net_dtype and out.dtype == torch.promote_types(dtype, torch.float32)
    assert c_noise.dtype == torch.promote_types(net_dtype, torch.float32) and c_noise.tolist() == [998.0, 998.0]
    assert network_dtype(net) == net_dtype


def test_the_skip_path_is_not_rounded_to_the_networks_precision():
    x = normal(2, 3, 4, 4)
    out = Preconditioned(Recorder(dtype=torch.bfloat16))(x, 1e-3)
    torch.testing.assert_close(out, x * 0.25 / (0.25 + 1e-6), rtol=1e-14, atol=0)


def test_autocast_changes_only_the_network():
    D, x = Preconditioned(Conv()), normal(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = D(x, 0.7)
    with torch.no_grad():
        reference = D(x, 0.7)
    assert out.dtype == torch.float64
    assert 0 < (out - reference).abs().max() < 0.05


def test_gradients_reach_network_and_input():
    D, x = Preconditioned(Conv()), normal(2, 3, 4, 4).requires_grad_()
    D(x, 0.5).sum().backward()
    assert x.grad.abs().sum() > 0 and D.net.conv.weight.grad.abs().sum() > 0


@every_row
def test_compiles_without_graph_break_copies_and_pickles(name):
    D, x, sigma = Preconditioned(Conv(), SCALINGS[name]), normal(2, 3, 4, 4), torch.tensor([0.4, 3.0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = D(x, sigma)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(D, backend="eager", fullgraph=True)(x, sigma), reference, rtol=1e-6, atol=1e-6)
        assert torch.equal(copy.deepcopy(D)(x, sigma), reference)
        assert torch.equal(pickle.loads(pickle.dumps(D))(x, sigma), reference)
    assert set(D.state_dict()) == {"net.conv.weight", "net.conv.bias"}


def test_channels_that_are_not_noised_are_not_scaled():
    net, x, extra = Recorder(channels=3), normal(2, 3, 4, 4), normal(2, 5, 4, 4, seed=1)
    out = Preconditioned(net)(x, 80.0, conditioning=extra)
    inputs = net.calls[0][0]
    assert inputs.shape == (2, 8, 4, 4) and out.shape == x.shape
    torch.testing.assert_close(inputs[:, 3:], extra.float(), rtol=0, atol=0)
    torch.testing.assert_close(inputs[:, :3], (x / math.sqrt(80**2 + 0.25)).float())
    with pytest.raises(ValueError, match="conditioning"):
        Preconditioned(net)(x, 1.0, conditioning=torch.zeros(2, 1, 5, 5))


def test_learned_variance_is_cut_off():
    x, F = normal(2, 3, 4, 4), normal(2, 6, 4, 4, seed=1)
    D, plain = Preconditioned(lambda x, c: F), Preconditioned(lambda x, c: F[:, :3])
    assert torch.equal(D(x, 1.0), plain(x, 1.0))
    for channels in (1, 4, 9):
        with pytest.raises(ValueError, match="channels"):
            Preconditioned(Recorder(channels=channels))(x, 1.0)


def test_labels():
    x, hot = normal(3, 1, 4, 4), torch.eye(10)[:3]
    conditional, plain, unaware = Recorder(label_dim=10), Recorder(label_dim=0), Recorder()
    Preconditioned(conditional)(x, 1.0)
    Preconditioned(conditional)(x, 1.0, class_labels=hot)
    Preconditioned(conditional)(x, 1.0, class_labels=hot[:1])
    given = [call[2]["class_labels"] for call in conditional.calls]
    assert torch.equal(given[0], torch.zeros(3, 10)) and torch.equal(given[1], hot)
    assert torch.equal(given[2], hot[:1].expand(3, 10))
    Preconditioned(plain)(x, 1.0)
    Preconditioned(unaware)(x, 1.0)
    assert plain.calls[0][2] == {} and unaware.calls[0][2] == {}
    with pytest.raises(ValueError, match="unconditional"):
        Preconditioned(plain)(x, 1.0, class_labels=hot)
    for wrong in (torch.tensor([1, 2, 3]), torch.eye(9)[:3], torch.eye(10)[:2]):
        with pytest.raises(ValueError, match="one-hot"):
            Preconditioned(conditional)(x, 1.0, class_labels=wrong)


def test_augmentation_labels_and_other_keywords_pass_through():
    net, augment = Recorder(dtype=torch.bfloat16), normal(2, 9)
    Preconditioned(net)(normal(2, 1, 4, 4), 1.0, augment_labels=augment, text="a seven")
    cond = net.calls[0][2]
    assert cond["text"] == "a seven" and torch.equal(cond["augment_labels"], augment.bfloat16())


def test_sigma_data_per_channel():
    D, x, sigma = Preconditioned(Recorder(), sigma_data=[0.1, 1.0, 4.0]), normal(2, 3, 4, 4), torch.tensor([0.2, 5.0])
    out, weight = D(x, sigma), D.loss_weight(sigma)
    assert weight.shape == (2, 3, 1, 1)
    for c, sigma_data in enumerate((0.1, 1.0, 4.0)):
        alone = Preconditioned(Recorder(), sigma_data=sigma_data)
        torch.testing.assert_close(out[:, c:c + 1], alone(x[:, c:c + 1], sigma), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weight[:, c].flatten(), alone.loss_weight(sigma), rtol=1e-6, atol=0)
    assert D.net.calls[0][1].shape == (2,)
    flat = Preconditioned(Recorder(), sigma_data=[0.1, 1.0])
    assert flat(normal(7, 2), 1.0).shape == (7, 2)


def test_range_and_rounding():
    u = exact_levels()
    D = Preconditioned(Conv(), iddpm_scalings)
    assert (D.sigma_min, D.sigma_max) == pytest.approx((float(u[999]), float(u[0])))
    torch.testing.assert_close(D.round_sigma(u), u, rtol=1e-11, atol=0)
    between = (u[:-1] + u[1:]) / 2
    torch.testing.assert_close(D.round_sigma(between * (1 + 1e-9)), u[:-1], rtol=1e-11, atol=0)
    torch.testing.assert_close(D.round_sigma(between * (1 - 1e-9)), u[1:], rtol=1e-11, atol=0)
    assert iddpm_scalings(u[:-1])[3].tolist() == list(range(999, -1, -1))
    edm = Preconditioned(Conv())
    assert (edm.sigma_min, edm.sigma_max) == (0.0, math.inf) and torch.equal(edm.round_sigma(LEVELS), LEVELS)
    vp = Preconditioned(Conv(), vp_scalings)
    # t ~ U(1e-5, 1) in training: sigma(1e-5)² = exp(19.9/2 1e-10 + 1e-6) - 1 = 1.0010e-6, not the 0.0105 of the sampler
    assert (vp.sigma_min, vp.sigma_max) == pytest.approx((0.00100050, 152.1670), rel=1e-5)
    ve = Preconditioned(Conv(), ve_scalings, sigma_min=0.05)
    assert (ve.sigma_min, ve.sigma_max) == (0.05, 100.0)
    short = Preconditioned(Conv(), iddpm_scalings, M=100)
    assert (short.round_sigma(1.0) - exact_levels(100)).abs().min() < 1e-10


# ---------------------------------------------------------------- settings

@every_row
def test_config_round_trip(name):
    constants = {"vp": {"M": 500, "beta_min": 0.2}, "iddpm": {"M": 200}, "flow": {"time_scale": 1000.0}}.get(name, {})
    D = Preconditioned(Conv(), SCALINGS[name], sigma_data=(0.4, 0.5, 0.6), sigma_min=0.01, **constants)
    config = json.loads(json.dumps(D.config, allow_nan=False))
    again = Preconditioned.from_config(D.net, config)
    assert again.config == D.config and again.sigma_data == (0.4, 0.5, 0.6)
    assert (again.sigma_min, again.sigma_max) == (D.sigma_min, D.sigma_max)
    x = normal(2, 3, 4, 4)
    assert torch.equal(again(x, 0.7), D(x, 0.7))


def test_infinite_range_survives_json():
    D = Preconditioned(Conv(), ve_scalings, sigma_max=math.inf)
    assert Preconditioned.from_config(D.net, json.loads(json.dumps(D.config))).sigma_max == math.inf


def test_own_scalings():
    def mine(sigma, sigma_data=0.5, power=1.0):
        return edm_scalings(sigma**power, sigma_data)
    D = Preconditioned(Conv(), mine, sigma_data=0.7, power=1.0)
    x = normal(2, 3, 4, 4)
    assert torch.equal(D(x, 2.0), Preconditioned(D.net, sigma_data=0.7)(x, 2.0))
    with pytest.raises(ValueError, match="scalings="):
        Preconditioned.from_config(D.net, D.config)
    assert torch.equal(Preconditioned.from_config(D.net, D.config, scalings=mine)(x, 2.0), D(x, 2.0))


@pytest.mark.parametrize("wrong", [{"sigma_data": 0}, {"sigma_data": -1.0}, {"sigma_data": []}, {"sigma_data": float("nan")},
                                   {"sigma_data": [0.5, 0.0]}, {"sigma_min": -1}, {"sigma_min": 3, "sigma_max": 2},
                                   {"beta_d": 1.0}, {"sigmadata": 0.5}, {"sigma_data": [[0.5]]}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        Preconditioned(Conv(), **wrong)


def test_one_source_of_sigma_data():
    D = Preconditioned(Conv(), sigma_data=0.75)
    check_sigma_data(D, 0.75)
    check_sigma_data(ORACLE, 123.0)
    torch.testing.assert_close(D.loss_weight(LEVELS), edm_weight(LEVELS, 0.75), rtol=1e-12, atol=0)
    for wrong in (0.5, [0.75, 0.75]):
        with pytest.raises(ValueError, match="denoise.sigma_data"):
            check_sigma_data(D, wrong)
    check_sigma_data(Preconditioned(Conv(), sigma_data=[0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))


def test_parametrisation_needs_no_network():
    row = Parametrisation(iddpm_scalings, M=50)
    assert row.config["M"] == 50 and len(row.coefficients(1.0)) == 4


# ---------------------------------------------------------------- the data's scale

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 10_000), st.floats(-1e3, 1e3))
def test_streaming_estimate_does_not_depend_on_batches(sizes, seed, offset):
    x = normal(sum(sizes), 3, 2, 2, seed=seed) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1) + offset
    scale = estimate_sigma_data(x.split(sizes))
    assert scale.n == len(x)
    assert scale.mean == pytest.approx(x.mean().item(), rel=1e-12, abs=1e-9)
    assert scale.std == pytest.approx(x.std(correction=0).item(), rel=1e-9)
    assert list(scale.channel_std) == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), rel=1e-9)
    assert list(scale.channel_mean) == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-9, abs=1e-9)


def test_estimate_takes_bytes_tuples_and_single_tensors():
    pixels = torch.randint(256, (10, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = (pixels.double() / 127.5 - 1).std(correction=0).item()
    for batches in (pixels, [pixels], [(pixels[:5], torch.zeros(5)), (pixels[5:], torch.zeros(5))], iter([pixels])):
        assert estimate_sigma_data(batches).std == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 2, 2)], [torch.tensor([[float("nan")]])],
                                     [torch.zeros(2, 3, 2, 2), torch.zeros(2, 1, 2, 2)]])
def test_estimate_refuses_unusable_data(batches):
    with pytest.raises(ValueError):
        estimate_sigma_data(batches)


@pytest.mark.parametrize("setting, warns", [(0.5, False), (0.59, False), (0.61, True), (0.42, False), (0.41, True), ([0.5, 5.0], True)])
def test_warning_beyond_twenty_percent(setting, warns):
    data = torch.tensor([[0.5, 0.5], [-0.5, -0.5]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate_sigma_data(data, sigma_data=setting)
    assert bool(caught) == warns


def test_suggestions_scale_with_the_data():
    x = normal(500, 3) * torch.tensor([1.0, 2.0, 0.5]) + 0.3
    one, ten = suggest_settings(x), suggest_settings(10 * x)
    assert ten.sigma_data == pytest.approx(10 * one.sigma_data)
    assert ten.sigma_max == pytest.approx(10 * one.sigma_max, rel=1e-6)
    assert ten.sigma_min == pytest.approx(0.004 * ten.sigma_data)
    assert ten.P_mean - one.P_mean == pytest.approx(math.log(10))
    assert isinstance(one, Suggestion) and one.P_std == 1.2
    half = suggest_settings(x * 0.5 / one.sigma_data)
    assert half.P_mean == pytest.approx(-1.2) and half.sigma_min == pytest.approx(0.002)


def test_start_divergence_is_the_kl_of_two_gaussians():
    x = normal(50_000, 2) @ torch.tensor([[3.0, 0.0], [1.0, 0.5]], dtype=torch.float64) + torch.tensor([1.0, -2.0])
    mean, cov, sigma = x.mean(0), x.T.cov(correction=0), 2.0
    eye = torch.eye(2, dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(mean, cov + sigma**2 * eye)
    q = torch.distributions.MultivariateNormal(torch.zeros_like(mean), sigma**2 * eye)
    assert start_divergence(x)(sigma) == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-9)
    few = normal(20, 100)
    wide, tall = start_divergence(few)(1.5), start_divergence(torch.cat([few] * 6))(1.5)   # gram matrix or covariance
    assert wide == pytest.approx(tall, rel=1e-9)


def test_value_step():
    assert value_step(torch.arange(16).float() / 8) == pytest.approx(0.125)
    assert value_step(torch.rand(5000)) is None
    assert suggest_settings(torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)).sigma_min == pytest.approx(
        2 / 255 / math.sqrt(12), rel=1e-9)
    with pytest.raises(ValueError, match="equal"):
        suggest_settings(torch.ones(10, 2))


def test_value_step_sees_through_rounding_and_gaps():
    # 0.3 and 0.1 + 0.2 are one grey level, and a level that no pixel takes does not change the step
    assert value_step(torch.tensor([0.0, 0.1, 0.3, 0.1 + 0.2, 0.2, 0.5], dtype=torch.float64)) == pytest.approx(0.1)
    assert value_step(torch.tensor([0.7, 0.7 + 1e-18])) is None
    assert value_step(10 * torch.tensor([0.0, 0.3, 0.1 + 0.2, 1.0], dtype=torch.float64)) == pytest.approx(3)


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_few_grey_levels_do_not_stop_the_sampler_early(unit):
    bits = unit * (2.0 * torch.randint(2, (200, 1, 4, 4), generator=torch.Generator().manual_seed(0)) - 1)
    found = suggest_settings(bits)
    assert found.sigma_min == pytest.approx(0.05 * found.sigma_data) and found.sigma_data == pytest.approx(unit, rel=0.01)


@pytest.mark.parametrize("sigma_data", [-1.0, 0.0, float("nan"), torch.tensor([0.5, -0.5])])
def test_a_sigma_data_that_is_not_positive_is_refused_by_the_formulas(sigma_data):
    for formula in (edm_scalings, edm_weight, lambda s, d: loss_weight(s, sigma_data=d)):
        with pytest.raises(ValueError, match="sigma_data must be finite and > 0"):
            formula(1.0, sigma_data)


def test_wrong_kinds_are_named():
    with pytest.raises(ValueError, match="expected a torch tensor, got numpy.ndarray"):
        Preconditioned(Conv())(torch.zeros(2, 3, 4, 4).numpy(), 1.0)
    with pytest.raises(ValueError, match="2 values, but the data have 3 channels"):
        estimate_sigma_data(torch.randn(4, 3, 2, 2), sigma_data=[0.5, 0.5])


# ---------------------------------------------------------------- rows beyond Table 1

def test_rectified_flow_is_the_same_ode():
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x_t = normal(7, 2)
    network = Perfect("flow")
    D = Preconditioned(network, flow_scalings)
    torch.testing.assert_close(ode_derivative(D, x_t, t, FLOW), network(x_t, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(FLOW.sigma_inv(FLOW.sigma(t)), t)
    s = t.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(FLOW.sigma(s).sum(), s)[0], FLOW.sigma_deriv(t))
    torch.testing.assert_close(torch.autograd.grad(FLOW.scale(s).sum(), s)[0], FLOW.scale_deriv(t))


def test_rectified_flow_sampler():
    times, noise, network = torch.linspace(0.99, 0, 12, dtype=torch.float64), normal(8, 2), Perfect("flow")
    x_t = 0.99 * noise
    for t, t_next in itertools.pairwise(times):
        x_t = x_t + (t_next - t) * network(x_t, t.expand(8))
    ours = sample_ode(Preconditioned(network, flow_scalings), noise, FLOW.sigma(times), schedule=FLOW, solver=euler)
    torch.testing.assert_close(ours, x_t, rtol=1e-9, atol=1e-9)


def test_v_prediction_step_is_a_rotation():
    sigmas, noise, network = edm_sigmas(8, 0.02, 40.0), normal(8, 2), Perfect("v")
    angle = sigmas.atan()
    z = sigmas[0] * noise * angle[0].cos()
    for phi, phi_next in itertools.pairwise(angle):
        delta = phi - phi_next
        z = delta.cos() * z - delta.sin() * network(z, (phi * 2 / math.pi).expand(8))
    ours = sample_ode(Preconditioned(network, v_scalings), noise, sigmas, schedule=LINEAR, solver=euler)
    torch.testing.assert_close(ours, z, rtol=1e-8, atol=1e-8)


def test_v_prediction_is_edm_at_unit_scale():
    ours, edm = v_scalings(LEVELS), edm_scalings(LEVELS, 1.0)
    for a, b, sign in zip(ours[:3], edm[:3], (1, -1, 1)):
        torch.testing.assert_close(a, sign * b, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- a network's own table of levels

def float32_levels():
    "iDDPM's recursion in float32, as published networks carry it: not the module's float64 levels."
    u, M = [torch.tensor(0.0)], 1000
    bar = [torch.sin(torch.tensor(math.pi / 2 * j / (M * 1.008))) ** 2 for j in range(M + 1)]
    for j in range(M, 0, -1):
        u.append(((u[-1] ** 2 + 1) / torch.clamp(bar[j - 1] / bar[j], min=0.001) - 1).sqrt())
    return torch.stack(u[::-1])


def test_a_networks_own_levels_are_used_and_survive_json():
    u = float32_levels()
    theirs = exact_levels()
    assert (u.double() / theirs - 1)[:-1].abs().max() > 1e-4         # or the test could not tell the tables apart
    net = Recorder()
    D = Preconditioned(net, iddpm_scalings, levels=u)
    assert torch.equal(D.round_sigma(theirs), u.double())           # each exact level lies next to one of the table
    between = ((u[:-1] + u[1:]) / 2).double()
    assert torch.equal(D.round_sigma(between * (1 + 1e-6)), u[:-1].double())
    assert (D.sigma_min, D.sigma_max) == (u[-2].item(), u[0].item())
    D(normal(3, 1, 2, 2), u[[0, 500, 999]].double())
    assert net.calls[0][1].tolist() == [999.0, 499.0, 0.0]
    again = Preconditioned.from_config(net, json.loads(json.dumps(D.config, allow_nan=False)))
    assert torch.equal(again.levels, D.levels) and again.config == D.config
    assert "levels=own" in repr(D) and len(repr(D)) < 300


def test_levels_are_not_rounded_with_the_weights():
    D = Preconditioned(Conv(), iddpm_scalings, M=50).to(torch.bfloat16)
    assert D.levels.dtype == torch.float64
    torch.testing.assert_close(D.levels, exact_levels(50), rtol=1e-11, atol=0)
    assert D.half().levels.dtype == torch.float64 and "levels" not in D.state_dict()


@pytest.mark.parametrize("levels", [[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.0], [math.inf, 1.0, 0.0], [1.0, 0.0], "abc", [[1.0, 0.0]],
                                    [10**400, 1, 0], [3.0, math.nan, 0.0]])
def test_tables_that_are_none(levels):
    with pytest.raises(ValueError, match="levels"):
        Parametrisation(iddpm_scalings, levels=levels)


@pytest.mark.parametrize("constants", [dict(M=0), dict(M=1), dict(M=10**10), dict(M=2.5), dict(C_1=0.0), dict(C_2=-1.0), dict(C_1=5.0), dict(M=7, levels=[2., 1., 0.]),
                                       dict(C_1=math.nan), dict(C_2="x"), dict(M=True)])
def test_constants_that_give_no_levels(constants):
    with pytest.raises(ValueError):
        Parametrisation(iddpm_scalings, **constants)


@pytest.mark.parametrize("row, settings", [
    (edm_scalings, dict(sigma_data=10**400)), (edm_scalings, dict(sigma_data="half")), (edm_scalings, dict(sigma_data=[0.5, None])),
    (edm_scalings, dict(sigma_min=10**400)), (edm_scalings, dict(sigma_min="0")), (edm_scalings, dict(sigma_max=math.nan)),
    (vp_scalings, dict(beta_d=10**400)), (flow_scalings, dict(time_scale="1000")), (flow_scalings, dict(time_scale=math.nan)),
    (vp_scalings, dict(M=math.inf))], ids=lambda value: getattr(value, "__name__", str(value)[:40]))
def test_settings_that_are_no_numbers(row, settings):
    "Untrusted files carry such: each is a ValueError when the denoiser is made, not an error of another kind at its first call."
    with pytest.raises(ValueError):
        Parametrisation(row, **settings)


# ---------------------------------------------------------------- any rank

@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 7), (2, 3, 4, 4), (2, 3, 2, 4, 4)])
def test_sigma_data_per_channel_at_any_rank(shape):
    D, x, sigma = Preconditioned(Recorder(), sigma_data=[0.1, 1.0, 4.0]), normal(*shape), torch.tensor([0.2, 5.0])
    out, weight = D(x, sigma), D.loss_weight(sigma, x.ndim)
    column = sigma.reshape(-1, *[1] * (x.ndim - 1))
    assert out.shape == x.shape and weight.shape == (2, 3, *[1] * (x.ndim - 2))
    assert torch.equal(D.loss_weight(column), weight)               # the rank is read off a column of levels
    for c, sigma_data in enumerate((0.1, 1.0, 4.0)):
        alone = Preconditioned(Recorder(), sigma_data=sigma_data)
        torch.testing.assert_close(out[:, c:c + 1], alone(x[:, c:c + 1], sigma), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weight[:, c].reshape(2), alone.loss_weight(sigma), rtol=1e-6, atol=0)


def test_channels_are_not_broadcast_in_silence():
    for channels in (1, 2):
        with pytest.raises(ValueError, match="3 values, one per channel"):
            Preconditioned(Recorder(), sigma_data=[0.1, 1.0, 4.0])(normal(2, channels, 4, 4), 1.0)
    with pytest.raises(ValueError, match=r"\[B, C, ...\]"):
        Preconditioned(Recorder())(normal(5), 1.0)


# ---------------------------------------------------------------- export

@pytest.mark.parametrize("name", ["edm", "vp", "iddpm"])
def test_exports_with_a_dynamic_batch(name):
    D, batch = Preconditioned(Conv(), SCALINGS[name]).eval(), torch.export.Dim("batch", min=1, max=64)
    x, sigma = normal(4, 3, 8, 8, dtype=torch.float32), torch.rand(4, dtype=torch.float64) + 0.1
    program = torch.export.export(D, (x, sigma), dynamic_shapes=dict(x={0: batch}, sigma={0: batch}))
    for n in (1, 2, 7):
        y, s = normal(n, 3, 8, 8, seed=n, dtype=torch.float32), torch.rand(n, dtype=torch.float64) + 0.2
        torch.testing.assert_close(program.module()(y, s), D(y, s), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- memory, and data of known scale

PEAK = """
import resource, torch
from edm_nb.preconditioning import estimate_sigma_data, suggest_settings
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
images = torch.randint(256, (160, 3, 256, 256), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
open("/proc/self/clear_refs", "w").write("5")
estimate_sigma_data(images[:2]); torch.linalg.eigvalsh(torch.eye(20, dtype=torch.float64))   # first use of what is loaded lazily
before = peak()
found = {call}
print(peak() - before, images.numel())
"""


@pytest.mark.parametrize("call", ["estimate_sigma_data(images)", "suggest_settings(images)"])
def test_the_scale_of_large_images_is_measured_in_pieces(call):
    "Thirty times the batch were held in float64; at most four times what it holds is allowed."
    import subprocess
    import sys
    from pathlib import Path
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    text = subprocess.run([sys.executable, "-c", PEAK.replace("{call}", call)], capture_output=True, text=True, check=True,
                          cwd=Path(module.__file__).parent.parent).stdout
    grown, held = map(int, text.split())
    assert grown < 3 * held, f"{grown / held:.1f} times the batch"


def known_data(name, unit, seed):
    "Data whose scale is known before anything is measured: from their definition, not from a sample."
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    if name == "cube":                                # uniform in [-1, 1]^12: variance 1/3, all directions alike
        return unit * (2 * rand(4000, 3, 2, 2) - 1), unit / 3**0.5, torch.full((12,), 1 / 3) * unit**2, 0.0
    if name == "dice":                                # faces -5, -3, ..., 5 with a step of 2: variance 35/3
        return unit * (2 * torch.randint(6, (4000, 1, 3, 3), generator=generator).double() - 5), unit * (35 / 3)**0.5, torch.full((9,), 35 / 3) * unit**2, 0.0
    waves = torch.sin(2 * math.pi * (torch.arange(64) / 64 * 3 + rand(4000, 1)))[:, None]     # one frequency, phase at random: two directions
    return unit * (waves + 0.5), unit * 0.5**0.5, torch.tensor([16., 16.], dtype=torch.float64) * unit**2, 64 * (0.5 * unit)**2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [1.0, 250.0, 0.004])
@pytest.mark.parametrize("name", ["cube", "dice", "wave"])
def test_suggestions_for_data_of_known_scale(name, unit, seed):
    "The scale comes from the definition of the data; sigma_max from a Gaussian divergence solved here, by another method."
    data, sigma_data, variances, mean_square = known_data(name, unit, seed)
    found = suggest_settings(data)
    assert found.sigma_data == pytest.approx(sigma_data, rel=0.03)
    assert found.P_mean == pytest.approx(math.log(sigma_data) + math.log(0.30119421 / 0.5), abs=0.03)     # e^-1.2 at 0.5
    expected_min = unit * 2 / math.sqrt(12) if name == "dice" else None
    if name == "dice":                                # rounding to steps of 2 would be 0.58, a sixth of sigma_data: bounded
        assert expected_min > 0.05 * sigma_data and found.sigma_min == pytest.approx(0.05 * sigma_data, rel=0.03)
    else:
        assert found.sigma_min == pytest.approx(0.004 * sigma_data, rel=0.03)
    kl = lambda s: mean_square / (2 * s**2) + 0.5 * float((variances / s**2 - torch.log1p(variances / s**2)).sum())
    variances = variances.double()
    grid = unit * torch.logspace(0, 2.5, 500, dtype=torch.float64)
    expected = float(grid[torch.tensor([abs(math.log(kl(float(s)) / 0.002)) for s in grid]).argmin()])
    assert found.sigma_max == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("nats", [-1.0, 0.0, math.nan, math.inf])
def test_a_price_that_is_none(nats):
    with pytest.raises(ValueError, match="nats"):
        suggest_settings(normal(50, 3), nats=nats)


def test_a_network_with_levels_of_its_own_is_told_their_numbers():
    "Five levels that no formula made; the numbers are counted by hand: 0 for the noisiest."
    levels = torch.tensor([9.0, 4.0, 2.5, 1.0, 0.2, 0.0], dtype=torch.float64)
    c_noise = iddpm_scalings(torch.tensor([9.0, 5.0, 1.1, 0.3], dtype=torch.float64), levels=levels)[3]
    assert c_noise.tolist() == [4.0, 3.0, 1.0, 0.0]
