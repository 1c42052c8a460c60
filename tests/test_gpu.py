"""Training on CUDA up to a recorded distance. The logic of the thresholds, and a toy-sized twin of the run, need no GPU.

    pytest -m gpu                                   # to the shortest snapshot recorded in results/gpu
    EDM_NB_GPU_MINUTES=10 pytest -m gpu             # to the longest recorded one of at most ten minutes

`studies/gpu` writes the record. Where there is none, the test is skipped: it knows no number of its own.
"""
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from edm_nb import configs, generation, runs, updates
from edm_nb.data import digits, find_cifar10
from edm_nb.ode_solvers import edm_sigmas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from studies.gpu.command import parse  # noqa: E402
from studies.gpu.correctness import correctness  # noqa: E402
from studies.gpu.model import model  # noqa: E402
from studies.gpu.report import Report  # noqa: E402
from studies.gpu.session import good  # noqa: E402

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CIFAR = pytest.mark.skipif(find_cifar10("train") is None, reason="CIFAR-10 not found: set EDM_NB_CIFAR10")

# Trainings that differ in the seed alone spread by 10 % (standard deviation over mean of five seeds, root mean square of
# rows E and F of results/training_cifar16.json). A run and its record are two such draws, so their ratio spreads by
# √2 · 10 % = 14 %. 2.1 of these deviations, 30 %, leave two false alarms in a hundred.
TOLERANCE = 0.3


class NotMeasured(Exception):
    "There is no recorded number that this machine could be held to."


def target(folder, against, minutes=None):
    """What a run has to do to be compared with the record, and the distance that it must reach.

    Images seen decide, not minutes: the weights are a function of configuration, seed and images, the minutes of the GPU.
    So the minutes choose a recorded snapshot, and a slower GPU takes longer to get there.
    """
    path = Path(folder) / "model.json"
    if not path.exists(): raise NotMeasured("not yet measured: run python -m studies.gpu on a CUDA machine")
    record = json.loads(path.read_text())
    if record["toy"]: raise NotMeasured(f"{path} comes from a toy run, which measures nothing: run python -m studies.gpu without --toy")
    for name in ("features", "features_hash", "reference_hash"):
        if record[name] != against[name]:
            raise NotMeasured(f"{path} has {name} {record[name][:16]}, this machine {against[name][:16]}: distances in other features or "
                              "to other images do not compare; run python -m studies.gpu again, or use its data")
    rows = [row for row in good(record["rows"]) if row["weights"] == "ema" and row["churn"] == "none"]
    rows = sorted(rows, key=lambda row: (row["minutes"], -row["n"]))      # of one snapshot the fewest samples come last
    known = sorted({row["minutes"] for row in rows})
    if not rows: raise NotMeasured(f"{path} holds no distance of averaged weights; run python -m studies.gpu --redo model")
    if minutes is not None and minutes < known[0]:
        raise NotMeasured(f"nothing is recorded for {minutes:g} minutes; the snapshots of {path} are at {known} minutes")
    row = [row for row in rows if row["minutes"] <= (known[0] if minutes is None else minutes)][-1]
    if not 0 < row["distance"] < math.inf: raise ValueError(f"{path}: the distance {row['distance']} at {row['minutes']} minutes is none")
    config = configs.config_from(record["config"] | dict(images=row["images"]))
    return dict(config=config, n=row["n"], steps=record["steps"], seed=record["seed"], sample_batch=record["sample_batch"],
                minutes=row["minutes"], recorded=row["distance"], limit=row["distance"] * (1 + TOLERANCE),
                gpu=record["environment"]["gpu"])


def run_again(goal, report):
    "Train as recorded and measure as recorded; the distance, and the last record of the training."
    for record in runs.train(goal["config"], data=report.data("train"), device=report.device): pass
    denoise = report.fast(updates.ema_denoiser(record.state))
    return report.distance(denoise, goal["n"], edm_sigmas(goal["steps"]))["distance"], record


def check(found, goal, record):
    print(f"{record.images:,} images at {record.images_per_second:.0f} images/s; distance {found:.3f}, recorded {goal['recorded']:.3f} "
          f"on {goal['gpu']} after {goal['minutes']:g} minutes, limit {goal['limit']:.3f}")
    assert record.skipped == 0 and found <= goal["limit"]


