"""The training itself with its snapshots, the weights that are kept, and the distance of each."""
import contextlib
import dataclasses
import json
import time
from pathlib import Path

import torch

from edm_nb import checkpoints
from edm_nb.features import stats_distance
from edm_nb.ode_solvers import edm_sigmas
from edm_nb.runs import to_device, train, TrainingDiverged
from edm_nb.stochastic import BEST_CHURN, Churn
from edm_nb.updates import ema_denoiser
from record import gpu_name, now, write_json
from studies.gpu.session import good, in_words, OutOfTime
from studies.gpu.setups import can_compile, model_config
from studies.gpu.trials import EMA_SHARES, TRIALS

CHURNS = {"none": Churn(), "CIFAR-10, VP": BEST_CHURN["cifar10-vp"], "CIFAR-10, VE": BEST_CHURN["cifar10-ve"]}
LARGEST_WEIGHTS = 45                    # MB


def plan(report, folder):
    "What is trained, decided once per run folder by the trials."
    path = folder / "plan.json"
    if not path.exists():
        found = report.load("trials") or dict(best="preset", ema_share=EMA_SHARES[0])
        if report.args.choice:
            found = found | dict(best=report.args.choice)
        write_json(path, dict(chosen=found["best"], ema_share=found["ema_share"], trials=report.load("trials") is not None and not report.args.choice))
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
    """Train until the last snapshot is there; what an earlier call took is left as it is.

    Every snapshot's averaged weights are shipped at once: a machine may be taken away. A training that diverges ends here, and what it
    had before is measured; the reason comes back.
    """
    missing = {60 * m: where for m, where in snapshots(report, folder).items() if not (where / "raw.json").exists()}
    if not missing:
        return None
    with contextlib.closing(train(config, folder, report.data("train"), report.device)) as records:
        try:
            for record in records:      # leaving the loop writes a checkpoint
                over = record.images >= config.images
                for mark in [m for m in missing if record.seconds >= m or over]:
                    where = missing.pop(mark)
                    snapshot(record.state, where, record.seconds)
                    ship(report, where / "ema.safetensors", report.out / "weights.safetensors")
                    report.pack()
                if not missing:
                    return None
                if time.monotonic() >= report.call_end:
                    raise OutOfTime
        except TrainingDiverged as error:
            if len(missing) == len(snapshots(report, folder)):
                raise                   # nothing to measure
            print(f"  {error}", flush=True)
            return in_words(error)
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
    compiling, diverged = 0.0, None
    if any(not (where / "raw.json").exists() for where in snapshots(report, folder).values()):
        data = to_device(report.data("train"), report.device)
        config, compiling = can_compile(report, config, data)
        diverged = train_model(report, config, folder)
    taken = {m: where for m, where in snapshots(report, folder).items() if (where / "raw.json").exists()}
    last = max(taken)
    weights = ship(report, taken[last] / "ema.safetensors", report.out / "weights.safetensors")
    report.stage_end = time.monotonic() + report.limit("model")

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
    return dict(config=dataclasses.asdict(config), **chosen, diverged=diverged, rows=rows, best_churn=best, gpu_seconds=spent, target=dict(gpu_seconds=1200),
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
