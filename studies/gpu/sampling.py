"""Images per second of 18 Heun steps with the paper's network, and how much of the time lies inside it."""
import torch

from edm_nb.data import one_hot
from edm_nb.ode_solvers import edm_sigmas
from edm_nb.stochastic import sample
from edm_nb.updates import build_denoiser
from studies.gpu.report import clock
from studies.gpu.setups import training_config


def sampling(report):
    "Images/s of 18 Heun steps with the paper's network, and the share of the time that is network."
    device, config = report.device, training_config(report)
    steps, batch = (4, 8) if report.toy else (18, report.args.sample_batch)
    sigmas = edm_sigmas(steps)
    labels = one_hot(torch.arange(batch) % 10, 10).to(device)
    noise = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(report.args.seed)).to(device)

    def measure(cell):
        denoise = build_denoiser(config, report.data("train")).to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            denoise = denoise.to(memory_format=torch.channels_last)
        model = denoise if cell["variant"] == "eager" else report.fast(denoise, batch)
        if cell["variant"] == "kernels" and model is denoise:
            raise RuntimeError(report.compile_errors[-1])

        def alone():
            for _ in range(2 * steps - 1):
                model(x, sigma, class_labels=labels)
        x, sigma = noise.double(), torch.ones((), device=device, dtype=torch.float64)
        with torch.no_grad(), report.autocast():
            whole = clock(device, lambda: sample(model, noise, sigmas, class_labels=labels), 5, 1, 15)
            calls = clock(device, alone, 5, 1, 15)
        return dict(steps=steps, images_per_second=batch / whole["median"], n=whole["n"], low=whole["low"], high=whole["high"],
                    inside_network=calls["median"] / whole["median"],
                    overhead_ms_per_step=1e3 * (whole["median"] - calls["median"]) / steps,
                    seconds_for_50000=50_000 * whole["median"] / batch)
    return dict(rows=report.rows("sampling", [dict(variant=name, batch=batch) for name in ("kernels", "eager")], measure),
                target=dict(inside_network=0.95))
