"""The package as somebody who only imports it meets it."""
import importlib.metadata
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / "edm_nb").glob("[!_]*.py"))
FORBIDDEN = ["nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyter_client", "sklearn", "scipy", "torchdiffeq",
             "tensorboard", "wandb", "torch_fidelity", "ipywidgets", "diffusers", "huggingface_hub", "azula", "k_diffusion", "onnx", "onnxscript",
             "onnxruntime", "torchmetrics"]

PROBE = """
import importlib, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {forbidden!r}: raise ImportError('refused: ' + name)
sys.meta_path.insert(0, Refuse())
for module in {modules!r}: importlib.import_module('edm_nb.' + module)
print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))
"""


def test_every_module_imports_where_no_notebook_tool_is_installed():
    code = PROBE.format(forbidden=set(FORBIDDEN), modules=MODULES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not set(FORBIDDEN) & set(json.loads(done.stdout))


def test_dependencies_point_one_way():
    "00-03 import no workshop module, and nothing imports the command line."
    import ast
    allowed = {"framework": {"checks"}, "ode_solvers": {"checks", "framework"},
               "stochastic": {"checks", "framework", "ode_solvers", "randomness"},
               "preconditioning": {"checks", "framework"}}
    for name in MODULES:
        tree = ast.parse((ROOT / f"edm_nb/{name}.py").read_text(encoding="utf-8"))
        used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}
        assert "cli" not in used, name
        assert used <= allowed.get(name, used), (name, used)


def test_settings_ini_is_the_one_configuration():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    lines = [line.strip() for line in parser["DEFAULT"]["requirements"].splitlines() if line.strip()]
    try:
        installed = importlib.metadata.distribution("edm_nb")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("edm_nb is on the path but not installed")
    plain = [Requirement(line) for line in installed.requires if "extra" not in line]
    assert sorted(map(str, plain)) == sorted(str(Requirement(line)) for line in lines)
    assert set(installed.metadata.get_all("Provides-Extra")) == {"fid", "widgets", "track", "wandb", "diffusers", "hub", "onnx", "book", "dev"}
    (script,) = [e for e in installed.entry_points if e.group == "console_scripts"]
    assert (script.name, script.value) == ("edm-nb", "edm_nb.cli:main")
    assert installed.version == parser["DEFAULT"]["version"]
