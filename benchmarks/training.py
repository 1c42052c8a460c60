"""Speed and memory of training: images/s, ms per part of an update, peak memory, and on CUDA the model FLOP utilisation.

    python benchmarks/training.py --preset digits --updates 20
    python benchmarks/training.py --preset cifar10-cond-ddpmpp --device cuda --precision bf16 --compile blocks --peak-tflops 989

Parts are timed alone, after a warm-up, with the device synchronised around each; the whole update is timed without any
synchronisation inside. Writes results/training_speed_<preset>.json.
"""
import argparse
import dataclasses
import json
from pathlib import Path

import torch
from record import RESULTS, clock, cores, cpu_name, gpu_name, now, peak_memory, spread, timed, versions, write_json
from torch.utils.flop_counter import FlopCounterMode

from edm_nb import training as T
from edm_nb import configs, runs
from edm_nb.randomness import IndexStream


def milliseconds(part, device, repeats=5):
    "Median time of one call, after two that do not count."
    return 1000 * spread(timed({"part": part}, repeats, warmup=2, device=device)["part"].wall)["median"]


def forward_flops(state, batch):
    "FLOPs of one forward pass per image, counted operator by operator (a multiply-add counts two)."
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        T.edm_loss(state.denoiser, batch.images[:2], batch.sigma[:2], batch.noise[:2], **{k: v[:2] for k, v in batch.cond.items()})
    return counter.get_total_flops() / 2


def measure(config, data, device, updates):
    "The record of one configuration."
    state = updates.new_state(config, data, device)
    data, order, forward = runs.to_device(data, device), IndexStream(len(data), 0), runs.wrap(state, runs.Team(0, 1, device))
    make = lambda k: updates.make_batch(config, data, order, k * config.batch, device)
    batch = make(0)
    flops = forward_flops(state, batch)
    for k in range(3): updates.train_step(forward, state, make(k))
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    loss = updates.backward(forward, state, batch)
    parts = dict(batch=lambda: make(7), gradient=lambda: updates.backward(forward, state, batch), guard=lambda: updates.guard(state, loss),
                 adam=state.optimizer.step, ema=lambda: state.ema.update(state.denoiser, 0.999))
    parts = {name: milliseconds(part, device) for name, part in parts.items()}
    seconds, cpu, _ = clock(lambda: [updates.train_step(forward, state, make(10 + k)) for k in range(updates)], device)
    images = updates * config.batch
    return dict(images_per_second=round(images/seconds, 1), images_per_cpu_second=round(images/cpu, 1), updates=updates,
                milliseconds={k: round(v, 3) for k, v in parts.items()}, update_milliseconds=round(1000*seconds/updates, 3),
                peak_memory_gib=round(peak_memory(device) / 2**30, 3), parameters=sum(p.numel() for p in state.denoiser.parameters()),
                forward_gflops_per_image=round(flops / 1e9, 4), training_tflops_per_second=round(3*flops*images/seconds / 1e12, 4))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=sorted(configs.PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--batch", type=int, help="images per update")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--compile", choices=configs.COMPILE)
    parser.add_argument("--peak-tflops", type=float, help="the device's peak at this precision; adds model FLOP utilisation")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    changes = dict(batch=args.batch, micro_batch=args.micro_batch, precision=args.precision, compile=args.compile)
    config = dataclasses.replace(configs.PRESETS[args.preset], **{k: v for k, v in changes.items() if v is not None})
    device = torch.device(args.device)
    record = measure(config, runs.load_data(config), device, args.updates)
    if args.peak_tflops: record["model_flop_utilisation"] = round(record["training_tflops_per_second"] / args.peak_tflops, 4)
    record |= dict(preset=args.preset, batch=config.batch, precision=config.precision, compile=config.compile, channels_last=config.channels_last,
                   machine=gpu_name() if device.type == "cuda" else f"{cpu_name()}, {cores()} cores",
                   threads=torch.get_num_threads(), seed=config.seed, date=now(), **versions())
    write_json(args.out or RESULTS / f"training_speed_{args.preset}.json", record)
    print(json.dumps(record, indent=1))
