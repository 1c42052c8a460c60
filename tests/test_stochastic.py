"""Chapter 02: Algorithm 2, the SDE family and the Langevin loop against exact answers. No data, no training."""
import importlib.util
import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edm_nb.data import one_hot
from edm_nb.framework import LINEAR, VE, GaussianDenoiser, MixtureDenoiser, ode_derivative, score, vp_schedule
from edm_nb.ode_solvers import Flow, edm_sigmas, euler, heun, iddpm_sigmas, multistep, rk2, sample_ode
from edm_nb.stochastic import (
    add_churn, BEST_CHURN, Churn, churn_gammas, collect, langevin, langevin_states,
    MAX_GAMMA, round_levels, sample, sample_sde, sample_states, sde_coefficients,
    sde_states, song_beta
)
from edm_nb.randomness import check_seeds, fill_noise, IndexStream, SeededNoise, stream_seed

SCHEDULES = {"linear": LINEAR, "ve": VE, "vp": vp_schedule()}
SOLVERS = {"euler": euler, "heun": heun, "midpoint": rk2(0.5), "multistep": multistep(3)}
MU, C = 0.3, 0.5
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def gaussian(d=3):
    return GaussianDenoiser(torch.full((d,), MU, dtype=torch.float64), C)


def mixture():
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.2]], dtype=torch.float64)
    return MixtureDenoiser(means, torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def forbidden(x):
    raise AssertionError("a random number was drawn")


def recording(denoise, calls):
    def wrapped(x, sigma, **cond):
        calls.append((x.clone(), float(sigma), cond))
        return denoise(x, sigma)
    return wrapped


# ---------------------------------------------------------------- no churn

@every_schedule
@every_solver
def test_no_churn_is_sample_ode_bit_for_bit_and_draws_nothing(schedule, solver):
    noise, sigmas = normal(16, 2), edm_sigmas(9)
    expected = sample_ode(mixture(), noise, sigmas, schedule, solver)
    before = torch.get_rng_state()
    for churn in (Churn(), Churn(S_noise=1.01), Churn(40, 100, 200), Churn(40, 0.0, 0.001)):
        assert torch.equal(sample(mixture(), noise, sigmas, churn, forbidden, schedule, solver), expected)
    assert torch.equal(sample(mixture(), noise, sigmas, schedule=schedule, solver=solver), expected)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- gamma

def test_gamma_is_the_smaller_of_the_two_and_zero_outside():
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.1, 0.01, 0.0], dtype=torch.float64)
    assert churn_gammas(sigmas, Churn(1.0)) == [0.2]*5                      # S_churn / N
    assert churn_gammas(sigmas, Churn(1000.0)) == [math.sqrt(2) - 1]*5      # the cap
    assert churn_gammas(sigmas, Churn(math.inf)) == [MAX_GAMMA]*5
    assert churn_gammas(sigmas, Churn(1.0, 0.1, 10.0)) == [0, 0.2, 0.2, 0.2, 0]   # both ends belong to the range
    assert churn_gammas(sigmas, Churn(0.0)) == [0.0]*5
    assert MAX_GAMMA == pytest.approx(0.41421356237, abs=1e-11)


@pytest.mark.parametrize("levels", [[], [1.0]])
def test_churn_needs_a_step_to_be_spread_over(levels):
    with pytest.raises(ValueError, match=f"at least two levels, got {len(levels)}"): churn_gammas(torch.tensor(levels), Churn(30))


def test_one_draw_per_churned_step():
    sigmas, draws = edm_sigmas(12), []
    def counting(x):
        draws.append(1)
        return torch.randn_like(x)
    sample(gaussian(), normal(4, 3), sigmas, Churn(5, 0.05, 10), counting)
    assert len(draws) == int(((sigmas >= 0.05) & (sigmas <= 10)).sum()) > 0


# ---------------------------------------------------------------- Algorithm 2 in plain floats

