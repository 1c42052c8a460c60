"One path through everything on real images: data, noise, loss, network, average, checkpoint, sampler, features, distance."
import dataclasses

import pytest
import torch

from edm_nb import checkpoints
from edm_nb import configs, runs, updates
from edm_nb.data import cifar10, find_cifar10, one_hot, to_uint8
from edm_nb.features import feature_stats, pixels
from edm_nb.frechet import frechet_distance
from edm_nb.ode_solvers import edm_sigmas, sample_ode


def distance(denoiser, data, n=256):
    noise = torch.randn(n, *data.images.shape[1:], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = sample_ode(denoiser, noise, edm_sigmas(6), class_labels=one_hot(data.labels[:n], data.label_dim)).float()
    features = pixels(tuple(data.images.shape[1:]))
    a, b = feature_stats(data.images, features), feature_stats(to_uint8(x), features)
    return float(frechet_distance(a.mean, a.cov, b.mean, b.cov)), x


@pytest.mark.cifar
@pytest.mark.skipif(find_cifar10("train") is None, reason="CIFAR-10 not found: set EDM_NB_CIFAR10")
def test_cifar_from_images_to_distance(tmp_path):
    data = runs.shrink(cifar10().take(slice(2_000)), 16)
    config = dataclasses.replace(configs.PRESETS["toy"], data="cifar10", resolution=16, images=6_400, batch=64, log_every=640,
                                 save_every=3_200, augment=0.12, precond={"scalings": "edm", "sigma_data": 0.5}, sigma_args={})
    untrained, _ = distance(updates.build_denoiser(config, data).eval(), data)
    losses = [record.loss for record in runs.train(config, tmp_path, data=data, device="cpu")]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    trained, x = distance(checkpoints.load(tmp_path/"model.safetensors"), data)
    assert x.isfinite().all() and x.abs().max() < 4
    assert trained < 0.7 * untrained, (trained, untrained)
