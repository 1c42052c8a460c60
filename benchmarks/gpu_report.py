"""Everything that the book owes a GPU, in one resumable run.

    python benchmarks/gpu_report.py --data cifar10-train.zip --test cifar10-test.zip        # one CUDA machine, about 30 minutes
    python benchmarks/gpu_report.py --toy --device cpu --out /tmp/report                    # the same code at toy size

Each stage writes its own file under --out (default results/gpu) as it ends, with hardware, versions, seed and date; a
stage whose file is there is not run again, and a training that was cut off goes on from its last checkpoint. The order:

    correctness   networks, samplers, augmentation and loss on the device against float64 on the CPU
    training      ms and images/s of the paper's 56 M network, from plain fp32 to bf16 + channels-last + compile
    sampling      images/s of 18 Heun steps, and how much of the time lies inside the network
    trials        short trainings of the variants in TRIALS, to choose what the budget is spent on
    model         the training itself, with snapshots on the way, and the Fréchet distance of each
    study         distance against evaluations, the rows of Table 1, the churn grid
    artefacts     sample grid, nearest neighbours, Langevin strips, weights

The distance is `cifar-features`, never an FID, and the images it is measured against may be JPEG-recoded: it compares with
other numbers of this report only.
"""
import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from edm_nb import checkpoints  # noqa: E402
from edm_nb.augmentation import AugmentPipe  # noqa: E402
from edm_nb.data import ImageSet, IndexStream, cifar10, load_images, one_hot, to_float, to_uint8  # noqa: E402
from edm_nb.figures import save_png  # noqa: E402
from edm_nb.files import write_atomic  # noqa: E402
from edm_nb.framework import LINEAR, VE, MixtureDenoiser, vp_schedule  # noqa: E402
from edm_nb.metrics import FeatureStats, cifar_features, frechet_distance, nearest_neighbours  # noqa: E402
from edm_nb.networks import build_network  # noqa: E402
from edm_nb.ode_solvers import edm_sigmas, euler, heun, iddpm_sigmas, sample_ode, ve_sigmas, vp_sigmas  # noqa: E402
from edm_nb.preconditioning import Preconditioned  # noqa: E402
from edm_nb.stochastic import Churn, SeededNoise, langevin, sample  # noqa: E402
from edm_nb.training import (PRESETS, TrainState, edm_loss, ema_denoiser, make_batch, new_state, to_device,  # noqa: E402
                             train, train_step)

CHURNS = {"none": Churn(), "CIFAR-10, VP": Churn(30, 0.01, 1, 1.007), "CIFAR-10, VE": Churn(80, 0.05, 1, 1.007)}
TRIALS = {                      # what is tried for `--trial-minutes` each before the budget is spent
    "preset": {},
    "lr 2e-3": {"lr": 2e-3},
    "batch 256": {"batch": 256},
    "wider": {"network": {"arch": "ddpmpp", "model_channels": 96, "channel_mult": [2, 2, 2], "num_blocks": 3,
                          "attn_resolutions": [16], "dropout": 0.0}},
    "no augmentation": {"augment": 0.0, "xflip": True},
}


def environment(device):
    "What a number cannot be read without."
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), gpu=gpu, torch=torch.__version__,
                cuda=torch.version.cuda, python=platform.python_version(), machine=platform.machine(),
                threads=torch.get_num_threads())


def write_json(path, value):
    "Whole or not at all."
    return write_atomic(Path(path), lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


def wait(device):
    "Let the device finish, so that a clock can be read."
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device, work, repeats, warmup=3):
    "Median and extremes of the seconds that `work()` takes."
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return dict(median=statistics.median(times), low=min(times), high=max(times), n=repeats)


def relative(value, reference):
    "‖value − reference‖ / ‖reference‖ in float64 on the CPU; NaN never passes a comparison."
    reference = reference.double().cpu()
    return float((value.double().cpu() - reference).norm() / reference.norm())


