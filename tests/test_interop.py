"""Other people's packages: networks, samplers, hubs, runtimes, metrics. The reference of every direction is the other package's own code."""
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm_nb import checkpoints, hub as sharing, interop
from edm_nb.checkpoints import CheckpointError
from edm_nb.data import one_hot
from edm_nb.features import CifarFeatures, Pixels, cifar_features, feature_stats, stats_distance
from edm_nb.framework import GaussianDenoiser
from edm_nb.frechet import load_stats
from edm_nb.metrics import Protocol, Score
from edm_nb.networks import tiny
from edm_nb.ode_solvers import edm_sigmas, euler, heun, sample_ode
from edm_nb.preconditioning import Preconditioned, flow_scalings, v_scalings, vp_scalings

LABELS = torch.tensor([3, 1, 2, 0])


def optional(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'edm_nb[dev]' brings it")


def randomised(module, seed=0):
    "The last layers of fresh networks are zeros or nearly so; a test wants answers that depend on everything."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.abs().max() < 1e-3 or p.ndim > 1: p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1)**0.5)
    return module.eval().requires_grad_(False)


def own_net(label_dim=4, channels=1, resolution=8):
    return randomised(tiny(resolution, channels, label_dim, model_channels=8, channel_mult=[1, 2], num_blocks=1,
                           generator=torch.Generator().manual_seed(0)))


def their_unet(classes=4, kind="UNet2DModel", channels=1, **more):
    diffusers = optional("diffusers")
    torch.manual_seed(0)
    if kind == "UNet2DModel":
        sizes = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
    else:
        sizes = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                     attention_head_dim=8, cross_attention_dim=6)
    return randomised(getattr(diffusers, kind)(sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(16, 32), layers_per_block=1,
                                               norm_num_groups=8, num_class_embeds=classes or None, **sizes, **more))


def model_of(which, **settings):
    net = own_net() if which == "ours" else interop.DiffusersNet(their_unet())
    return Preconditioned(net, **{"sigma_data": 0.75, **settings}).eval()


