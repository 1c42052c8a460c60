"""Build the HTML book from executed notebooks.

    python book/build.py            # _build/executed/*.ipynb -> _build/html/index.html

Pages are made from the copies that `book/execute.py` ran, and from nothing else: a copy whose sources differ from the
notebook in nbs/ stops the build.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from execute import NBS, ROOT, source_hash

EXECUTED, SOURCES, HTML = (ROOT / "_build" / name for name in ("executed", "site", "html"))
HIDE, EXPORT = re.compile(r"#\|\s*(hide|default_exp)\b"), re.compile(r"#\|\s*export\b.*\n?")


def checked_copies():
    "The executed copies, each proven to be of the notebook as it stands now."
    report = EXECUTED / "report.json"
    if not report.exists():
        sys.exit(f"build.py: no {report}; run book/execute.py first")
    ran = {record["notebook"]: record for record in json.loads(report.read_text())}
    for path in sorted(NBS.glob("*.ipynb")):
        record = ran.get(path.name)
        if record is None or record["error"] or record["source"] != source_hash(nbformat.read(path, as_version=4)):
            sys.exit(f"build.py: {path.name} has changed or failed since it was executed; run book/execute.py again")
        yield EXECUTED / path.name


def as_page(notebook):
    "The notebook as a reader sees it: directives gone, hidden cells gone, exported cells tagged."
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if HIDE.match(cell.source.lstrip()) or not cell.source.strip():
                continue
            if EXPORT.match(cell.source.lstrip()):
                cell.source = EXPORT.sub("", cell.source.lstrip(), count=1)
                cell.metadata["tags"] = ["exported"]
        cells.append(cell)
    notebook.cells = cells
    return notebook


def contents(names):
    "The table of contents that Sphinx needs, appended to the index page."
    def toctree(caption, pages):
        return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"
    pages = [Path(name).stem for name in names if name != "index.ipynb"]
    chapters, workshop = [p for p in pages if p < "10"], [p for p in pages if p >= "10"]
    return nbformat.v4.new_markdown_cell(toctree("The story", chapters) + "\n\n" + toctree("The workshop", workshop))


def main():
    "Lay out the sources and run Sphinx; warnings are errors."
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.rmtree(HTML, ignore_errors=True)
    SOURCES.mkdir(parents=True)
    paths = list(checked_copies())
    for path in paths:
        notebook = as_page(nbformat.read(path, as_version=4))
        if path.name == "index.ipynb":
            notebook.cells.append(contents([p.name for p in paths]))
        nbformat.write(notebook, SOURCES / path.name)
    if (ROOT / "results").is_dir():     # pictures that pages refer to as ../results/...
        shutil.copytree(ROOT / "results", SOURCES.parent / "results", dirs_exist_ok=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html",
               "-c", str(ROOT / "book"), "-d", str(ROOT / "_build/doctrees"), str(SOURCES), str(HTML)]
    code = subprocess.call(command, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    if code:
        sys.exit(f"build.py: Sphinx failed with exit code {code}")
    print(f"The book: {HTML / 'index.html'}")


if __name__ == "__main__":
    main()
