"""Likelihood: closed forms of torch.distributions, orders, probes, units, devices, bad input, and the command."""
import json
import math

import numpy as np
import pytest
import torch
from torch import distributions
from typer.testing import CliRunner

from edm_nb import checkpoints, cli, measuring
from edm_nb.checks import as_time
from edm_nb.data import digits
from edm_nb.framework import LINEAR, VE, GaussianDenoiser, MixtureDenoiser, unscaled, vp_schedule
from edm_nb.likelihood import (
    bits_per_dim, dequantise, exact_divergence, hutchinson, likelihood_estimates, likelihood_states, log_likelihood, standard_error, with_jacobian
)
from edm_nb.networks import tiny
from edm_nb.ode_solvers import count_nfe, dpmpp_2m, edm_sigmas, euler, heun, multistep, rk2
from edm_nb.oracles import IdealDenoiser
from edm_nb.preconditioning import Preconditioned
from edm_nb.randomness import SeededNoise
from edm_nb.runs import choose

VP = vp_schedule()
EXP = unscaled(sigma=lambda t: as_time(t).exp(), sigma_deriv=lambda t: as_time(t).exp(), sigma_inv=lambda sigma: as_time(sigma).log())
MEAN, STD = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.4, 1.5], dtype=torch.float64)
CENTRES = torch.tensor([[-1.0, 0.5], [0.8, 0.9], [0.2, -1.0]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ladder(n, last, first):
    "n steps of one ratio, falling."
    return torch.tensor(np.geomspace(first, last, n + 1))


def normal(sigma):
    "p(x; sigma) of the Gaussian, by another library."
    return distributions.Independent(distributions.Normal(MEAN, (STD**2 + sigma**2).sqrt()), 1)


def bumps(sigma, std=0.4):
    "p(x; sigma) of the mixture, by another library."
    parts = distributions.Independent(distributions.Normal(CENTRES, (std**2 + sigma**2)**0.5), 1)
    return distributions.MixtureSameFamily(distributions.Categorical(SHARES), parts)


ORACLES = {"Gaussian": (GaussianDenoiser(MEAN, STD), normal), "mixture": (MixtureDenoiser(CENTRES, 0.4, SHARES), bumps)}


def drawn(density, n=16):
    torch.manual_seed(0)
    return density.sample((n,)).double()


# ---- exact values ----

@pytest.mark.parametrize("name", ORACLES)
def test_log_p_is_that_of_the_closed_form(name):
    denoise, density = ORACLES[name]
    x = drawn(density(0.1))
    found = log_likelihood(denoise, x, ladder(400, 0.1, 2000), solver=dpmpp_2m)
    assert found.shape == (16,) and found.dtype == torch.float64
    assert (found - density(0.1).log_prob(x)).abs().max() < 0.002


@pytest.mark.parametrize("schedule", [LINEAR, VE, VP, EXP], ids=["linear", "ve", "vp", "exp"])
def test_every_schedule_gives_the_same_number(schedule):
    "With its prior at sigma_max = 20, which all of them reach, and the error of that prior in closed form."
    last, first = 0.1, 20.0
    x = drawn(normal(last))
    grown = MEAN + (x - MEAN) * ((STD**2 + first**2) / (STD**2 + last**2)).sqrt()         # exact path
    expected = distributions.Normal(0, first).log_prob(grown).sum(1) + 0.5 * ((STD**2 + first**2) / (STD**2 + last**2)).log().sum()
    found = log_likelihood(ORACLES["Gaussian"][0], x, ladder(600, last, first), schedule=schedule)
    assert (found - expected).abs().max() < 0.002
    assert (found - normal(last).log_prob(x)).abs().max() > 0.005                        # the prior's own error is really there


@pytest.fixture(scope="module")
def almost_exact():
    "log p of eight samples of the mixture, extrapolated from 512 and 1024 steps."
    denoise, density = ORACLES["mixture"]
    x = drawn(density(0.1), 8)
    walk = lambda n, solver: log_likelihood(denoise, x, ladder(n, 0.1, 50), solver=solver)
    return walk, (4*walk(1024, dpmpp_2m) - walk(512, dpmpp_2m)) / 3


@pytest.mark.parametrize("solver, expected", [(euler, 1), (heun, 2), (rk2(0.5), 2), (multistep(2), 2), (dpmpp_2m, 2)],
                         ids=["euler", "heun", "midpoint", "ab2", "dpmpp"])
def test_log_p_has_the_order_of_its_solver(almost_exact, solver, expected):
    walk, reference = almost_exact
    errors = [(walk(n, solver) - reference).abs().mean().item() for n in (64, 128, 256)]
    assert -np.polyfit(np.log([64, 128, 256]), np.log(errors), 1)[0] == pytest.approx(expected, abs=0.25)


def test_dpmpp_never_sees_the_clock():
    denoise, density = ORACLES["mixture"]
    x = drawn(density(0.1), 4)
    runs = [log_likelihood(denoise, x, ladder(12, 0.1, 80), solver=dpmpp_2m, schedule=s) for s in (LINEAR, VE, VP, EXP)]
    assert all(torch.allclose(run, runs[0], atol=1e-8) for run in runs)
    assert not torch.allclose(runs[0], density(0.1).log_prob(x), atol=0.05)              # so coarse that clocks could differ


def test_the_levels_of_a_sampler_serve():
    denoise, density = ORACLES["mixture"]
    x = drawn(density(0.002), 4)
    found = log_likelihood(denoise, x, edm_sigmas(513, sigma_max=800)[:-1])
    assert (found - density(0.002).log_prob(x)).abs().max() < 0.02


def test_states_go_up_from_the_data():
    denoise, density = ORACLES["mixture"]
    x, levels = drawn(density(0.1), 3).reshape(3, 1, 2), ladder(10, 0.1, 80)
    shaped = MixtureDenoiser(CENTRES[:, None], 0.4, SHARES)
    counter = count_nfe(lambda x, sigma: shaped(x, sigma))
    sigmas, states, freedom = zip(*likelihood_states(counter, x, levels, solver=dpmpp_2m, schedule=VP, divergence=hutchinson(3)))
    assert torch.allclose(torch.tensor(sigmas, dtype=torch.float64), levels.flip(0)) and counter.nfe == 10
    assert len(states) == 11 and torch.allclose(states[0], x) and all(z.shape == x.shape for z in states)
    assert freedom[0].shape == (3, 3) and freedom[0].abs().max() == 0 and (freedom[-1] > freedom[1]).all()
    assert states[-1].std() == pytest.approx(80, rel=0.9)


def test_one_number_per_image_works_as_well():
    denoise = GaussianDenoiser(torch.tensor(0.0, dtype=torch.float64), 0.5)
    x = randn(5) / 2
    found = log_likelihood(denoise, x, ladder(300, 0.1, 500), solver=dpmpp_2m)
    assert torch.allclose(found, distributions.Normal(0, math.hypot(0.5, 0.1)).log_prob(x).double(), atol=0.002)
    assert log_likelihood(ORACLES["mixture"][0], torch.zeros(0, 2), ladder(3, 0.1, 80)).shape == (0,)


# ---- the trace ----

class Linear:
    "D = W x, with a W that is not symmetric."
    W = randn(6, 6, seed=3)

    def __call__(self, x, sigma): return (x.flatten(1) @ self.W.T.to(x)).reshape(x.shape)


def test_with_jacobian_pulls_back():
    x, v = randn(4, 2, 3), randn(4, 2, 3, seed=1)
    D, pull = with_jacobian(Linear(), x, 1.0)
    assert torch.allclose(D.flatten(1), x.flatten(1) @ Linear.W.T) and not D.requires_grad
    assert torch.allclose(pull(v).flatten(1), v.flatten(1) @ Linear.W)
    assert torch.allclose(exact_divergence(Linear(), x, 1.0)[1], Linear.W.trace().expand(4, 1))


def test_exact_trace_is_that_of_the_whole_jacobian():
    denoise, x = ORACLES["mixture"][0], randn(1, 2, seed=2)
    jacobian = torch.autograd.functional.jacobian(lambda z: denoise(z, 0.7), x).reshape(2, 2)
    assert torch.allclose(exact_divergence(denoise, x, 0.7)[1], jacobian.trace().reshape(1, 1))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_have_the_mean_and_variance_of_theory(kind):
    S = (Linear.W + Linear.W.T) / 2
    variance = 2 * (S.square().sum() - (S.diagonal().square().sum() if kind == "rademacher" else 0)).item()
    trace = hutchinson(4, kind, torch.Generator().manual_seed(5))(Linear(), torch.zeros(5000, 6, dtype=torch.float64), 1.0)[1]
    assert trace.shape == (5000, 4)
    assert abs(trace.mean() - Linear.W.trace()) < 4 * math.sqrt(variance / 20_000)
    assert trace.var().item() == pytest.approx(variance, rel=0.1)
    assert torch.corrcoef(trace.T).fill_diagonal_(0).abs().max() < 0.06                  # the probes of one evaluation are independent


def test_signs_are_exact_where_the_jacobian_is_diagonal():
    denoise, x = ORACLES["Gaussian"][0], randn(3, 3)
    traces = hutchinson(2)(denoise, x, 0.5)[1]
    assert torch.allclose(traces, (STD**2 / (STD**2 + 0.25)).sum().expand(3, 2))


def test_log_p_by_probes_is_within_three_standard_errors():
    denoise, density = ORACLES["mixture"]
    x, levels = drawn(density(0.1), 64), ladder(60, 0.1, 500)
    estimates = likelihood_estimates(denoise, x, levels, solver=dpmpp_2m, divergence=hutchinson(16, generator=torch.Generator().manual_seed(0)))
    pulls = (estimates.mean(1) - log_likelihood(denoise, x, levels, solver=dpmpp_2m)) / standard_error(estimates)
    assert (pulls.abs() < 3).double().mean() > 0.95 and 0.6 < pulls.std() < 1.5          # neither too wide nor too narrow


def test_probes_are_fresh_in_every_evaluation_and_follow_their_source():
    denoise, x, levels = ORACLES["mixture"][0], randn(2, 2).expand(2, 2), ladder(20, 0.1, 80)
    asked = []
    def source(x):
        asked.append(randn(*x.shape, seed=len(asked)))
        return asked[-1]
    log_likelihood(denoise, x, levels, solver=dpmpp_2m, divergence=hutchinson(2, randn_like=source))
    assert len(asked) == 40 and len({tuple(v.flatten().tolist()) for v in asked}) == 40
    walk = lambda seed: log_likelihood(denoise, x, levels, divergence=hutchinson(1, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(walk(1), walk(1)) and not torch.equal(walk(1), walk(2))
    by_image = lambda rows: log_likelihood(denoise, x[rows], levels, divergence=hutchinson(1, randn_like=SeededNoise([7 + r for r in rows]).randn_like))
    assert torch.allclose(by_image([0, 1])[1:], by_image([1]), rtol=1e-12)               # an image's probes are its own, whatever the batch


# ---- networks, gradients, modes ----

@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = tiny(resolution=8, channels=1, label_dim=3, model_channels=8, channel_mult=[1], num_blocks=1)
    for p in net.parameters(): p.data += 0.05 * torch.randn(p.shape)
    return Preconditioned(net).eval()


def test_a_network_in_single_precision_gives_a_plain_number(network):
    x, levels, labels = randn(2, 1, 8, 8) / 2, ladder(4, 0.1, 80), torch.eye(3)[:2]
    ask = lambda labels: log_likelihood(network, x, levels, divergence=hutchinson(2, generator=torch.Generator().manual_seed(0)), class_labels=labels)
    a = ask(labels)
    with torch.no_grad(): b = ask(labels)
    assert a.dtype == torch.float64 and not a.requires_grad and torch.equal(a, b)
    assert not torch.equal(a, ask(labels.flip(0)))                                       # labels arrive
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("divergence", ["exact", "probes"])
def test_the_gradient_of_a_network_is_that_of_finite_differences(network, divergence):
    x, levels, direction = randn(1, 1, 8, 8) / 2, ladder(3, 0.5, 20), randn(1, 1, 8, 8, seed=1)
    network = Preconditioned(network.net.double()).eval()
    v = randn(1, 1, 8, 8, seed=2)
    how = dict(divergence="exact" if divergence == "exact" else hutchinson(1, "gaussian", randn_like=lambda x: v), class_labels=torch.eye(3)[:1])
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(network, moving, levels, **how).sum(), moving)
    up, down = (log_likelihood(network, x + step * direction, levels, **how) for step in (1e-3, -1e-3))
    network.net.float()
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / 2e-3).item(), rel=1e-3)


def test_the_gradient_of_log_p_is_the_score():
    denoise, density = ORACLES["mixture"]
    x = drawn(density(0.2), 4).requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(denoise, x, ladder(100, 0.2, 500), solver=dpmpp_2m).sum(), x)
    (score,) = torch.autograd.grad(density(0.2).log_prob(x).sum(), x)
    assert torch.allclose(gradient, score, atol=0.03)


