"""The script that measures on a GPU runs in full at toy size on the CPU, so that it cannot rot between GPUs."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["correctness", "training", "sampling", "trials", "model", "study", "artefacts"]


def report(out, *arguments):
    return subprocess.run([sys.executable, ROOT / "benchmarks/gpu_report.py", "--toy", "--device", "cpu", "--out", out,
                           "--sample-batch", "16", "--trial-minutes", "0.01", "--minutes", "0.05", *arguments],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_stage_at_toy_size(tmp_path):
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STAGES}
    assert all(result["toy"] and result["environment"]["date"] for result in results.values())
    correct = results["correctness"]
    assert correct["passed"] and all(correct["errors"][k] < correct["limits"][k] for k in correct["errors"])
    assert len(results["training"]["rows"]) == 3 and results["training"]["speedup"] > 0
    assert {row["weights"] for row in results["model"]["rows"]} == {"raw", "ema"}
    assert results["model"]["train_test_floor"] > 0
    assert {row["what"] for row in results["study"]["rows"]} == {"solver", "row", "churn"}
    for name in ("samples.png", "neighbours.png", "langevin.png", "weights.safetensors"):
        assert (tmp_path / name).stat().st_size > 100
    again = report(tmp_path)
    assert again.returncode == 0 and again.stdout.count("done before") == len(STAGES)


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/gpu_report.py", "--device", "cpu", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode != 0 and "--toy" in done.stderr
