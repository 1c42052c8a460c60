"""The loss at every noise level while a network learns the digits: what page 5 of the explorer lays training noise over.

    python studies/loss_per_sigma.py             # results/loss_per_sigma.json, about five minutes of one core

The training of results/models/digits is run again, with its recorded configuration and seed, for its first 102,400 images.
The averaged network is measured on its way with `loss_per_sigma`, and the shipped model at the end.
"""
import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, hardware, now, versions, write_json  # noqa: E402

from edm_nb import checkpoints  # noqa: E402
from edm_nb.configs import config_from  # noqa: E402
from edm_nb.data import digits  # noqa: E402
from edm_nb.runs import train  # noqa: E402
from edm_nb.training import loss_per_sigma  # noqa: E402
from edm_nb.updates import build_denoiser, ema_denoiser  # noqa: E402


def measured(denoise, data, levels, n, seeds):
    "Mean over seeds of the loss at every level, and the standard error of that mean."
    runs = [loss_per_sigma(denoise, data, levels, n=n, seed=seed).tolist() for seed in range(seeds)]
    return dict(loss=[round(statistics.mean(at), 5) for at in zip(*runs)],
                error=[round(statistics.stdev(at) / len(at)**0.5, 5) for at in zip(*runs)] if seeds > 1 else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=102_400, help="length of the training")
    parser.add_argument("--levels", type=int, default=29, help="noise levels from 0.002 to 80")
    parser.add_argument("--n", type=int, default=512, help="images per level and seed")
    parser.add_argument("--seeds", type=int, default=3, help="choices of images and noise")
    parser.add_argument("--out", type=Path, default=RESULTS / "loss_per_sigma.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    levels, data, shipped = torch.logspace(-2.69897, 1.90309, args.levels), digits(), RESULTS / "models/digits.safetensors"
    full = config_from(json.loads(shipped.with_suffix(".json").read_text())["extra"]["train_config"])
    config = dataclasses.replace(full, images=args.images, log_every=args.images // 16, save_every=0)
    moments = [args.images // 16, args.images // 4, args.images]

    def note(images, denoise):
        curves.append(dict(images=images, **measured(denoise, data, levels, args.n, args.seeds)))
        print(f"{images:,} images: largest loss {max(curves[-1]['loss']):.3f}, smallest {min(curves[-1]['loss']):.3f}", flush=True)

    curves = []
    note(0, build_denoiser(config, data).eval())
    for record in train(config, device="cpu"):
        if record.images in moments: note(record.images, ema_denoiser(record.state))
    note(full.images, checkpoints.load(shipped))
    write_json(args.out, dict(
        about="weighted loss per value (Eq. 2 with lambda of EDM) of the averaged digits network, at every noise level",
        data=f"{data.name} ({len(data):,} images)", sigmas=[round(float(s), 6) for s in levels], curves=curves,
        sigma_data=full.precond["sigma_data"], training_noise=full.sigma_args, n=args.n, seeds=args.seeds,
        config=dataclasses.asdict(config), hardware=hardware(), versions=versions(), date=now()))
    print(f"wrote {args.out}")


if __name__ == "__main__": main()
