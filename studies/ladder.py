"""Trainings of chapter 04 that take too long for a notebook: claims C25 to C30.

    python studies/ladder.py digits     # all six claims on the digits -> results/training_digits.json
    python studies/ladder.py rows       # v-prediction and flow matching beside C30's four rows -> results/training_rows.json
    python studies/ladder.py leak       # C27 along the training -> results/training_leak.json
    python studies/ladder.py cifar16    # the ladder on 5,000 CIFAR-10 images at 16 x 16 -> results/training_cifar16.json

The result file is rewritten after every run, and runs that it already holds are skipped: stop and start as you like.
Seeds turn slowest within a study, so that a file which is not complete is still balanced. Every distance is that of n
samples to all training images, in pixels; `floors` are the same distance for real images in place of samples.
"""
import argparse
import copy
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from record import RESULTS, cores, cpu_name, now, versions, write_json  # noqa: E402

from edm_nb.configs import TrainConfig, ladder, later_rows, table_1_rows  # noqa: E402
from edm_nb.data import ImageSet, book_images, digits, to_float  # noqa: E402
from edm_nb.features import feature_stats, pixels, stats_distance  # noqa: E402
from edm_nb.framework import LINEAR, VE, vp_schedule  # noqa: E402
from edm_nb.generation import Sampling, generate  # noqa: E402
from edm_nb.ode_solvers import edm_sigmas, euler, heun, iddpm_sigmas, sample_ode, ve_sigmas, vp_sigmas  # noqa: E402
from edm_nb.runs import shrink, train  # noqa: E402
from edm_nb.training import EMA, ema_beta, loss_per_sigma  # noqa: E402
from edm_nb.updates import build_denoiser, ema_denoiser  # noqa: E402


def draw(denoiser, data, n, sigmas, seed=1000, schedule=LINEAR, solver=heun):
    "n samples as uint8, with the labels of the data in their order; one noise for all rows of a seed, a state in float32."
    noise = torch.randn(n, *data.images.shape[1:], generator=torch.Generator().manual_seed(seed))
    def sampler(model, noise, levels, randn_like, **cond):
        return sample_ode(model, noise, levels, schedule, solver, dtype=torch.float32, **cond)
    classes = data.labels.tolist() if denoiser.net.label_dim else None
    drawn = generate(denoiser, range(n), Sampling(levels=tuple(sigmas.tolist())), classes, batch=500, noise=noise, sampler=sampler)
    return torch.cat([images for _, images, _ in drawn])


def ten_heun_steps(denoiser):
    "The sampler of every study but C30's: 19 evaluations."
    return edm_sigmas(10, max(0.002, denoiser.sigma_min), min(80.0, denoiser.sigma_max))


@functools.lru_cache
def reference(images):
    "Statistics of the training images, once."
    return feature_stats(images, pixels(tuple(images.shape[1:])))


def distance(images, data):
    "Fréchet distance of pixels against the training images; warns where n is below the number of pixels."
    return stats_distance(reference(data.images), feature_stats(images, pixels(tuple(images.shape[1:]))))


def floors(data, n, repeats=5):
    "The distance of n real images, drawn with replacement, to all of them: what no sampler of n images gets below."
    choose = [torch.randint(len(data), (n,), generator=torch.Generator().manual_seed(k)) for k in range(repeats)]
    return [distance(data.images[index], data) for index in choose]


def orientation_and_spread(images, labels):
    "How concentrated orientation and position are: R of the principal axis per class, and the spread of the centroid."
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


def averages(config, data, marks=()):
    "Train; yield the record and the averaged denoiser at each mark, and at the end."
    step = math.gcd(config.images, *marks)
    for record in train(dataclasses.replace(config, log_every=step), data=data, device="cpu"):
        if record.images in marks or record.images >= config.images: yield record, ema_denoiser(record.state)


# --- digits -------------------------------------------------------------------------------------------------------

NET = dict(arch="tiny", model_channels=16, num_blocks=1)
BASE = TrainConfig(data="digits", network=dict(NET, channel_mult=[1, 2, 2]), precond={"scalings": "vp"}, sigma="vp",
                   weight="inverse_square", images=25_600, batch=64, lr=5e-4, lr_rampup=1_000, ema_halflife=2_000,
                   ema_rampup=None, channels_last=True, log_every=25_600, save_every=0)
FASTER = dict(batch=128, lr=2e-3, lr_rampup=2_000, ema_halflife=2_000, ema_rampup=0.05)
ROWS = ladder(BASE, FASTER, dict(NET, channel_mult=[2, 2]), sigma_data=0.75, sigma_args={"P_mean": -0.8, "P_std": 1.2},
              augment=dict(augment=0.12, augment_args={"xflip": 0.0, "yflip": 0.0}))
