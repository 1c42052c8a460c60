"""The stages that measure on a GPU run in full at toy size on the CPU, so that they cannot rot between GPUs."""
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from studies.gpu import command, correctness, levels, model, profiling, session, setups, training, trials  # noqa: E402
from studies.gpu import report as report_module  # noqa: E402
from studies.gpu.report import Report  # noqa: E402
from studies.gpu.sampling import sampling  # noqa: E402

from edm_nb import checkpoints, runs  # noqa: E402
from edm_nb.networks import build_network  # noqa: E402
from edm_nb.ode_solvers import edm_sigmas  # noqa: E402
from edm_nb.preconditioning import Preconditioned  # noqa: E402
from edm_nb.stochastic import Churn  # noqa: E402

STAGES = [stage.__name__ for stage in command.STAGES]
TOY = ["--toy", "--device", "cpu", "--sample-batch", "8", "--trial-minutes", "1e4", "--minutes", "1e4", "--marks", "1e-5", "2e-3",
       "--limit", *(f"{name}=1e6" for name in STAGES)]       # toy runs end by their images, never by the clock


def script(out, *arguments):
    return subprocess.run([sys.executable, ROOT / "studies/gpu/__main__.py", *TOY, "--out", out, *arguments],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def report(out, *arguments):
    return Report(command.parse([*TOY, "--out", str(out), *arguments]))


def test_every_stage_at_toy_size(tmp_path):
    done = script(tmp_path / "out", "--bundle", tmp_path / "packed", "--part-mb", "0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in STAGES}
    assert all(result["toy"] and result["environment"]["date"] and result["settings"]["seed"] == 0 for result in results.values())
    rows = {name: result.get("rows", []) for name, result in results.items()}
    assert all(session.good(found) == found for found in rows.values()), rows
    correct = results["correctness"]
    assert correct["passed"] and all(correct["errors"][k] < correct["limits"][k] for k in correct["errors"])
    assert {"ddpmpp gradient bf16", "sampler with churn", "augmentation fp32"} <= set(correct["errors"])
    assert [row["variant"] for row in rows["training"]] == list(training.VARIANTS) and results["training"]["speedup"] > 0
    assert {row["variant"] for row in rows["sampling"]} == {"eager", "kernels"} and not results["sampling"]["compile_errors"]
    assert set(results["trials"]["rows"][0]["distances"]) == {str(share) for share in trials.EMA_SHARES}
    for row in rows["profile"]:
        assert row["launches"] > 100 and row["kernels"] >= row["launches"] and 0 < row["busy_ms"] and row["gap_ms"] >= sum(row["longest_gaps_ms"][:2]) / 2
        assert sum(kernel["share"] for kernel in row["top"]) <= 1 + 1e-9 and any("convolution" in kernel["name"] for kernel in row["top"])
    assert {(row["network"], row["how"]) for row in rows["profile"]} == {(n, h) for n in ("56 M", "14 M") for h in ("none", "fused")}
    assert {row["what"] for row in rows["study"]} == {"solver", "row", "churn"}
    assert all(len(row["points"]) == 3 for row in rows["artefacts"])
    for name in ("samples.png", "neighbours.png", "weights.safetensors", *(row["file"] for row in rows["artefacts"])):
        assert (out / name).stat().st_size > 100
    assert not list(out.glob("*.partial.json"))
    assert done.stdout.index("at most") < done.stdout.index("started")
    again = script(out)
    assert again.returncode == 0 and again.stdout.count("done before") == len(STAGES)
    parts = sorted((tmp_path / "packed").iterdir())
    assert len(parts) > 1 and all(part.stat().st_size <= 0.1 * 2**20 for part in parts)
    packed = tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts)))
    assert set(packed.getnames()) == {path.name for path in out.iterdir() if path.is_file()}
    assert packed.extractfile("weights.safetensors").read() == (out / "weights.safetensors").read_bytes()


