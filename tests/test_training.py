"The mathematics of training: loss, noise levels, averages, guidance, and the arithmetic of the loop."
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm_nb import training as T
from edm_nb import configs, folders, generation, runs, updates
from edm_nb.data import digits, ImageSet
from edm_nb.networks import build_network
from edm_nb.randomness import IndexStream
from edm_nb.framework import GaussianDenoiser
from edm_nb.preconditioning import SCALINGS, Preconditioned, edm_scalings, edm_weight

TOY = dataclasses.replace(configs.PRESETS["toy"], images=640, lr_rampup=128, log_every=320, save_every=0)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Zero(nn.Module):
    "A network that returns zeros, as a freshly initialised one nearly does."
    label_dim = 0

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        return x * self.w


# --- loss ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0, 50.0])
def test_loss_is_one_at_initialisation(sigma):
    "Unit-variance targets and λ c_out² = 1: with F = 0 the expected loss is 1 at every σ."
    y = 0.5 * torch.randn(4096, 1, 8, 8, generator=gen())
    loss = T.edm_loss(Preconditioned(Zero()), y, torch.full((4096,), sigma), generator=gen(1))
    assert loss.shape == (4096,)
    assert loss.mean().item() == pytest.approx(1, abs=0.01)


def test_loss_of_the_exact_denoiser_is_the_posterior_variance():
    "Gaussian data: E‖D − y‖² per value is c²σ²/(c² + σ²), so the weighted loss is known in closed form."
    c, sigma = 0.7, 0.9
    y = c * torch.randn(20_000, 1, 4, 4, generator=gen()).double()
    D = GaussianDenoiser(torch.zeros(1, 4, 4, dtype=torch.float64), c)
    loss = T.edm_loss(D, y, torch.full((20_000,), sigma).double(), sigma_data=0.5, generator=None,
                      noise=torch.randn(y.shape, generator=gen(1)).double()).mean()
    expected = edm_weight(torch.tensor(sigma), 0.5) * c**2 * sigma**2 / (c**2 + sigma**2)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_loss_equals_eq_8():
    "Eq. 2 with D written out equals Eq. 8, the loss of F against its effective target."
    net = nn.Conv2d(1, 1, 3, padding=1)
    F = lambda x, c_noise, **_: net(x) + c_noise[:, None, None, None]
    D, y, n = Preconditioned(F, sigma_data=0.8), torch.randn(6, 1, 5, 5, generator=gen()), torch.randn(6, 1, 5, 5, generator=gen(1))
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 80.0])
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None].float() for c in edm_scalings(sigma, 0.8))
    x = y + sigma[:, None, None, None] * n
    target = (y - c_skip * x) / c_out
    weight = edm_weight(sigma, 0.8)[:, None, None, None] * c_out**2
    eq8 = (weight * (F(c_in * x, c_noise.flatten()) - target)**2).mean((1, 2, 3))
    torch.testing.assert_close(T.edm_loss(D, y, sigma, n), eq8, rtol=2e-3, atol=1e-5)


def test_loss_takes_sigma_data_from_the_denoiser_also_per_channel():
    y, s, n = torch.randn(3, 2, 4, 4, generator=gen()), torch.tensor([0.1, 1.0, 9.0]), torch.randn(3, 2, 4, 4, generator=gen(1))
    one = T.edm_loss(Preconditioned(Zero(), sigma_data=0.5), y, s, n)
    same = T.edm_loss(Preconditioned(Zero(), sigma_data=(0.5, 0.5)), y, s, n)
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, T.edm_loss(Preconditioned(Zero(), sigma_data=(0.5, 2.0)), y, s, n))
    with pytest.raises(ValueError, match="one sigma per image"):
        T.edm_loss(Preconditioned(Zero()), y, torch.ones(2), n)


# --- noise levels -------------------------------------------------------------------------------------------------

