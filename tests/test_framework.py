"Schedules, score, ODE, oracles and Table 1: identities, independent computations, bad input. No data set, no network."
import math

import pytest
import torch

from edm_nb import framework as F
from edm_nb.framework import (
    GaussianDenoiser, iddpm_levels, LINEAR, MixtureDenoiser, ode_derivative, Schedule,
    ideal_denoiser, score, TABLE_1, VE, vp_refit, vp_schedule
)
from edm_nb.oracles import IdealDenoiser
from edm_nb.checks import broadcast_sigma

SIGMAS = [0.002, 0.05, 0.7, 3., 10., 80.]
SCHEDULES = {"linear": LINEAR, "ve": VE, "vp": vp_schedule(), "vp, other constants": vp_schedule(7., 0.5), "vp, constant rate": vp_schedule(0., 1.)}


def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(n=300, shape=(3, 8, 8), seed=1, dtype=torch.float32):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def toy(): return MixtureDenoiser(torch.tensor([[-1.], [0.], [1.2]], dtype=torch.float64), torch.tensor([.1, .05, .2]), torch.tensor([3., 2., 5.]))


def naive(x, sigma, Y):
    "The definition of App. B.3, one query and one image at a time, in float64."
    D = []
    for query in x.double():
        logits = torch.stack([-(query - y.double()).square().sum() / (2 * sigma**2) for y in Y])
        D.append((logits.softmax(0)[:, None] * Y.double().flatten(1)).sum(0).reshape(query.shape))
    return torch.stack(D)


# noise levels and shapes

def test_broadcast_keeps_float64_of_numbers():
    assert broadcast_sigma(0.1, rand(2, 3)).flatten().tolist() == [0.1, 0.1]     # float32 would be 0.10000000149


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 8, 8), (4, 1, 2, 3, 5)])
def test_broadcast_shapes(shape):
    x = torch.zeros(shape)
    for sigma in (2., torch.tensor(2.), torch.full((1,), 2.), torch.full((4,), 2., dtype=torch.float64)):
        got = broadcast_sigma(sigma, x)
        assert got.shape == (4, *[1] * (len(shape) - 1)) and got.dtype == x.dtype


@pytest.mark.parametrize("sigma", [torch.ones(3), torch.ones(4, 1), torch.ones(2, 2)])
def test_broadcast_refuses(sigma):
    with pytest.raises(ValueError, match="scalar or"): broadcast_sigma(sigma, torch.zeros(4, 3))


@pytest.mark.parametrize("x", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int64), [1., 2.]])
def test_integer_states_are_refused(x):
    with pytest.raises(ValueError, match="floating-point"): broadcast_sigma(1., x)


@pytest.mark.parametrize("sigma", [0., -1., math.nan, math.inf])
def test_bad_levels_are_refused_everywhere(sigma):
    x = rand(2, 1)
    for call in (lambda: score(toy(), x, sigma), lambda: ode_derivative(toy(), x, sigma), lambda: toy()(x, sigma),
                 lambda: GaussianDenoiser(0., 1.)(x, sigma), lambda: IdealDenoiser(rand(5, 1))(x, sigma)):
        with pytest.raises(ValueError, match="finite and > 0"): call()


def test_wrong_answer_of_a_denoiser_is_refused():
    with pytest.raises(ValueError, match=r"returned shape \(2,\)"): score(lambda x, sigma: x[:, 0], rand(2, 3), 1.)


def test_conditions_reach_the_denoiser():
    seen = []
    def denoise(x, sigma, **cond):
        seen.append(cond)
        return x
    labels = torch.eye(2)
    score(denoise, rand(2, 3), 1., class_labels=labels)
    ode_derivative(denoise, rand(2, 3), 1., class_labels=labels, augment_labels=None)
    assert seen[0]["class_labels"] is labels and set(seen[1]) == {"class_labels", "augment_labels"}


# schedules

@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_derivatives_and_inverse(name):
    schedule, t = SCHEDULES[name], torch.logspace(-7, 0, 60, dtype=torch.float64).requires_grad_()
    sigma, scale = schedule.sigma(t), schedule.scale(t)
    torch.testing.assert_close(schedule.sigma_deriv(t), torch.autograd.grad(sigma.sum(), t)[0], rtol=1e-10, atol=0)
    if scale.requires_grad: torch.testing.assert_close(schedule.scale_deriv(t), torch.autograd.grad(scale.sum(), t)[0], rtol=1e-10, atol=0)
    else: assert (schedule.scale_deriv(t) == 0).all() and (scale == 1).all()
    torch.testing.assert_close(schedule.sigma_inv(sigma), t, rtol=1e-9, atol=0)
    assert schedule.sigma(torch.zeros((), dtype=torch.float64)) == 0 and schedule.scale(0.) == 1


