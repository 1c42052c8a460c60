"Guidance and posterior sampling: formulas by hand, closed forms of Gaussians and mixtures, and what is refused."
import math

import pytest
import torch
from torch import nn

from edm_nb import guidance as T
from edm_nb.framework import GaussianDenoiser, LINEAR, MixtureDenoiser, vp_schedule
from edm_nb.ode_solvers import dpmpp_2m, edm_sigmas, euler, sample_ode, vp_sigmas
from edm_nb.preconditioning import Preconditioned
from edm_nb.stochastic import Churn, sample, sample_sde, song_beta


def gen(seed=0): return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


# --- guidance -----------------------------------------------------------------------------------------------------

def test_guidance_with_weight_zero_is_the_conditional_model_exactly():
    cond = lambda x, sigma, **_: x * 0.3
    def uncond(x, sigma, **_): raise AssertionError("must not be evaluated")
    x = torch.randn(4, 1, 3, 3, generator=gen())
    assert torch.equal(T.guided(cond, uncond, 0.0)(x, 1.0), cond(x, 1.0))


def test_guidance_formula_interval_and_both_heun_stages():
    calls = []
    cond = lambda x, sigma, **_: 0.5 * x
    def uncond(x, sigma, **_): calls.append(float(sigma)); return 0.2 * x
    x, w = torch.randn(4, 1, 3, 3, generator=gen()), 1.5
    torch.testing.assert_close(T.guided(cond, uncond, w)(x, torch.tensor(1.0)), (0.5 + w*0.3) * x)
    limited = T.guided(cond, uncond, w, sigma_min=0.5, sigma_max=2.0)
    torch.testing.assert_close(limited(x, 3.0), 0.5 * x)
    sigma = torch.tensor([0.1, 1.0, 3.0, 2.0])
    out = T.guided(cond, lambda x, s, **_: 0.2*x, w, 0.5, 2.0)(x, sigma)
    torch.testing.assert_close(out, x * torch.tensor([0.5, 0.95, 0.5, 0.95])[:, None, None, None])
    calls.clear()
    from edm_nb.ode_solvers import edm_sigmas, sample_ode
    sample_ode(T.guided(cond, uncond, w), x, edm_sigmas(4))
    assert len(calls) == 2*4 - 1          # every evaluation of every Heun step


def test_without_labels_hides_the_class_only():
    seen = {}
    def denoise(x, sigma, class_labels=None, **more): seen.update(more, class_labels=class_labels); return x
    T.without_labels(denoise)(torch.zeros(1), 1.0, class_labels=torch.ones(1, 3), augment_labels=1)
    assert seen == {"class_labels": None, "augment_labels": 1}


class Labelled(nn.Module):
    "A network that says whether it takes labels, and refuses them if not."
    def __init__(self, label_dim): super().__init__(); self.label_dim = label_dim; self.seen = []
    def forward(self, x, c_noise, class_labels=None):
        self.seen.append(class_labels)
        return 0.5 * x


def test_a_network_without_labels_is_not_told_any():
    cond, guide = Preconditioned(Labelled(3)), Preconditioned(Labelled(0))
    x, labels = torch.randn(2, 1, 4, 4, generator=gen()), torch.eye(3)[:2]
    D = T.guided(cond, guide, 1.5)(x, 1.0, class_labels=labels)
    plain = Preconditioned(Labelled(0))(x, 1.0)
    torch.testing.assert_close(D, 2.5*cond(x, 1.0, class_labels=labels) - 1.5*plain)
    assert guide.net.seen == [None] and cond.net.seen[0] is not None


def test_guidance_refuses_what_is_no_strength_and_no_interval():
    D = lambda x, sigma, **_: x
    for w in (math.nan, math.inf):
        with pytest.raises(ValueError, match="w must be a finite number"): T.guided(D, D, w)
    with pytest.raises(ValueError, match="sigma_min <= sigma_max"): T.guided(D, D, 1.0, 2.0, 1.0)


