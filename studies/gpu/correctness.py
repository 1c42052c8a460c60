"""What the device computes against float64 on the CPU: networks, gradients, loss, samplers, augmentation."""
import torch

from edm_nb.augmentation import AugmentPipe, Draw, apply as apply_augment
from edm_nb.framework import MixtureDenoiser
from edm_nb.networks import build_network
from edm_nb.ode_solvers import edm_sigmas, iddpm_sigmas, sample_ode, ve_sigmas, vp_sigmas
from edm_nb.preconditioning import Preconditioned
from edm_nb.randomness import SeededNoise
from edm_nb.stochastic import Churn, sample
from edm_nb.training import edm_loss
from studies.gpu.report import relative, tf32


def gradient(denoise, y, sigma, noise, labels):
    "All gradients of the mean loss as one vector."
    denoise.zero_grad()
    edm_loss(denoise, y, sigma, noise, class_labels=labels).mean().backward()
    return torch.cat([p.grad.flatten() for p in denoise.parameters() if p.grad is not None])


def network_errors(report, arch, generator):
    "One architecture: output, loss and gradient in fp32 and bf16 against float64."
    device, errors = report.device, {}
    config = dict(arch=arch, resolution=16, channels=3, label_dim=10, model_channels=32, num_blocks=1, attn_resolutions=[8])
    denoise = Preconditioned(build_network(config)).eval()
    for p in denoise.parameters():      # an untrained network returns zero, which would hide errors
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() if p.ndim > 1 else 100)**-0.5
    y, noise = torch.randn(2, 8, 3, 16, 16, generator=generator)
    sigma, labels = torch.logspace(-2, 1.5, 8), torch.eye(10)[:8]
    exact = Preconditioned(build_network(config)).double().eval()
    exact.load_state_dict(denoise.state_dict())
    denoise.to(device)
    inputs, batch = (y, sigma.log() / 4, labels), (y, sigma, noise, labels)
    with torch.no_grad():
        F64 = exact.net(*(v.double() for v in inputs))
        loss64 = edm_loss(exact, *(v.double() for v in batch[:3]), class_labels=labels.double())
    gradient64 = gradient(exact, *(v.double() for v in batch))
    for name, enabled in (("fp32", False), ("bf16", True)):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                F = denoise.net(*(v.to(device) for v in inputs))
                loss = edm_loss(denoise, *(v.to(device) for v in batch[:3]), class_labels=labels.to(device))
            slope = gradient(denoise, *(v.to(device) for v in batch))
        errors |= {f"{arch} F {name}": relative(F, F64), f"{arch} loss {name}": relative(loss, loss64),
                   f"{arch} gradient {name}": relative(slope, gradient64)}
    return errors


def sampler_errors(report, generator):
    "Algorithms 1 and 2 in float64, with a denoiser that is exact."
    device = report.device
    means = torch.randn(5, 6, generator=generator).double()
    noise = torch.randn(64, 6, generator=generator).double()
    here, there = MixtureDenoiser(means, 0.3), MixtureDenoiser(means.to(device), 0.3)
    errors = {}
    for name, levels in (("edm", edm_sigmas), ("vp", vp_sigmas), ("ve", ve_sigmas), ("iddpm", iddpm_sigmas)):
        errors[f"sampler {name}"] = relative(sample_ode(there, noise.to(device), levels(18)), sample_ode(here, noise, levels(18)))
    churned = [sample(denoise, noise.to(where), edm_sigmas(18), Churn(20), SeededNoise(range(64)).randn_like)
               for denoise, where in ((here, "cpu"), (there, device))]
    return errors | {"sampler with churn": relative(churned[1], churned[0])}


def augmentation_error(report, generator):
    "The same draw of every transform, on the device and in float64."
    images = torch.rand(64, 3, 32, 32, generator=generator) * 2 - 1
    draw = AugmentPipe(p=1.0).draw(64, generator)
    there = Draw(*(value.to(report.device) for value in vars(draw).values()))
    exact = Draw(*(value.double() for value in vars(draw).values()))
    return {"augmentation fp32": relative(apply_augment(images.to(report.device), there), apply_augment(images.double(), exact)),
            "augmentation labels": relative(there.labels(), exact.labels())}


def limit_of(name):
    "Largest relative error. One rounding is 2⁻²⁴ in fp32 and 2⁻⁹ in bf16; tens of layers add up, and libraries differ in order."
    if "sampler" in name:
        return 1e-10
    if "bf16" not in name:
        return 1e-4
    return 0.02


def correctness(report):
    "Everything that is computed on the device against float64 on the CPU."
    generator, errors = torch.Generator().manual_seed(report.args.seed), {}
    with tf32(False):
        for arch in ("ddpmpp", "ncsnpp", "adm"):
            errors |= network_errors(report, arch, generator)
        errors |= sampler_errors(report, generator)
        errors |= augmentation_error(report, generator)
    limits = {name: limit_of(name) for name in errors}
    failed = [name for name, error in errors.items() if not error < limits[name]]
    return dict(errors=errors, limits=limits, passed=not failed, failed=failed)
