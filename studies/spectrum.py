"""Mean and standard deviation of the cosine coefficients of CIFAR-10: the exact problem "with the spectrum of photographs".

    python studies/spectrum.py            # writes results/cifar10_spectrum.safetensors (25 kB); a few seconds

Chapters 00 and 01 measure samplers on a Gaussian with these moments. They read the file, so that their numbers are the same
whether the data set is installed or not. The metadata of the file name the source and the number of images. The book's own
file was made from the first 3,000 images of an EDM-format zip of CIFAR-10 whose images had been stored as JPEG, which weakens
the finest waves; a run on another copy gives other last digits.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, now  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from edm_nb.data import cifar10, find_cifar10, to_float  # noqa: E402
from edm_nb.files import write_atomic  # noqa: E402


def cosine_basis(n):
    "Rows are the n orthonormal discrete cosines, `[n, n]`, float64."
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def moments(images):
    "Mean and standard deviation over images `[N, C, n, n]` of each cosine coefficient, float64 `[C, n, n]` twice."
    basis = cosine_basis(images.shape[-1])
    waves = basis @ images.double() @ basis.T
    return waves.mean(0), waves.std(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3000, help="how many, from the front of the training set")
    parser.add_argument("--note", default="images stored as JPEG", help="what to say about the source")
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar10_spectrum.safetensors")
    args = parser.parse_args()
    if find_cifar10() is None: parser.error("CIFAR-10 not found: set EDM_NB_CIFAR10 to an EDM-format zip, a folder, or cifar-10-batches-py")
    data = cifar10().take(slice(0, args.images))
    mean, std = moments(to_float(data.images))
    metadata = dict(data=data.name, images=str(len(data)), split="train", source=find_cifar10().name, note=args.note,
                    unit="pixels in [-1, 1]", date=now())
    write_atomic(args.out, lambda path: save_file(dict(mean=mean.float(), std=std.float()), path, metadata))
    print(f"{args.out}: std {std.min():.4f} to {std.max():.4f}; {metadata}")


if __name__ == "__main__": main()
