"""Loading 50,000 small JPEGs: the first load, the cached load, and what other ways cost.

    EDM_NB_CIFAR10=path/to/train.zip python benchmarks/data.py          # writes results/bench_data.json

Wall-clock and processor seconds are both kept: on a machine that does other work, the second is the fair one.
"""
import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.io  # noqa: F401
from record import RESULTS, clock, cores, cpu_name, load, now, timed, versions, write_json

from edm_nb import __version__, archives, data, randomness


def pil_loop(path):
    "The plain way: a loop over the zip with PIL."
    from PIL import Image
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".png")))
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])).permute(0, 3, 1, 2)


def first_load(path, workers):
    "With an empty cache: hash, decode, write, map."
    shutil.rmtree(os.environ["EDM_NB_CACHE"], ignore_errors=True)
    return data.load_images(path, workers=workers)


def resized(path, folder, kind, side, count):
    "A zip of the first images at another size and in another format."
    from PIL import Image
    source, target = archives.open_zip(path), Path(folder)/f"{kind}{side}.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for i, name in enumerate(source.names[:count]):
            image, buffer = Image.open(io.BytesIO(source.read(name))).resize((side, side), Image.Resampling.BICUBIC), io.BytesIO()
            image.save(buffer, kind, **(dict(quality=90) if kind == "jpeg" else dict(compress_level=1)))
            archive.writestr(f"{i:08d}.{kind}", buffer.getvalue())
    source.close()
    return target


def threads_by_size(path, repeats):
    "Decoding with one thread and with all, in turns, for images of four sizes and two formats: where threads begin to pay. Best of `repeats`."
    rows, before = [], load()
    with tempfile.TemporaryDirectory() as folder:
        for side, count in ((32, 6000), (64, 3000), (128, 1000), (256, 400)):
            for kind in ("jpeg", "png"):
                source = archives.open_zip(resized(path, folder, kind, side, count))
                times = timed({workers: lambda w=workers: archives.decode_all(source, workers=w) for workers in (1, cores())}, repeats, warmup=1)
                microseconds = {workers: 1e6 * t.summary()["min"] / count for workers, t in times.items()}
                size = sum(len(source.read(name)) for name in source.names) / count
                rows.append(dict(kind=kind, side=side, n_images=count, repeats=repeats, bytes_per_image=round(size), one=round(microseconds[1], 1),
                                 all=round(microseconds[cores()], 1), default_threads=archives.decode_workers(len(source.read(source.names[0])), 3*side*side)))
                print(f"{kind:5s}{side:4d}: {size:8.0f} bytes, 1 thread {rows[-1]['one']:7.1f} µs, {cores()} threads {rows[-1]['all']:7.1f} µs", flush=True)
                source.close()
    return dict(what="µs per image, decoding with one thread and with all, best of `repeats`", cores=cores(), load_before=before, date=now(), rows=rows)


def sampling(image_set, batch=512, batches=100, seed=0):
    "Images per second when random batches are taken from the map and turned into floats."
    stream = randomness.IndexStream(len(image_set), seed)
    wall, cpu, _ = clock(lambda: [data.to_float(image_set.images[stream.next(batch)]) for _ in range(batches)])
    return dict(batch=batch, n=batches, images_per_second=batch * batches / wall, images_per_cpu_second=batch * batches / cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=os.environ.get("EDM_NB_CIFAR10"), help="EDM-format zip (default: EDM_NB_CIFAR10)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS/"bench_data.json")
    parser.add_argument("--threads-only", action="store_true", help="measure only where threads pay, and add it to the file")
    args = parser.parse_args()
    if not args.path:
        sys.exit("benchmarks/data.py: no data; set EDM_NB_CIFAR10 to an EDM-format zip or pass --path")
    torch.set_num_threads(1)
    if args.threads_only:
        return write_json(args.out, json.loads(args.out.read_text()) | dict(threads=threads_by_size(args.path, args.repeats)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDM_NB_CACHE"] = str(Path(folder)/"cache")
        reference = pil_loop(args.path)
        ways = [("PIL in a loop", False, lambda: pil_loop(args.path)),
                ("first load, 1 thread", True, lambda: first_load(args.path, 1)),
                (f"first load, {cores()} threads", True, lambda: first_load(args.path, cores())),
                ("cached load", True, lambda: data.load_images(args.path))]
        rows = []
        for name, ours, action in ways:
            times = timed({name: action}, args.repeats, warmup=0)[name]
            assert torch.equal(times.result.images if ours else times.result, reference), f"{name}: other pixels"
            found = times.summary()
            rows.append(dict(name=name, ours=ours, seconds=found.pop("median"), cpu_seconds=found.pop("cpu_median"), **found))
            print(f"{name:24s} {rows[-1]['seconds']:7.2f} s wall   {rows[-1]['cpu_seconds']:7.2f} s processor", flush=True)
        record = dict(what="loading an EDM-format zip into uint8 [N, 3, 32, 32]", n_images=len(reference), file=args.path.name,
                      file_bytes=args.path.stat().st_size, loading=rows, sampling=sampling(data.load_images(args.path)),
                      threads=threads_by_size(args.path, args.repeats), seed=0,
                      hardware=dict(machine=cpu_name(), cores=cores(), load_average=load()),
                      versions=versions() | dict(torchvision=torchvision.__version__, edm_nb=__version__), date=now())
    write_json(args.out, record)
    print(f"random batches from the map: {record['sampling']['images_per_second']:,.0f} images/s\nwrote {args.out}")


if __name__ == "__main__":
    main()
