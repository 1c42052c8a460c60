"""Figure 14 and the churn ablation, measured: the slow part of chapter 02.

    python benchmarks/churn_study.py ideal      # Langevin iterations with the ideal denoiser over CIFAR-10 images
    python benchmarks/churn_study.py learned    # the same with the learned digits denoiser
    python benchmarks/churn_study.py many       # both again with 32 images a setting, 1,000 iterations: numbers, no pictures
    python benchmarks/churn_study.py ablation   # S_churn, S_tmin, S_tmax, S_noise, steps: Frechet distance, three seeds

Every part writes its own file in results/ after each setting, and a second run goes on where the first one stopped
(`--fresh` starts over). One thread on purpose: the seconds in the files are seconds of one core.
"""
import argparse
import json
import time
import zlib
from base64 import b64decode, b64encode
from pathlib import Path

import torch
from record import RESULTS, hardware_line, now, versions, write_json

from edm_nb.checkpoints import load
from edm_nb.data import cifar10, digits, one_hot, to_float, to_uint8
from edm_nb.figures import save_png
from edm_nb.oracles import IdealDenoiser
from edm_nb.features import feature_stats, pixels, stats_distance
from edm_nb.ode_solvers import edm_sigmas
from edm_nb.stochastic import (
    Churn, churn_gammas, langevin_states, sample, sample_sde, song_beta
)
from edm_nb.randomness import SeededNoise

class Record:
    "A result file that grows setting by setting and is whole at every moment."

    def __init__(self, path, about, fresh=False):
        self.path = path
        header = {"about": about, "hardware": hardware_line(), "date": now(), "versions": versions()}
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not fresh else {}
        self.data = {**header, "results": old["results"] if old.get("about") == about else {}}

    def measure(self, key, function, *args, **more):
        "Run `function` unless its result is there already; say how long it took."
        if key in self.data["results"]: return
        start = time.process_time()
        self.data["results"][key] = {**function(*args, **more), "cpu_seconds": round(time.process_time() - start, 2)}
        write_json(self.path, self.data)
        print(f"{self.path.name}: {key}  {self.data['results'][key]['cpu_seconds']} s", flush=True)


# ---------------------------------------------------------------- Langevin

def look(images):
    "Mean, contrast, saturation and detail per image: `[B, C, H, W]` -> four `[B]`."
    fine = torch.stack([(images[..., 1:] - images[..., :-1]).square().flatten(1).mean(1),
                        (images[..., 1:, :] - images[..., :-1, :]).square().flatten(1).mean(1)]).mean(0)
    chroma = images.std(1, correction=0).flatten(1).mean(1)
    return {"mean": images.flatten(1).mean(1), "contrast": images.flatten(1).std(1), "chroma": chroma,
            "beyond": (images.abs() > 1.02).double().flatten(1).mean(1), "detail": fine}


def drift(denoise, x, sigma, at, S_noise, seed, **cond):
    "The denoised image along the iterations: statistics with their standard errors, and the first image."
    noise = SeededNoise(range(seed, seed + len(x)))
    noise.randn_like(x)   # the numbers that made x, skipped
    rows, shown = [], []
    for k, state in langevin_states(denoise, x, sigma, at, S_noise, randn_like=noise.randn_like, **cond):
        with torch.no_grad(): D = denoise(state, state.new_tensor(sigma), **cond).double()
        stats = {name: {"mean": value.mean().item(), "se": (value.std()/len(value)**0.5).item()} for name, value in look(D).items()}
        rows.append({"iteration": k, "state_std": state.std().item(), **stats})
        shown.append(to_uint8(D[:1])[0])
    strip = torch.stack(shown)
    return {"sigma": sigma, "S_noise": S_noise, "n": len(x), "seed": seed, "points": rows, "strip_shape": list(strip.shape),
            "strip_zlib_base64": b64encode(zlib.compress(strip.numpy().tobytes(), 9)).decode()}


def start(images, sigma, seed):
    "Real images plus noise of their own seeds."
    return images + sigma*SeededNoise(range(seed, seed + len(images))).randn_like(images)