def test_the_model_is_measured_as_the_book_needs_it(tmp_path):
    run = report(tmp_path)
    session.write_json(tmp_path / "trials.json", dict(best="lr 2e-3", ema_share=0.2))
    result = run.run(model.model)
    assert result["chosen"] == "lr 2e-3" and result["config"]["lr"] == trials.TRIALS["lr 2e-3"]["lr"] and result["config"]["ema_rampup"] == 0.2
    rows = {(row["minutes"], row["weights"], row["churn"], row["n"]): row for row in result["rows"]}
    last, best = 1e4, result["best_churn"]
    assert {(m, w, "none", 8) for m in (1e-5, 2e-3, last) for w in ("ema", "raw")} <= set(rows)
    assert {(last, "ema", "none", 16), (last, "ema", best, 16), (last, "shipped", "none", 8)} <= set(rows) and best != "none"
    assert rows[last, "ema", best, 8]["distance"] == min(r["distance"] for r in rows.values() if r["churn"] != "none" and r["n"] == 8)
    assert rows[last, "ema", "none", 8]["distance"] != rows[last, "raw", "none", 8]["distance"]      # else the two were mixed up
    assert rows[1e-5, "ema", "none", 8]["images"] < rows[last, "ema", "none", 8]["images"] == 96
    assert result["train_test_floor"] > 0 and result["floor_n"] == 256 and result["weights_fit"]
    assert result["features"] == "cifar-features" and len(result["features_hash"]) == 64 and result["reference_hash"]
    assert [line["images"] for line in result["curve"]] == list(range(16, 97, 16))
    kept = checkpoints.load(tmp_path / "weights.safetensors")
    assert next(kept.parameters()).dtype == torch.bfloat16
    assert checkpoints.read_config(tmp_path / "weights.safetensors")["extra"]["toy"]
    assert result["gpu_seconds"]["sampling_and_measuring"] == pytest.approx(sum(row["seconds"] for row in rows.values()))
    assert model.trained(run)[1] == "ema"
    shutil.rmtree(tmp_path / "run")          # another machine, another day
    denoise, source = model.trained(run)
    assert source == "weights" and next(denoise.parameters()).dtype == torch.float32


def test_a_distance_comes_again_and_does_not_know_how_many_follow(tmp_path):
    run = report(tmp_path)
    denoise = Preconditioned(build_network(setups.training_config(run).network | dict(resolution=32, channels=3, label_dim=10))).eval()
    draw = lambda n: torch.cat(list(run.draw(denoise, n, edm_sigmas(2), Churn(1))))  # noqa: E731
    few = draw(16)
    assert torch.equal(few, draw(24)[:16]) and not torch.equal(few[:8], few[8:])


def test_rows_survive_a_call_that_was_cut_off(tmp_path):
    run, cells, calls = report(tmp_path), [dict(k=k) for k in range(4)], []

    def measure(cell):
        calls.append(cell["k"])
        if cell["k"] == 2: run.call_end = 0
        return dict(square=cell["k"]**2)
    with pytest.raises(session.OutOfTime): run.rows("study", cells, measure)
    run = report(tmp_path)
    assert [row["square"] for row in run.rows("study", cells, measure)] == [0, 1, 4, 9] and calls == [0, 1, 2, 3]
    other = report(tmp_path, "--study-samples", "77")      # other settings: nothing of it may be kept
    other.rows("study", cells[:2], measure)
    assert calls[4:] == [0, 1]


def test_a_row_that_fails_and_a_row_without_time_are_recorded(tmp_path):
    run = report(tmp_path)

    def measure(cell):
        if cell["k"] == 0: raise ValueError("no such kernel")
        run.stage_end = 0
        return dict(value=1)
    rows = run.rows("study", [dict(k=0), dict(k=1), dict(k=2)], measure)
    assert "no such kernel" in rows[0]["failed"] and rows[1] == dict(k=1, value=1) and "skipped" in rows[2]
    assert session.good(rows) == [rows[1]]


def test_redo_measures_what_was_left_out_and_no_more(tmp_path):
    seen = []

    def study(run):
        return dict(rows=run.rows("study", [dict(k=k) for k in range(3)], lambda cell: seen.append(cell["k"]) or dict(ok=True)))
    run = report(tmp_path, "--limit", "study=0")
    assert all("skipped" in row for row in run.run(study)["rows"]) and seen == []
    run = report(tmp_path)
    assert all("skipped" in row for row in run.run(study)["rows"])       # done before
    run = report(tmp_path, "--redo", "study")
    assert len(session.good(run.run(study)["rows"])) == 3 and seen == [0, 1, 2]
    assert not (tmp_path / "study.partial.json").exists()


def test_no_row_begins_that_would_not_fit(tmp_path, monkeypatch):
    "The longest row so far is the measure; the clock is ours."
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])

    def measure(cell):
        now[0] += cell["seconds"]
        return dict(ok=True)

    def study(run):
        return dict(rows=run.rows("study", [dict(k=k, seconds=s) for k, s in enumerate((30, 50, 10, 10))], measure))
    rows = report(tmp_path, "--limit", "study=140").run(study)["rows"]
    assert [("skipped" in row) for row in rows] == [False, False, False, True] and now[0] == 90
    run = report(tmp_path / "call", "--stop-after", "100")
    with pytest.raises(session.OutOfTime): run.run(study)
    assert now[0] == 90 + 80


