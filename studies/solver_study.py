"""Solvers and the rows of Table 1 with a trained network: Fréchet distance and truncation error against evaluations.

    python studies/solver_study.py       # writes results/solver_study.json; about 40 minutes on one core

Five seeds. Every seed draws as many digits as the data set has (n = 1,797), with the labels of the data, and all methods of
a seed start from the same noise: differences between methods are paired, seed by seed. Distance: Fréchet distance between
the pixel statistics of the samples (as uint8 images) and of the data. Its floor is the distance of 1,797 real digits, drawn
with replacement inside each class, from the data. `half` is the mean distance of the two halves of the samples; where the
bias goes like 1/n, 2 distance - half is free of it. Truncation error: rms difference per pixel from the same method's ODE solved with
96 Heun steps, on 16 samples of the first seed. The file is written after every method and a run that was cut off goes on
where it stopped.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, hardware, now, versions, write_json  # noqa: E402

from edm_nb import checkpoints, features, files  # noqa: E402
from edm_nb.data import digits, one_hot, to_float, to_uint8  # noqa: E402
from edm_nb.framework import LINEAR, VE, vp_schedule  # noqa: E402
from edm_nb.generation import Sampling, generate  # noqa: E402
from edm_nb.ode_solvers import (Flow, count_nfe, dpmpp_2m, dpmpp_2m_sde, edm_sigmas, euler, heun,  # noqa: E402
                                iddpm_sigmas, invert_ode, multistep, rk2, rk45, sample_ode, ve_sigmas, vp_sigmas)

VP = vp_schedule()
ROWS = {"VP": (vp_sigmas, VP), "VE": (ve_sigmas, VE), "iDDPM": (iddpm_sigmas, LINEAR), "EDM": (edm_sigmas, LINEAR)}
RK45_TOLERANCE, RK45_CAP, CHUNK = 3e-2, 300, 256


def fresh(seed):
    "Unit noise for a solver that draws some, from a stream of its own."
    generator = torch.Generator().manual_seed(1000 + seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def batches():
    """Lists of (name, levels, schedule, solver of a seed, steps), most important first.

    A batch is drawn for every seed before the next begins, so a study that is cut off leaves whole comparisons."""
    row = lambda name, steps: (name, *ROWS[name], lambda seed: euler, steps)
    on_edm = lambda name, solver, steps: (name, edm_sigmas, LINEAR, solver, steps)
    eulers = lambda n: [on_edm("Euler", lambda seed: euler, n), row("VP", n), row("iDDPM", n)]
    heuns = lambda n: on_edm("EDM", lambda seed: heun, n)
    plus = lambda n: on_edm("dpmpp_2m", lambda seed: dpmpp_2m, n)
    return [[heuns(18), *eulers(35)], [heuns(5), *eulers(9), plus(9)],
            [heuns(10), *eulers(19), plus(19), on_edm("multistep", lambda seed: multistep(3), 19), on_edm("midpoint", lambda seed: rk2(0.5), 10)],
            [plus(35), row("VE", 35), on_edm("Ralston", lambda seed: rk2(2/3), 10), on_edm("multistep 2", lambda seed: multistep(2), 19)],
            [heuns(40), on_edm("dpmpp_2m_sde", lambda seed: dpmpp_2m_sde(fresh(seed)), 35)]]


def rms(x):
    return x.double().square().mean().sqrt().item()


class TooMany(RuntimeError):
    "The adaptive solver used up its evaluations."


def draw(denoise, noise, labels, sigmas, method=sample_ode, batch=CHUNK, through=None, **options):
    "Float64 samples from noise that all methods share, a piece at a time: a batch that fits the cache is twice as fast."
    def sampler(model, noise, levels, randn_like, **cond):
        return method(model, noise, levels, **options, **cond)
    drawn = generate(denoise, range(len(noise)), Sampling(levels=tuple(sigmas.tolist())), labels.tolist(), batch=batch, as_bytes=False,
                     noise=noise, sampler=sampler, through=through)
    return torch.cat([images for _, images, _ in drawn])


def one_method(denoise, noise, labels, sigmas, schedule, solver):
    "Samples, and evaluations per sample."
    counter = count_nfe(denoise)
    x = draw(denoise, noise, labels, sigmas, through=counter, schedule=schedule, solver=solver)
    return x, counter.nfe // -(-len(noise) // CHUNK)


def one_rk45(denoise, noise, labels, tolerance):
    "The whole batch shares its adaptive steps; None where they would exceed the cap."
    nfe = 0
    def capped(x, sigma, class_labels):
        nonlocal nfe
        if nfe >= RK45_CAP: raise TooMany
        nfe += 1
        return torch.cat([denoise(part, sigma, class_labels=told) for part, told in zip(x.split(CHUNK), class_labels.split(CHUNK), strict=True)])
    try: x = draw(denoise, noise, labels, edm_sigmas(18), rk45, len(noise), capped, rtol=tolerance, atol=tolerance)
    except TooMany: x = None
    return x, nfe


class Distance:
    "Fréchet distance of images from the data, in pixels; and of their halves."
    def __init__(self, data):
        self.pixels = features.pixels(tuple(data.images.shape[1:]))
        self.reference = features.feature_stats(data.images, self.pixels)

    def __call__(self, images):
        images = images if images.dtype == torch.uint8 else to_uint8(images.float())
        return features.stats_distance(features.feature_stats(images, self.pixels), self.reference)

    def both(self, images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        halves = [self(images[part]) for part in order.chunk(2)]
        return dict(distance=self(images), half=sum(halves) / 2)


def real_draws(data, generator):
    "As many real digits as the data has, drawn with replacement inside each class."
    index = torch.empty(len(data), dtype=torch.long)
    for label in data.labels.unique():
        mine = (data.labels == label).nonzero().flatten()
        index[mine] = mine[torch.randint(len(mine), (len(mine),), generator=generator)]
    return data.images[index]


def shared_noise(data, seed, n):
    "The noise of a seed, from which all methods start."
    return torch.randn(n, *data.images.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def study_methods(denoise, batch, data, seed, n, distance, n_error, done):
    "Yields one record per method and step count that is not in `done`."
    noise, labels, exact = shared_noise(data, seed, n), data.labels[:n], {}
    def error(name, x):
        if not n_error: return None
        row = name if name in ROWS else "EDM"
        if row not in exact:
            fine = edm_sigmas(96, sigma_min=1e-3, sigma_max=ROWS[row][0](2)[0].item())
            exact[row] = draw(denoise, noise[:n_error], labels[:n_error], fine)
        return rms(x[:n_error] - exact[row])
    for name, levels, schedule, solver, steps in batch:
        if (name, seed, steps) in done: continue
        x, nfe = one_method(denoise, noise, labels, levels(steps), schedule, solver(seed))
        yield dict(method=name, seed=seed, nfe=nfe, **distance.both(x), error=error(name, x), steps=steps)


def study_rk45(denoise, data, seed, n, distance, done):
    "The adaptive comparator, once per seed."
    if ("RK45", seed, RK45_TOLERANCE) in done: return
    x, nfe = one_rk45(denoise, shared_noise(data, seed, n), data.labels[:n], RK45_TOLERANCE)
    found = dict(distance=None, half=None) if x is None else distance.both(x)
    yield dict(method="RK45", seed=seed, nfe=nfe, **found, error=None, tolerance=RK45_TOLERANCE)


def study_local_error(denoise, noise, labels, steps=18, rhos=(1, 3, 5, 7)):
    "Local error of Heun per step and rho; the exact end of a step comes from 4 small Heun steps, even in sigma^(1/7)."
    flow, out = Flow(denoise, class_labels=one_hot(labels, denoise.net.label_dim)), {}
    for rho in rhos:
        times, x, errors = edm_sigmas(steps, rho=rho)[:-1].tolist(), noise*80, []
        for t, t_next in zip(times, times[1:]):
            fine, y = torch.linspace(t**(1/7), t_next**(1/7), 5, dtype=torch.float64).pow(7).tolist(), x
            fine[0], fine[-1] = t, t_next
            for u, v in zip(fine, fine[1:]): y = heun(flow, y, u, v)
            errors.append(rms(heun(flow, x, t, t_next) - y))
            x = y
        out[str(rho)] = dict(sigma=times[:-1], error=errors)
    return out


def study_final_error(denoise, noise, labels, rhos=(1, 2, 3, 5, 7, 10, 15), counts=(9, 18), alphas=(0.3, 0.4, 0.5, 2/3, 0.85, 1.0)):
    "Truncation error of the finished samples against rho and against alpha, per sample: the chapter forms paired differences."
    exact = draw(denoise, noise, labels, edm_sigmas(96, sigma_min=1e-3))
    def error(sigmas, solver=heun):
        x = draw(denoise, noise, labels, sigmas, solver=solver)
        return (x - exact).flatten(1).square().mean(1).sqrt().tolist()
    return dict(rho=dict(rhos=list(rhos), errors={str(k): [error(edm_sigmas(k, rho=r)) for r in rhos] for k in counts}),
                alpha=dict(alphas=list(alphas), errors={str(k): [error(edm_sigmas(k), rk2(a)) for a in alphas] for k in counts}))


def study_inversion(denoise, images, labels, counts=(6, 9, 18, 36)):
    "Round-trip error of real digits, per step count."
    told = one_hot(labels, denoise.net.label_dim)
    def trip(steps, solver):
        sigmas = edm_sigmas(steps)
        latent = invert_ode(denoise, images, sigmas, solver=solver, class_labels=told)
        return rms(draw(denoise, latent, labels, sigmas, solver=solver) - images)
    return dict(steps=list(counts), Heun=[trip(k, heun) for k in counts], Euler=[trip(k, euler) for k in counts])


def small_studies(denoise, data, images):
    "What a few digits can tell: local error, rho, alpha, inversion."
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, *data.images.shape[1:], generator=generator, dtype=torch.float64)
    chosen = torch.randperm(len(data), generator=generator)[:images]
    labels = data.labels[chosen]
    return dict(local_error=study_local_error(denoise, noise, labels), final_error=study_final_error(denoise, noise, labels),
                inversion=study_inversion(denoise, to_float(data.images[chosen]).double(), labels), images=images)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=RESULTS / "models" / "digits.safetensors")
    parser.add_argument("--out", type=Path, default=RESULTS / "solver_study.json")
    parser.add_argument("--samples", type=int, help="samples per seed; as many as the data set has by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    start, denoise, data = time.time(), checkpoints.load(args.model), digits()
    n, distance, generator = args.samples or len(data), Distance(data), torch.Generator().manual_seed(0)
    settings = dict(task="digits, class-conditional network with the labels of the data, Fréchet distance of pixel statistics, float64 state",
                    model=args.model.name, model_sha256=files.file_hash(args.model), samples=n, seeds=args.seeds, rk45_cap=RK45_CAP)
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    if any(old.get(k) != v for k, v in settings.items()): old = {}       # another study: start afresh
    record = dict(old) or dict(
        settings, model_config=denoise.config, threads=torch.get_num_threads(), seconds=0.0,
        floor=dict(n=len(data), distances=[distance(real_draws(data, generator)) for _ in range(20)]),
        **small_studies(denoise, data, 16), methods=[], date=now(), hardware=hardware(), versions=versions())
    before, done = record["seconds"], {(r["method"], r["seed"], r.get("steps", r.get("tolerance"))) for r in record["methods"]}
    def work():
        for batch in batches():
            for seed in args.seeds:
                n_error = 16 if seed == args.seeds[0] else 0
                yield from study_methods(denoise, batch, data, seed, n, distance, n_error, done)
        for seed in args.seeds: yield from study_rk45(denoise, data, seed, n, distance, done)
    for new in work():
        record["methods"].append(new)
        record["seconds"] = before + time.time() - start
        write_json(args.out, record)
        print({k: v for k, v in new.items() if v is not None}, f"{record['seconds']:.0f} s", flush=True)


if __name__ == "__main__": main()
