"""Solvers, rows of Table 1 and step layouts with a trained network: Fréchet distance and truncation error against NFE.

    python benchmarks/solver_study.py --model results/models/digits.safetensors      # writes results/solver_study.json

Three seeds. The file is written after every method, and a run that was cut off goes on where it stopped. The samples of one
seed start from the same unit noise and the same class labels under every method, so that differences between methods are
not differences of luck. Distance: Fréchet distance between the pixel statistics of the samples (as uint8 images) and of the
digits data set. Truncation error: rms difference per pixel from the same method's ODE solved with 96 Heun steps, on 16
samples of the first seed. About five minutes on one core.
"""
import argparse, json, time
from pathlib import Path
import torch
from record import RESULTS, hardware, now, versions, write_json
from edm_nb import checkpoints, files, metrics
from edm_nb import features
from edm_nb.data import digits, to_float, to_uint8
from edm_nb.framework import LINEAR, VE, vp_schedule
from edm_nb.ode_solvers import (Flow, count_nfe, edm_sigmas, euler, heun, iddpm_sigmas, invert_ode, multistep, rk2, rk45,
                                sample_ode, ve_sigmas, vp_sigmas)

VP = vp_schedule()
ROWS = {"VP": (vp_sigmas, VP), "VE": (ve_sigmas, VE), "iDDPM": (iddpm_sigmas, LINEAR), "EDM": (edm_sigmas, LINEAR)}
EULER_NS = (5, 9, 17, 35, 79)                        # the same NFE as ...
HEUN_NS = (3, 5, 9, 18, 40)                          # ... Heun's 2N - 1
RK45_TOLERANCES, RK45_CAP = (1e-1, 3e-2), 300


def methods():
    "Name -> (levels, schedule, solver, step counts). The first four are rows of Table 1, then solvers on EDM's steps."
    table = {name: (*ROWS[name], euler, EULER_NS) for name in ("VP", "VE", "iDDPM")}
    table["EDM"] = (edm_sigmas, LINEAR, heun, HEUN_NS)
    table["Euler"] = (edm_sigmas, LINEAR, euler, (5, 9, 17, 35))
    table["midpoint"] = (edm_sigmas, LINEAR, rk2(0.5), (3, 5, 9))
    table["multistep"] = (edm_sigmas, LINEAR, multistep(3), (5, 9, 17, 35))
    return table


def rms(x):
    return x.double().square().mean().sqrt().item()


def distance(images, reference, features):
    "Fréchet distance in pixel space, squared pixel units."
    stats = features.feature_stats(to_uint8(images.float()), features)
    return features.stats_distance(stats, reference)


def labels(denoise, n, generator):
    "Conditioning for n samples: random classes where the network has labels."
    dim = denoise.net.label_dim
    if not dim: return {}
    return dict(class_labels=torch.nn.functional.one_hot(torch.randint(dim, (n,), generator=generator), dim).float())


class TooMany(RuntimeError):
    "The adaptive solver used up its evaluations."


def capped(denoise, cap):
    "A counter that stops an adaptive solver after `cap` evaluations."
    counter = count_nfe(denoise)
    def call(x, sigma, **cond):
        if counter.nfe >= cap: raise TooMany
        return counter(x, sigma, **cond)
    return call, counter


def study_methods(denoise, shape, reference, features, seed, n, n_error, done):
    "Yields one record per method and step count that is not in `done`; truncation error of the first `n_error` samples where asked for."
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    cond = labels(denoise, n, generator)
    part = {k: v[:n_error] for k, v in cond.items()}
    exact = {name: sample_ode(denoise, noise[:n_error], edm_sigmas(96, sigma_min=1e-3, sigma_max=levels(2)[0].item()), **part)
             for name, (levels, _) in ROWS.items()} if n_error else {}
    def record(name, x, nfe, **more):
        error = rms(x[:n_error] - exact[name if name in ROWS else "EDM"]) if n_error else None
        return dict(method=name, seed=seed, nfe=nfe, distance=distance(x, reference, features), error=error, **more)
    for name, (levels, schedule, solver, ns) in methods().items():
        for steps in ns:
            if (name, seed, steps) in done: continue
            counter = count_nfe(denoise)
            yield record(name, sample_ode(counter, noise, levels(steps), schedule, solver, **cond), counter.nfe, steps=steps)
    for tolerance in RK45_TOLERANCES:
        if ("RK45", seed, tolerance) in done: continue
        call, counter = capped(denoise, RK45_CAP)
        try: x = rk45(call, noise, edm_sigmas(18), rtol=tolerance, atol=tolerance, **cond)
        except TooMany: yield dict(method="RK45", seed=seed, nfe=counter.nfe, distance=None, error=None, tolerance=tolerance)
        else: yield record("RK45", x, counter.nfe, tolerance=tolerance)


