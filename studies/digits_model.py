"""Train the digits model that the chapters load: the `digits` preset, measured, written to results/models/.

    python studies/digits_model.py                  # results/models/digits.safetensors, .json, .png
    python studies/digits_model.py --rows           # the same network trained as VP, VE, iDDPM and EDM
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from record import RESULTS, cpu_name, now, versions  # noqa: E402

from edm_nb import checkpoints
from edm_nb.data import digits
from edm_nb.figures import save_png
from edm_nb.features import feature_stats, pixels, stats_distance
from edm_nb.generation import generate, Sampling
from edm_nb.configs import PRESETS, table_1_rows
from edm_nb.updates import ema_denoiser
from edm_nb.folders import sample_grid
from edm_nb.runs import train


def pixel_distance(denoiser, seed=0, steps=18):
    "Fréchet distance in pixel space of as many samples as there are digits, with the digits' own labels."
    data = digits()
    drawn = generate(denoiser, range(seed, seed + len(data)), Sampling(steps), data.labels.roll(seed).tolist())
    x = torch.cat([images for _, images, _ in drawn])
    real, fake = (feature_stats(images, pixels()) for images in (data.images, x))
    return stats_distance(real, fake)


def train_and_save(config, path):
    "One training, its record and a sheet of samples."
    started, cpu = time.perf_counter(), time.process_time()
    for record in train(config, device="cpu"):
        print(f"{path.stem}: {record.images:,} images, loss {record.loss:.4f}, {record.images_per_second:.0f} images/s", flush=True)
    denoiser = ema_denoiser(record.state)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    extra = dict(train_config=dataclasses.asdict(config), images=record.images, loss=round(record.loss, 5), seconds=round(seconds),
                 cpu_seconds=round(cpu), seed=config.seed, machine=cpu_name(), threads=torch.get_num_threads(), date=now(), **versions())
    checkpoints.save(path, denoiser, **extra)
    save_png(path.with_suffix(".png"), sample_grid(denoiser), columns=10, scale=4)
    distance = pixel_distance(denoiser)
    checkpoints.save(path, denoiser, **extra,
                     pixel_frechet_distance=round(distance, 4), samples=1797, sampler="Heun, 18 steps, 35 evaluations", sample_seed=0)
    print(f"{path.stem}: {seconds:.0f} s, {cpu:.0f} s of CPU, pixel distance {distance:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="train the four rows of Table 1 instead")
    parser.add_argument("--images", type=int, help="length of the training")
    parser.add_argument("--out", type=Path, default=RESULTS/"models", help="folder of the models")
    args = parser.parse_args()
    configs = {f"digits-{k}": v for k, v in table_1_rows(PRESETS["digits"]).items()} if args.rows else {"digits": PRESETS["digits"]}
    for name, config in configs.items():
        train_and_save(dataclasses.replace(config, **({"images": args.images} if args.images else {})), args.out/f"{name}.safetensors")
