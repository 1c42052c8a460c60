"""Wheel and source archive as somebody receives them: built, looked into, and used where the repository is not."""
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("build"), reason="the package `build` is not installed")

USE = """
import edm_nb, sys
assert edm_nb.__file__.startswith(sys.argv[1]), edm_nb.__file__
from edm_nb.features import cifar_features
assert cifar_features().name == "cifar-features"
import edm_nb.cli
"""


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The two files; the wheel is made from the unpacked source archive, never from the repository."
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_the_source_archive_can_test_itself(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"}
    wanted |= {str(path.relative_to(ROOT)) for folder, ending in (("nbs", "ipynb"), ("tests", "py"), ("edm_nb", "py"), ("book", "py"))
               for path in (ROOT / folder).glob(f"*.{ending}")}
    assert wanted - names == set()
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "_build", "runs", "results"))]


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "edm_nb").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == ours and "edm_nb/py.typed" in names
    assert built[0].stat().st_size < 6e6
    assert {"Documentation", "Source", "Issues", "Changelog", "Paper"} <= set(re.findall(r"^Project-URL: (\w+)", metadata, re.M))
    assert "Classifier: Typing :: Typed" in metadata and "License: Apache-2.0" in metadata or "License-Expression: Apache-2.0" in metadata
    text = metadata.split("\n\n", 1)[1]
    assert not re.findall(r"\]\((?!http|#)[^)]*\)", text), "links of the README that lead nowhere on a package index"


def test_the_description_can_be_rendered(built):
    if not importlib.util.find_spec("twine"):
        pytest.skip("twine is not installed")
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_unpacked_wheel_works_far_from_the_repository(built, tmp_path):
    "Its own files only; the libraries come from this environment."
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    run(sys.executable, "-c", USE, tmp_path / "site", cwd=tmp_path, env=environment)


@pytest.mark.slow      # an installation of PyTorch: minutes and gigabytes
def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"OMP_NUM_THREADS": "1"}
    run(binaries / "python", "-m", "pip", "install", "-q", built[0], env=environment)
    run(binaries / "python", "-m", "pip", "check", env=environment)
    call = dict(cwd=tmp_path, env=environment)
    version = run(binaries / "edm-nb", "--version", **call)
    assert version.split()[0] == "edm-nb"
    run(binaries / "edm-nb", "train", "toy", "--images", "512", "--device", "cpu", "--out", "run", **call)
    run(binaries / "edm-nb", "sample", "run", "--seeds", "0-9", "--steps", "4", "--out", "grid.png", **call)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    run(binaries / "edm-nb", "fid", "run", "--ref", "digits", "--n", "100", "--steps", "2", "--out", "d.json", **call)
    assert json.loads((tmp_path / "d.json").read_text())
    size = sum(path.stat().st_size for path in (tmp_path / "env").rglob("*") if path.is_file() and not path.is_symlink())
    print(f"\n{size / 1e9:.1f} GB installed")
