"""How large the logits of self-attention have become in trained networks: the first sign of a learning rate that is too high.

    python studies/attention_logits.py "lr 1e-3=results/gpu/weights.safetensors" "lr 2e-3=raw.safetensors" --data cifar10-test.zip

Largest |q·k|/√d of every attention layer over eight noisy test images at four noise levels: results/gpu/logits.json.
"""
import argparse
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import hardware_line, now, RESULTS, versions, write_json

from edm_nb import checkpoints
from edm_nb.data import cifar10, load_images, one_hot, to_float


@torch.no_grad()
def largest(denoise, images, labels, sigma, seed=0):
    "One number per attention layer, in the order in which they run."
    found, plain = [], F.scaled_dot_product_attention

    def watch(q, k, v):
        found.append(float((q @ k.transpose(-1, -2)).abs().max()) / q.shape[-1]**0.5)
        return plain(q, k, v)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    with mock.patch.object(F, "scaled_dot_product_attention", watch):
        denoise(images + sigma*noise, torch.full((len(images),), sigma), class_labels=labels)
    return [round(value, 2) for value in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--data", help="test images; default: CIFAR-10 where the package finds it")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu" / "logits.json")
    args = parser.parse_args()
    data = (load_images(args.data) if args.data else cifar10("test")).take(slice(args.images))
    images, labels, rows = to_float(data.images), one_hot(data.labels, data.label_dim), []
    for name, _, path in (text.partition("=") for text in args.models):
        extra = checkpoints.read_config(path)["extra"]
        denoise = checkpoints.load(path).float().eval()
        for sigma in (0.01, 0.3, 2.0, 20.0):
            rows.append(dict(model=name, images_seen=extra.get("images"), sigma=sigma, largest=largest(denoise, images, labels, sigma)))
            print(rows[-1], flush=True)
    write_json(args.out, dict(about=__doc__.splitlines()[0], n=len(images), seed=0, data=data.name, rows=rows,
                              hardware=hardware_line(), date=now(), versions=versions()))


if __name__ == "__main__":
    main()
