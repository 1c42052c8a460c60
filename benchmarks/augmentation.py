"""Throughput and peak memory of the augmentation pipe.

    python benchmarks/augmentation.py                    # the CPU, and CUDA where there is one
    python benchmarks/augmentation.py --rounds 3 --out /tmp/bench.json

Each row runs in a process of its own, because a peak of memory can be read only once. Wall time depends on what else the
machine does; `images_per_cpu_second` counts the processor time of the process and depends on it much less.
"""
import argparse
import json
from pathlib import Path

import torch
from record import RESULTS, cores, hardware, in_own_process, memory, now, peak_memory, spread, timed, versions, write_json


def measure(device, batch, size, p, rounds, seed):
    "One row: images per second over `rounds` calls, and the memory above what the images themselves take."
    from edm_nb.augmentation import AugmentPipe
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.randn(batch, 3, size, size, device=device, generator=generator)
    pipe = AugmentPipe(p)
    pipe(images[:8], generator)                      # builds the matrices, loads the libraries
    repeat = max(1, 256 // batch)                    # a round is at least 256 images
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    before = memory(device)
    def work():
        for _ in range(repeat): pipe(images, generator)
    times = timed({"pipe": work}, rounds, warmup=0, device=device)["pipe"]
    rate = lambda seconds: spread([batch * repeat / s for s in seconds])
    return dict(device=device, batch=batch, size=size, p=p, n=rounds, seed=seed, images_per_second=rate(times.wall),
                images_per_cpu_second=rate(times.cpu) if device == "cpu" else None, peak_MiB=(peak_memory(device) - before) / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, default=RESULTS/"bench_augmentation.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row: return print(json.dumps(measure(**json.loads(args.row), rounds=args.rounds, seed=args.seed)))

    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for batch, size, p in ((64, 32, 0.12), (512, 32, 0.12), (64, 64, 0.15), (512, 32, 1.0)):
            r = in_own_process(__file__, dict(device=device, batch=batch, size=size, p=p), rounds=args.rounds, seed=args.seed, threads=args.threads)
            rows.append(r)
            print(f"{device} batch {batch} {size}x{size} p = {p}: {r['images_per_second']['median']:.0f} images/s, {r['peak_MiB']:.0f} MiB")
    write_json(args.out, dict(what="AugmentPipe(p) on float32 images with three channels", rows=rows,
                              date=now(), hardware=hardware(), versions=versions()))


if __name__ == "__main__":
    main()
