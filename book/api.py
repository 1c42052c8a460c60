"""The API reference and the register of equations, written as MyST pages from the package itself.

Signatures, comments per argument and docstrings are read from the source text of `edm_nb/`, so nothing is imported.
`build.py` calls this; every public name becomes a Sphinx object, which fills `objects.inv` and lets prose link to it.
"""
import ast
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EQUATION = re.compile(r"\bEq\.\s*(\d+)")


class Entry(NamedTuple):
    "One public name."
    module: str
    name: str            # dotted inside the module: "EMA" or "EMA.update"
    kind: str            # "function", "class", "method" or "data"
    signature: str       # text between the parentheses
    doc: str
    arguments: tuple     # pairs (argument, comment)
    returns: str         # comment of the return line
    line: int


def comments(source):
    "Comment of each line of a source text that has one."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ").strip()
    return found


def shown(node):
    "Source form of an annotation or default, on one line."
    return " ".join(ast.unparse(node).split())


def signature(node, drop_self):
    "The parameters as one line, and their documented comments' lines."
    a, parts, rows = node.args, [], []
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    for arg, default in zip(positional, defaults):
        if drop_self and arg is positional[0]:
            continue
        text = arg.arg + (f": {shown(arg.annotation)}" if arg.annotation else "")
        parts.append(text + (f" = {shown(default)}" if default is not None else ""))
        rows.append((arg.arg, arg.lineno))
    if a.vararg:
        parts.append("*" + a.vararg.arg)
        rows.append(("*" + a.vararg.arg, a.vararg.lineno))
    elif a.kwonlyargs:
        parts.append("*")
    for arg, default in zip(a.kwonlyargs, a.kw_defaults):
        text = arg.arg + (f": {shown(arg.annotation)}" if arg.annotation else "")
        parts.append(text + (f" = {shown(default)}" if default is not None else ""))
        rows.append((arg.arg, arg.lineno))
    if a.kwarg:
        parts.append("**" + a.kwarg.arg)
        rows.append(("**" + a.kwarg.arg, a.kwarg.lineno))
    return ", ".join(parts), rows


def function(module, prefix, node, notes, kind):
    "Entry of a function or method."
    statics = any(shown(d) in ("staticmethod",) for d in node.decorator_list)
    text, rows = signature(node, kind == "method" and not statics)
    lines = [row[1] for row in rows]
    arguments = tuple((name, notes.get(line, "") if lines.count(line) == 1 else "") for name, line in rows)
    body = node.body[0].lineno
    after = [notes[k] for k in range(max([node.lineno, *lines], default=node.lineno), body) if k in notes and k not in lines]
    returns = after[-1] if after else ""
    if node.returns is not None:
        text += f") -> {shown(node.returns)}"
    else:
        text += ")"
    return Entry(module, prefix + node.name, kind, text, ast.get_docstring(node) or "", arguments, returns, node.lineno)


def entries(path):
    "Public names of one module in the order of the book."
    source, module = path.read_text(encoding="utf-8"), path.stem
    notes = comments(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield function(module, "", node, notes, "function")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            fields = [(n.target.id, notes.get(n.lineno, "")) for n in node.body
                      if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            if init is not None:
                made = function(module, "", init, notes, "method")
                text, arguments = made.signature.replace(" -> None", ""), made.arguments
            else:
                text, arguments = ", ".join(name for name, _ in fields) + ")", tuple(fields)
            yield Entry(module, node.name, "class", text, ast.get_docstring(node) or "", arguments, "", node.lineno)
            for n in node.body:
                if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"):
                    yield function(module, node.name + ".", n, notes, "method")
        elif isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) for t in node.targets):
            for target in node.targets:
                if not target.id.startswith("_"):
                    yield Entry(module, target.id, "data", "", "", (), notes.get(node.lineno, ""), node.lineno)


def package(root=ROOT):
    "All entries, module by module."
    return [entry for path in sorted((root / "edm_nb").glob("[!_]*.py")) for entry in entries(path)]


