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
import fresh  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()]


DIAGRAMS = ("index", "00_framework", "01_ode_solvers", "02_stochastic", "03_preconditioning")


@pytest.mark.parametrize("name", DIAGRAMS)
def test_diagrams_are_drawings_in_the_colours_of_the_page(name):
    "The map, the tangent, the two slopes, the churn and the block: lines and letters, a sentence for who cannot see them, no black and no white of their own."
    import re
    found = ["".join(output["data"]["text/html"]) for cell in code_cells(ROOT / f"nbs/{name}.ipynb") for output in cell.outputs if "<svg" in "".join(output.get("data", {}).get("text/html", ""))]
    assert found, "no diagram"
    for drawing in found:
        label = re.search(r'<svg role="img" aria-label="([^"]+)"', drawing)
        assert label and len(label[1]) > 80 and "currentColor" in drawing
        assert not re.search(r"#000\b|#000000|#fff\b|#ffffff|<image|<style", drawing)
        assert len(set(re.findall(r' id="([^"]+)"', drawing))) == drawing.count(" id=")


def test_the_book_is_complete():
    names = {path.stem for path in NOTEBOOKS}
    assert {"index", "00_framework", "01_ode_solvers", "02_stochastic", "03_preconditioning", "04_training", "05_likelihood", "06_guidance", "10_data",
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


def run_executor(tmp_path, *sources, timeout="600", options=()):
    "Execute a notebook made of `sources` as `make book` would."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(notebook, tmp_path / "made_for_this_test.ipynb")
    return subprocess.run([sys.executable, ROOT / "book/execute.py", "--out", tmp_path / "out", "--cell-timeout", timeout, *options,
                           tmp_path / "made_for_this_test.ipynb"], capture_output=True, text=True)


def test_a_failing_cell_fails_the_command_and_is_shown(tmp_path):
    done = run_executor(tmp_path, "a = 1", "b = a / 0", "c = 2")
    assert done.returncode == 1
    assert "made_for_this_test.ipynb" in done.stderr and "b = a / 0" in done.stderr and "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "out/made_for_this_test.ipynb").exists()
    (record,) = json.loads((tmp_path / "out/report.json").read_text())
    assert record["executed"] < record["code_cells"] == 3


def test_a_cell_that_hangs_is_stopped(tmp_path):
    done = run_executor(tmp_path, "import time; time.sleep(3600)", timeout="2")
    assert done.returncode == 1 and "Timeout" in done.stderr


def test_one_execution_serves_until_something_changes(tmp_path):
    cell = f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); print('seen')"

    def executions(*sources, options=()):
        "How often the cell has run after this call."
        done = run_executor(tmp_path, *sources, options=options)
        assert done.returncode == 0, done.stderr
        assert "seen" in (tmp_path / "out/made_for_this_test.ipynb").read_text()
        return len((tmp_path / "ran").read_text())
    assert executions(cell) == 1
    assert executions(cell) == 1                                       # nothing has changed
    copy = tmp_path / "out/made_for_this_test.ipynb"
    copy.write_text(copy.read_text().replace("seen", "seen by somebody else"))
    assert executions(cell) == 2                                       # the copy is not what was executed
    assert executions(cell + "  # another comment") == 3
    assert executions(cell + "  # another comment", options=["--fresh"]) == 4
    (record,) = json.loads((tmp_path / "out/report.json").read_text())
    now = dict(source=record["source"], code_cells=1, depends=record["depends"], copy=copy)
    assert fresh.is_true_still(record, **now)
    for change in (dict(depends="another package"), dict(depends=None), dict(error="CellExecutionError"), dict(executed=0), dict(copy="0")):
        assert not fresh.is_true_still(record | change, **now), change


def test_a_failing_notebook_is_executed_again(tmp_path):
    for _ in range(2):
        assert "ZeroDivisionError" in run_executor(tmp_path, "1 / 0").stderr


