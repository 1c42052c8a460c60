"""What chapter 04 takes from EDM2: a loss weight that is learned, averages of power form, and averages rebuilt from snapshots."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from edm_nb.training import EMA, LossUncertainty, post_hoc_weights, power_beta, power_gamma, profile_product, uncertainty_loss


# ---- learned weight of the loss ----

def test_the_minimum_is_the_logarithm_of_the_mean_loss():
    "By hand: losses 1 and 3 cost least at u = ln 2, where they cost 1 + ln 2."
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    cost = lambda u: uncertainty_loss(losses, torch.full((2,), u, dtype=torch.float64)).mean().item()
    best = math.log(2)
    assert cost(best) == pytest.approx(1 + best) and all(cost(best + step) > cost(best) for step in (-0.05, 0.05))
    u = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    uncertainty_loss(losses, u.expand(2)).mean().backward()
    assert abs(u.grad) < 1e-12


def test_u_finds_the_loss_of_a_level_that_is_known():
    "For a linear denoiser of Gaussian data the expected loss has a closed form; u sees one random loss at a time."
    dice = torch.Generator().manual_seed(0)
    sigma = (torch.rand(20_000, generator=dice) * 5 - 3).exp()
    expected = lambda s: (0.5 + s**2) / (0.2 + s)                                           # any smooth curve; the noise around it is chi squared
    loss = expected(sigma) * torch.randn(20_000, 4, generator=dice).square().mean(1)
    u = LossUncertainty(seed=1)
    assert u(sigma).abs().max() == 0                                                        # the plain loss at first
    adam = torch.optim.Adam(u.parameters(), lr=0.02)
    for k in range(500):
        some = torch.randint(20_000, (512,), generator=dice)
        adam.param_groups[0]["lr"] = 0.02 * (1 - k / 500)
        adam.zero_grad()
        uncertainty_loss(loss[some], u(sigma[some])).mean().backward()
        adam.step()
    levels = torch.linspace(-2.8, 1.8, 12).exp()
    assert (u(levels).exp() / expected(levels) - 1).abs().max() < 0.1


def test_features_have_unit_size_and_depend_on_the_seed_alone():
    a, b, other = LossUncertainty(seed=3), LossUncertainty(seed=3), LossUncertainty(seed=4)
    for net in (a, b, other): nn.init.ones_(net.linear.weight)
    sigma = torch.logspace(-3, 2, 50)
    assert torch.equal(a(sigma), b(sigma)) and not torch.allclose(a(sigma), other(sigma))
    wide = LossUncertainty(features=4096)
    nn.init.normal_(wide.linear.weight, generator=torch.Generator().manual_seed(0))
    assert wide(sigma).square().mean().item() == pytest.approx(4096, rel=0.35)             # 4096 features of mean square 1


# ---- averages of power form ----

@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94), (0.20, 1.83), (12**-0.5 - 1e-9, 0.0)])
def test_gamma_is_the_published_one_and_has_its_width(sigma_rel, gamma):
    found = power_gamma(sigma_rel)
    assert found == pytest.approx(gamma, abs=0.005)
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = tau**found / (tau**found).sum()
    assert math.sqrt((weight * tau**2).sum() - (weight * tau).sum()**2) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 1.83, 6.94])
def test_updates_give_the_integral_of_a_path_in_steps(gamma):
    "Weights that stay still between updates: the average is a sum of differences of t^(gamma + 1)."
    net = nn.Linear(3, 2).double()
    path = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average, batch = EMA(net), 128
    average.averages = {k: v.double() for k, v in average.averages.items()}
    slow = torch.full((2, 3), 1e9, dtype=torch.float64)                                     # the start must leave no trace
    for i, weight in enumerate(path):
        beta = power_beta(batch, gamma, i * batch)
        slow = beta * slow + (1 - beta) * weight
    edges = (np.arange(21) / 20)**(gamma + 1)
    expected = torch.einsum("i,ijk->jk", torch.tensor(np.diff(edges)), path)
    assert torch.allclose(slow, expected, rtol=1e-12)


def test_the_plain_mean_is_gamma_zero():
    net, average = nn.Linear(1, 1), None
    for i in range(10):
        nn.init.constant_(net.weight, float(i))
        average = average or EMA(net)
        average.update(net, power_beta(7, 0.0, 7 * i))
    assert average.averages["weight"].item() == pytest.approx(4.5, rel=1e-6)


# ---- after the fact ----

def closed(a, gamma, t):
    "The average of the path tau^a."
    return (gamma + 1) / (gamma + 1 + a) * t**a


def snapshots(n, last=1.0):
    times = torch.arange(1, n + 1, dtype=torch.float64).repeat(2) * last / n
    return torch.tensor([power_gamma(0.05)] * n + [power_gamma(0.10)] * n, dtype=torch.float64), times


def test_products_of_profiles_are_their_integrals():
    tau = (np.arange(400_000) + 0.5) / 400_000 * 3.0
    profile = lambda gamma, t: (gamma + 1) * np.where(tau <= t, tau, 0.0)**gamma / t**(gamma + 1)
    for one, two in (((2.0, 3.0), (5.5, 3.0)), ((1.0, 1.2), (4.0, 2.5)), ((16.97, 3.0), (6.94, 2.9))):
        expected = (profile(*one) * profile(*two)).sum() * 3.0 / 400_000
        found = profile_product(*(torch.tensor(v, dtype=torch.float64) for v in (*one, *two)))
        assert found.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.12])
def test_a_width_that_was_not_tracked_is_rebuilt_to_a_millionth(a, sigma_rel):
    gammas, times = snapshots(64)
    gamma = power_gamma(sigma_rel)
    x = post_hoc_weights(gammas, times, gamma, 1.0)
    assert x.dtype == torch.float64 and x.sum().item() == pytest.approx(1, abs=1e-12)       # what does not move is exact
    assert abs((x @ closed(a, gammas, times)).item() - closed(a, gamma, 1.0)) < 1e-6


def test_a_snapshot_is_its_own_reconstruction_and_the_unit_of_time_does_not_matter():
    gammas, times = snapshots(8, last=200_000.0)
    x = post_hoc_weights(gammas, times, power_gamma(0.10), 200_000.0)
    assert x[-1].item() == pytest.approx(1, abs=1e-6) and x[:-1].abs().max() < 1e-6
    earlier = post_hoc_weights(gammas, times, power_gamma(0.07), 150_000.0)
    scaled = post_hoc_weights(gammas, times / 200_000, power_gamma(0.07), 0.75)
    assert torch.allclose(earlier, scaled, atol=1e-8)
    assert abs((earlier @ closed(1.0, gammas, times / 200_000)).item() - closed(1.0, power_gamma(0.07), 0.75)) < 5e-3


def test_coefficients_are_the_best_ones():
    "Any other combination that sums to 1 has a profile farther from the one wanted, integrated on a fine grid."
    gammas, times = snapshots(4)
    gamma, tau = power_gamma(0.07), (np.arange(100_000) + 0.5) / 100_000
    profiles = np.stack([(g + 1) * np.where(tau <= t, tau, 0)**g / t**(g + 1) for g, t in zip(gammas.tolist(), times.tolist())])
    gap = lambda x: (((x @ profiles) - (gamma + 1) * tau**gamma)**2).mean()
    best = post_hoc_weights(gammas, times, gamma, 1.0).numpy()
    generator = np.random.default_rng(0)
    for _ in range(20):
        step = generator.normal(size=8) * 1e-2
        assert gap(best + step - step.mean()) > gap(best)


# ---- refusals ----

@pytest.mark.parametrize("call, words", [
    (lambda: power_gamma(0.3), "0.289"), (lambda: power_gamma(0.0), "between 0"), (lambda: power_gamma(math.nan), "between 0"),
    (lambda: power_beta(0, 1.0), "batch"), (lambda: power_beta(1, -1.0), "gamma"), (lambda: power_beta(1, 1.0, -1), "seen"),
    (lambda: uncertainty_loss(torch.zeros(3), torch.zeros(3, 1)), "v for every loss"),
    (lambda: post_hoc_weights(torch.ones(2), torch.ones(3), 1.0, 1.0), "every snapshot"), (lambda: post_hoc_weights(torch.ones(0), torch.ones(0), 1.0, 1.0), "every snapshot"),
    (lambda: post_hoc_weights(torch.ones(2), torch.tensor([0.0, 1.0]), 1.0, 1.0), "> 0"), (lambda: post_hoc_weights(torch.ones(1), torch.ones(1), 1.0, math.nan), "> 0"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words): call()
