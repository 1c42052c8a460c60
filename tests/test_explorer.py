"""The explorer's JavaScript against the package: a few hundred cases, answered by node to 1e-9; and is the bundle current?"""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edm_nb.framework import LINEAR, TABLE_1, VE, MixtureDenoiser, ode_derivative, score, vp_schedule
from edm_nb.ode_solvers import (
    adams_bashforth_weights,
    count_nfe,
    dpmpp_2m,
    edm_sigmas,
    euler,
    heun,
    iddpm_sigmas,
    multistep,
    ode_states,
    rk2,
    ve_sigmas,
    vp_sigmas,
)
from edm_nb.preconditioning import (
    FLOW,
    edm_scalings,
    flow_scalings,
    iddpm_scalings,
    v_scalings,
    ve_scalings,
    vp_scalings,
)
from edm_nb.stochastic import Churn, churn_gammas, sample_states, sde_states
from edm_nb.training import lognormal_quantile, ve_quantile, vp_quantile
from edm_nb.widgets import exact_path

ROOT = Path(__file__).resolve().parent.parent
EXPLORER, BUNDLE = ROOT / "explorer", ROOT / "book/_static/explorer/explorer.js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="the explorer's numerics need node (https://nodejs.org, or `apt-get install nodejs`)")
f64 = torch.float64

LINE = [[-1.0], [0.0], [1.2]], [0.05, 0.05, 0.08], [0.3, 0.2, 0.5]                        # chapter 00's toy density
PLANE = [[1, 0], [-0.5, 0.87], [-0.5, -0.87]], [0.15, 0.3, 0.1], [0.5, 0.3, 0.2]          # chapter 02's
MIXTURES = [LINE, PLANE]
SCHEDULES = {"linear": LINEAR, "vp": vp_schedule(), "ve": VE, "flow": FLOW}


def oracle(data):
    means, std, weights = (torch.tensor(part, dtype=f64) for part in data)
    return MixtureDenoiser(means, std, weights)


def draws(data, n, sigma, seed):
    return oracle(data).sample(n, sigma, torch.Generator().manual_seed(seed))