def test_guided_variance_of_two_gaussians_by_hand():
    "The guided ODE between N(0, v) and N(0, V) integrates to v (v/V)^w; in an interval to v (r_lo/r_hi)^w."
    v, V = 0.3, 1.2
    pair = [GaussianDenoiser(torch.zeros(1, dtype=torch.float64), math.sqrt(var)) for var in (v, V)]
    one, levels = torch.ones(1, 1, dtype=torch.float64), edm_sigmas(300, 1e-4, 1000.0)
    for w in (-0.5, 0.0, 2.0):
        assert sample_ode(T.guided(*pair, w), one, levels).item()**2 == pytest.approx(v*(v/V)**w, rel=0.01)
    r = lambda s: (v + s*s)/(V + s*s)
    levels = torch.cat([edm_sigmas(200, 3.0, 1000.)[:-1], edm_sigmas(200, 0.4, 2.9999)[:-1], edm_sigmas(200, 1e-4, 0.3999)])
    assert sample_ode(T.guided(*pair, 2.0, 0.4, 2.9999), one, levels).item()**2 == pytest.approx(v*(r(0.4)/r(3.0))**2, rel=0.01)


# --- the exact posterior of a mixture -----------------------------------------------------------------------------

def test_posterior_of_a_mixture_by_brute_force():
    "Weighted prior samples have its moments; components differ in width and weight."
    prior = MixtureDenoiser(normal(4, 3), torch.tensor([0.3, 0.5, 0.7, 0.4]), torch.tensor([1., 2., 3., 1.]))
    A, y, std = normal(2, 3, seed=1), torch.tensor([0.3, -0.2]).double(), 0.4
    x = prior.sample(400_000, generator=gen(2))
    weight = (-0.5*((y - x @ A.T)/std)**2).sum(1, keepdim=True).exp()
    weight = weight/weight.sum()
    mean = (weight*x).sum(0)
    cov = ((x - mean)*weight).T @ (x - mean)
    found = T.MixturePosterior(prior, A, y, std)
    torch.testing.assert_close(found.mean()[0], mean, atol=0.01, rtol=0)
    torch.testing.assert_close(found.cov()[0], cov, atol=0.01, rtol=0)
    drawn = found.sample(100_000, gen(3))
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.015, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), cov, atol=0.015, rtol=0)


def test_posterior_mean_with_an_identity_is_the_mixtures_denoiser_exactly():
    "x + noise is a measurement of all coordinates: E[x | y] is D."
    prior = MixtureDenoiser(normal(5, 3), torch.tensor([0.3, 0.5, 0.7, 0.4, 0.6]))
    y = normal(7, 3, seed=1)
    torch.testing.assert_close(T.MixturePosterior(prior, torch.eye(3).double(), y, 0.8).mean(), prior(y, 0.8))


def test_energy_distance_by_hand():
    a, b = torch.tensor([[0.], [2.]]).double(), torch.tensor([[1.]]).double()
    assert T.energy_distance(a, b) == pytest.approx(2*1 - 1 - 0)
    assert T.energy_distance(a, a) == pytest.approx(0)


# --- the solver ---------------------------------------------------------------------------------------------------

def test_solve_is_exact_after_m_steps_and_its_residual_never_grows():
    M, b = normal(6, 5, 5), normal(6, 5, seed=1)
    apply = lambda u: (M @ u.unsqueeze(2)).squeeze(2)
    left = torch.stack([(b - apply(T.solve(apply, b, k))).norm(dim=1) for k in range(6)])
    assert (left[1:] <= left[:-1]*(1 + 1e-9)).all()
    torch.testing.assert_close(T.solve(apply, b, 5), torch.linalg.solve(M, b), atol=1e-5, rtol=1e-5)
    zero = torch.zeros(2, 5).double()
    assert torch.equal(T.solve(apply, torch.zeros_like(b), 5), torch.zeros_like(b)) and not T.solve(lambda u: 0*u, zero + 1, 3).isnan().any()


# --- posterior denoisers ------------------------------------------------------------------------------------------

class Coloured:
    "Exact D of N(0, Σ)."
    def __init__(self, cov): self.cov = cov
    def __call__(self, x, sigma, **cond):
        level = torch.as_tensor(sigma).to(x)**2
        return torch.linalg.solve(self.cov + level*torch.eye(len(self.cov)).to(x), x.T).T @ self.cov


