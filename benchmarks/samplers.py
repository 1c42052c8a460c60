"""Time of an 18-step Heun sampling (35 evaluations) beside k-diffusion, diffusers and azula.

Every contender solves the same problem: the same 18 noise levels, the same noise, a denoiser that costs one multiplication
(D(x; sigma) = x/2, in the form that the library expects), the state in float64. Before any timing, all results are asserted
equal. Schedules and solver objects are made outside the clock. In each round every contender runs once, in an order that
rotates, so that a slow moment of the machine hits all alike. Reported: median and quartiles over the rounds.

    python benchmarks/samplers.py                     # writes results/bench_samplers.json
    python benchmarks/samplers.py --batches 1 64 --rounds 20

The peers are optional: those not installed are named and left out (`pip install k-diffusion diffusers azula`).
"""
import argparse, statistics
from pathlib import Path
import torch
from record import RESULTS, hardware, now, timed, versions, write_json
from edm_nb.ode_solvers import edm_sigmas, sample_ode

N = 18                                     # steps
HALF = 0.5                                 # D(x; sigma) = x/2


def ours(sigmas, noise):
    "edm_nb.ode_solvers.sample_ode with its defaults, input checks included."
    return lambda: sample_ode(lambda x, sigma: x * HALF, noise, sigmas)


def calls_alone(sigmas, noise):
    "The 35 calls of the denoiser and nothing else: what no sampler can undercut."
    def run():
        for _ in range(2*N - 1): D = noise * HALF
        return D
    return run


def k_diffusion(sigmas, noise):
    "k-diffusion's sample_heun, in the precision of `noise`; the progress bar is off."
    from k_diffusion.sampling import sample_heun
    sigmas, x = sigmas.to(noise.dtype), noise * sigmas[0].item()
    return lambda: sample_heun(lambda x, sigma: x * HALF, x, sigmas, disable=True)


def diffusers(sigmas, noise):
    "diffusers' HeunDiscreteScheduler with our levels; its model predicts the noise, (x - D)/sigma, from a scaled input."
    from diffusers import HeunDiscreteScheduler
    scheduler = HeunDiscreteScheduler(prediction_type="epsilon")
    scheduler.set_timesteps(N)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)]).tolist()   # the level of each call
    factors = [HALF * (sigma**2 + 1)**0.5 / sigma for sigma in levels]
    start = noise * sigmas[0]
    def run():
        scheduler.prev_derivative = scheduler.dt = scheduler._step_index = None
        scheduler.set_begin_index(0)
        x = start
        for t, factor in zip(scheduler.timesteps, factors):
            x = scheduler.step(scheduler.scale_model_input(x, t) * factor, t, x).prev_sample
        return x
    return run


def azula(sigmas, noise):
    "azula's HeunSampler down to the last positive level, then its Euler step to 0 (its Heun divides by sigma = 0 there)."
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule
    from azula.sample import EulerSampler, HeunSampler

    class Linear(Schedule):
        def __call__(self, t): return torch.ones_like(t), t

    class Half(Denoiser):
        schedule = Linear()
        def forward(self, x_t, t, **kwargs): return DiracPosterior(mean=x_t * HALF)

    class Levels(HeunSampler):
        timesteps = sigmas[:-1]

    denoiser, start = Half(), noise * sigmas[0]
    heun, euler = Levels(denoiser, silent=True), EulerSampler(denoiser, silent=True)
    def run():
        with torch.no_grad(): return euler.step(heun(start), sigmas[-2], sigmas[-1])
    return run


def contenders(sigmas, noise):
    "Name -> a function of no arguments that samples; and the names of peers that are not installed."
    makers = {"edm_nb": ours, "k-diffusion": k_diffusion, "diffusers": diffusers, "azula": azula}
    ready, missing = {}, []
    for name, make in makers.items():
        try: ready[f"{name} float64"] = make(sigmas, noise)
        except ImportError as error: missing.append(f"{name}: {error}")
    if "k-diffusion float64" in ready: ready["k-diffusion float32"] = k_diffusion(sigmas, noise.float())
    return ready, missing


def measure(batch, rounds, seed):
    "Times in seconds, name -> one number per round."
    sigmas = edm_sigmas(N)
    noise = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    runs, missing = contenders(sigmas, noise)
    expected = runs["edm_nb float64"]()
    for name, run in runs.items():
        tolerance = 2e-4 if "float32" in name else 1e-10
        torch.testing.assert_close(run().double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")
    runs["35 denoiser calls alone"] = calls_alone(sigmas, noise)
    return {name: times.wall for name, times in timed(runs, rounds).items()}, missing


def summary(times):
    "Milliseconds: median, quartiles, fastest."
    q = statistics.quantiles(times, n=4)
    return dict(n=len(times), median_ms=1e3*statistics.median(times), q1_ms=1e3*q[0], q3_ms=1e3*q[2], min_ms=1e3*min(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rounds", type=int, nargs="+", default=[60, 20, 8], help="one number per batch, or one for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_samplers.json")
    args = parser.parse_args()
    rounds = args.rounds if len(args.rounds) == len(args.batches) else args.rounds[:1]*len(args.batches)
    record = dict(task=f"{N}-step Heun, {2*N-1} evaluations of D(x) = x/2, images 3x32x32", seed=args.seed, batches={},
                  date=now(), hardware=hardware(), versions=versions("k-diffusion", "diffusers", "azula"))
    for batch, n in zip(args.batches, rounds):
        times, missing = measure(batch, n, args.seed)
        result = {name: summary(t) for name, t in times.items()}
        peers = {name: r["median_ms"] for name, r in result.items() if name.endswith("float64") and not name.startswith("edm_nb")}
        record["batches"][str(batch)] = dict(results=result, missing=missing)
        print(f"batch {batch} ({n} rounds)")
        for name, r in result.items():
            print(f"  {name:26s} median {r['median_ms']:8.2f} ms   quartiles {r['q1_ms']:8.2f} - {r['q3_ms']:8.2f}")
        for line in missing: print(f"  left out: {line}")
        if peers:
            best = min(peers, key=peers.get)
            ratio = result["edm_nb float64"]["median_ms"] / peers[best]
            record["batches"][str(batch)].update(fastest_peer=best, ratio_to_fastest_peer=ratio)
            print(f"  ratio to the fastest float64 peer ({best}): {ratio:.2f}")
    write_json(args.out, record)
    print(f"wrote {args.out}")


if __name__ == "__main__": main()
