"""The ideal denoiser of all 50,000 CIFAR-10 images: time and error.

    python benchmarks/ideal_denoiser.py                       # CIFAR-10 from EDM_NB_CIFAR10; about two minutes of one core
    python benchmarks/ideal_denoiser.py --sigmas 4 --repeats 3

Time: 64 queries, all versions in one process, in turn, so that they share whatever else the machine does. The level is
sigma = 10, where the weight is spread over hundreds of images and nothing can be skipped, and sigma = 0.5. One thread by
default: processor time of one thread hardly depends on what else the machine does, wall time on a shared machine does.
Error: largest absolute difference to the naive float64 version, which forms every difference x - y, over queries of three
kinds: noisy training images, noisy test-like images (held out), and points near the midpoint of two images.
"""
import argparse
import time
from pathlib import Path

import torch
from record import RESULTS, cores, cpu_name, load, now, spread, timed, versions, write_json

from edm_nb.data import cifar10, to_float
from edm_nb.oracles import IdealDenoiser

KIND = 3   # queries of each kind in the error measurement


def naive(x, sigma, Y):
    "Float64, every difference formed: the definition, one query at a time."
    D = []
    for query in x.double():
        logits = torch.cat([-(query - rows.double()).square().sum(1) for rows in Y.split(128)]) / (2 * sigma**2)
        w = logits.softmax(0)
        D.append(sum(w[i:i + 128] @ Y[i:i + 128].double() for i in range(0, len(Y), 128)))   # blocks that stay in the cache
    return torch.stack(D)


def float32_products(x, sigma, Y, norms):
    "Two float32 matrix products, nothing refined."
    logits = (x.float() @ Y.T - norms) / sigma**2
    return logits.softmax(1) @ Y


def float64_products(x, sigma, Y, norms):
    "The same in float64, converted block by block."
    logits = (torch.cat([x.double() @ rows.double().T for rows in Y.split(2048)], 1) - norms) / sigma**2
    w = logits.softmax(1)
    return sum(w[:, i:i + 2048] @ Y[i:i + 2048].double() for i in range(0, len(Y), 2048))


def cdist(x, sigma, Y):
    "torch.cdist in float32."
    return (-torch.cdist(x.float(), Y).square() / (2 * sigma**2)).softmax(1) @ Y


def queries(images, held_out, sigma, generator):
    "Noisy training images, noisy held-out images, near-midpoints of two images: KIND of each, float64 `[B, d]`."
    noise = torch.randn(3 * KIND, images.shape[1], generator=generator, dtype=torch.float64)
    middle = (images[:KIND].double() + images[KIND:2 * KIND].double()) / 2
    clean = torch.cat([images[2 * KIND:3 * KIND].double(), held_out[:KIND].double(), middle])
    noise[-KIND:] *= 0.1
    return clean + sigma * noise


def seconds(functions, repeats):
    "Name -> median, min and max of wall time and of processor time, in alternating runs."
    return {name: spread(times.wall, "_s") | spread(times.cpu, "_cpu_s") for name, times in timed(functions, repeats).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sigmas", type=int, default=10, help="noise levels from 0.002 to 80 in the error measurement; 0 skips it")
    parser.add_argument("--naive-queries", type=int, default=1, help="queries on which the naive version is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_ideal_denoiser.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    found = cifar10("train")
    Y = to_float(found.images).flatten(1).contiguous()
    held_out = to_float(cifar10("test").images[:args.queries]).flatten(1)
    start = time.perf_counter()
    ideal = IdealDenoiser(Y)
    setup = time.perf_counter() - start
    norms64 = torch.cat([rows.double().square().sum(1) / 2 for rows in Y.split(2048)])
    norms32 = norms64.float()
    generator = torch.Generator().manual_seed(args.seed)

    times = {}
    for sigma in (10., 0.5):
        x = held_out + sigma * torch.randn(held_out.shape, generator=generator)
        some = x[:args.naive_queries]
        times[sigma] = seconds({
            "IdealDenoiser": lambda: ideal(x, sigma),
            "float32 products (not refined)": lambda: float32_products(x, sigma, Y, norms32),
            "float64 products": lambda: float64_products(x, sigma, Y, norms64),
            "torch.cdist, float32": lambda: cdist(x, sigma, Y)}, args.repeats)
        slow = seconds({"naive": lambda: naive(some, sigma, Y)}, 2)["naive"]
        times[sigma]["naive float64 (scaled from fewer queries)"] = {k: v * len(x) / len(some) for k, v in slow.items()}
        print(sigma, {name: (round(v["median_cpu_s"], 3), round(v["median_s"], 3)) for name, v in times[sigma].items()}, flush=True)

    levels = torch.logspace(torch.tensor(0.002).log10(), torch.tensor(80.).log10(), args.sigmas).tolist() if args.sigmas else []
    levels = [0.002, *levels[1:-1], 80.] if levels else []
    record = dict(
        about="ideal denoiser: time of one call, and largest absolute error of D against naive float64",
        data=f"{found.name} ({len(Y):,} training images; queries from the test set)", n_images=len(Y), queries=args.queries,
        time=times[10.], time_sigma_05=times[0.5], timed_sigma=10.0, setup_s=setup, repeats=args.repeats, naive_queries=args.naive_queries,
        sigmas=[], errors=[], error_queries=3 * KIND, max_error=None, complete=not levels,
        seed=args.seed, threads=torch.get_num_threads(), hardware=f"{cpu_name()}, {cores()} cores", date=now(),
        load_average=load(), versions=versions())
    # from both ends and the middle inwards, so that a run which is cut short still covers the range
    order = sorted(range(len(levels)), key=lambda i: (i % 3 != 0, i % 3 != 1, i))
    for done, i in enumerate(order):
        sigma = levels[i]
        x = queries(Y, held_out, sigma, generator)
        truth, before = naive(x, sigma, Y), ideal.float64_queries
        answers = {"IdealDenoiser": ideal(x, sigma), "float32 products (not refined)": float32_products(x, sigma, Y, norms32),
                   "torch.cdist, float32": cdist(x, sigma, Y)}
        row = {"sigma": sigma, "float64_queries": ideal.float64_queries - before, **{name: (D - truth).abs().max().item() for name, D in answers.items()}}
        record["errors"] = sorted([*record["errors"], row], key=lambda e: e["sigma"])
        record["sigmas"] = [e["sigma"] for e in record["errors"]]
        record["max_error"], record["complete"] = max(e["IdealDenoiser"] for e in record["errors"]), done == len(order) - 1
        write_json(args.out, record)
        print(row, flush=True)
    write_json(args.out, record)
    print(f"largest error {record['max_error']}; wrote {args.out}")


if __name__ == "__main__": main()
