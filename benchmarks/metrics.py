"""Fréchet distance at 2,048 dimensions beside other packages; streaming statistics; KID, precision and recall; features.

    python benchmarks/metrics.py [--dim 2048] [--repeats 3] [--threads 2]

Every pair of covariances has a known distance: Σ₂ = TΣ₁T with T symmetric positive is the optimal map's image of Σ₁, so
d² = tr (T−I)Σ₁(T−I). Errors are relative to tr Σ₁ + tr Σ₂, the size of the terms. A package that is not installed is
left out (pip install torchmetrics torch-fidelity scipy). Writes results/bench_metrics.json.
"""
import argparse, json, math, warnings

import numpy as np
import torch

from record import RESULTS, clock, hardware_line, load, now, versions, write_json
from edm_nb import metrics
from edm_nb import features, frechet


def pair(d, spectrum, seed):
    "Σ₁ with the given eigenvalues, Σ₂ = TΣ₁T, and their exact squared distance."
    g = torch.Generator().manual_seed(seed)
    q, r = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g))[0] for _ in range(2))
    cov = (q*spectrum) @ q.T
    t = (r*torch.linspace(0.5, 1.5, d, dtype=torch.float64)) @ r.T
    t, cov = (t + t.T)/2, (cov + cov.T)/2
    other = t @ cov @ t
    move = t - torch.eye(d, dtype=torch.float64)
    return cov, (other + other.T)/2, (move @ cov @ move).trace().item()