def sheet(record, path):
    "One row of images per setting, one column per reported iteration."
    strips = [torch.frombuffer(bytearray(zlib.decompress(b64decode(r["strip_zlib_base64"]))), dtype=torch.uint8).reshape(r["strip_shape"])
              for r in record.data["results"].values()]
    longest, rows = max(map(len, strips)), []
    for strip in strips:
        rows += [strip, torch.full((longest - len(strip), *strip.shape[1:]), 255, dtype=torch.uint8)]
    save_png(path, torch.cat(rows), columns=longest, scale=2)


def ideal(arguments):
    "Figure 14 with the exact denoiser of real images."
    long, n, full = ([0, 10, 100, 1000, 10000], 500, 50_000) if not arguments.quick else ([0, 3, 10], 50, 200)
    data = to_float(cifar10().images[:full]).double()
    record = Record(arguments.out/"langevin_ideal.json", f"Langevin iterations, gamma = sqrt(2) - 1, ideal denoiser over the first "
                    f"{n} (or {len(data)}) CIFAR-10 training images, JPEG-recoded", arguments.fresh)
    few, everything = IdealDenoiser(data[:n].float()), IdealDenoiser(data.float())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    settings = [(few, n, 0.2, 1.0, long[:-1]), (few, n, 2.0, 1.0, long), (few, n, 10.0, 1.0, long), (few, n, 0.2, 1.01, long[:-1]),
                (few, n, 10.0, 1.01, long[:-1]), (everything, len(data), 10.0, 1.0, long[:-2])]
    for denoise, count, sigma, S_noise, at in settings:
        x = start(data[order[:4]], sigma, 100)
        record.measure(f"{count} images, sigma {sigma:g}, S_noise {S_noise:g}", drift, denoise, x, sigma, at, S_noise, 100)
        sheet(record, arguments.out/"langevin_ideal.png")


def learned(arguments):
    "Figure 14 with a trained network."
    denoise, data = load(arguments.model), digits()
    long, n = ([0, 10, 100, 1000, 10000], 4) if not arguments.quick else ([0, 3, 10], 4)
    record = Record(arguments.out/"langevin_learned.json", f"Langevin iterations, gamma = sqrt(2) - 1, learned denoiser "
                    f"{Path(arguments.model).name}, class-conditional, digits 8x8", arguments.fresh)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    settings = [(sigma, S_noise, long[:-1]) for S_noise in (1.0, 1.01) for sigma in (0.05, 0.2, 2.0)]
    settings += [(0.2, 1.0, long)]
    chosen = order[:n]
    for sigma, S_noise, at in settings:
        x = start(to_float(data.images[chosen]).double(), sigma, 100)
        record.measure(f"sigma {sigma:g}, S_noise {S_noise:g}, {at[-1]} iterations", drift, denoise, x, sigma, at, S_noise, 100,
                       class_labels=one_hot(data.labels[chosen], data.label_dim))
        sheet(record, arguments.out/"langevin_learned.png")


def ends(denoise, x, sigma, last, S_noise, seed, **cond):
    "The same statistics per image before the first and after the last iteration, for paired differences."
    noise = SeededNoise(range(seed, seed + len(x)))
    noise.randn_like(x)   # the numbers that made x, skipped
    found = {}
    for k, state in langevin_states(denoise, x, sigma, [0, last], S_noise, randn_like=noise.randn_like, **cond):
        with torch.no_grad(): D = denoise(state, state.new_tensor(sigma), **cond).double()
        found["last" if k else "first"] = {name: [round(v, 6) for v in value.tolist()] for name, value in look(D).items()}
    return {"sigma": sigma, "S_noise": S_noise, "n": len(x), "seed": seed, "iterations": last, **found}


def many(arguments):
    "Figure 14 in numbers: enough images that a drift can be told from the scatter between images."
    n, last, stored = (32, 1000, 500) if not arguments.quick else (4, 5, 50)
    network, data = load(arguments.model), digits()
    photos = to_float(cifar10().images[:stored]).double()
    record = Record(arguments.out/"langevin_many.json", f"Langevin iterations, gamma = sqrt(2) - 1, {n} images a setting: ideal denoiser over "
                    f"the first {stored} CIFAR-10 training images, JPEG-recoded; learned denoiser {Path(arguments.model).name}, "
                    "class-conditional, digits 8x8", arguments.fresh)
    few = IdealDenoiser(photos.float())
    picks = torch.randperm(stored, generator=torch.Generator().manual_seed(0))[:n]
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]
    labels = one_hot(data.labels[chosen], data.label_dim)
    for S_noise in (1.0, 1.01):
        for sigma in (0.05, 0.2, 2.0):
            x = start(to_float(data.images[chosen]).double(), sigma, 100)
            record.measure(f"learned, sigma {sigma:g}, S_noise {S_noise:g}", ends, network, x, sigma, last, S_noise, 100, class_labels=labels)
        for sigma in (0.2, 2.0, 10.0):
            record.measure(f"ideal, sigma {sigma:g}, S_noise {S_noise:g}", ends, few, start(photos[picks], sigma, 100), sigma, last, S_noise, 100)


