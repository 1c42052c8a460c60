"""Throughput and peak memory of the augmentation pipe.

    python benchmarks/augmentation.py                    # the CPU, and CUDA where there is one
    python benchmarks/augmentation.py --rounds 3 --out /tmp/bench.json

Each row runs in a process of its own, because a peak of memory can be read only once. Wall time depends on what else the
machine does; `images_per_cpu_second` counts the processor time of the process and depends on it much less.
"""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def summary(values):
    return dict(median=statistics.median(values), min=min(values), max=max(values))


def resident():
    "Bytes of memory that this process holds now (Linux), else its peak so far."
    status = Path("/proc/self/statm")
    if status.exists(): return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(device, batch, size, p, rounds, seed):
    "One row: images per second over `rounds` calls, and the memory above what the images themselves take."
    from edm_nb.augmentation import AugmentPipe
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.randn(batch, 3, size, size, device=device, generator=generator)
    pipe = AugmentPipe(p)
    pipe(images[:8], generator)                      # builds the matrices, loads the libraries
    repeat = max(1, 256 // batch)                    # a round is at least 256 images
    before = resident()
    if device == "cuda": torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
    wall, cpu = [], []
    for _ in range(rounds):
        if device == "cuda": torch.cuda.synchronize()
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(repeat): pipe(images, generator)
        if device == "cuda": torch.cuda.synchronize()
        wall.append(batch * repeat / (time.perf_counter() - start))
        cpu.append(batch * repeat / (time.process_time() - busy))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(device=device, batch=batch, size=size, p=p, n=rounds, seed=seed, images_per_second=summary(wall),
                images_per_cpu_second=summary(cpu) if device == "cpu" else None, peak_MiB=(peak - before) / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT/"results"/"bench_augmentation.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row: return print(json.dumps(measure(**json.loads(args.row), rounds=args.rounds, seed=args.seed)))

    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for batch, size, p in ((64, 32, 0.12), (512, 32, 0.12), (64, 64, 0.15), (512, 32, 1.0)):
            row = json.dumps(dict(device=device, batch=batch, size=size, p=p))
            command = [sys.executable, __file__, "--row", row, "--rounds", str(args.rounds), "--seed", str(args.seed),
                       "--threads", str(args.threads)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
            r = rows[-1]
            print(f"{device} batch {batch} {size}x{size} p = {p}: {r['images_per_second']['median']:.0f} images/s, {r['peak_MiB']:.0f} MiB")
    record = dict(
        what="AugmentPipe(p) on float32 images with three channels", rows=rows,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        hardware=dict(cpu=cpu_name(), cores=os.cpu_count(), threads=args.threads, load=os.getloadavg()[0],
                      gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        versions=dict(torch=torch.__version__, python=platform.python_version()))
    write(args.out, record)


def write(path, record):
    "Write a JSON file whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(fd, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)


if __name__ == "__main__":
    main()