# --- thresholds: no GPU needed ---

AGAINST = dict(features="cifar-features", features_hash="f" * 64, reference_hash="d" * 64)


def fabricate(folder, **changes):
    "A record as the report writes it, with numbers that nobody measured: for these tests only."
    rows = [dict(minutes=m, weights=w, churn="none", n=n, images=i, distance=d) for m, w, n, i, d in (
        (12, "ema", 50_000, 4_096, 3.9), (2, "ema", 10_000, 512, 40.0), (2, "raw", 10_000, 512, 60.0), (5, "ema", 10_000, 1_536, 20.0),
        (12, "ema", 10_000, 4_096, 4.0), (12, "raw", 10_000, 4_096, 8.0))]
    rows += [dict(minutes=12, weights="ema", churn="CIFAR-10, VP", n=10_000, images=4_096, distance=1.0),
             dict(minutes=1, weights="ema", churn="none", skipped="the stage's time was over")]
    config = json.loads(configs.config_json(configs.PRESETS["cifar10-25min"]))
    record = dict(toy=False, seed=3, steps=18, sample_batch=250, config=config, rows=rows, environment=dict(gpu="some GPU"), **AGAINST) | changes
    (folder / "model.json").write_text(json.dumps(record))
    return record


@pytest.mark.parametrize("minutes, snapshot, images, distance", [(None, 2, 512, 40.0), (2, 2, 512, 40.0), (4.9, 2, 512, 40.0),
                                                                 (5, 5, 1_536, 20.0), (600, 12, 4_096, 4.0)])
def test_the_threshold_is_that_of_the_recorded_snapshot(tmp_path, minutes, snapshot, images, distance):
    fabricate(tmp_path)
    goal = target(tmp_path, AGAINST, minutes)
    assert (goal["minutes"], goal["config"].images, goal["recorded"], goal["n"]) == (snapshot, images, distance, 10_000)
    assert goal["limit"] == pytest.approx(1.3 * distance) and (goal["seed"], goal["steps"], goal["sample_batch"]) == (3, 18, 250)
    assert dataclasses.replace(goal["config"], images=configs.PRESETS["cifar10-25min"].images) == configs.PRESETS["cifar10-25min"]


def test_no_record_no_threshold(tmp_path):
    with pytest.raises(NotMeasured, match="not yet measured: run python -m studies.gpu"): target(tmp_path, AGAINST)


@pytest.mark.parametrize("changes, words", [
    (dict(toy=True), "toy run"), (dict(features_hash="a" * 64), "features_hash aaaa"), (dict(reference_hash="b" * 64), "reference_hash bbbb"),
    (dict(features="pixels-3x32x32"), "features pixels"), (dict(rows=[]), "no distance")])
def test_a_record_that_does_not_compare_is_refused(tmp_path, changes, words):
    fabricate(tmp_path, **changes)
    with pytest.raises(NotMeasured, match=words): target(tmp_path, AGAINST)


def test_less_time_than_any_snapshot_is_refused(tmp_path):
    fabricate(tmp_path)
    with pytest.raises(NotMeasured, match=r"1.5 minutes.*\[2, 5, 12\]"): target(tmp_path, AGAINST, 1.5)


@pytest.mark.parametrize("distance", [math.nan, math.inf, 0.0, -1.0])
def test_a_distance_that_is_none_is_an_error(tmp_path, distance):
    fabricate(tmp_path, rows=[dict(minutes=2, weights="ema", churn="none", n=10, images=512, distance=distance)])
    with pytest.raises(ValueError, match="is none"): target(tmp_path, AGAINST)


@pytest.mark.parametrize("found, skipped, good", [(1.29, 0, True), (1.31, 0, False), (math.nan, 0, False), (1.0, 1, False)])
def test_what_counts_as_reached(found, skipped, good):
    record = runs.Progress(1, 1.0, 1.0, 1.0, skipped, 1.0, 1.0, None)
    goal = dict(recorded=1.0, limit=1 + TOLERANCE, gpu="none", minutes=2)
    if good: check(found, goal, record)
    else:
        with pytest.raises(AssertionError): check(found, goal, record)


