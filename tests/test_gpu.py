"""Training on CUDA up to a measured distance; each test has a toy-sized twin that runs on every machine.

    pytest -m gpu                                   # one minute of training
    EDM_NB_GPU_MINUTES=25 pytest -m gpu             # the `cifar10-25min` preset for that long, 50,000 samples
"""
import dataclasses
import os
import time

import pytest
import torch

from edm_nb import training as T
from edm_nb.data import digits, find_cifar10, one_hot, to_uint8
from edm_nb.metrics import feature_stats, frechet_distance, pixels
from edm_nb.ode_solvers import edm_sigmas, sample_ode

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CIFAR = pytest.mark.skipif(find_cifar10("train") is None, reason="CIFAR-10 not found: set EDM_NB_CIFAR10")

# minutes of training → largest acceptable distance, as a share of the untrained network's
THRESHOLDS = {1: 0.5, 5: 0.3, 25: 0.15, 600: 0.08}


def train_for(config, data, device, seconds):
    "Train until the configuration ends or the time is over; the average of that moment."
    end = time.monotonic() + seconds
    for record in T.train(config, data=data, device=device):
        if time.monotonic() > end: break
    return T.ema_denoiser(record.state), record


def measure(denoiser, data, n, features, batch, device, steps=18):
    "Distance of n samples to the training images; noise by batch number, so that n alone decides."
    def batches():
        for k, index in enumerate(torch.arange(n).split(batch)):
            g = torch.Generator().manual_seed(k)
            noise = torch.randn(len(index), *data.images.shape[1:], generator=g).to(device)
            labels = one_hot(data.labels[index % len(data)], data.label_dim).to(device)
            with torch.no_grad(): yield to_uint8(sample_ode(denoiser, noise, edm_sigmas(steps), class_labels=labels).float()).cpu()
    a, b = feature_stats(data.images, features), feature_stats(batches(), features)
    return float(frechet_distance(a.mean, a.cov, b.mean, b.cov))


def budget(config, data, device, seconds, n, batch, features, share, steps=18):
    untrained = measure(T.build_denoiser(config, data).to(device).eval(), data, min(n, 1_000), features, batch, device, steps)
    denoiser, record = train_for(config, data, device, seconds)
    distance = measure(denoiser, data, n, features, batch, device, steps)
    print(f"{record.images:,} images, {record.images_per_second:.0f} images/s, distance {distance:.3f}, untrained {untrained:.3f}")
    assert record.skipped == 0 and distance < share * untrained


def test_budget_path_at_toy_scale():
    "The same code on the CPU, so that it cannot rot."
    config = dataclasses.replace(T.PRESETS["toy"], images=6_400, log_every=640)
    budget(config, digits(), torch.device("cpu"), 60, 300, 150, pixels(), 0.6, steps=6)


@pytest.mark.gpu
@CUDA
@CIFAR
def test_cifar10_reaches_the_distance_of_its_budget():
    minutes = float(os.environ.get("EDM_NB_GPU_MINUTES", 1))
    share = next((s for m, s in sorted(THRESHOLDS.items(), reverse=True) if minutes >= m), 0.6)
    config = dataclasses.replace(T.PRESETS["cifar10-25min"], compile=minutes >= 5, log_every=5_120)
    data = T.load_data(config)
    budget(config, data, torch.device("cuda"), 60*minutes, 50_000 if minutes >= 25 else 5_000, 500, pixels((3, 32, 32)), share)


@pytest.mark.gpu
@CUDA
def test_no_synchronisation_inside_a_step():
    "The host may run ahead: a synchronising call inside an update is an error here."
    from edm_nb.data import IndexStream
    device, data = torch.device("cuda"), digits()
    config = dataclasses.replace(T.PRESETS["toy"], augment=0.0)
    state, data = T.new_state(config, data, device), T.to_device(data, device)
    order = IndexStream(len(data), 1)
    for k in range(3): T.train_step(state.denoiser, state, T.make_batch(config, data, order, 64*k, device))
    torch.cuda.set_sync_debug_mode("error")
    try: T.train_step(state.denoiser, state, T.make_batch(config, data, order, 256, device))
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("change", [dict(), dict(precision="bf16"), dict(compile=True), dict(channels_last=True), dict(micro_batch=16)])
def test_loss_falls_on_cuda(change):
    config = dataclasses.replace(T.PRESETS["toy"], images=6_400, log_every=640, **change)
    losses = [record.loss for record in T.train(config, device="cuda")]
    assert losses[-1] < 0.85 * losses[0]
