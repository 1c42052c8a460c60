"""The hand-written kernels against float64, and updates replayed from a recording against updates that are launched."""
import copy
import dataclasses

import torch

from edm_nb.data import one_hot
from edm_nb.runs import train
from edm_nb.training import edm_loss
from edm_nb.updates import build_denoiser, compiled
from studies.gpu.report import relative, tf32
from studies.gpu.setups import training_config

NETWORKS = {"DDPM++": dict(arch="ddpmpp", model_channels=64, channel_mult=[1, 3], num_blocks=1, attn_resolutions=[16], dropout=0.0),
            "NCSN++": dict(arch="ncsnpp", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[16], dropout=0.0),
            "ADM": dict(arch="adm", model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[16], dropout=0.0)}
LIMITS = dict(fp32=1e-4, bf16=3e-2, recorded=1e-4)


TOY = dict(arch="ddpmpp", model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[16], dropout=0.0)


def revived(denoise, seed=1):
    "The denoiser with random weights where it starts at zero: a last layer of 1e-5 would hide every error before it."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoise.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    return denoise


def gradients(denoise, batch, labels, half):
    "Output and all gradients of the loss, in one vector each."
    images, sigma, noise = batch
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        D = denoise(images + sigma[:, None, None, None]*noise, sigma, class_labels=labels)
        loss = edm_loss(denoise, images, sigma, noise, class_labels=labels).mean()
    found = torch.autograd.grad(loss, list(denoise.parameters()), allow_unused=True)
    return D.detach(), torch.cat([g.flatten() for g in found if g is not None])


def compare(report, name):
    "Relative errors of output and gradient, with and without the kernels, in both precisions."
    config = training_config(report)
    config = dataclasses.replace(config, augment=0.0, network=TOY if report.toy else NETWORKS[name])
    exact = revived(build_denoiser(config, report.data("train")))
    generator = torch.Generator().manual_seed(report.args.seed)
    n = 4
    images, noise = (torch.randn(n, 3, 32, 32, generator=generator) for _ in range(2))
    sigma, labels = torch.rand(n, generator=generator)*2 + 0.1, one_hot(torch.arange(n) % 10, 10)
    double = [t.to(report.device).double() for t in (images, sigma, noise, labels)]
    reference = gradients(copy.deepcopy(exact).double().to(report.device), double[:3], double[3], False)
    row = {}
    for how in ("none", "fused"):
        for precision in ("fp32", "bf16"):
            network = compiled(copy.deepcopy(exact).to(report.device).to(memory_format=torch.channels_last), how)
            batch = tuple(t.to(report.device) for t in (images, sigma, noise))
            with tf32(False):
                found = gradients(network, batch, labels.to(report.device), precision == "bf16")
            row[f"{how}_{precision}"] = [relative(a, b) for a, b in zip(found, reference)]
    row["passed"] = all(max(row[f"fused_{p}"]) <= LIMITS[p] for p in ("fp32", "bf16"))
    return row


def recorded(report, precision):
    "Weights and averages after some updates of the engine, from a recording and launched: with dropout, augmentation and labels."
    config = training_config(report, batch=16, precision=precision, lr_rampup=0, log_every=16, save_every=0, grid_every=0, images=128)
    config = dataclasses.replace(config, network=(TOY if report.toy else NETWORKS["DDPM++"]) | dict(dropout=0.1), augment=0.5)
    data, vectors = report.data("train"), {}
    on_gpu = report.device.type == "cuda"
    for way in ("launched", "again", "recorded"):
        *_, last = train(dataclasses.replace(config, cuda_graph=on_gpu and way == "recorded"), data=data, device=report.device)
        weights = [*last.state.denoiser.parameters(), *last.state.ema.averages.values()]
        vectors[way] = torch.cat([p.detach().flatten() for p in weights])
    limit = LIMITS["recorded"] if precision == "fp32" else LIMITS["bf16"]
    return dict(updates=8, repeated=relative(vectors["again"], vectors["launched"]),
                error=(error := relative(vectors["recorded"], vectors["launched"])), passed=error <= limit)


def kernels(report):
    "Our kernels and the recorded update, each against what they replace."
    cells = [dict(what="network", name=name) for name in (["DDPM++"] if report.toy else NETWORKS)] + [dict(what="recorded update", name=p) for p in ("fp32", "bf16")]
    measure = lambda cell: (compare if cell["what"] == "network" else recorded)(report, cell["name"])  # noqa: E731
    rows = report.rows("kernels", cells, measure)
    return dict(rows=rows, limits=LIMITS, passed=all(row.get("passed") for row in rows))