def test_vp_preserves_variance_and_refuses_bad_constants():
    t = torch.linspace(1e-4, 1, 50, dtype=torch.float64)
    vp = vp_schedule()
    torch.testing.assert_close(vp.scale(t)**2 * (1 + vp.sigma(t)**2), torch.ones_like(t))
    for bad in ((-1., 0.1), (0., 0.), (1., -0.1), (-0.2, 0.1), (1., math.nan), (math.inf, 1.)):
        with pytest.raises(ValueError, match="beta"): vp_schedule(*bad)


def test_the_published_refit_of_vp_is_accepted_and_starts_and_ends_where_it_says():
    "Valid is what increases on the interval that is used: the published beta_min is negative (validity judged at t = 0)."
    beta_d, beta_min = vp_refit(0.002, 80.)
    assert beta_d == pytest.approx(17.538, abs=5e-4) and beta_min == pytest.approx(-0.00477, abs=5e-6)
    vp = vp_schedule(beta_d, beta_min)
    assert vp.sigma(1e-3).item() == pytest.approx(0.002, rel=1e-9) and vp.sigma(1.).item() == pytest.approx(80., rel=1e-9)
    t = torch.logspace(-3, 0, 50, dtype=torch.float64)
    torch.testing.assert_close(vp.sigma_inv(vp.sigma(t)), t, rtol=1e-9, atol=0)
    assert (vp.sigma(t).diff() > 0).all() and vp.sigma_inv(torch.zeros(2, dtype=torch.float64)).tolist() == [0., 0.]
    torch.testing.assert_close(vp.scale(t)**2 * (1 + vp.sigma(t)**2), torch.ones_like(t))
    published = vp_schedule(17.538, -0.00477)
    assert published.sigma(1e-3).item() == pytest.approx(0.002, rel=1e-3)
    assert TABLE_1["vp"].constants["beta_min"] == 0.1 and F.vp_row(beta_d, beta_min).sigmas(5)[0].item() == pytest.approx(80.)
    with pytest.raises(ValueError, match="rises from 0.0001 to 1"): vp_schedule(beta_d, beta_min, epsilon_s=1e-4)


def test_schedules_are_frozen_and_accept_numbers():
    assert VE.sigma(4.).dtype == torch.float64 and VE.sigma(4.) == 2 and LINEAR.scale(3) == 1
    with pytest.raises(AttributeError): LINEAR.sigma = None


# score and flow

def oracles():
    return {"gaussian": GaussianDenoiser(rand(6, seed=3), 0.5), "anisotropic": GaussianDenoiser(rand(2, 3), rand(2, 3, seed=4).abs() + 0.1),
            "mixture": MixtureDenoiser(rand(5, 4), torch.linspace(0.1, 1, 5), torch.arange(1., 6.)), "points": MixtureDenoiser(rand(7, 2, 2))}