def kinds(d, seed):
    "Three situations, from easy to everyday."
    decades = lambda k, n: torch.logspace(0, -k, n, dtype=torch.float64)
    thin = torch.cat([decades(2, d//4), torch.zeros(d - d//4, dtype=torch.float64)])
    return {"full rank, 2 decades": pair(d, decades(2, d), seed), "full rank, 8 decades": pair(d, decades(8, d), seed),
            f"rank {d//4}": pair(d, thin, seed)}


def cholesky_eigenvalues(a, b):
    "The cheap route with no check of its accuracy."
    l = torch.linalg.cholesky(a)
    return (a.trace() + b.trace() - 2*torch.linalg.eigvalsh(l.T @ b @ l).clamp(min=0).sqrt().sum()).item()


def eigen_factor(cov):
    "Square root by eigenvectors, for any rank."
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(cov)*torch.finfo(cov.dtype).eps*values[-1]
    return vectors[:, keep]*values[keep].sqrt()


def eigen_singular(a, b):
    "The always accurate route."
    return (a.trace() + b.trace() - 2*torch.linalg.svdvals(eigen_factor(a).T @ eigen_factor(b)).sum()).item()


def general_sqrtm(a, b):
    "The matrix square root of the product, as the first implementations do."
    import scipy.linalg
    return float(np.real(np.trace(a.numpy() + b.numpy() - 2*scipy.linalg.sqrtm((a @ b).numpy()))))


def methods():
    "Name -> function of two covariances; peers only where installed."
    zero = lambda a: torch.zeros(len(a), dtype=torch.float64)
    found = {"edm_nb": lambda a, b: frechet.frechet_distance(zero(a), a, zero(b), b),
             "Cholesky + symmetric eigenvalues": cholesky_eigenvalues, "eigen factors + singular values": eigen_singular}
    try:
        import scipy.linalg  # noqa: F401
        found["scipy sqrtm"] = general_sqrtm
    except ImportError: print("scipy is not installed")
    try:
        from torchmetrics.image.fid import _compute_fid
        found["torchmetrics"] = lambda a, b: _compute_fid(zero(a), a, zero(b), b).item()
    except ImportError: print("torchmetrics is not installed")
    try:
        from torch_fidelity.metric_fid import fid_statistics_to_metric
        stats = lambda c: dict(mu=np.zeros(len(c)), sigma=c.numpy())
        found["torch-fidelity"] = lambda a, b: float(fid_statistics_to_metric(stats(a), stats(b), False)["frechet_inception_distance"])
    except ImportError: print("torch-fidelity is not installed")
    return found


def fastest(function, repeats):
    "Result and the fastest repetition by the clock, with its CPU seconds of all threads; the latter are the ones to compare on a busy machine."
    wall, cpu, value = min((clock(function) for _ in range(repeats)), key=lambda run: run[0])
    return value, dict(cpu_seconds=cpu, wall_seconds=wall, repeats=repeats)


def distances(d, repeats, seed):
    "The table of methods × kinds, and every method on identical statistics."
    table, found = {}, methods()
    small = torch.eye(64, dtype=torch.float64)
    for method in found.values(): method(small, small)         # libraries set themselves up on the first call
    for kind, (a, b, exact) in kinds(d, seed).items():
        table[kind] = {}
        for name, method in found.items():
            try:
                value, cost = fastest(lambda: method(a, b), repeats)
                error = abs(value - exact)/(a.trace() + b.trace()).item()
                entry = cost | dict(relative_error=error if math.isfinite(error) else None)
            except (RuntimeError, ValueError, np.linalg.LinAlgError) as failure:
                entry = dict(cpu_seconds=None, wall_seconds=None, relative_error=None, failed=type(failure).__name__)
            table[kind][name] = entry
            print(f"{kind:22s} {name:34s}", entry, flush=True)
    return table


def streaming(d, n, repeats, seed):
    "Accumulate n features in batches of 64: this package, and the plain loop of outer-product sums in float64."
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    def ours():
        stats = frechet.FeatureStats(d)
        for batch in x.split(64): stats.update(batch)
        return stats.cov
    def plain():
        total, square = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        for batch in x.split(64):
            y = batch.double(); total += y.sum(0); square += y.T @ y
        return (square - torch.outer(total, total)/n)/(n - 1)
    (a, mine), (b, loop) = fastest(ours, repeats), fastest(plain, repeats)
    return dict(n=n, dim=d, edm_nb=mine, plain_loop=loop, largest_difference=(a - b).abs().max().item())


def others(repeats, seed):
    "KID, precision and recall, and the shipped network."
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4000, 256, generator=g) for _ in range(2))
    images = torch.randint(256, (1000, 3, 32, 32), generator=g).byte()
    network = features.cifar_features()
    network(images[:256])
    rate = fastest(lambda: features.extract(images, network), repeats)[1]
    return dict(kid_4000x256=fastest(lambda: metrics.kid(a, b), 1)[1], precision_recall_4000x256=fastest(lambda: metrics.precision_recall(a, b), 1)[1],
                cifar_features_50000={k: v*50_000/len(images) for k, v in rate.items() if k != "repeats"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=2048); parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3); parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0); parser.add_argument("--out", default=RESULTS/"bench_metrics.json")
    args = parser.parse_args()
    from threadpoolctl import threadpool_limits        # scipy and torch bring a BLAS each
    threadpool_limits(args.threads); torch.set_num_threads(args.threads); warnings.simplefilter("ignore")
    table = distances(args.dim, args.repeats, args.seed)
    first = next(iter(table.values()))
    record = dict(frechet_distance=table, dim=args.dim, repeats=args.repeats, seed=args.seed,
                  speedup_over_sqrtm={k: row["scipy sqrtm"]["wall_seconds"]/row["edm_nb"]["wall_seconds"] for k, row in table.items()} if "scipy sqrtm" in first else None,
                  speedup_over_sqrtm_cpu={k: row["scipy sqrtm"]["cpu_seconds"]/row["edm_nb"]["cpu_seconds"] for k, row in table.items()} if "scipy sqrtm" in first else None,
                  streaming=streaming(args.dim, args.n, args.repeats, args.seed), others=others(args.repeats, args.seed),
                  hardware=f"{hardware_line()}, load average {load():.1f}", date=now(),
                  versions=versions("numpy", "scipy", "torchmetrics", "torch-fidelity"))
    write_json(args.out, record)
    print(json.dumps({k: v for k, v in record.items() if k != "frechet_distance"}, indent=1))


if __name__ == "__main__":
    main()
