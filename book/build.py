"""Build the HTML book from executed notebooks.

    python book/build.py            # _build/executed/*.ipynb -> _build/html/index.html

Pages are made from the copies that `book/execute.py` ran, and from nothing else: a copy whose sources differ from the
notebook in nbs/ stops the build.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat

import api
from execute import NBS, ROOT, source_hash

EXECUTED, SOURCES, HTML = (ROOT / "_build" / name for name in ("executed", "site", "html"))
HIDE, EXPORT = re.compile(r"#\|\s*(hide|default_exp)\b"), re.compile(r"#\|\s*export\b")
ALT = re.compile(r"#\|\s*alt:\s*(.+)")
# What prose keeps as it is while names become links: fences, formulas, roles, links, raw HTML, headings.
KEPT = re.compile(r"(```.*?```|~~~.*?~~~|\$\$.*?\$\$|\$[^$\n]+\$|\{[\w:]+\}`[^`]*`|!?\[[^\]]*\]\([^)]*\)|<[^>]+>|^#+ .*?$|^\s*\([\w-]+\)=$|^\| \$.*?$)", re.S | re.M)
PAGES = {"bibliography": "# Bibliography\n\n> Everything that the book names, with a place to read it.\n\n```{bibliography}\n:all:\n```\n"}


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


class Links:
    "Turns names in prose into links: functions to the reference, claims, chapters and equations to their places."
    def __init__(self, names, pages, equations):
        self.names, self.pages, self.equations = names, pages, equations
        self.chapters = {page[:2]: page for page in pages if re.match(r"\d\d_", page)}

    def __call__(self, text):
        "The same prose with links; formulas, code, headings and what is linked already stay as they are."
        # rows of the claims page have ids of their own, which Sphinx does not know
        text = re.sub(r"\[([^\]]*)\]\(claims\.ipynb#(c\d\d)\)", r'<a href="claims.html#\2">\1</a>', text)
        parts = KEPT.split(text)
        return "".join(part if k % 2 else self.linked(part) for k, part in enumerate(parts))

    def linked(self, text):
        "One stretch of plain prose."
        def name(match):
            full = self.names.get(match[1].split("(")[0])
            return f"{{py:obj}}`{match[1]} <{full}>`" if full else match[0]
        def chapter(match):
            page = self.chapters.get(match[2])
            return f"[{match[0]}]({page}.ipynb)" if page else match[0]
        def equation(match):
            return f"[{match[0]}](equations.md#eq-{match[1]})" if int(match[1]) in self.equations else match[0]
        pieces = re.split(r"(`[^`\n]*`)", text)
        for k, piece in enumerate(pieces):
            if k % 2:
                pieces[k] = re.sub(r"^`(\w+(?:\(\))?)`$", name, piece)
                continue
            if "claims" in self.pages:
                piece = re.sub(r"\bC(0[1-9]|[12]\d|30)\b", r'<a href="claims.html#c\1">C\1</a>', piece)
            piece = re.sub(r"\b([Cc]hapter) (\d\d)\b", chapter, piece)
            pieces[k] = re.sub(r"\bEq\. (\d+)\b", equation, piece)
        return "".join(pieces)


class Chapter:
    "What one page needs beyond links: numbers for its displayed formulas, and the first use of each symbol."
    DISPLAYED = re.compile(r"^(\$\$(?:(?!\$\$).)+\$\$)[ \t]*$", re.S | re.M)
    INLINE = re.compile(r"(?<![\$\\\[])\$([^$\n]+)\$(?!\$)")

    def __init__(self, page, symbols):
        self.page, self.symbols, self.count = page, set(symbols), 0

    def __call__(self, text):
        "The prose of one cell; fences stay as they are."
        parts = re.split(r"(```.*?```|^#+ .*?$|^\|.*?$)", text, flags=re.S | re.M)
        return "".join(part if k % 2 else self.DISPLAYED.sub(self.number, self.INLINE.sub(self.symbol, part))
                       for k, part in enumerate(parts))

    def number(self, match):
        "A label; Sphinx numbers what has one."
        self.count += 1
        return f"{match[1]} (eq-{self.page}-{self.count})"

    def symbol(self, match):
        "The first use of a symbol leads to the table of symbols."
        if match[1] not in self.symbols:
            return match[0]
        self.symbols.discard(match[1])
        return f"[${match[1]}$](index.ipynb#symbols)"


def symbols_of(notebook):
    "Symbols of the table on the index page, as they are written in formulas."
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## Symbols"):
            rows = [line.split("|")[1].strip() for line in cell.source.splitlines() if line.startswith("| $")]
            return [symbol.strip() for row in rows for symbol in row.strip("$").split(",") if row.count("$") == 2]
    sys.exit("build.py: index.ipynb has no table of symbols")


def definitions(source):
    "Names that an exported cell defines."
    tree = ast.parse(source)
    made = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return made + [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def only_imports(source):
    "Is this a cell of imports? Readers of a page need it folded; readers of the notebook run it."
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Try)) for node in body)


def as_page(notebook, links, chapter=None):
    "The notebook as a reader sees it: directives gone, hidden cells gone, exported cells tagged, names linked."
    cells, module = [], None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = links(chapter(cell.source) if chapter else cell.source)
        else:
            directives = [line for line in cell.source.lstrip().splitlines() if line.startswith("#|")]
            made = re.match(r"#\|\s*default_exp\s+(\w+)", cell.source.lstrip())
            module = made[1] if made else module
            if any(HIDE.match(line) for line in directives) or not cell.source.strip():
                continue
            cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip("\n")
            tags = [{"solution": "hide-cell"}.get(tag, tag) for tag in cell.metadata.get("tags", [])]
            if "hide-cell" in tags:
                tags = [tag for tag in tags if tag != "hide-input"]
            if only_imports(cell.source) and "hide-input" not in tags:
                tags.append("hide-input")
            if any(EXPORT.match(line) for line in directives):
                tags.append("exported")
                ids = "".join(f'<a id="{api.anchor(module, name)}"></a>' for name in definitions(cell.source))
                if ids:
                    cells.append(nbformat.v4.new_markdown_cell(ids))
            alt = next((m[1] for m in map(ALT.match, directives) if m), None)
            cell.metadata = nbformat.from_dict({**({"tags": tags} if tags else {}),
                                                **({"mystnb": {"image": {"alt": alt}}} if alt else {})})
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output.data["text/markdown"] = links(output.data["text/markdown"])
        cells.append(cell)
    notebook.cells = cells
    return notebook


def title_of(path):
    "The first heading of a notebook."
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^# (.+)$", cell.source, re.M)):
            return found[1]
    sys.exit(f"build.py: {path.name} has no title (a heading of the first level)")


def contents(titles, extra):
    "The tables of contents that Sphinx needs, appended to the index page. Chapters carry their numbers."
    def toctree(caption, pages):
        rows = [f"{page[:2]} · {titles[page]} <{page}>" if re.match(r"\d\d_", page) else page for page in pages]
        return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(rows) + "\n```"
    pages = [page for page in titles if page != "index"]
    groups = {"At a glance": [*(p for p in pages if not re.match(r"\d\d_", p)), "explorer"], "The story": [p for p in pages if "00" <= p[:2] < "10"],
              "The workshop": [p for p in pages if "10" <= p[:2] < "99"], "Reference": extra}
    return nbformat.v4.new_markdown_cell("\n\n".join(toctree(caption, found) for caption, found in groups.items() if found))


def finish(folder):
    "Pictures load when they come into view."
    for path in folder.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"<img (?![^>]*loading=)", '<img loading="lazy" ', text), encoding="utf-8")


def main():
    "Lay out the sources and run Sphinx; warnings are errors."
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.rmtree(HTML, ignore_errors=True)
    SOURCES.mkdir(parents=True)
    paths = list(checked_copies())
    titles = {path.stem: title_of(path) for path in paths}
    found = api.package(ROOT)
    links = Links(api.unique_names(found), set(titles), api.numbers(found))
    symbols = symbols_of(nbformat.read(EXECUTED / "index.ipynb", as_version=4))
    chapters = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if module := re.search(r"#\| default_exp (\w+)", text):
            chapters[module[1]] = path.stem
    extra = [*api.write_pages(SOURCES, chapters), *PAGES]
    for name, text in PAGES.items():
        (SOURCES / f"{name}.md").write_text(text, encoding="utf-8")
    for path in paths:
        story = re.match(r"0\d_", path.name)
        notebook = as_page(nbformat.read(path, as_version=4), links, Chapter(path.stem[:2], symbols) if story else None)
        if path.name == "index.ipynb":
            notebook.cells.append(contents(titles, extra))
        nbformat.write(notebook, SOURCES / path.name)
    shutil.copy(ROOT / "book/explorer.md", SOURCES)
    if (ROOT / "results").is_dir():     # pictures that pages refer to as ../results/...
        shutil.copytree(ROOT / "results", SOURCES.parent / "results", dirs_exist_ok=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html",
               "-c", str(ROOT / "book"), "-d", str(ROOT / "_build/doctrees"), str(SOURCES), str(HTML)]
    code = subprocess.call(command, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    if code:
        sys.exit(f"build.py: Sphinx failed with exit code {code}")
    finish(HTML)
    print(f"The book: {HTML / 'index.html'}")


if __name__ == "__main__":
    main()