def ask(cases):
    "What the JavaScript answers to [[function, *arguments], ...]."
    done = subprocess.run([NODE, EXPLORER / "test/answer.mjs"], input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def compare(pairs, least):
    "Pairs of (case, what Python says): the same to 1e-9, relative where numbers are large."
    assert len(pairs) >= least
    for (case, truth), answer in zip(pairs, ask([case for case, _ in pairs]), strict=True):
        truth = truth.flatten().tolist() if isinstance(truth, torch.Tensor) else truth
        np.testing.assert_allclose(answer, truth, rtol=1e-9, atol=1e-9, err_msg=f"{case[0]} {str(case[1:])[:300]}")


@needs_node
def test_denoiser_score_density_and_posterior():
    pairs = []
    for data in MIXTURES:
        denoise = oracle(data)
        centre = (denoise.weights[:, None] * denoise.means).sum(0)
        for sigma in [0.002, 0.02, 0.1, 0.5, 1.0, 5.0, 80.0]:
            x = draws(data, 6, sigma, seed=1)
            flat, D = x.flatten().tolist(), denoise(x, sigma)
            pairs += [(["D", data, flat, sigma], D), (["score", data, flat, sigma], score(denoise, x, sigma)),
                      (["biased", data, 0.1, 0.2, flat, sigma], 0.8 * (x + 1.1 * (D - x)) + 0.2 * centre)]
            for point in x[:3]:
                joint = denoise.joint(point[None], sigma)[0][0]
                pairs += [(["posterior", data, point.tolist(), sigma], joint.softmax(0)),
                          (["logProb", data, point.tolist(), sigma], joint.logsumexp(0).item())]
    compare(pairs, 120)


@needs_node
def test_schedules_and_slopes():
    pairs = []
    for name, schedule in SCHEDULES.items():
        for t in [1e-3, 0.01, 0.3, 0.7, 0.95]:
            time = torch.tensor(t, dtype=f64)
            sigma = schedule.sigma(time)
            parts = [sigma, schedule.sigma_deriv(time), schedule.scale(time), schedule.scale_deriv(time), schedule.sigma_inv(sigma)]
            pairs.append((["schedule", name, t], [part.item() for part in parts]))
            for data in MIXTURES:
                x = draws(data, 3, float(sigma), seed=2) * schedule.scale(time)
                pairs.append((["slope", data, name, x.flatten().tolist(), t], ode_derivative(oracle(data), x, t, schedule)))
    compare(pairs, 60)


@needs_node
def test_levels_of_all_four_rows():
    pairs = []
    by_row = {"vp": "vpSigmas", "ve": "veSigmas", "iddpm": "iddpmSigmas", "edm": "edmSigmas"}
    again = {"vp": vp_sigmas, "ve": ve_sigmas, "iddpm": iddpm_sigmas, "edm": edm_sigmas}
    rows = {next(key for key in by_row if row.name.lower().startswith(key)): row for row in TABLE_1.values()}
    assert set(rows) == set(by_row)
    for key, row in rows.items():
        for n in [1, 2, 5, 18, 64, 256]:
            pairs += [([by_row[key], n], row.sigmas(n)), ([by_row[key], n], again[key](n))]
    pairs += [(["edmSigmas", n, low, high, rho], edm_sigmas(n, low, high, rho))
              for n in (3, 18) for low, high in [(0.002, 80.0), (0.01, 5.0)] for rho in (1.0, 3.0, 7.0, 40.0)]
    compare(pairs, 60)


@needs_node
def test_scalings_of_every_row():
    rows = {"edmScalings": edm_scalings, "vpScalings": vp_scalings, "veScalings": ve_scalings, "iddpmScalings": iddpm_scalings,
            "vScalings": v_scalings, "flowScalings": flow_scalings}
    compare([([name, sigma], [float(part) for part in function(sigma)])
             for name, function in rows.items() for sigma in [0.01, 0.05, 0.3, 1.0, 4.0, 50.0]], 36)


SOLVERS = {("euler", 0): euler, ("heun", 0): heun, ("rk2", 0.5): rk2(0.5), ("rk2", 2 / 3): rk2(2 / 3), ("rk2", 1): rk2(1.0),
           ("multistep", 2): multistep(2), ("multistep", 3): multistep(3), ("multistep", 4): multistep(4),
           ("dpmpp2m", 0): dpmpp_2m}


@needs_node
def test_every_state_of_every_solver():
    pairs = []
    for data in MIXTURES:
        for key, solver in SOLVERS.items():
            for name, schedule in SCHEDULES.items():
                levels = edm_sigmas(7, 0.01, 10.0)
                noise = torch.randn(3, len(data[0][0]), dtype=f64, generator=torch.Generator().manual_seed(3))
                states = torch.stack(list(ode_states(oracle(data), noise, levels, schedule, solver)))
                pairs.append((["run", data, name, states[0].flatten().tolist(), levels.tolist(), list(key)], states))
    compare(pairs, 72)


@needs_node
def test_evaluations_are_counted_as_the_package_counts_them():
    names = {"euler": euler, "heun": heun, "alpha": rk2(0.5), "multistep": multistep(3), "dpmpp2m": dpmpp_2m}
    cases, truth = [], []
    for name, solver in names.items():
        for n in (2, 5, 18):
            counted = count_nfe(oracle(LINE))
            list(ode_states(counted, torch.zeros(1, 1, dtype=f64), edm_sigmas(n), LINEAR, solver))
            cases.append(["calls", name, n])
            truth.append(counted.nfe)
    assert ask(cases) == truth


@needs_node
def test_adams_bashforth_weights():
    compare([(["adamsBashforthWeights", times, end], adams_bashforth_weights(times, end))
             for times, end in [([3.0], 2.0), ([3.0, 2.5], 2.0), ([5.0, 3.0, 2.5], 2.2), ([9.0, 5.0, 3.0, 2.5], 1.0)]], 4)


def by_quadrature(denoise, x, levels):
    "The exponential integrator by quadrature: D follows a line in lambda = -ln sigma, taken at the middle of the step."
    nodes, weights = np.polynomial.legendre.leggauss(24)
    before = None
    for sigma, after in zip(levels, levels[1:]):
        D = denoise(x, sigma)
        if after == 0:
            return D                                # the limit of a step that is infinitely long in lambda
        start, end = -math.log(sigma), -math.log(after)
        carried = D if before is None else D + (end - start) / 2 * (D - before[1]) / (start - before[0])
        points = (start + end) / 2 + (end - start) / 2 * nodes
        integral = float(((end - start) / 2 * weights * np.exp(points)).sum())   # of e^lambda over the step
        x, before = after / sigma * x + after * integral * carried, (start, D)
    return x


@needs_node
def test_dpm_solver_is_the_exponential_integrator():
    "Against the integral, written here, besides the package's own step in the test above."
    pairs = []
    for data in MIXTURES:
        for n in (1, 2, 3, 8, 20):
            levels = edm_sigmas(n, 0.01, 10.0).tolist()
            x = draws(data, 3, 10.0, seed=4)
            truth = by_quadrature(oracle(data), x, levels)
            for name, schedule in SCHEDULES.items():        # the schedule only dresses it: x/s is the same under all of them
                s = float(schedule.scale(schedule.sigma_inv(torch.tensor(10.0, dtype=f64))))
                pairs.append((["run", data, name, (s * x).flatten().tolist(), levels, ["dpmpp2m", 0]], truth))
    answers = ask([case for case, _ in pairs])
    for (case, truth), states in zip(pairs, answers, strict=True):
        np.testing.assert_allclose(states[-truth.numel():], truth.flatten(), rtol=1e-9, atol=1e-9, err_msg=str(case))


@needs_node
def test_churn_with_given_noise():
    pairs = []
    settings = [dict(S_churn=0.0, S_noise=1.0), dict(S_churn=3.0, S_noise=1.007), dict(S_churn=40.0, S_noise=1.003, S_tmin=0.05, S_tmax=2.0)]
    for data in MIXTURES:
        for name, schedule in SCHEDULES.items():
            for churn in settings:
                for key in [("heun", 0), ("euler", 0), ("multistep", 3)]:
                    levels = edm_sigmas(6, 0.01, 10.0)
                    generator = torch.Generator().manual_seed(5)
                    start = torch.randn(3, len(data[0][0]), dtype=f64, generator=generator)
                    noises = [torch.randn(start.shape, dtype=f64, generator=generator) for _ in range(6)]
                    gammas = churn_gammas(levels, Churn(**churn))
                    used = iter(noise for noise, gamma in zip(noises, gammas) if gamma > 0)
                    states = list(sample_states(oracle(data), start, levels, Churn(**churn), lambda x: next(used), schedule, SOLVERS[key]))
                    pairs.append((["churn", data, name, states[0].flatten().tolist(), levels.tolist(), churn,
                                   [noise.flatten().tolist() for noise in noises], list(key)], states[-1]))
    pairs += [(["churnGammas", edm_sigmas(18).tolist(), churn], churn_gammas(edm_sigmas(18), Churn(**churn))) for churn in settings]
    compare(pairs, 75)


@needs_node
def test_euler_maruyama_with_given_noise():
    pairs = []
    for data in MIXTURES:
        for name, schedule in SCHEDULES.items():
            for beta in (0.0, 0.4, 2.0):
                levels = edm_sigmas(6, 0.01, 10.0)
                start = draws(data, 3, 10.0, seed=6) * schedule.scale(schedule.sigma_inv(levels[:1]))
                noises = [torch.randn(start.shape, dtype=f64, generator=torch.Generator().manual_seed(k)) for k in range(6)]
                used = iter(noises)
                states = list(sde_states(oracle(data), start, levels, lambda t: beta, lambda x: next(used), schedule))
                pairs.append((["sde", data, name, start.flatten().tolist(), levels.tolist(), beta,
                               [noise.flatten().tolist() for noise in noises]], states[-1]))
    compare(pairs, 24)


@needs_node
def test_the_sde_beside_the_churn_adds_as_much_noise():
    "From a state 0 whose D is 0 too, what one step leaves is its noise: the same spread as the climb's."
    still, gammas = ([[0.0]], [0.0], [1.0]), [0.05, 0.2, 0.414]
    rates = ask([["churnRate", gamma] for gamma in gammas])
    steps = ask([["sde", still, "linear", [0.0], [2.0, 1.0], rate, [[1.0]]] for rate in rates])     # |Δt| = 1
    np.testing.assert_allclose([x[0] for x in steps], [2.0 * math.sqrt((1 + gamma)**2 - 1) for gamma in gammas], rtol=1e-12)


@needs_node
def test_training_densities_are_those_of_the_quantile_functions():
    "The density of ln sigma times the slope of the quantile function is 1."
    rows = [("vpDensity", vp_quantile, []), ("veDensity", ve_quantile, []), ("lognormalDensity", lognormal_quantile, [-1.2, 1.2]),
            ("lognormalDensity", lambda u: lognormal_quantile(u, 0.4, 0.7), [0.4, 0.7])]
    cases, slopes = [], []
    for name, function, parameters in rows:
        for u in [0.05, 0.2, 0.5, 0.8, 0.95]:
            u = torch.tensor(u, dtype=f64, requires_grad=True)
            log_sigma = function(u).log()
            log_sigma.backward()
            cases.append([name, log_sigma.exp().item(), *parameters])
            slopes.append(u.grad.item())
    np.testing.assert_allclose(np.array(ask(cases)) * slopes, 1, rtol=1e-9)


@needs_node
def test_the_exact_path_needs_no_solver():
    "Shares of the density stay; and a Heun run of 1,500 steps ends there."
    wide = [[-1.0], [0.0], [1.2]], [0.2, 0.2, 0.2], [0.3, 0.2, 0.5]
    levels = edm_sigmas(1500, 2e-4, 5.0)
    noise = torch.tensor([[-1.7], [-0.2], [0.4], [2.5]], dtype=f64)
    states = list(ode_states(oracle(wide), noise, levels))
    picked = [0, 400, 1100, 1500]
    truth = [[states[i][b].item() for i in picked] for b in range(4)]
    answers = ask([["exactPath", wide, 5.0 * z.item(), 5.0, levels[picked].tolist()] for z in noise])
    by_quantiles = exact_path(oracle(wide), 5.0 * noise[:, 0], 5.0, levels[picked])
    np.testing.assert_allclose(answers, by_quantiles.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(answers, truth, rtol=0, atol=5e-6)
    tails = ask([["normalTail", z] for z in (-9.0, -3.0, -0.5, 0.0, 0.5, 1.0, 2.4999, 2.5001, 4.0, 9.0, 30.0)])
    scipy = pytest.importorskip("scipy.stats")
    np.testing.assert_allclose(tails, scipy.norm.sf([-9.0, -3.0, -0.5, 0.0, 0.5, 1.0, 2.4999, 2.5001, 4.0, 9.0, 30.0]), rtol=1e-12)


@needs_node
def test_distance_sees_a_shift_and_a_scale():
    "Quantile points of one Gaussian, moved by v: the distance along each line is |v| times a cosine."
    data = [[0.0, 0.0]], [1.0], [1.0]
    cloud = draws(data, 2000, 0.0, seed=8)
    moved = (cloud + torch.tensor([3.0, 0.0])).flatten().tolist()
    exact, shifted, wide = ask([["slicedDistance", data, points, 12] for points in (cloud.flatten().tolist(), moved, (4 * cloud).flatten().tolist())])
    assert exact < 0.1 and abs(shifted - 3 / math.sqrt(2)) < 0.1 and abs(wide - 3) < 0.15


# --- the shipped bundle -----------------------------------------------------------------------------------------------


sys.path.insert(0, str(ROOT / "book"))

needs_results = pytest.mark.skipif(not (ROOT / "results/loss_per_sigma.json").is_file(), reason="the source archive has no results/, which are part of the bundle")


@needs_results
def test_the_shipped_bundle_is_current():
    "The bundle names the hash of the sources that it was built from."
    import explorer
    assert BUNDLE.is_file(), "no bundle: run `npm ci && npm run build` in explorer/"
    (recorded,) = re.findall(r"^/\*! edm_nb explorer, sources ([0-9a-f]{64})", BUNDLE.read_text(encoding="utf-8"))
    assert recorded == explorer.source_hash(), "the bundle is stale: run `npm ci && npm run build` in explorer/ and commit it"


@needs_results
def test_a_changed_source_makes_the_bundle_stale(tmp_path):
    import explorer
    shutil.copytree(EXPLORER, tmp_path / "explorer", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=lambda _, names: [n for n in names if not n.endswith(".json")])
    before = explorer.source_hash(tmp_path)
    assert before == explorer.source_hash()
    for path in [*explorer.sources(tmp_path)]:
        old = path.read_bytes()
        path.write_bytes(old + b"\n")
        assert explorer.source_hash(tmp_path) != before, path
        path.write_bytes(old)


def test_the_bundle_loads_nothing():
    "file:// and no network: one classic script, no import, no address to fetch."
    code = BUNDLE.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|export)\b", code, re.M) and "fetch(" not in code and "XMLHttpRequest" not in code
    assert set(re.findall(r"https?://[\w./-]+", code)) <= {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
                                                         "http://www.w3.org/XML/1998/namespace", "http://www.w3.org/2000/xmlns/"}
