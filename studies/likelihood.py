"""Likelihood of digits that a network has seen and has not, and of a few CIFAR-10 images; results/likelihood.json.

    python studies/likelihood.py digits      # trains the demo network on four fifths of the digits; about six minutes of one core
    python studies/likelihood.py cifar10     # the shipped CIFAR-10 network on twelve test images; about ten minutes of one core

digits: log p(x; sigma) of x = y + sigma n, once for images y of the training set and once for images that were held out, under the
network and under the ideal denoiser of the same training set (its density has a formula). cifar10: bits per dimension of dequantised
test images under the network of results/gpu, with two numbers of steps, and under a Gaussian with the spectrum of photographs. The
book's file was made from a copy of CIFAR-10 whose images had been stored as JPEG, which makes them more probable than the originals.
"""
import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, hardware, now, versions, write_json  # noqa: E402
from safetensors import safe_open  # noqa: E402
from spectrum import cosine_basis  # noqa: E402

from edm_nb.configs import PRESETS  # noqa: E402
from edm_nb.data import cifar10, digits, find_cifar10, one_hot, to_float  # noqa: E402
from edm_nb.framework import GaussianDenoiser  # noqa: E402
from edm_nb.generation import load_model  # noqa: E402
from edm_nb.likelihood import bits_per_dim, dequantise, hutchinson, likelihood_estimates, standard_error  # noqa: E402
from edm_nb.ode_solvers import dpmpp_2m  # noqa: E402
from edm_nb.oracles import IdealDenoiser  # noqa: E402
from edm_nb.randomness import SeededNoise  # noqa: E402
from edm_nb.runs import train  # noqa: E402
from edm_nb.updates import ema_denoiser  # noqa: E402

SIGMA_MAX, LEVELS = 80.0, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def geometric(n, sigma_last):
    "n steps of one ratio, from SIGMA_MAX to sigma_last."
    return torch.logspace(math.log10(SIGMA_MAX), math.log10(sigma_last), n + 1, dtype=torch.float64)


def estimates(denoise, x, levels, probes, seed, **cond):
    "One estimate of log p per image and probe; the probes of an image depend on its number alone."
    noise = SeededNoise(range(seed, seed + len(x)))
    return likelihood_estimates(denoise, x, levels, solver=dpmpp_2m, divergence=hutchinson(probes, randn_like=noise.randn_like), **cond)


def summary(values):
    "Mean and standard error over images."
    return dict(mean=round(values.mean().item(), 4), error=round((values.std() / len(values)**0.5).item(), 4))


def study_digits(args):
    "Seen against unseen, network against ideal denoiser."
    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
    seen, unseen = data.take(order[:1437]), data.take(order[1437:])
    config = dataclasses.replace(PRESETS["demo"], seed=args.seed, **({"images": args.images} if args.images else {}))
    for record in train(config, data=seen, device="cpu"):
        print(f"{record.images:,} images, loss {record.loss:.4f}", flush=True)
    network = ema_denoiser(record.state).eval()
    ideal = IdealDenoiser(to_float(seen.images), seen.labels, 10)
    rows = []
    for sigma in LEVELS:
        for name, part in (("seen", seen), ("unseen", unseen)):
            y, labels = to_float(part.images[:args.n]).double(), one_hot(part.labels[:args.n], 10)
            x = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(args.seed + 1), dtype=y.dtype)
            found = estimates(network, x, geometric(args.steps, sigma), args.probes, args.seed, class_labels=labels)
            rows.append(dict(sigma=sigma, part=name, network=summary(found.mean(1)), probes_error=round(standard_error(found).mean().item(), 4),
                             ideal=summary(ideal.log_prob(x, sigma, labels))))
            print(rows[-1], flush=True)
    bits = {}
    for name, part in (("seen", seen), ("unseen", unseen)):
        x = dequantise(part.images[:args.n], 2/16, torch.Generator().manual_seed(args.seed + 2))
        found = estimates(network, x, geometric(args.steps, LEVELS[0]), args.probes, args.seed, class_labels=one_hot(part.labels[:args.n], 10))
        bits[name] = summary(bits_per_dim(found.mean(1), 64, 2/16))
    print(bits)
    return dict(rows=rows, bits_per_dim=bits, n=args.n, probes=args.probes, steps=args.steps, seen=len(seen), unseen=len(unseen),
                preset="demo", images=record.images, loss=round(record.loss, 5), seed=args.seed)


def study_cifar10(args):
    "Bits per dimension of test images, network and Gaussian."
    if find_cifar10() is None: sys.exit("CIFAR-10 not found: set EDM_NB_CIFAR10 to an EDM-format zip, a folder, or cifar-10-batches-py")
    network, data = load_model(RESULTS / "gpu/weights.safetensors"), cifar10("test")
    part = data.take(slice(0, args.n))
    x, labels = dequantise(part.images, generator=torch.Generator().manual_seed(args.seed)), one_hot(part.labels, 10)
    with safe_open(RESULTS / "cifar10_spectrum.safetensors", "pt") as file:
        gaussian = GaussianDenoiser(file.get_tensor("mean").double(), file.get_tensor("std").double())
    basis = cosine_basis(32)
    bits = {"Gaussian with the spectrum of photographs": bits_per_dim(gaussian.log_prob(basis @ x @ basis.T, 0.002), 3072)}
    probes_error = {}
    for steps in (args.steps // 2, args.steps):
        parts = []
        for i in range(0, args.n, 4):
            parts.append(estimates(network, x[i:i+4], geometric(steps, 0.002), args.probes, args.seed + i, class_labels=labels[i:i+4]))
            print(steps, i, bits_per_dim(parts[-1].mean(1), 3072), flush=True)
        found = torch.cat(parts)
        bits[f"network, {steps} steps"] = bits_per_dim(found.mean(1), 3072)
        probes_error[f"network, {steps} steps"] = round((standard_error(found).mean() / (3072 * math.log(2))).item(), 5)
    return dict(bits_per_dim={name: summary(values) for name, values in bits.items()}, probes_error=probes_error, n=args.n, probes=args.probes,
                steps=args.steps, sigma_last=0.002, sigma_max=SIGMA_MAX, seed=args.seed, data=data.name, source=find_cifar10().name, note=args.note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("digits", "cifar10"))
    parser.add_argument("--n", type=int, help="images of each kind; 64 digits, 12 of CIFAR-10")
    parser.add_argument("--steps", type=int, default=64, help="steps of DPM-Solver++(2M), one evaluation each")
    parser.add_argument("--probes", type=int, help="per evaluation; 4 for digits, 2 for CIFAR-10")
    parser.add_argument("--images", type=int, help="length of the training; default: that of the demo preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="images stored as JPEG", help="what to say about the source of CIFAR-10")
    parser.add_argument("--out", type=Path, default=RESULTS / "likelihood.json")
    args = parser.parse_args()
    args.n = args.n or (64 if args.study == "digits" else 12)
    args.probes = args.probes or (4 if args.study == "digits" else 2)
    found = (study_digits if args.study == "digits" else study_cifar10)(args)
    everything = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, everything | {args.study: found | dict(date=now(), **hardware(), **versions())})
