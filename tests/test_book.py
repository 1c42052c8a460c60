"""The book itself: every notebook was executed in full, and the checks that guard the committed state can fail."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))
import check  # noqa: E402
import execute  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()]


def test_the_book_is_complete():
    names = {path.stem for path in NOTEBOOKS}
    assert {"index", "00_framework", "01_ode_solvers", "02_stochastic", "03_preconditioning", "04_training", "10_data",
            "11_networks", "12_augmentation", "13_metrics", "14_checkpoints", "15_cli"} <= names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_was_executed(path):
    folder = os.environ.get("EDM_NB_EXECUTED")
    if not folder:
        pytest.skip("`make test` executes the notebooks first and then sets EDM_NB_EXECUTED")
    report = {r["notebook"]: r for r in json.loads((ROOT / folder / "report.json").read_text())}
    record = report[path.name]
    assert record["error"] is None
    assert record["source"] == execute.source_hash(nbformat.read(path, as_version=4)), "executed copy of another version"
    assert record["executed"] == len(code_cells(path)) > 0
    assert (ROOT / folder / path.name).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapters_say_why(path):
    "At least two words of prose a line of code in the story, and five figures a chapter."
    if not path.stem[:2] < "10":
        pytest.skip("a rule for chapters 00-04")
    import re
    cells = nbformat.read(path, as_version=4).cells
    words = sum(len(re.findall(r"[A-Za-z]{2,}", c.source)) for c in cells if c.cell_type == "markdown")
    lines = sum(len([x for x in c.source.splitlines() if x.strip() and not x.strip().startswith("#")])
                for c in cells if c.cell_type == "code")
    figures = sum("image/png" in o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs)
    assert words >= 2 * lines
    assert figures >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_clean(path):
    assert check.notebook_problems(path) == []


def broken(**changes):
    "A small clean notebook with one thing wrong."
    cell = dict(cell_type="code", execution_count=None, id="a", metadata={}, source=["1"],
                outputs=[dict(output_type="execute_result", data={"text/plain": ["1"]}, execution_count=None, metadata={})])
    cell.update(changes)
    return dict(cells=[cell], metadata=execute.KERNEL, nbformat=4, nbformat_minor=5)


@pytest.mark.parametrize("changes, word", [
    (dict(execution_count=3), "execution count"),
    (dict(metadata={"scrolled": True}), "metadata"),
    (dict(outputs=[dict(output_type="error", ename="ValueError", evalue="x", traceback=[])]), "ValueError"),
    (dict(outputs=[dict(output_type="stream", name="stderr", text=["warning"])]), "stderr"),
    (dict(outputs=[]), "without outputs"),
    (dict(source=["x" * 2_100_000]), "MB"),
])
def test_the_check_sees_a_notebook_that_is_not_clean(tmp_path, changes, word):
    path = tmp_path / "nb.ipynb"
    path.write_text(json.dumps(broken()))
    assert check.notebook_problems(path) == []
    path.write_text(json.dumps(broken(**changes)))
    assert any(word in line for line in check.notebook_problems(path))


def test_a_hand_edited_module_is_seen(tmp_path):
    import shutil
    for name in ("nbs", "edm_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    assert check.export_problems(tmp_path) == []
    module = tmp_path / "edm_nb/figures.py"
    module.write_text(module.read_text() + "\nx = 1\n")
    (line,) = check.export_problems(tmp_path)
    assert "figures.py" in line and "make export" in line


def run_executor(tmp_path, *sources, timeout="60"):
    "Execute a notebook made of `sources` as `make book` would."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(notebook, tmp_path / "made_for_this_test.ipynb")
    return subprocess.run([sys.executable, ROOT / "book/execute.py", "--out", tmp_path / "out", "--cell-timeout", timeout,
                           tmp_path / "made_for_this_test.ipynb"], capture_output=True, text=True)


def test_a_failing_cell_fails_the_command_and_is_shown(tmp_path):
    done = run_executor(tmp_path, "a = 1", "b = a / 0", "c = 2")
    assert done.returncode == 1
    assert "made_for_this_test.ipynb" in done.stderr and "b = a / 0" in done.stderr and "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "out/made_for_this_test.ipynb").exists()
    (record,) = json.loads((tmp_path / "out/report.json").read_text())
    assert record["executed"] < record["code_cells"] == 3


def test_a_cell_that_hangs_is_stopped(tmp_path):
    done = run_executor(tmp_path, "import time; time.sleep(60)", timeout="2")
    assert done.returncode == 1 and "Timeout" in done.stderr