def plain_algorithm_2(D, x, sigmas, S_churn, S_tmin, S_tmax, S_noise, eps):
    "Algorithm 2 for one number, written out with `math` only."
    n, eps, x = len(sigmas) - 1, iter(eps), x * sigmas[0]
    for t, t_next in itertools.pairwise(sigmas):
        gamma = min(S_churn/n, math.sqrt(2) - 1) if S_tmin <= t <= S_tmax else 0.0
        t_hat = t + gamma*t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * S_noise * next(eps) if gamma > 0 else x
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            d_next = (x - D(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d + d_next) / 2
    return x


@pytest.mark.parametrize("settings", [(3.0, 0.0, math.inf, 1.0), (3.0, 0.0, math.inf, 1.3), (100.0, 0.05, 20.0, 1.007),
                                      (0.5, 0.05, 1.0, 0.9), (0.0, 0.0, math.inf, 1.0)])
def test_sample_equals_algorithm_2_written_out(settings):
    sigmas, eps = edm_sigmas(7), normal(7, 1, 1, seed=3)
    used = iter(eps)
    got = sample(gaussian(1), normal(1, 1), sigmas, Churn(*settings), lambda x: next(used))
    D = lambda x, s: (C**2*x + s**2*MU) / (C**2 + s**2)
    expected = plain_algorithm_2(D, normal(1, 1).item(), sigmas.tolist(), *settings, eps.flatten().tolist())
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@every_schedule
def test_denoiser_is_called_at_x_hat_and_t_hat(schedule):
    sigmas, calls, S_noise = edm_sigmas(6, 0.01, 10.0), [], 1.1
    eps = normal(6, 5, 3, seed=1)
    used = iter(eps)
    states = list(sample_states(recording(gaussian(), calls), normal(5, 3), sigmas, Churn(1.2, S_noise=S_noise),
                                lambda x: next(used), schedule, euler))
    scale = schedule.scale(schedule.sigma_inv(sigmas[:-1]))
    for i, (x_in, sigma_in, _) in enumerate(calls):
        sigma, sigma_hat = float(sigmas[i]), float(sigmas[i])*1.2
        assert sigma_in == pytest.approx(sigma_hat, rel=1e-9)
        expected = states[i]/scale[i] + math.sqrt(sigma_hat**2 - sigma**2)*S_noise*eps[i]   # what D gets is unscaled
        torch.testing.assert_close(x_in, expected, rtol=1e-8, atol=1e-9)
    assert len(calls) == 6


@every_schedule
def test_added_variance_is_exactly_what_is_missing(schedule):
    flow, t = Flow(gaussian(), schedule), float(schedule.sigma_inv(torch.tensor(2.0, dtype=torch.float64)))
    x = normal(4, 3)
    x_hat, t_hat = add_churn(flow, x, t, 0.3, randn_like=torch.ones_like)
    sigma, s, s_hat = flow.at(t)[0], flow.at(t)[2], flow.at(t_hat)[2]
    torch.testing.assert_close((x_hat/s_hat - x/s)**2, torch.full_like(x, flow.at(t_hat)[0]**2 - sigma**2), rtol=1e-8, atol=0)
    assert flow.at(t_hat)[0] == pytest.approx(1.3*sigma, rel=1e-9)
    doubled, _ = add_churn(flow, x, t, 0.3, S_noise=2.0, randn_like=torch.ones_like)   # S_noise scales the noise alone
    torch.testing.assert_close(doubled/s_hat - x/s, 2*(x_hat/s_hat - x/s), rtol=1e-9, atol=1e-12)
    assert add_churn(flow, x, t, 0.0, randn_like=forbidden)[0] is x


def test_added_noise_is_fresh_normal_noise():
    x = torch.zeros(200, 1000, dtype=torch.float64)
    x_hat, _ = add_churn(Flow(gaussian(1000)), x, 2.0, MAX_GAMMA, randn_like=SeededNoise(range(200)).randn_like)
    n = x.numel()                                                       # variance 2σ² - σ² = σ² = 4
    assert x_hat.mean().abs() < 5*2/math.sqrt(n)
    assert abs(x_hat.var().item() - 4.0) < 5*4*math.sqrt(2/n)
    assert abs((x_hat**4).mean().item()/16 - 3) < 5*math.sqrt(96/n)      # fourth moment of a normal


def variance_after(sigmas, churn):
    "Variance of Algorithm 2's output on a Gaussian: each Euler step is linear, so this is a recursion, not a simulation."
    v = float(sigmas[0])**2
    for t, t_next, gamma in zip(sigmas.tolist(), sigmas[1:].tolist(), churn_gammas(sigmas, churn)):
        t_hat = t*(1 + gamma)
        v += (t_hat**2 - t**2) * churn.S_noise**2
        v *= (1 + (t_next - t_hat)*t_hat / (C**2 + t_hat**2))**2
    return v


@pytest.mark.parametrize("S_noise", [1.0, 1.05])
def test_output_variance_follows_the_exact_recursion(S_noise):
    sigmas, churn, n = edm_sigmas(16), Churn(6, 0.01, 10, S_noise), 100_000
    images = sample(gaussian(1), normal(n, 1, seed=5), sigmas, churn, SeededRows(7).randn_like, solver=euler)
    expected = variance_after(sigmas, churn)
    assert abs(images.var().item()/expected - 1) < 5*math.sqrt(2/n)
    assert abs(variance_after(sigmas, Churn(6, 0.01, 10, 1.05))/variance_after(sigmas, Churn(6, 0.01, 10)) - 1) > 5*math.sqrt(2/n)


class SeededRows:
    "One generator for a whole batch: a plain `randn_like` with a seed."
    def __init__(self, seed): self.generator = torch.Generator().manual_seed(seed)
    def randn_like(self, x): return torch.randn(x.shape, dtype=x.dtype, generator=self.generator)


def test_multistep_forgets_slopes_from_before_the_noise():
    args = (mixture(), normal(8, 2), edm_sigmas(9), Churn(3))
    torch.testing.assert_close(sample(*args, SeededRows(0).randn_like, solver=multistep(3)),
                               sample(*args, SeededRows(0).randn_like, solver=euler), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- a network that knows certain levels only

def plain_levels(M=1000, C_1=0.001, C_2=0.008):
    "iDDPM's u_0 > ... > u_M = 0 by the published recursion, with `math` only."
    alpha_bar = [math.sin(math.pi/2 * j/(M*(C_2 + 1)))**2 for j in range(M + 1)]
    u = [0.0]*(M + 1)
    for j in range(M, 0, -1): u[j-1] = math.sqrt((u[j]**2 + 1) / max(alpha_bar[j-1]/alpha_bar[j], C_1) - 1)
    return u


KNOWN = plain_levels()


def nearest(sigma):
    return torch.tensor(min(KNOWN, key=lambda u: abs(u - float(sigma))), dtype=torch.float64)


def plain_algorithm_2_on_levels(D, x, sigmas, S_churn, S_noise, eps):
    "Algorithm 2 for one number and a network that knows the levels KNOWN: steps are rounded first, then every raised level."
    steps = [min(KNOWN, key=lambda u: abs(u - s)) if s > 0 else 0.0 for s in sigmas]
    n, eps, x = len(steps) - 1, iter(eps), x * steps[0]
    for t, t_next in itertools.pairwise(steps):
        gamma = min(S_churn/n, math.sqrt(2) - 1)
        t_hat = min(KNOWN, key=lambda u: abs(u - (t + gamma*t)))
        if t_hat > t: x = x + math.sqrt(t_hat**2 - t**2) * S_noise * next(eps)
        d = (x - D(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next > 0: x_next = x + (t_next - t_hat) * (d + (x_next - D(x_next, t_next)) / t_next) / 2
        x = x_next
    return x


@pytest.mark.parametrize("S_churn, S_noise", [(0.0, 1.0), (4.0, 1.0), (4.0, 1.2), (40.0, 1.0)])
@pytest.mark.parametrize("levels", [edm_sigmas(18, 0.01, 60.0), edm_sigmas(6, 0.01), iddpm_sigmas(18)], ids=["edm18", "edm6", "u_j"])
def test_algorithm_2_with_rounding_equals_the_loop_written_out_for_levels_that_are_not_u_j(levels, S_churn, S_noise):
    eps, seen = normal(20, 1, 1, seed=4), []
    used = iter(eps)
    D = lambda x, s: (C**2*x + s**2*MU) / (C**2 + s**2)
    got = sample(recording(gaussian(1), seen), normal(1, 1), levels, Churn(S_churn, S_noise=S_noise), lambda x: next(used), round_sigma=nearest)
    expected = plain_algorithm_2_on_levels(D, normal(1, 1).item(), levels.tolist(), S_churn, S_noise, eps.flatten().tolist())
    assert got.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    assert max(min(abs(s - u) for u in KNOWN)/s for _, s, _ in seen) < 1e-12      # the network is only asked at its levels


@every_solver
def test_gamma_0_draws_nothing_whatever_is_rounded(solver):
    "Rounding a level up is no churn: the result is the ODE's on the rounded levels, bit for bit."
    noise = normal(4, 3)
    for levels in (edm_sigmas(18, 0.01, 60.0), edm_sigmas(6, 0.01), iddpm_sigmas(18)):
        rounded = round_levels(levels, nearest)
        expected = sample_ode(gaussian(), noise, rounded, solver=solver)
        for churn in (Churn(), Churn(40, 1000, 2000), Churn(S_noise=1.1)):
            assert torch.equal(sample(gaussian(), noise, levels, churn, forbidden, solver=solver, round_sigma=nearest), expected)
    flow, x = Flow(gaussian()), normal(4, 3)
    assert add_churn(flow, x, 2.0, 0.0, randn_like=forbidden, round_sigma=lambda s: s + 0.5) == (x, 2.0)


def test_gamma_is_rounded_after_the_climb_and_added_variance_follows_it():
    flow = Flow(gaussian())
    x_hat, t_hat = add_churn(flow, torch.zeros(1, 3, dtype=torch.float64), 2.0, 0.1, randn_like=torch.ones_like, round_sigma=lambda s: s + 0.5)
    assert t_hat == pytest.approx(2.7) and x_hat[0, 0].item() == pytest.approx(math.sqrt(2.7**2 - 4))
    assert add_churn(flow, x_hat, 2.0, 0.1, randn_like=forbidden, round_sigma=lambda s: s - 1)[1] == 2.0   # never below sigma
    for gamma in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma"): add_churn(flow, x_hat, 2.0, gamma)


def test_levels_that_round_to_the_same_one_are_one_step():
    coarse = lambda sigma: torch.round(sigma)
    levels = torch.tensor([3.4, 3.1, 2.6, 1.2, 0.2, 0.0])
    with pytest.warns(UserWarning, match="6 noise levels round to 3 .* 2 steps are taken, not 5"):
        assert round_levels(levels, coarse).tolist() == [3.0, 1.0, 0.0]
    with pytest.warns(UserWarning): out = sample(gaussian(), normal(2, 3), levels, round_sigma=coarse)
    assert torch.equal(out, sample_ode(gaussian(), normal(2, 3), torch.tensor([3.0, 1.0, 0.0])))
    assert torch.equal(round_levels(levels), levels.double())
    with pytest.raises(ValueError, match="no step is left"): round_levels(torch.tensor([0.3, 0.2, 0.0]), coarse)
    with pytest.raises(ValueError, match="decreas"): round_levels(levels.flip(0), coarse)
    with pytest.raises(ValueError, match="decreas"): round_levels(levels, lambda s: 10 - s)


# ---------------------------------------------------------------- SDE family

@every_schedule
@pytest.mark.parametrize("sigma_next", [1.3, 2.9], ids=["backward", "forward"])
def test_sde_step_equals_equation_6_term_by_term(schedule, sigma_next):
    flow = Flow(mixture(), schedule)
    t, t_next = flow.prepare(torch.tensor([2.0, sigma_next], dtype=torch.float64))
    (sigma, _, s, _), dt, beta = flow.at(t), t_next - t, 0.7
    x, eps = normal(8, 2)*s*2, normal(8, 2, seed=1)
    probability_flow = ode_derivative(mixture(), x, t, schedule) * dt
    push = beta * sigma**2 * s * score(mixture(), x/s, sigma) * abs(dt)      # up the score, in either direction of time
    new_noise = s * sigma * math.sqrt(2*beta*abs(dt)) * eps
    a, b, c = sde_coefficients(flow, t, t_next, lambda t: beta)
    torch.testing.assert_close(a*x + b*mixture()(x/s, sigma) + c*eps, x + probability_flow + push + new_noise, rtol=1e-10, atol=1e-12)


@every_schedule
def test_songs_beta_removes_the_score_from_the_forward_sde(schedule):
    flow = Flow(mixture(), schedule)
    t, t_next = flow.prepare(torch.tensor([2.0, 2.1], dtype=torch.float64))
    sigma, dsigma, s, ds = flow.at(t)
    a, b, c = sde_coefficients(flow, t, t_next, song_beta(schedule))
    assert abs(b) < 1e-14
    assert a == pytest.approx(1 + ds/s*(t_next - t), rel=1e-12)              # f(t) x
    assert c == pytest.approx(s*math.sqrt(2*sigma*dsigma*(t_next - t)), rel=1e-12)   # g(t)
    back = sde_coefficients(flow, t, 2*t - t_next, song_beta(schedule))
    assert back[1] == pytest.approx(2*s*dsigma/sigma*(t_next - t), rel=1e-9)  # twice the ODE's pull


def test_vp_song_sde_is_the_published_one():
    beta_d, beta_min, t, dt = 19.9, 0.1, 0.4, 1e-3
    flow = Flow(mixture(), vp_schedule(beta_d, beta_min))
    rate = beta_min + beta_d*t
    a, b, c = sde_coefficients(flow, t, t + dt, song_beta(vp_schedule(beta_d, beta_min)))
    assert (a, c) == (pytest.approx(1 - 0.5*rate*dt, rel=1e-10), pytest.approx(math.sqrt(rate*dt), rel=1e-10)) and abs(b) < 1e-13


BETAS = {"0": lambda t: 0.0, "half": lambda t: 0.5/t, "song": lambda t: 1/t, "constant": lambda t: 0.3}


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_every_beta_has_the_same_marginals_to_first_order(beta, direction):
    "On a Gaussian an Euler-Maruyama step is linear: its variance is a recursion, and the error must halve with the step."
    def error(n):
        sigmas = torch.logspace(math.log10(5), math.log10(0.1), n + 1, dtype=torch.float64)
        if direction == "forward": sigmas = sigmas.flip(0)
        flow, v = Flow(gaussian(1)), C**2 + float(sigmas[0])**2
        for t, t_next in itertools.pairwise(flow.prepare(sigmas)):
            a, b, c = sde_coefficients(flow, t, t_next, beta)
            v = (a + b*C**2/(C**2 + t**2))**2 * v + c**2
        return abs(v/(C**2 + float(sigmas[-1])**2) - 1)
    coarse, fine = error(500), error(1000)
    assert fine < 0.02 and 1.9 < coarse/fine < 2.1


@every_schedule
def test_sample_sde_matches_the_data(schedule):
    n = 20_000
    images = sample_sde(gaussian(1), normal(n, 1, seed=2), edm_sigmas(200), song_beta(schedule), SeededRows(1).randn_like, schedule)
    assert abs(images.mean().item() - MU) < 5*C/math.sqrt(n) + 0.01
    assert abs(images.std().item()/C - 1) < 5/math.sqrt(2*n) + 0.02
    ode = sample_sde(gaussian(1), normal(8, 1), edm_sigmas(20), lambda t: 0.0, forbidden, schedule)
    torch.testing.assert_close(ode, sample_ode(gaussian(1), normal(8, 1), edm_sigmas(20), schedule, euler), rtol=1e-9, atol=1e-11)


def test_sde_states_are_copies_and_leave_the_input_alone():
    x = normal(4, 3)*2
    kept = x.clone()
    states = list(sde_states(gaussian(), x, torch.tensor([2.0, 1.0, 0.5, 0.0]), lambda t: 0.5/t))
    assert len(states) == 4 and torch.equal(x, kept) and torch.equal(states[0], kept)
    assert len({s.data_ptr() for s in states}) == 4
    up = list(sde_states(gaussian(), x, torch.tensor([0.5, 1.0, 2.0]), lambda t: 1/t))
    assert len(up) == 3
    assert not torch.equal(states[1], states[2])


def test_last_sde_step_leaves_no_noise():
    x = normal(4, 3)
    *_, end = sde_states(gaussian(), x, torch.tensor([0.5, 0.0]), lambda t: 5/t, forbidden)
    torch.testing.assert_close(end, gaussian()(x, 0.5))


# ---------------------------------------------------------------- Langevin

def naive_langevin(denoise, x, sigma, n, S_noise, gamma, randn_like):
    flow = Flow(denoise)
    for _ in range(n):
        x_hat, t_hat = add_churn(flow, x, sigma, gamma, S_noise, randn_like)
        x = heun(flow, x_hat, t_hat, sigma)
    return x


@pytest.mark.parametrize("S_noise", [1.0, 1.1])
def test_in_place_langevin_equals_the_naive_loop(S_noise):
    x = normal(16, 2)
    kept = x.clone()
    fast = langevin(mixture(), x, 0.7, 13, S_noise, 0.2, SeededRows(3).randn_like)
    slow = naive_langevin(mixture(), x, 0.7, 13, S_noise, 0.2, SeededRows(3).randn_like)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    assert torch.equal(x, kept)


def test_langevin_keeps_the_marginal():
    n, sigma = 50_000, 0.7
    x = gaussian(1).sample(n, sigma, generator=torch.Generator().manual_seed(0))
    x = langevin(gaussian(1), x, sigma, 40, randn_like=SeededRows(1).randn_like, gamma=0.1)
    target = C**2 + sigma**2
    assert abs(x.var().item()/target - 1) < 5*math.sqrt(2/n) + 2e-3      # the remainder is Heun's error, O(γ²)
    assert abs(x.mean().item() - MU) < 5*math.sqrt(target/n)


def test_langevin_reports_when_asked_and_stops_there():
    calls = []
    counted = recording(gaussian(), calls)
    states = langevin_states(counted, normal(4, 3), 0.5, [0, 2, 5], randn_like=SeededRows(2).randn_like)
    assert not calls                                                     # nothing runs before it is asked for
    reported = dict(states)
    assert list(reported) == [0, 2, 5] and len(calls) == 10              # two evaluations an iteration
    assert torch.equal(reported[0], normal(4, 3))
    torch.testing.assert_close(reported[2], langevin(gaussian(), normal(4, 3), 0.5, 2, randn_like=SeededRows(2).randn_like))
    assert torch.equal(langevin(gaussian(), normal(4, 3), 0.5, 0), normal(4, 3))


class Allocations(TorchDispatchMode):
    "Counts tensors of at least `size` elements that come into being."
    def __init__(self, size): super().__init__(); self.size, self.count = size, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size and result.untyped_storage().data_ptr() not in storages:
            self.count += 1
        return result


def frugal(d):
    "A denoiser that itself allocates nothing: D = x/2 in memory of its own."
    memory = torch.empty(d, 100, dtype=torch.float64)
    return lambda x, sigma: torch.mul(x, 0.5, out=memory)


@pytest.mark.parametrize("noise", [torch.randn_like, SeededNoise(range(8)).randn_like], ids=["torch", "seeded"])
def test_loops_allocate_nothing_per_step(noise):
    def allocations(run):
        with Allocations(800) as counter: run()
        return counter.count
    x = normal(8, 100)
    by_langevin = lambda k: allocations(lambda: langevin(frugal(8), x, 0.5, k, randn_like=noise))
    by_sde = lambda k: allocations(lambda: sample_sde(frugal(8), x, edm_sigmas(k), lambda t: 0.5/t, noise))
    assert by_langevin(2) == by_langevin(12) and by_sde(4) == by_sde(24)


def test_a_denoiser_may_return_its_input():
    identity = lambda x, sigma: x
    x = normal(4, 3)
    rows = SeededRows(0)
    new_noise = sum(rows.randn_like(x) for _ in range(3))
    for out in (langevin(identity, x, 0.5, 3, randn_like=SeededRows(0).randn_like),
                naive_langevin(identity, x, 0.5, 3, 1.0, MAX_GAMMA, SeededRows(0).randn_like)):
        torch.testing.assert_close(out, x + 0.5*new_noise)
    for schedule in SCHEDULES.values():
        assert torch.isfinite(sample_sde(identity, x, edm_sigmas(5), lambda t: 0.0, schedule=schedule)).all()


def test_loops_build_no_graph():
    weight = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    denoise = lambda x, sigma: x*weight
    assert not langevin(denoise, normal(2, 3), 0.5, 3).requires_grad
    assert not sample_sde(denoise, normal(2, 3), edm_sigmas(4), lambda t: 0.1).requires_grad


# ---------------------------------------------------------------- seeds

def seeded_images(seeds, denoise=None):
    noise = SeededNoise(seeds)
    return sample(denoise or mixture(), noise.randn((len(seeds), 2)), edm_sigmas(8), Churn(4), noise.randn_like)


def test_image_of_a_seed_does_not_depend_on_the_batch():
    seeds = [11, 3, 2**32 - 1, 0, 7]
    together = dict(zip(seeds, seeded_images(seeds)))
    backward = dict(zip(seeds[::-1], seeded_images(seeds[::-1])))
    for seed in seeds:                     # one matrix product in the oracle may round differently for another batch size
        torch.testing.assert_close(seeded_images([seed])[0], together[seed], rtol=0, atol=1e-12)
        torch.testing.assert_close(backward[seed], together[seed], rtol=0, atol=1e-12)
    assert len({tuple(v.tolist()) for v in together.values()}) == 5


def test_image_of_a_seed_through_a_network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3, padding=1)).eval()
    denoise = torch.no_grad()(lambda x, sigma: net((x/(1 + sigma)).float()).to(x.dtype))
    def images(seeds):
        noise = SeededNoise(seeds)
        return sample(denoise, noise.randn((len(seeds), 1, 8, 8)), edm_sigmas(8), Churn(4), noise.randn_like)
    together = images([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(torch.cat([images([0, 1, 2]), images([3]), images([4, 5])]), together, rtol=0, atol=1e-4)


def test_image_of_a_seed_in_another_process():
    code = ("import sys, torch; sys.path[:0] = ['tests', '.']; from test_stochastic import seeded_images;"
            "print(seeded_images([3, 0]).flatten().tolist())")
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    other = torch.tensor([float(v) for v in out.stdout.strip().strip("[]").split(",")], dtype=torch.float64)
    torch.testing.assert_close(other, seeded_images([11, 3, 0])[1:].flatten(), rtol=0, atol=1e-12)


def test_seeded_noise_is_the_same_in_every_precision():
    single, double = SeededNoise([5, 6]).randn((2, 4), torch.float32), SeededNoise([5, 6]).randn((2, 4))
    assert torch.equal(single.double(), double)
    noise = SeededNoise([5, 6])
    assert torch.equal(noise.randn_like(double), double) and not torch.equal(noise.randn_like(double), double)
    assert torch.equal(SeededNoise([5, 6]).fill_(torch.empty(2, 4, dtype=torch.float64)), double)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("default", DTYPES, ids=str)
def test_every_draw_is_the_same_under_another_default_dtype(default):
    "The kind: a tensor made without a dtype follows the process."
    def draws():
        noise = SeededNoise([5, 6])
        return [noise.randn((2, 4)), noise.randn_like(torch.zeros(2, 4, dtype=torch.float32)), noise.randint(9, (2, 3)),
                fill_noise(torch.empty(2, 4, dtype=torch.float64), noise.randn_like),
                IndexStream(50, seed=3).next(70)]
    expected, before = draws(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try: found = draws()
    finally: torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, found, strict=True))


def test_seeds_of_streams_that_differ_by_2_to_the_32_differ():
    "The kind: a CPU generator looks at 32 bits only."
    first = lambda seed: torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    assert first(5) == first(2**32 + 5)                                   # why this is tested at all
    names = [(seed, "step", 64) for k in range(4) for seed in (5 + k*2**32, 5 + k*2**40, -5 - k*2**33)]
    assert len({tuple(first(stream_seed(*name))) for name in set(names)}) == len(set(names))
    assert len({tuple(IndexStream(100, seed=seed).next(100).tolist()) for seed in (5, 2**32 + 5, 2**56 + 5)}) == 3
    assert all(0 <= stream_seed(*name) < 2**32 for name in names)
    with pytest.raises(ValueError): SeededNoise([2**32 + 5])


def test_counters_of_one_stream_never_share_a_seed():
    "A hash of 32 bits would repeat itself about 18 times among the 390,625 updates of the paper's run."
    assert len({stream_seed(0, "step", images) for images in range(0, 200_000_000, 512)}) == 390_625
    edges = [0, 1, 2**31, 2**32 - 1]
    assert len({stream_seed("a", k) for k in edges}) == 4
    assert stream_seed("a") == stream_seed("a", 0) and stream_seed("a", 1) != stream_seed("b", 1)
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match="counter"): stream_seed(0, "step", bad)
    with pytest.raises(ValueError, match="name"): stream_seed()


def test_a_position_that_cannot_be_is_refused():
    good = {"n": 10, "seed": 1, "position": 3}
    for bad in ({**good, "position": -3}, {**good, "n": 11}, {**good, "position": 1.5}, {**good, "seed": "1"}, {"n": 10}, [], None):
        with pytest.raises(ValueError): IndexStream(10).load_state(bad)
    stream = IndexStream(10).load_state(good)
    for count in (-1, -10):
        with pytest.raises(ValueError, match="count"): stream.next(count)
    assert stream.position == 3 and len(stream.next(0)) == 0              # a refusal moves nothing
    for n, position, rank, world in ((0, 0, 0, 1), (5, -1, 0, 1), (5, 0, 1, 1), (5, 0, -1, 2)):
        with pytest.raises(ValueError): IndexStream(n, 0, position, rank, world)


def test_noise_of_another_kind_is_refused():
    noise = SeededNoise([1, 2])
    for dtype in (torch.int64, torch.uint8, torch.complex64):
        with pytest.raises(ValueError, match="floating"): noise.randn((2, 3), dtype)
    with pytest.raises(ValueError, match="upper end"): noise.randint(0, (2,))
    with pytest.raises(ValueError, match="shape"): fill_noise(torch.empty(2, 3), lambda x: torch.randn(1))
    with pytest.raises(ValueError, match="shape"): sample(gaussian(), normal(2, 3), edm_sigmas(4), Churn(2), lambda x: torch.randn(1, 3))
    with pytest.raises(ValueError, match="2 seeds"): noise.fill_(torch.tensor(1.0))


def test_seeded_integers():
    labels = SeededNoise(range(2000)).randint(10, (2000,))
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    assert SeededNoise([9, 4]).randint(1000, (2,)).tolist() == SeededNoise([4, 9]).randint(1000, (2,)).tolist()[::-1]


# ---------------------------------------------------------------- what goes wrong is said

@pytest.mark.parametrize("bad", [{"S_churn": -1}, {"S_tmin": 2, "S_tmax": 1}, {"S_tmin": -1}, {"S_noise": 0}, {"S_noise": math.inf},
                                 {"S_churn": math.nan}, {"S_churn": "30"}, {"S_tmax": None}])
def test_churn_refuses(bad):
    with pytest.raises(ValueError): Churn(**bad)


def test_churn_is_frozen_and_the_published_values_are_data():
    with pytest.raises(AttributeError): Churn().S_churn = 3
    assert BEST_CHURN["cifar10-vp"] == Churn(30, 0.01, 1, 1.007) and BEST_CHURN["imagenet64-edm"] == Churn(40, 0.05, 50, 1.003)
    assert BEST_CHURN["cifar10-ve"] == Churn(80, 0.05, 1, 1.007) and BEST_CHURN["imagenet64-adm"] == Churn(80, 0.05, 50, 1.003)


@pytest.mark.parametrize("seeds", [[], [1.5], [-1], ["3"], [2**32], [True], [0, 1, 2**40]])
def test_seeds_are_checked(seeds):
    for refuse in (SeededNoise, check_seeds):
        with pytest.raises(ValueError): refuse(seeds)
    assert check_seeds(torch.arange(3).numpy()) == (0, 1, 2)


def test_wrong_batch_is_refused():
    for draw in (lambda n: n.randn((3, 2)), lambda n: n.randn_like(torch.zeros(1, 2)), lambda n: n.randint(4, (3,))):
        with pytest.raises(ValueError, match="2 seeds"): draw(SeededNoise([1, 2]))


def test_bad_arguments_are_refused():
    x, ones = normal(2, 3), lambda t: 1.0
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma"): langevin(gaussian(), x, sigma, 1)
    with pytest.raises(ValueError, match="gamma"): langevin(gaussian(), x, 1.0, 1, gamma=0.0)
    with pytest.raises(ValueError, match="S_noise"): langevin(gaussian(), x, 1.0, 1, S_noise=-1.0)
    with pytest.raises(ValueError, match="rising"): list(langevin_states(gaussian(), x, 1.0, [3, 1]))
    with pytest.raises(ValueError, match="rising"): langevin(gaussian(), x, 1.0, -1)
    with pytest.raises(ValueError, match="cannot start"): sde_states(gaussian(), x, torch.tensor([0.0, 1.0]), ones)
    with pytest.raises(ValueError, match="beta"): sample_sde(gaussian(), x, edm_sigmas(4), lambda t: -1.0)
    with pytest.raises(ValueError, match="beta"): sample_sde(gaussian(), x, edm_sigmas(4), lambda t: math.nan)
    with pytest.raises(ValueError, match="decreas"): sample(gaussian(), x, edm_sigmas(4).flip(0))
    with pytest.raises(ValueError, match="shape"): langevin(lambda x, s: x[:1], x, 1.0, 1)
    with pytest.raises(ValueError, match="floating"): langevin(gaussian(), x.long(), 1.0, 1)


@pytest.mark.parametrize("bad", [
    dict(dtype=torch.int64), dict(sigmas=torch.complex(edm_sigmas(4), edm_sigmas(4))), dict(sigmas=[]), dict(sigmas=["a", "b"]),
    dict(sigmas=torch.tensor([math.nan, 1.0])), dict(sigmas=torch.tensor([[2.0, 1.0]])), dict(noise=torch.zeros(2, 3, device="meta"))], ids=str)
def test_every_sampler_refuses_what_has_no_meaning(bad):
    "The kind: numbers that torch would convert in silence."
    noise, sigmas, more = bad.get("noise", normal(2, 3)), bad.get("sigmas", edm_sigmas(4)), {k: v for k, v in bad.items() if k == "dtype"}
    for run in (lambda: sample(gaussian(), noise, sigmas, **more), lambda: list(sample_states(gaussian(), noise, sigmas, **more)),
                lambda: sample_sde(gaussian(), noise, sigmas, lambda t: 0.1, **more), lambda: list(sde_states(gaussian(), noise, sigmas, lambda t: 0.1, **more))):
        with pytest.raises((ValueError, TypeError)): run()
    if "sigmas" not in bad:
        with pytest.raises(ValueError): langevin(gaussian(), noise, 0.5, 2, **more)


def test_iterations_are_whole_numbers():
    for at in ([0.5], [0, True and 1.5], ["1"], [-1], [2, 2]):
        with pytest.raises(ValueError, match="rising"): langevin_states(gaussian(), normal(2, 3), 0.5, at)


def test_nan_is_reported_with_step_and_sigma():
    sigmas = edm_sigmas(8)
    broken = lambda x, sigma: x*math.nan if sigma < 1 else x*0.5
    first = int((sigmas < 1).nonzero()[0]) - 1          # Heun looks ahead: the step before already meets the NaN
    with pytest.raises(ValueError, match=rf"step {first} on, .*sigma = {float(sigmas[first]):.6g}"): sample(broken, normal(2, 3), sigmas)
    with pytest.raises(ValueError, match=rf"step {first + 1} on"): sample_sde(broken, normal(2, 3), sigmas, lambda t: 0.0)
    with pytest.raises(ValueError, match="NaN"): langevin(broken, normal(2, 3), 0.5, 2)


def test_conditioning_reaches_the_denoiser():
    calls, labels = [], torch.eye(2)
    denoise = recording(gaussian(), calls)
    sample(denoise, normal(2, 3), edm_sigmas(3), class_labels=labels)
    sample_sde(denoise, normal(2, 3), edm_sigmas(3), lambda t: 0.0, class_labels=labels)
    langevin(denoise, normal(2, 3), 0.5, 2, class_labels=labels)
    assert len(calls) == 5 + 3 + 4 and all(cond["class_labels"] is labels for _, _, cond in calls)


def test_state_precision():
    noise = normal(4, 3, dtype=torch.float32)
    assert sample(gaussian(), noise, edm_sigmas(4), Churn(2)).dtype == torch.float64
    single = sample(gaussian(), noise, edm_sigmas(4), Churn(2), SeededNoise(range(4)).randn_like, dtype=torch.float32)
    double = sample(gaussian(), noise, edm_sigmas(4), Churn(2), SeededNoise(range(4)).randn_like)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_an_interrupted_loop_keeps_what_it_has():
    def interrupted():
        yield from (0, 1, 2)
        raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="after 3"): assert collect(interrupted(), progress=False) == [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collect(range(4), total=4, progress=False) == [0, 1, 2, 3]


# ---------------------------------------------------------------- the study behind the chapter's network results

@pytest.fixture(scope="module")
def study():
    "studies/churn.py as a module."
    path = Path(__file__).parent.parent / "studies" / "churn.py"
    spec = importlib.util.spec_from_file_location("churn_study", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


class ShrinkingDigits:
    "A denoiser of the digits' shape whose answer depends on the label, one image at a time."
    net = SimpleNamespace(channels=1, resolution=8, label_dim=10)

    def __call__(self, x, sigma, class_labels=None):
        return (0.8*x + sigma**2*class_labels.double().argmax(1).view(-1, 1, 1, 1)/10) / (1 + sigma**2)


def test_study_shares_the_path_before_the_first_noise_and_nothing_else(study):
    "A run that starts from the kept states of the ODE is the run of `sample`, whatever was measured before it."
    digits, labels = study.Digits(ShrinkingDigits(), [0, 1], 40), one_hot(study.digits().labels[:40], 10)
    for churn in (Churn(4, 0.05, 1.0), Churn(4, 0.05, 1.0, 1.02), Churn(), Churn(3, 0.1)):
        for seed in (1, 0):
            streams = SeededNoise(range(seed*40, (seed + 1)*40))
            noise = streams.randn((40, 1, 8, 8))
            expected = sample(ShrinkingDigits(), noise, edm_sigmas(9), churn, streams.randn_like, class_labels=labels)
            got = digits.churned(9, churn_gammas(edm_sigmas(9), churn), churn.S_noise, seed)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_study_distances_see_what_they_should(study):
    digits = study.Digits(ShrinkingDigits(), [0, 1], 1797)
    data = study.to_float(digits.data.images).double()
    assert digits.distance(data) < 1e-9 < 0.01 < digits.distance(0.9*data)
    assert all(0.01 < value < 0.2 for value in digits.floor()["distances"])       # sampling error alone
    look = study.look(data[:50])
    assert (study.look(0.5*data[:50])["detail"] < look["detail"]).all() and (study.look(2*data[:50])["extremes"] >= look["extremes"]).all()
    a, b = data[::2], data[1::2]
    assert abs(study.energy_distance(a, b)) < 0.01 < study.energy_distance(a, b + 0.2)


def test_study_stops_its_training_as_early_as_it_is_told(study):
    "A look at toy sizes is shorter than the preset's warm-up; the network that was measured had all of it."
    assert not study.early_network(64).training
    assert study.PRESETS["digits"].lr_rampup <= 40_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_seed_gives_the_same_image_on_a_gpu():
    def images(device):
        noise = SeededNoise([1, 2, 3])
        oracle = GaussianDenoiser(torch.full((5,), MU, dtype=torch.float64, device=device), C)
        return sample(oracle, noise.randn((3, 5), device=device), edm_sigmas(18), Churn(20), noise.randn_like).cpu()
    torch.testing.assert_close(images("cuda"), images("cpu"), rtol=1e-9, atol=1e-9)