class Report:
    "Arguments, data and the files of one run."
    def __init__(self, args):
        self.args, self.device, self.toy, self.out = args, torch.device(args.device), args.toy, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self._features = self._reference = None

    @property
    def features(self):
        "The feature network, on the device."
        self._features = self._features or cifar_features(self.device)
        return self._features

    def data(self, split):
        "The image set of a split; a toy run without data draws its own."
        path = self.args.data if split == "train" else self.args.test
        if path or not self.toy:
            found = load_images(path) if path else cifar10(split)
            return found.take(slice(256)) if self.toy else found
        generator = torch.Generator().manual_seed(len(split))
        coarse = torch.rand(256, 3, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear").mul(255).to(torch.uint8)
        return ImageSet(images, torch.arange(256) % 10, "blobs", tuple("0123456789"))

    def run(self, stage):
        "Run one stage unless its file is there."
        path = self.out / f"{stage.__name__}.json"
        if path.exists() and stage.__name__ not in self.args.redo:
            print(f"{stage.__name__}: done before ({path})", flush=True)
            return json.loads(path.read_text())
        print(f"{stage.__name__}: started", flush=True)
        start = time.perf_counter()
        result = stage(self)
        result = dict(stage=stage.__name__, toy=self.toy, seed=self.args.seed, seconds=round(time.perf_counter() - start, 1),
                      environment=environment(self.device), **result)
        write_json(path, result)
        print(f"{stage.__name__}: {result['seconds']:.0f} s -> {path}", flush=True)
        return result

    def load(self, name):
        "The result of an earlier stage."
        path = self.out / f"{name}.json"
        if not path.exists():
            sys.exit(f"gpu_report.py: {path} is missing; run the stage {name!r} first")
        return json.loads(path.read_text())

    def reference(self):
        "Statistics of the training set, computed once."
        if self._reference is None:
            self._reference = self.stats(self.data("train").images.split(500))
        return self._reference

    def stats(self, batches):
        "Feature statistics of batches of bytes."
        stats = FeatureStats(self.features.dim)
        for images in batches:
            stats.update(self.features(images.to(self.device)).cpu())
        return stats

    def distance(self, denoise, n, sigmas, churn=Churn(), solver=heun, schedule=LINEAR):
        "Fréchet distance of n samples against the training statistics, and the seconds that drawing them took."
        start = time.perf_counter()
        stats = self.stats(images for _, images in self.draw(denoise, n, sigmas, churn, solver, schedule))
        reference = self.reference()
        return dict(distance=frechet_distance(stats.mean, stats.cov, reference.mean, reference.cov), n=n,
                    seconds=round(time.perf_counter() - start, 1))

    def draw(self, denoise, n, sigmas, churn=Churn(), solver=heun, schedule=LINEAR):
        "Samples as bytes, a batch at a time; class = seed mod 10, all noise from the seed of the batch."
        shape = (denoise.net.channels, denoise.net.resolution, denoise.net.resolution)
        for start in range(0, n, self.args.sample_batch):
            size = min(self.args.sample_batch, n - start)
            generator = torch.Generator(self.device).manual_seed(self.args.seed * 10**6 + start)
            noise = torch.randn(size, *shape, generator=generator, device=self.device)
            fresh = lambda x: torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)  # noqa: E731
            labels = one_hot(torch.arange(start, start + size) % 10, 10).to(self.device)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                x = sample(denoise, noise, sigmas, churn, fresh, schedule, solver, class_labels=labels)
            yield labels, to_uint8(x)


