"""What chapter 06 shows of photographs, and autoguidance measured on digits; both take longer than a notebook may.

    python studies/guidance.py cifar10 [--n 4]        # results/guidance_cifar10.json and .npz
    python studies/guidance.py autoguidance           # results/autoguidance_digits.json

Photographs: three measurements of CIFAR-10 test images (a square cut out of the middle, means of 4 x 4 pixels, a blur), each with
noise of 0.05 on a scale from -1 to 1, sampled by the four methods with the network in results/gpu/weights.safetensors, which is told
the class. One sample per image. What is measured is kept after every cell, so an interrupted run resumes.

Digits: five networks of 25,600 images, each guided by one of half the width that saw 6,400. The measure is the Fréchet distance in
pixel space of 1,797 samples with the digits' own labels; its floor is that of 1,797 digits drawn with replacement.
"""
import argparse
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from record import RESULTS, hardware, now, versions, write_json  # noqa: E402

from edm_nb.data import cifar10, digits, one_hot, to_float, to_uint8
from edm_nb.features import feature_stats, pixels, stats_distance
from edm_nb.generation import generate, load_model, Sampling
from edm_nb.guidance import METHODS, guided, posterior
from edm_nb.networks import build_network
from edm_nb.ode_solvers import edm_sigmas, sample_ode
from edm_nb.preconditioning import Preconditioned
from edm_nb.randomness import stream_seed
from edm_nb.training import lognormal_quantile, train_loop

NOISE, SIDE = 0.05, 32
WEIGHTS = RESULTS / "gpu/weights.safetensors"


def square(width=16):
    "All pixels but those of a square in the middle."
    keep = torch.ones(SIDE, SIDE, dtype=torch.bool)
    start = (SIDE - width)//2
    keep[start:start + width, start:start + width] = False
    def adjoint(u):
        image = torch.zeros(len(u), 3, SIDE, SIDE, dtype=u.dtype, device=u.device)
        image[..., keep.to(u.device)] = u.reshape(len(u), 3, -1)
        return image
    return (lambda x: x[..., keep.to(x.device)].flatten(1)), adjoint


