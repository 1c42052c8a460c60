"""Deterministic sampling: levels, orders of convergence, identities, devices, bad input. No network, no data set."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edm_nb.framework import LINEAR, TABLE_1, VE, GaussianDenoiser, MixtureDenoiser, Schedule, ode_derivative, vp_schedule
from edm_nb.ode_solvers import (
    adams_bashforth_weights, coefficients, count_nfe, dpmpp_2m, dpmpp_2m_sde, edm_sigmas, euler, explain_non_finite, Flow, heun,
    iddpm_sigmas, invert_ode, multistep, ode_states, rk2, rk45, sample_ode, ve_sigmas,
    vp_sigmas
)
from edm_nb.checks import check_sigmas, is_finite, peak, require_finite, state_dtype

ROOT = Path(__file__).resolve().parent.parent
VP = vp_schedule()
SCHEDULES = {"linear": LINEAR, "ve": VE, "vp": VP}
ROWS = {"vp": vp_sigmas, "ve": ve_sigmas, "iddpm": iddpm_sigmas, "edm": edm_sigmas}
SOLVERS = {"euler": euler, "heun": heun, "midpoint": rk2(0.5), "ralston": rk2(2/3), "rk2(1)": rk2(1.0), "ab1": multistep(1),
           "ab2": multistep(2), "ab3": multistep(3), "ab4": multistep(4), "dpmpp": dpmpp_2m}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bumps():
    "A nonlinear problem: three Gaussians in four dimensions."
    return MixtureDenoiser(randn(3, 4, seed=1), std=0.4)


def rms(x):
    return x.double().square().mean().sqrt().item()


def order(n, errors):
    return -np.polyfit(np.log(n), np.log(errors), 1)[0]


# ---- noise levels ----

def assert_levels(sigmas, n, first, last):
    assert sigmas.dtype == torch.float64 and sigmas.shape == (n + 1,)
    assert sigmas[-1] == 0 and sigmas[0] == first and (n == 1 or sigmas[n-1] == last)
    assert bool((sigmas.diff() < 0).all()) and bool(torch.isfinite(sigmas).all())


ranges = st.tuples(st.floats(1e-4, 0.5), st.floats(1.0, 1e4))


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 400), limits=ranges, rho=st.floats(0.2, 1000))
def test_edm_levels(n, limits, rho):
    sigmas = edm_sigmas(n, *limits, rho=rho)
    assert_levels(sigmas, n, limits[1], limits[0])
    if n > 2:                                             # even in sigma^(1/rho): differences of the roots are equal
        roots = (sigmas[:-1] / limits[1]) ** (1/rho)
        steps = roots.diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-6, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 400), limits=ranges)
def test_ve_levels(n, limits):
    sigmas = ve_sigmas(n, *limits)
    assert_levels(sigmas, n, limits[1], limits[0])
    if n > 2:
        ratios = sigmas[1:-1] / sigmas[:-2]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 400), eps_s=st.floats(1e-5, 0.5), beta_d=st.floats(0.1, 40), beta_min=st.floats(1e-3, 1))
def test_vp_levels(n, eps_s, beta_d, beta_min):
    sigmas = vp_sigmas(n, beta_d, beta_min, eps_s)
    sigma = vp_schedule(beta_d, beta_min).sigma
    ends = sigma(torch.tensor([1.0, eps_s], dtype=torch.float64))
    assert_levels(sigmas, n, ends[0], ends[1])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 992))
def test_iddpm_levels(n):
    sigmas = iddpm_sigmas(n)
    assert len(sigmas) == n + 1 and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())
    assert abs(sigmas[0].item() - 80.2037018) < 1e-7


def test_published_iddpm_levels():
    torch.testing.assert_close(iddpm_sigmas(18)[:3], torch.tensor([80.20370, 9.68785, 5.06820], dtype=torch.float64), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("n", [1, 2, 3, 18, 100])
def test_levels_are_those_of_table_1(name, n):
    torch.testing.assert_close(ROWS[name](n), TABLE_1[name].sigmas(n), rtol=1e-9, atol=0)


@pytest.mark.parametrize("levels", ROWS.values())
@pytest.mark.parametrize("n", [0, -1, 1.5, True, "18", None])
def test_bad_n(levels, n):
    with pytest.raises(ValueError, match="n, the number of sampling steps, must be an integer"): levels(n)


@pytest.mark.parametrize("arguments", [dict(sigma_min=80.0, sigma_max=80.0), dict(sigma_min=81.0), dict(sigma_min=0.0),
    dict(sigma_min=-1.0), dict(sigma_max=math.inf), dict(sigma_min=math.nan), dict(rho=0), dict(rho=-7), dict(rho=math.nan),
    dict(rho=math.inf)])
def test_bad_edm_arguments(arguments):
    with pytest.raises(ValueError): edm_sigmas(18, **arguments)


def test_other_bad_levels():
    with pytest.raises(ValueError, match="sigma_min"): ve_sigmas(18, 2.0, 1.0)
    with pytest.raises(ValueError, match="epsilon_s"): vp_sigmas(18, eps_s=1.0)
    with pytest.raises(ValueError, match="beta"): vp_sigmas(18, beta_min=-0.1)
    with pytest.raises(ValueError, match="repeat"): iddpm_sigmas(993)
    with pytest.raises(ValueError, match="j_0"): iddpm_sigmas(18, j_0=1000)
    with pytest.raises(ValueError, match="told apart"): edm_sigmas(1000, sigma_min=1.0, sigma_max=1 + 1e-14)


# ---- the flow ----

@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_flow_is_the_ode(schedule):
    denoise, flow = bumps(), Flow(bumps(), schedule)
    for t in flow.prepare(torch.tensor([50.0, 3.0, 0.4, 0.01])):
        x = randn(5, 4) * flow.at(t)[0] * flow.at(t)[2]
        slope = ode_derivative(denoise, x, t, schedule)
        torch.testing.assert_close(flow.slope(x, t), slope, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flow.push(x, t, -0.2*t), x - 0.2*t*slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [LINEAR, VE, VP], ids=["linear", "ve", "vp"])
def test_no_slope_at_zero(schedule):
    flow, x = Flow(bumps(), schedule), randn(3, 4)
    for call in (lambda: flow.slope(x, 0.0), lambda: flow.push(x, 0.0, 0.1), lambda: euler(flow, x, 0.0, 0.1), lambda: heun(flow, x, 0.0, 0.1)):
        with pytest.raises(ValueError, match="slope at sigma = 0 is 0/0: keep Euler's step"): call()


def test_coefficients_are_floats():
    for row in coefficients(torch.tensor([0.5, 0.1], dtype=torch.float64), VP): assert all(type(v) is float for v in row)


# ---- solvers ----

@pytest.mark.parametrize("name,expected", [("euler", 1), ("heun", 2), ("ralston", 2), ("rk2(1)", 2), ("ab1", 1), ("ab2", 2), ("ab3", 3), ("dpmpp", 2)])
def test_order_on_the_gaussian(name, expected):
    denoise, noise, n = GaussianDenoiser(0.3, 0.5), randn(8, 6), [64, 128, 256]
    exact = denoise.solve(noise * 80, 80.0, 0.002)
    errors = [rms(sample_ode(denoise, noise, edm_sigmas(k)[:-1], solver=SOLVERS[name]) - exact) for k in n]
    assert abs(order(n, errors) - expected) < 0.15, errors


@pytest.mark.parametrize("std", [0.05, 0.5, 8.0])
def test_midpoint_gains_an_order_on_every_gaussian_and_no_other_alpha_does(std):
    "g''/24 + g g'/4 + g^3/6 = 0 for g = t/(c^2 + t^2): the local error is O(h^4) at alpha = 1/2, O(h^3) at any other."
    gaussian, x, lengths = GaussianDenoiser(0.3, std), randn(8, 4), [0.1, 0.05, 0.025]
    for alpha, expected in ((0.5, 4), (0.45, 3), (2/3, 3), (1.0, 3)):
        errors = [rms(rk2(alpha)(Flow(gaussian), x, 1.0, 1.0 - h) - gaussian.solve(x, 1.0, 1.0 - h)) for h in lengths]
        assert abs(math.log2(errors[-2]/errors[-1]) - expected) < 0.35, (alpha, errors)


@pytest.fixture(scope="module")
def end_of_the_mixture():
    "Where the paths from `randn(8, 4)` end, by an adaptive solver."
    return rk45(bumps(), randn(8, 4), edm_sigmas(2)[:-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name,expected", [("euler", 1), ("heun", 2), ("midpoint", 2), ("dpmpp", 2)])
def test_order_on_the_mixture(end_of_the_mixture, schedule, name, expected):
    denoise, noise, n = bumps(), randn(8, 4), [128, 256, 512]
    exact = end_of_the_mixture
    errors = [rms(sample_ode(denoise, noise, edm_sigmas(k)[:-1], schedule, SOLVERS[name]) - exact) for k in n]
    assert abs(order(n, errors) - expected) < 0.15, errors


@pytest.mark.parametrize("solver,expected", [(euler, 2), (heun, 3)])
def test_local_error(solver, expected):
    denoise, h = GaussianDenoiser(0.0, 0.5), np.array([0.02, 0.04, 0.08])
    x = randn(8, 4)
    errors = [rms(solver(Flow(denoise), x, 1.0, 1.0 - k) - denoise.solve(x, 1.0, 1.0 - k)) for k in h]
    assert abs(-order(h, errors) - expected) < 0.1


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_fast_heun_is_algorithm_1(schedule):
    "Written out in the paper's order of operations, for any schedule."
    denoise, sigmas, x = bumps(), edm_sigmas(9), randn(6, 4)
    t = schedule.sigma_inv(sigmas)
    state = x * sigmas[0] * schedule.scale(t[0])
    for t_cur, t_next, sigma_next in zip(t[:-1], t[1:], sigmas[1:]):
        d_cur = ode_derivative(denoise, state, t_cur, schedule)
        ahead = state + (t_next - t_cur)*d_cur
        if sigma_next != 0: ahead = state + (t_next - t_cur)*(d_cur + ode_derivative(denoise, ahead, t_next, schedule))/2
        state = ahead
    torch.testing.assert_close(sample_ode(denoise, x, sigmas, schedule), state, rtol=1e-9, atol=1e-9)


def test_linear_time_as_a_general_schedule_gives_the_same():
    "The same sigma = t told with s = 1 but a slope of s that is not recognised as constant: the path without lerp."
    tiny = Schedule(LINEAR.sigma, LINEAR.sigma_deriv, LINEAR.sigma_inv, LINEAR.scale, lambda t: torch.full_like(t, 1e-300))
    x, sigmas = randn(6, 4), edm_sigmas(18)
    torch.testing.assert_close(sample_ode(bumps(), x, sigmas, tiny), sample_ode(bumps(), x, sigmas), rtol=1e-11, atol=1e-11)


def test_alpha_one_is_heun():
    torch.testing.assert_close(sample_ode(bumps(), randn(6, 4), edm_sigmas(12), solver=rk2(1.0)),
                               sample_ode(bumps(), randn(6, 4), edm_sigmas(12)), rtol=1e-10, atol=1e-10)


def test_order_one_multistep_is_euler():
    torch.testing.assert_close(sample_ode(bumps(), randn(6, 4), edm_sigmas(12), solver=multistep(1)),
                               sample_ode(bumps(), randn(6, 4), edm_sigmas(12), solver=euler), rtol=1e-10, atol=1e-10)


def test_a_solver_object_keeps_no_memory():
    solver, x = multistep(3), randn(6, 4)
    first = sample_ode(bumps(), x, edm_sigmas(8), solver=solver)
    assert torch.equal(first, sample_ode(bumps(), x, edm_sigmas(8), solver=solver))


@settings(max_examples=60, deadline=None)
@given(start=st.floats(0.5, 80), ratios=st.lists(st.floats(0.3, 0.95), min_size=1, max_size=4), end=st.floats(0.0, 0.9))
def test_multistep_weights_are_exact_for_polynomials(start, ratios, end):
    nodes = [start]
    for r in ratios[:-1]: nodes.append(nodes[-1]*r)
    t_next = nodes[-1]*end
    weights = adams_bashforth_weights(nodes, t_next)
    for p in range(len(nodes)):
        exact = (t_next**(p+1) - nodes[-1]**(p+1)) / (p + 1)
        scale = sum(abs(w)*t**p for w, t in zip(weights, nodes)) + abs(exact)
        assert abs(sum(w*t**p for w, t in zip(weights, nodes)) - exact) < 1e-9*scale


@pytest.mark.parametrize("make,value", [(rk2, 0), (rk2, 1.1), (rk2, -0.5), (rk2, math.nan), (multistep, 0), (multistep, 5), (multistep, 1.5)])
def test_bad_solver_parameters(make, value):
    with pytest.raises(ValueError): make(value)


@pytest.mark.parametrize("name,nfe", [("euler", 18), ("heun", 35), ("rk2(1)", 35), ("midpoint", 35), ("ralston", 35), ("ab3", 18)])
def test_nfe(name, nfe):
    counter = count_nfe(bumps())
    sample_ode(counter, randn(2, 4), edm_sigmas(18), solver=SOLVERS[name])
    assert counter.nfe == nfe


@pytest.mark.parametrize("alpha", [1.0, 0.9, 2/3, 0.5, 0.3])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_family_written_from_algorithm_3(alpha, schedule):
    "An independent loop over Eq. 4: two slopes a step, Euler's last step to sigma = 0, 2N - 1 evaluations for every alpha."
    sigmas, x, calls = edm_sigmas(7), randn(6, 4), count_nfe(bumps())
    t = [float(v) for v in schedule.sigma_inv(sigmas)]
    state = x * sigmas[0] * schedule.scale(torch.tensor(t[0], dtype=torch.float64))
    for now, then in zip(t[:-1], t[1:]):
        h, d = then - now, ode_derivative(calls, state, now, schedule)
        if then == 0: state = state + h*d
        else:
            inner = ode_derivative(calls, state + alpha*h*d, now + alpha*h, schedule)
            state = state + h*((1 - 1/(2*alpha))*d + inner/(2*alpha))
    counter = count_nfe(bumps())
    torch.testing.assert_close(sample_ode(counter, x, sigmas, schedule, rk2(alpha)), state, rtol=1e-9, atol=1e-9)
    assert counter.nfe == calls.nfe == 2*7 - 1


# ---- the exponential integrator ----

def test_dpmpp_is_the_published_recursion():
    "Written from lambda, r and D as its paper has it (data prediction, 2M), sigma = t and s = 1."
    denoise, sigmas, x = bumps(), edm_sigmas(9), randn(6, 4)
    state, old, lam = x * sigmas[0], None, -sigmas[:-1].log()
    for i in range(9):
        D = denoise(state, sigmas[i])
        if sigmas[i+1] == 0: state = D
        else:
            h = lam[i+1] - lam[i]
            blend = D
            if old is not None:
                r = (lam[i] - lam[i-1]) / h
                blend = (1 + 1/(2*r))*D - old/(2*r)
            state = sigmas[i+1]/sigmas[i]*state - torch.expm1(-h)*blend
        old = D
    counter = count_nfe(denoise)
    torch.testing.assert_close(sample_ode(counter, x, sigmas, solver=dpmpp_2m), state, rtol=1e-11, atol=1e-11)
    assert counter.nfe == 9
    torch.testing.assert_close(sample_ode(denoise, x, sigmas, VP, dpmpp_2m), state, rtol=1e-9, atol=1e-9)   # the schedule does not matter


def test_dpmpp_without_history_is_euler():
    flow, x = Flow(bumps()), randn(6, 4)
    torch.testing.assert_close(dpmpp_2m(flow, x, 3.0, 2.0), euler(flow, x, 3.0, 2.0), rtol=1e-12, atol=1e-12)


def test_the_noisy_variant_is_exact_for_a_single_image_and_needs_no_noise_at_eta_0():
    "D constant: x - D is Gaussian, and every step must leave it with variance sigma^2, whatever the steps and eta."
    noise = lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)
    for eta in (0.5, 1.0, 2.0):
        g = torch.Generator().manual_seed(5)   # not the seed of the start
        states = list(ode_states(lambda x, sigma: torch.full_like(x, 0.7), randn(40_000, 1), edm_sigmas(6), solver=dpmpp_2m_sde(noise, eta)))
        for x, sigma in zip(states[1:-1], edm_sigmas(6)[1:-1]): assert abs(((x - 0.7)/sigma).var().item() - 1) < 0.03, (eta, sigma)
        assert torch.equal(states[-1], torch.full_like(states[-1], 0.7))
    drawn = []
    dpmpp_2m_sde(lambda x: drawn.append(1), 0.0)(Flow(bumps()), randn(2, 4), 2.0, 1.0)
    assert not drawn
    for eta in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eta"): dpmpp_2m_sde(torch.randn_like, eta)


@pytest.mark.parametrize("schedule", [LINEAR, VP, VE], ids=["linear", "vp", "ve"])
def test_last_step_is_eulers(schedule):
    states = list(ode_states(bumps(), randn(2, 4), edm_sigmas(6), schedule))
    flow = Flow(bumps(), schedule)
    t = flow.prepare(edm_sigmas(6))
    torch.testing.assert_close(states[-1], euler(flow, states[-2], t[-2], t[-1]), rtol=0, atol=0)
    if schedule is LINEAR: assert torch.equal(states[-1], bumps()(states[-2], torch.tensor(0.002, dtype=torch.float64)))


@pytest.mark.parametrize("row", ["vp", "ve", "iddpm", "edm"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_row_any_n(row, n):
    out = sample_ode(bumps(), randn(3, 4), ROWS[row](n), TABLE_1[row].schedule)
    assert out.shape == (3, 4) and bool(torch.isfinite(out).all())


def test_schedules_agree_in_the_fine_limit():
    x, ends = randn(6, 4), {name: None for name in SCHEDULES}
    for name, schedule in SCHEDULES.items(): ends[name] = sample_ode(bumps(), x, edm_sigmas(600)[:-1], schedule)
    torch.testing.assert_close(ends["vp"], ends["linear"], rtol=0, atol=2e-4)
    torch.testing.assert_close(ends["ve"], ends["linear"], rtol=0, atol=2e-3)


def test_scaled_schedule_returns_unscaled_samples():
    "s = 3 throughout: the solution is the linear one, whatever s is."
    three = Schedule(LINEAR.sigma, LINEAR.sigma_deriv, LINEAR.sigma_inv, lambda t: torch.full_like(t, 3.0), LINEAR.scale_deriv)
    x = randn(6, 4)
    torch.testing.assert_close(sample_ode(bumps(), x, edm_sigmas(12), three), sample_ode(bumps(), x, edm_sigmas(12)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(invert_ode(bumps(), x, edm_sigmas(12), three), invert_ode(bumps(), x, edm_sigmas(12)), rtol=1e-9, atol=1e-9)


def test_ddim_is_euler():
    "DDIM's update as its authors print it, on the state sqrt(alpha-bar) x, over all levels."
    denoise, sigmas, x = bumps(), iddpm_sigmas(20), randn(6, 4)
    a = 1 / (1 + sigmas**2)
    z = x * sigmas[0] * a[0].sqrt()
    for i in range(20):
        u = z / a[i].sqrt()
        epsilon = (u - denoise(u, sigmas[i])) / sigmas[i]
        z = a[i+1].sqrt()*(z - (1 - a[i]).sqrt()*epsilon)/a[i].sqrt() + (1 - a[i+1]).sqrt()*epsilon
    torch.testing.assert_close(sample_ode(denoise, x, sigmas, solver=euler), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [LINEAR, VP], ids=["linear", "vp"])
def test_rk45(schedule):
    denoise, noise = GaussianDenoiser(0.3, 0.5), randn(4, 3)
    counter = count_nfe(denoise)
    x = rk45(counter, noise, edm_sigmas(18), schedule, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(x, denoise.solve(noise*80, 80.0, 0.0), rtol=0, atol=1e-4)
    assert counter.nfe > 50
    torch.testing.assert_close(rk45(denoise, noise, edm_sigmas(1)), sample_ode(denoise, noise, edm_sigmas(1)))


# ---- inversion ----

@pytest.mark.parametrize("schedule", [LINEAR, VP], ids=["linear", "vp"])
def test_inversion_has_second_order(schedule):
    denoise, n = bumps(), [64, 128, 256]
    x = denoise.sample(8, generator=torch.Generator().manual_seed(3))
    errors = [rms(sample_ode(denoise, invert_ode(denoise, x, edm_sigmas(k, sigma_min=1e-4), schedule), edm_sigmas(k, sigma_min=1e-4), schedule) - x) for k in n]
    assert errors[-1] < 1e-3 and order(n, errors) > 1.6, errors


def test_inversion_of_the_gaussian_is_exact():
    denoise, x = GaussianDenoiser(0.3, 0.5), randn(8, 6)
    latent = invert_ode(denoise, x, edm_sigmas(400))
    torch.testing.assert_close(latent, denoise.solve(x, 0.002, 80.0)/80, rtol=1e-3, atol=1e-4)


# ---- precision, shapes, other people's tensors ----

def test_precision():
    assert state_dtype() == state_dtype("cpu") == torch.float64 and state_dtype("mps") == torch.float32
    x = randn(3, 4, dtype=torch.float32)
    seen = []
    def denoise(x, sigma): seen.append((x.dtype, sigma.dtype, sigma.shape)); return bumps()(x, sigma).float()
    assert sample_ode(denoise, x, edm_sigmas(4)).dtype == torch.float64
    assert set(seen) == {(torch.float64, torch.float64, ())}
    out = sample_ode(bumps(), x, edm_sigmas(18), dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), sample_ode(bumps(), x, edm_sigmas(18)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 7), (5, 3, 4, 6), (5, 2, 3, 2, 2), (0, 3)])
@pytest.mark.parametrize("solver", [euler, heun, multistep(2), rk2(0.5)])
def test_any_rank(shape, solver):
    for schedule in (LINEAR, VP):
        out = sample_ode(lambda x, sigma: x * 0.25/(0.25 + sigma**2), randn(*shape), edm_sigmas(5), schedule, solver)
        assert out.shape == shape


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_foreign_tensors_are_left_alone(name, schedule):
    "Denoisers that keep their input, return it, or return the same buffer each time must not be disturbed."
    noise, sigmas = randn(3, 4), edm_sigmas(6)
    before, kept, buffer = (noise.clone(), sigmas.clone()), [], torch.empty(3, 4, dtype=torch.float64)
    def keeps(x, sigma):
        D = bumps()(x, sigma)
        kept.append((x, x.clone(), D, D.clone()))
        return D
    def reuses(x, sigma): return buffer.copy_(bumps()(x, sigma))
    states = [(x, x.clone()) for x in ode_states(keeps, noise, sigmas, schedule, SOLVERS[name])]
    for a, b in states: assert torch.equal(a, b)
    for x, x_then, D, D_then in kept: assert torch.equal(x, x_then) and torch.equal(D, D_then)
    torch.testing.assert_close(sample_ode(reuses, noise, sigmas, schedule, SOLVERS[name]), states[-1][0], rtol=1e-12, atol=1e-12)
    sample_ode(lambda x, sigma: x, noise, sigmas, schedule, SOLVERS[name])
    assert torch.equal(noise, before[0]) and torch.equal(sigmas, before[1])


def test_the_identity_denoiser_keeps_the_noise():
    "D(x) = x means a slope of 0; a solver that overwrites its input would show it."
    torch.testing.assert_close(sample_ode(lambda x, sigma: x, randn(3, 4), edm_sigmas(9)), randn(3, 4)*80)


def test_states_are_aligned_with_sigmas():
    sigmas = edm_sigmas(7)
    states = list(ode_states(bumps(), randn(3, 4), sigmas))
    assert len(states) == len(sigmas) and torch.equal(states[0], randn(3, 4)*80)
    assert torch.equal(states[-1], sample_ode(bumps(), randn(3, 4), sigmas))


def test_part_of_the_way_and_on():
    "Stopping at a level and going on from there is the same as going through."
    denoise, sigmas = bumps(), edm_sigmas(10)
    middle = sample_ode(denoise, randn(3, 4), sigmas[:6])
    torch.testing.assert_close(sample_ode(denoise, middle/sigmas[5], sigmas[5:]), sample_ode(denoise, randn(3, 4), sigmas))


def test_conditioning_reaches_every_call():
    seen = []
    def denoise(x, sigma, class_labels=None, augment_labels=None): seen.append((class_labels, augment_labels)); return x*0.5
    labels = torch.eye(3)
    sample_ode(denoise, randn(3, 4), edm_sigmas(5), class_labels=labels)
    invert_ode(denoise, randn(3, 4), edm_sigmas(5), class_labels=labels)
    rk45(denoise, randn(3, 4), edm_sigmas(5), class_labels=labels)
    assert seen and all(c is labels and a is None for c, a in seen)


def test_the_image_of_a_seed_does_not_depend_on_the_batch():
    x = randn(6, 4)
    torch.testing.assert_close(sample_ode(bumps(), x, edm_sigmas(8))[2:3], sample_ode(bumps(), x[2:3], edm_sigmas(8)), rtol=1e-12, atol=1e-12)


def test_the_loop_never_reads_a_tensor():
    "No .item(), bool() or float() of a tensor between the first call of the denoiser and the last: nothing waits for a device."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self): super().__init__(); self.reads = []
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function): self.reads.append(len(calls))
            return function(*args, **(kwargs or {}))

    for schedule in SCHEDULES.values():
        for solver in (euler, heun, multistep(3)):
            calls, watch = [], Watch()
            def denoise(x, sigma): calls.append(1); return x * 0.5
            with watch: sample_ode(denoise, randn(3, 4), edm_sigmas(9), schedule, solver)
            assert [r for r in watch.reads if 0 < r < len(calls)] == []


def test_grad_modes_and_gradients():
    x = randn(3, 4)
    expected = sample_ode(bumps(), x, edm_sigmas(5))
    with torch.no_grad(): assert torch.equal(sample_ode(bumps(), x, edm_sigmas(5)), expected)
    with torch.inference_mode(): assert torch.equal(sample_ode(bumps(), x, edm_sigmas(5)), expected)
    smooth = lambda x, sigma: torch.tanh(x) / (1 + sigma)
    for schedule in (LINEAR, VP):
        for solver in (heun, rk2(0.5), multistep(2)):
            assert torch.autograd.gradcheck(lambda x: sample_ode(smooth, x, edm_sigmas(4, sigma_max=3.0), schedule, solver), (x.clone().requires_grad_(),))


@pytest.mark.filterwarnings("ignore")
def test_compile():
    "A compiled denoiser, and the sampler traced as a whole; the back-end that generates code is not the subject."
    denoise = lambda x, sigma: torch.tanh(x) / (1 + sigma)
    x, sigmas = randn(3, 4), edm_sigmas(4)
    expected = sample_ode(denoise, x, sigmas)
    torch._dynamo.reset()
    torch.testing.assert_close(sample_ode(torch.compile(denoise, backend="eager", fullgraph=True), x, sigmas), expected)
    torch.testing.assert_close(torch.compile(sample_ode, backend="eager")(denoise, x, sigmas), expected)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_without_synchronisation():
    x, sigmas = randn(64, 3, 8, 8).cuda(), edm_sigmas(18)
    denoise = lambda x, sigma: x * 0.25 / (0.25 + sigma**2)
    expected = sample_ode(lambda x, sigma: x * 0.25 / (0.25 + sigma**2), x.cpu(), sigmas)
    states = ode_states(denoise, x, sigmas)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state in states: pass
    finally: torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(state.cpu(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sample_ode(denoise, x, sigmas.cuda()).cpu(), expected, rtol=1e-9, atol=1e-9)


# ---- bad input ----

@pytest.mark.parametrize("sigmas,message", [([1.0, -0.1], "negative"), ([1.0], "at least two"), ([], "at least two"), ([[1.0, 0.0]], "at least two"),
    ([1.0, 2.0], "decreasing"), ([1.0, 1.0, 0.0], "decreasing"), ([math.nan, 0.0], "finite"), ([math.inf, 0.0], "finite"), ([1.0, 0.0, 0.0], "decreasing")])
def test_bad_sigmas(sigmas, message):
    for run in (sample_ode, invert_ode, ode_states, rk45):
        with pytest.raises(ValueError, match=message): run(bumps(), randn(2, 4), torch.tensor(sigmas, dtype=torch.float64))


def test_sigmas_may_be_a_list():
    assert torch.equal(check_sigmas([2, 1, 0]), torch.tensor([2., 1., 0.], dtype=torch.float64))


@pytest.mark.parametrize("noise,message", [(torch.ones(2, 4, dtype=torch.int64), "int64"), (torch.ones(2, 4, dtype=torch.uint8), "uint8"),
    (torch.ones(2, 4, dtype=torch.complex64), "complex64"), (np.ones((2, 4)), "ndarray"), (torch.tensor(1.0), "batch"), (None, "NoneType")])
def test_bad_noise(noise, message):
    calls = count_nfe(bumps())
    for run in (sample_ode, invert_ode, ode_states, rk45):
        with pytest.raises(ValueError, match=message): run(calls, noise, edm_sigmas(4))
    assert calls.nfe == 0


@pytest.mark.parametrize("wrong", [lambda x: x[:1], lambda x: x[:, :1], lambda x: x.mean(), lambda x: x.unsqueeze(0), lambda x: torch.cat([x, x], 1)])
def test_denoiser_of_another_shape(wrong):
    for run in (sample_ode, invert_ode):
        with pytest.raises(ValueError, match="denoiser returned shape"): run(lambda x, sigma: wrong(x), randn(2, 4), edm_sigmas(4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("schedule", [LINEAR, VP], ids=["linear", "vp"])
def test_nan_names_step_and_sigma(value, schedule):
    sigmas = edm_sigmas(18)
    bad = sigmas[10].item()                       # Heun meets sigma_10 first as the end of step 9
    def denoise(x, sigma):
        D = x * 0.5
        if abs(sigma - bad) < 1e-9: D[1, 2] = value
        return D
    with pytest.raises(ValueError, match=rf"step 9, sigma = {bad:.6g}"): sample_ode(denoise, randn(2, 4), sigmas, schedule)
    with pytest.raises(ValueError, match=rf"step 10, sigma = {bad:.6g}"): sample_ode(denoise, randn(2, 4), sigmas, schedule, euler)


def test_other_non_finite_values():
    noise = randn(2, 4)
    noise[0, 0] = math.nan
    with pytest.raises(ValueError, match="noise given to the sampler"): sample_ode(bumps(), noise, edm_sigmas(4))
    with pytest.raises(ValueError, match="inversion"): invert_ode(lambda x, sigma: x*math.nan, randn(2, 4), edm_sigmas(4))
    once = iter([math.nan])
    with pytest.raises(ValueError, match="second run"): sample_ode(lambda x, sigma: x*next(once, 0.5), randn(2, 4), edm_sigmas(4))
    assert is_finite(randn(3)) and not is_finite(torch.tensor([1.0, math.inf])) and not is_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("dtype,size", [(torch.float16, 60_000.), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float64, 1e308)])
def test_finiteness_is_exact_in_every_precision(dtype, size):
    "Large finite numbers whose sum overflows are finite; one bad element among them is found; nothing is too small."
    x = torch.full((70_000,), size, dtype=dtype)
    assert x.sum().isinf() and is_finite(x) and is_finite(-x) and require_finite(x) is x and is_finite(x[:0])
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[12_345] = bad
        assert not is_finite(y) and not math.isfinite(peak(y)) and not is_finite(y[12_345:12_346])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samplers_do_not_blame_the_denoiser(dtype):
    "32 images of 3x32x32: their sum leaves float16, no element does."
    shrink = lambda x, sigma: x * (0.25 / (0.25 + sigma.double()**2)).to(x.dtype) - (0.9*sigma.double()**2/(0.25 + sigma.double()**2)).to(x.dtype)
    out = sample_ode(shrink, randn(32, 3, 32, 32).to(dtype), edm_sigmas(18), dtype=dtype)
    assert out.dtype == dtype and out.isfinite().all()
    with pytest.raises(ValueError, match="became NaN or infinite at step 0 although the denoiser was finite: the range of torch.float16"):
        sample_ode(lambda x, sigma: x, torch.full((2, 3), 1000., dtype=torch.float16), edm_sigmas(4), dtype=torch.float16)
    assert "second run" in explain_non_finite(bumps(), randn(2, 4), edm_sigmas(4))


def test_what_is_no_state_is_refused_by_every_sampler():
    "dtypes that are no floats, numbers without data, complex levels."
    for run in (sample_ode, invert_ode, rk45, ode_states):
        for bad in (torch.int64, torch.complex64, torch.bool, "float32"):
            with pytest.raises(ValueError, match="dtype must be a floating-point"): run(bumps(), randn(2, 4), edm_sigmas(4), dtype=bad)
        with pytest.raises(ValueError, match="meta device"): run(bumps(), torch.ones(2, 4, device="meta"), edm_sigmas(4))
        with pytest.raises(ValueError, match="real numbers"): run(bumps(), randn(2, 4), edm_sigmas(4) + 0j)
        with pytest.raises(ValueError, match="real numbers"): run(bumps(), randn(2, 4), edm_sigmas(4).to("meta"))
        with pytest.raises(ValueError, match="sequence of numbers"): run(bumps(), randn(2, 4), ["a", "b"])


@pytest.mark.parametrize("levels", ROWS.values(), ids=ROWS)
def test_absurd_numbers_of_steps_are_refused(levels):
    with pytest.raises(ValueError): levels(10**9)


# ---- the spectrum of photographs that chapters 00 and 01 read ----

def test_cosine_moments_and_the_file_of_the_book(monkeypatch):
    from safetensors import safe_open
    monkeypatch.syspath_prepend(ROOT / "studies")
    import spectrum
    basis = spectrum.cosine_basis(8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
    mean, std = randn(3, 8, 8), randn(3, 8, 8, seed=1).abs() + 0.1
    waves = randn(4000, 3, 8, 8, seed=2)
    waves = mean + std * (waves - waves.mean(0)) / waves.std(0)                # these moments exactly
    for found, wanted in zip(spectrum.moments(basis.T @ waves @ basis), (mean, std)): torch.testing.assert_close(found, wanted)
    with safe_open(ROOT / "results" / "cifar10_spectrum.safetensors", "pt") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert {name: value.shape for name, value in stored.items()} == dict(mean=(3, 32, 32), std=(3, 32, 32))
    assert (stored["std"] > 0).all() and stored["std"].max() / stored["std"].min() > 1000
    assert metadata["data"] == "CIFAR-10" and metadata["images"] == "3000" and metadata["split"] == "train" and metadata["note"]