def test_quantiles_have_the_distributions_of_table_1():
    n = 200_000
    draw = lambda name: T.draw_sigma(T.QUANTILES[name], n, gen()).double()
    ln = draw("lognormal").log()
    assert ln.mean() == pytest.approx(-1.2, abs=0.01) and ln.std() == pytest.approx(1.2, abs=0.01)
    ve = draw("ve").log()
    assert ve.mean() == pytest.approx((math.log(0.02) + math.log(100)) / 2, abs=0.02)
    assert ve.std() == pytest.approx((math.log(100) - math.log(0.02)) / math.sqrt(12), abs=0.02)
    vp = draw("vp")
    t = ((0.1**2 + 2*19.9*torch.log1p(vp**2)).sqrt() - 0.1) / 19.9
    assert t.mean() == pytest.approx(0.5, abs=0.005) and t.std() == pytest.approx(1/math.sqrt(12), abs=0.005)
    idd = draw("iddpm")
    assert len(idd.unique()) <= 1000 and idd.min() > 0
    levels, counts = idd.unique(return_counts=True)
    assert len(levels) == 1000 and counts.min() > n/1000 * 0.6


def test_flow_and_v_quantiles_have_the_times_that_they_say():
    "Back from σ to the time of each row, by the row's own c_noise."
    n = 200_000
    for row, time in (("flow", lambda s: s/(1 + s)), ("v", lambda s: torch.atan(s)*2/math.pi)):
        t = time(T.draw_sigma(T.QUANTILES[row], n, gen()).double())
        torch.testing.assert_close(t.quantile(torch.linspace(0, 1, 11, dtype=t.dtype)), torch.linspace(0, 1, 11, dtype=t.dtype), atol=0.005, rtol=0)
        torch.testing.assert_close(t[:1000], SCALINGS[row](T.draw_sigma(T.QUANTILES[row], n, gen()).double()[:1000])[3], atol=1e-12, rtol=0)
        t = time(T.draw_sigma(lambda u: T.QUANTILES[f"{row}_logit"](u, mean=0.5, std=0.7), n, gen()).double())
        assert t.logit().mean() == pytest.approx(0.5, abs=0.006) and t.logit().std() == pytest.approx(0.7, abs=0.006)
        low, high = T.QUANTILES[row](torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        assert 0 < low < 2e-5 and 5e4 < high < 1e6                                                    # neither end drowns in rounding


@pytest.mark.parametrize("row", ["flow", "v"])
def test_the_loss_of_a_younger_row_is_the_error_of_what_it_predicts(row):
    "Flow matching: |F − (ε − y)|². v-prediction: |F − (α ε − s y)|² with α = cos φ, s = sin φ, tan φ = σ. Written without any coefficient of Table 1."
    g = gen()
    y, n, sigma = torch.randn(6, 3, 4, 4, generator=g).double(), torch.randn(6, 3, 4, 4, generator=g).double(), torch.tensor([0.01, 0.1, 1, 3, 20, 500]).double()
    answer = torch.randn(6, 3, 4, 4, generator=g).double()
    D = Preconditioned(lambda x, c_noise: answer, SCALINGS[row])
    phi = torch.atan(sigma).reshape(-1, 1, 1, 1)
    target = n - y if row == "flow" else phi.cos()*n - phi.sin()*y
    loss = T.edm_loss(D, y, sigma, n, T.WEIGHTS[row])
    torch.testing.assert_close(loss, (answer - target).square().flatten(1).mean(1), rtol=1e-6, atol=0)


def test_every_row_can_be_trained():
    "Presets of all rows agree in everything but the row, and one update of each is finite."
    rows = configs.table_1_rows(configs.DIGITS) | configs.later_rows(configs.DIGITS)
    assert list(rows) == ["vp", "ve", "iddpm", "edm", "v", "v-logit", "flow", "flow-logit"]
    same = [f.name for f in dataclasses.fields(configs.DIGITS) if f.name not in ("precond", "sigma", "sigma_args", "weight")]
    for name, config in rows.items():
        assert config == configs.PRESETS["digits" if name == "edm" else f"digits-{name}"], name
        assert all(getattr(config, field) == getattr(configs.DIGITS, field) for field in same)
        small = dataclasses.replace(config, images=128, batch=64, lr_rampup=0, log_every=64, save_every=0,
                                    network=dict(arch="tiny", model_channels=8, channel_mult=[1, 2], num_blocks=1))
        *_, record = runs.train(small, device="cpu")
        assert math.isfinite(record.loss) and record.images == 128, name


def test_quantiles_are_increasing_and_finite_at_the_ends():
    u = torch.linspace(1e-16, 1 - 1e-16, 10_001, dtype=torch.float64).clamp(2e-16, 1 - 2e-16)
    for name, quantile in T.QUANTILES.items():
        sigma = quantile(u)
        assert sigma.isfinite().all() and (sigma > 0).all(), name
        assert (sigma.diff() >= 0).all(), name


# --- more data than memory ----------------------------------------------------------------------------------------

MAPPED = """
import dataclasses, resource, sys
import numpy as np, torch
from edm_nb import configs, runs
from edm_nb.data import ImageSet, as_tensor
shape = (1_200_000, 1, 16, 16)
array = np.lib.format.open_memmap(sys.argv[1], "w+", np.uint8, shape)
array[:4096] = np.random.default_rng(0).integers(0, 256, (4096, *shape[1:]))
del array
config = dataclasses.replace(configs.PRESETS["toy"], images=128, batch=64, conditional=False, resolution=16, lr_rampup=0, log_every=64, save_every=0)
train = lambda data: [r.loss for r in runs.train(config, data=data, device="cpu")]
small = ImageSet(torch.randint(256, (500, *shape[1:]), dtype=torch.uint8), name="small")
train(small)                                                                       # libraries are loaded
used = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 150 * 2**20,) * 2)
data = ImageSet(as_tensor(np.load(sys.argv[1], mmap_mode="r")), name="large")
assert runs.shrink(data, 16) is data
print(len(train(runs.shrink(data, 16))), data.images.nbytes // 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_set_larger_than_the_memory_trains_from_the_map(tmp_path):
    "292 MiB of images with 150 MiB of memory to spare: nothing may copy them."
    done = subprocess.run([sys.executable, "-c", MAPPED, tmp_path / "images.npy"], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "292"], done.stderr[-2000:]


def test_what_is_too_large_for_the_memory_is_averaged_down_onto_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("EDM_NB_CACHE", str(tmp_path))
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=gen())
    floats = torch.randn(40, 3, 16, 16, generator=gen())
    in_memory = [runs.shrink(ImageSet(x), 8).images for x in (images, floats)]
    monkeypatch.setattr(runs, "memory_bytes", lambda: 100)
    mapped = [runs.shrink(ImageSet(x), 8).images for x in (images, floats)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(in_memory, mapped))
    maps = Path("/proc/self/maps")
    if maps.exists(): assert str(tmp_path) in maps.read_text()
    assert not list(tmp_path.iterdir())                                              # the file has no name
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: type("Usage", (), dict(free=10)))
    with pytest.raises(ValueError, match="EDM_NB_CACHE"): runs.shrink(ImageSet(images), 8)


# --- averages and learning rate -----------------------------------------------------------------------------------

def test_ema_halflife_and_beta_are_inverse_and_halve():
    beta = T.ema_beta(512, 500_000, seen=10**9)
    assert T.ema_halflife(beta, 512) == pytest.approx(500_000)
    assert beta**(500_000 / 512) == pytest.approx(0.5)
    assert T.ema_beta(100, 1000, seen=2000, rampup=0.05) == pytest.approx(0.5)     # ramp: half-life 100
    assert T.ema_beta(100, 1000, seen=0) == 0.0


def test_foreach_ema_equals_the_loop():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema, slow = T.EMA(net), [p.detach().clone() for p in net.parameters()]
    for k in range(5):
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn(p.shape, generator=gen(k)))
        beta = T.ema_beta(64, 500, 64 * k)
        slow = [beta*a + (1 - beta)*p for a, p in zip(slow, net.parameters())]
        ema.update(net, beta)
    for a, b in zip(ema.averages.values(), slow): torch.testing.assert_close(a, b)
    live = [p.clone() for p in net.parameters()]
    import copy
    ema.copy_to(copy.deepcopy(net))
    assert all(torch.equal(a, b) for a, b in zip(live, net.parameters()))


def test_learning_rate_ramp():
    assert T.ramped_lr(1e-3, 5, 10) == pytest.approx(5e-4)
    assert T.ramped_lr(1e-3, 50, 10) == T.ramped_lr(1e-3, 0, 0) == 1e-3


# --- configuration ------------------------------------------------------------------------------------------------

def test_configuration_round_trip_and_unknown_keys():
    for name, config in configs.PRESETS.items():
        assert configs.config_from(json.loads(configs.config_json(config))) == config, name
    with pytest.raises(ValueError, match=r"unknown keys \['batchsize'\].*known keys.*batch"):
        configs.config_from({"batchsize": 3})


@pytest.mark.parametrize("change, words", [
    (dict(sigma="normal"), "lognormal"), (dict(batch=0), "positive"), (dict(augment=1.5), "0 to 1"), (dict(precision="fp16"), "bf16"),
    (dict(batch=10, micro_batch=3), "multiple"), (dict(conditional=False, label_dropout=0.1), "labels to drop"),
    # wrong kinds
    (dict(batch="64"), "batch is '64'; expected a positive whole number"), (dict(images=1000.0), "images is 1000.0"), (dict(batch=True), "whole"),
    (dict(channels_last="yes"), "channels_last is 'yes'; expected true or false"), (dict(lr="1e-3"), "lr"), (dict(betas=0.9), "two numbers"),
    (dict(network="tiny"), "network is 'tiny'; expected a table"), (dict(data=" "), "data is ' '"), (dict(sigma=["vp"]), "one of lognormal"),
    # nonsense
    (dict(data_limit=0), "data_limit"), (dict(data_limit=-5), "data_limit"), (dict(ema_rampup=-0.1), "ema_rampup"), (dict(save_every=-1), "save_every"),
    (dict(adam_eps=-1e-8), "adam_eps"), (dict(ema_halflife=float("nan")), "ema_halflife"), (dict(lr=float("inf")), "lr is inf"),
    (dict(betas=(0.9, 1.0)), "two numbers"), (dict(micro_batch=0), "micro_batch"), (dict(lr_rampup=-1), "lr_rampup"),
    # tables
    (dict(sigma_args={"P_men": 0.0}), "sigma_args of 'lognormal' has no P_men; expected some of P_mean, P_std"),
    (dict(sigma="vp", sigma_args={"P_mean": 0.0}), "expected some of epsilon_t, beta_d, beta_min"),
    (dict(sigma_args={"P_std": 0.0}), "positive levels that differ"), (dict(sigma_args={"P_std": -1.2}), "positive levels"),
    (dict(sigma_args={"P_mean": "x"}), "sigma_args.P_mean is 'x'; expected a number"), (dict(augment=0.1, augment_args={"xflp": 0.0}), "xflp; expected some of xflip"),
    (dict(augment=0.1, augment_args={"xflip": 7.0}), "xflip = 7.0"), (dict(network={"arch": "tinny"}), "tinny.*tiny"),
    (dict(network={"arch": "tiny", "model_channel": 8}), "no model_channel; expected some of arch, .*model_channels"),
    (dict(precond={"scalings": "emd"}), "emd"), (dict(precond={"sigma_data": 0}), "sigma_data is 0"), (dict(precond={"sigma_date": 1}), "sigma_date")])
def test_bad_configurations_say_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=words): configs.TrainConfig(**change)


def test_paper_presets_have_the_papers_numbers():
    for arch in ("ddpmpp", "ncsnpp"):
        for c in ("cond", "uncond"):
            p = configs.PRESETS[f"cifar10-{c}-{arch}"]
            assert (p.images, p.batch, p.lr, p.lr_rampup, p.ema_halflife, p.ema_rampup, p.augment) == (
                200_000_000, 512, 1e-3, 10_000_000, 500_000, 0.05, 0.12)
            assert p.network["dropout"] == 0.13 and p.network["channel_mult"] == [2, 2, 2] and p.network["model_channels"] == 128
            assert p.betas == (0.9, 0.999) and p.adam_eps == 1e-8 and p.conditional == (c == "cond") and not p.xflip
    a = configs.PRESETS["cifar10-baseline"]
    assert (a.images, a.batch, a.lr, a.lr_rampup, a.ema_halflife, a.ema_rampup, a.xflip, a.augment) == (
        200_000_000, 128, 2e-4, 640_000, 890_000, None, True, 0)
    assert a.network["dropout"] == 0.10 and a.network["channel_mult"] == [1, 2, 2, 2] and a.sigma == "vp" and a.precond["scalings"] == "vp"


def test_paper_presets_build_the_published_sizes():
    "Parameter counts of the paper's CIFAR-10 networks, built on the meta device from the presets."
    data = ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), "c", tuple("abcdefghij"))
    for name, count in {"cifar10-cond-ddpmpp": 55_735_299, "cifar10-uncond-ddpmpp": 55_733_891, "cifar10-cond-ncsnpp": 56_400_643}.items():
        denoiser = updates.build_denoiser(configs.PRESETS[name], data)
        assert sum(p.numel() for p in denoiser.parameters()) == count, name


def test_presets_at_64_pixels_have_the_papers_numbers_and_sizes():
    "FFHQ-64, AFHQv2-64 and ImageNet-64: hyperparameters of the paper's table, and the published parameter counts, on the meta device."
    def parameters(config, **sizes):
        with torch.device("meta"): return sum(p.numel() for p in build_network(sizes | config.network).parameters())
    for name, dropout in (("ffhq64", 0.05), ("afhqv2-64", 0.25)):
        for arch in ("ddpmpp", "ncsnpp"):
            p = configs.PRESETS[f"{name}-{arch}"]
            assert (p.images, p.batch, p.lr, p.lr_rampup, p.ema_halflife, p.ema_rampup, p.augment, p.conditional) == (
                200_000_000, 256, 2e-4, 10_000_000, 500_000, 0.05, 0.15, False)
            assert p.network["dropout"] == dropout and p.network["channel_mult"] == [1, 2, 2, 2] and p.network["model_channels"] == 128
            count = parameters(p, augment_dim=9)
            assert count == {"ddpmpp": 61_805_571}.get(arch, count)
    p = configs.PRESETS["imagenet64-adm"]
    assert (p.images, p.batch, p.lr, p.lr_rampup, p.ema_halflife, p.ema_rampup, p.augment, p.xflip, p.conditional) == (
        2_500_000_000, 4096, 1e-4, 10_000_000, 50_000_000, 0.05, 0, False, True)
    assert p.network["dropout"] == 0.10 and p.network["channel_mult"] == [1, 2, 3, 4] and p.network["model_channels"] == 192
    assert parameters(p) == 295_899_267
    for name in ("ffhq64-ddpmpp", "imagenet64-adm"):
        text = configs.describe(configs.PRESETS[name])
        assert "gpu_hours" in text and "GFLOP" in text


def test_presets_at_64_pixels_refuse_data_that_do_not_fit(tmp_path):
    face, imagenet = configs.PRESETS["ffhq64-ddpmpp"], configs.PRESETS["imagenet64-adm"]
    for config in (face, imagenet):
        with pytest.raises(ValueError, match=r"not shipped.*--data"): runs.load_data(config)
    def saved(side, labels=None):
        path = tmp_path/f"{side}.npz"
        extra = {} if labels is None else dict(labels=labels)
        np.savez(path, images=np.zeros((3, 3, side, side), np.uint8), **extra)
        return str(path)
    with pytest.raises(ValueError, match="32 pixels.*64"): runs.load_data(dataclasses.replace(face, data=saved(32)))
    with pytest.raises(ValueError, match="does not divide"): runs.load_data(dataclasses.replace(face, data=saved(96)))
    assert runs.load_data(dataclasses.replace(face, data=saved(128))).images.shape[2:] == (64, 64)
    few = runs.load_data(dataclasses.replace(imagenet, data=saved(64, np.array([0, 1, 2]))))
    with pytest.raises(ValueError, match="label_dim is 1000, but the data make it 3"): updates.build_denoiser(imagenet, few)
    with pytest.raises(ValueError, match="labels"): runs.check_data(imagenet, runs.load_data(dataclasses.replace(imagenet, data=saved(64))))


def test_each_ladder_row_keeps_the_rows_above():
    rows = configs.cifar10_ladder()
    assert list(rows) == list("ABCDEF")
    assert dataclasses.replace(rows["F"], expected={}) == dataclasses.replace(configs.PRESETS["cifar10-cond-ddpmpp"], expected={})
    changed = [{f.name for f in dataclasses.fields(b) if getattr(a, f.name) != getattr(b, f.name)} for a, b in zip(list(rows.values()), list(rows.values())[1:])]
    assert changed[1] == {"network"} and changed[2] == {"precond"} and changed[3] == {"sigma", "weight"} and changed[4] == {"xflip", "augment"}


# --- the loop -----------------------------------------------------------------------------------------------------

def weights(state):
    return torch.cat([p.detach().flatten() for p in state.denoiser.parameters()])


def last(config, **arguments):
    for record in runs.train(config, device="cpu", **arguments): pass
    return record


def test_training_is_a_function_of_its_configuration():
    a, b = last(TOY), last(TOY)
    assert torch.equal(weights(a.state), weights(b.state)) and a.loss == b.loss
    assert not torch.equal(weights(a.state), weights(last(dataclasses.replace(TOY, seed=1)).state))


def test_what_the_caller_draws_between_records_does_not_matter():
    config = dataclasses.replace(TOY, network=dict(TOY.network, dropout=0.2))
    quiet = weights(last(config).state)
    for record in runs.train(config, device="cpu"): torch.randn(17)
    assert torch.equal(quiet, weights(record.state))


@pytest.mark.parametrize("double, limit", [(True, 1e-6), (False, 1e-4)])
def test_gradient_accumulation_equals_the_full_batch(double, limit):
    data, config = digits(), dataclasses.replace(TOY, augment=0.5)
    b = updates.make_batch(config, data, IndexStream(len(data), 1), 0, torch.device("cpu"))
    if double: b = updates.Batch(b.images.double(), b.sigma.double(), b.noise.double(), b.cond)
    def gradient(config):
        state = updates.new_state(config, data, torch.device("cpu"))
        if double: state.denoiser.double()
        updates.backward(state.denoiser, state, b)
        return torch.cat([p.grad.flatten() for p in state.denoiser.parameters()])
    full = gradient(config)
    for micro in (8, 32):
        assert (full - gradient(dataclasses.replace(config, micro_batch=micro))).norm() <= limit * full.norm()


def test_parts_of_a_batch_are_the_whole_batch():
    "Two processes together draw what one draws: images, order, σ, noise, augmentation, dropped labels."
    config, data = dataclasses.replace(TOY, augment=0.5, label_dropout=0.3, xflip=True), digits()
    make = lambda rank, world: updates.make_batch(config, data, IndexStream(len(data), 1), 128, torch.device("cpu"), rank, world)
    whole, parts = make(0, 1), [make(0, 2), make(1, 2)]
    for name in ("images", "sigma", "noise"):
        torch.testing.assert_close(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name), rtol=0, atol=1e-6)
    for k in whole.cond: assert torch.equal(torch.cat([p.cond[k] for p in parts]), whole.cond[k])
    dropped = (whole.cond["class_labels"].sum(1) == 0).float().mean()
    assert 0.1 < dropped < 0.5


def test_digits_training_lowers_the_loss():
    config = dataclasses.replace(TOY, images=6_400, log_every=640)
    losses = [r.loss for r in runs.train(config, device="cpu")]
    assert losses[-1] < 0.8 * losses[0]


def test_bf16_trains_close_to_fp32():
    a, b = last(TOY), last(dataclasses.replace(TOY, precision="bf16"))
    assert a.loss == pytest.approx(b.loss, rel=0.05)
    assert next(b.state.denoiser.parameters()).dtype == torch.float32


def test_unlabelled_data_and_conditional_configuration_is_an_error():
    data = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no labels"): next(runs.train(TOY, data=data))


def test_nonsense_averages_are_errors():
    for change in (dict(batch=0), dict(halflife=-1.0), dict(halflife=math.nan), dict(seen=-1), dict(rampup=-0.1)):
        with pytest.raises(ValueError, match="expected batch > 0"): T.ema_beta(**(dict(batch=64, halflife=500.0, seen=100) | change))
    for beta, batch in ((1.0, 64), (0.0, 64), (-0.5, 64), (0.9, 0)):
        with pytest.raises(ValueError, match="expected 0 < beta < 1"): T.ema_halflife(beta, batch)


def test_loss_and_denoiser_cannot_disagree_about_sigma_data():
    y, s = torch.randn(3, 2, 4, 4, generator=gen()), torch.ones(3)
    for own, other in ((0.5, 0.6), ((0.5, 0.7), 0.5), ((0.5, 0.7), (0.7, 0.5))):
        with pytest.raises(ValueError, match="in the denoiser"): T.edm_loss(Preconditioned(Zero(), sigma_data=own), y, s, sigma_data=other)
        T.edm_loss(Preconditioned(Zero(), sigma_data=own), y, s, sigma_data=own)


def test_loss_per_sigma_goes_where_the_denoiser_is():
    "A denoiser on the meta device takes meta tensors only."
    class Asking(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros((), device="meta"))
        def forward(self, x, sigma, class_labels=None):
            assert {x.device.type, sigma.device.type, class_labels.device.type} == {"meta"}
            raise KeyError("asked")
    with pytest.raises(KeyError, match="asked"): T.loss_per_sigma(Asking(), digits(), torch.tensor([1.0]), n=4)


def rectangles(n=64):
    "Noise of 8 x 16 pixels, two classes."
    return ImageSet(torch.randint(0, 256, (n, 1, 8, 16), generator=gen(), dtype=torch.uint8), torch.arange(n) % 2, "rectangles")


def test_rectangles_train_and_sample_as_rectangles(tmp_path):
    config = dataclasses.replace(TOY, images=128, log_every=64, grid_every=128)
    model = runs.fit(config, data=rectangles(), folder=tmp_path, device="cpu")
    assert model.net.resolution == [8, 16] and generation.image_shape(model) == (1, 8, 16)
    assert folders.sample_grid(model, rows=1, steps=2).shape == (10, 1, 8, 16)
    assert (tmp_path/"samples"/"000000128.png").exists()
    from edm_nb import checkpoints
    assert generation.image_shape(checkpoints.load(tmp_path)) == (1, 8, 16)


def test_a_network_that_does_not_fit_the_data_is_refused():
    for name, value in dict(resolution=16, channels=3, label_dim=11, augment_dim=9).items():
        config = dataclasses.replace(TOY, network=dict(TOY.network, **{name: value}))
        with pytest.raises(ValueError, match=f"network.{name} is {value}, but the data make it"): updates.build_denoiser(config, digits())
    with pytest.raises(ValueError, match="only square"): runs.shrink(rectangles(), 4)


def test_sigma_data_is_compared_with_the_data():
    import warnings
    start = lambda sigma_data, data: next(runs.train(dataclasses.replace(TOY, images=320, precond=dict(scalings="edm", sigma_data=sigma_data)), data=data, device="cpu"))
    with pytest.warns(UserWarning, match="sigma_data is set to 0.3") as caught: start(0.3, digits())
    assert len([w for w in caught if "sigma_data" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(0.75, digits())
        next(runs.train(dataclasses.replace(TOY, images=320, precond=dict(scalings="vp", sigma_data=0.1)), data=digits(), device="cpu"))   # VP does not use it
    flat = ImageSet(torch.full((32, 1, 8, 8), 7, dtype=torch.uint8), torch.zeros(32, dtype=torch.int64), "flat")
    with pytest.raises(ValueError, match="'flat' are equal"): start(0.75, flat)


def test_a_limited_set_is_a_fair_and_fixed_choice(tmp_path):
    "The classes of a sorted folder all take part; the choice is the same for every seed."
    data = digits()
    from edm_nb.data import write_zip
    write_zip(tmp_path/"sorted.zip", data.take(data.labels.sort(stable=True).indices))
    config = dataclasses.replace(TOY, data=str(tmp_path/"sorted.zip"), data_limit=200)
    some = runs.load_data(config)
    assert len(some) == 200 and some.label_dim == 10
    assert (some.labels.bincount(minlength=10) > 8).all()
    assert torch.equal(runs.load_data(dataclasses.replace(config, seed=7)).images, some.images)
    assert len(runs.load_data(dataclasses.replace(config, data_limit=10**6))) == len(data)


def test_facts_tell_sets_apart():
    data = digits()
    one = folders.data_facts(data)
    assert one == folders.data_facts(digits()) and one["n"] == 1797 and one["shape"] == [1, 8, 8] and one["labels"] == "classes"
    changed = data.images.clone(); changed[-1, 0, 7, 7] ^= 1
    relabelled = data.labels.clone(); relabelled[0] = 9 - relabelled[0]
    for other in (dataclasses.replace(data, images=changed), dataclasses.replace(data, labels=relabelled), dataclasses.replace(data, images=data.images.flip(0))):
        assert folders.data_facts(other)["sha256"] != one["sha256"]
    large = folders.data_facts(data, most=data.images.nbytes // 5)          # every fifth or sixth image is summed, in pieces or at once
    assert large["sha256"] != one["sha256"] and large == folders.data_facts(data, most=data.images.nbytes // 5)
    vectors = ImageSet(torch.zeros(4, 4, 8, 8), torch.zeros(4, 3))
    assert folders.data_facts(vectors)["labels"] == "vectors" and folders.data_facts(vectors)["dtype"] == "float32"


def test_grids_of_vector_labels_show_the_data_s_own_labels():
    seen = []
    net = updates.build_denoiser(TOY, digits()).eval()
    plain = net.forward
    net.forward = lambda x, sigma, class_labels=None, **more: (seen.append(class_labels), plain(x, sigma, class_labels))[1]
    vectors = torch.rand(3, 10, generator=gen())
    folders.sample_grid(net, rows=1, steps=1, labels=vectors)
    torch.testing.assert_close(seen[0], vectors[torch.arange(10) % 3], rtol=0, atol=0)
    latents = ImageSet(torch.randn(32, 4, 8, 8, generator=gen()))
    with pytest.raises(ValueError, match="grid_every"): runs.check_data(dataclasses.replace(TOY, conditional=False, grid_every=64), latents)


def test_shrink_averages_blocks():
    data = ImageSet(torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4) * 4)
    assert runs.shrink(data, 2).images.flatten().tolist() == [10, 18, 42, 50]
    with pytest.raises(ValueError, match="divide"): runs.shrink(data, 3)


def test_import_is_light():
    code = "import sys, edm_nb.training; print([m for m in ('sklearn', 'matplotlib', 'tensorboard', 'torchvision') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
