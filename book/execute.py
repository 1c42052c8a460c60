"""Execute the notebooks in real Jupyter kernels.

    python book/execute.py                          # all of nbs/ into _build/executed/, with a report
    python book/execute.py --in-place nbs/00_framework.ipynb    # refresh the committed outputs of one notebook

A failing cell stops its notebook, is shown with its traceback, and makes the command fail. `report.json` says how long
each notebook took and how many of its code cells ran, so that a cell which was silently skipped is seen.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
TAGS = {"hide-input", "solution"}   # the only cell metadata that a notebook keeps: folded code, folded solutions
LAST = ("claims.ipynb", "cheatsheet.ipynb", "index.ipynb")   # pages that read what the chapters leave behind
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def source_hash(notebook):
    "A hash of all cell sources: ties an executed copy to the notebook it came from."
    text = "\0".join(cell.cell_type + cell.source for cell in notebook.cells)
    return hashlib.sha256(text.encode()).hexdigest()


def clean(notebook):
    "Remove what an execution leaves behind except its outputs: counts, timings, metadata, memory addresses."
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        tags = sorted(TAGS & set(cell.metadata.get("tags", [])))
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "metadata" in output:
                output.metadata = {}
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = re.sub(r" at 0x[0-9a-fA-F]+", "", output.data["text/plain"])
    return notebook


def write_atomically(path, text):
    "Write under a temporary name in the same folder, then rename."
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def execute(path, out, in_place, cell_timeout):
    "Run one notebook in a fresh kernel; returns its line of the report, with `error` where a cell failed."
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    record = dict(notebook=path.name, source=source_hash(notebook), code_cells=len(code), error=None)
    client = NotebookClient(notebook, timeout=cell_timeout, kernel_name="python3", record_timing=True,
                            extra_arguments=["--IPKernelApp.log_level=40"],
                            resources={"metadata": {"path": str(NBS)}})
    started = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        record["error"] = f"{type(error).__name__}: {error}"
    record["seconds"] = round(time.perf_counter() - started, 1)
    record["executed"] = sum(cell.execution_count is not None for cell in code)
    record["slowest"] = slowest_cell(code)
    if not record["error"]:
        target = path if in_place else out / path.name
        write_atomically(target, nbformat.writes(clean(notebook)) + "\n")
    return record


def slowest_cell(code):
    "First line and seconds of the cell that took longest."
    def seconds(cell):
        times = cell.metadata.get("execution", {})
        if "iopub.execute_input" not in times or "shell.execute_reply" not in times:
            return 0.0
        start, end = (nbtime(times[key]) for key in ("iopub.execute_input", "shell.execute_reply"))
        return (end - start).total_seconds()
    cell = max(code, key=seconds, default=None)
    return [round(seconds(cell), 1), cell.source.splitlines()[0][:60]] if cell else [0.0, ""]


def nbtime(text):
    "The time stamps of the Jupyter protocol."
    from datetime import datetime
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    parser.add_argument("--out", type=Path, default=ROOT / "_build/executed", help="where executed copies and report.json go")
    parser.add_argument("--in-place", action="store_true", help="write outputs back into the notebooks, cleaned")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="notebooks at a time")
    parser.add_argument("--cell-timeout", type=int, default=600, help="seconds one cell may take")
    args = parser.parse_args()
    paths = [path.resolve() for path in args.notebooks] or sorted(NBS.glob("*.ipynb"))
    if not paths:
        sys.exit("execute.py: no notebooks found in nbs/")
    for path in paths:
        if not path.is_file():
            sys.exit(f"execute.py: no notebook {path}; expected a file such as nbs/00_framework.ipynb")
    # Two kernels with one thread each are faster than one kernel with two threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["EDM_NB_CLAIMS"] = str(ROOT / "results/claims" if args.in_place else args.out.resolve().parent / "claims")
    os.environ["EDM_NB_NOTEBOOKS"] = str(NBS if args.in_place else args.out.resolve())

    def run(path):
        record = execute(path, args.out, args.in_place, args.cell_timeout)
        state = "FAILED" if record["error"] else "ok"
        print(f"{record['notebook']:28s} {record['seconds']:7.1f} s  {record['executed']:3d}/{record['code_cells']:d} cells"
              f"  {state}   (slowest {record['slowest'][0]:.1f} s: {record['slowest'][1]})", flush=True)
        return record

    # Longest first, as far as the last report knows, so that the two kernels finish together.
    report = args.out / "report.json"
    known = {r["notebook"]: r["seconds"] for r in json.loads(report.read_text())} if report.exists() else {}
    paths.sort(key=lambda path: (-known.get(path.name, 30.0), path.name))
    started = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        records = list(pool.map(run, [path for path in paths if path.name not in LAST]))
        records += [run(path) for path in sorted(paths, key=lambda p: p.name) if path.name in LAST]
    records.sort(key=lambda r: r["notebook"])
    if not args.in_place:
        write_atomically(report, json.dumps(records, indent=1))
    print(f"{len(records)} notebooks, {sum(r['seconds'] for r in records):.0f} s of kernels, "
          f"{time.perf_counter() - started:.0f} s in all", flush=True)
    failed = [r for r in records if r["error"]]
    for record in failed:
        print(f"\n{'=' * 78}\nFAILED: {record['notebook']}\n{record['error']}", file=sys.stderr)
    short = [r for r in records if not r["error"] and r["executed"] != r["code_cells"]]
    for record in short:
        print(f"SKIPPED CELLS: {record['notebook']} ran {record['executed']} of {record['code_cells']}", file=sys.stderr)
    sys.exit(1 if failed or short else 0)


if __name__ == "__main__":
    main()