# ---------------------------------------------------------------- ablation

def ablation(arguments):
    "Frechet distance of pixels over the four settings of the churn, and over steps."
    denoise, data, features = load(arguments.model), digits(), pixels()
    inf = float("inf")
    n, seeds = (400, 3) if not arguments.quick else (12, 2)
    record = Record(arguments.out/"churn_study.json", f"Frechet distance, pixel features, {n} generated against all {len(data)} digits, "
                    f"class-conditional {Path(arguments.model).name}, Heun, seeds 0 to {seeds - 1}", arguments.fresh)
    record.data.update(n=n, seeds=list(range(seeds)))
    real = feature_stats(data, features)
    labels = one_hot(torch.arange(n) % data.label_dim, data.label_dim)

    def distance(images):
        found = feature_stats(to_uint8(images), features)
        return stats_distance(found, real)

    known = {}   # amounts beyond the cap give the same gamma: such a cell is copied, not run again

    def generated(group, steps, churn):
        gammas = (tuple(churn_gammas(edm_sigmas(steps), churn)), churn.S_noise)
        values = list(known.get(gammas, []))
        for seed in range(0 if values else seeds):
            noise = SeededNoise(range(seed*n, (seed + 1)*n))
            with torch.no_grad():
                images = sample(denoise, noise.randn((n, *data.images.shape[1:])), edm_sigmas(steps), churn, noise.randn_like,
                                class_labels=labels)
            values.append(float(distance(images)))
        known[gammas] = values
        return {"group": group, "steps": steps, "S_churn": churn.S_churn, "S_tmin": churn.S_tmin,
                "S_tmax": churn.S_tmax if churn.S_tmax < inf else None, "S_noise": churn.S_noise, "distances": values}

    def by_euler_maruyama(steps):
        values = []
        for seed in range(seeds):
            noise = SeededNoise(range(seed*n, (seed + 1)*n))
            images = sample_sde(denoise, noise.randn((n, *data.images.shape[1:])), edm_sigmas(steps), song_beta(), noise.randn_like,
                                class_labels=labels)
            values.append(float(distance(images)))
        return {"group": "Euler-Maruyama", "steps": steps, "distances": values}

    def floor():
        picks = [torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n] for seed in range(seeds)]
        return {"distances": [float(distance(to_float(data.images[pick]))) for pick in picks]}

    record.measure("real images against all", floor)
    amounts = [("steps x churn", steps, Churn(S_churn)) for steps in (4, 8, 16, 32) for S_churn in (0, 2, 6, 12)]
    grid = amounts[:12]   # 16 steps with S_churn 6 is the centre of the two groups that follow
    grid += [("range", 16, Churn(6, S_tmin, S_tmax)) for S_tmax in (inf, 2.0) for S_tmin in (0.0, 0.05, 0.5) if (S_tmin, S_tmax) != (0.0, inf)]
    grid += [("noise", 16, Churn(6, S_noise=S_noise)) for S_noise in (0.97, 1.007, 1.03)]
    grid += amounts[12:]
    for steps in (15, 31, 63): record.measure(f"Euler-Maruyama: {steps} steps, beta = 1/t", by_euler_maruyama, steps)
    for group, steps, churn in grid:
        record.measure(f"{group}: {steps} steps, S_churn {churn.S_churn:g}, [{churn.S_tmin:g}, {churn.S_tmax:g}], S_noise {churn.S_noise:g}",
                       generated, group, steps, churn)


PARTS = {"ideal": ideal, "learned": learned, "many": many, "ablation": ablation}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--model", default=str(RESULTS/"models"/"digits.safetensors"))
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="do not continue an earlier run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts: PARTS[part](arguments)


if __name__ == "__main__":
    main()
