"""One training step of the paper's 56 M network, variant by variant, and where its milliseconds go."""
import dataclasses
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from edm_nb.randomness import IndexStream
from edm_nb.runs import to_device
from edm_nb.training import edm_loss
from edm_nb.updates import Captured, compiled, make_batch, new_state, train_step
from record import wait
from studies.gpu.report import clock, tf32
from studies.gpu.session import good
from studies.gpu.setups import NETWORKS

VARIANTS = {                 # precision, channels-last, a word of `compile`, and whether updates are replayed from a recording
    "fp32 eager": ("fp32", False, "none", False),
    "+ channels-last": ("fp32", True, "none", False),
    "+ bf16": ("bf16", True, "none", False),
    "+ kernels": ("bf16", True, "fused", False),
    "+ recorded": ("bf16", True, "fused", True),
    "blocks": ("bf16", True, "blocks", False),
    "blocks, recorded": ("bf16", True, "blocks", True),
    "whole": ("bf16", True, "whole", False),
}


def matrix_rate(device, size):
    "Measured bf16 matrix rate in FLOP/s, on random data."
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    return 2 * size**3 / clock(device, lambda: a @ b, 10)["median"]


def training(report):
    "Milliseconds of one training step, variant by variant, and where they go."
    data = to_device(report.data("train"), report.device)
    rate = matrix_rate(report.device, 256 if report.toy else 8192)
    line = lambda network, variant, batch=512: dict(network=network, variant=variant, batch=batch)  # noqa: E731
    cells = [line("14 M", "+ recorded"), line("56 M", "+ recorded"), line("14 M", "+ recorded", 1024), line("14 M", "+ recorded", 256)]
    cells += [line("56 M", "+ bf16"), line("14 M", "+ bf16"), line("56 M", "fp32 eager", 256), line("56 M", "+ recorded", 256), line("14 M", "+ kernels"), line("56 M", "+ kernels")]
    cells += [line("14 M", "blocks, recorded"), line("14 M", "blocks")]
    if report.toy:
        cells = [line("56 M", name, 8) for name in VARIANTS]
    rows = report.rows("training", cells, lambda cell: one_variant(report, data, rate, **cell))
    found = [row for row in good(rows) if row["network"] == "56 M"]
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


def one_variant(report, data, rate, network, variant, batch):
    "Time one training step and its parts."
    precision, channels_last, how, replayed = VARIANTS[variant]
    device = report.device
    config = NETWORKS[network](report, batch=batch, precision=precision, channels_last=channels_last)
    flops = count_flops(report, config, data)
    state, order = new_state(config, data, device), IndexStream(len(data), 0)
    forward = compiled(state.denoiser, how, **(dict(backend="eager") if report.toy and how != "fused" else {}))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    launched = lambda: train_step(forward, state, make_batch(config, data, order, state.images, device))  # noqa: E731
    update, repeats = Captured(forward, state, data, order) if replayed else launched, 3 if report.toy else 8
    with tf32(precision != "fp32"):
        start = time.perf_counter()
        update()
        wait(device)
        first = time.perf_counter() - start
        for _ in range(3):                              # the fourth is recorded and replayed
            update()
        wait(device)
        ready = time.perf_counter() - start
        step = clock(device, update, repeats, 1, seconds=3)
        start = time.perf_counter()
        for _ in range(3):
            update()
        host = (time.perf_counter() - start) / 3        # free again, unless the device's queue is full
        wait(device)
        parts = {} if replayed else parts_of(forward, state, make_batch(config, data, order, 0, device), repeats)
        if not replayed:
            parts["data_ms"] = 1e3 * clock(device, lambda: make_batch(config, data, order, state.images, device), repeats, 1, 1)["median"]
    return dict(step_ms=1e3 * step["median"], step_low_ms=1e3 * step["low"], step_high_ms=1e3 * step["high"], n=step["n"],
                host_ms=1e3 * host, images_per_second=config.batch / step["median"], first_step_seconds=round(first, 1),
                ready_seconds=round(ready, 1), parameters=sum(p.numel() for p in state.denoiser.parameters()),
                recorded=replayed and update.graph is not None, **parts,
                flops_per_image=flops, utilisation=flops * config.batch / step["median"] / rate,
                peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None)


def parts_of(forward, state, drawn, repeats):
    "Milliseconds of forward and backward pass, optimiser and average."
    config, device = state.config, drawn.images.device

    def network():
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return edm_loss(forward, drawn.images, drawn.sigma, drawn.noise, sigma_data=state.denoiser.sigma_data, **drawn.cond).mean()
    timed = dict(forward_ms=network, forward_backward_ms=lambda: network().backward(), optimizer_ms=state.optimizer.step,
                 ema_ms=lambda: state.ema.update(state.denoiser, 0.999))
    return {name: 1e3 * clock(device, work, repeats, 1, 1)["median"] for name, work in timed.items()}
