"""How far the noisiest data can be told from noise, with all images of a data set: claim C01.

    python studies/first_level.py       # results/first_level.json; half a minute of a core, 700 MB

Someone draws x from p(x; sigma) or from N(0, sigma^2 I) with equal chance. The best player compares the densities and is right with
probability 1/2 + TV/2. With x = sigma z the ratio of the densities is the mean over the images y of exp(z.y/sigma - |y|^2/(2 sigma^2)),
so one product of all draws with all images serves every level, and the set with its mean taken away.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, hardware, now, versions, write_json  # noqa: E402

from edm_nb.data import book_images, to_float  # noqa: E402
from edm_nb.verdicts import interval  # noqa: E402


def ratios(z, images, sigmas, chunk=2_000):
    "p(x; sigma) / N(x; 0, sigma^2 I) at x = sigma z: a row per draw, a column per level; z `[n, D]`, images `[N, D]` as bytes."
    sums = torch.zeros(len(z), len(sigmas), dtype=torch.float64)
    for part in images.split(chunk):
        y = to_float(part)
        product, half = z @ y.T, y.double().square().sum(1).float() / 2
        for k, sigma in enumerate(sigmas):
            sums[:, k] += (product/sigma - half/sigma**2).double().exp().sum(1)
    return sums / len(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4_096, help="draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "first_level.json")
    args = parser.parse_args()
    data = book_images()
    images, sigmas = data.images.flatten(1), (10.0, 20.0, 40.0, 80.0, 160.0)
    z = torch.randn(args.n, images.shape[1], generator=torch.Generator().manual_seed(args.seed))
    rows = []
    for sigma, column in zip(sigmas, ratios(z, images, sigmas).T):
        right = interval((1 - 0.5*column.clamp(max=1)).tolist())
        rows.append(dict(sigma=sigma, right=right.mean, low=right.low, high=right.high))
        print(rows[-1], flush=True)
    write_json(args.out, dict(about=__doc__.splitlines()[0], data=data.name, images=len(data), n=args.n, seed=args.seed, rows=rows,
                              date=now(), **hardware(), **versions()))


if __name__ == "__main__":
    main()
