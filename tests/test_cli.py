"""The command line: what it writes, what it refuses, and that an image is its seed's."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from patience import PATIENCE, wait_for
from typer.testing import CliRunner

from edm_nb import checkpoints, cli, commands, generation, measuring, terminal
from edm_nb.configs import PRESETS, config_json
from edm_nb.data import digits, load_images, write_zip
from edm_nb.features import feature_stats, pixels
from edm_nb.frechet import frechet_distance
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
    (["train", "toy", "--out", "run", "--compile", "yes"], "blocks, whole"),
    (["sample", "MODEL", "--out", "x.jpg"], ".png, .npz, .zip"),
    (["sample", "MODEL", "--out", "x.png", "--seeds", "0-1000000000"], "more than 10,000,000"),
    (["sample", "MODEL", "--out", "x.png", "--seeds", "0-99,4294967296"], "below 4,294,967,296"),
    (["sample", "MODEL", "--out", "x.png", "--seeds", "9" * 5000], "expected numbers and ranges"),
    (["sample", "MODEL", "--out", "x.png", "--table-row", "ddpm"], "edm, vp, ve, iddpm"),
    (["sample", "MODEL", "--out", "x.png", "--table-row", "vp", "--sigma-max", "10"], "follow from its constants"),
    (["sample", "MODEL", "--out", "x.png", "--sigmas", "nowhere.txt"], "no file of noise levels at nowhere.txt"),
    (["sample", "MODEL", "--out", "x.png", "--guide", "MODEL"], "--guide does nothing without --guidance"),
    (["sample", "MODEL", "--out", "x.png", "--guide", "nowhere", "--guidance", "1"], "no guide at nowhere"),
    (["sample", "MODEL", "--out", "x.png", "--guidance", "nan"], "not a number"),
    (["sample", "MODEL", "--out", "x.png", "--guidance", "inf"], "guidance is inf"),
    (["sample", "MODEL", "--out", "x.png", "--guidance", "1e308"], "guidance is 1e+308"),
    (["sample", "MODEL", "--out", "x.png", "--sigma-min", "1e-320"], "sigma_min is"),
    (["sample", "MODEL", "--out", "x.png", "--sigma-max", "1e308"], "sigma_max is"),
    (["sample", "MODEL", "--out", "x.png", "--S-churn", "3", "--S-tmin", "inf"], "S_tmin is inf"),
    (["sample", "MODEL", "--out", "x.png", "--S-churn", "3", "--S-noise", "1e300"], "S_noise is"),
    (["sample", "MODEL", "--out", "x.png", "--S-noise", "1.1"], "--S-noise: does nothing while --S-churn is 0"),
    (["sample", "MODEL", "--out", "x.png", "--table-row", "ve", "--rho", "5"], "row 've' has none"),
    (["fid", "digits", "--ref", "digits", "--out", "x.json", "--classes", "99"], "--classes: for a model only, and digits is none"),
    (["fid", "digits", "--ref", "digits", "--out", "x.json", "--steps", "3", "--guidance", "2", "--n", "9"], "--steps, --guidance, --n: for a model only"),
    (["fid", "MODEL", "--ref", "nowhere", "--out", "x.json"], "no reference at nowhere"),
    (["fid", "MODEL", "--ref", "digits", "--out", "x.json", "--weights", "nope"], "no weights at nope"),
    (["fid", "MODEL", "--ref", "digits", "--out", "x.json", "--weights", "/etc/passwd"], "--weights belong to --features inception"),
    (["fid", "MODEL", "--ref", "digits", "--out", "x.json", "--features", "vgg"], "pixels, cifar-features, inception"),
    (["fid", "MODEL", "--ref", "digits", "--out", "x.json", "--n", "50", "--seed", "4294967290"], "seeds beyond 2^32"),
    (["fid", "MODEL", "--ref", "digits", "--out", "x.json", "--neighbours", "x.jpg"], ".png"),
    (["suggest", "/"], "the whole disk"), (["stats", "/", "--out", "x.npz"], "the whole disk"), (["train", "toy", "--data", "/", "--out", "run"], "the whole disk"),
    (["convert", "EMPTY", "--out", "model.pt"], "expected a name that ends in .safetensors"),
    (["train", "toy"], "--out: name a folder"),
    (["train", "toy", "--out", "run", "--images", "64", "--keep-durations"], "Shorten all durations together"),
    (["train", "nowhere.json", "--out", "run"], "no configuration at nowhere.json"),
    (["train", "toy", "--out", "run", "--set", 'network.arch=["tiny"]'], "network"),
    (["train", "toy", "--out", "run", "--set", "network.arch={}"], "network"),
    (["train", "toy", "--out", "run", "--sigma-data", "1e300"], "expected 1e-06 to 1e+06"),
    (["train", "toy", "--out", "run", "--sigma-data", "1e-300"], "expected 1e-06 to 1e+06"),
    (["sample", "EMPTY", "--out", "x.png"], "EMPTY"),
    (["sample", "MODEL", "--out", "x.png", "--classes", ""], "--classes ''"),
    (["sample", "MODEL", "--out", "x.png", "--sigma-min", "-1"], "sigma_min is -1"),
    (["sample", "MODEL", "--out", "x.png", "--at", "7"], "no model at 7 images; kept were: none"),
    (["sample", "MODEL", "--out", "x.png", "--labels", "nowhere.npy"], "nowhere.npy"),
    (["stats", "digits", "--out", "x.json"], ".npz"),
    (["fid", "MODEL", "--ref", "digits", "--out", "x.png"], ".json"),
    (["train", "toy", "--out", "run", "--data", ""], "data is ''"),
    (["train", "toy", "--out", "run", "--set", "lr"], "key=value"),
    (["train", "toy", "--out", "run", "--set", "learning_rate=1"], "no value 'learning_rate'; there are data, "),
    (["train", "toy", "--out", "run", "--set", "lr.max=1"], "only network, precond, sigma_args, augment_args, sampling, expected"),
    (["train", "toy", "--out", "run", "--set", "network.model_chanels=8"], "model_channels"),
    (["train", "toy", "--out", "run", "--set", "batch=many"], "batch is 'many'"),
    (["train", "toy", "--out", "run", "--sigma-data", "much"], "auto or a number"),
    (["train", "toy", "--out", "run", "--sigma-data", "-1"], "sigma_data is -1"),
    (["train", "toy", "--out", "run", "--no-conditional", "--set", "label_dropout=0.1"], "no labels to drop"),
    (["convert", "nowhere.pkl", "--out", "m"], "nowhere.pkl"),
    (["stats", "nowhere", "--out", "x.npz"], "nowhere"),
    (["fid", "nowhere", "--ref", "digits", "--out", "x.json"], "nowhere"),
])
def test_mistakes_are_one_line_and_exit_code_2(model, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path.parent / "EMPTY"
    empty.touch()
    done = edm_nb(*[str({"MODEL": model, "EMPTY": empty}.get(a, a)) for a in arguments])
    assert done.exit_code == 2, done.output
    message = [line for line in done.output.splitlines() if line.startswith("edm-nb: ")]
    assert len(message) == 1 and words in message[0]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# click's own words come before the command's: a usage line, then the error
@pytest.mark.parametrize("arguments", [
    ["sample", "x", "--steps", "0"], ["sample", "x", "--steps", "1000000000"], ["sample", "x", "--batch", "0"], ["sample", "x", "--rho", "1e-300"],
    ["sample", "x", "--rho", "1e300"], ["fid", "x", "--ref", "digits", "--n", "5000000000"], ["fid", "x", "--ref", "digits", "--repeats", "1000000000"],
    ["fid", "x", "--ref", "digits", "--seed", "-1"], ["train", "toy", "--lr", "1e300"], ["train", "toy", "--lr", "1e-320"], ["train", "toy", "--batch", "0"],
    ["sample"], ["nonsense"], ["sample", "x", "--no-such-option"]], ids=str)
def test_numbers_out_of_range_are_refused_while_arguments_are_read(arguments):
    done = edm_nb(*arguments)
    assert done.exit_code == 2 and "Error" in done.output and "Traceback" not in done.output


ANSWERS = [["--version"], ["--help"], ["sample", "--help"], ["train"], ["sample"], ["sample", "x", "--steps", "0"], ["sample", "nowhere", "--out", "x.png"],
           ["sample", ".", "--out", "x.jpg"], ["sample", ".", "--out", "x.png", "--seeds", "5-1"], ["sample", ".", "--out", "x.png", "--solver", "magic"],
           ["fid", "digits", "--ref", "digits", "--steps", "3"], ["stats", "nowhere", "--out", "x.npz"], ["convert", "nowhere.pkl", "--out", "m"], ["train", "toy"]]


def test_answers_about_arguments_need_no_torch():
    "In one process: none of these may import what takes seconds."
    code = ("import sys, json\nfrom edm_nb import cli\nends = []\n"
            f"for arguments in {ANSWERS!r}:\n"
            "    sys.argv = ['edm-nb', *arguments]\n"
            "    try: cli.main()\n"
            "    except SystemExit as end: ends.append(end.code or 0)\n"
            "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'sklearn', 'tqdm'} & {name.split('.')[0] for name in sys.modules}\n"
            "print(json.dumps([ends, sorted(heavy)]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    ends, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == [] and ends == [0, 0, 0] + [2] * (len(ANSWERS) - 3), done.stderr[-2000:]


def test_the_package_can_be_started():
    done = subprocess.run([sys.executable, "-m", "edm_nb", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("edm-nb ")


def test_the_names_in_the_command_line_are_those_of_the_library():
    assert cli.SOLVERS == tuple(generation.SOLVERS) and cli.ROWS == tuple(generation.ROWS) and cli.SETS == tuple(commands.NAMED_SETS)


@pytest.mark.parametrize("error, code, words", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes."), 2, "not enough memory (3.73e+03 GiB"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), 2, "not enough memory (20.00 GiB asked for)"),
    (MemoryError(), 2, "--batch"), (EOFError(), 2, "it is empty"), (RecursionError("maximum"), 2, "nested too deep"),
    (__import__("safetensors").SafetensorError("Error while serializing: No space left on device (os error 28)"), 2, "the disk is full"),
    (__import__("zipfile").BadZipFile("Bad CRC-32 for file 'mu.npy'"), 2, "damaged"), (OverflowError("int too large"), 2, "int too large"),
    (OSError(28, "No space left on device"), 2, "Make room"), (ValueError("a\nb \x1b[31mred"), 2, "a b ?[31mred"),
    (KeyError("extra"), 1, "a fault of edm-nb itself, please report it: KeyError: 'extra'"), (KeyboardInterrupt(), 130, "interrupted")], ids=lambda e: type(e).__name__)
def test_every_error_is_one_line(error, code, words, capsys):
    "Whatever a library raises: no traceback, no 'Aborted!', and an exit code that says whose fault it was."
    @cli.friendly
    def command(): raise error
    with pytest.raises(typer.Exit) as ended: command()
    said = capsys.readouterr().err
    assert ended.value.exit_code == code and said.startswith("edm-nb: ") and said.count("\n") == 1 and words in said


def test_overwriting_a_folder_replaces_it_whole(model, tmp_path):
    "Pictures of an older model that stay would be measured with the new ones."
    draw = ["sample", model, "--steps", 2, "--device", "cpu", "--out", tmp_path / "f"]
    assert edm_nb(*draw, "--seeds", "0-9").exit_code == 0
    assert edm_nb(*draw, "--seeds", "2-4", "--overwrite").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["000002.png", "000003.png", "000004.png"]
    (tmp_path / "f/thesis.txt").write_text("years of work")
    refused = edm_nb(*draw, "--seeds", 0, "--overwrite")
    assert refused.exit_code == 2 and "thesis.txt" in refused.output
    (tmp_path / "f/thesis.txt").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "f").iterdir()}
    assert edm_nb(*draw, "--seeds", 0, "--classes", 77, "--overwrite").exit_code == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "f").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_guide_without_labels_guides(model, tmp_path):
    net = tiny(resolution=8, channels=1, model_channels=8, channel_mult=[1, 2], num_blocks=1)
    checkpoints.save(tmp_path / "plain.safetensors", Preconditioned(net).eval())
    for command in (["sample", model, "--seeds", "0-3", "--out", tmp_path / "g.npz"],
                    ["fid", model, "--ref", "digits", "--n", 70, "--repeats", 1, "--out", tmp_path / "g.json"]):
        done = edm_nb(*command, "--steps", 3, "--guide", tmp_path / "plain.safetensors", "--guidance", 1, "--device", "cpu")
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "g.json").read_text())["protocol"]["nfe"] == 10


def test_levels_from_a_file_rows_of_the_table_and_published_seeds(model, tmp_path):
    draw = ["sample", model, "--seeds", "0-3", "--device", "cpu", "--json", "--out"]
    (tmp_path / "levels.txt").write_text("# no number")
    assert "'#' is no number" in edm_nb(*draw, tmp_path / "a.npz", "--sigmas", tmp_path / "levels.txt").output
    levels = generation.step_levels(generation.Sampling(5))
    (tmp_path / "levels.txt").write_text("\n".join(map(repr, levels[:-1].tolist())))
    by_file, plain = (edm_nb(*draw, tmp_path / f"{name}.npz", *more) for name, more in
                      (("a", ["--sigmas", tmp_path / "levels.txt"]), ("b", ["--steps", 5])))
    assert by_file.exit_code == plain.exit_code == 0, by_file.output
    assert images_of(tmp_path / "a.npz")[2].tolist() == images_of(tmp_path / "b.npz")[2].tolist()
    assert json.loads(by_file.stdout)["evaluations_per_image"] == 9
    row = edm_nb(*draw, tmp_path / "c.npz", "--table-row", "vp", "--steps", 7)
    assert json.loads(row.stdout)["evaluations_per_image"] == 7
    assert edm_nb(*draw, tmp_path / "d.npz", "--official-seeds", "--steps", 5).exit_code == 0
    assert np.abs(images_of(tmp_path / "d.npz")[2] - images_of(tmp_path / "b.npz")[2]).max() > 3


def test_a_quick_look_takes_a_new_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("model0.png", "model0-1.png"):
        done = edm_nb("sample", model, "--seeds", "0-3", "--steps", 2, "--device", "cpu")
        assert done.exit_code == 0 and f"wrote {expected}" in done.output, done.output


def test_more_numbers_beside_the_distance(model, tmp_path):
    done = edm_nb("fid", model, "--ref", "digits", "--count", 80, "--repeats", 1, "--steps", 2, "--kid", "--precision", "--neighbours", tmp_path / "near.png",
                  "--out", tmp_path / "d.json", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert json.loads(done.stdout)["mean"] == found["mean"]
    from edm_nb.features import extract
    from edm_nb.metrics import kid
    images = torch.cat([x for _, x, _ in generation.generate(generation.load_model(model), range(80), generation.Sampling(2))])
    expected = kid(extract(images, pixels()), extract(digits().images, pixels()))
    assert found["kid"]["value"] == pytest.approx(expected.value, rel=1e-3) and found["kid"]["n"] == 80
    assert 0 <= found["precision"]["recall"] <= 1 and (tmp_path / "near.png").read_bytes()[:4] == b"\x89PNG"
    assert "KID" in done.stderr and "recall" in done.stderr


@pytest.mark.parametrize("change", [[], ["--set", "lr_rampdown=1500"]], ids=["plain", "falling-rate"])
def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    done = edm_nb("train", "toy", "--dry-run", "--device", "cpu", "--json", *change)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["updates"] == 32 and facts["parameters"] > 10_000 and facts["images_per_second"] > 0 and list(tmp_path.iterdir()) == []


def test_a_closed_error_stream_and_an_old_encoding_are_no_reason_to_fail(model, tmp_path):
    draw = [sys.executable, "-m", "edm_nb", "sample", str(model), "--seeds", "0-1", "--steps", "1", "--device", "cpu", "--out"]
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *draw, str(tmp_path / "a.npz")], cwd=ROOT, capture_output=True)
    assert closed.returncode == 0 and (tmp_path / "a.npz").exists()
    code = "from edm_nb import cli\nimport sys\ncli.app = lambda **_: (print('Fr\u00e9chet'), print('\u03c3', file=sys.stderr))\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp932"})
    assert done.returncode == 0 and b"Fr?chet" in done.stdout


@pytest.mark.parametrize("environment, words", [
    ({"WORLD_SIZE": "-3"}, "WORLD_SIZE='-3'; expected a whole number"), ({"WORLD_SIZE": "a"}, "WORLD_SIZE='a'"), ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK='x'"),
    ({"WORLD_SIZE": "2"}, "lacks RANK, MASTER_ADDR, MASTER_PORT"), ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_PORT": "1"}, "RANK=5 of WORLD_SIZE=2"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT='x'"), ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "FREE"}, "a partner process is missing")], ids=str)
def test_nonsense_about_processes_is_one_line(model, tmp_path, environment, words):
    "A partner that never comes is waited for as long as --timeout says."
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1"} | environment if "RANK" in environment and len(environment) > 2 else environment
    environment = {name: port if value == "FREE" else value for name, value in environment.items()}
    done = CliRunner().invoke(cli.app, ["sample", str(model), "--seeds", "0", "--device", "cpu", "--timeout", "1", "--out", str(tmp_path / "x.npz")], env=environment)
    assert done.exit_code == 2 and words in done.output and "Traceback" not in done.output, done.output


def test_fid_and_demo_run_under_torchrun(model, tmp_path):
    "Started by torchrun itself, whose parser has opinions about --n."
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "edm_nb"]
    for command in (["fid", str(model), "--ref", "digits", "--count", "70", "--repeats", "1", "--steps", "2", "--timeout", "100", "--out", str(tmp_path / "d.json")],
                    ["demo", "--images", "128", "--out", str(tmp_path / "demo")]):
        done = subprocess.run([*start, *command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "d.json").read_text())["values"]) == 1 and (tmp_path / "demo/demo.json").exists()


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
    from edm_nb.folders import lock_folder
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run/config.json").write_text(config_json(PRESETS["toy"]))          # as a run that has just begun
        done = edm_nb("train", "toy", "--images", 64, "--device", "cpu", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "edm-nb: another run is training" in done.output, done.output


def test_stats_and_fid_agree_with_the_functions(tmp_path):
    data = digits()
    write_zip(tmp_path / "half.zip", data.take(slice(0, 900)))
    assert edm_nb("stats", "digits", "--features", "pixels", "--out", tmp_path / "ref.npz").exit_code == 0
    own = edm_nb("fid", tmp_path / "ref.npz", "--ref", "digits", "--features", "pixels", "--out", tmp_path / "own.json")   # both sides ready-made
    assert own.exit_code == 0 and json.loads((tmp_path / "own.json").read_text())["mean"] < 1e-8, own.output
    for reference in (tmp_path / "ref.npz", "digits"):
        out = tmp_path / f"{Path(str(reference)).stem}.json"
        done = edm_nb("fid", tmp_path / "half.zip", "--ref", reference, "--features", "pixels", "--out", out)
        assert done.exit_code == 0, done.output
        one, two = feature_stats(data.images[:900], pixels()), feature_stats(data.images, pixels())
        expected = frechet_distance(one.mean, one.cov, two.mean, two.cov)
        result = json.loads(out.read_text())
        assert result["mean"] == pytest.approx(expected, rel=1e-9)
        assert result["protocol"]["features"] == "pixels-1x8x8" and result["protocol"]["n"] == 900
        assert result["protocol"]["split"] == ("all" if reference == "digits" else "unknown")


def test_fid_of_a_model_reports_three_seed_ranges(model, tmp_path):
    done = edm_nb("fid", model, "--ref", "digits", "--features", "pixels", "--n", 96, "--steps", 3, "--out", tmp_path / "d.json",
                  "--device", "cpu")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "d.json").read_text())
    assert len(set(result["values"])) == 3
    assert result["min"] == min(result["values"]) and result["mean"] == pytest.approx(sum(result["values"]) / 3)
    assert result["protocol"]["nfe"] == 5 and json.loads(result["protocol"]["sampler"]) == dict(row="edm", solver="heun", steps=3, sigmas=[80.0, 0.002, 3])
    published = edm_nb("fid", model, "--ref", "digits", "--features", "pixels", "--n", 96, "--repeats", 1, "--steps", 3, "--official-seeds", "--device", "cpu", "--json")
    other = json.loads(published.stdout)
    assert json.loads(other["protocol"]["sampler"])["official_seeds"] and other["values"][0] != result["values"][0]
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
    monkeypatch.setattr(commands, "PRESETS", dict(commands.PRESETS, demo=dataclasses.replace(commands.PRESETS["toy"], log_every=64, grid_every=64)))
    small = digits().take(slice(0, 100))
    monkeypatch.setattr(commands, "load_data", lambda config: small)
    results = []
    for _ in range(2):
        done = edm_nb("demo", "--out", tmp_path / "demo", "--images", 128)
        assert done.exit_code == 0, done.output
        results.append(json.loads((tmp_path / "demo/demo.json").read_text()))
        assert "a picture every 64 images" in done.output
    assert len(list((tmp_path / "demo/samples").glob("*.png"))) == 2                # while it trains
    assert "already finished: 128 images" in done.output
    assert all(results[0][key] == results[1][key] for key in ("distance", "loss", "images_seen", "train_seconds"))
    assert edm_nb("demo", "--out", tmp_path / "demo", "--images", 128, "--overwrite").exit_code == 0


@pytest.mark.parametrize("command", [["train", "toy"], ["demo"]])
def test_overwrite_deletes_nothing_that_another_process_uses(tmp_path, command):
    from edm_nb.folders import lock_folder
    (tmp_path / "run/state").mkdir(parents=True)
    for name in ("config.json", "log.jsonl", "state/state-000000000001.safetensors"):
        (tmp_path / "run" / name).write_text(config_json(PRESETS["toy"]) if name == "config.json" else "{}")
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


def test_any_value_can_be_set_and_ends_up_in_the_run(tmp_path):
    done = edm_nb("train", "toy", "--images", 64, "--no-conditional", "--set", "network.dropout=0.25", "--set", "betas=[0.8, 0.9]", "--set", "sigma=ve", "--set", "sigma_args={}",
                  "--set", "precision=fp32", "--sigma-data", "auto", "--device", "cpu", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["network"]["dropout"] == 0.25 and config["betas"] == [0.8, 0.9] and config["sigma"] == "ve" and config["conditional"] is False
    measured = float((digits().images.double() / 127.5 - 1).std())
    assert config["precond"]["sigma_data"] == pytest.approx(measured, rel=1e-3)
    assert "warning" not in done.output
    off = edm_nb("train", "toy", "--images", 64, "--sigma-data", 0.2, "--device", "cpu", "--out", tmp_path / "off")
    assert off.exit_code == 0 and off.output.count("edm-nb: warning: sigma_data is set to 0.2") == 1, off.output


def test_the_range_that_the_data_suggest_is_stored_and_used(tmp_path):
    "What `suggest` says need not be retyped: the model remembers it, `sample` and `fid` use it, options replace it."
    train = ["train", "toy", "--images", 64, "--device", "cpu", "--out"]
    for name, more in dict(plain=[], auto=["--sigma-data", "auto"], own=["--sigma-data", "auto", "--set", "sampling.sigma_max=20"]).items():
        assert edm_nb(*train, tmp_path / name, *more).exit_code == 0
    suggested = json.loads(edm_nb("suggest", "digits").output)
    draw = ["--seeds", 0, "--steps", 2, "--device", "cpu", "--out"]
    for name, more, first, last in (("plain", [], 80, 0.002), ("auto", [], suggested["sigma_max"], suggested["sigma_min"]), ("own", [], 20, suggested["sigma_min"]),
                                    ("auto", ["--sigma-max", 7, "--sigma-min", 0.1], 7, 0.1)):
        done = edm_nb("sample", tmp_path / name, *draw, tmp_path / f"{name}{len(more)}.npz", *more)
        begin, end = (float(x) for x in __import__("re").search(r"from σ = (\S+) to (\S+)", done.output).groups())
        assert begin == pytest.approx(first, rel=0.1) and end == pytest.approx(last, rel=0.05), done.output
    measured = edm_nb("fid", tmp_path / "own", "--ref", "digits", "--n", 70, "--repeats", 1, "--steps", 2, "--device", "cpu", "--json")
    assert json.loads(json.loads(measured.stdout)["protocol"]["sampler"])["sigmas"][0] == 20
    refused = edm_nb(*train, tmp_path / "x", "--set", "sampling.sigma_max=nonsense")
    assert refused.exit_code == 2 and "sampling: sigma_max is 'nonsense'" in refused.output


def test_unlabelled_data_names_the_option(tmp_path):
    write_zip(tmp_path / "plain.zip", dataclasses.replace(digits().take(slice(0, 80)), labels=None, class_names=()))
    run = ["train", "toy", "--images", 64, "--data", tmp_path / "plain.zip", "--device", "cpu", "--out", tmp_path / "run"]
    refused = edm_nb(*run)
    assert refused.exit_code == 2 and "--no-conditional" in refused.output
    assert edm_nb(*run, "--no-conditional").exit_code == 0


def test_presets_version_and_suggestions_are_printed():
    listed = edm_nb("presets")
    assert listed.exit_code == 0
    head, *lines = listed.output.splitlines()
    assert head.split()[0] == "preset" and max(map(len, lines)) <= 100
    for name, line in zip(commands.PRESETS, lines, strict=True):
        assert line.split()[0] == name and f"{commands.PRESETS[name].images:,}" in line
    assert [row["name"] for row in json.loads(edm_nb("presets", "--json").output)] == list(commands.PRESETS)
    from edm_nb import __version__
    assert edm_nb("--version").output.strip() == f"edm-nb {__version__}"
    suggested = json.loads(edm_nb("suggest", "digits").output)
    assert suggested["sigma_data"] == pytest.approx(0.7518, abs=1e-3) and suggested["P_std"] == 1.2
    assert "edm-nb presets" in " ".join(edm_nb("train", "--help").output.split())


def test_kept_models_are_sampled_and_measured_by_name(tmp_path):
    assert edm_nb("train", "toy", "--images", 1024, "--keep-models", 256, "--device", "cpu", "--out", tmp_path / "run").exit_code == 0
    draw = ["sample", tmp_path / "run", "--seeds", "0-3", "--steps", 4, "--device", "cpu"]
    for name, more in dict(early=["--at", 256], late=["--at", 1024], last=[]).items():
        assert edm_nb(*draw, *more, "--out", tmp_path / f"{name}.npz").exit_code == 0
    early, late, last = (images_of(tmp_path / f"{name}.npz") for name in ("early", "late", "last"))
    assert all((late[s] == last[s]).all() for s in late) and any((early[s] != last[s]).any() for s in late)
    missing = edm_nb(*draw, "--at", 300, "--out", tmp_path / "x.npz")
    assert missing.exit_code == 2 and "256, 512, 768, 1,024" in missing.output
    done = edm_nb("fid", tmp_path / "run", "--at", 256, "--ref", "digits", "--n", 80, "--repeats", 1, "--steps", 2, "--device", "cpu",
                  "--out", tmp_path / "d.json")
    assert done.exit_code == 0, done.output
    protocol = json.loads((tmp_path / "d.json").read_text())["protocol"]
    assert protocol["ema"] == "model-000000256.safetensors" and protocol["features"] == "pixels-1x8x8"      # chosen by the shape


def test_features_follow_the_shape():
    assert measuring.feature_network(None, (3, 32, 32)).name == "cifar-features"
    assert measuring.feature_network(None, (3, 16, 16)).name == "pixels-3x16x16"


def test_latents_stay_numbers(tmp_path):
    "Float data with four channels: trained, drawn as float32, and nothing that needs a picture."
    images = 3 * torch.randn(80, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "latents.npz", images=images.numpy())
    assert edm_nb("train", "toy", "--images", 64, "--data", tmp_path / "latents.npz", "--no-conditional", "--sigma-data", "auto", "--device", "cpu",
                  "--out", tmp_path / "run").exit_code == 0
    draw = ["sample", tmp_path / "run", "--seeds", "0-3", "--steps", 2, "--device", "cpu", "--out"]
    for name in ("x.png", "x.zip", "x"):
        refused = edm_nb(*draw, tmp_path / name)
        assert refused.exit_code == 2 and "4 channels" in refused.output and not (tmp_path / name).exists()
    assert edm_nb(*draw, tmp_path / "x.npz", "--sigma-max", 10).exit_code == 0
    with np.load(tmp_path / "x.npz") as file: drawn = file["images"]
    assert drawn.dtype == np.float32 and drawn.shape == (4, 4, 8, 8) and np.abs(drawn).max() > 1.5
    assert len(load_images(tmp_path / "x.npz")) == 4
    fid = edm_nb("fid", tmp_path / "run", "--ref", "digits", "--out", tmp_path / "d.json")
    assert fid.exit_code == 2 and "float data" in fid.output


def test_label_vectors_have_to_be_given(tmp_path):
    vectors = torch.rand(80, 3, generator=torch.Generator().manual_seed(0))
    write_zip(tmp_path / "vectors.zip", dataclasses.replace(digits().take(slice(0, 80)), labels=vectors, class_names=()))
    assert edm_nb("train", "toy", "--images", 64, "--data", tmp_path / "vectors.zip", "--device", "cpu", "--out", tmp_path / "run").exit_code == 0
    draw = ["sample", tmp_path / "run", "--seeds", "0-3", "--steps", 2, "--device", "cpu", "--out", tmp_path / "x.npz"]
    refused = edm_nb(*draw)
    assert refused.exit_code == 2 and "--labels file.npy" in refused.output
    np.save(tmp_path / "wide.npy", np.zeros((2, 5)))
    assert "the model takes [N, 3]" in edm_nb(*draw, "--labels", tmp_path / "wide.npy").output
    np.save(tmp_path / "two.npy", vectors[:2].numpy())
    assert edm_nb(*draw, "--labels", tmp_path / "two.npy").exit_code == 0
    with np.load(tmp_path / "x.npz") as file: np.testing.assert_array_equal(file["labels"], vectors[[0, 1, 0, 1]].numpy())


def test_compile_names_what_becomes_a_graph(tmp_path, monkeypatch):
    "The word reaches the configuration; without the option nobody decides for the machine."
    from edm_nb import commands
    seen = []
    monkeypatch.setattr(commands, "train", lambda preset, out, given, *more: seen.append(given["compile"]) or {})
    for more in ([], *(["--compile", word] for word in ("none", "fused", "blocks", "whole"))):
        assert edm_nb("train", "toy", *more, "--out", tmp_path / "run").exit_code == 0
    assert seen == [None, "none", "fused", "blocks", "whole"]
    assert edm_nb("train", "toy", "--out", tmp_path / "run", "--compile").exit_code == 2      # a flag no longer


@pytest.mark.parametrize("settings, words", [
    (["sigma_args.P_mean=x"], "sigma_args.P_mean is 'x'; expected a number"), (["sigma_args.P_std=null"], "sigma_args.P_std is None; expected a number"),
    (["augment=0.1", "augment_args.scale=x"], "augment_args.scale is 'x'; expected a number"), (["augment=0.1", "augment_args.aniso=[1]"], "augment_args.aniso is [1]; expected a number"),
    (["precond.sigma_data=x"], "sigma_data is x; expected a positive number"), (["precond.sigma_min=x"], "expected a number"), (["sampling.sigma_min=x"], "sampling: sigma_min is 'x'")])
def test_values_of_the_other_tables_are_refused_in_our_words(tmp_path, settings, words):
    done = edm_nb("train", "toy", "--device", "cpu", *(part for setting in settings for part in ("--set", setting)), "--out", tmp_path / "run")
    assert done.exit_code == 2 and words in done.output and not re.search("not supported|unsupported operand|concatenate", done.output), done.output
    assert not (tmp_path / "run").exists()


def test_guidance_without_dropped_labels_is_warned_about(tmp_path):
    for name, more in dict(never=[], sometimes=["--set", "label_dropout=0.1"]).items():
        assert edm_nb("train", "toy", "--images", 64, *more, "--device", "cpu", "--out", tmp_path / name).exit_code == 0
        done = edm_nb("sample", tmp_path / name, "--seeds", 0, "--steps", 2, "--guidance", 1, "--device", "cpu", "--out", tmp_path / f"{name}.npz")
        assert done.exit_code == 0 and ("edm-nb: warning: this model was trained with label_dropout 0" in done.output) == (name == "never"), done.output
    plain = edm_nb("sample", tmp_path / "never", "--seeds", 0, "--steps", 2, "--device", "cpu", "--out", tmp_path / "plain.npz")
    assert "warning" not in plain.output


def test_classes_that_training_never_saw_are_warned_about(tmp_path):
    "Labels 0 and 2: the network has three classes, and whatever it draws for 1 is none of them (`hunt.md`, 27)."
    data = digits().take(slice(0, 80))
    write_zip(tmp_path / "gap.zip", dataclasses.replace(data, labels=2 * (torch.arange(80) % 2), class_names=()))
    def train(name, *more): return edm_nb("train", "toy", "--images", 64, "--data", tmp_path / f"{name}.zip", *more, "--device", "cpu", "--out", tmp_path / f"{name}{len(more)}")
    write_zip(tmp_path / "full.zip", dataclasses.replace(data, labels=torch.arange(80) % 3, class_names=()))
    for done in (train("gap"), train("gap", "--no-conditional"), train("full")): assert done.exit_code == 0, done.output
    words = "training had no images of class 1"
    for run, more, warned in (("gap0", ["--classes", "1"], True), ("gap0", ["--classes", "0,1"], True), ("gap0", [], True), ("gap0", ["--classes", "0,2"], False),
                              ("gap1", [], False), ("full0", ["--classes", "1"], False)):
        done = edm_nb("sample", tmp_path / run, "--seeds", 0, "--steps", 1, *more, "--device", "cpu", "--out", tmp_path / "x.npz", "--overwrite")
        assert done.exit_code == 0 and (words in done.output) == warned, (run, more, done.output)
    beyond = edm_nb("sample", tmp_path / "gap0", "--seeds", 0, "--classes", 3, "--device", "cpu", "--out", tmp_path / "y.npz")
    assert beyond.exit_code == 2 and "there is no class 3; the model knows 0 to 2" in beyond.output
    assert edm_nb("train", "toy", "--images", 128, "--data", tmp_path / "gap.zip", "--device", "cpu", "--out", tmp_path / "gap0").exit_code == 0   # it resumes


@pytest.mark.parametrize("change, words", [
    ("dropout=much", "network.dropout = 'much' must be a probability"), ("dropout=null", "network.dropout = None"), ("label_dropout=2", "network.label_dropout = 2"),
    ("channel_mult=7", "network.channel_mult = 7 must be a list of whole numbers"), ("channel_mult=[]", "network.channel_mult = []"), ("channel_mult=[1, x]", "network.channel_mult"),
    ("attn_resolutions=16", "network.attn_resolutions = 16 must be a list of heights"), ("resolution=x", "network.resolution = 'x' must be a whole number"),
    ("model_channels=x", "network.model_channels = 'x' must be a whole number"), ("model_channels=9", "must be even"), ("num_blocks=1.5", "network.num_blocks = 1.5"), ("channels=true", "network.channels = True"),
    ("label_dim=x", "network.label_dim = 'x'"), ("augment_dim=-1", "network.augment_dim = -1"), ("out_channels=0", "network.out_channels = 0"),
    ("attn_resolutions=[5]", "has no level of 5 pixels; its levels are 8, 4 high")])
def test_values_of_the_network_are_refused_in_our_words(tmp_path, change, words):
    "Every key of the network, with a type or a size that it cannot have: what is wrong, what would be right, and no run folder."
    done = edm_nb("train", "toy", "--device", "cpu", "--set", f"network.{change}", "--out", tmp_path / "run")
    assert done.exit_code == 2 and words in done.output and "not supported" not in done.output, done.output
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_a_training_with_its_state_and_143(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "edm_nb.cli", "train", "toy", "--images", "10000000", "--set", "save_every=0", "--device", "cpu",
                                "--out", str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").read_text(), process)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    finally: process.kill()
    assert process.returncode == 143
    assert checkpoints.load_state(tmp_path / "run/state")[1]["images"] >= 512


def test_sigterm_outside_an_update_unwinds_too():
    with pytest.raises(SystemExit) as ended, terminal.polite_sigterm():
        signal.raise_signal(signal.SIGTERM)      # unlike os.kill, it returns when Python has seen the signal
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_rectangles_by_command(tmp_path):
    wide = torch.cat([digits().images, digits().images], 3)[:80]
    write_zip(tmp_path / "wide.zip", dataclasses.replace(digits().take(slice(0, 80)), images=wide))
    assert edm_nb("train", "toy", "--images", 64, "--data", tmp_path / "wide.zip", "--device", "cpu", "--out", tmp_path / "run").exit_code == 0
    done = edm_nb("sample", tmp_path / "run", "--seeds", "0-3", "--steps", 2, "--device", "cpu", "--out", tmp_path / "x.npz")
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "x.npz") as file: assert file["images"].shape == (4, 1, 8, 16)


def test_distances_of_float_pictures_are_measured_with_a_warning():
    for channels in (1, 3):
        with pytest.warns(UserWarning, match="become bytes"): measuring.check_bytes(dict(data=dict(dtype="float32", shape=[channels, 8, 8])), "run")
    with pytest.raises(ValueError, match="float data of 4 channels"): measuring.check_bytes(dict(data=dict(dtype="float32", shape=[4, 8, 8])), "run")
    measuring.check_bytes({}, "run")
