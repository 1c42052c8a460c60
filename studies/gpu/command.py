"""Everything that the book owes a GPU, in one resumable run.

    python benchmarks/gpu_report.py --data cifar10-train.zip --test cifar10-test.zip        # one CUDA machine, about 40 minutes
    python benchmarks/gpu_report.py --toy --device cpu --out /tmp/report                    # the same code at toy size

Each stage writes its own file under --out (default results/gpu) as it ends, with hardware, versions, seed and date. In the
order of what would be missed most:

    correctness   networks, gradients, loss, samplers and augmentation on the device against float64 on the CPU
    trials        short trainings of the variants in TRIALS, to choose what the budget is spent on
    model         the training itself with its snapshots, the weights, and the Fréchet distance of each
    artefacts     sample grid, nearest neighbours, Langevin strips
    training      ms and images/s of the paper's 56 M network, from plain fp32 to bf16 + channels-last + compile
    sampling      images/s of 18 Heun steps, and how much of the time lies inside the network
    study         distance against evaluations, the rows of Table 1, the churn grid

Time. A stage starts no new row after its limit (LIMITS, --limit study=600) and says which rows it left out; `--redo study`
measures those and keeps the others. A machine that is lent in short calls gets --stop-after SECONDS: the script then ends
with exit code 3 between two rows, at most about three minutes late, and the same command goes on where it stopped, inside a training
too. A stage whose file is there is not run again. A stage or row that fails is recorded and the rest still runs; the exit
code is 1. The first four stages take about 25 minutes and the other three about 15 (estimates, until a run has measured them);
the latter need nothing of the former but weights.safetensors, so they may run on another day, on another machine.
--bundle FOLDER packs what is to be kept into parts of at most --part-mb each: `cat FOLDER/report.tar.* | tar x`.

The distance is `cifar-features`, never an FID, and the images it is measured against may be JPEG-recoded: it compares with
other numbers of this report only.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import math
import statistics
import sys
import tarfile
import time
import traceback
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from record import ROOT, gpu_name, hardware, now, versions, wait, write_json
from edm_nb import checkpoints
from edm_nb.augmentation import AugmentPipe, Draw, apply as apply_augment
from edm_nb.data import (
    cifar10, hash_buffer, ImageSet, load_images, one_hot, to_float, to_uint8
)
from edm_nb.randomness import IndexStream
from edm_nb.figures import save_png
from edm_nb.framework import LINEAR, VE, MixtureDenoiser, vp_schedule
from edm_nb.frechet import FeatureStats
from edm_nb.features import cifar_features, stats_distance
from edm_nb.metrics import nearest_neighbours
from edm_nb.networks import build_network
from edm_nb.ode_solvers import edm_sigmas, euler, heun, iddpm_sigmas, sample_ode, ve_sigmas, vp_sigmas
from edm_nb.preconditioning import Preconditioned
from edm_nb.stochastic import BEST_CHURN, Churn, langevin_states, sample
from edm_nb.generation import generate, Sampling
from edm_nb.randomness import SeededNoise
from edm_nb.training import edm_loss, EMA, ema_beta
from edm_nb.updates import (
    build_denoiser, ema_denoiser, make_batch, new_state,
    train_step
)
from edm_nb.configs import PRESETS
from edm_nb.randomness import stream_seed
from edm_nb.runs import to_device, train

# seconds after which a stage starts no new row; of `model` the measuring only, its training is bounded by --minutes
LIMITS = dict(correctness=60, trials=300, model=480, artefacts=150, training=270, sampling=150, study=360)
CHURNS = {"none": Churn(), "CIFAR-10, VP": BEST_CHURN["cifar10-vp"], "CIFAR-10, VE": BEST_CHURN["cifar10-ve"]}
TRIALS = {                      # what is tried for `--trial-minutes` each, the most promising first
    "preset": {},
    "lr 2e-3": {"lr": 2e-3},
    "no augmentation": {"augment": 0.0, "xflip": True},
    "fewer channels at 32×32": {"network": {"arch": "ddpmpp", "model_channels": 96, "channel_mult": [1, 2, 2], "num_blocks": 3,
                                            "attn_resolutions": [16], "dropout": 0.0}},     # 20 M, 9.8 GFLOP
    "batch 256": {"batch": 256},
}
EMA_SHARES = (0.05, 0.02, 0.1, 0.2)     # half-life of the average in shares of the images seen; the first is the preset's
LARGEST_WEIGHTS = 45                    # MB


class OutOfTime(Exception):
    "This call has to end; what is done is kept."


def environment():
    "What a number cannot be read without."
    return dict(date=now(), **hardware(), **versions("torchvision", "triton"), cuda=torch.version.cuda)


def clock(device, work, repeats, warmup=3, seconds=6.0):
    "Median and extremes of the seconds that `work()` takes; at least three calls, no new one after `seconds`."
    for _ in range(warmup):
        work()
    times, end = [], time.perf_counter() + seconds
    while len(times) < min(3, repeats) or (len(times) < repeats and time.perf_counter() < end):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return dict(median=statistics.median(times), low=min(times), high=max(times), n=len(times))


def relative(value, reference):
    "‖value − reference‖ / ‖reference‖ in float64 on the CPU; NaN never passes a comparison."
    reference = reference.double().cpu()
    return float((value.double().cpu() - reference).norm() / reference.norm())


def in_words(error):
    "One line about an exception."
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def tf32(allowed):
    "Whether fp32 products may be rounded to ten bits on the way in."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Report:
    "Arguments, data, time and files of one run."
    def __init__(self, args):
        self.args, self.device, self.toy, self.out = args, torch.device(args.device), args.toy, Path(args.out)
        self.call_end = time.monotonic() + (args.stop_after or math.inf)
        self.stage_end, self.compile_errors, self._sets = math.inf, [], {}
        self._features = self._reference = None

    # --- data and features

    @property
    def features(self):
        "The feature network, on the device."
        self._features = self._features or cifar_features(self.device)
        return self._features

    def data(self, split):
        "The image set of a split, read once; a toy run without data draws its own."
        if split not in self._sets:
            self._sets[split] = self._read(split)
        return self._sets[split]

    def _read(self, split):
        path = self.args.data if split == "train" else self.args.test
        if path or not self.toy:
            found = load_images(path) if path else cifar10(split)
            return found.take(slice(256)) if self.toy else found
        generator = torch.Generator().manual_seed(len(split))
        coarse = torch.rand(256, 3, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear").mul(255).to(torch.uint8)
        return ImageSet(images, torch.arange(256) % 10, "blobs", tuple("0123456789"))

    def stats(self, batches):
        "Feature statistics of batches of bytes, in full fp32: they must be the same on every machine."
        stats = FeatureStats(self.features.dim)
        for images in batches:
            with tf32(False):
                stats.update(self.features(images.to(self.device)).cpu())
        return stats

    def reference(self):
        "Statistics of the training set, computed once."
        if self._reference is None:
            self._reference = self.stats(self.data("train").images.split(500))
        return self._reference

    def measured_against(self):
        "What a distance of this run compares with; another value here means other numbers."
        data = self.data("train")
        return dict(features=self.features.name, features_hash=self.features.hash, reference=data.name, reference_n=len(data),
                    reference_hash=hash_buffer(data.images.contiguous().numpy()))

    # --- sampling

    def fast(self, denoise, batch=None):
        "The denoiser as it samples fastest: channels-last and compiled, or as it is with the reason in `compile_errors`."
        if self.device.type == "cuda":
            denoise = denoise.to(memory_format=torch.channels_last)
        if self.compile_errors:
            return denoise
        batch, shape = batch or self.args.sample_batch, (denoise.net.channels, denoise.net.resolution, denoise.net.resolution)
        try:
            compiled = torch.compile(denoise, backend="eager" if self.toy else "inductor")
            with torch.no_grad(), self.autocast():
                compiled(torch.zeros(batch, *shape, dtype=torch.float64, device=self.device),
                         torch.ones((), dtype=torch.float64, device=self.device),
                         class_labels=torch.zeros(batch, denoise.net.label_dim, device=self.device))
            wait(self.device)
            return compiled
        except Exception as error:
            self.compile_errors.append(in_words(error))
            print(f"  no torch.compile: {self.compile_errors[-1]}", flush=True)
            return denoise

    def autocast(self):
        "bf16 inside the network, on a GPU."
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def draw(self, denoise, n, sigmas, churn=Churn(), solver=heun, schedule=LINEAR):
        """Samples as bytes, a batch at a time; class = number mod 10. Image i is that of seed 10^6 --seed + i, whatever the batch;
        its noise is drawn on the device."""
        def sampler(model, noise, levels, randn_like, **cond):
            with self.autocast():
                return sample(model, noise, levels, churn, randn_like, schedule, solver, round_sigma=denoise.round_sigma, **cond)
        seeds = range(self.args.seed * 10**6, self.args.seed * 10**6 + n)
        for _, images, _ in generate(denoise, seeds, Sampling(levels=tuple(sigmas.tolist())), range(10), sampler=sampler,
                                     batch=self.args.sample_batch, noise_on=self.device):
            yield images

    def distance(self, denoise, n, sigmas, churn=Churn(), solver=heun, schedule=LINEAR):
        "Fréchet distance of n samples against the training statistics, and the seconds that drawing them took."
        start = time.perf_counter()
        stats, reference = self.stats(self.draw(denoise, n, sigmas, churn, solver, schedule)), self.reference()
        return dict(distance=stats_distance(stats, reference), n=n,
                    seconds=round(time.perf_counter() - start, 1))

    # --- stages, rows, time

    def proceed(self):
        "Whether the running stage may begin another row; raises OutOfTime where the whole call must end."
        if time.monotonic() >= self.call_end:
            raise OutOfTime
        return time.monotonic() < self.stage_end

    def settings(self):
        "Rows are kept between calls where these agree."
        names = ("toy", "seed", "minutes", "marks", "trial_minutes", "study_samples", "curve_samples", "samples", "sample_batch")
        return {name: getattr(self.args, name) for name in names} | dict(gpu=gpu_name(), torch=torch.__version__)

    def rows(self, stage, cells, measure):
        "One row per cell: from an earlier call, or measure(cell), or why there is none. Good rows are on disk at once."
        path = self.out / f"{stage}.partial.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("settings") != json.loads(json.dumps(self.settings())):
            kept = dict(settings=self.settings(), rows=[])
        found, rows = {json.dumps(row["cell"]): row for row in kept["rows"]}, []
        for cell in cells:
            key = json.dumps(cell)
            if key not in found:
                try:
                    if self.proceed():
                        found[key] = dict(cell=cell, **measure(cell))
                        write_json(path, kept | dict(rows=list(found.values())))
                        print(f"  {found[key]}", flush=True)
                    else:
                        rows.append(dict(cell, skipped="the stage's time was over"))
                except OutOfTime:
                    raise
                except Exception as error:
                    traceback.print_exc()
                    rows.append(dict(cell, failed=in_words(error)))
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            if key in found:
                rows.append(cell | {name: value for name, value in found[key].items() if name != "cell"})
        return rows

    def load(self, name):
        "The result of an earlier stage, or None."
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, stage):
        "Run one stage unless its file is there."
        name, path = stage.__name__, self.out / f"{stage.__name__}.json"
        if path.exists() and name not in self.args.redo:
            print(f"{name}: done before ({path})", flush=True)
            return self.load(name)
        self.stage_end = math.inf
        self.proceed()
        print(f"{name}: started", flush=True)
        start = time.perf_counter()
        self.stage_end = time.monotonic() + self.args.limit.get(name, LIMITS[name])
        result = stage(self)
        result = dict(stage=name, toy=self.toy, seed=self.args.seed, seconds=round(time.perf_counter() - start, 1),
                      environment=environment(), compile_errors=self.compile_errors, settings=self.settings(), **result)
        write_json(path, result)
        bad = [row for row in result.get("rows", []) if "failed" in row or "skipped" in row]
        if not bad:
            (self.out / f"{name}.partial.json").unlink(missing_ok=True)
        print(f"{name}: {result['seconds']:.0f} s -> {path}" + (f"; {len(bad)} rows are missing, see --redo" if bad else ""), flush=True)
        return result


def good(rows):
    "Rows that hold a measurement."
    return [row for row in rows if "failed" not in row and "skipped" not in row]


# --- correctness ----------------------------------------------------------------------------------------------------


def gradient(denoise, y, sigma, noise, labels):
    "All gradients of the mean loss as one vector."
    denoise.zero_grad()
    edm_loss(denoise, y, sigma, noise, class_labels=labels).mean().backward()
    return torch.cat([p.grad.flatten() for p in denoise.parameters() if p.grad is not None])


def network_errors(report, arch, generator):
    "One architecture: output, loss and gradient in fp32 and bf16 against float64."
    device, errors = report.device, {}
    config = dict(arch=arch, resolution=16, channels=3, label_dim=10, model_channels=32, num_blocks=1, attn_resolutions=[8])
    denoise = Preconditioned(build_network(config)).eval()
    for p in denoise.parameters():      # an untrained network returns zero, which would hide errors
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() if p.ndim > 1 else 100)**-0.5
    y, noise = torch.randn(2, 8, 3, 16, 16, generator=generator)
    sigma, labels = torch.logspace(-2, 1.5, 8), torch.eye(10)[:8]
    exact = Preconditioned(build_network(config)).double().eval()
    exact.load_state_dict(denoise.state_dict())
    denoise.to(device)
    inputs, batch = (y, sigma.log() / 4, labels), (y, sigma, noise, labels)
    with torch.no_grad():
        F64 = exact.net(*(v.double() for v in inputs))
        loss64 = edm_loss(exact, *(v.double() for v in batch[:3]), class_labels=labels.double())
    gradient64 = gradient(exact, *(v.double() for v in batch))
    for name, enabled in (("fp32", False), ("bf16", True)):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                F = denoise.net(*(v.to(device) for v in inputs))
                loss = edm_loss(denoise, *(v.to(device) for v in batch[:3]), class_labels=labels.to(device))
            slope = gradient(denoise, *(v.to(device) for v in batch))
        errors |= {f"{arch} F {name}": relative(F, F64), f"{arch} loss {name}": relative(loss, loss64),
                   f"{arch} gradient {name}": relative(slope, gradient64)}
    return errors


def sampler_errors(report, generator):
    "Algorithms 1 and 2 in float64, with a denoiser that is exact."
    device = report.device
    means = torch.randn(5, 6, generator=generator).double()
    noise = torch.randn(64, 6, generator=generator).double()
    here, there = MixtureDenoiser(means, 0.3), MixtureDenoiser(means.to(device), 0.3)
    errors = {}
    for name, levels in (("edm", edm_sigmas), ("vp", vp_sigmas), ("ve", ve_sigmas), ("iddpm", iddpm_sigmas)):
        errors[f"sampler {name}"] = relative(sample_ode(there, noise.to(device), levels(18)), sample_ode(here, noise, levels(18)))
    churned = [sample(denoise, noise.to(where), edm_sigmas(18), Churn(20), SeededNoise(range(64)).randn_like)
               for denoise, where in ((here, "cpu"), (there, device))]
    return errors | {"sampler with churn": relative(churned[1], churned[0])}


def augmentation_error(report, generator):
    "The same draw of every transform, on the device and in float64."
    images = torch.rand(64, 3, 32, 32, generator=generator) * 2 - 1
    draw = AugmentPipe(p=1.0).draw(64, generator)
    there = Draw(*(value.to(report.device) for value in vars(draw).values()))
    exact = Draw(*(value.double() for value in vars(draw).values()))
    return {"augmentation fp32": relative(apply_augment(images.to(report.device), there), apply_augment(images.double(), exact)),
            "augmentation labels": relative(there.labels(), exact.labels())}


def limit_of(name):
    "Largest relative error. One rounding is 2⁻²⁴ in fp32 and 2⁻⁹ in bf16; tens of layers add up, and libraries differ in order."
    if "sampler" in name:
        return 1e-10
    if "bf16" not in name:
        return 1e-4
    return 0.02


def correctness(report):
    "Everything that is computed on the device against float64 on the CPU."
    generator, errors = torch.Generator().manual_seed(report.args.seed), {}
    with tf32(False):
        for arch in ("ddpmpp", "ncsnpp", "adm"):
            errors |= network_errors(report, arch, generator)
        errors |= sampler_errors(report, generator)
        errors |= augmentation_error(report, generator)
    limits = {name: limit_of(name) for name in errors}
    failed = [name for name, error in errors.items() if not error < limits[name]]
    return dict(errors=errors, limits=limits, passed=not failed, failed=failed)


# --- trials and the model -------------------------------------------------------------------------------------------


def model_config(report, **changes):
    "The configuration that is trained for the book: the preset, but the clock ends it and the average knows no fixed half-life."
    if report.toy:
        changes = {**changes, "batch": 16, "images": 96, "log_every": 16, "save_every": 32, "lr_rampup": 32, "compile": False,
                   "precision": "fp32", "network": dict(arch="ddpmpp", model_channels=8, channel_mult=[1, 1], num_blocks=1,
                                                        attn_resolutions=[], dropout=0.0)}
    else:
        changes = {"images": 10**9, "log_every": 102_400, "save_every": 512_000, **changes}
    return dataclasses.replace(PRESETS["cifar10-25min"], grid_every=0, seed=report.args.seed, **changes)


def can_compile(report, config, data):
    "The configuration, without `compile` where that fails, and the seconds it took; a later training of it starts compiled."
    start = time.perf_counter()
    if config.compile:
        try:
            state = new_state(config, data, report.device)
            train_step(torch.compile(state.denoiser), state, make_batch(config, data, IndexStream(len(data), 0), 0, report.device))
            wait(report.device)
        except Exception as error:
            report.compile_errors.append(in_words(error))
            print(f"  no torch.compile: {report.compile_errors[-1]}", flush=True)
            config = dataclasses.replace(config, compile=False)
    return config, round(time.perf_counter() - start, 1)


def trial(report, cell):
    "Train one variant for the trial's time, the compiler's not counted; the distance of its averages."
    config = model_config(report, **TRIALS[cell["trial"]])
    data = to_device(report.data("train"), report.device)
    config, compiling = can_compile(report, config, data)
    state = new_state(config, data, report.device)
    averages = {share: EMA(state.denoiser) for share in cell["shares"]}
    forward = torch.compile(state.denoiser) if config.compile else state.denoiser
    order, start = IndexStream(len(data), stream_seed(config.seed, "order")), time.perf_counter()
    seconds, loss = 60 * report.args.trial_minutes, math.nan
    while state.images < config.images and time.perf_counter() - start < seconds:
        for _ in range(2 if report.toy else 20):      # between two looks at the clock
            beta = [ema_beta(config.batch, math.inf, state.images, share) for share in averages]
            loss = train_step(forward, state, make_batch(config, data, order, state.images, report.device))[0]
            for ema, b in zip(averages.values(), beta):
                ema.update(state.denoiser, b)
        wait(report.device)
    spent, distances = time.perf_counter() - start, {}
    for share, ema in averages.items():
        state.ema = ema
        found = report.distance(report.fast(ema_denoiser(state)), 8 if report.toy else 5_000, edm_sigmas(18))
        distances[str(share)] = found["distance"]
    return dict(distance=distances[str(EMA_SHARES[0])], distances=distances, n=found["n"], NFE=35, images=state.images,
                loss=float(loss), seconds=round(spent, 1), compile_seconds=compiling, compiled=config.compile,
                images_per_second=state.images / spent)


def trials(report):
    "Short trainings of every variant at equal time; every average of the first one."
    names = list(TRIALS)[:2] if report.toy else list(TRIALS)
    rows = report.rows("trials", [dict(trial=name, shares=list(EMA_SHARES) if name == "preset" else [EMA_SHARES[0]])
                                  for name in names], lambda cell: trial(report, cell))
    found = good(rows)
    if not found:
        raise RuntimeError("no trial was measured")
    first = next((row["distances"] for row in found if row["trial"] == "preset"), {str(EMA_SHARES[0]): 0.0})
    return dict(rows=rows, minutes=report.args.trial_minutes, best=min(found, key=lambda row: row["distance"])["trial"],
                ema_share=float(min(first, key=first.get)))


def plan(report, folder):
    "What is trained, decided once per run folder by the trials."
    path = folder / "plan.json"
    if not path.exists():
        found = report.load("trials") or dict(best="preset", ema_share=EMA_SHARES[0])
        write_json(path, dict(chosen=found["best"], ema_share=found["ema_share"], trials=report.load("trials") is not None))
    chosen = json.loads(path.read_text())
    return chosen, model_config(report, **TRIALS[chosen["chosen"]], ema_halflife=1e12, ema_rampup=chosen["ema_share"])


def snapshots(report, folder):
    "Minutes → folder of the snapshot, in order; the last one ends the training."
    minutes = sorted({m for m in report.args.marks if m < report.args.minutes} | {report.args.minutes})
    return {m: folder / f"snapshot-{60 * m:010.4f}" for m in minutes}


def snapshot(state, where, seconds):
    "The averaged and the raw weights of this moment."
    notes = dict(images=state.images, train_seconds=seconds)
    checkpoints.save(where / "ema.safetensors", ema_denoiser(state), **notes)
    checkpoints.save(where / "raw.safetensors", state.denoiser, **notes)


def train_model(report, config, folder):
    "Train until the last snapshot is there; what an earlier call took is left as it is."
    missing = {60 * m: where for m, where in snapshots(report, folder).items() if not (where / "raw.json").exists()}
    if not missing:
        return
    with contextlib.closing(train(config, folder, report.data("train"), report.device)) as records:
        for record in records:      # leaving the loop writes a checkpoint
            over = record.images >= config.images
            for mark in [m for m in missing if record.seconds >= m or over]:
                snapshot(record.state, missing.pop(mark), record.seconds)
            if not missing:
                return
            if time.monotonic() >= report.call_end:
                raise OutOfTime
    raise RuntimeError(f"{folder} has seen all its images but lacks {[w.name for w in missing.values()]}; delete it to train again")


def ship(report, path, where):
    "The averaged weights in bfloat16, where they are found when the run folder is gone."
    denoise = checkpoints.load(path)
    extra = checkpoints.read_config(path)["extra"]
    file = checkpoints.save(where, denoise.to(torch.bfloat16).eval(), note="averaged weights in bfloat16", toy=report.toy,
                            gpu=gpu_name(), date=now(), **extra)
    return Path(file)


def model(report):
    "Train for the budget, keep snapshots, measure each of them raw and averaged, then the last one with more samples and churn."
    folder = report.out / "run"
    chosen, config = plan(report, folder)
    compiling = 0.0
    if any(not (where / "raw.json").exists() for where in snapshots(report, folder).values()):
        data = to_device(report.data("train"), report.device)
        config, compiling = can_compile(report, config, data)
        train_model(report, config, folder)
    taken = snapshots(report, folder)
    last = max(taken)
    weights = ship(report, taken[last] / "ema.safetensors", report.out / "weights.safetensors")
    report.stage_end = time.monotonic() + report.args.limit.get("model", LIMITS["model"])

    def measure(cell):
        path = report.out / "weights.safetensors" if cell["weights"] == "shipped" else taken[cell["minutes"]] / f"{cell['weights']}.safetensors"
        extra = checkpoints.read_config(path)["extra"]
        denoise = report.fast(checkpoints.load(path, report.device).float())
        return dict(NFE=35, images=extra["images"], train_seconds=round(extra["train_seconds"], 1),
                    **report.distance(denoise, cell["samples"], edm_sigmas(18), CHURNS[cell["churn"]]))

    few, many = (8, 16) if report.toy else (report.args.curve_samples, report.args.samples)
    cell = lambda minutes, weights, churn="none", samples=few: dict(minutes=minutes, weights=weights, churn=churn, samples=samples)  # noqa: E731
    cells = [cell(m, "ema") for m in taken] + [cell(last, "ema", samples=many)] + [cell(last, "ema", churn) for churn in CHURNS if churn != "none"]
    rows = report.rows("model", cells, measure)
    noisy = [row for row in good(rows) if row["churn"] != "none"]
    best = min(noisy, key=lambda row: row["distance"])["churn"] if noisy else None
    cells += [cell(last, "ema", best, many)] if best else []
    cells += [cell(m, "raw") for m in taken] + [cell(last, "shipped")]
    rows = report.rows("model", cells, measure)
    measured = good(rows)
    trained_for = max((row["train_seconds"] for row in measured), default=None)
    spent = dict(training=trained_for, sampling_and_measuring=round(sum(row["seconds"] for row in measured), 1), compiling=compiling)
    floor, reference = report.stats(report.data("test").images.split(500)), report.reference()
    log = folder / "log.jsonl"
    return dict(config=dataclasses.asdict(config), **chosen, rows=rows, best_churn=best, gpu_seconds=spent, target=dict(gpu_seconds=1200),
                curve=[json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
                budget_minutes=report.args.minutes, sample_batch=report.args.sample_batch, steps=18,
                train_test_floor=stats_distance(floor, reference),
                floor_n=len(report.data("test")), weights_mb=weights.stat().st_size / 1e6,
                weights_fit=weights.stat().st_size <= LARGEST_WEIGHTS * 10**6, **report.measured_against())


def trained(report):
    "The averaged weights of the last snapshot, or the shipped ones where the run folder stayed on another machine."
    path = list(snapshots(report, report.out / "run").values())[-1] / "ema.safetensors"
    if not path.exists():
        path = report.out / "weights.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"neither a last snapshot nor {path}: run the stage 'model' first")
    return checkpoints.load(path, report.device).float(), path.stem


# --- speed of the paper's network -----------------------------------------------------------------------------------


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


VARIANTS = {                 # name → precision, channels-last, mode of torch.compile (None: eager)
    "fp32 eager": ("fp32", False, None),
    "+ channels-last": ("fp32", True, None),
    "+ bf16": ("bf16", True, None),
    "+ compile": ("bf16", True, "default"),
    "+ CUDA graphs": ("bf16", True, "reduce-overhead"),
}


def training(report):
    "Milliseconds of one training step, variant by variant, and where they go."
    data = to_device(report.data("train"), report.device)
    rate = matrix_rate(report.device, 256 if report.toy else 8192)
    cells = [dict(variant=name, batch=512) for name in VARIANTS if name != "+ CUDA graphs"]
    cells += [dict(variant="+ compile", batch=1024), dict(variant="+ CUDA graphs", batch=512), dict(variant="+ compile", batch=256)]
    if report.toy:
        cells = [dict(variant=name, batch=8) for name in VARIANTS]
    rows = report.rows("training", cells, lambda cell: one_variant(report, data, rate, **cell))
    found = good(rows)
    plain = [row for row in found if row["variant"] == "fp32 eager"]
    best = max(found, key=lambda row: row["images_per_second"]) if found else None
    return dict(rows=rows, matrix_rate=rate, best=best, target=dict(speedup=5, utilisation=0.4),
                speedup=best["images_per_second"] / plain[0]["images_per_second"] if plain else None)


def count_flops(report, config, data):
    "FLOP of one forward and backward pass per image: two per multiplication with addition."
    few = dataclasses.replace(config, batch=8)
    state = new_state(few, data, report.device)
    batch = make_batch(few, data, IndexStream(len(data), 0), 0, report.device)
    with FlopCounterMode(display=False) as counter:
        edm_loss(state.denoiser, batch.images, batch.sigma, batch.noise, **batch.cond).mean().backward()
    return counter.get_total_flops() / 8


def one_variant(report, data, rate, variant, batch):
    "Time one training step and its parts."
    precision, channels_last, mode = VARIANTS[variant]
    device, config = report.device, training_config(report, batch=batch, precision=precision, channels_last=channels_last)
    flops = count_flops(report, config, data)
    state, order = new_state(config, data, device), IndexStream(len(data), 0)
    forward = state.denoiser
    if mode:
        options = dict(backend="eager") if report.toy else dict(mode=mode)
        inner, fresh_graph = torch.compile(state.denoiser, **options), mode == "reduce-overhead"

        def forward(*inputs, **cond):
            if fresh_graph:
                torch.compiler.cudagraph_mark_step_begin()
            return inner(*inputs, **cond)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    drawn, repeats, calls = make_batch(config, data, order, 0, device), 3 if report.toy else 20, 1 if report.toy else 3

    def network():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return edm_loss(forward, drawn.images, drawn.sigma, drawn.noise, sigma_data=state.denoiser.sigma_data, **drawn.cond).mean()
    with tf32(precision != "fp32"):
        start = time.perf_counter()
        train_step(forward, state, drawn)
        wait(device)
        first = time.perf_counter() - start
        step = clock(device, lambda: train_step(forward, state, make_batch(config, data, order, state.images, device)), repeats, calls)
        drawing = clock(device, lambda: make_batch(config, data, order, state.images, device), repeats, 1)
        average = clock(device, lambda: state.ema.update(state.denoiser, 0.999), repeats, 1)
        # a replayed graph waits for the backward pass of the one before, so there it has no time of its own
        ahead = None if mode == "reduce-overhead" else clock(device, network, repeats, 1)
        both = clock(device, lambda: network().backward(), repeats, 1)
        update = clock(device, state.optimizer.step, repeats, 1)
    ms = lambda found: 1e3 * found["median"]  # noqa: E731
    return dict(step_ms=ms(step), step_low_ms=1e3 * step["low"], step_high_ms=1e3 * step["high"], n=step["n"],
                images_per_second=config.batch / step["median"], data_ms=ms(drawing), forward_ms=ms(ahead) if ahead else None,
                forward_backward_ms=ms(both), optimizer_ms=ms(update), ema_ms=ms(average), first_step_seconds=round(first, 1),
                flops_per_image=flops, utilisation=flops * config.batch / step["median"] / rate,
                peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None)


def sampling(report):
    "Images/s of 18 Heun steps with the paper's network, and the share of the time that is network."
    device, config = report.device, training_config(report)
    steps, batch = (4, 8) if report.toy else (18, report.args.sample_batch)
    sigmas = edm_sigmas(steps)
    labels = one_hot(torch.arange(batch) % 10, 10).to(device)
    noise = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(report.args.seed)).to(device)

    def measure(cell):
        denoise = build_denoiser(config, report.data("train")).to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            denoise = denoise.to(memory_format=torch.channels_last)
        model = denoise if cell["variant"] == "eager" else report.fast(denoise, batch)
        if cell["variant"] == "compiled" and model is denoise:
            raise RuntimeError(report.compile_errors[-1])

        def alone():
            for _ in range(2 * steps - 1):
                model(x, sigma, class_labels=labels)
        x, sigma = noise.double(), torch.ones((), device=device, dtype=torch.float64)
        with torch.no_grad(), report.autocast():
            whole = clock(device, lambda: sample(model, noise, sigmas, class_labels=labels), 5, 1, 15)
            calls = clock(device, alone, 5, 1, 15)
        return dict(steps=steps, images_per_second=batch / whole["median"], n=whole["n"], low=whole["low"], high=whole["high"],
                    inside_network=calls["median"] / whole["median"],
                    overhead_ms_per_step=1e3 * (whole["median"] - calls["median"]) / steps,
                    seconds_for_50000=50_000 * whole["median"] / batch)
    return dict(rows=report.rows("sampling", [dict(variant=name, batch=batch) for name in ("compiled", "eager")], measure),
                target=dict(inside_network=0.95))


# --- what the trained network shows ---------------------------------------------------------------------------------


def study(report):
    "Distance against evaluations for solvers and rows, and the churn grid; deterministic runs at equal evaluations."
    denoise, source = trained(report)
    denoise, n = report.fast(denoise), 8 if report.toy else report.args.study_samples
    steps = (2, 3) if report.toy else (5, 9, 18, 40)
    levels = dict(EDM=edm_sigmas, VP=vp_sigmas, VE=ve_sigmas, iDDPM=iddpm_sigmas)
    schedules = dict(EDM=LINEAR, VP=vp_schedule(), VE=VE, iDDPM=LINEAR)
    solvers = dict(Heun=heun, Euler=euler)
    line = lambda what, name, row, solver, k, **more: dict(  # noqa: E731
        what=what, name=name, row=row, solver=solver, steps=k, NFE=2*k - 1 if solver == "Heun" else k, **more)
    cells = [line("solver", "Heun", "EDM", "Heun", k) for k in steps] + [line("solver", "Euler", "EDM", "Euler", 2*k - 1) for k in steps]
    amounts, counts = ((0, 10), (2, 3)) if report.toy else ((0, 10, 30, 80), (9, 18, 32))
    cells += [line("churn", f"S_churn = {s}", "EDM", "Heun", k, S_churn=s) for k in counts for s in amounts]
    cells += [line("row", name, name, "Euler", 2*k - 1) for name in ("VP", "VE", "iDDPM") for k in steps]

    def measure(cell):
        churn = Churn(cell.get("S_churn", 0), 0.01, 1, 1.007)
        return report.distance(denoise, n, levels[cell["row"]](cell["steps"]), churn, solvers[cell["solver"]], schedules[cell["row"]])
    return dict(rows=report.rows("study", cells, measure), weights=source, churn_range=[0.01, 1], S_noise=1.007, **report.measured_against())


def langevin_strip(report, denoise, sigma, S_noise, counts, y, labels):
    "Denoised states of the Langevin loop: one row of images per real image, one column per count."
    noise = SeededNoise(range(len(y)))
    x, rows, points = y.double() + sigma * noise.randn_like(y.double()), [], []
    for count, state in langevin_states(denoise, x, sigma, counts, S_noise=S_noise, randn_like=noise.randn_like, class_labels=labels):
        with torch.no_grad():
            D = denoise(state, sigma, class_labels=labels)
        rows.append(to_uint8(D).cpu())
        points.append(dict(iteration=count, mean=float(D.mean()), std=float(D.std()), beyond=float((D.abs() > 1.02).double().mean())))
    return torch.stack(rows, 1).flatten(0, 1), points      # [images × counts, C, H, W]


def artefacts(report):
    "What a reader looks at: samples, neighbours, Langevin strips."
    denoise, source = trained(report)
    device, n = report.device, 20 if report.toy else 100
    images = torch.cat([x.cpu() for x in report.draw(denoise, n, edm_sigmas(18))])
    save_png(report.out / "samples.png", images, columns=10, scale=2)
    data, k = report.data("train").images, 5
    features = lambda x: torch.cat([report.features(part.to(device)).cpu() for part in x.split(500)])  # noqa: E731
    with tf32(False):
        far, nearest = nearest_neighbours(features(images[:10]), features(data), k=k)
    sheet = torch.cat([torch.cat([image[None], data[index]]) for image, index in zip(images, nearest)])
    save_png(report.out / "neighbours.png", sheet, columns=1 + k, scale=2)
    counts, few = ([0, 1, 2], 2) if report.toy else ([0, 10, 100, 1_000], 4)
    y, labels = to_float(data[:few]).to(device), one_hot(report.data("train").labels[:few], 10).to(device)

    def measure(cell):
        with tf32(False):       # fp32: a thousand rounds of bf16 rounding would be a drift of their own
            strip, points = langevin_strip(report, denoise, cell["sigma"], cell["S_noise"], counts, y, labels)
        file = f"langevin-{cell['sigma']:g}-{cell['S_noise']:g}.png"
        save_png(report.out / file, strip, columns=len(counts), scale=2)
        return dict(file=file, points=points, n=few)
    rows = report.rows("artefacts", [dict(sigma=sigma, S_noise=S) for S in (1.0, 1.007) for sigma in (0.1, 0.5, 2.0)], measure)
    return dict(rows=rows, images=n, weights=source, columns=dict(samples=10, neighbours=1 + k), langevin_counts=counts,
                neighbour_distances=far.tolist(), **report.measured_against(), parameters=sum(p.numel() for p in denoise.parameters()))


STAGES = (correctness, trials, model, artefacts, training, sampling, study)


# --- command line ---------------------------------------------------------------------------------------------------


def bundle(out, folder, part_mb):
    "One tar of everything but the run folder, cut into parts: for machines that give back small files only."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(Path(out).iterdir()):
            if path.is_file() and not path.name.endswith(".tmp"):
                tar.add(path, arcname=path.name)
    folder, size, content = Path(folder), int(part_mb * 2**20), buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("report.tar.*"):
        old.unlink()
    parts = [content[i:i + size] for i in range(0, len(content), size)]
    for number, part in enumerate(parts):
        (folder / f"report.tar.{number:02d}").write_bytes(part)
    print(f"bundle: {len(parts)} parts, {len(content) / 2**20:.1f} MiB in {folder}", flush=True)


def seconds_of(text):
    "`stage=seconds` of --limit."
    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{name!r} is no stage; expected one of {', '.join(LIMITS)}, as in study=600")
    return name, float(value)


def parse(arguments=None):
    "Command line."
    names = [stage.__name__ for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="training images: an EDM zip, a folder, an npz; default: CIFAR-10 where the package finds it")
    parser.add_argument("--test", help="test images, for the floor")
    parser.add_argument("--out", default=str(ROOT / "results/gpu"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--redo", nargs="*", choices=names, default=[], help="stages to run again although their file is there")
    parser.add_argument("--minutes", type=float, default=12, help="training time of the model")
    parser.add_argument("--marks", type=float, nargs="*", default=[2, 5, 10], help="minutes at which a snapshot is taken on the way")
    parser.add_argument("--trial-minutes", type=float, default=0.75)
    parser.add_argument("--samples", type=int, default=50_000, help="samples behind the final distances")
    parser.add_argument("--curve-samples", type=int, default=10_000, help="samples behind every other distance of the model")
    parser.add_argument("--study-samples", type=int, default=5_000, help="samples per cell of the study")
    parser.add_argument("--sample-batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=seconds_of, nargs="*", default=[], metavar="STAGE=SECONDS", help=f"other than {LIMITS}")
    parser.add_argument("--stop-after", type=float, default=0, metavar="SECONDS", help="end this call, to be called again; 0: never")
    parser.add_argument("--bundle", help="folder for the packed results, also when the call ends early")
    parser.add_argument("--part-mb", type=float, default=15)
    parser.add_argument("--toy", action="store_true", help="toy sizes: minutes on a CPU; its numbers mean nothing")
    args = parser.parse_args(arguments)
    args.limit = dict(args.limit)
    return args


def main():
    "Run the stages; 0: all is well, 1: something failed, 3: call again."
    args = parse()
    if torch.device(args.device).type != "cuda" and not args.toy:
        sys.exit("gpu_report.py: no CUDA device; add --toy to rehearse the same code at toy size on the CPU")
    torch.backends.cudnn.benchmark = True                      # all shapes are fixed: let cuDNN try its algorithms once
    torch._dynamo.config.automatic_dynamic_shapes = False      # one graph per shape: a second batch size must not slow the first
    torch._dynamo.config.recompile_limit = 64                  # past the limit code would run eagerly, with no more than a warning
    torch.manual_seed(args.seed)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    report, failed = Report(args), []
    try:
        for stage in STAGES:
            if stage.__name__ not in args.stages:
                continue
            try:
                result = report.run(stage)
                if any("failed" in row for row in result.get("rows", [])) or result.get("passed") is False:
                    failed.append(stage.__name__)
            except OutOfTime:
                print(f"{stage.__name__}: out of time; the same command goes on from here", flush=True)
                sys.exit(3)
            except Exception:
                traceback.print_exc()
                failed.append(stage.__name__)
    finally:
        if args.bundle:
            bundle(args.out, args.bundle, args.part_mb)
    if failed:
        sys.exit(f"gpu_report.py: failed, see above and the files: {', '.join(failed)}")


if __name__ == "__main__":
    main()