def test_toy_run_is_recorded_and_reached_again(tmp_path):
    "The path of the GPU test on the CPU: a toy report is written, its flag removed, and its numbers must come again to the digit."
    toy = ["--toy", "--device", "cpu", "--sample-batch", "8", "--minutes", "0.05", "--marks", "1e-5", "--out", str(tmp_path)]
    report = Report(parse(toy))
    record = report.run(model)
    with pytest.raises(NotMeasured, match="toy"): target(tmp_path, report.measured_against())
    (tmp_path / "model.json").write_text(json.dumps(record | dict(toy=False)))
    for minutes in (None, 1):
        goal = target(tmp_path, report.measured_against(), minutes)
        found, last = run_again(goal, Report(parse(toy)))
        assert found == pytest.approx(goal["recorded"], rel=1e-6) and last.images == goal["config"].images
        check(found, goal, last)
    assert goal["minutes"] == 0.05


# --- on a GPU ---


@pytest.mark.gpu
@CUDA
@CIFAR
def test_cifar10_reaches_the_recorded_distance():
    minutes = os.environ.get("EDM_NB_GPU_MINUTES")
    report = Report(parse(["--device", "cuda"]))
    try: goal = target(ROOT / "results/gpu", report.measured_against(), float(minutes) if minutes else None)
    except NotMeasured as reason: pytest.skip(str(reason))
    report.args.seed, report.args.sample_batch = goal["seed"], goal["sample_batch"]
    found, record = run_again(goal, report)
    check(found, goal, record)


@pytest.mark.gpu
@CUDA
def test_the_device_computes_what_the_cpu_does():
    "Against float64 on the CPU, within the tolerances that the report states; those of the record, where there is one, bind as well."
    result = correctness(Report(parse(["--device", "cuda"])))
    assert result["passed"], {name: result["errors"][name] for name in result["failed"]}
    path = ROOT / "results/gpu/correctness.json"
    if path.exists():
        record = json.loads(path.read_text())
        assert not record["toy"] and all(result["errors"][name] < limit for name, limit in record["limits"].items())


@pytest.mark.gpu
@CUDA
def test_images_by_seed_are_those_of_the_cpu():
    "Noise is drawn on the CPU unless asked otherwise; published seeds and `noise_on` draw on the device."
    state = updates.new_state(configs.PRESETS["toy"], digits(), torch.device("cpu"))
    denoise, settings = state.denoiser.eval(), generation.Sampling(6, S_churn=4)
    draw = lambda **more: next(generation.generate(denoise, range(8), settings, as_bytes=False, **more))[1]  # noqa: E731
    here = draw()
    denoise.cuda()
    torch.testing.assert_close(draw(), here, atol=2e-3, rtol=1e-2)
    for other in (dict(official=True), dict(noise_on="cuda")):
        assert draw(**other).isfinite().all() and torch.equal(draw(**other), draw(**other)) and (draw(**other) - here).abs().max() > 0.1


@pytest.mark.gpu
@CUDA
def test_no_synchronisation_inside_a_step():
    "The host may run ahead: a synchronising call inside an update is an error here."
    from edm_nb.randomness import IndexStream
    device, data = torch.device("cuda"), digits()
    config = dataclasses.replace(configs.PRESETS["toy"], augment=0.0)
    state, data = updates.new_state(config, data, device), runs.to_device(data, device)
    order = IndexStream(len(data), 1)
    for k in range(3): updates.train_step(state.denoiser, state, updates.make_batch(config, data, order, 64*k, device))
    torch.cuda.set_sync_debug_mode("error")
    try: updates.train_step(state.denoiser, state, updates.make_batch(config, data, order, 256, device))
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("change", [dict(), dict(precision="bf16"), dict(compile=True), dict(channels_last=True), dict(micro_batch=16)])
def test_loss_falls_on_cuda(change):
    config = dataclasses.replace(configs.PRESETS["toy"], images=6_400, log_every=640, **change)
    losses = [record.loss for record in runs.train(config, device="cuda")]
    assert losses[-1] < 0.85 * losses[0]
