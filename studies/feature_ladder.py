"""Does `cifar-features` behave like a distance? Noise, blur, JPEG, missing and unequal classes in growing levels; the floor; bias against n.

    EDM_NB_CIFAR10=TRAIN.zip python studies/feature_ladder.py [--n 5000] [--repeats 3]

Damaged training images are compared with the statistics of the whole test set; subsets differ between repetitions. The images
are stored as JPEG of quality 75, so the JPEG ladder moves the grid of blocks by half a block, and a finer curve compares
it with the same grid. Writes results/feature_ladder.json.
"""
import argparse, json, sys, time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, hardware_line, now, versions, write_json  # noqa: E402

from edm_nb import features, frechet, metrics  # noqa: E402
from edm_nb.data import cifar10  # noqa: E402

NOISE, BLUR, QUALITY = (0.02, 0.04, 0.08, 0.16, 0.32), (0.5, 0.8, 1.2, 2.0), (75, 50, 25, 12, 5)
QUALITIES, JPEG_N = (95, 75, 60, 50, 40, 33, 25, 18, 12, 8, 5), 2000
MISSING, UNEQUAL = (1, 2, 4, 6), (2, 4, 8, 16)      # classes left out; ratio of the largest to the smallest class


def stats_of(features, network):
    "Statistics of features that are already there."
    return frechet.FeatureStats(network.dim, network.name, network.hash).update(features)


def summary(values, level, unit):
    "One rung of the ladder."
    return dict(level=level, unit=unit, mean=float(np.mean(values)), std=float(np.std(values, ddof=1)), values=list(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=5000); parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pool", type=int, default=50_000, help="training images to draw from"); parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=RESULTS/"feature_ladder.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start, cpu_start, network = time.perf_counter(), time.process_time(), features.cifar_features()
    train, test = cifar10("train").take(slice(0, args.pool)), cifar10("test")
    reference_features = features.extract(test.images, network)
    reference = stats_of(reference_features, network)
    pool = features.extract(train.images, network)
    print(f"features of the pool: {time.perf_counter() - start:.0f} s", flush=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(args.repeats)]
    subsets = [features.pick_classes(train.labels, [1]*10, args.n, g) for g in generators]
    score = lambda features: features.stats_distance(stats_of(features, network), reference)
    floor = summary([score(pool[index]) for index in subsets], 0, "undamaged")

    def images_ladder(levels, unit, damage):
        steps = [floor | dict(level=0, unit=unit)]
        for level in levels:
            steps.append(summary([score(features.extract(damage(train.images[i], level, g), network)) for i, g in zip(subsets, generators)], level, unit))
            print(unit, steps[-1], flush=True)
        return steps

    def classes_ladder(levels, unit, shares):
        return [floor | dict(level=0 if unit.startswith("classes") else 1, unit=unit)] + [
            summary([score(pool[features.pick_classes(train.labels, shares(level), args.n, g)]) for g in generators], level, unit) for level in levels]

    ladders = {
        "noise": images_ladder(NOISE, "std / 255", features.add_noise),
        "blur": images_ladder(BLUR, "std (pixels)", lambda images, level, g: features.blur(images, level)),
        "JPEG": images_ladder(QUALITY, "quality", lambda images, level, g: features.jpeg(images, level, offset=4)),
        "missing classes": classes_ladder(MISSING, "classes left out", lambda k: [0]*k + [1]*(10 - k)),
        "unequal classes": classes_ladder(UNEQUAL, "largest/smallest class", lambda r: [r**(-c/9) for c in range(10)])}
    few = [index[torch.randperm(len(index), generator=g)[:JPEG_N]] for index, g in zip(subsets, generators)]
    curve = lambda offset: [dict(quality=q) | {k: v for k, v in summary([score(features.extract(features.jpeg(train.images[i], q, offset), network))
                            for i in few], q, "quality").items() if k in ("mean", "std", "values")} for q in QUALITIES]
    jpeg = dict(n=len(few[0]), untouched=float(np.mean([score(pool[i]) for i in few])), offsets={offset: curve(offset) for offset in (0, 4)})
    print("JPEG", json.dumps(jpeg), flush=True)
    sizes = [s for s in (500, 700, 1000, 1500, 2500, 5000, 10_000, 20_000) if s <= len(pool)]
    bias = [metrics.subset_distances(pool, reference, sizes, g) for g in generators]
    halves = torch.randperm(len(reference_features), generator=generators[0])
    half = len(halves)//2
    among = features.stats_distance(stats_of(reference_features[halves[:half]], network), stats_of(reference_features[halves[half:]], network))
    kid = metrics.kid(pool[subsets[0]], reference_features[:args.n])
    kinds = {name: features.rank_correlation(range(len(steps)), [s["mean"] for s in steps]) for name, steps in ladders.items()}
    record = dict(features=network.name, features_hash=network.hash, data="CIFAR-10 as stored (see the training record)", n=args.n, repeats=args.repeats,
                  reference="test set", reference_n=len(test), kinds=ladders, rank_correlation=kinds, jpeg=jpeg, floor=floor, halves_of_test=dict(n=half, value=among),
                  kid_floor=dict(value=kid.value, error=kid.error, n=args.n), bias=dict(sizes=sizes, values=bias), seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu_start,
                  seeds=list(range(args.repeats)), hardware=hardware_line(), versions=versions(), date=now())
    write_json(args.out, record)
    print(json.dumps(dict(rank_correlation=kinds, floor=floor, kid=kid, seconds=record["seconds"]), indent=1))


if __name__ == "__main__":
    main()