# ---- bits ----

def test_bits_per_dimension_of_what_is_known():
    side = 256 / 127.5                                                                   # all 256 bins
    assert bits_per_dim(torch.tensor([-3072 * math.log(side)]), 3072).item() == pytest.approx(8)
    assert bits_per_dim(torch.tensor(0.0), 5, bin_width=1/256).item() == pytest.approx(8)  # density 1 on [0, 1]
    x, tau = randn(1000, 4), 0.3
    narrow, wide = (bits_per_dim(distributions.Normal(0, scale).log_prob(x * scale).sum(1), 4, bin_width=scale / 100) for scale in (tau, 7 * tau))
    assert torch.allclose(narrow, wide)                                                  # units cancel


def test_dequantised_bits_bound_the_code_length_of_the_bytes():
    tau, centres = 0.05, torch.arange(256, dtype=torch.float64) / 127.5 - 1
    P = distributions.Normal(0, tau).cdf(centres + 1/255) - distributions.Normal(0, tau).cdf(centres - 1/255)
    b = torch.multinomial(P, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    x = dequantise(b.to(torch.uint8)[:, None], generator=torch.Generator().manual_seed(1))
    assert x.dtype == torch.float64 and ((x[:, 0] - centres[b]).abs() <= 0.5/127.5 + 1e-6).all()
    assert abs((x[:, 0] - centres[b]).mean()) < 1e-4 and (x[:, 0] - centres[b]).std().item() == pytest.approx(1 / 127.5 / 12**0.5, rel=0.02)
    bound, exact = bits_per_dim(distributions.Normal(0, tau).log_prob(x).sum(1), 1).mean(), -(P * P.clamp(min=1e-300).log2()).sum()
    assert exact - 0.01 < bound < exact + 0.03


def test_dequantise_takes_floats_widths_and_seeds():
    x = torch.zeros(100, 2)
    a, b = (dequantise(x, 0.125, torch.Generator().manual_seed(seed)) for seed in (0, 0))
    assert torch.equal(a, b) and a.abs().max() <= 0.0625 and a.abs().max() > 0.06


# ---- refusals ----

BAD = {
    "zero at the end": (dict(sigmas=edm_sigmas(4)), "leave it out"),
    "rising": (dict(sigmas=torch.tensor([0.1, 1.0])), "strictly decreasing"),
    "one level": (dict(sigmas=torch.tensor([1.0])), "at least two"),
    "bytes": (dict(x=torch.zeros(2, 2, dtype=torch.uint8)), r"uint8.*\[-1, 1\]"),
    "NaN": (dict(x=torch.full((2, 2), math.nan)), "x must be finite"),
    "a word": (dict(divergence="hutchinson"), r"'exact' or hutchinson\(k\)"),
    "no gradient": (dict(denoise=lambda x, sigma: x.detach() / 2), "differentiable"),
    "ideal denoiser": (dict(denoise=IdealDenoiser(CENTRES.float())), "IdealDenoiser has none"),
    "NaN from the denoiser": (dict(denoise=lambda x, sigma: x * math.nan), "log p must be finite.*rows"),
    "another shape": (dict(denoise=lambda x, sigma: x[:, :1]), "shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changes, words = BAD[name]
    given = dict(denoise=ORACLES["mixture"][0], x=torch.zeros(2, 2), sigmas=ladder(3, 0.1, 80)) | changes
    with pytest.raises(ValueError, match=words):
        log_likelihood(given.pop("denoise"), given.pop("x"), given.pop("sigmas"), **given)


def test_modes_in_which_no_density_exists_are_refused(network):
    x, levels, labels = torch.zeros(1, 1, 8, 8), ladder(2, 0.1, 80), torch.eye(3)[:1]
    with pytest.raises(ValueError, match="eval"):
        log_likelihood(Preconditioned(network.net).train(), x, levels, divergence=hutchinson(1), class_labels=labels)
    network.eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        log_likelihood(network, x, levels, divergence=hutchinson(1), class_labels=labels)


@pytest.mark.parametrize("call, words", [
    (lambda: hutchinson(0), "number of probes"), (lambda: hutchinson(2.0), "number of probes"), (lambda: hutchinson(1, "uniform"), "rademacher"),
    (lambda: standard_error(torch.zeros(3, 1)), "more probes"), (lambda: standard_error(torch.zeros(3)), "k >= 2"),
    (lambda: bits_per_dim(torch.zeros(1), 0), "numbers per image"), (lambda: bits_per_dim(torch.zeros(1), 3, bin_width=0.0), "bin_width"),
    (lambda: dequantise(torch.zeros(2, dtype=torch.int64)), "uint8 or floating"), (lambda: dequantise(torch.zeros(2), math.inf), "bin_width"),
    (lambda: dequantise([1, 2]), "uint8 or floating"),
])
def test_bad_settings_are_refused(call, words):
    with pytest.raises(ValueError, match=words): call()


# ---- the command ----

def edm_nb(*arguments):
    "Run a command in this process."
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


class White(torch.nn.Module):
    "A network whose denoiser is that of N(0, sigma_data²): F = 0."
    def __init__(self, label_dim): super().__init__(); self.label_dim, self.channels, self.resolution = label_dim, 1, 8
    def forward(self, x, c_noise, class_labels=None, augment_labels=None): return 0*x


def test_the_command_measures_what_the_closed_form_says(monkeypatch, tmp_path):
    "White noise is the one density whose log is a sum of squares, in any order of images and batches."
    monkeypatch.setattr(measuring, "models_of", lambda *given: [Preconditioned(White(10), sigma_data=0.5).eval()])
    monkeypatch.setattr(measuring, "known_about", lambda *given: {})
    common = ["likelihood", tmp_path, "--images", "digits", "--n", 6, "--bin-width", 0.125, "--sigma-min", 0.02, "--steps", 400, "--json", "--device", "cpu"]
    done = edm_nb(*common, "--out", tmp_path / "bits.json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "bits.json").read_text())
    images = digits().images[choose(1797, 6)]
    rows = [dequantise(image[None], 0.125, torch.Generator().manual_seed(seed)) for seed, image in enumerate(images)]
    expected = distributions.Normal(0, math.hypot(0.5, 0.02)).log_prob(torch.cat(rows).flatten(1)).sum(1)
    assert result["nats_each"] == pytest.approx(expected.tolist(), abs=0.3)              # signs are exact here, the rest are steps and the prior
    assert result["bits_per_dim"]["mean"] == pytest.approx((-expected / 64 / math.log(2)).mean().item() + 3, abs=0.005)    # an eighth is 3 bits
    assert result["n"] == 6 and result["sigma_max"] == 80 and result["sigma_min"] == 0.02 and result["labels"] and "log p:" in done.stderr
    other = json.loads(edm_nb(*common, "--batch", 2, "--probes", 3).stdout)
    assert other["nats_each"] == pytest.approx(result["nats_each"], abs=1e-6) and other["probes_error"] < 1e-6


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(folder / "model.safetensors", network)
    return folder


@pytest.mark.parametrize("more, words", [
    (["--images", "nowhere"], "no images at nowhere"), (["--images", "digits"], "--no-labels"), (["--images", "digits", "--solver", "magic"], "heun, euler"),
    (["--images", "digits", "--no-labels", "--sigma-min", "90"], "sigma_min < sigma_max"), (["--images", "digits", "--out", "x.png"], ".json"),
    (["--images", "digits", "--no-labels", "--sigma-max", "nan"], "sigma_max is nan"),
])
def test_mistakes_of_the_command_are_one_line(saved, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    done = edm_nb("likelihood", saved, *more, "--n", 2, "--steps", 2, "--device", "cpu")
    lines = [line for line in done.output.splitlines() if line.startswith("edm-nb: ")]
    assert done.exit_code == 2 and len(lines) == 1 and words in lines[0], done.output
    assert list(tmp_path.iterdir()) == []


def test_float_images_get_nats_and_no_bits(saved, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 1, 8, 8), np.float32))
    result = json.loads(edm_nb("likelihood", saved, "--images", tmp_path / "x.npz", "--no-labels", "--n", 2, "--steps", 2, "--probes", 0, "--json", "--device", "cpu").stdout)
    assert result["bits_per_dim"] is None and math.isfinite(result["nats"]["mean"]) and result["probes_error"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_log_p_on_the_gpu():
    denoise, density = ORACLES["mixture"]
    x = drawn(density(0.1), 4)
    found = log_likelihood(denoise, x.cuda(), ladder(200, 0.1, 500), solver=dpmpp_2m)
    host = hutchinson(2, generator=torch.Generator().manual_seed(0))                      # numbers from the CPU serve anywhere
    assert found.is_cuda and likelihood_estimates(denoise, x.cuda(), ladder(9, 0.1, 500), divergence=host).is_cuda
    assert torch.allclose(found.cpu(), log_likelihood(denoise, x, ladder(200, 0.1, 500), solver=dpmpp_2m), atol=1e-8)
