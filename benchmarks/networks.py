"""Training steps per second (forward, backward, Adam) of the networks, beside denoising-diffusion-pytorch's U-Net.

    python benchmarks/networks.py                     # the CPU, and CUDA where there is one
    python benchmarks/networks.py --rounds 3 --only digits --out /tmp/bench.json

Every row runs in a process of its own, because a peak of memory can be read only once; the rows take turns `--turns`
times, so that a busy machine slows all of them and not one. The peer is left out, with a note, where it is not installed.
Wall time depends on what else the machine does; `images_per_cpu_second` counts the processor time of the process and
depends on it much less.
"""
import argparse
import datetime
import importlib.metadata
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

# name: (task, batch, image shape, device, options)
SIZES = {"cifar": (64, (3, 32, 32)), "digits": (128, (1, 8, 8)), "paper": (128, (3, 32, 32))}


def ours(task, **options):
    from edm_nb.networks import ddpmpp, tiny
    make = dict(cifar=lambda: ddpmpp(model_channels=32, channel_mult=(1, 2, 2), num_blocks=1),      # 1.26 M parameters
                digits=lambda: tiny(), paper=lambda: ddpmpp(label_dim=0, augment_dim=9))
    net = make[task]()
    if options.get("channels_last"): net = net.to(memory_format=torch.channels_last)
    return torch.compile(net) if options.get("compile") else net


def peer(task, **options):
    from denoising_diffusion_pytorch import Unet
    mults, dim = dict(cifar=((1, 2, 2), 32), digits=((1, 2), 32), paper=((1, 2, 2, 4), 128))[task]
    return Unet(dim=dim, dim_mults=mults, channels=SIZES[task][1][0])


def rows(cuda, only):
    "Every (task, network, device, options) to measure."
    table = [("digits", "edm_nb", "cpu", {}), ("digits", "edm_nb", "cpu", dict(channels_last=True)),
             ("digits", "edm_nb", "cpu", dict(bf16=True)), ("digits", "peer", "cpu", {}),
             ("cifar", "edm_nb", "cpu", {}), ("cifar", "edm_nb", "cpu", dict(channels_last=True)),
             ("cifar", "edm_nb", "cpu", dict(channels_last=True, bf16=True)), ("cifar", "peer", "cpu", {})]
    if cuda: table += [("paper", "edm_nb", "cuda", {}), ("paper", "peer", "cuda", {}),
                       ("paper", "edm_nb", "cuda", dict(bf16=True, channels_last=True, compile=True))]
    return [row for row in table if only in (None, row[0])]


def summary(values):
    return dict(median=statistics.median(values), min=min(values), max=max(values))


def resident():
    "Bytes of memory that this process holds now (Linux), else its peak so far."
    status = Path("/proc/self/statm")
    if status.exists(): return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(task, network, device, options, rounds, seed):
    "One turn of one row."
    torch.manual_seed(seed)
    batch, shape = SIZES[task]
    before = resident()
    net = (ours if network == "edm_nb" else peer)(task, **options).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x, y, t = torch.randn(batch, *shape), torch.randn(batch, *shape), torch.rand(batch)
    if options.get("channels_last"): x = x.contiguous(memory_format=torch.channels_last)
    x, y, t = x.to(device), y.to(device), t.to(device)
    wall, cpu = [], []
    for step in range(rounds + 2):
        if device == "cuda": torch.cuda.synchronize()
        start, busy = time.perf_counter(), time.process_time()
        with torch.autocast(device, torch.bfloat16, enabled=bool(options.get("bf16"))): out = net(x, t)
        (out.float() - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda": torch.cuda.synchronize()
        if step >= 2:
            wall.append(batch / (time.perf_counter() - start))
            cpu.append(batch / (time.process_time() - busy))
    peak = (torch.cuda.max_memory_allocated() if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    return dict(wall=wall, cpu=cpu, peak_MiB=peak / 2**20, parameters=sum(p.numel() for p in net.parameters()))


def turn(row, args):
    "One turn of one row in a process of its own; None where the peer is missing."
    command = [sys.executable, __file__, "--row", json.dumps(row), "--rounds", str(args.rounds), "--seed", str(args.seed),
               "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    if "No module named 'denoising_diffusion_pytorch'" in done.stderr: return None
    raise RuntimeError(f"{row} failed:\n{done.stderr[-2000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=3, help="how often the rows take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=ROOT/"results"/"bench_networks.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row: return print(json.dumps(measure(*json.loads(args.row), rounds=args.rounds, seed=args.seed)))

    table = rows(torch.cuda.is_available(), args.only)
    turns = [[turn(row, args) for row in table] for _ in range(args.turns)]
    results, missing = [], []
    for (task, network, device, options), runs in zip(table, zip(*turns)):
        if runs[0] is None: missing.append(f"{task}: denoising-diffusion-pytorch is not installed"); continue
        flat = lambda key: summary([v for run in runs for v in run[key]])
        results.append(dict(task=task, network="denoising-diffusion-pytorch" if network == "peer" else network, device=device,
                            options=options, batch=SIZES[task][0], image=SIZES[task][1], parameters=runs[0]["parameters"],
                            n=args.rounds * args.turns, images_per_second=flat("wall"),
                            images_per_cpu_second=flat("cpu") if device == "cpu" else None,
                            peak_MiB=max(run["peak_MiB"] for run in runs)))
        r = results[-1]
        print(f"{task:7s} {r['network']:28s} {device} {json.dumps(options):50s} {r['parameters']:>11,} parameters "
              f"{r['images_per_second']['median']:8.1f} images/s {r['peak_MiB']:7.0f} MiB")
    for line in missing: print("left out:", line)
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if not missing: versions["denoising-diffusion-pytorch"] = importlib.metadata.version("denoising-diffusion-pytorch")
    write(args.out, dict(
        what="one training step: forward, backward, Adam", seed=args.seed, rows=results, missing=missing, versions=versions,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        hardware=dict(cpu=cpu_name(), cores=os.cpu_count(), threads=args.threads, load=os.getloadavg()[0],
                      gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


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
