"""Ablations of chapter 04 that take too long for a notebook: claims C26 to C30, three seeds each.

    python benchmarks/ladder.py digits       # ladder, noise levels, leakage, EMA, four ways -> results/training_digits.json
    python benchmarks/ladder.py cifar16      # the ladder on 5,000 CIFAR-10 images at 16 x 16 -> results/training_cifar16.json

The result file is rewritten after every run, and runs that it already holds are skipped: stop and start as you like.
Cheap studies come first and seeds turn slowest, so a file that is not complete is still balanced.
"""
import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path

import torch
from record import RESULTS, cores, cpu_name, now, versions, write_json

from edm_nb.data import book_images, digits, one_hot, to_uint8
from edm_nb.framework import LINEAR, VE, vp_schedule
from edm_nb.features import feature_stats, pixels, stats_distance
from edm_nb.ode_solvers import edm_sigmas, euler, iddpm_sigmas, sample_ode, ve_sigmas, vp_sigmas
from edm_nb.training import EMA, ema_beta, ema_denoiser
from edm_nb.configs import ladder, table_1_rows, TrainConfig
from edm_nb.runs import shrink, train

def describe_machine():
    "What the numbers were measured on; all trainings run on the CPU."
    return dict(machine=cpu_name(), cores=cores(), threads=torch.get_num_threads(), **versions())


def draw(denoiser, data, n, steps=10, seed=1000, sigmas=None, **sampler):
    "n samples as uint8, with the labels of the data in their order."
    noise = torch.randn(n, *data.images.shape[1:], generator=torch.Generator().manual_seed(seed))
    if sigmas is None:
        sigmas = edm_sigmas(steps, max(0.002, denoiser.sigma_min), min(80.0, denoiser.sigma_max))
    out = []
    for part, index in zip(noise.split(500), torch.arange(n).split(500)):
        labels = one_hot(data.labels[index % len(data)], data.label_dim) if denoiser.net.label_dim else None
        with torch.no_grad():
            x = sample_ode(denoiser, part, sigmas, dtype=torch.float32, class_labels=labels, **sampler)
        out.append(to_uint8(x.float()))
    return torch.cat(out)


def distance(images, data):
    "Fréchet distance of pixels against the training images."
    features = pixels(tuple(data.images.shape[1:]))
    a, b = feature_stats(data.images, features), feature_stats(images, features)
    return stats_distance(a, b)


def shape_statistics(images, labels):
    "How concentrated orientation and position are: R of the principal axis per class, and the spread of the centroid in pixels."
    ink = images[:, 0].double()
    ink = ink / ink.sum((1, 2), keepdim=True).clamp(min=1)
    h, w = ink.shape[1:]
    y, x = torch.arange(h).double(), torch.arange(w).double()
    cy, cx = (ink.sum(2) * y).sum(1), (ink.sum(1) * x).sum(1)
    dy, dx = y[None, :, None] - cy[:, None, None], x[None, None, :] - cx[:, None, None]
    xx, yy, xy = ((ink * v).sum((1, 2)) for v in (dx*dx, dy*dy, dx*dy))
    theta = torch.atan2(2*xy, xx - yy)             # twice the angle of the principal axis
    R = [torch.polar(torch.ones_like(t), t).mean().abs().item() for t in (theta[labels == k] for k in range(10))]
    return dict(orientation=sum(R)/len(R), centroid=float((cx.var() + cy.var()).sqrt()))


def run(config, data, n):
    "Train, sample with the averaged weights, measure."
    cpu = time.process_time()
    for record in train(config, data=data, device="cpu"): pass
    denoiser = ema_denoiser(record.state)
    trained = time.process_time() - cpu
    images = draw(denoiser, data, n)
    return denoiser, images, dict(distance=distance(images, data), loss=record.loss, images=record.images, skipped=record.skipped,
                                  train_cpu_seconds=round(trained, 1), samples=n, sampler="Heun, 10 steps, 19 evaluations")


