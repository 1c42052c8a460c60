"""The command line: what it writes, what it refuses, and that an image is its seed's."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edm_nb import checkpoints, cli
from edm_nb.data import digits, load_images, write_zip
from edm_nb.metrics import feature_stats, frechet_distance, pixels
from edm_nb.networks import tiny
from edm_nb.preconditioning import Preconditioned

ROOT = Path(__file__).resolve().parent.parent


def edm_nb(*arguments):
    "Run a command in this process."
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A small random conditional denoiser on disk: its images differ by seed and class."
    generator = torch.Generator().manual_seed(0)
    net = tiny(resolution=8, channels=1, label_dim=10, model_channels=8, channel_mult=[1, 2], num_blocks=1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(folder / "model.safetensors", Preconditioned(net).eval())
    return folder


def images_of(path):
    with np.load(path) as file:
        return dict(zip(file["seeds"].tolist(), file["images"].astype(int)))


def test_the_image_of_a_seed_is_its_own(model, tmp_path):
    common = ["sample", model, "--steps", 5, "--S-churn", 4, "--device", "cpu"]
    assert edm_nb(*common, "--seeds", "0-9", "--out", tmp_path / "a.npz", "--batch", 10).exit_code == 0
    assert edm_nb(*common, "--seeds", "9,4,0", "--out", tmp_path / "b.npz", "--batch", 2).exit_code == 0
    a, b = images_of(tmp_path / "a.npz"), images_of(tmp_path / "b.npz")
    assert list(b) == [9, 4, 0]
    for seed, image in b.items():
        assert np.abs(image - a[seed]).max() <= 1          # one level of 255: another batch size rounds differently
    assert np.abs(a[4] - a[9]).max() > 20


def test_two_processes_draw_the_same_images(model, tmp_path):
    alone = edm_nb("sample", model, "--seeds", "0-6", "--steps", 4, "--out", tmp_path / "one.npz", "--device", "cpu")
    assert alone.exit_code == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "edm_nb.cli",
                           "sample", str(model), "--seeds", "0-6", "--steps", "4", "--out", str(tmp_path / "two.npz"),
                           "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = images_of(tmp_path / "one.npz"), images_of(tmp_path / "two.npz")
    assert list(one) == list(two)
    assert max(np.abs(one[seed] - two[seed]).max() for seed in one) <= 1


@pytest.mark.parametrize("name", ["sheet.png", "images.zip", "folder"])
def test_forms_of_output(model, tmp_path, name):
    out = tmp_path / name
    arguments = ["sample", model, "--seeds", "0-3", "--steps", 2, "--classes", "2,5", "--out", out, "--device", "cpu"]
    assert edm_nb(*arguments).exit_code == 0
    if name != "sheet.png":
        found = load_images(out)
        assert len(found) == 4
        if name == "images.zip":
            assert found.labels.tolist() == [2, 5, 2, 5]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    refused = edm_nb(*arguments)
    assert refused.exit_code == 2 and "--overwrite" in refused.output
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert edm_nb(*arguments, "--overwrite").exit_code == 0


def test_classes_change_the_image(model, tmp_path):
    for c in (2, 5):
        assert edm_nb("sample", model, "--seeds", 0, "--steps", 3, "--classes", c, "--out", tmp_path / f"{c}.npz", "--device", "cpu").exit_code == 0
    assert np.abs(images_of(tmp_path / "2.npz")[0] - images_of(tmp_path / "5.npz")[0]).max() > 3


@pytest.mark.parametrize("arguments, words", [
    (["sample", "nowhere", "--out", "x.png"], "no model at nowhere"),
    (["sample", "MODEL", "--out", "x.png", "--seeds", "5-1"], "backwards"),
    (["sample", "MODEL", "--out", "x.png", "--solver", "magic"], "heun, euler"),
    (["sample", "MODEL", "--out", "x.png", "--classes", "11"], "class 11"),
    (["sample", "MODEL", "--out", "x.png", "--sigma-min", "90"], "sigma"),
    (["sample", "MODEL", "--out", "x.png", "--S-churn", "-1"], "S_churn"),
    (["train", "no-such-preset", "--out", "run"], "digits"),
    (["train", "toy", "--out", "run", "--data", "nowhere.zip"], "nowhere.zip"),
    (["train", "toy", "--out", "run", "--precision", "fp8"], "bf16"),
    (["convert", "nowhere.pkl", "--out", "m"], "nowhere.pkl"),
    (["stats", "nowhere", "--out", "x.npz"], "nowhere"),
    (["fid", "nowhere", "--ref", "digits", "--out", "x.json"], "nowhere"),
])
def test_mistakes_are_one_line_and_exit_code_2(model, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = edm_nb(*[str(model) if a == "MODEL" else a for a in arguments])
    assert done.exit_code == 2, done.output
    message = [line for line in done.output.splitlines() if line.startswith("edm-nb: ")]
    assert len(message) == 1 and words in message[0]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_train_resumes_and_never_takes_a_strange_folder(tmp_path):
    short = ["train", "toy", "--images", 256, "--device", "cpu"]
    assert edm_nb(*short, "--out", tmp_path / "run").exit_code == 0
    first = (tmp_path / "run/model.safetensors").read_bytes()
    assert edm_nb(*short[:2], "--images", 512, "--device", "cpu", "--out", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run/model.safetensors").read_bytes() != first
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["images"] == 512
    other = edm_nb(*short, "--seed", 5, "--out", tmp_path / "run")
    assert other.exit_code == 2 and "seed" in other.output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        assert edm_nb(*short, *extra, "--out", tmp_path / "mine").exit_code == 2
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_a_folder_in_use_is_one_line_and_exit_code_2(tmp_path):
    from edm_nb.training import lock_folder
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run/config.json").write_text("{}")          # as a run that has just begun
        done = edm_nb("train", "toy", "--images", 64, "--device", "cpu", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "edm-nb: another run is training" in done.output, done.output


def test_stats_and_fid_agree_with_the_functions(tmp_path):
    data = digits()
    write_zip(tmp_path / "half.zip", data.take(slice(0, 900)))
    assert edm_nb("stats", "digits", "--features", "pixels", "--out", tmp_path / "ref.npz").exit_code == 0
    for reference in (tmp_path / "ref.npz", "digits"):
        out = tmp_path / f"{Path(str(reference)).stem}.json"
        done = edm_nb("fid", tmp_path / "half.zip", "--ref", reference, "--features", "pixels", "--out", out)
        assert done.exit_code == 0, done.output
        one, two = feature_stats(data.images[:900], pixels()), feature_stats(data.images, pixels())
        expected = frechet_distance(one.mean, one.cov, two.mean, two.cov)
        result = json.loads(out.read_text())
        assert result["mean"] == pytest.approx(expected, rel=1e-9)
        assert result["protocol"]["features"] == "pixels-1x8x8" and result["protocol"]["n"] == 900


def test_fid_of_a_model_reports_three_seed_ranges(model, tmp_path):
    done = edm_nb("fid", model, "--ref", "digits", "--features", "pixels", "--n", 96, "--steps", 3, "--out", tmp_path / "d.json",
                  "--device", "cpu")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "d.json").read_text())
    assert len(set(result["values"])) == 3
    assert result["min"] == min(result["values"]) and result["mean"] == pytest.approx(sum(result["values"]) / 3)
    assert result["protocol"]["nfe"] == 5
    assert "evaluations" in done.output


def test_a_finished_run_is_reported_and_left_alone(tmp_path):
    run = ["train", "toy", "--device", "cpu", "--out", tmp_path / "run"]
    assert edm_nb(*run, "--images", 256).exit_code == 0
    before = (tmp_path / "run/model.safetensors").read_bytes()
    for images in (256, 128):
        again = edm_nb(*run, "--images", images)
        assert again.exit_code == 0, again.output
        assert "already finished: 256 images, model in" in again.output
    assert (tmp_path / "run/model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "run/config.json").read_text())["images"] == 256


def test_demo_goes_on_where_its_training_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "PRESETS", dict(cli.PRESETS, digits=cli.PRESETS["toy"]))
    small = digits().take(slice(0, 100))
    monkeypatch.setattr(cli, "load_data", lambda config: small)
    results = []
    for _ in range(2):
        done = edm_nb("demo", "--out", tmp_path / "demo", "--images", 128)
        assert done.exit_code == 0, done.output
        results.append(json.loads((tmp_path / "demo/demo.json").read_text()))
    assert "already finished: 128 images" in done.output
    assert all(results[0][key] == results[1][key] for key in ("distance", "loss", "images_seen", "train_seconds"))
    assert edm_nb("demo", "--out", tmp_path / "demo", "--images", 128, "--overwrite").exit_code == 0


@pytest.mark.parametrize("command", [["train", "toy"], ["demo"]])
def test_overwrite_deletes_nothing_that_another_process_uses(tmp_path, command):
    from edm_nb.training import lock_folder
    (tmp_path / "run/state").mkdir(parents=True)
    for name in ("config.json", "log.jsonl", "state/state-000000000001.safetensors"):
        (tmp_path / "run" / name).write_text("{}")
    with lock_folder(tmp_path / "run"):
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
        done = edm_nb(*command, "--images", 64, "--device", "cpu", "--out", tmp_path / "run", "--overwrite")
        assert done.exit_code == 2 and "edm-nb: another run is training" in done.output, done.output
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert edm_nb("train", "toy", "--images", 64, "--device", "cpu", "--out", tmp_path / "run", "--overwrite").exit_code == 0
    assert [p.name for p in (tmp_path / "run/state").iterdir()] == ["state-000000000064.safetensors"]


def test_unknown_devices_are_one_line(tmp_path):
    for device in ("foo", "cuda:99", "meta"):
        done = edm_nb("train", "toy", "--images", 64, "--device", device, "--out", tmp_path / "run")
        assert done.exit_code == 2 and "this machine has cpu" in done.output, done.output
    assert not (tmp_path / "run").exists()