@pytest.mark.parametrize("name", oracles())
@pytest.mark.parametrize("sigma", [0.05, 1., 20.])
def test_score_is_the_gradient_of_log_p(name, sigma):
    oracle = oracles()[name]
    x = oracle.sample(6, sigma, torch.Generator().manual_seed(0)).requires_grad_()
    truth, = torch.autograd.grad(oracle.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(score(oracle, x, sigma), truth, rtol=1e-8, atol=1e-9 * truth.abs().max().item())


def test_densities_integrate_to_one():
    line = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    for oracle in (toy(), GaussianDenoiser(torch.tensor([0.4], dtype=torch.float64), 0.3)):
        for sigma in (0.05, 0.5, 3.):
            assert abs(torch.trapezoid(oracle.log_prob(line[:, None], sigma).exp(), line).item() - 1) < 1e-6
    points = IdealDenoiser(torch.tensor([[-1.], [0.5]]))
    assert abs(torch.trapezoid(points.log_prob(line[:, None], 0.5).exp(), line).item() - 1) < 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_slope_follows_the_exact_gaussian_path(name):
    schedule, data = SCHEDULES[name], GaussianDenoiser(rand(3, seed=7), torch.tensor([0.1, 0.5, 2.]))
    x0 = data.sample(4, 5., torch.Generator().manual_seed(1))
    path = lambda t: schedule.scale(t) * data.solve(x0, 5., schedule.sigma(t))
    for sigma in (0.05, 0.5, 3.):
        t = schedule.sigma_inv(torch.tensor(sigma, dtype=torch.float64))
        h = 1e-4 * t
        torch.testing.assert_close(ode_derivative(data, path(t), t, schedule), (path(t + h) - path(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_a_wrong_factor_in_the_slope_is_seen():
    data = GaussianDenoiser(torch.zeros(1, dtype=torch.float64), 0.5)
    x0, h = rand(4, 1), 1e-4
    slope = (data.solve(x0, 1., 1 + h) - data.solve(x0, 1., 1 - h)) / (2 * h)
    for wrong in (LINEAR.__class__(LINEAR.sigma, lambda t: 1.001 * torch.ones_like(t), *[getattr(LINEAR, f) for f in ("sigma_inv", "scale", "scale_deriv")]),):
        assert (ode_derivative(data, x0, torch.tensor(1.), wrong) - slope).abs().max() > 1e-4
    assert (ode_derivative(data, x0, 1.) - slope).abs().max() < 1e-7


def test_levels_per_sample_agree_with_one_at_a_time():
    x, sigma = rand(3, 1), torch.tensor([0.1, 1., 7.], dtype=torch.float64)
    for schedule in SCHEDULES.values():
        t = schedule.sigma_inv(sigma)
        together = ode_derivative(toy(), x, t, schedule)
        for i in range(3): torch.testing.assert_close(together[i:i + 1], ode_derivative(toy(), x[i:i + 1], t[i], schedule))


def test_slope_under_no_grad_and_dtype():
    with torch.no_grad(): out = ode_derivative(toy(), rand(2, 1).float(), torch.tensor(0.5), vp_schedule())
    assert out.dtype == torch.float32


def test_slope_without_data_dependent_branches():
    "vmap and jacrev go through: nothing in the slope looks at the values of x."
    x = rand(3, 4)
    data = GaussianDenoiser(torch.zeros(4, dtype=torch.float64), 0.5)
    jacobian = torch.func.jacrev(lambda x: ode_derivative(data, x[None], 2.)[0])(x[0])
    torch.testing.assert_close(jacobian, torch.eye(4, dtype=torch.float64) * 2 / 4.25)


# oracles

def test_points_have_no_density():
    points, mixed = torch.tensor([[-1.], [1.]], dtype=torch.float64), torch.tensor([0.3, 0.])
    for std in (0., mixed):
        with pytest.raises(ValueError, match="std = 0 is a point"): MixtureDenoiser(points, std).log_prob(rand(3, 1))
        assert MixtureDenoiser(points, std).log_prob(rand(3, 1), 1e-3).isfinite().all()
    assert MixtureDenoiser(points, 0.3).log_prob(rand(3, 1), 0.).isfinite().all()


def test_oracle_samples_have_the_stated_moments():
    g = torch.Generator().manual_seed(0)
    for oracle, mean, var in ((GaussianDenoiser(torch.tensor([0.5]), 0.3), 0.5, 0.09), (MixtureDenoiser(torch.tensor([[-1.], [1.]]), 0.2, torch.tensor([1., 3.])), 0.5, 0.79),
                              (IdealDenoiser(torch.tensor([[-1.], [1.]])), 0., 1.)):
        x = oracle.sample(40_000, 0.5, g)
        assert x.shape == (40_000, 1)
        assert abs(x.mean().item() - mean) < 5 * math.sqrt((var + .25) / 40_000) and abs(x.var().item() / (var + 0.25) - 1) < 0.04


def test_gaussian_is_a_one_component_mixture():
    mean, x = rand(3, seed=5), rand(4, 3)
    one, mixture = GaussianDenoiser(mean, 0.7), MixtureDenoiser(mean[None], 0.7)
    for sigma in SIGMAS:
        torch.testing.assert_close(one(x, sigma), mixture(x, sigma))
        torch.testing.assert_close(one.log_prob(x, sigma), mixture.log_prob(x, sigma))


def test_oracles_keep_dtype_and_refuse_wrong_shapes():
    for oracle in (GaussianDenoiser(torch.zeros(3), 1.), MixtureDenoiser(torch.zeros(2, 3)), IdealDenoiser(torch.zeros(2, 3))):
        for dtype in (torch.float32, torch.float64, torch.bfloat16): assert oracle(torch.zeros(4, 3, dtype=dtype), 1.).dtype == dtype
        with pytest.raises(ValueError, match="x must be"): oracle(torch.zeros(4, 5), 1.)
    for bad in (lambda: MixtureDenoiser(torch.zeros(3, 2), torch.ones(2)), lambda: MixtureDenoiser(torch.zeros(3, 2), 1., torch.ones(4)),
                lambda: MixtureDenoiser(torch.zeros(3, 2), -1.), lambda: GaussianDenoiser(0., 0.), lambda: MixtureDenoiser(torch.zeros(3, 2, dtype=torch.uint8))):
        with pytest.raises(ValueError): bad()


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.2, 1., 2., 4., 10., 80.])
def test_ideal_denoiser_is_exact(sigma):
    Y = images(400)
    noisy = Y[:3].double() + sigma * rand(3, 3, 8, 8)
    middle = (Y[:3].double() + Y[3:6].double()) / 2 + 0.1 * sigma * rand(3, 3, 8, 8, seed=2)
    x = torch.cat([noisy, middle])
    ideal, truth = IdealDenoiser(Y), naive(x, sigma, Y)
    assert (ideal(x, sigma) - truth).abs().max() < 2e-7
    assert (ideal(x.float(), sigma) - naive(x.float(), sigma, Y)).abs().max() < 4e-7     # plus the rounding of the answer
    points = MixtureDenoiser(Y.double())
    torch.testing.assert_close(ideal.log_prob(x, sigma), points.log_prob(x, sigma), rtol=1e-8, atol=1e-6)


def test_ideal_denoiser_with_levels_per_sample_and_any_memory():
    Y, sigma = images(200), torch.tensor([0.01, 0.5, 5., 50.])
    x = Y[:4].double() + sigma.double().reshape(-1, 1, 1, 1) * rand(4, 3, 8, 8)
    truth = torch.cat([naive(x[i:i + 1], s, Y) for i, s in enumerate(sigma.double().tolist())])
    for memory in (1, 10**4, 10**5, 2**28): torch.testing.assert_close(IdealDenoiser(Y, memory=memory)(x, sigma.double()), truth, rtol=0, atol=3e-7)


def test_crowded_images_send_queries_to_float64():
    "Hundreds of near copies: float32 cannot rank them, and the prediction must say so."
    Y = torch.cat([images(1, (3, 16, 16)) + 1e-4 * rand(300, 3, 16, 16).float(), images(300, (3, 16, 16), seed=5)])
    ideal, sigma = IdealDenoiser(Y), 0.002
    x = Y[:3].double() + sigma * rand(3, 3, 16, 16, seed=9)
    assert (ideal(x, sigma) - naive(x, sigma, Y)).abs().max() < 1e-6 and ideal.float64_queries == 3
    trusting = IdealDenoiser(Y, tolerance=math.inf)
    assert (trusting(x, sigma) - naive(x, sigma, Y)).abs().max() > 5e-6 and trusting.float64_queries == 0


@pytest.mark.parametrize("sigma", [0.01, 0.5, 8.])
def test_the_naive_ideal_denoiser_of_the_chapter_is_the_definition(sigma):
    Y, x = images(40), images(3, seed=9).double()
    levels = torch.tensor([sigma, 2 * sigma, 3 * sigma], dtype=torch.float64)
    torch.testing.assert_close(ideal_denoiser(Y)(x, sigma), naive(x, sigma, Y), rtol=0, atol=1e-12)
    torch.testing.assert_close(ideal_denoiser(Y)(x, levels), torch.cat([naive(x[i:i+1], levels[i], Y) for i in range(3)]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="finite and > 0"): ideal_denoiser(Y)(x, 0.)


def test_truncation_would_be_wrong():
    Y = images(400)
    x = Y[:4].double() + 10 * rand(4, 3, 8, 8)
    distance = (x[:, None] - Y.double()).flatten(2).square().sum(2)
    logits = (-distance / 200).masked_fill(distance > distance.topk(64, 1, largest=False).values[:, -1:], -math.inf)
    truncated = (logits.softmax(1) @ Y.double().flatten(1)).reshape(x.shape)
    assert (truncated - naive(x, 10., Y)).abs().max() > 0.05 and (IdealDenoiser(Y)(x, 10.) - naive(x, 10., Y)).abs().max() < 2e-7


def test_classes_are_subsets():
    Y, labels = images(90), torch.arange(90) % 4
    ideal = IdealDenoiser(Y, labels, label_dim=5)
    one_hot = torch.nn.functional.one_hot(torch.tensor([3, 0, 0, 2]), 5).float()
    x = rand(4, 3, 8, 8)
    got = ideal(x, 2., class_labels=one_hot)
    for i, k in enumerate((3, 0, 0, 2)): torch.testing.assert_close(got[i:i + 1], naive(x[i:i + 1], 2., Y[labels == k]), rtol=0, atol=2e-7)
    torch.testing.assert_close(ideal(x, 2., class_labels=torch.zeros(4, 5)), IdealDenoiser(Y)(x, 2.), rtol=0, atol=2e-7)
    for labels_in, match in ((one_hot[:, :4], "one-hot"), (one_hot[:2], "one-hot"), (2 * one_hot, "one-hot"), (torch.ones(4, 5), "one-hot"),
                             (torch.eye(5)[[4, 4, 4, 4]], "class 4 has no images")):
        with pytest.raises(ValueError, match=match): ideal(x, 2., class_labels=labels_in)


def test_ideal_denoiser_refuses_bad_input():
    Y, x = images(5), torch.zeros(2, 3, 8, 8)
    for call, match in ((lambda: IdealDenoiser(Y.to(torch.uint8)), "floating"), (lambda: IdealDenoiser(Y[:0]), "at least one"), (lambda: IdealDenoiser(Y * math.nan), "finite"),
                        (lambda: IdealDenoiser(Y, torch.zeros(4, dtype=torch.int64)), "5 integers"), (lambda: IdealDenoiser(Y, torch.zeros(5)), "5 integers"),
                        (lambda: IdealDenoiser(Y, torch.arange(5), label_dim=3), "label_dim"), (lambda: IdealDenoiser(Y, refine=0), "refine"),
                        (lambda: IdealDenoiser(Y)(x * math.nan, 1.), "NaN"), (lambda: IdealDenoiser(Y)(x.to(torch.int32), 1.), "floating"),
                        (lambda: IdealDenoiser(Y)(x, torch.ones(3)), "scalar or"), (lambda: IdealDenoiser(Y)(x, 1., class_labels=torch.eye(2)), "without labels")):
        with pytest.raises(ValueError, match=match): call()


def test_empty_batch():
    Y, none = images(5), torch.zeros(0, 3, 8, 8)
    for oracle in (IdealDenoiser(Y), ideal_denoiser(Y), MixtureDenoiser(Y), MixtureDenoiser(Y, 0.3), GaussianDenoiser(Y[0], 1.)):
        assert oracle(none, 1.).shape == (0, 3, 8, 8)
        if hasattr(oracle, "log_prob"): assert oracle.log_prob(none, 1.).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_of_levels_do_not_overflow_in_any_precision(dtype):
    "Large levels in small dtypes: every oracle answers with the mean of its data, because no square is formed in the dtype of x."
    points = torch.tensor([[-1., 0.5], [0.5, 1.]], dtype=torch.float64)
    limit = 60_000. if dtype == torch.float16 else 1e30 if dtype != torch.float64 else 1e200
    x = torch.zeros(3, 2, dtype=dtype)
    for oracle in (MixtureDenoiser(points.to(dtype)), MixtureDenoiser(points, 0.2), GaussianDenoiser(points.mean(0), 0.4)):
        for sigma in (300., limit):
            D = oracle(x, sigma)
            assert D.dtype == dtype and torch.allclose(D.double(), points.mean(0), atol=0.02), (oracle, sigma, D)
    for sigma in (300., limit): assert oracle.log_prob(x, sigma).isfinite().all()


@pytest.mark.parametrize("sigma", [-1., math.nan, math.inf])
def test_no_oracle_draws_at_a_level_that_is_none(sigma):
    for oracle in (MixtureDenoiser(torch.zeros(2, 3)), GaussianDenoiser(torch.zeros(3), 1.), IdealDenoiser(torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="finite and >= 0"): oracle.sample(2, sigma)


def test_oracles_of_nothing_are_refused():
    nan = torch.full((2, 3), math.nan)
    for make in (lambda: MixtureDenoiser(nan), lambda: MixtureDenoiser(torch.zeros(0, 3)), lambda: MixtureDenoiser(torch.zeros(2, 3), 1., torch.zeros(2)),
                 lambda: MixtureDenoiser(torch.zeros(2, 3), math.nan), lambda: GaussianDenoiser(math.nan, 1.), lambda: GaussianDenoiser(torch.tensor([0., math.inf]), 1.),
                 lambda: GaussianDenoiser(0., math.nan), lambda: GaussianDenoiser(0., 1j), lambda: IdealDenoiser(nan), lambda: IdealDenoiser(torch.zeros(0, 3))):
        with pytest.raises(ValueError): make()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_draws_and_answers_do_not_depend_on_the_default_dtype(default):
    "Everything that draws or computes names its dtype."
    bumps, weights = toy(), torch.tensor([1., 2., 3., 4.])
    def answers():
        g, out = torch.Generator().manual_seed(3), []
        for oracle in (MixtureDenoiser(images(4), 0.1, weights), MixtureDenoiser(images(4), 0.1, [1., 2., 3., 4.]), GaussianDenoiser(images(4)[0], 0.3), IdealDenoiser(images(4)), GaussianDenoiser(0.2, 0.3)):
            x = oracle.sample(3, 0.7, g)
            out += [x, oracle(x if x.ndim > 1 else x[:, None], 0.7), oracle.log_prob(x if x.ndim > 1 else x[:, None], 0.7)]
        return out + [score(bumps, rand(3, 1), 0.3), ode_derivative(bumps, rand(3, 1), 0.3, vp_schedule()), TABLE_1["iddpm"].sigmas(7), F.edm_row().sigmas(7)]
    expected = answers()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try: found = answers()
    finally: torch.set_default_dtype(before)
    for a, b in zip(found, expected): assert a.dtype == b.dtype and torch.equal(a, b)


def test_absurd_counts_are_refused_before_anything_is_allocated():
    for call in (lambda: iddpm_levels(10**10), lambda: iddpm_levels(0), lambda: iddpm_levels(10.), lambda: F.steps(10**9, lambda u: u), lambda: F.steps(True, lambda u: u),
                 lambda: F.iddpm_indices(10**9), lambda: iddpm_levels(10, C_1=0), lambda: iddpm_levels(10, C_1=5.), lambda: iddpm_levels(10, C_2=-1.), lambda: iddpm_levels(10, C_2=math.nan)):
        with pytest.raises(ValueError): call()


def test_a_batch_may_be_dynamic_when_exported():
    "len(x) would turn the batch into a constant: a denoiser and the score export with any B."
    class Net(torch.nn.Module):
        def forward(self, x, sigma): return score(lambda x, sigma: x * broadcast_sigma(1 / (1 + sigma), x), x, sigma)
    B = torch.export.Dim("B", min=2, max=64)
    x, sigma = rand(4, 3, dtype=torch.float32), torch.rand(4) + 0.1
    program = torch.export.export(Net(), (x, sigma), dynamic_shapes=({0: B}, {0: B})).module()
    for b in (2, 7): torch.testing.assert_close(program(rand(b, 3).float(), torch.ones(b)), Net()(rand(b, 3).float(), torch.ones(b)))


# Table 1, recomputed here from the paper's formulas with the math module

S = [0.003, 0.02, 0.5, 1., 7.3, 79.]
BETA = lambda t: 0.5 * 19.9 * t * t + 0.1 * t
EXPECTED = {
    "vp": dict(c_skip=lambda s: 1, c_out=lambda s: -s, c_in=lambda s: 1 / math.sqrt(s * s + 1), weight=lambda s: 1 / s**2,
               c_noise=lambda s: 999 * (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + s * s)) - 0.1) / 19.9),
    "ve": dict(c_skip=lambda s: 1, c_out=lambda s: s, c_in=lambda s: 1, c_noise=lambda s: math.log(s / 2), weight=lambda s: 1 / s**2),
    "iddpm": dict(c_skip=lambda s: 1, c_out=lambda s: -s, c_in=lambda s: 1 / math.sqrt(s * s + 1), weight=lambda s: 1 / s**2),
    "edm": dict(c_skip=lambda s: .25 / (s * s + .25), c_out=lambda s: s * .5 / math.sqrt(s * s + .25), c_in=lambda s: 1 / math.sqrt(s * s + .25),
                c_noise=lambda s: math.log(s) / 4, weight=lambda s: (s * s + .25) / (s * .5)**2)}


@pytest.mark.parametrize("key", EXPECTED)
def test_cells(key):
    for cell, formula in EXPECTED[key].items():
        got = getattr(TABLE_1[key], cell)(torch.tensor(S, dtype=torch.float64))
        assert got.tolist() == pytest.approx([formula(s) for s in S], rel=1e-9), cell
    for value in TABLE_1[key].scalings(0.5): assert value.shape == () and value.dtype == torch.float64
    for value in TABLE_1[key].scalings(torch.rand(2, 3) + 0.1): assert value.shape == (2, 3) and value.dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 18, 256])