def correctness(report):
    "Networks, loss, samplers and augmentation on the device against float64 on the CPU."
    device, errors = report.device, {}
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    generator = torch.Generator().manual_seed(report.args.seed)
    for arch in ("ddpmpp", "ncsnpp", "adm"):
        config = dict(arch=arch, resolution=16, channels=3, label_dim=10, model_channels=32, num_blocks=1, attn_resolutions=[8])
        denoise = Preconditioned(build_network(config)).eval()
        for p in denoise.parameters():      # an untrained network returns zero, which would hide errors
            p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() if p.ndim > 1 else 100)**-0.5
        y, noise = torch.randn(2, 8, 3, 16, 16, generator=generator)
        sigma, labels = torch.logspace(-2, 1.5, 8), torch.eye(10)[:8]
        exact = Preconditioned(build_network(config)).double().eval()
        exact.load_state_dict(denoise.state_dict())
        denoise.to(device)
        inputs = (y, sigma.log() / 4, labels)
        with torch.no_grad():
            F64 = exact.net(*(v.double() for v in inputs))
            loss64 = edm_loss(exact, y.double(), sigma.double(), noise.double(), class_labels=labels.double())
            for name, enabled in (("fp32", False), ("bf16", True)):
                with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                    F = denoise.net(*(v.to(device) for v in inputs))
                    loss = edm_loss(denoise, y.to(device), sigma.to(device), noise.to(device), class_labels=labels.to(device))
                errors[f"{arch} F {name}"] = relative(F, F64)
                errors[f"{arch} loss {name}"] = relative(loss, loss64)
    means = torch.randn(5, 6, generator=generator).double()
    noise = torch.randn(64, 6, generator=generator).double()
    for name, schedule in (("edm", edm_sigmas(18)), ("vp", vp_sigmas(18)), ("ve", ve_sigmas(18)), ("iddpm", iddpm_sigmas(18))):
        here = sample_ode(MixtureDenoiser(means, 0.3), noise, schedule)
        there = sample_ode(MixtureDenoiser(means.to(device), 0.3), noise.to(device), schedule)
        errors[f"sampler {name}"] = relative(there, here)
    images = torch.rand(64, 3, 32, 32, generator=generator) * 2 - 1
    augmented, labels = AugmentPipe(p=1.0)(images.to(device), generator=torch.Generator(device).manual_seed(0))
    limits = {name: 2e-2 if "bf16" in name else 1e-10 if "sampler" in name else 1e-4 for name in errors}
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    wrong = [name for name, error in errors.items() if not error < limits[name]]
    finite = bool(augmented.isfinite().all() and labels.isfinite().all())
    return dict(errors=errors, limits=limits, augmentation_finite=finite, passed=not wrong and finite, failed=wrong)


def matrix_rate(device, size):
    "Measured bf16 matrix rate in FLOP/s, on random data."
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    return 2 * size**3 / clock(device, lambda: a @ b, 10)["median"]


def training_config(report, **changes):
    "The paper's CIFAR-10 configuration, or a toy of it."
    config = PRESETS["cifar10-cond-ddpmpp"]
    if report.toy:
        changes = {**changes, "batch": 8, "network": dict(arch="ddpmpp", model_channels=16, channel_mult=[1, 2], num_blocks=1,
                                                          attn_resolutions=[16], dropout=0.0)}
    return dataclasses.replace(config, **changes)


def training(report):
    "Milliseconds of one training step, variant by variant, and where they go."
    device, rows = report.device, []
    data = to_device(report.data("train"), device)
    rate = matrix_rate(device, 256 if report.toy else 8192)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    variants = [("fp32 eager", dict(precision="fp32", channels_last=False, compile=False)),
                ("+ channels-last", dict(precision="fp32", channels_last=True, compile=False)),
                ("+ bf16", dict(precision="bf16", channels_last=True, compile=False)),
                ("+ compile", dict(precision="bf16", channels_last=True, compile=True))]
    batches = [8] if report.toy else [128, 256, 512, 1024]
    for name, changes in variants if not report.toy else variants[:3]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = changes["precision"] != "fp32"
        for batch in batches if name == "+ compile" or report.toy else [512]:
            try:
                rows.append(dict(variant=name, batch=batch, **one_variant(report, data, rate, {**changes, "batch": batch})))
            except torch.cuda.OutOfMemoryError as error:
                rows.append(dict(variant=name, batch=batch, failed=f"out of memory: {str(error)[:80]}"))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"  {rows[-1]}", flush=True)
            write_json(report.out / "training.partial.json", rows)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    measured = [row for row in rows if "images_per_second" in row]
    best = max(measured, key=lambda row: row["images_per_second"])
    return dict(rows=rows, matrix_rate=rate, best=best, speedup=best["images_per_second"] / measured[0]["images_per_second"],
                target=dict(speedup=5, utilisation=0.4))