def test_a_row_of_more_samples_is_expected_to_take_longer(tmp_path, monkeypatch):
    "Five times the samples behind a distance once outran a call, and everything that was to be packed at its end was lost."
    now, cells = [0.0], [dict(k=0, samples=10), dict(k=1, samples=50), dict(k=2, samples=10), dict(k=3, samples=10, NFE=9)]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])

    def measure(cell):
        now[0] += cell["samples"] * cell.get("NFE", 1)
        return dict(ok=True)

    def study(run): return dict(rows=run.rows("study", cells, measure))
    rows = report(tmp_path, "--limit", "study=55").run(study)["rows"]
    assert [("skipped" in row) for row in rows] == [False, True, False, True] and now[0] == 20
    run = report(tmp_path / "call", "--stop-after", "55")
    with pytest.raises(session.OutOfTime): run.run(study)
    assert now[0] == 30


def test_a_call_that_is_killed_leaves_its_rows_packed(tmp_path):
    "The bundle was written when a call ended, so that one that was killed brought nothing home."
    run = report(tmp_path / "out", "--bundle", str(tmp_path / "packed"))

    def measure(cell):
        if cell["k"] == 2: raise KeyboardInterrupt
        return dict(ok=True)
    with pytest.raises(KeyboardInterrupt): run.rows("study", [dict(k=k) for k in range(3)], measure)
    content = b"".join(part.read_bytes() for part in sorted((tmp_path / "packed").iterdir()))
    kept = json.load(tarfile.open(fileobj=io.BytesIO(content)).extractfile("study.partial.json"))
    assert [row["cell"]["k"] for row in kept["rows"]] == [0, 1]


def test_the_untrained_denoiser_is_one_whose_network_returns_zeros():
    denoise = Preconditioned(lambda x, c_noise: torch.zeros_like(x), sigma_data=0.5)
    x, sigma = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 20.0])
    torch.testing.assert_close(levels.untrained(denoise)(x, sigma), denoise(x, sigma))


def test_it_says_beforehand_what_it_will_do(tmp_path):
    run = Report(command.parse(["--toy", "--device", "cpu", "--out", str(tmp_path), "--minutes", "12"]))
    session.write_json(tmp_path / "trials.json", {})
    lines = run.outlook(command.STAGES).splitlines()
    assert [line.split()[0] for line in lines[1:]] == STAGES and STAGES[0] == "kernels"
    assert "is there already" in lines[1 + STAGES.index("trials")] and "16.0 min" in lines[1 + STAGES.index("model")]
    minutes = [float(line.split("at most")[1].split()[0]) for line in lines if "at most" in line]
    assert minutes[0] == pytest.approx(sum(minutes[1:])) and max(minutes[1:3]) <= 4
    assert set(session.LIMITS) == set(STAGES) and max(session.LIMITS.values()) <= 240


def test_busy_time_and_gaps_of_intervals():
    assert profiling.covered([(5, 6), (0, 2), (1, 3), (1.5, 2.5), (10, 11)]) == (5, [4, 2])
    assert profiling.covered([(0, 1)]) == (1, []) and profiling.covered([(0, 1), (1, 2)]) == (2, [])
    a, b = profiling.grouped([("a", 1_000), ("b", 4_000), ("a", 1_000)])
    assert (b["name"], b["count"], b["ms"], b["share"]) == ("a", 2 / profiling.UPDATES, 2 / profiling.UPDATES, pytest.approx(1 / 3))
    assert a["name"] == "b"


def device_event(name, start, end, device="CUDA", annotation=False):
    return SimpleNamespace(name=name, is_user_annotation=annotation, device_type=getattr(torch.autograd.DeviceType, device),
                           time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start))


def test_a_trace_of_a_device_is_digested():
    "Made-up events of two updates: names of annotations span everything and must not fill the gaps."
    events = [device_event("Optimizer.step#Adam.step", 0, 10_000, annotation=True), device_event("conv", 0, 3_000), device_event("norm", 7_000, 9_000),
              device_event("cudaLaunchKernel", 0, 5, "CPU"), device_event("cuLaunchKernelEx", 5, 9, "CPU"), device_event("cudaStreamSynchronize", 9, 99, "CPU"),
              device_event("aten::conv2d", 0, 9, "CPU")]
    found = profiling.digest(events, True)
    assert (found["launches"], found["kernels"], found["busy_ms"], found["gap_ms"], found["longest_gaps_ms"]) == (1, 1, 2.5, 2, [4])
    assert [(row["name"], row["share"]) for row in found["top"]] == [("conv", 0.6), ("norm", 0.4)]
    with pytest.raises(RuntimeError, match="CUPTI"): profiling.digest(events[3:], True)


