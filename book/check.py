"""Check what is committed: the package equals a fresh export, and the notebooks are clean.

    python book/check.py
    python book/check.py --fix      # first clean the notebooks' metadata and export them

Without --fix nothing is changed. Every problem is a line of its own, and one problem is enough for exit code 1.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from execute import KERNEL, NBS, ROOT, TAGS, clean, write_atomically

MAX_BYTES = 2_000_000


def notebook_problems(path):
    "What is wrong with one committed notebook, a line each: metadata, counts, errors, noise, size, missing outputs."
    path, problems = Path(path), []
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"is {path.stat().st_size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB (fewer or smaller figures)")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return problems + [f"is not a notebook: {error}"]
    if notebook["metadata"] != KERNEL:
        problems.append("has notebook metadata beside the kernel name (run `make run`)")
    shows = 0
    for number, cell in enumerate(notebook["cells"]):
        if set(cell["metadata"]) - {"tags"} or set(cell["metadata"].get("tags", [])) - TAGS:
            problems.append(f"cell {number} has metadata {sorted(cell['metadata'])}")
        if cell["cell_type"] != "code":
            continue
        if cell["execution_count"] is not None:
            problems.append(f"cell {number} keeps an execution count")
        shows += bool(cell["outputs"])
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                problems.append(f"cell {number} was committed with an error: {output['ename']}: {output['evalue'][:80]}")
            if output.get("name") == "stderr":
                problems.append(f"cell {number} prints to stderr: {''.join(output['text'])[:80]!r}")
            if output.get("execution_count") is not None or output.get("metadata"):
                problems.append(f"cell {number} has an output with execution metadata")
    if not shows:
        problems.append("was committed without outputs (run `make run`)")
    return problems


def export_problems(root=ROOT):
    "Where `edm_nb/` differs from what the notebooks export, a line each."
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        shutil.copy(root / "settings.ini", fresh)
        shutil.copytree(root / "nbs", fresh / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        (fresh / "edm_nb").mkdir()
        for name in ("__init__.py", "__main__.py"):       # written by hand, three lines
            shutil.copy(root / "edm_nb" / name, fresh / "edm_nb")
        done = subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=fresh, capture_output=True, text=True)
        if done.returncode:
            return [f"nbdev_export failed: {done.stderr.strip()[-500:]}"]
        ours, theirs = ({p.name: p.read_text(encoding="utf-8") for p in (base / "edm_nb").glob("*.py")} for base in (root, fresh))
    hint = "edit the notebook, then `make export`"
    return [f"edm_nb/{name} differs from a fresh export ({hint})" for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)]


def fix():
    "Clean what can be cleaned without executing, and export; what needs an execution stays a problem."
    for path in sorted(NBS.glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        after = nbformat.writes(clean(nbformat.reads(before, as_version=4))) + "\n"
        if after != before:
            write_atomically(path, after)
            print(f"cleaned nbs/{path.name}")
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=ROOT, check=True)


def main():
    "Print every problem; exit 1 if there is one."
    if sys.argv[1:] not in ([], ["--fix"]):
        sys.exit(f"check.py: expected nothing or --fix, got {' '.join(sys.argv[1:])}")
    if sys.argv[1:]:
        fix()
    problems = export_problems()
    for path in sorted(NBS.glob("*.ipynb")):
        problems += [f"nbs/{path.name} {line}" for line in notebook_problems(path)]
    for line in problems:
        print(line, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{len(list(NBS.glob('*.ipynb')))} notebooks are clean, and edm_nb/ equals a fresh export")


if __name__ == "__main__":
    main()