def by_hand(cov, A, y, std, x, sigma):
    "E[clean | x, y] of N(0, Σ) from precisions: none of the formulas under test."
    eye = torch.eye(len(cov)).to(cov)
    precision = torch.linalg.inv(cov) + eye/sigma**2 + A.T @ A/std**2
    return torch.linalg.solve(precision, (x/sigma**2 + y @ A/std**2).T).T


@pytest.mark.parametrize("sigma", [0.01, 0.5, 4.0, 60.0])
def test_moment_matching_is_exact_on_any_gaussian(sigma):
    root = normal(5, 5)
    cov = root @ root.T/5 + 0.02*torch.eye(5)
    A, y, x = normal(3, 5, seed=1), normal(4, 3, seed=2), sigma*normal(4, 5, seed=3)
    D = T.posterior(Coloured(cov), A, y, 0.2, "mmps", iterations=3)(x, sigma)
    torch.testing.assert_close(D, by_hand(cov, A, y, 0.2, x, sigma), atol=1e-6, rtol=1e-6)
    other = T.posterior(Coloured(cov), A, y, 0.2, "pgdm", sigma_data=1.0)(x, sigma)
    if 0.1 < sigma < 10: assert (other - D).abs().max() > 0.01


@pytest.mark.parametrize("method", ["pgdm", "replace", "mmps"])
def test_white_data_are_exact(method):
    cov, A, y = 0.49*torch.eye(5).double(), normal(3, 5, seed=1), normal(3, seed=2)
    for sigma in (0.05, 0.7, 20.0):
        x = sigma*normal(4, 5, seed=3)
        D = T.posterior(GaussianDenoiser(torch.zeros(5).double(), 0.7), A, y, 0.2, method, sigma_data=0.7)(x, sigma)
        torch.testing.assert_close(D, by_hand(cov, A, y, 0.2, x, sigma), atol=1e-6, rtol=1e-6)


def test_dps_by_hand():
    "D = k x of white data, so J = k: σ² k Aᵀ r / v, v the mean square of r between σ_y² and σ_y² + σ² |Aᵀr|²/|r|²."
    A, y, x = normal(2, 3, seed=1), normal(2, seed=2), normal(4, 3, seed=3)
    for sigma, std in ((0.8, 0.01), (0.8, 5.0), (0.05, 0.1)):
        k = 0.25/(0.25 + sigma**2)
        r = y - k*x @ A.T
        v = []
        for row in r.tolist():
            back = [sum(row[i]*A[i, j].item() for i in range(2)) for j in range(3)]
            square = sum(value**2 for value in row)
            v.append(max(std**2, min(square/2, std**2 + sigma**2*sum(b*b for b in back)/square)))
        D = T.posterior(GaussianDenoiser(torch.zeros(3).double(), 0.5), A, y, std, "dps")(x, sigma)
        step = sigma**2*k*(r/torch.tensor(v)[:, None].double()) @ A
        step = step/((step @ A.T).norm(dim=1, keepdim=True)/r.norm(dim=1, keepdim=True)).clamp(min=1)
        torch.testing.assert_close(D, k*x + step)


@pytest.mark.parametrize("method", list(T.METHODS))
def test_no_correction_goes_beyond_the_measurement(method):
    "A derivative that is a thousand times too large moves A D at most by the residual."
    wild = lambda x, sigma: x/2 + (1000*x).sin()
    A, y, x = normal(3, 6, seed=1), normal(3, seed=2), normal(4, 6, seed=3)
    D = wild(x, 2.0)
    moved = (T.posterior(wild, A, y, 0.1, method)(x, 2.0) - D) @ A.T
    assert (moved.norm(dim=1) <= (y - D @ A.T).norm(dim=1)*(1 + 1e-9)).all() and moved.norm() > 0


