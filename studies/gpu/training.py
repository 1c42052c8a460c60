"""One training step of the paper's 56 M network, variant by variant, and where its milliseconds go."""
import dataclasses
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from edm_nb.randomness import IndexStream
from edm_nb.runs import to_device
from edm_nb.training import edm_loss
from edm_nb.updates import compiled, make_batch, new_state, train_step
from record import wait
from studies.gpu.report import clock, tf32
from studies.gpu.session import good
from studies.gpu.setups import training_config

VARIANTS = {                 # name → precision, channels-last, how it is compiled, mode of torch.compile
    "fp32 eager": ("fp32", False, "none", None),
    "+ channels-last": ("fp32", True, "none", None),
    "+ bf16": ("bf16", True, "none", None),
    "+ blocks": ("bf16", True, "blocks", "default"),
    "+ compile": ("bf16", True, "whole", "default"),
    "+ CUDA graphs": ("bf16", True, "whole", "reduce-overhead"),
}


def matrix_rate(device, size):
    "Measured bf16 matrix rate in FLOP/s, on random data."
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    return 2 * size**3 / clock(device, lambda: a @ b, 10)["median"]


def training(report):
    "Milliseconds of one training step, variant by variant, and where they go."
    data = to_device(report.data("train"), report.device)
    rate = matrix_rate(report.device, 256 if report.toy else 8192)
    cells = [dict(variant=name, batch=512) for name in ("+ bf16", "+ blocks", "fp32 eager")]
    cells += [dict(variant="+ blocks", batch=batch) for batch in (1024, 256)]
    cells += [dict(variant=name, batch=512) for name in ("+ channels-last", "+ compile", "+ CUDA graphs")]     # whole: minutes to compile
    if report.toy:
        cells = [dict(variant=name, batch=8) for name in VARIANTS]
    rows = report.rows("training", cells, lambda cell: one_variant(report, data, rate, **cell))
    found = good(rows)
    plain = [row for row in found if row["variant"] == "fp32 eager"]
    best = max(found, key=lambda row: row["images_per_second"]) if found else None
    return dict(rows=rows, matrix_rate=rate, best=best, target=dict(speedup=5, utilisation=0.4),
                speedup=best["images_per_second"] / plain[0]["images_per_second"] if plain else None)


def count_flops(report, config, data):
    "FLOP of one forward and backward pass per image: two per multiplication with addition."
    few = dataclasses.replace(config, batch=8)
    state = new_state(few, data, report.device)
    batch = make_batch(few, data, IndexStream(len(data), 0), 0, report.device)
    with FlopCounterMode(display=False) as counter:
        edm_loss(state.denoiser, batch.images, batch.sigma, batch.noise, **batch.cond).mean().backward()
    return counter.get_total_flops() / 8


def one_variant(report, data, rate, variant, batch):
    "Time one training step and its parts."
    precision, channels_last, how, mode = VARIANTS[variant]
    device, config = report.device, training_config(report, batch=batch, precision=precision, channels_last=channels_last)
    flops = count_flops(report, config, data)
    state, order = new_state(config, data, device), IndexStream(len(data), 0)
    forward = inner = compiled(state.denoiser, how, **(dict(backend="eager") if report.toy else dict(mode=mode)))
    if mode == "reduce-overhead":
        def forward(*inputs, **cond):
            torch.compiler.cudagraph_mark_step_begin()
            return inner(*inputs, **cond)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    drawn, repeats, calls = make_batch(config, data, order, 0, device), 3 if report.toy else 20, 1 if report.toy else 3

    def network():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return edm_loss(forward, drawn.images, drawn.sigma, drawn.noise, sigma_data=state.denoiser.sigma_data, **drawn.cond).mean()
    with tf32(precision != "fp32"):
        start = time.perf_counter()
        train_step(forward, state, drawn)
        wait(device)
        first = time.perf_counter() - start
        step = clock(device, lambda: train_step(forward, state, make_batch(config, data, order, state.images, device)), repeats, calls)
        drawing = clock(device, lambda: make_batch(config, data, order, state.images, device), repeats, 1)
        average = clock(device, lambda: state.ema.update(state.denoiser, 0.999), repeats, 1)
        # a replayed graph waits for the backward pass of the one before, so there it has no time of its own
        ahead = None if mode == "reduce-overhead" else clock(device, network, repeats, 1)
        both = clock(device, lambda: network().backward(), repeats, 1)
        update = clock(device, state.optimizer.step, repeats, 1)
    ms = lambda found: 1e3 * found["median"]  # noqa: E731
    return dict(step_ms=ms(step), step_low_ms=1e3 * step["low"], step_high_ms=1e3 * step["high"], n=step["n"],
                images_per_second=config.batch / step["median"], data_ms=ms(drawing), forward_ms=ms(ahead) if ahead else None,
                forward_backward_ms=ms(both), optimizer_ms=ms(update), ema_ms=ms(average), first_step_seconds=round(first, 1),
                flops_per_image=flops, utilisation=flops * config.batch / step["median"] / rate,
                peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None)