def test_time_steps(n):
    r = [i / (n - 1) if n > 1 else 0. for i in range(n)]
    u = iddpm_levels().tolist()
    times = {"vp": [1 + x * (1e-3 - 1) for x in r], "ve": [100.**2 * (0.02**2 / 100.**2)**x for x in r],
             "iddpm": [u[math.floor(8 + (1000 - 1 - 8) * x + 0.5)] for x in r],
             "edm": [(80**(1 / 7) + x * (0.002**(1 / 7) - 80**(1 / 7)))**7 for x in r]}
    sigma_of = {"vp": lambda t: math.sqrt(math.exp(BETA(t)) - 1), "ve": math.sqrt, "iddpm": lambda t: t, "edm": lambda t: t}
    for key, row in TABLE_1.items():
        t, sigma = row.times(n), row.sigmas(n)
        assert t.dtype == sigma.dtype == torch.float64 and t.shape == sigma.shape == (n + 1,) and t[-1] == sigma[-1] == 0
        assert t[:-1].tolist() == pytest.approx(times[key], rel=1e-9) and (sigma.diff() < 0).all()
        assert sigma[:-1].tolist() == pytest.approx([sigma_of[key](x) for x in times[key]], rel=1e-9)
        with pytest.raises(ValueError, match="number of sampling steps"): row.times(0)


