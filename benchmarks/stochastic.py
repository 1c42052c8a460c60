"""In-place loops of chapter 02 beside naive ones, with a denoiser that costs almost nothing.

    python benchmarks/stochastic.py            # writes results/stochastic_speed.json
"""
import argparse
import statistics
from pathlib import Path

import torch
from record import RESULTS, hardware_line, now, timed, versions, write_json

from edm_nb.framework import ode_derivative, score
from edm_nb.ode_solvers import Flow, edm_sigmas, heun
from edm_nb.stochastic import add_churn, langevin, MAX_GAMMA, sample_sde, song_beta
from edm_nb.randomness import SeededNoise


def naive_langevin(denoise, x, sigma, n, randn_like):
    "As the chapter states it: churn, then Heun, every result a new tensor."
    flow = Flow(denoise)
    for _ in range(n):
        x_hat, t_hat = add_churn(flow, x, sigma, MAX_GAMMA, 1.0, randn_like)
        x = heun(flow, x_hat, t_hat, sigma)
    return x


def naive_sde(denoise, x, sigmas, beta, randn_like):
    "Equation 6 term by term."
    for t, t_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        dt, rate = t_next - t, beta(t)*abs(t_next - t) if t_next > 0 else 0.0
        x = x + ode_derivative(denoise, x, t)*dt + rate*t**2*score(denoise, x, t) + t*(2*rate)**0.5*randn_like(x)
    return x


def frugal(shape):
    "D = x/2, written into memory that the denoiser owns: what is left is the cost of the loop."
    memory = torch.empty(shape, dtype=torch.float64)
    return lambda x, sigma: torch.mul(x, 0.5, out=memory)


def compare(name, naive, in_place, steps, repeats):
    "Medians of interleaved runs, so that a busy machine hits both alike."
    slow, fast = ([1e3*s/steps for s in times.wall] for times in timed({"naive": naive, "in place": in_place}, repeats).values())
    low, _, high = statistics.quantiles(fast, n=4)
    row = {"name": name, "naive_ms": statistics.median(slow), "in_place_ms": statistics.median(fast), "spread_ms": (high - low)/2,
           "repeats": repeats, "steps": steps}
    print(f"{name}: naive {row['naive_ms']:.3f} ms, in place {row['in_place_ms']:.3f} ms per step")
    return row


def both_loops(label, shape, randn_like, repeats, steps=20):
    "The Langevin and the SDE loop on one shape."
    x, denoise, sigmas, beta = torch.randn(shape, dtype=torch.float64), frugal(shape), edm_sigmas(steps), song_beta()
    yield compare(f"Langevin, {label}", lambda: naive_langevin(denoise, x, 0.5, steps, randn_like),
                  lambda: langevin(denoise, x, 0.5, steps, randn_like=randn_like), steps, repeats)
    yield compare(f"SDE, {label}", lambda: naive_sde(denoise, x, sigmas, beta, randn_like),
                  lambda: sample_sde(denoise, x, sigmas, beta, randn_like), steps, repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS/"stochastic_speed.json")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = [row for label, shape in (("64 × 1×8×8", (64, 1, 8, 8)), ("64 × 3×32×32", (64, 3, 32, 32)), ("64 × 3×64×64", (64, 3, 64, 64)))
            for source, randn_like in (("torch noise", torch.randn_like), ("seeded noise", SeededNoise(range(64)).randn_like))
            for row in both_loops(f"{label}, {source}", shape, randn_like, arguments.repeats)]
    write_json(arguments.out, {"about": "time per step of the loops around a denoiser that costs almost nothing, float64", "rows": rows,
                               "hardware": hardware_line(), "versions": versions(), "date": now()})


if __name__ == "__main__":
    main()
