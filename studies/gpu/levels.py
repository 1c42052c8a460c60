"""The loss at every noise level on photographs that the training did not see (Figure 5a), before and after it."""
import torch

from edm_nb.runs import to_device
from edm_nb.training import loss_per_sigma
from studies.gpu.model import trained

SEEDS = 3       # choices of images and noise


def untrained(denoise):
    "The denoiser whose network returns zeros, as one does that has just been built: its last layer starts at nearly zero."
    def D(x, sigma, **cond):
        sigma = torch.as_tensor(sigma, device=x.device).reshape(-1, 1, 1, 1)
        return denoise.sigma_data**2 / (sigma**2 + denoise.sigma_data**2) * x
    D.sigma_data = denoise.sigma_data
    return D


def levels(report):
    "The weighted loss per value against sigma, before and after the training."
    denoise, source = trained(report)
    data, n = report.data("test"), 8 if report.toy else report.args.level_images
    seen = to_device(data, report.device)
    sigmas = torch.logspace(-2.69897, 1.90309, 3 if report.toy else 17)

    def measure(cell):
        at, found = torch.tensor([cell["sigma"]]), dict(before=untrained(denoise), after=denoise)
        with torch.no_grad():
            return {name: [float(loss_per_sigma(D, seen, at, n, seed)[0]) for seed in range(SEEDS)] for name, D in found.items()}
    rows = report.rows("levels", [dict(sigma=round(float(s), 5), n=n) for s in sigmas], measure)
    return dict(rows=rows, seeds=SEEDS, weights=source, data=data.name, sigma_data=float(denoise.sigma_data))