def one_variant(report, data, rate, changes):
    "Time one training step and its parts."
    device, config = report.device, training_config(report, **changes)
    state = new_state(config, data, device)
    forward = torch.compile(state.denoiser) if config.compile else state.denoiser
    order = IndexStream(len(data), 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batch = make_batch(config, data, order, 0, device)
    repeats = 3 if report.toy else 20
    step = clock(device, lambda: train_step(forward, state, make_batch(config, data, order, state.images, device)), repeats,
                 warmup=1 if report.toy else 5)
    drawing = clock(device, lambda: make_batch(config, data, order, state.images, device), repeats)
    average = clock(device, lambda: state.ema.update(state.denoiser, 0.999), repeats)

    def network(grad):
        with torch.set_grad_enabled(grad), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return edm_loss(forward, batch.images, batch.sigma, batch.noise, **batch.cond).mean()
    ahead = clock(device, lambda: network(True), repeats)
    both = clock(device, lambda: network(True).backward(), repeats)
    with FlopCounterMode(display=False) as counter:
        edm_loss(state.denoiser, batch.images, batch.sigma, batch.noise, **batch.cond).mean().backward()
    flops = counter.get_total_flops()
    return dict(step_ms=1e3 * step["median"], step_low_ms=1e3 * step["low"], step_high_ms=1e3 * step["high"], n=repeats,
                images_per_second=config.batch / step["median"], data_ms=1e3 * drawing["median"],
                forward_ms=1e3 * ahead["median"], backward_ms=1e3 * (both["median"] - ahead["median"]),
                ema_ms=1e3 * average["median"], flops_per_image=flops / config.batch,
                utilisation=flops / step["median"] / rate,
                peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None)


def sampling(report):
    "Images/s of 18 Heun steps with the paper's network, and the share of the time that is network."
    device, config = report.device, training_config(report)
    denoise = ema_denoiser(new_state(config, report.data("train"), device))
    steps, batch = (4, 8) if report.toy else (18, report.args.sample_batch)
    sigmas, rows = edm_sigmas(steps), []
    labels = one_hot(torch.arange(batch) % 10, 10).to(device)
    noise = torch.randn(batch, 3, 32, 32, device=device)
    compiled = torch.compile(denoise) if not report.toy else denoise
    for name, model in (("eager", denoise), ("compiled", compiled)):
        def alone():
            x, sigma = noise, torch.ones((), device=device)
            for _ in range(2 * steps - 1):
                model(x, sigma, class_labels=labels)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            whole = clock(device, lambda: sample(model, noise, sigmas, class_labels=labels), 3)
            calls = clock(device, alone, 3)
        rows.append(dict(variant=name, batch=batch, steps=steps, images_per_second=batch / whole["median"],
                         inside_network=calls["median"] / whole["median"],
                         overhead_ms_per_step=1e3 * (whole["median"] - calls["median"]) / steps,
                         seconds_for_50000=50_000 * whole["median"] / batch))
    return dict(rows=rows, target=dict(inside_network=0.95))


def model_config(report, **changes):
    "The configuration that is trained for the book."
    config = PRESETS["cifar10-25min"]
    if report.toy:
        changes = {**changes, "batch": 16, "images": 96, "log_every": 16, "save_every": 32, "compile": False, "precision": "fp32",
                   "network": dict(arch="ddpmpp", model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[],
                                   dropout=0.0)}
    return dataclasses.replace(config, grid_every=0, seed=report.args.seed, **changes)


def trials(report):
    "Short trainings of every variant in TRIALS; the distance of each at equal time."
    rows, seconds, n = [], 60 * report.args.trial_minutes, 32 if report.toy else 5_000
    for name, changes in TRIALS.items() if not report.toy else list(TRIALS.items())[:2]:
        config, start = model_config(report, **changes), time.perf_counter()
        for record in train(config, None, report.data("train"), report.device):
            if time.perf_counter() - start > seconds:
                break
        rows.append(dict(trial=name, images=record.images, loss=record.loss, images_per_second=record.images_per_second,
                         **report.distance(ema_denoiser(record.state), n, edm_sigmas(18))))
        print(f"  {rows[-1]}", flush=True)
        write_json(report.out / "trials.partial.json", rows)
    return dict(rows=rows, minutes=report.args.trial_minutes, best=min(rows, key=lambda row: row["distance"])["trial"])


def model(report):
    "Train for the budget, keep snapshots, measure each of them raw and averaged."
    chosen = report.load("trials")["best"] if (report.out / "trials.json").exists() else "preset"
    config, folder = model_config(report, **TRIALS[chosen]), report.out / "run"
    budget = 60 * report.args.minutes
    marks = sorted({60 * m for m in (2, 5, 10) if m < report.args.minutes} | {budget})
    curve = []
    for record in train(config, folder, report.data("train"), report.device):
        curve.append(record.values())
        while marks and (record.seconds >= marks[0] or record.images >= config.images):
            snapshot(report, record.state, folder, marks.pop(0))
        if record.seconds >= budget:
            break
    for mark in marks:              # the run ended before its budget
        snapshot(report, record.state, folder, mark)
    rows, n = [], 32 if report.toy else 50_000
    for path in sorted(folder.glob("snapshot-*/*.safetensors")):
        denoise = checkpoints.load(path, device=report.device)
        many = n if path.parent.name == f"snapshot-{int(budget):05d}" else min(n, 10_000)
        rows.append(dict(minutes=int(path.parent.name[-5:]) / 60, weights=path.stem, NFE=35,
                         **report.distance(denoise, many, edm_sigmas(18))))
        print(f"  {rows[-1]}", flush=True)
    floor = report.stats(report.data("test").images.split(500))
    reference = report.reference()
    return dict(config=dataclasses.asdict(config), chosen=chosen, rows=rows, curve=curve, budget_minutes=report.args.minutes,
                train_test_floor=frechet_distance(floor.mean, floor.cov, reference.mean, reference.cov),
                features=report.features.name, features_hash=report.features.hash)


def snapshot(report, state:TrainState, folder, seconds):
    "The averaged and the raw weights of this moment."
    where = folder / f"snapshot-{int(seconds):05d}"
    checkpoints.save(where / "ema.safetensors", ema_denoiser(state), images=state.images)
    checkpoints.save(where / "raw.safetensors", state.denoiser, images=state.images)


def trained(report):
    "The averaged weights of the last snapshot."
    found = sorted((report.out / "run").glob("snapshot-*/ema.safetensors"))
    if not found:
        sys.exit("gpu_report.py: no snapshot; run the stage 'model' first")
    return checkpoints.load(found[-1], device=report.device)


def study(report):
    "Distance against evaluations for solvers and rows, and the churn grid."
    denoise, rows, n = trained(report), [], 32 if report.toy else report.args.study_samples
    steps = (2, 4) if report.toy else (5, 9, 18, 32, 64)
    cells = [dict(what="solver", name=solver.__name__, steps=k, NFE=2*k - 1 if solver is heun else k,
                  sigmas=edm_sigmas(k), solver=solver) for solver in (euler, heun) for k in steps]
    table = dict(vp=(vp_sigmas, vp_schedule()), ve=(ve_sigmas, VE), iddpm=(iddpm_sigmas, LINEAR))
    cells += [dict(what="row", name=name, steps=k, NFE=k, sigmas=make(k), schedule=schedule, solver=euler)
              for name, (make, schedule) in table.items() for k in steps]
    grid = (0, 10) if report.toy else (0, 5, 10, 20, 40, 80)
    cells += [dict(what="churn", name=f"S_churn = {s}", steps=k, NFE=2*k - 1, S_churn=s, sigmas=edm_sigmas(k),
                   churn=Churn(s, 0.01, 1, 1.007)) for k in steps[1:4] for s in grid]
    for cell in cells:
        arguments = {key: cell.pop(key) for key in ("sigmas", "solver", "churn", "schedule") if key in cell}
        rows.append({**cell, **report.distance(denoise, n, **arguments)})
        print(f"  {rows[-1]}", flush=True)
        write_json(report.out / "study.partial.json", rows)
    return dict(rows=rows)


def artefacts(report):
    "What a reader looks at: samples, neighbours, Langevin strips; and the weights, in bfloat16."
    denoise, device = trained(report), report.device
    n = 20 if report.toy else 100
    images = torch.cat([x.cpu() for _, x in report.draw(denoise, n, edm_sigmas(18))])
    save_png(report.out / "samples.png", images, columns=10, scale=2)
    data = report.data("train").images
    _, nearest = nearest_neighbours(report.features(images[:10].to(device)).cpu(), torch.cat(
        [report.features(part.to(device)).cpu() for part in data.split(500)]), k=5)
    sheet = torch.cat([torch.cat([image[None], data[index]]) for image, index in zip(images, nearest)])
    save_png(report.out / "neighbours.png", sheet, columns=6, scale=2)
    strips, counts, drift = [], (0, 1, 2) if report.toy else (0, 10, 100, 1_000), []
    noise = SeededNoise(range(4), device)
    y, labels = to_float(data[:4]).to(device), one_hot(report.data("train").labels[:4], 10).to(device)
    for sigma in (0.1, 0.5, 2.0):
        for S_noise in (1.0, 1.003):
            x, done = y.double() + sigma * noise.randn_like(y.double()), 0
            for count in counts:
                if count > done:
                    x = langevin(denoise, x, sigma, count - done, S_noise=S_noise, class_labels=labels)
                    done = count
                with torch.no_grad():
                    D = denoise(x, sigma, class_labels=labels)
                strips.append(to_uint8(D).cpu())
                drift.append(dict(sigma=sigma, S_noise=S_noise, iterations=count, mean=float(D.mean()), std=float(D.std())))
    save_png(report.out / "langevin.png", torch.cat(strips), columns=4 * len(counts), scale=2)
    config = denoise.net.config
    small = Preconditioned.from_config(build_network(config), denoise.config)
    small.load_state_dict(denoise.state_dict())
    path = checkpoints.save(report.out / "weights.safetensors", small.to(torch.bfloat16).eval(), note="averaged weights")
    return dict(images=n, drift=drift, weights=Path(path).name, weights_mb=Path(path).stat().st_size / 1e6,
                parameters=sum(p.numel() for p in denoise.parameters()))


STAGES = (correctness, training, sampling, trials, model, study, artefacts)


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="training images: an EDM zip, a folder, an npz; default: CIFAR-10 where the package finds it")
    parser.add_argument("--test", help="test images, for the floor")
    parser.add_argument("--out", default=str(ROOT / "results/gpu"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=[s.__name__ for s in STAGES], default=[s.__name__ for s in STAGES])
    parser.add_argument("--redo", nargs="*", default=[], help="stages to run again although their file is there")
    parser.add_argument("--minutes", type=float, default=15, help="training time of the model")
    parser.add_argument("--trial-minutes", type=float, default=1)
    parser.add_argument("--study-samples", type=int, default=5_000, help="samples per cell of the study")
    parser.add_argument("--sample-batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="toy sizes: minutes on a CPU; its numbers mean nothing")
    args = parser.parse_args()
    if torch.device(args.device).type != "cuda" and not args.toy:
        sys.exit("gpu_report.py: no CUDA device; add --toy to rehearse the same code at toy size on the CPU")
    torch.manual_seed(args.seed)
    report = Report(args)
    for stage in STAGES:
        if stage.__name__ in args.stages:
            report.run(stage)
    if math.isnan(sum(v for v in report.load("correctness")["errors"].values())) and "correctness" in args.stages:
        sys.exit("gpu_report.py: an error is NaN")


if __name__ == "__main__":
    main()