# --- digits -------------------------------------------------------------------------------------------------------

NET = dict(arch="tiny", model_channels=16, num_blocks=1)
BASE = TrainConfig(data="digits", network=dict(NET, channel_mult=[1, 2, 2]), precond={"scalings": "vp"}, sigma="vp",
                   weight="inverse_square", images=25_600, batch=64, lr=5e-4, lr_rampup=1_000, ema_halflife=2_000, ema_rampup=None,
                   channels_last=True, log_every=25_600, save_every=0)
ROWS = ladder(BASE, dict(batch=128, lr=2e-3, lr_rampup=2_000, ema_halflife=2_000, ema_rampup=0.05), dict(NET, channel_mult=[2, 2]),
              sigma_data=0.75, sigma_args={"P_mean": -0.8, "P_std": 1.2},
              augment=dict(augment=0.12, augment_args={"xflip": 0.0, "yflip": 0.0}))
SAMPLERS = {     # the samplers the rows came with, at about the evaluations of 10 Heun steps
    "vp": dict(sigmas=vp_sigmas(19), schedule=vp_schedule(), solver=euler), "ve": dict(sigmas=ve_sigmas(19), schedule=VE, solver=euler),
    "iddpm": dict(sigmas=iddpm_sigmas(19), schedule=LINEAR, solver=euler), "edm": dict(sigmas=edm_sigmas(19), schedule=LINEAR, solver=euler)}


def ladder_study(data, rows, n):
    for row, config in rows.items():
        yield dict(study="ladder", row=row), config, lambda config: run(config, data, n)[2]


def noise_study(data, n):
    "C26: EDM's preconditioning and weight, three distributions of training noise."
    for name in ("vp", "ve"):
        config = dataclasses.replace(ROWS["E"], sigma=name, sigma_args={})
        yield dict(study="noise levels", row=name), config, lambda config: run(config, data, n)[2]


def leak_study(data, n):
    "C27: strong augmentation (each transform with probability 1/2), told and not told to the network, and none at all."
    strong = dict(augment=0.5, augment_args={"xflip": 0.0, "yflip": 0.0})
    rows = {"told": strong, "not told": strong | dict(augment_labels=False), "no augmentation": dict(augment=0.0)}
    for row, change in rows.items():
        config = dataclasses.replace(ROWS["E"], **change)
        def job(config):
            _, images, numbers = run(config, data, n)
            return numbers | shape_statistics(images, data.labels[:n])
        yield dict(study="leakage", row=row), config, job


def ema_study(data, n, halflives=(250, 1_000, 4_000, 16_000)):
    "C28: several averages of one training."
    config = dataclasses.replace(ROWS["E"], log_every=ROWS["E"].batch)
    def job(config):
        cpu, averages, seen = time.process_time(), {}, 0
        for record in train(config, data=data, device="cpu"):
            for H in halflives:
                if H not in averages: averages[H] = EMA(record.state.denoiser)
                averages[H].update(record.state.denoiser, ema_beta(config.batch, H, seen, None))
            seen = record.images
        trained = time.process_time() - cpu
        raw = copy.deepcopy(record.state.denoiser).eval()
        distances = {"0": distance(draw(raw, data, n), data)}
        for H, ema in averages.items(): distances[str(H)] = distance(draw(ema.copy_to(raw), data, n), data)
        return dict(distances=distances, images=record.images, train_cpu_seconds=round(trained, 1), samples=n)
    yield dict(study="ema", row="half-lives"), config, job


def four_ways_study(data, n):
    "C30: the same network trained as each row of Table 1; its own sampler against EDM's at equal evaluations."
    for row, config in table_1_rows(ROWS["E"]).items():
        def job(config, row=row):
            denoiser, _, numbers = run(config, data, n)
            own = dict(SAMPLERS[row])
            sigmas = own.pop("sigmas")
            return numbers | dict(own_distance=distance(draw(denoiser, data, n, sigmas=sigmas, **own), data),
                                  own_sampler="the row's own steps and schedule, Euler, 19 evaluations")
        yield dict(study="four ways", row=row), config, job