def study_local_error(denoise, shape, n, steps=18, rhos=(1, 3, 5, 7)):
    "Local error of Heun per step and rho; the exact end of a step comes from 4 small Heun steps, even in sigma^(1/7)."
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    flow, out = Flow(denoise, **labels(denoise, n, generator)), {}
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


def study_final_error(denoise, shape, n, rhos=(1, 2, 3, 5, 7, 10), counts=(9, 18), alphas=(0.3, 0.4, 0.5, 2/3, 0.85, 1.0)):
    "Truncation error of the finished sample against rho and against alpha."
    generator = torch.Generator().manual_seed(0)
    noise, cond = torch.randn(n, *shape, generator=generator, dtype=torch.float64), labels(denoise, n, generator)
    exact = sample_ode(denoise, noise, edm_sigmas(96, sigma_min=1e-3), **cond)
    error = lambda sigmas, solver=heun: rms(sample_ode(denoise, noise, sigmas, solver=solver, **cond) - exact)
    return dict(rho=dict(rhos=list(rhos), errors={str(k): [error(edm_sigmas(k, rho=r)) for r in rhos] for k in counts}),
                alpha=dict(alphas=list(alphas), errors={str(k): [error(edm_sigmas(k), rk2(a)) for a in alphas] for k in (9, 18)}))


def study_inversion(denoise, images, cond, counts=(6, 9, 18, 36)):
    "Round-trip error of real digits, per step count."
    def trip(steps, solver):
        sigmas = edm_sigmas(steps)
        latent = invert_ode(denoise, images, sigmas, solver=solver, **cond)
        return rms(sample_ode(denoise, latent, sigmas, solver=solver, **cond) - images)
    return dict(steps=list(counts), Heun=[trip(k, heun) for k in counts], Euler=[trip(k, euler) for k in counts])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=RESULTS / "models" / "digits.safetensors")
    parser.add_argument("--out", type=Path, default=RESULTS / "solver_study.json")
    parser.add_argument("--samples", type=int, default=200, help="samples per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    start, denoise, data = time.time(), checkpoints.load(args.model), digits()
    shape, features = data.images.shape[1:], features.pixels(tuple(data.images.shape[1:]))
    reference = features.feature_stats(data.images, features)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data), generator=generator)[:16]
    dim = denoise.net.label_dim
    cond = dict(class_labels=torch.nn.functional.one_hot(data.labels[chosen], dim).float()) if dim else {}
    halves = torch.randperm(len(data), generator=generator)
    stats = lambda index: features.feature_stats(data.images[index], features)
    between = features.stats_distance
    draws = [between(stats(torch.randperm(len(data), generator=generator)[:args.samples]), reference) for _ in range(20)]
    settings = dict(
        task="digits, class-conditional network, Fréchet distance of pixel statistics, float64 state", model=args.model.name,
        model_sha256=files.file_hash(args.model), samples=args.samples, seeds=args.seeds, rk45_cap=RK45_CAP)
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    if any(old.get(k) != v for k, v in settings.items()): old = {}       # another study: start afresh
    record = dict(old) or dict(
        settings, model_config=denoise.config, threads=torch.get_num_threads(), seconds=0.0,
        halves_of_the_data=between(stats(halves[:len(data)//2]), stats(halves[len(data)//2:])),
        draws_of_the_data=dict(n=args.samples, repeats=len(draws), distances=draws),
        local_error=study_local_error(denoise, shape, 16), final_error=study_final_error(denoise, shape, 16),
        inversion=study_inversion(denoise, to_float(data.images[chosen]).double(), cond), methods=[],
        date=now(), hardware=hardware(), versions=versions())
    before, done = record["seconds"], {(r["method"], r["seed"], r.get("steps", r.get("tolerance"))) for r in record["methods"]}
    for seed in args.seeds:
        for new in study_methods(denoise, shape, reference, features, seed, args.samples, 16 if seed == args.seeds[0] else 0, done):
            record["methods"].append(new)
            record["seconds"] = before + time.time() - start
            write_json(args.out, record)
            print({k: v for k, v in new.items() if v is not None}, f"{record['seconds']:.0f} s", flush=True)


if __name__ == "__main__": main()
