"""Rules of the house: who is where, how wide, how long, and how far a reader walks without seeing something."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STORY = [path for path in NOTEBOOKS if re.match(r"0\d_", path.name)]
WIDTH, LONGEST_RUN, CELLS = 88, 5, 60
sys.path.insert(0, str(ROOT / "book"))


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
    told = [cell for cell in code if "solution" not in cell["metadata"].get("tags", [])]
    assert len(told) <= CELLS, f"{len(told)} code cells without the solutions"
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


@pytest.mark.parametrize("path", STORY, ids=lambda p: p.stem)
def test_a_chapter_says_how_long_it_takes_as_the_index_does(path):
    "One rule for both (`book/minutes.py`)."
    from minutes import minutes_to_read
    cells = cells_of(path)
    said = re.findall(r"\*\*Time:\*\* (\d+) minutes to read", source(cells[0]))
    assert said == [str(minutes_to_read(cells))], f"the opening of {path.name} should say: **Time:** {minutes_to_read(cells)} minutes to read"


# One letter, one meaning within a chapter. For each letter that has had several: what it means in the code of a chapter, and what every line
# that binds it looks like. A letter that is not here may not be bound there; a new use is a decision, so it is written down.
LETTERS = {
    "00": {"h": ("a small difference", r"h=1e-4|h = 1e-4 \* sigma"), "u": ("levels that iDDPM knows", r"u = \[0\.\]|u = iddpm_levels\(")},
    "01": {"h": ("length of a step", r"h:float\)|h = t_next - |h, d = t_next - t|h, x0 = t_b - t_a|h = level - math\.log\(sigma_next\)"),
           "w": ("weight of a slope", r"w = 1 / \(2\*alpha\)|adams_bashforth_weights\(|zip\(weights, history\)"),
           "alpha": ("place of the second slope", r"rk2\(alpha:float|for alpha in best_alpha"), "epsilon": ("predicted noise", r"epsilon = \(x_tilde")},
    "02": {"beta": ("rate at which an SDE exchanges noise", r"beta:Callable|def (equation_6|variance_error|em_distance|naive_sde)\(|for .*\bbeta\b.* in .*(rates|family)")},
    "03": {"epsilon": ("noise of unit variance", r"epsilon, F = \(x - y\) / ")},
    "04": {"beta": ("factor of the average", r"beta:float|beta = ema_beta\("), "u": ("a uniform random number", r"u:Tensor, +# uniform|u = torch\.rand\(")},
}
# The same for Greek in formulas and prose: the forms that a chapter may write; "" is the bare letter. A form with an index or a hat is a name of its own.
GREEK = {
    "00": {"β": {"VP", "min", "d"}, "ε": {"", "hat", "s"}, "α": {"bar"}},
    "01": {"β": set(), "ε": {"", "s"}, "α": {"", "bar"}},
    "02": {"β": {"", "VP", "min", "d"}, "ε": {""}, "α": set()},
    "03": {"β": {"t"}, "ε": {"", "hat", "s", "t"}, "α": {"bar"}},
    "04": {"β": {""}, "ε": {""}, "α": set()},
}
COMMANDS = {"β": r"\\beta", "ε": r"\\(?:var)?epsilon", "α": r"\\alpha"}


def bindings(cells, letters):
    "(letter, line) wherever code gives one of these names a value."
    for cell in cells:
        if cell["cell_type"] != "code": continue
        lines = source(cell).splitlines()
        for node in ast.walk(ast.parse(source(cell))):
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
            if name in letters: yield name, lines[node.lineno - 1].strip()


def greek_forms(text, letter):
    "How a letter is written in formulas and in prose: bare, with a bar or a hat, with an index."
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    for formula in re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.S):
        formula = re.sub(r"\\(?:text|mathrm)\{(\w+)\}", r"\1", formula)
        for accent, index in re.findall(rf"(\\bar|\\hat)?\s*\{{?{COMMANDS[letter]}(?![A-Za-z])(?:_\{{?(\w+))?", formula):
            yield accent.strip("\\") or (index if letter == "β" or index in ("s", "t") else "")
    prose = re.sub(r"\$\$.+?\$\$|\$[^$]+\$", " ", text, flags=re.S)
    if letter == "α": yield from ("bar" for _ in re.findall("ᾱ", prose))
    yield from re.findall(rf"{letter}(?:_(\w+))?", prose)


@pytest.mark.parametrize("chapter", LETTERS)
def test_a_letter_means_one_thing_within_a_chapter(chapter):
    (path,) = [p for p in STORY if p.name.startswith(chapter)]
    cells, ledger = cells_of(path), LETTERS[chapter]
    found = list(bindings(cells, {"alpha", "beta", "epsilon", "w", "u", "h"}))
    strange = [(letter, line) for letter, line in found if letter not in ledger or not re.search(ledger[letter][1], line)]
    assert not strange, strange
    assert {letter for letter, _ in found} == set(ledger), "a letter of the ledger is not used"
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    for letter, forms in GREEK[chapter].items():
        other = "The letter β means another rate in [chapter 02]"            # said of another chapter
        assert set(greek_forms(text.replace(other, ""), letter)) == forms, (letter, set(greek_forms(text, letter)))
    formulas = "".join(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.S)).replace("$n$ is always a number of samples", "")
    assert not re.search(r"(?<![A-Za-z\\{_.])n(?![A-Za-z}_])", formulas.replace("$n$", "")), "formulas count steps by N and write noise as σε"


def test_the_index_says_where_a_letter_changes_its_meaning():
    "One row a letter, one column a chapter; a dash stands exactly where the ledger has nothing."
    (text,) = [source(c) for c in cells_of(ROOT / "nbs/index.ipynb") if source(c).startswith("### Letters that mean something else")]
    rows = {cells[0]: cells[1:] for cells in ([part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| "))}
    latin = {"00": {"w", "u", "h"}, "01": {"w", "h"}, "02": {"u"}, "03": {"u"}, "04": {"u"}}      # formulas or code
    assert rows.pop("letter") == list(GREEK) and set(rows) == {"β", "ε", "α", "w", "u", "h"}
    for letter, meanings in rows.items():
        used = {chapter for chapter in GREEK if (GREEK[chapter].get(letter) if letter in "βεα" else letter in latin[chapter])}
        assert {chapter for chapter, meaning in zip(GREEK, meanings) if meaning != "–"} == used, letter


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
