"""Type hints of the public API: mypy accepts every signature of the package, and a program that uses them as the book does.

Signatures are checked as stubs, which is what a type checker of a user sees of the package; bodies are free to be what they are.
"""
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is in the dev requirements")
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from torch import Tensor
from edm_nb.checkpoints import load
from edm_nb.configs import PRESETS, TrainConfig
from edm_nb.framework import GaussianDenoiser, vp_schedule
from edm_nb.frechet import FeatureStats, frechet_distance
from edm_nb.likelihood import bits_per_dim, hutchinson, log_likelihood
from edm_nb.networks import adm, ddpmpp, ncsnpp
from edm_nb.ode_solvers import edm_sigmas, heun, rk2, sample_ode
from edm_nb.preconditioning import Preconditioned
from edm_nb.stochastic import Churn, sample
from edm_nb.training import EMA, edm_loss

sigmas: Tensor = edm_sigmas(18)
denoise = GaussianDenoiser(0.0, 0.5)
x: Tensor = sample_ode(denoise, torch.randn(4, 3), sigmas, schedule=vp_schedule(), solver=heun)
y: Tensor = sample(denoise, torch.randn(4, 3), sigmas, Churn(S_churn=10.0), solver=rk2(0.5))
net = ddpmpp(32, 3, 10)
others = [ncsnpp(32, 3, 10, 9), adm(64, 3, 1000)]
model = Preconditioned(net, sigma_data=0.5)
loss: Tensor = edm_loss(model, torch.randn(2, 3, 32, 32), torch.ones(2))
EMA(net).update(net, 0.99)
config: TrainConfig = PRESETS["digits"]
stats: FeatureStats = FeatureStats(8).update(torch.randn(9, 8))
distance: float = frechet_distance(stats.mean, stats.cov, stats.mean, stats.cov)
loaded: Preconditioned = load("model.safetensors")
nats: Tensor = log_likelihood(denoise, torch.randn(2, 3), sigmas[:-1], divergence=hutchinson(2))
bits: Tensor = bits_per_dim(nats, 3)
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stubs")
    modules = [argument for path in sorted((ROOT / "edm_nb").glob("[!_]*.py")) if path.stem not in ("cli", "commands")
               for argument in ("-m", f"edm_nb.{path.stem}")]      # commands are called by typer, from annotations of its own
    subprocess.run([sys.executable, "-c", "from mypy.stubgen import main; main()", "-q", "-o", folder, *modules], cwd=ROOT, check=True)
    (folder / "edm_nb/__init__.pyi").write_text("__version__: str\n")
    return folder


def problems(stubs, folder, program):
    "What mypy says of a program, and of the stubs beside it."
    (folder / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", "--no-error-summary",
                           "--cache-dir", str(stubs.parent / "cache"), "program.py", str(stubs / "edm_nb")],
                          cwd=folder, env={"MYPYPATH": str(stubs), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode < 2, done.stderr
    return done.stdout.splitlines()


def test_signatures_are_accepted_and_serve_a_program(stubs, tmp_path):
    assert problems(stubs, tmp_path, PROGRAM) == []


def test_a_wrong_call_is_seen(stubs, tmp_path):
    found = problems(stubs, tmp_path, PROGRAM + '\nedm_sigmas("eighteen")\nChurn(S_churn="much")\nddpmpp(resolution=32, chanels=3)\n')
    errors = [line for line in found if ": error:" in line]
    assert len(errors) == 3 and all(line.startswith("program.py") for line in errors), found


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "edm_nb/py.typed").exists() and "py.typed" in (ROOT / "setup.py").read_text()