def test_samples_have_the_exact_mean_and_covariance():
    "Through two samplers, with several levels in one batch: moments of 4,000 samples within five standard errors."
    root = normal(4, 4)
    cov = root @ root.T/4 + 0.05*torch.eye(4)
    A, y, std, n = normal(2, 4, seed=1), torch.tensor([0.5, -1.0]).double(), 0.3, 4000
    gain = cov @ A.T @ torch.linalg.inv(A @ cov @ A.T + std**2*torch.eye(2))
    mean, left = gain @ y, cov - gain @ A @ cov
    denoise = T.posterior(Coloured(cov), A, y, std, iterations=2)
    source = gen(5)
    for x in (sample_ode(denoise, normal(n, 4, seed=4), edm_sigmas(40)),
              sample(denoise, normal(n, 4, seed=4), edm_sigmas(40), Churn(20), lambda like: torch.randn(like.shape, generator=source, dtype=like.dtype))):
        assert ((x.mean(0) - mean).abs() < 5*(left.diagonal()/n).sqrt() + 0.01).all()
        assert ((torch.cov(x.T) - left).abs() < 0.1*left.diagonal().max()).all()


def test_replacement_puts_measured_pixels_in_their_place():
    keep = torch.tensor([True, False, True, False])
    A, y, x = torch.eye(4).double()[keep], normal(3, 2, seed=1), normal(3, 4)
    prior = GaussianDenoiser(torch.zeros(4).double(), 0.5)
    D = T.posterior(prior, A, y, 0.0, "replace")(x, 0.5)
    torch.testing.assert_close(D[:, keep], y)
    torch.testing.assert_close(D[:, ~keep], prior(x, 0.5)[:, ~keep])


@pytest.mark.parametrize("method", list(T.METHODS))
def test_matrix_and_pair_levels_of_a_batch_and_precision(method):
    "A pair is the matrix; a batch with its own levels is its rows; float32 networks under no_grad and inference mode serve."
    prior = MixtureDenoiser(normal(3, 1, 2, 2), 0.4)
    M, y, x = normal(2, 4, seed=1), normal(3, 2, seed=2), normal(3, 1, 2, 2, seed=3)
    pair = (lambda v: v.flatten(1) @ M.to(v).T, lambda u: (u @ M.to(u)).reshape(-1, 1, 2, 2))
    sigma = torch.tensor([0.1, 1.0, 10.0]).double()
    D = T.posterior(prior, M, y, 0.1, method)(x, sigma)
    torch.testing.assert_close(T.posterior(prior, pair, y, 0.1, method)(x, sigma), D)
    rows = torch.cat([T.posterior(prior, M, y[k], 0.1, method)(x[k:k+1], float(sigma[k])) for k in range(3)])
    torch.testing.assert_close(rows, D)
    low = lambda x, sigma, **cond: prior(x.float(), sigma)
    with torch.no_grad(): D32 = T.posterior(low, M, y, 0.1, method)(x, sigma)
    assert D32.dtype == torch.float64 and not D32.requires_grad
    torch.testing.assert_close(D32, D, atol=1e-3, rtol=1e-3)
    with torch.inference_mode(): torch.testing.assert_close(T.posterior(prior, M, y, 0.1, method)(x + 0, sigma + 0).clone(), D)


@pytest.mark.parametrize("method", list(T.METHODS))
def test_measurements_without_noise_twice_over_or_of_nothing(method):
    "A Aᵀ may be singular and σ_y zero, in float32 as well; every sampler and schedule runs it."
    prior, levels = MixtureDenoiser(normal(5, 4), 0.4), edm_sigmas(4)
    once = torch.eye(4).double()[:2]
    for M, y in ((torch.cat([once, once]), torch.tensor([0.3, -0.2]*2).double()), (0*once, torch.tensor([0.3, -0.2]).double())):
        for dtype in (torch.float64, torch.float32):
            x = sample_ode(T.posterior(prior, M, y, 0.0, method), normal(20, 4, seed=1), levels, dtype=dtype)
            assert x.dtype == dtype and x.isfinite().all()
            if M.any(): assert (x[:, :2] - y[:2]).abs().max() < 0.02
    denoise = T.posterior(prior, once, y, 0.1, method)
    sample_sde(denoise, normal(20, 4), edm_sigmas(6), song_beta())
    for solver, schedule in ((euler, vp_schedule()), (dpmpp_2m, LINEAR)): sample_ode(denoise, normal(20, 4), vp_sigmas(3), schedule, solver)
    assert denoise(torch.zeros(0, 4).double(), 1.0).shape == (0, 4)