def work_through(jobs, path, about, seeds):
    "Run what is missing; write after each run."
    result = json.loads(path.read_text()) if path.exists() else dict(about=about, runs=[])
    for seed in range(seeds):
        for key, config, job_of in jobs(seed):
            key = key | dict(seed=seed)
            if any(all(r.get(k) == v for k, v in key.items()) for r in result["runs"]): continue
            numbers = job_of()
            result["runs"].append(key | numbers | dict(config=dataclasses.asdict(config), date=now(),
                                                       hardware=describe_machine()))
            write_json(path, result)
            print(json.dumps(key), {k: v for k, v in numbers.items() if k in ("distance", "own_distance", "distances", "loss", "orientation",
                                                                             "centroid", "train_cpu_seconds")}, flush=True)


def seeded(study, seed):
    "The study's jobs with another seed."
    for key, config, job in study:
        yield key, dataclasses.replace(config, seed=seed), lambda job=job, config=config: job(dataclasses.replace(config, seed=seed))


def digits_jobs(data, n):
    def jobs(seed):
        for study in (ladder_study(data, ROWS, n), leak_study(data, n), noise_study(data, n), four_ways_study(data, n), ema_study(data, n)):
            yield from seeded(study, seed)
    return jobs


# --- CIFAR-10 at 16 x 16 ------------------------------------------------------------------------------------------

def cifar_rows():
    "The same ladder, a network of three or four levels, horizontal flips as in the paper."
    net = dict(arch="tiny", model_channels=16, num_blocks=1)
    base = TrainConfig(data="cifar10", data_limit=5_000, resolution=16, network=dict(net, channel_mult=[1, 2, 2, 2]),
                       precond={"scalings": "vp"}, sigma="vp", weight="inverse_square", images=9_600, batch=64, lr=5e-4, lr_rampup=1_000,
                       ema_halflife=2_000, ema_rampup=None, xflip=True, channels_last=True, log_every=9_600, save_every=0)
    return ladder(base, dict(batch=128, lr=2e-3, lr_rampup=2_000, ema_halflife=2_000, ema_rampup=0.05), dict(net, channel_mult=[2, 2, 2]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "cifar16"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="shorter trainings, for a trial")
    parser.add_argument("--samples", type=int, help="fewer samples, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.images:
        shorter = lambda rows: {k: dataclasses.replace(v, images=args.images, log_every=args.images) for k, v in rows.items()}
        ROWS, plain_rows = shorter(ROWS), cifar_rows
        cifar_rows = lambda: shorter(plain_rows())
    if args.what == "digits":
        data, n = digits(), args.samples or 1797
        halves = distance(data.images[::2], dataclasses.replace(data, images=data.images[1::2], labels=data.labels[1::2]))
        about = dict(data="digits, 1,797 images of 8 x 8", features="pixels", halves=halves,
                     clean=shape_statistics(data.images, data.labels), note="halves: distance between two halves of the data")
        work_through(digits_jobs(data, n), args.out/"training_digits.json", about, args.seeds)
    else:
        data, n = shrink(book_images(5_000), 16), args.samples or 500
        if data.images.shape[1] != 3: raise SystemExit("CIFAR-10 was not found; set EDM_NB_CIFAR10")
        about = dict(data="5,000 CIFAR-10 images averaged to 16 x 16", features="pixels",
                     halves=distance(data.images[::2], dataclasses.replace(data, images=data.images[1::2], labels=data.labels[1::2])))
        work_through(lambda seed: seeded(ladder_study(data, cifar_rows(), n), seed), args.out/"training_cifar16.json", about, args.seeds)
