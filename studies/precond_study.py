"""Networks trained many ways on the digits: what preconditioning, sigma_data and c_noise do (chapter 03, C23 and C24).

    python studies/precond_study.py                       # all runs of five seeds, about 25 minutes on one core
    python studies/precond_study.py --steps 200 --seeds 1 --out /tmp/study.json     # a quick look

Runs that the result file already holds, made with the same sizes, are kept; so a study that was stopped goes on, and one
with more seeds trains the new ones only.

The data are the 1,797 digits, each blurred by N(0, 0.1²): a density with an exact denoiser D*, so that the error of a
trained network is known without guessing. Every run has the same small MLP, the same Adam, the same number of images and
the same training noise, ln sigma uniform in 0.01..100, with lambda = 1/c_out². Only the thing named by the run differs.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"benchmarks"))
from record import RESULTS, hardware_line, now, versions, write_json  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import silu  # noqa: E402

from edm_nb.data import digits, to_float  # noqa: E402
from edm_nb.oracles import IdealDenoiser  # noqa: E402
from edm_nb.frechet import FeatureStats  # noqa: E402
from edm_nb.features import stats_distance  # noqa: E402
from edm_nb.generation import generate  # noqa: E402
from edm_nb.ode_solvers import edm_sigmas, sample_ode  # noqa: E402
from edm_nb.preconditioning import (  # noqa: E402
    Preconditioned,
    edm_scalings,
    estimate_sigma_data,
    flow_scalings,
    iddpm_scalings,
    v_scalings,
    ve_scalings,
    vp_scalings,
)

BLUR = 0.1


class MLP(nn.Module):
    "F(x; c_noise) for vectors: residual blocks, and DDPM++'s cosine and sine embedding of c_noise in each of them."
    def __init__(self, dim=64, width=192, blocks=2):
        super().__init__()
        self.input, self.embed = nn.Linear(dim, width), nn.Linear(64, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(blocks)])
        self.first = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        self.second = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("freqs", 10000.0 ** -torch.linspace(0, 1, 32))

    def forward(self, x, c_noise):
        angles = c_noise[:, None] * self.freqs
        emb = self.embed(torch.cat([angles.cos(), angles.sin()], 1))
        h = self.input(x) + emb
        for norm, first, second in zip(self.norms, self.first, self.second):
            h = h + second(silu(first(norm(h)) + emb))
        return self.output(h)


class BlurredDigits:
    "The density of the study: draw from it, and its exact denoiser D*."
    def __init__(self):
        self.images = to_float(digits().images).flatten(1)          # [1797, 64]
        self.ideal = IdealDenoiser(self.images)

    def draw(self, n, generator):
        rows = torch.randint(len(self.images), (n,), generator=generator)
        return self.images[rows] + BLUR * torch.randn(n, 64, generator=generator)

    def denoise(self, x, sigma):
        "The centre's posterior mean at variance sigma² + BLUR², then the part of the rest that is signal."
        keep = BLUR**2 / (BLUR**2 + sigma**2)
        return (1 - keep) * self.ideal(x, math.sqrt(sigma**2 + BLUR**2)) + keep * x


def with_c_noise(function):
    "EDM's coefficients with another c_noise."
    def scalings(sigma, sigma_data=0.5):
        return *edm_scalings(sigma, sigma_data)[:3], function(torch.as_tensor(sigma))
    return scalings


def runs(sigma_data):
    "name -> arguments of Preconditioned"
    rows = {"edm": edm_scalings, "vp": vp_scalings, "ve": ve_scalings, "iddpm": iddpm_scalings, "v": v_scalings, "flow": flow_scalings}
    table = {f"row {name}": {"scalings": f, "sigma_data": sigma_data} for name, f in rows.items()}
    for factor in (0.1, 0.3, 3.0, 10.0):
        table[f"sigma_data x{factor:g}"] = {"scalings": edm_scalings, "sigma_data": factor * sigma_data}
    for name, f in {"sigma": lambda s: s, "ln sigma": lambda s: s.log(), "constant": torch.zeros_like}.items():
        table[f"c_noise {name}"] = {"scalings": with_c_noise(f), "sigma_data": sigma_data}
    return table


def train(settings, data, seed, steps, batch):
    "One network from one seed; returns the denoiser and the loss of every hundredth of the run."
    torch.manual_seed(seed)                                         # initial weights
    generator = torch.Generator().manual_seed(1000 + seed)          # data and noise, the same for all runs of a seed
    denoise = Preconditioned(MLP(), **settings)
    optimiser = torch.optim.Adam(denoise.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    losses = []
    for i in range(steps):
        y = data.draw(batch, generator)
        sigma = torch.exp(math.log(0.01) + math.log(1e4) * torch.rand(batch, generator=generator))
        x = y + sigma[:, None] * torch.randn(y.shape, generator=generator)
        weight = denoise.loss_weight(sigma).float()[:, None]
        loss = (weight * (denoise(x, sigma) - y)**2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        losses.append(loss.item())
    chunk = max(1, steps // 100)
    return denoise.eval(), [sum(losses[i:i + chunk]) / chunk for i in range(0, steps - chunk + 1, chunk)]


@torch.no_grad()
def evaluate(denoise, data, n, n_samples):
    "RMS error of D per sigma against D*, the same as an error of F, and samples with their distance to the data."
    generator = torch.Generator().manual_seed(7)
    sigmas = torch.logspace(math.log10(0.01), 2, 21, dtype=torch.float64).tolist()
    errors, f_errors = [], []
    for sigma in sigmas:
        y = data.draw(n, generator)
        x = y + sigma * torch.randn(y.shape, generator=generator)
        rms = (denoise(x, sigma) - data.denoise(x, sigma)).square().mean().sqrt().item()
        c_out = float(denoise.coefficients(sigma)[1].abs().mean())
        errors.append(rms)
        f_errors.append(rms / c_out)
    noise = torch.randn(n_samples, 64, generator=generator)
    def sampler(model, noise, levels, randn_like):                  # no row's own range: all were trained on 0.01 to 100
        return sample_ode(model, noise, edm_sigmas(18, 0.01, 80.0))
    (_, samples, _), = generate(denoise, range(n_samples), batch=n_samples, as_bytes=False, noise=noise.double(), sampler=sampler, shape=(64,))
    target = FeatureStats(64).update(data.draw(50_000, generator).double())
    reached = FeatureStats(64).update(samples.double().clamp(-3, 3))
    return {"sigmas": sigmas, "error": errors, "f_error": f_errors, "sample_std": samples.std().item(),
                "frechet": stats_distance(reached, target)}


def floor(data, n_samples, seeds):
    "The same distance where the samples are fresh draws of the data: what n alone costs."
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(500 + seed)
        target = FeatureStats(64).update(data.draw(50_000, generator).double())
        found.append(stats_distance(FeatureStats(64).update(data.draw(n_samples, generator).double().clamp(-3, 3)), target))
    return found


def begun(out, sizes):
    "The runs of an earlier result of the same sizes, by name."
    if not out.is_file():
        return {}
    old = json.loads(out.read_text())
    return old["runs"] if all(old[key] == value for key, value in sizes.items()) else {}


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n", type=int, default=512, help="draws per noise level in the evaluation")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS / "precond_study.json")
    args = parser.parse_args()
    data, seeds = BlurredDigits(), list(range(args.seeds))
    drawn = data.draw(200_000, torch.Generator().manual_seed(0))
    sigma_data = estimate_sigma_data(drawn.split(10_000)).std
    sizes = {"steps": args.steps, "batch": args.batch, "n": args.n, "n_samples": args.samples, "blur": BLUR}
    done = begun(args.out, sizes)
    result = {"date": now(), "hardware": hardware_line(), "versions": versions(), "seeds": seeds, **sizes,
              "sigma_data": sigma_data, "parameters": sum(p.numel() for p in MLP().parameters()),
              "floor": floor(data, args.samples, seeds), "runs": dict(done)}
    for seed in seeds:
        for name, settings in runs(sigma_data).items():
            entries = result["runs"].setdefault(name, [])
            if any(entry["seed"] == seed for entry in entries):
                continue
            started = time.perf_counter()
            denoise, losses = train(settings, data, seed, args.steps, args.batch)
            entries.append(dict(seed=seed, losses=losses, **evaluate(denoise, data, args.n, args.samples)))
            print(f"{name:20s} seed {seed}  frechet {entries[-1]['frechet']:8.3f}  loss {losses[-1]:.4f}"
                  f"  {time.perf_counter() - started:.0f} s", flush=True)
            write_json(args.out, result, indent=None)


if __name__ == "__main__":
    main()