def test_a_training_goes_on_and_its_snapshots_stay(tmp_path, monkeypatch):
    run, folder = report(tmp_path), tmp_path / "run"
    _, config = model.plan(run, folder)
    taken = list(model.snapshots(run, folder).values())
    save = model.snapshot

    def stop_after_the_first(state, where, seconds):
        save(state, where, seconds)
        run.call_end = 0
    monkeypatch.setattr(model, "snapshot", stop_after_the_first)
    run.args.marks, run.args.minutes = [1e-9], 1e9          # the first record, and the end of the images
    with pytest.raises(session.OutOfTime): model.train_model(run, config, folder)
    taken = list(model.snapshots(run, folder).values())
    before, images = (taken[0] / "ema.safetensors").read_bytes(), checkpoints.read_config(taken[0] / "ema.safetensors")["extra"]["images"]
    assert images < 96 and not taken[1].exists()
    monkeypatch.setattr(model, "snapshot", save)
    run.call_end = math.inf
    model.train_model(run, config, folder)
    assert (taken[0] / "ema.safetensors").read_bytes() == before
    assert checkpoints.read_config(taken[1] / "ema.safetensors")["extra"]["images"] == 96
    log = [json.loads(line)["images"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == sorted(set(log)) and log[-1] == 96        # went on: no image twice
    model.train_model(run, config, folder)                      # nothing is missing: nothing happens


def test_what_is_trained_is_decided_once(tmp_path):
    run = report(tmp_path)
    assert model.plan(run, tmp_path / "a")[0]["chosen"] == "preset"
    session.write_json(tmp_path / "trials.json", dict(best="lr 2e-3", ema_share=0.1))
    assert model.plan(run, tmp_path / "a")[0]["chosen"] == "preset"
    chosen, config = model.plan(run, tmp_path / "b")
    assert chosen["chosen"] == "lr 2e-3" and config.ema_rampup == 0.1


def test_without_kernels_it_runs_and_says_so(tmp_path, monkeypatch):
    def broken(*arguments, **options): raise RuntimeError("no kernels here")
    run = report(tmp_path)
    monkeypatch.setattr(report_module, "compiled", broken)
    monkeypatch.setattr(setups, "compiled", broken)
    denoise = Preconditioned(build_network(setups.training_config(run).network | dict(resolution=32, channels=3, label_dim=10))).eval()
    assert run.fast(denoise) is denoise and "no kernels here" in run.compile_errors[0]
    config, _ = setups.can_compile(run, dataclasses.replace(setups.model_config(run), compile="fused"), run.data("train"))
    assert config.compile == "none" and len(run.compile_errors) == 2
    rows = run.run(sampling)["rows"]
    assert {row["variant"]: "failed" in row for row in rows} == dict(kernels=True, eager=False)
    assert json.loads((tmp_path / "sampling.json").read_text())["compile_errors"]


def test_what_a_diverging_training_had_before_is_measured(tmp_path, monkeypatch):
    run = report(tmp_path, "--marks", "0.0001", "--minutes", "5")

    def two_then_nan(config, folder, data, device):
        for record in runs.train(dataclasses.replace(config, images=48), None, data, device):
            yield record
        raise runs.TrainingDiverged("21 updates in a row")
    monkeypatch.setattr(model, "train", two_then_nan)
    found = run.run(model.model)
    assert "21 updates in a row" in found["diverged"] and (tmp_path / "weights.safetensors").exists()
    assert [row["minutes"] for row in found["rows"] if row["weights"] == "ema" and row["churn"] == "none"][0] == 0.0001
    assert not [row for row in found["rows"] if row["minutes"] == 5]


def test_an_error_beyond_its_limit_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "limit_of", lambda name: 0.0 if name == "augmentation fp32" else 1.0)
    result = report(tmp_path).run(correctness.correctness)
    assert not result["passed"] and result["failed"] == ["augmentation fp32"]


def test_a_short_call_ends_with_3_and_goes_on(tmp_path):
    early = script(tmp_path, "--stages", "trials", "--stop-after", "0.001", "--bundle", tmp_path / "packed")
    assert early.returncode == 3 and "out of time" in early.stdout and list((tmp_path / "packed").iterdir()), early.stderr[-2000:]
    assert not (tmp_path / "trials.json").exists()


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "studies/gpu/__main__.py", "--device", "cpu", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode != 0 and "--toy" in done.stderr
    wrong = script(tmp_path, "--limit", "stdy=3")
    assert wrong.returncode == 2 and "study" in wrong.stderr