def test_the_denoiser_says_what_white_is():
    net = Preconditioned(Labelled(0), sigma_data=0.3)
    A, y, x = normal(2, 4, seed=1), normal(2, seed=2), normal(1, 1, 2, 2)
    ours, told, one = (T.posterior(net, A, y, 0.1, "pgdm", sigma_data=s)(x, 0.5) for s in (None, 0.3, 1.0))
    assert torch.equal(ours, told) and (ours - one).abs().max() > 1e-3


A, Y = torch.eye(4)[:2], torch.zeros(2)
PAIR = (lambda x: x.flatten(1)[:, :2], lambda u: torch.cat([u, 0*u], 1))


@pytest.mark.parametrize("given, words", [
    (dict(method="ddrm"), "method must be one of mmps, pgdm, dps, replace"),
    (dict(noise_std=-1.0), "noise_std must be a finite number >= 0"), (dict(noise_std=math.nan), "noise_std"), (dict(noise_std="0.1"), "noise_std"),
    (dict(y=torch.zeros(3)), r"A must be \[m, d\] with the m = 3 of y"), (dict(y=torch.zeros(1, 2, 1)), "y must be"), (dict(y=torch.zeros(2).long()), "floating-point"),
    (dict(y=torch.tensor([1.0, math.inf])), "y must be finite"), (dict(A=torch.full((2, 4), math.nan)), "A must be finite"), (dict(A=torch.ones(2, 4).long()), "floating-point"),
    (dict(A=lambda x: x), "a pair"), (dict(sigma_data=0.0), "sigma_data must be finite and positive"), (dict(iterations=0), "iterations"),
])
def test_what_cannot_be_a_measurement_is_refused_at_once(given, words):
    usual = dict(A=A, y=Y, noise_std=0.1)
    with pytest.raises(ValueError, match=words): T.posterior(lambda x, sigma: x, **usual | given)


@pytest.mark.parametrize("A, y, x, words", [
    (A, Y, torch.zeros(1, 5), "d = 5"), (A, torch.zeros(3, 2), torch.zeros(2, 4), r"y must be \[2, m\]"),
    ((PAIR[0], lambda u: 2*PAIR[1](u)), Y, torch.zeros(1, 4), "not the adjoint"), ((lambda x: PAIR[0](x) + 1, PAIR[1]), Y, torch.zeros(1, 4), "without an offset"),
    ((lambda x: x, PAIR[1]), Y, torch.zeros(1, 4), "functions between"),
])
def test_shapes_that_do_not_meet_and_wrong_adjoints_are_refused(A, y, x, words):
    with pytest.raises(ValueError, match=words): T.posterior(GaussianDenoiser(0.0, 1.0), A, y, 0.1)(x, 1.0)


def test_a_denoiser_without_gradient_is_named():
    @torch.no_grad()
    def blind(x, sigma): return x/2
    for method in ("mmps", "pgdm", "dps"):
        with pytest.raises(ValueError, match="cannot be differentiated"): T.posterior(blind, A, Y, 0.1, method)(torch.zeros(1, 4), 1.0)
    T.posterior(blind, A, Y, 0.1, "replace")(torch.zeros(1, 4), 1.0)
    with pytest.raises(ValueError, match="sigma must be"): T.posterior(blind, A, Y, 0.1, "replace")(torch.zeros(1, 4), 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", list(T.METHODS))
def test_a_gpu_gives_what_the_cpu_gives(method):
    "A, y and noise may lie on the host."
    prior, host = MixtureDenoiser(normal(3, 4), 0.4), normal(5, 4, seed=3)
    on_gpu = MixtureDenoiser(normal(3, 4).cuda(), 0.4)
    M, y = normal(2, 4, seed=1), normal(2, seed=2)
    ours = sample_ode(T.posterior(on_gpu, M, y, 0.1, method), host.cuda(), edm_sigmas(6))
    torch.testing.assert_close(ours.cpu(), sample_ode(T.posterior(prior, M, y, 0.1, method), host, edm_sigmas(6)), atol=1e-8, rtol=1e-8)