EVALUATIONS = (9, 19, 35)
SAMPLERS = {     # levels for a number of evaluations, and how the steps are made: as published
    "vp": lambda nfe: dict(sigmas=vp_sigmas(nfe), schedule=vp_schedule(), solver=euler),
    "ve": lambda nfe: dict(sigmas=ve_sigmas(nfe), schedule=VE, solver=euler),
    "iddpm": lambda nfe: dict(sigmas=iddpm_sigmas(nfe), schedule=LINEAR, solver=euler),
    "edm": lambda nfe: dict(sigmas=edm_sigmas((nfe + 1)//2), schedule=LINEAR, solver=heun)}


def sigma_study(images=51_200):
    "C25: loss against σ before and after, on held-out, centred digits without labels."
    whole = digits()
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    pixels_, held = to_float(whole.images), order[:500]
    centred = pixels_ - pixels_[order[500:]].mean(0)            # every pixel has mean 0 over the training images
    seen, unseen = (ImageSet(centred[i], name="centred digits") for i in (order[500:], held))
    scale = float(seen.images.std())
    config = dataclasses.replace(
        ROWS["E"], images=images, conditional=False, precond={"scalings": "edm", "sigma_data": round(scale, 4)},
        sigma_args={"P_mean": round(-1.2 + math.log(scale/0.5), 3), "P_std": 1.2})
    levels = torch.logspace(math.log10(0.002), math.log10(80), 24)

    def job(config):
        *_, (record, denoiser) = averages(config, seen)
        curve = lambda D: [loss_per_sigma(D, unseen, levels, n=1_000, seed=k).tolist() for k in range(3)]
        return dict(levels=levels.tolist(), before=curve(build_denoiser(config, seen).eval()), after=curve(denoiser),
                    loss=record.loss, sigma_data=scale, mean=float(seen.images.mean()), n_train=len(seen), n_held=len(held))
    yield dict(study="sigma", row="centred, unconditional, held out"), config, job


def one_distance(config, data, n):
    "Train, sample with the averaged weights, measure."
    *_, (record, denoiser) = averages(config, data)
    images = draw(denoiser, data, n, ten_heun_steps(denoiser))
    return images, dict(distance=distance(images, data), loss=record.loss, skipped=record.skipped, samples=n)


def ladder_study(data, rows, n):
    "C29: the rows of Table 2."
    for row, config in rows.items():
        yield dict(study="ladder", row=row), config, lambda config: one_distance(config, data, n)[1]


def noise_study(data, n, marks=(6_400, 12_800, 19_200, 25_600)):
    "C26 along the training: EDM's preconditioning and weight, and nothing but the distribution of the training noise differs."
    rows = {"vp": dict(sigma="vp", sigma_args={}), "ve": dict(sigma="ve", sigma_args={}), "lognormal": {},      # row E
            "lognormal, as published": dict(sigma_args={})}                      # P_mean is not moved to the scale of the digits
    for row, change in rows.items():
        def job(config):
            found = {}
            for record, denoiser in averages(config, data, marks):
                found[record.images] = dict(distance=distance(draw(denoiser, data, n, ten_heun_steps(denoiser)), data), loss=record.loss)
            return dict(marks=found, samples=n)
        yield dict(study="noise levels", row=row), dataclasses.replace(ROWS["E"], **change), job


def leakage_study(data, n):
    "C27: strong augmentation (each transform with probability 1/2), told and not told to the network, and none at all."
    strong = dict(augment=0.5, augment_args={"xflip": 0.0, "yflip": 0.0})
    rows = {"told": strong, "not told": strong | dict(augment_labels=False), "no augmentation": dict(augment=0.0)}
    for row, change in rows.items():
        def job(config):
            images, numbers = one_distance(config, data, n)
            return numbers | orientation_and_spread(images, data.labels[:n])
        yield dict(study="leakage", row=row), dataclasses.replace(ROWS["E"], **change), job


def leak_study(data, n, marks=(25_600, 51_200, 102_400)):
    "C27 along the training, with the paper's share of augmented images: fifteen minutes of a core for five seeds."
    mild = dict(augment=0.12, augment_args={"xflip": 0.0, "yflip": 0.0})
    for row, change in {"told": mild, "not told": mild | dict(augment_labels=False), "none": {}}.items():
        def job(config):
            found = {}
            for record, denoiser in averages(config, data, marks):
                images = draw(denoiser, data, n, ten_heun_steps(denoiser))
                found[record.images] = dict(distance=distance(images, data), **orientation_and_spread(images, data.labels[:n]))
            return dict(marks=found, samples=n)
        yield dict(study="leak", row=row), dataclasses.replace(ROWS["E"], images=marks[-1], **change), job


def ema_study(data, n, halflives=(250, 1_000, 4_000, 16_000)):
    "C28: the raw weights (half-life 0) and averages without ramp-up, of one training."
    def job(config):
        kept, seen = {}, 0
        for record in train(dataclasses.replace(config, log_every=config.batch), data=data, device="cpu"):
            for H in halflives:
                if H not in kept: kept[H] = EMA(record.state.denoiser)
                kept[H].update(record.state.denoiser, ema_beta(config.batch, H, seen, None))
            seen = record.images
        raw = copy.deepcopy(record.state.denoiser).eval()
        measure = lambda D: distance(draw(D, data, n, ten_heun_steps(D)), data)
        found = {"0": measure(raw)}
        return dict(distances=found | {str(H): measure(ema.copy_to(raw)) for H, ema in kept.items()}, samples=n)
    yield dict(study="ema", row="half-lives"), ROWS["E"], job


SMALL = dataclasses.replace(ROWS["E"], network=dict(NET, model_channels=8, channel_mult=[2, 2]))


def rows_study(data, n):
    "The rows that are younger than the paper, trained as C30's four rows were and sampled as EDM does."
    def job(config):
        *_, (record, denoiser) = averages(config, data)
        grid = {"edm": {nfe: distance(draw(denoiser, data, n, **SAMPLERS["edm"](nfe)), data) for nfe in EVALUATIONS}}
        return dict(grid=grid, loss=record.loss, samples=n)
    for row, config in later_rows(SMALL).items(): yield dict(study="rows", row=row), config, job


def crossed_study(data, n):
    "C30: a network of each row of Table 1, sampled in each of the four ways at three numbers of evaluations."
    for row, config in table_1_rows(SMALL).items():
        def job(config):
            *_, (record, denoiser) = averages(config, data)
            grid = {name: {nfe: distance(draw(denoiser, data, n, **way(nfe)), data) for nfe in EVALUATIONS}
                    for name, way in SAMPLERS.items()}
            return dict(grid=grid, loss=record.loss, samples=n, range=[denoiser.sigma_min, min(denoiser.sigma_max, 1e9)])
        yield dict(study="crossed", row=row), config, job


# --- CIFAR-10 at 16 x 16 ------------------------------------------------------------------------------------------

def cifar_rows():
    "The same ladder, a network of three or four levels, horizontal flips as in the paper."
    net = dict(arch="tiny", model_channels=16, num_blocks=1)
    base = TrainConfig(data="cifar10", data_limit=5_000, resolution=16, network=dict(net, channel_mult=[1, 2, 2, 2]),
                       precond={"scalings": "vp"}, sigma="vp", weight="inverse_square", images=9_600, batch=64, lr=5e-4,
                       lr_rampup=1_000, ema_halflife=2_000, ema_rampup=None, xflip=True, channels_last=True,
                       log_every=9_600, save_every=0)
    return ladder(base, FASTER, dict(net, channel_mult=[2, 2, 2]))


# --- working through ----------------------------------------------------------------------------------------------

def work_through(studies, path, about, seeds):
    "Run what is missing, a study at a time, with all its rows for one seed after the other; write after each run."
    result = json.loads(path.read_text()) if path.exists() else dict(runs=[])
    result["about"] = about
    for study in studies:
        for seed in range(seeds):
            for key, config, job in study():
                key, config = key | dict(seed=seed), dataclasses.replace(config, seed=seed)
                if any(all(r.get(k) == v for k, v in key.items()) for r in result["runs"]): continue
                cpu = time.process_time()
                numbers = job(config) | dict(cpu_seconds=round(time.process_time() - cpu, 1))
                result["runs"].append(key | numbers | dict(
                    config=dataclasses.asdict(config), date=now(), machine=cpu_name(), cores=cores(),
                    threads=torch.get_num_threads(), **versions()))
                write_json(path, result)
                print(json.dumps(key), numbers, flush=True)


def digits_studies(n):
    "The studies in the order of their worth, and what stands beside their numbers."
    data = digits()
    about = dict(data="digits, 1,797 images of 8 x 8", features="pixels, 64", samples=n, floors=floors(data, n),
                 clean=orientation_and_spread(data.images, data.labels))
    on_digits = (crossed_study, noise_study, functools.partial(ladder_study, rows=ROWS), ema_study, leakage_study)
    return [sigma_study, *(functools.partial(study, data, n=n) for study in on_digits)], about


def cifar_studies(n):
    "The ladder on photographs."
    whole = book_images(10_000)
    if whole.images.shape[1] != 3: raise SystemExit("CIFAR-10 was not found; set EDM_NB_CIFAR10")
    data, held = (shrink(whole.take(i), 16) for i in (torch.arange(5_000), torch.arange(5_000, 5_000 + n)))
    about = dict(data="5,000 CIFAR-10 images averaged to 16 x 16", features="pixels, 768", samples=n,
                 floors=floors(data, n), held_out=distance(held.images, data))
    return [functools.partial(ladder_study, data, cifar_rows(), n)], about


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "rows", "leak", "cifar16"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, help="fewer samples, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    studies, about = cifar_studies(args.samples or 2_000) if args.what == "cifar16" else digits_studies(args.samples or 1_797)
    if args.what == "leak": studies = [functools.partial(leak_study, digits(), args.samples or 1_797)]
    if args.what == "rows": studies = [functools.partial(rows_study, digits(), args.samples or 1_797)]
    work_through(studies, args.out/f"training_{args.what}.json", about, args.seeds)
