"""Does `cifar-features` behave like a distance? Noise, blur, JPEG, missing and unequal classes in growing levels; the floor; bias against n.

    EDM_NB_CIFAR10=TRAIN.zip python benchmarks/feature_ladder.py [--n 1200] [--repeats 3]

Damaged training images are compared with the statistics of the whole test set; subsets differ between repetitions. Writes
results/feature_ladder.json.
"""
import argparse, json, os, platform, time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from edm_nb import metrics
from edm_nb.files import write_atomic
from edm_nb.data import cifar10

ROOT = Path(__file__).resolve().parent.parent
NOISE, BLUR, QUALITY = (0.02, 0.04, 0.08, 0.16, 0.32), (0.5, 0.8, 1.2, 2.0), (50, 25, 12, 5)
MISSING, UNEQUAL = (1, 2, 4, 6), (2, 4, 8, 16)      # classes left out; ratio of the largest to the smallest class


def stats_of(features, network):
    "Statistics of features that are already there."
    return metrics.FeatureStats(network.dim, network.name, network.hash).update(features)


def summary(values, level, unit):
    "One rung of the ladder."
    return dict(level=level, unit=unit, mean=float(np.mean(values)), std=float(np.std(values, ddof=1)), values=list(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=1200); parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pool", type=int, default=10_000, help="training images to draw from"); parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT/"results"/"feature_ladder.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start, cpu_start, network = time.perf_counter(), time.process_time(), metrics.cifar_features()
    train, test = cifar10("train").take(slice(0, args.pool)), cifar10("test")
    reference_features = metrics.extract(test.images, network)
    reference = stats_of(reference_features, network)
    pool = metrics.extract(train.images, network)
    print(f"features of the pool: {time.perf_counter() - start:.0f} s", flush=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(args.repeats)]
    subsets = [metrics.pick_classes(train.labels, [1]*10, args.n, g) for g in generators]
    score = lambda features: metrics.stats_distance(stats_of(features, network), reference)
    floor = summary([score(pool[index]) for index in subsets], 0, "undamaged")

    def images_ladder(levels, unit, damage):
        steps = [floor | dict(level=0, unit=unit)]
        for level in levels:
            steps.append(summary([score(metrics.extract(damage(train.images[i], level, g), network)) for i, g in zip(subsets, generators)], level, unit))
            print(unit, steps[-1], flush=True)
        return steps

    def classes_ladder(levels, unit, shares):
        return [floor | dict(level=0 if unit.startswith("classes") else 1, unit=unit)] + [
            summary([score(pool[metrics.pick_classes(train.labels, shares(level), args.n, g)]) for g in generators], level, unit) for level in levels]

    ladders = {
        "noise": images_ladder(NOISE, "std / 255", metrics.add_noise),
        "blur": images_ladder(BLUR, "std (pixels)", lambda images, level, g: metrics.blur(images, level)),
        "JPEG": images_ladder(QUALITY, "quality (0: untouched)", lambda images, level, g: metrics.jpeg(images, level)),
        "missing classes": classes_ladder(MISSING, "classes left out", lambda k: [0]*k + [1]*(10 - k)),
        "unequal classes": classes_ladder(UNEQUAL, "largest/smallest class", lambda r: [r**(-c/9) for c in range(10)])}
    sizes = [s for s in (500, 700, 1000, 1500, 2500, 5000) if s <= len(pool)]
    bias = [metrics.subset_distances(pool, reference, sizes, g) for g in generators]
    halves = torch.randperm(len(reference_features), generator=generators[0])
    half = len(halves)//2
    among = metrics.stats_distance(stats_of(reference_features[halves[:half]], network), stats_of(reference_features[halves[half:]], network))
    kid = metrics.kid(pool[subsets[0]], reference_features[:args.n])
    kinds = {name: metrics.rank_correlation(range(len(steps)), [s["mean"] for s in steps]) for name, steps in ladders.items()}
    record = dict(features=network.name, features_hash=network.hash, data="CIFAR-10 as stored (see the training record)", n=args.n, repeats=args.repeats,
                  reference="test set", reference_n=len(test), kinds=ladders, rank_correlation=kinds, floor=floor, halves_of_test=dict(n=half, value=among),
                  kid_floor=dict(value=kid.value, error=kid.error, n=args.n), bias=dict(sizes=sizes, values=bias), seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu_start,
                  seeds=list(range(args.repeats)), hardware=f"{platform.processor() or platform.machine()}, {args.threads} threads, {os.cpu_count()} cores",
                  versions=dict(python=platform.python_version(), torch=torch.__version__), date=date.today().isoformat())
    write_atomic(args.out, lambda file: file.write_text(json.dumps(record, indent=1) + "\n"))
    print(json.dumps(dict(rank_correlation=kinds, floor=floor, kid=kid, seconds=record["seconds"]), indent=1))


if __name__ == "__main__":
    main()
