"""Execute the notebooks in real Jupyter kernels.

    python book/execute.py                          # all of nbs/ into _build/executed/, with a report
    python book/execute.py --in-place nbs/00_framework.ipynb    # refresh the committed outputs of one notebook
    python book/execute.py --changed                # only what differs from the last commit
    python book/execute.py --fresh                  # even what need not be executed again

A failing cell stops its notebook, is shown with its traceback, and makes the command fail. `report.json` says how long
each notebook took and how many of its code cells ran, so that a cell which was silently skipped is seen.

A notebook is not executed again while its executed copy is still true: same cells, and the same of everything else that an
execution may read (book/fresh.py). So `make test` after `make book` costs no second execution.

Chapters leave verdicts for the pages that are executed last. Each chapter writes into a folder of its own; what it has
written is kept in the report and is put where those pages look, whether the chapter is executed or not.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from fresh import ROOT, differs_from_commit, is_true_still, source_hash, surroundings
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

NBS = ROOT / "nbs"
TAGS = {"hide-input", "solution"}   # the only cell metadata that a notebook keeps: folded code, folded solutions
LAST = ("claims.ipynb", "cheatsheet.ipynb", "index.ipynb")   # pages that read what the chapters leave behind
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


SLOWEST = 10     # cells that are named at the end


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


def execute(path, out, in_place, cell_timeout, environment):
    "Run one notebook in a fresh kernel; returns its line of the report, with `error` where a cell failed."
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    record = dict(notebook=path.name, source=source_hash(notebook), code_cells=len(code), error=None)
    client = NotebookClient(notebook, timeout=cell_timeout, kernel_name="python3", record_timing=True, startup_timeout=600,
                            extra_arguments=["--IPKernelApp.log_level=40"],
                            resources={"metadata": {"path": str(NBS)}})
    started = time.perf_counter()
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        record["error"] = f"{type(error).__name__}: {error}"
    record["seconds"] = round(time.perf_counter() - started, 1)
    record["executed"] = sum(cell.execution_count is not None for cell in code)
    record["slowest"] = slowest_cells(code)
    if not record["error"]:
        text = nbformat.writes(clean(notebook)) + "\n"
        record["copy"] = hashlib.sha256(text.encode()).hexdigest()
        for target in [out / path.name] + [path] * in_place:
            write_atomically(target, text)
    return record


def execute_chapter(path, out, in_place, cell_timeout):
    "`execute`, with the verdicts that the chapter has left in `claims`: name of the file -> text."
    with tempfile.TemporaryDirectory() as folder:
        record = execute(path, out, in_place, cell_timeout, {**os.environ, "EDM_NB_CLAIMS": folder})
        record["claims"] = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.json"))}
    return record


def hand_over(record, before, claims):
    "Put a chapter's verdicts into the folder of all; those that it no longer gives go."
    if record["error"]:
        return
    for name in set((before or {}).get("claims", {})) - set(record["claims"]):
        (claims / name).unlink(missing_ok=True)
    for name, text in record["claims"].items():
        write_atomically(claims / name, text)


def left_behind(claims, notebooks):
    "A hash of what the last pages read: all verdicts, all executed chapters, how long they took."
    files = sorted((ROOT / "results").glob("running_times.json")) + sorted(claims.glob("*.json")) + sorted(path for path in notebooks.glob("*.ipynb") if path.name not in LAST)
    return hashlib.sha256(json.dumps([(file.name, file.read_text(encoding="utf-8")) for file in files]).encode()).hexdigest()


def slowest_cells(code):
    "Seconds and first line of the cells that took longest, the slowest first."
    def seconds(cell):
        times = cell.metadata.get("execution", {})
        if "iopub.execute_input" not in times or "shell.execute_reply" not in times:
            return 0.0
        start, end = (nbtime(times[key]) for key in ("iopub.execute_input", "shell.execute_reply"))
        return (end - start).total_seconds()

    def first_line(cell):
        lines = [line.strip() for line in cell.source.splitlines()]
        return next((line for line in lines if line and not line.startswith("#|")), lines[0])[:60]
    return sorted(([round(seconds(cell), 1), first_line(cell)] for cell in code), reverse=True)[:SLOWEST]


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
    parser.add_argument("--changed", action="store_true", help="only notebooks whose cells differ from the last commit")
    parser.add_argument("--fresh", action="store_true", help="execute even where the earlier copy is still true")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="notebooks at a time")
    parser.add_argument("--cell-timeout", type=int, default=1800, help="seconds one cell may take; there to end what hangs")
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
    report = args.out / "report.json"
    known = {r["notebook"]: r for r in json.loads(report.read_text())} if report.exists() else {}
    if args.changed:
        paths = [path for path in paths if differs_from_commit(path)]
    claims = ROOT / "results/claims" if args.in_place else args.out.resolve().parent / "claims"
    notebooks = NBS if args.in_place else args.out.resolve()
    os.environ["EDM_NB_CLAIMS"], os.environ["EDM_NB_NOTEBOOKS"] = str(claims), str(notebooks)
    here = {path.name for path in NBS.glob("*.ipynb")}
    if not args.in_place and args.out.resolve() == ROOT / "_build/executed":      # of notebooks that are gone
        for path in args.out.glob("*.ipynb"):
            if path.name not in here:
                path.unlink()
        shutil.rmtree(claims, ignore_errors=True)       # handed over anew below
        for name in known:
            if name in here and not known[name]["error"]:
                hand_over(known[name], None, claims)
    around = surroundings()

    def run(path):
        notebook = nbformat.read(path, as_version=4)
        cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
        before, last = known.get(path.name), path.name in LAST
        depends = around + left_behind(claims, notebooks) if last else around
        again = args.fresh or args.in_place or before is None or \
            not is_true_still(before, source_hash(notebook), cells, depends, args.out / path.name)
        record = before
        if again and last:
            record = execute(path, args.out, args.in_place, args.cell_timeout, dict(os.environ)) | {"claims": {}}
        elif again:
            record = execute_chapter(path, args.out, args.in_place, args.cell_timeout)
        hand_over(record, before, claims)
        state = "FAILED" if record["error"] else "ok" if again else "unchanged since it was executed"
        seconds, line = (record["slowest"] or [[0.0, ""]])[0]
        print(f"{record['notebook']:28s} {record['seconds']:7.1f} s  {record['executed']:3d}/{record['code_cells']:d} cells"
              f"  {state}   (slowest {seconds:.1f} s: {line})", flush=True)
        return record | {"depends": depends}, again

    # Longest first, as far as the last report knows, so that the two kernels finish together.
    paths.sort(key=lambda path: (-known.get(path.name, {"seconds": 30.0})["seconds"], path.name))
    started = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(run, [path for path in paths if path.name not in LAST]))
        results += [run(path) for path in sorted(paths, key=lambda p: p.name) if path.name in LAST]
    results.sort(key=lambda pair: pair[0]["notebook"])
    records = [record for record, _ in results]
    if surroundings() != around:       # somebody worked meanwhile: nobody knows which version these executions saw
        for record, again in results:
            record["depends"] = None if again else record["depends"]
    kept = {name: record for name, record in known.items() if name in here} | {record["notebook"]: record for record in records}
    write_atomically(report, json.dumps([kept[name] for name in sorted(kept)], indent=1))
    if args.in_place:      # the index says how long a chapter runs
        times = ROOT / "results/running_times.json"
        known_times = json.loads(times.read_text()) if times.exists() else {}
        known_times |= {record["notebook"]: record["seconds"] for record, again in results if again and not record["error"]}
        write_atomically(times, json.dumps(known_times, indent=1, sort_keys=True) + "\n")
    print(f"{len(records)} notebooks, {sum(again for _, again in results)} executed: "
          f"{sum(r['seconds'] for r, again in results if again):.0f} s of kernels, {time.perf_counter() - started:.0f} s in all", flush=True)
    cells = sorted(((seconds, r["notebook"], line) for r in records for seconds, line in r["slowest"]), reverse=True)[:SLOWEST]
    if cells:
        print(f"The {len(cells)} slowest cells:", *(f"{s:7.1f} s  {name:24s} {line}" for s, name, line in cells), sep="\n", flush=True)
    failed = [r for r in records if r["error"]]
    for record in failed:
        print(f"\n{'=' * 78}\nFAILED: {record['notebook']}\n{record['error']}", file=sys.stderr)
    short = [r for r in records if not r["error"] and r["executed"] != r["code_cells"]]
    for record in short:
        print(f"SKIPPED CELLS: {record['notebook']} ran {record['executed']} of {record['code_cells']}", file=sys.stderr)
    sys.exit(1 if failed or short else 0)


if __name__ == "__main__":
    main()