def unique_names(found):
    "Names that mean one thing in the whole package -> their full dotted name: those that prose may link to."
    where = {}
    for entry in found:
        if "." not in entry.name:
            where.setdefault(entry.name, []).append(f"edm_nb.{entry.module}.{entry.name}")
    return {name: places[0] for name, places in where.items() if len(places) == 1}


def anchor(module, name):
    "Id of the cell that defines a name, on its chapter's page."
    return f"def-{module}-{name.split('.')[0]}"


def described(entry, chapter):
    "MyST text of one entry."
    directive = {"function": "py:function", "class": "py:class", "method": "py:method", "data": "py:data"}[entry.kind]
    head = entry.name + ("" if entry.kind == "data" else "(" + entry.signature)
    lines = [f"````{{{directive}}} {head}", ""]
    if entry.doc:
        lines += [escaped(entry.doc), ""]
    for name, note in entry.arguments:
        if note:
            lines.append(f"- **{escaped(name)}**: {escaped(note)}")
    if entry.returns:
        lines += ["", f"{'Returns' if entry.kind != 'data' else 'Is'}: {escaped(entry.returns)}"]
    if chapter and entry.kind != "method":
        lines += ["", f'<a class="edm-source" href="{chapter}.html#{anchor(entry.module, entry.name)}">Derived in {chapter[:2]}</a>']
    return "\n".join(lines + ["````", ""])


def escaped(text):
    "Text of a docstring or comment as MyST that cannot start a construct of its own."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if k % 2 else re.sub(r"([*_\\<>\[\]$#|{}])", r"\\\1", p) for k, p in enumerate(parts))


def write_pages(folder, chapters, root=ROOT):
    "Write `api.md`, one `api-MODULE.md` each, and `equations.md`; returns the names of the pages. `chapters`: module -> page."
    found, pages = package(root), []
    modules = sorted({e.module for e in found}, key=lambda m: chapters.get(m, "zz" + m))
    rows = ["# Reference", "", "> Every public name of the package: what it does, what it takes, and the cell that derives it.", "",
            "| module | from | names |", "|---|---|---|"]
    for module in modules:
        own = [e for e in found if e.module == module and e.kind != "method"]
        listed = ", ".join(f"{{py:obj}}`{e.name} <edm_nb.{module}.{e.name}>`" for e in own)
        chapter = chapters.get(module)
        origin = f"[{chapter}]({chapter}.ipynb)" if chapter else ""
        rows.append(f"| [`edm_nb.{module}`](api-{module}.md) | {origin} | {listed} |")
        text = [f"# edm_nb.{module}", "", f"From {origin}." if origin else "", "", f"```{{py:module}} edm_nb.{module}\n```", ""]
        text += [described(e, chapter) for e in found if e.module == module]
        (folder / f"api-{module}.md").write_text("\n".join(text), encoding="utf-8")
        pages.append(f"api-{module}")
    rows += ["", "```{toctree}", ":hidden:", "", *pages, "```"]
    (folder / "api.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "equations.md").write_text(equations(found, chapters), encoding="utf-8")
    return ["api", "equations"]


def equations(found, chapters):
    "The register: which function of the package is which equation of the paper."
    by = {}
    for entry in found:
        for number in {int(n) for n in EQUATION.findall(entry.doc)}:
            by.setdefault(number, []).append(entry)
    lines = ["# Equations of the paper", "",
             "> Where each numbered equation of {cite:t}`karras2022edm` stands in the code. Made from the docstrings.", ""]
    for number in sorted(by):
        lines += [f"## Eq. {number}", ""]
        for e in by[number]:
            first = e.doc.strip().splitlines()[0]
            chapter = chapters.get(e.module, "")
            link = f" ([{chapter[:2]}]({chapter}.ipynb))" if chapter else ""
            lines.append(f"- {{py:obj}}`{e.name} <edm_nb.{e.module}.{e.name}>`{link}: {escaped(first)}")
        lines.append("")
    return "\n".join(lines)


def numbers(found):
    "Numbers of the equations that the register has."
    return {int(n) for e in found for n in EQUATION.findall(e.doc)}