def test_iddpm_levels():
    u = iddpm_levels()
    assert u.shape == (1001,) and u[-1] == 0 and (u.diff() < 0).all() and (u[:8] > 81).all()
    assert u[8].item() == pytest.approx(80.2037018, abs=1e-7)                 # in 40 digits: 80.20370184543...
    assert TABLE_1["iddpm"].sigmas(18)[:3].tolist() == pytest.approx([80.20370, 9.68785, 5.06820], abs=5e-6)
    assert (TABLE_1["iddpm"].times(992).diff() < 0).all()                     # every level from j_0 on, once
    with pytest.raises(ValueError, match="992 levels.*n=993 steps would repeat"): TABLE_1["iddpm"].times(993)
    c_noise = TABLE_1["iddpm"].c_noise
    assert c_noise(u[:-1]).tolist() == list(range(999, -1, -1))
    assert c_noise(u[:-1].float()).tolist() == list(range(999, -1, -1))       # float32 levels find their own index
    assert c_noise(torch.tensor([1e9, 1e-9])).tolist() == [999, 0]


def test_training_levels_are_quantile_functions():
    u = torch.tensor([1e-9, 0.25, 0.5, 0.75, 1 - 1e-9], dtype=torch.float64)
    vp = [math.sqrt(math.exp(BETA(1e-5 + x * (1 - 1e-5))) - 1) for x in u.tolist()]
    assert TABLE_1["vp"].training_sigma(u).tolist() == pytest.approx(vp, rel=1e-9)
    assert TABLE_1["ve"].training_sigma(u).tolist() == pytest.approx([0.02 * (100 / 0.02)**x for x in u.tolist()], rel=1e-6)
    levels = iddpm_levels()[:-1]
    assert TABLE_1["iddpm"].training_sigma((torch.arange(1000) + 0.5) / 1000).tolist() == pytest.approx(levels.tolist())
    assert TABLE_1["iddpm"].training_sigma(torch.tensor([0., 1.])).tolist() == pytest.approx([levels[0].item(), levels[-1].item()])
    normal = TABLE_1["edm"].training_sigma((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).log()
    assert normal.mean().item() == pytest.approx(-1.2, abs=1e-9) and normal.std().item() == pytest.approx(1.2, rel=1e-3)


def test_weight_is_the_product_form():
    sigma = torch.logspace(-3, 3, 40, dtype=torch.float64)
    for row in TABLE_1.values(): torch.testing.assert_close(row.weight(sigma) * row.c_out(sigma)**2, torch.ones_like(sigma))


def test_constants():
    assert TABLE_1["vp"].constants == dict(beta_d=19.9, beta_min=0.1, epsilon_s=1e-3, epsilon_t=1e-5, M=1000)
    assert TABLE_1["ve"].constants == dict(sigma_min=0.02, sigma_max=100.)
    assert TABLE_1["iddpm"].constants == dict(M=1000, C_1=0.001, C_2=0.008, j_0=8)
    assert TABLE_1["edm"].constants == dict(sigma_min=0.002, sigma_max=80., rho=7., sigma_data=0.5, P_mean=-1.2, P_std=1.2)
    assert [(r.name, r.solver, r.network) for r in TABLE_1.values()] == [("VP", "Euler", "DDPM++"), ("VE", "Euler", "NCSN++"),
                                                                       ("iDDPM + DDIM", "Euler", "DDPM / ADM"), ("EDM", "Heun", "any")]
    for row in TABLE_1.values():
        assert isinstance(row.schedule, Schedule)
        for t in (0.01, 0.5, 1.): assert row.sigma(t) == row.schedule.sigma(t) and row.scale(t) == row.schedule.scale(t)


def test_vp_range():
    sigma = TABLE_1["vp"].sigmas(10)
    assert sigma[0].item() == pytest.approx(152.167, abs=1e-3) and sigma[-2].item() == pytest.approx(math.sqrt(math.exp(BETA(1e-3)) - 1))


@pytest.mark.parametrize("cell", ["c_skip", "c_out", "c_in", "c_noise", "weight"])
def test_one_wrong_constant_is_seen(cell):
    "Rows made with another constant differ, so the cells do use their constants."
    s, other = torch.tensor(S, dtype=torch.float64), F.edm_row(sigma_data=0.51)
    changed = (getattr(other, cell)(s) - getattr(TABLE_1["edm"], cell)(s)).abs().max()
    assert changed > 1e-3 if cell != "c_noise" else changed == 0


# Special cases, written as their papers have them

def euler(denoise, x, times, schedule):
    for t, t_next in zip(times[:-1], times[1:]): x = x + (t_next - t) * ode_derivative(denoise, x, t, schedule)
    return x


def test_song_vp_and_ve_and_ddim_are_euler():
    denoise, noise = MixtureDenoiser(rand(6, 3)), rand(5, 3, seed=2)
    t = torch.cat([torch.linspace(1, 1e-3, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = noise
    for a, b in zip(t[:-1], t[1:]):
        mean_coeff = torch.exp(-0.25 * a**2 * 19.9 - 0.5 * a * 0.1)          # Song et al.'s marginal mean and std
        std = torch.sqrt(1 - mean_coeff**2)
        vp_score = (mean_coeff * denoise(x / mean_coeff, std / mean_coeff) - x) / std**2
        x = x - (b - a) * 0.5 * (0.1 + 19.9 * a) * (x + vp_score)
    assert (x - euler(denoise, noise, t, vp_schedule())).abs().max() < 1e-6
    levels = torch.cat([torch.logspace(2, -2, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = 100 * noise
    for a, b in zip(levels[:-1], levels[1:]): x = x + 0.5 * (a**2 - b**2) * score(denoise, x, a)
    assert (x - euler(denoise, 100 * noise, levels**2, VE)).abs().max() < 1e-6
    bars = torch.cos(torch.linspace(0.97, 0, 12, dtype=torch.float64) * math.pi / 2)**2
    x = noise
    for a, b in zip(bars[:-1], bars[1:]):
        y = denoise(x / a.sqrt(), ((1 - a) / a).sqrt())
        epsilon = (x - a.sqrt() * y) / (1 - a).sqrt()
        x = b.sqrt() * y + (1 - b).sqrt() * epsilon
    assert (x - euler(denoise, noise / bars[0].sqrt(), ((1 - bars) / bars).sqrt(), LINEAR)).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_ideal_denoiser_on_cuda_even_with_tf32():
    Y = images(5000, (3, 32, 32))
    x = Y[:8].double() + 3 * rand(8, 3, 32, 32)
    truth = IdealDenoiser(Y)(x, 3.)
    for tf32 in (False, True):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            for sigma in SIGMAS: assert IdealDenoiser(Y.cuda())(x.cuda(), sigma).dtype == torch.float64
            assert (IdealDenoiser(Y.cuda())(x.cuda(), 3.).cpu() - truth).abs().max() < 1e-6
        finally: torch.backends.cuda.matmul.allow_tf32 = before