def blocks(k=4):
    "Means of k × k pixels."
    grow = functools.partial(torch.nn.functional.interpolate, scale_factor=k)
    return (lambda x: torch.nn.functional.avg_pool2d(x, k).flatten(1)), (lambda u: grow(u.reshape(len(u), 3, SIDE//k, SIDE//k))/k**2)


def blur(std=1.5):
    "A Gaussian blur with black beyond the edge: symmetric, so its own adjoint up to the shape."
    at = torch.arange(SIDE, dtype=torch.float64)
    line = (-0.5*((at[:, None] - at)/std)**2).exp()/(std*(2*torch.pi)**0.5)
    both = lambda x: line.to(x) @ x @ line.to(x)  # noqa: E731
    return (lambda x: both(x).flatten(1)), (lambda u: both(u.reshape(len(u), 3, SIDE, SIDE)))


TASKS = {"a square is missing": square(), "means of 4 × 4 pixels": blocks(), "blurred": blur()}


def photographs(n, steps, iterations, device):
    "Every task and method on the same n test images, the first of each class; kept cell by cell."
    file, store = RESULTS / "guidance_cifar10.json", RESULTS / "guidance_cifar10.npz"
    plan = dict(n=n, steps=steps, NFE=2*steps - 1, iterations=iterations, noise=NOISE, seed=0, weights=str(WEIGHTS.relative_to(RESULTS.parent)),
                sha256=json.loads(WEIGHTS.with_suffix(".json").read_text())["sha256"])
    old = json.loads(file.read_text()) if file.exists() else {}
    rows, images = (old["rows"], dict(np.load(store))) if old.get("plan") == plan else ([], {})
    data = cifar10("test")
    classes = [k % 10 for k in range(n)]
    chosen = [int((data.labels == c).nonzero()[k//10]) for k, c in enumerate(classes)]
    clean, labels = to_float(data.images[chosen]).double().to(device), one_hot(data.labels[chosen], 10).to(device)
    net = load_model(WEIGHTS, device).float().requires_grad_(False)
    dice = torch.Generator().manual_seed(0)
    start = torch.randn(clean.shape, generator=dice, dtype=torch.float64).to(device)
    images["clean"] = to_uint8(clean).cpu().numpy()
    for task, A in TASKS.items():
        y = A[0](clean)
        y = y + NOISE*torch.randn(y.shape, generator=dice, dtype=torch.float64).to(device)
        images[f"{task}/measured"] = y.float().cpu().numpy()
        for method in METHODS:
            if any((row["task"], row["method"]) == (task, method) for row in rows): continue
            began, cpu = time.perf_counter(), time.process_time()
            denoise = posterior(net, A, y, NOISE, method, iterations=iterations)
            x = sample_ode(denoise, start, edm_sigmas(steps), class_labels=labels)
            error = (x - clean).flatten(1).square().mean(1).sqrt()
            fit = ((y - A[0](x))/NOISE).square().mean(1).sqrt()
            images[f"{task}/{method}"] = to_uint8(x).cpu().numpy()
            rows.append(dict(task=task, method=method, measured=y.shape[1], error=error.tolist(), fit=fit.tolist(),
                             seconds=round(time.perf_counter() - began, 1), cpu_seconds=round(time.process_time() - cpu, 1)))
            np.savez_compressed(store, **images)
            write_json(file, dict(plan=plan, images=chosen, rows=rows, environment=dict(hardware(), date=now(), **versions())))
            print(f"{task}, {method}: error {error.mean():.3f}, fit {fit.mean():.2f}, {rows[-1]['seconds']:.0f} s", flush=True)


def trained(data, images, width, seed):
    "A digits network after so many images, its average."
    net = build_network(dict(arch="tiny", resolution=8, channels=1, label_dim=10, model_channels=width, channel_mult=[1, 3], num_blocks=1),
                        generator=torch.Generator().manual_seed(stream_seed(seed, "weights")))
    denoise = Preconditioned(net, sigma_data=0.75).train()
    for *_, ema in train_loop(denoise, data, functools.partial(lognormal_quantile, P_mean=-0.8), images, seed=seed): pass
    return ema.copy_to(denoise).eval()


def autoguidance(seeds, strengths):
    "Distance against the strength of guidance, seed by seed."
    data, rows = digits(), []
    real = feature_stats(data.images, pixels())
    for seed in range(seeds):
        model, guide = trained(data, 25_600, 32, seed), trained(data, 6_400, 16, seed)
        again = torch.randint(len(data), (len(data),), generator=torch.Generator().manual_seed(seed))
        floor = stats_distance(feature_stats(data.images[again], pixels()), real)
        for w in strengths:
            settings, classes = Sampling(guidance=w), data.labels.tolist()
            drawn = generate(model, range(len(data)), settings, classes, guide=guide if w else None, batch=256)
            x = torch.cat([part for _, part, _ in drawn])
            rows.append(dict(seed=seed, w=w, distance=stats_distance(feature_stats(x, pixels()), real), floor=floor, n=len(data)))
            print(rows[-1], flush=True)
        alone = torch.cat([part for _, part, _ in generate(guide, range(len(data)), Sampling(), data.labels.tolist(), batch=256)])
        rows.append(dict(seed=seed, w=None, distance=stats_distance(feature_stats(alone, pixels()), real), floor=floor, n=len(data)))
        write_json(RESULTS / "autoguidance_digits.json", dict(rows=rows, model="32 channels, 25,600 images", guide="16 channels, 6,400 images",
                   sampler="Heun, 18 steps", environment=dict(hardware(), date=now(), **versions())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("cifar10", "autoguidance"))
    parser.add_argument("--n", type=int, default=4, help="photographs")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--iterations", type=int, default=3, help="of mmps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.stage == "cifar10": photographs(args.n, args.steps, args.iterations, args.device)
    else: autoguidance(args.seeds, (0.0, 0.25, 0.5, 1.0, 2.0))
