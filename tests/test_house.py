"""Rules of the house: who is where, how wide, how long, and how far a reader walks without seeing something."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STORY = [path for path in NOTEBOOKS if re.match(r"0\d_", path.name)]
WIDTH, LONGEST_RUN = 88, 5


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def is_exported(cell):
    return cell["cell_type"] == "code" and re.match(r"\s*#\|\s*export", source(cell)) is not None


def shows(cell):
    "Does the reader see something here that teaches: a figure, a table, a number, a drawn formula in a table?"
    if cell["cell_type"] == "markdown": return "|---" in source(cell)
    return any(output.get("text") or output.get("data") for output in cell.get("outputs", []))


def longest_run(cells):
    "How many cells in a row show nothing; cells of prose between two code cells belong to the run."
    run = best = 0
    for cell in cells:
        run = 0 if shows(cell) else run + 1
        best = max(best, run)
    return best


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_code_is_at_most_88_columns_wide(path):
    wide = [f"{cell['id']}: {line.strip()[:60]}" for cell in cells_of(path) if is_exported(cell)
            for line in source(cell).splitlines() if len(line) > WIDTH]
    assert not wide, wide[:10]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_docstrings_say_what_first_and_name_errors_on_a_line_of_their_own(path):
    "Inside a docstring of one line there is no room for errors; of several lines, the first is a sentence."
    crowded = []
    for cell in cells_of(path):
        if not is_exported(cell): continue
        for node in ast.walk(ast.parse(source(cell))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            text = ast.get_docstring(node)
            if text is None: continue
            first = text.splitlines()[0]
            if re.match(r"\s*(Raises? )?\w+Error\b", first): crowded.append(f"{node.name}: {first[:60]}")
    assert not crowded, crowded[:10]


@pytest.mark.parametrize("path", STORY, ids=lambda p: p.stem)
def test_the_story_is_short_and_shows_something(path):
    cells = cells_of(path)
    code = [cell for cell in cells if cell["cell_type"] == "code" and source(cell).strip()]
    lines = sum(len([x for x in source(c).splitlines() if x.strip() and not x.strip().startswith("#")]) for c in code if is_exported(c))
    run = longest_run(cells)
    print(f"{path.stem}: {len(code)} code cells, {lines} exported lines, longest run without something to see {run}")
    assert lines <= 500
    assert run <= LONGEST_RUN, f"{run} cells in a row show nothing"


@pytest.mark.parametrize("path", STORY, ids=lambda p: p.stem)
def test_every_chapter_has_the_same_skeleton(path):
    text = "\n".join(source(cell) for cell in cells_of(path) if cell["cell_type"] == "markdown")
    headings = re.findall(r"^## (.+)$", text, re.M)
    wanted = ["Verdicts", "Recommendation", "Exercises", "Further reading"]
    if int(path.stem[:2]) > 4: wanted.remove("Verdicts")     # chapters beyond the paper test no claims of it
    assert [h for h in headings if h in wanted] == wanted, headings[-6:]
    solutions = [cell for cell in cells_of(path) if "solution" in cell["metadata"].get("tags", [])]
    assert len(solutions) >= 5, "five exercises with solutions that run"


def test_nothing_stands_twice():
    "Functions and classes of one name and one body in two rooms are one too many."
    seen = {}
    for path in sorted((ROOT / "edm_nb").glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                body = ast.dump(ast.Module(node.body, []), annotate_fields=False)
                if len(body) > 300: seen.setdefault(body, []).append(f"{path.stem}.{node.name}")
    assert not [names for names in seen.values() if len(names) > 1]


def test_no_room_is_crowded():
    lengths = {path.stem: sum(bool(x.strip()) and not x.strip().startswith("#") for x in path.read_text(encoding="utf-8").splitlines())
               for path in (ROOT / "edm_nb").glob("[!_]*.py")}
    assert max(lengths.values()) <= 520, {name: n for name, n in lengths.items() if n > 520}


def test_imports_go_one_way():
    "No two rooms need each other, however many steps lie between them."
    needs = {}
    for path in (ROOT / "edm_nb").glob("[!_]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1]
        needs[path.stem] = {node.module for node in top if node.module} | {a.name for node in top if not node.module for a in node.names}
    def visit(room, way):
        assert room not in way, " -> ".join([*way, room])
        for other in needs.get(room, ()): visit(other, [*way, room])
    for room in needs: visit(room, [])


def test_longest_run_sees_what_it_should():
    blank, seen = dict(cell_type="code", source=["a = 1"], outputs=[], metadata={}), dict(cell_type="code", source=["a"], outputs=[dict(data={"text/plain": "1"})], metadata={})
    assert longest_run([blank]*4 + [seen] + [blank]*6) == 6 and longest_run([seen]) == 0