def start(channels=1):
    return torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- diffusers: networks


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_the_loop_of_diffusers_equals_our_euler(which, tmp_path):
    "Their scheduler, step by step, on the UNet read from the folder; it starts at the standard deviation sqrt(σ_max² + 1)."
    diffusers = optional("diffusers")
    D = model_of(which)
    folder = interop.to_diffusers(D, tmp_path / "pipe", sigma_max=60.0, rho=5.0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(12)
    x = start() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        F = pipe.unet(scheduler.scale_model_input(x, t), t, class_labels=LABELS).sample
        x = scheduler.step(F, t, x).prev_sample
    ours = sample_ode(D, start().double() * (60**2 + 1)**0.5 / 60, edm_sigmas(12, 0.002, 60.0, 5.0), solver=euler, class_labels=one_hot(LABELS, 4))
    assert ours.std() > 0.3
    torch.testing.assert_close(x.double(), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_a_pipeline_of_diffusers_draws_from_the_folder(which, tmp_path):
    "Not only the scheduler: the pipeline that model_index.json names, called as its users call it."
    diffusers = optional("diffusers")
    D = model_of(which)
    pipe = diffusers.DiffusionPipeline.from_pretrained(interop.to_diffusers(D, tmp_path / "pipe"))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(4, class_labels=LABELS.tolist(), num_inference_steps=9, generator=torch.Generator().manual_seed(1), output_type="pt").images
    ours = sample_ode(D, start().double() * (80**2 + 1)**0.5 / 80, edm_sigmas(9), solver=euler, class_labels=one_hot(LABELS, 4))
    torch.testing.assert_close(images.double(), (ours / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert 0.05 < images.std()


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_there_and_back(which, tmp_path):
    D = model_of(which, sigma_min=0.01, sigma_max=50.0)
    folder = interop.to_diffusers(D, tmp_path / "pipe")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["sigma_min"], scheduler["sigma_max"], scheduler["sigma_data"]) == (0.01, 50.0, 0.75)     # clamped to what D knows
    back = interop.from_diffusers(folder)
    assert back.config == D.config and not back.training
    sigma = torch.tensor([0.05, 0.5, 5.0, 40.0])
    torch.testing.assert_close(back(start(), sigma, one_hot(LABELS, 4)), D(start(), sigma, one_hot(LABELS, 4)), atol=0, rtol=0)
    assert all(file.stat().st_mode & 0o777 == (folder / "model_index.json").stat().st_mode & 0o777 for file in folder.rglob("*.*") if file.is_file())


def test_half_precision_stays_and_the_class_that_means_none_too(tmp_path):
    D = Preconditioned(interop.DiffusersNet(their_unet(5), null_class=True)).eval()
    assert D.net.label_dim == 4
    D.net.half()
    back = interop.from_diffusers(interop.to_diffusers(D, tmp_path / "pipe"))
    assert back.net.null_class and next(back.parameters()).dtype == torch.float16


def test_a_unet_is_trained_from_a_configuration_and_comes_back_from_its_files(tmp_path):
    optional("diffusers")
    optional("huggingface_hub")
    from edm_nb.configs import TrainConfig
    from edm_nb.runs import train
    table = {"import": "edm_nb.interop:diffusers_net", "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "null_class": True,
             "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
    config = TrainConfig(network=table, images=192, batch=64, lr_rampup=64, ema_halflife=64, log_every=64, save_every=0, label_dropout=0.2)
    for _ in train(config, tmp_path / "run"): pass
    D = checkpoints.load(tmp_path / "run", allow=interop.MAKER)
    labels = one_hot(torch.tensor([3, 1, 9, 0]), 10)
    wanted = D(start(), 1.0, labels), D(start(), 1.0)
    assert D.net.label_dim == 10 and not torch.equal(*wanted)
    folders = sharing.save_pretrained(tmp_path / "run", tmp_path / "hub"), interop.to_diffusers(D, tmp_path / "pipe")
    for back in (sharing.from_pretrained(folders[0]), interop.from_diffusers(folders[1])):
        assert torch.equal(back(start(), 1.0, labels), wanted[0]) and torch.equal(back(start(), 1.0), wanted[1])
    with pytest.raises(CheckpointError, match="no file may run"): checkpoints.load(tmp_path / "run")
    with pytest.raises(ValueError, match="no blocks"): interop.diffusers_net(blocks=3)
    with pytest.raises(ValueError, match="expected one of"): interop.diffusers_net("os.system")
    checkpoints.save(tmp_path / "unet", model_of("theirs"))                  # a UNet that somebody made says how it was made
    torch.testing.assert_close(checkpoints.load(tmp_path / "unet", allow=interop.MAKER)(start(), 1.0, one_hot(LABELS, 4)),
                               model_of("theirs")(start(), 1.0, one_hot(LABELS, 4)), atol=0, rtol=0)


def test_what_the_unet_is_told():
    "c_noise as timestep, numbers of classes, the last of them for no class; what else is given is passed on."
    told = {}
    class Unet(nn.Module):
        config = dict(in_channels=1, sample_size=8, num_class_embeds=5)
        def forward(self, sample, timestep, class_labels=None, return_dict=True, **more):
            told.update(timestep=timestep, labels=class_labels, more=more)
            assert return_dict is False
            return (torch.zeros_like(sample),)
    D = Preconditioned(interop.DiffusersNet(Unet(), null_class=True))
    sigma = torch.tensor([0.1, 1.0, 10.0, 2.0])
    D(start(), sigma, torch.tensor([[0., 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]), encoder_hidden_states=7)
    torch.testing.assert_close(told["timestep"], sigma.log() / 4)
    assert told["labels"].tolist() == [1, 3, 4, 0] and told["more"] == dict(encoder_hidden_states=7)
    D(start(), 1.0)
    assert told["labels"].tolist() == [4, 4, 4, 4]


def test_a_conditional_unet_takes_hidden_states(tmp_path):
    unet = their_unet(0, "UNet2DConditionModel")
    D, text = Preconditioned(interop.DiffusersNet(unet)).eval(), torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    c_skip, c_out, c_in, c_noise = (c.float() for c in D.coefficients(torch.tensor(2.0)))
    F = unet(c_in * start(), c_noise, encoder_hidden_states=text).sample
    torch.testing.assert_close(D(start(), 2.0, encoder_hidden_states=text), c_skip * start() + c_out * F, atol=1e-5, rtol=0)
    back = interop.from_diffusers(interop.to_diffusers(D, tmp_path / "pipe"))
    torch.testing.assert_close(back(start(), 2.0, encoder_hidden_states=text), D(start(), 2.0, encoder_hidden_states=text), atol=0, rtol=0)
    with pytest.raises(ValueError, match="unconditional"): D(start(), 2.0, one_hot(LABELS, 4), encoder_hidden_states=text)


def test_labels_that_cannot_be_said_are_refused():
    D = model_of("theirs")
    with pytest.raises(ValueError, match="no class that means"): D(start(), 1.0)          # would silently be class 0
    with pytest.raises(ValueError, match="one-hot"): D(start(), 1.0, torch.full((4, 4), 0.25))
    with pytest.raises(ValueError, match="augment_labels"): D(start(), 1.0, one_hot(LABELS, 4), torch.zeros(4, 9))
    with pytest.raises(ValueError, match="null_class needs"): interop.DiffusersNet(their_unet(0), null_class=True)


# ---------------------------------------------------------------- diffusers: pipelines that exist


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_ddim_pipeline_becomes_a_denoiser(schedule, tmp_path):
    "DDIM is Euler in σ: diffusers' scheduler at eta = 0 and our sampler on its levels draw the same images."
    diffusers = optional("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule=schedule, clip_sample=False)
    unet = their_unet(0, channels=3)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(tmp_path / "ddim")
    D = interop.from_diffusers(tmp_path / "ddim")
    scheduler.set_timesteps(20)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps].double()
    sigmas = torch.cat([((1 - alpha) / alpha).sqrt(), torch.zeros(1)])
    assert float(sigmas[0]) <= D.sigma_max and torch.equal(D.round_sigma(sigmas), sigmas)
    x = start(3)
    for t in scheduler.timesteps: x = scheduler.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
    ours = sample_ode(D, start(3).double() / alpha[0].sqrt() / sigmas[0], sigmas, solver=euler)
    torch.testing.assert_close(x.double(), ours, atol=2e-6 * float(ours.abs().max()), rtol=0)
    # the network is told the training step that each level belongs to
    for j in (0, 17, 999):
        level = D.levels[999 - j]
        assert float(D.coefficients(level)[3]) == j


def test_a_flow_matching_pipeline_becomes_a_denoiser(tmp_path):
    diffusers = optional("diffusers")
    unet = their_unet(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "flow")
    D = interop.from_diffusers(tmp_path / "flow")
    assert D.scalings is flow_scalings and D.constants["time_scale"] == 1000
    scheduler.set_timesteps(sigmas=np.linspace(0.95, 0.05, 10).tolist())
    x = start()
    for t in scheduler.timesteps: x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    times = scheduler.sigmas.double()
    sigmas = times / (1 - times)
    ours = sample_ode(D, start().double() / (1 - times[0]) / sigmas[0], sigmas, solver=euler)
    torch.testing.assert_close(x.double(), ours, atol=1e-5, rtol=1e-5)


def test_an_edited_scheduler_counts(tmp_path):
    folder = interop.to_diffusers(model_of("theirs"), tmp_path / "pipe")
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(sigma_data=1.5)))
    assert interop.from_diffusers(folder).sigma_data == 1.5


def damaged(folder, part):
    unet, scheduler, index = folder / "unet", folder / "scheduler/scheduler_config.json", folder / "model_index.json"
    weights = unet / "diffusion_pytorch_model.safetensors"
    edit = lambda file, **values: file.write_text(json.dumps(json.loads(file.read_text()) | values))
    if part == "no index": index.unlink()
    if part == "index is no JSON": index.write_text("{")
    if part == "index is a list": index.write_text("[]")
    if part == "no unet": edit(index, unet=None)
    if part == "foreign class": edit(index, unet=["os", "system"])
    if part == "foreign scheduler": edit(index, scheduler=["diffusers", "UNet2DModel"])
    if part == "unknown scheduler": edit(index, scheduler=["diffusers", "NoScheduler"])
    if part == "no table": edit(index, scheduler=["diffusers", "VQDiffusionScheduler"])
    if part == "v prediction": edit(scheduler, prediction_type="v_prediction")
    if part == "odd sigma_data": edit(scheduler, sigma_data="much")
    if part == "no scheduler": scheduler.unlink()
    if part == "no weights": weights.unlink()
    if part == "a pickle": weights.rename(unet / "diffusion_pytorch_model.bin")
    if part == "cut": weights.write_bytes(weights.read_bytes()[:-100])
    if part == "long": weights.write_bytes(weights.read_bytes() + bytes(20 * 2**20))
    if part == "other sizes": edit(unet / "config.json", block_out_channels=[16, 64])
    if part == "odd sizes": edit(unet / "config.json", block_out_channels="x")
    if part == "huge sizes": edit(unet / "config.json", block_out_channels=[16, 10**7])
    if part == "NaN":
        from safetensors.torch import load_file, save_file
        tensors = load_file(weights)
        tensors["conv_in.weight"][0] = float("nan")
        save_file(tensors, weights)


@pytest.mark.parametrize("part", ["no index", "index is no JSON", "index is a list", "no unet", "foreign class", "foreign scheduler", "unknown scheduler",
                                  "no table", "v prediction", "odd sigma_data", "no scheduler", "no weights", "a pickle", "cut", "long", "other sizes",
                                  "odd sizes", "huge sizes", "NaN"])
def test_a_damaged_or_foreign_folder_is_refused_in_words(part, tmp_path):
    folder = interop.to_diffusers(model_of("theirs"), tmp_path / "pipe")
    damaged(folder, part)
    with pytest.raises(CheckpointError, match="pipe"): interop.from_diffusers(folder)


@pytest.mark.parametrize("settings, words", [(dict(scalings=vp_scalings), "row"), (dict(sigma_data=[0.5]), "per channel")])
def test_what_the_scheduler_cannot_say_is_refused(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words): interop.to_diffusers(model_of("theirs", **settings), tmp_path / "pipe")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_and_a_stranger_are_refused(tmp_path, monkeypatch):
    optional("diffusers")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"): interop.to_diffusers(model_of("ours"), tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="config"): interop.to_diffusers(Preconditioned(nn.Conv2d(1, 1, 1)), tmp_path / "new")
    import diffusers
    def full(self, *args, **more):
        (Path(args[0]) / "half").write_text("half")
        raise OSError("no room")
    monkeypatch.setattr(diffusers.ConsistencyModelPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="no room"): interop.to_diffusers(model_of("ours"), tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["full"]


# ---------------------------------------------------------------- k-diffusion


def k_diffusion(*names):
    "Modules of k-diffusion without the package around them, which imports CLIP, wandb and more."
    spec = None if "k_diffusion" in sys.modules else importlib.util.find_spec("k_diffusion")
    if spec is None and "k_diffusion" not in sys.modules: pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion dctorch torchsde trampoline")
    for needed in ("torchsde", "dctorch", "einops"): optional(needed)
    if spec is not None:
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["k_diffusion"] = package
    return [importlib.import_module(f"k_diffusion.{name}") for name in names]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_our_denoiser_under_the_samplers_of_k_diffusion(solver):
    sampling, = k_diffusion("sampling")
    D, seen = model_of("ours"), []
    def watched(x, sigma, **more):
        seen.append(sigma.shape)
        return D(x, sigma, **more)
    sigmas = sampling.get_sigmas_karras(10, 0.002, 80.0, rho=7.0)
    theirs = getattr(sampling, f"sample_{solver}")(interop.to_k_diffusion(watched), start() * 80, sigmas, disable=True,
                                                   extra_args=dict(class_labels=one_hot(LABELS, 4)))
    ours = sample_ode(D, start().double(), edm_sigmas(10), solver=dict(euler=euler, heun=heun)[solver], class_labels=one_hot(LABELS, 4))
    assert set(seen) == {(4,)} and theirs.dtype == torch.float32
    torch.testing.assert_close(theirs.double(), ours, atol=1e-5, rtol=0)


def test_half_precision_is_answered_in_half_precision():
    D = model_of("ours")
    assert interop.to_k_diffusion(D)(start().half(), torch.ones(4)).dtype == torch.float16


@pytest.mark.parametrize("shape", [(), (4,)])
def test_their_v_denoiser_is_our_row_v(shape):
    "One inner network, their VDenoiser and our row: the same D, for a level of shape [] and [B], from a float64 state."
    external, = k_diffusion("external")
    net = own_net(label_dim=0)
    theirs = interop.from_k_diffusion(external.VDenoiser(net))
    sigma = torch.full(shape, 1.7, dtype=torch.float64) if not shape else torch.tensor([0.02, 0.4, 3.0, 60.0], dtype=torch.float64)
    x = start().double() * 2
    found = theirs(x, sigma)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, Preconditioned(net, v_scalings)(x, sigma), atol=2e-6, rtol=1e-5)


def test_a_k_denoiser_is_asked_as_its_samplers_ask():
    "One level per sample, everything in the precision of its weights; the answer is in ours. Whatever the level's shape here."
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
        def forward(self, x, sigma, **extra):
            assert sigma.shape == (4,) and x.dtype == sigma.dtype == torch.float32 and extra == dict(class_cond=7)
            return x * sigma.reshape(-1, 1, 1, 1)
    denoise = interop.from_k_diffusion(Model())
    for sigma in (2.0, torch.tensor(2.0), torch.tensor([2.0] * 4), torch.tensor([2.0])):
        found = denoise(start().double(), sigma, class_cond=7)
        assert found.dtype == torch.float64 and torch.equal(found, 2 * start().double())


def test_their_edm_denoiser_under_our_sampler():
    layers, sampling = k_diffusion("layers", "sampling")
    theirs = layers.Denoiser(own_net(label_dim=0), sigma_data=0.75)
    ours = sample_ode(interop.from_k_diffusion(theirs), start().double(), edm_sigmas(8), solver=heun)
    reference = sampling.sample_heun(theirs, start() * 80, sampling.get_sigmas_karras(8, 0.002, 80.0), disable=True)
    torch.testing.assert_close(ours, reference.double(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- azula


def azula_schedules():
    noise = optional("azula.noise")
    return [noise.VESchedule(0.002, 80.0), noise.VPSchedule(0.001, 0.001), noise.CosineSchedule(0.01, 0.01), noise.RectifiedSchedule(0.01, 0.002)]


@pytest.mark.parametrize("i", range(4))
def test_azulas_gaussian_is_ours(i):
    "Closed forms of both packages: E[x | x_t] of a Gaussian under every schedule of azula."
    denoise = optional("azula.denoise")
    covariance = pytest.importorskip("azula.linalg.covariance")
    schedule, mean = azula_schedules()[i], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    theirs = interop.from_azula(denoise.GaussianDenoiser(mean, covariance.DiagonalCovariance(std**2), schedule))
    ours = GaussianDenoiser(mean, std)
    x = 3 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma in (theirs.sigma_min * 1.01, 0.1, 1.0, 7.0, theirs.sigma_max / 1.01):
        torch.testing.assert_close(theirs(x, torch.tensor(sigma)), ours(x, sigma), atol=1e-6, rtol=1e-6)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    alpha, level = schedule(t)
    torch.testing.assert_close(interop.schedule_time(schedule, level / alpha), t, atol=1e-9, rtol=1e-6)
    with pytest.raises(ValueError, match="schedule knows"): theirs(x, theirs.sigma_max * 2)


@pytest.mark.parametrize("i", range(4))
def test_our_denoiser_under_azulas_sampler(i):
    "DDIM of azula at eta = 0 is Euler in σ, whatever the schedule; t is [] there."
    sample = optional("azula.sample")
    schedule, D = azula_schedules()[i], model_of("ours")
    sampler = sample.DDIMSampler(interop.to_azula(D, schedule), steps=9, silent=True, dtype=torch.float64)
    alpha, level = schedule(sampler.timesteps)
    sigmas = level / alpha
    x = start().double()
    theirs = sampler(x * level[0], class_labels=one_hot(LABELS, 4))
    flow = x * sigmas[0]
    for a, b in zip(sigmas, sigmas[1:]):
        d = (flow - D(flow, a, one_hot(LABELS, 4))) / a
        flow = flow + (b - a) * d
    torch.testing.assert_close(theirs / alpha[-1], flow, atol=1e-5, rtol=1e-5)


def test_times_of_azula_may_differ_in_a_batch():
    denoise = optional("azula.denoise")
    schedule = azula_schedules()[1]
    D, t = model_of("ours"), torch.tensor([0.1, 0.3, 0.6, 0.9])
    model = interop.to_azula(D, schedule)
    assert isinstance(model, denoise.Denoiser) and isinstance(model.schedule, type(schedule))
    both = model(start(), t, class_labels=one_hot(LABELS, 4)).mean
    for i in range(4):
        one = model(start()[i:i+1], t[i], class_labels=one_hot(LABELS, 4)[i:i+1]).mean
        torch.testing.assert_close(both[i:i+1], one, atol=1e-5, rtol=1e-5)


def test_azulas_karras_denoiser_is_edm_at_sigma_data_1():
    "azula tells its network ln σ, EDM ln σ / 4."
    denoise = optional("azula.denoise")
    class Slower(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
        def forward(self, x, c_noise): return self.net(x, c_noise.reshape(-1).expand(len(x)) / 4)
    net = own_net(label_dim=0)
    theirs = interop.from_azula(denoise.KarrasDenoiser(Slower(net), azula_schedules()[0]))
    ours = Preconditioned(net, sigma_data=1.0)
    sigma = torch.tensor([0.02, 0.4, 3.0, 60.0], dtype=torch.float64)
    torch.testing.assert_close(theirs(start(), sigma), ours(start(), sigma), atol=1e-5, rtol=1e-5)
    found = sample_ode(theirs, start().double(), edm_sigmas(6), solver=heun)
    torch.testing.assert_close(found, sample_ode(ours, start().double(), edm_sigmas(6), solver=heun), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the Hub


def score_of(file):
    protocol = Protocol(features="pixels-1x8x8", features_hash="ab" * 32, n=500, reference="digits", seeds="0-499", sampler="heun 18 steps",
                        nfe=35, model_hash=checkpoints.file_hash(file))
    return Score((1.5, 1.25, 1.75), protocol, 3.0)


def test_a_folder_for_the_hub_holds_model_and_card_with_the_protocol(tmp_path):
    hub = optional("huggingface_hub")
    D = model_of("ours")
    file = checkpoints.save(tmp_path / "run", D, images=123)
    score = score_of(file)
    folder = sharing.save_pretrained(tmp_path / "run", tmp_path / "hub", score=score, name="me/digits", licence="CC0-1.0")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.json", "model.safetensors"}
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "edm_nb" and "diffusion" in card.data.tags and card.data.license == "cc0-1.0"
    block = card.content.split("```json\n")[1].split("```")[0]
    assert Protocol.from_json(block) == score.protocol
    assert "1.5" in card.content and "me/digits" in card.content and "CC0-1.0" in card.content
    back = sharing.from_pretrained(folder)
    assert isinstance(back, Preconditioned) and not back.training
    torch.testing.assert_close(back(start(), 1.0, one_hot(LABELS, 4)), D(start(), 1.0, one_hot(LABELS, 4)), atol=0, rtol=0)
    assert checkpoints.read_config(folder)["extra"] == dict(images=123)                       # notes come along
    assert Score.from_dict(sharing.hub_class().from_pretrained(folder).score) == score


def test_a_score_of_other_weights_is_refused(tmp_path):
    optional("huggingface_hub")
    file = checkpoints.save(tmp_path / "run", model_of("ours"))
    other = score_of(file)
    other = replace(other, protocol=replace(other.protocol, model_hash="0" * 64))
    with pytest.raises(CheckpointError, match="another model"): sharing.save_pretrained(tmp_path / "run", tmp_path / "hub", score=other)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_licence_of_a_checkpoint_goes_with_it(tmp_path):
    hub = optional("huggingface_hub")
    from edm_nb.official import LICENCE_NOTE
    checkpoints.save(tmp_path / "run", model_of("ours"), licence=LICENCE_NOTE)
    card = hub.ModelCard.load(sharing.save_pretrained(tmp_path / "run", tmp_path / "hub") / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0" and LICENCE_NOTE in card.content
    assert checkpoints.read_config(tmp_path / "hub")["licence"] == LICENCE_NOTE
    with pytest.raises(CheckpointError, match="licence of its own"): sharing.save_pretrained(tmp_path / "run", tmp_path / "b", licence="MIT")


def test_push_uploads_that_very_folder(tmp_path, monkeypatch):
    "The mixin's own push, up to the last call, which would need a network."
    hub = optional("huggingface_hub")
    pushed = {}
    def upload(self, *, folder_path, repo_id, **more):
        pushed.update(repo_id=repo_id, files={path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return f"https://hub/{repo_id}/commit"
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, repo_id, **more: types.SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    D = model_of("ours")
    assert "me/digits" in str(sharing.push_to_hub(D, "me/digits", licence="CC0-1.0", private=True))
    assert pushed["repo_id"] == "me/digits" and set(pushed["files"]) >= {"README.md", "model.json", "model.safetensors"}
    assert b"me/digits" in pushed["files"]["README.md"]
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name, content in pushed["files"].items(): (folder / name).write_bytes(content)
    asked = {}
    def snapshot(repo_id, **more):
        asked.update(more, repo_id=repo_id)
        return str(folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(sys.modules["huggingface_hub.hub_mixin"], "hf_hub_download", lambda **more: str(folder / "config.json"))
    back = sharing.from_pretrained("me/digits", revision="abc")
    assert asked["repo_id"] == "me/digits" and asked["revision"] == "abc" and set(asked["allow_patterns"]) == {"model.safetensors", "model.json"}
    torch.testing.assert_close(back(start(), 1.0, one_hot(LABELS, 4)), D(start(), 1.0, one_hot(LABELS, 4)), atol=0, rtol=0)


def test_a_damaged_snapshot_is_refused(tmp_path):
    optional("huggingface_hub")
    folder = sharing.save_pretrained(model_of("ours"), tmp_path / "hub")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"): sharing.from_pretrained(folder)


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_onnxruntime_agrees_for_every_batch(which, tmp_path):
    runtime = optional("onnxruntime")
    for needed in ("onnx", "onnxscript"): optional(needed)
    D = model_of(which)
    session = runtime.InferenceSession(str(interop.to_onnx(D, tmp_path / "d.onnx")), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "sigma", "class_labels"]
    generator = torch.Generator().manual_seed(3)
    for n in (1, 2, 5):
        sigma = 10 ** (4 * torch.rand(n, generator=generator) - 2)
        x = torch.randn(n, 1, 8, 8, generator=generator) * (0.75**2 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        labels = one_hot(torch.randint(4, (n,), generator=generator), 4)
        found, = session.run(None, dict(x=x.numpy(), sigma=sigma.numpy(), class_labels=labels.numpy()))
        wanted = D(x, sigma, labels)
        assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


def test_onnx_without_labels_and_not_in_training_mode(tmp_path):
    runtime = optional("onnxruntime")
    for needed in ("onnx", "onnxscript"): optional(needed)
    D = Preconditioned(own_net(label_dim=0), vp_scalings)
    with pytest.raises(ValueError, match="eval"): interop.to_onnx(D.train(), tmp_path / "d.onnx")
    with pytest.raises(ValueError, match="on meta"): interop.to_onnx(Preconditioned(own_net(label_dim=0)).to("meta").eval(), tmp_path / "d.onnx")
    assert not list(tmp_path.iterdir())
    session = runtime.InferenceSession(str(interop.to_onnx(D.eval(), tmp_path / "d.onnx")), providers=["CPUExecutionProvider"])
    found, = session.run(None, dict(x=start().numpy(), sigma=np.full(4, 2.0, np.float32)))
    torch.testing.assert_close(torch.from_numpy(found), D(start(), torch.full((4,), 2.0)), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- metrics


def two_sets(shape=(3, 32, 32)):
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(0, 256, (700, *shape), generator=generator, dtype=torch.uint8)
    return a[:400], (a[350:] // 2 + 20)


@pytest.mark.parametrize("make", [cifar_features, lambda: Pixels((3, 6, 6))], ids=["cifar-features", "pixels"])
def test_torchmetrics_takes_our_features_and_gives_our_distance(make):
    fid = optional("torchmetrics.image.fid")
    features = make()
    a, b = two_sets(features.shape)
    metric = fid.FrechetInceptionDistance(feature=interop.FeatureModule(features))
    for part in a.split(150): metric.update(part, real=True)
    metric.update(b, real=False)
    ours = stats_distance(feature_stats(b, features), feature_stats(a, features))
    assert ours > 0.05
    assert float(metric.compute()) == pytest.approx(ours, rel=1e-3, abs=1e-4)


def test_a_feature_module_moves_and_our_room_takes_theirs():
    module = interop.FeatureModule(cifar_features())
    assert isinstance(module.to("cpu").features, CifarFeatures) and module.num_features == 448
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 5, dtype=torch.float64)
        def forward(self, images): return self.linear(images.flatten(1).double())
    torch.manual_seed(0)
    one, other = (interop.ModuleFeatures(Net(), "mine", (3, 2, 2)) for _ in range(2))
    assert one.dim == 5 and one.hash != other.hash                                  # other weights, other features
    a, b = two_sets((3, 2, 2))
    stats = [feature_stats(x, one) for x in (a, b)]
    assert stats_distance(*stats) > 0 and stats[0].name == "mine" and one(a).dtype == torch.float32
    with pytest.raises(ValueError, match="different feature networks"): stats_distance(stats[0], feature_stats(b, other))
    with pytest.raises(ValueError, match="mine reads images"): one(torch.zeros(2, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("package", ["pytorch_fid", "cleanfid"])
def test_statistics_files_of_other_packages(package, tmp_path):
    "Written and compared as those packages do it; read by us, the distance is theirs."
    if importlib.util.find_spec(package) is None: pytest.skip(f"pip install --no-deps {package.replace('_', '-').replace('cleanfid', 'clean-fid')}")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 12)), rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12))
    files = []
    for name, feats in (("a", a), ("b", b)):
        np.savez_compressed(tmp_path / f"{name}.npz", mu=np.mean(feats, axis=0), sigma=np.cov(feats, rowvar=False))
        files.append(load_stats(tmp_path / f"{name}.npz"))
    module = importlib.import_module("pytorch_fid.fid_score" if package == "pytorch_fid" else "cleanfid.fid")
    distance = module.calculate_frechet_distance if package == "pytorch_fid" else module.frechet_distance
    theirs = distance(np.mean(a, 0), np.cov(a, rowvar=False), np.mean(b, 0), np.cov(b, rowvar=False))
    assert stats_distance(*files) == pytest.approx(float(theirs), rel=1e-6)


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize("package, extra, call", [
    ("diffusers", "edm_nb\\[diffusers\\]", lambda tmp: interop.to_diffusers(Preconditioned(own_net()), tmp / "x")),
    ("diffusers", "edm_nb\\[diffusers\\]", lambda tmp: interop.network_model.__wrapped__()),
    ("huggingface_hub", "edm_nb\\[hub\\]", lambda tmp: sharing.hub_class.__wrapped__()),
    ("azula.noise", "pip install azula", lambda tmp: interop.to_azula(GaussianDenoiser(0.0, 1.0))),
    ("onnxscript", "edm_nb\\[onnx\\]", lambda tmp: interop.to_onnx(Preconditioned(own_net()), tmp / "x")),
])
def test_a_missing_package_is_named_with_the_line_that_installs_it(package, extra, call, monkeypatch, tmp_path):
    for name in (package, "onnx") if package == "onnxscript" else (package,): monkeypatch.setitem(sys.modules, name, None)     # which, depends on PyTorch
    with pytest.raises(ImportError, match="this needs") as found: call(tmp_path)
    assert "pip install" in str(found.value) and __import__("re").search(extra, str(found.value))


def test_the_module_has_no_other_attributes():
    with pytest.raises(AttributeError, match="NoSuchThing"): interop.NoSuchThing