def test_whatever_an_execution_may_read_is_in_the_hash(tmp_path):
    import time
    for name in ("edm_nb/a.py", "edm_nb/assets/w.safetensors", "results/deep/x.json", "benchmarks/b.py", "studies/s.py", "settings.ini",
                 "nbs/picture.png", "nbs/one.ipynb", "README.md", "data/train.zip", "data/test.zip", "data/other.zip", "folder/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    environ = dict(EDM_NB_CIFAR10=str(tmp_path / "data/train.zip"), EDM_NB_OTHER=str(tmp_path / "folder"), EDM_NB_CACHE=str(tmp_path / "cache"))
    around = fresh.surroundings(tmp_path, environ)
    assert around == fresh.surroundings(tmp_path, dict(environ, HOME="/elsewhere", EDM_NB_EXECUTED="_build"))
    for name in ("nbs/one.ipynb", "README.md", "data/other.zip", "results/claims/C01-exact.json", "results/running_times.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("others")                         # what executions themselves leave counts for the last pages only
    (tmp_path / "edm_nb/__pycache__").mkdir()
    (tmp_path / "edm_nb/__pycache__/a.pyc").write_text("compiled")
    assert around == fresh.surroundings(tmp_path, environ)
    seen = {around}
    for name in ("edm_nb/a.py", "edm_nb/assets/w.safetensors", "results/deep/x.json", "benchmarks/b.py", "studies/s.py", "settings.ini",
                 "nbs/picture.png", "data/train.zip", "data/test.zip", "folder/image.png", "edm_nb/new.py"):
        (tmp_path / name).write_text("other")                          # as long as before: contents count, not sizes
        if name.startswith("folder"):
            os.utime(tmp_path / name, (time.time() + 5, time.time() + 5))
        seen.add(fresh.surroundings(tmp_path, environ))
    (tmp_path / "results/deep/x.json").unlink()
    seen.add(fresh.surroundings(tmp_path, environ))
    seen.add(fresh.surroundings(tmp_path, {k: v for k, v in environ.items() if k != "EDM_NB_CIFAR10"}))
    seen.add(fresh.surroundings(tmp_path, dict(environ, OMP_NUM_THREADS="7")))
    assert len(seen) == 15


def test_a_chapters_verdicts_are_there_whether_it_is_executed_or_not(tmp_path):
    def claims(source):
        done = run_executor(tmp_path, "import os; from pathlib import Path; folder = Path(os.environ['EDM_NB_CLAIMS'])", source)
        return {path.name: path.read_text() for path in (tmp_path / "claims").glob("*")}, done.stdout
    one, two = "(folder/'C01-exact.json').write_text('holds')", "(folder/'C02-exact.json').write_text('holds')"
    assert claims(one)[0] == {"C01-exact.json": "holds"}
    (tmp_path / "claims/C01-exact.json").unlink()
    found, text = claims(one)
    assert found == {"C01-exact.json": "holds"} and "unchanged since" in text
    assert claims(two)[0] == {"C02-exact.json": "holds"}               # what it no longer says is gone
    assert claims(one + "; 1/0")[0] == {"C02-exact.json": "holds"}     # a chapter that fails says nothing


def test_the_last_pages_depend_on_what_the_chapters_leave(tmp_path):
    for name in ("claims/C01-exact.json", "out/00_a.ipynb", f"out/{execute.LAST[0]}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("first")
    def state(): return execute.left_behind(tmp_path / "claims", tmp_path / "out")
    seen = {state()}
    (tmp_path / f"out/{execute.LAST[0]}").write_text("other")          # they do not depend on themselves
    assert seen == {state()}
    for name in ("claims/C01-exact.json", "out/00_a.ipynb", "claims/C02-exact.json"):
        (tmp_path / name).write_text("other")
        seen.add(state())
    assert len(seen) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_nothing_that_is_not_in_the_hash(path):
    "Paths that begin with ../ lie in one of the places that book/fresh.py looks at."
    import re
    for cell in code_cells(path):
        for found in re.findall(r"""["']\.\./([\w./-]+)""", cell.source):
            assert any(f"{found}/".startswith(f"{place}/") for place in fresh.READ), f"{path.name} reads ../{found}"


def test_tags_belong_to_the_source():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    plain = execute.source_hash(notebook)
    notebook.cells[0].metadata["tags"] = ["hide-input"]
    assert execute.source_hash(notebook) != plain


def test_the_slowest_cells_are_named(tmp_path):
    done = run_executor(tmp_path, "#| export\n# a comment\nimport time; time.sleep(0.3)", "a = 1", "b = 2")
    lines = done.stdout[done.stdout.index("slowest cells:"):].splitlines()
    assert len(lines) == 4 and "# a comment" in lines[1] and "The 3 slowest" in done.stdout


def test_changed_means_other_cells_than_in_the_last_commit(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)

    def write(source, output=()):
        cell = nbformat.v4.new_code_cell(source, id="a", outputs=[nbformat.v4.new_output("stream", text=text) for text in output])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    path = tmp_path / "one.ipynb"
    write("a = 1")
    assert fresh.differs_from_commit(path)                           # no repository: git cannot tell
    git("init", "-q")
    git("add", "one.ipynb")
    git("commit", "-q", "-m", "x")
    assert not fresh.differs_from_commit(path)
    write("a = 1", output=["other output"])
    assert not fresh.differs_from_commit(path)
    write("a = 2")
    assert fresh.differs_from_commit(path)


def test_fixing_cleans_and_exports(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    cells = [nbformat.v4.new_code_cell("#| default_exp one"), nbformat.v4.new_code_cell("#| export\nx = 1", execution_count=3, metadata={"scrolled": True})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs/00_one.ipynb")
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text().replace("edm_nb", "fixed_nb"))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "NBS", tmp_path / "nbs")
    check.fix()
    assert check.notebook_problems(tmp_path / "nbs/00_one.ipynb") == ["was committed without outputs (run `make run`)"]
    assert "x = 1" in (tmp_path / "fixed_nb/one.py").read_text()
