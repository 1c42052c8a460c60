"""What chapter 06 shows of photographs, which takes longer than a notebook may.

    python studies/guidance.py [--n 3]        # results/guidance_cifar10.json and .npz

Three measurements of CIFAR-10 test images (a square cut out of the middle, means of 4 x 4 pixels, a blur), each with
noise of 0.05 on a scale from -1 to 1, sampled by the four methods with the network in results/gpu/weights.safetensors, which is told
the class. One sample per image. What is measured is kept after every cell, so an interrupted run resumes.
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

from edm_nb.data import cifar10, to_float, to_uint8
from edm_nb.generation import Sampling, generate, load_model
from edm_nb.guidance import METHODS, posterior

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


def photographs(n, steps, iterations, device, out=RESULTS):
    "Every task and method on the same n test images, the first of each class; kept cell by cell."
    file, store = out / "guidance_cifar10.json", out / "guidance_cifar10.npz"
    plan = dict(n=n, steps=steps, NFE=2*steps - 1, iterations=iterations, noise=NOISE, seed=0, weights=str(WEIGHTS.relative_to(RESULTS.parent)),
                sha256=json.loads(WEIGHTS.with_suffix(".json").read_text())["sha256"])
    old = json.loads(file.read_text()) if file.exists() else {}
    rows, images = (old["rows"], dict(np.load(store))) if old.get("plan") == plan else ([], {})
    data = cifar10("test")
    classes = [k % 10 for k in range(n)]
    chosen = [int((data.labels == c).nonzero()[k//10]) for k, c in enumerate(classes)]
    clean = to_float(data.images[chosen]).double().to(device)
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
            (_, x, _), = generate(net, range(n), Sampling(steps), classes, batch=n, as_bytes=False, noise=start, through=denoise)
            x = x.to(clean)
            error = (x - clean).flatten(1).square().mean(1).sqrt()
            fit = ((y - A[0](x))/NOISE).square().mean(1).sqrt()
            images[f"{task}/{method}"] = to_uint8(x).cpu().numpy()
            rows.append(dict(task=task, method=method, measured=y.shape[1], error=error.tolist(), fit=fit.tolist(),
                             seconds=round(time.perf_counter() - began, 1), cpu_seconds=round(time.process_time() - cpu, 1)))
            np.savez_compressed(store, **images)
            write_json(file, dict(plan=plan, images=chosen, rows=rows, environment=dict(hardware(), date=now(), **versions())))
            print(f"{task}, {method}: error {error.mean():.3f}, fit {fit.mean():.2f}, {rows[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3, help="photographs")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=3, help="of mmps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    args = parser.parse_args()
    photographs(args.n, args.steps, args.iterations, args.device, args.out)
