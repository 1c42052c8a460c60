"""Speed and memory of training: images/s, ms per part of an update, peak memory, and on CUDA the model FLOP utilisation.

    python benchmarks/training.py --preset digits --updates 20
    python benchmarks/training.py --preset cifar10-cond-ddpmpp --device cuda --precision bf16 --compile --peak-tflops 989

Parts are timed alone, after a warm-up, with the device synchronised around each; the whole update is timed without any
synchronisation inside. Writes results/training_speed_<preset>.json.
"""
import argparse
import dataclasses
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from edm_nb import training as T
from edm_nb.data import IndexStream

RESULTS = Path(__file__).resolve().parent.parent / "results"


def synchronise(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def timed(part, device, repeats):
    "Median milliseconds of one call."
    times = []
    for _ in range(repeats + 2):
        synchronise(device)
        start = time.perf_counter()
        part()
        synchronise(device)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[2:])[repeats // 2]


def forward_flops(state, batch):
    "FLOPs of one forward pass per image, counted operator by operator (a multiply-add counts two)."
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        T.edm_loss(state.denoiser, batch.images[:2], batch.sigma[:2], batch.noise[:2], **{k: v[:2] for k, v in batch.cond.items()})
    return counter.get_total_flops() / 2


def measure(config, data, device, updates):
    "The record of one configuration."
    state = T.new_state(config, data, device)
    data, order, forward = T.to_device(data, device), IndexStream(len(data), 0), T.wrap(state, T.Team(0, 1, device))
    make = lambda k: T.make_batch(config, data, order, k * config.batch, device)
    batch = make(0)
    flops = forward_flops(state, batch)
    for k in range(3): T.train_step(forward, state, make(k))
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    loss = T.backward(forward, state, batch)
    parts = dict(batch=timed(lambda: make(7), device, 5), gradient=timed(lambda: T.backward(forward, state, batch), device, 5),
                 guard=timed(lambda: T.guard(state, loss), device, 5), adam=timed(state.optimizer.step, device, 5),
                 ema=timed(lambda: state.ema.update(state.denoiser, 0.999), device, 5))
    synchronise(device)
    start, cpu = time.perf_counter(), time.process_time()
    for k in range(updates): T.train_step(forward, state, make(10 + k))
    synchronise(device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    images = updates * config.batch
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(images_per_second=round(images/seconds, 1), images_per_cpu_second=round(images/cpu, 1), updates=updates,
                milliseconds={k: round(v, 3) for k, v in parts.items()}, update_milliseconds=round(1000*seconds/updates, 3),
                peak_memory_gib=round(memory / 2**30, 3), parameters=sum(p.numel() for p in state.denoiser.parameters()),
                forward_gflops_per_image=round(flops / 1e9, 4), training_tflops_per_second=round(3*flops*images/seconds / 1e12, 4))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=sorted(T.PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--batch", type=int, help="images per update")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak at this precision; adds model FLOP utilisation")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    changes = dict(batch=args.batch, micro_batch=args.micro_batch, precision=args.precision, compile=args.compile or None)
    config = dataclasses.replace(T.PRESETS[args.preset], **{k: v for k, v in changes.items() if v is not None})
    device = torch.device(args.device)
    record = measure(config, T.load_data(config), device, args.updates)
    if args.peak_tflops: record["model_flop_utilisation"] = round(record["training_tflops_per_second"] / args.peak_tflops, 4)
    record |= dict(preset=args.preset, batch=config.batch, precision=config.precision, compile=config.compile, channels_last=config.channels_last,
                   machine=torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores",
                   threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(), seed=config.seed,
                   date=time.strftime("%Y-%m-%d"))
    path = args.out or RESULTS / f"training_speed_{args.preset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(fd, "w") as file: json.dump(record, file, indent=1)
    os.chmod(name, 0o644)
    os.replace(name, path)
    print(json.dumps(record, indent=1))
