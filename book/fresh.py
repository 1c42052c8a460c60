"Whether an earlier execution of a notebook may stand for a new one. Too much is executed again rather than too little."
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
# What notebooks may read beside their own cells. A whole folder counts, but for what the notebooks themselves leave there.
READ = ("edm_nb", "results", "studies", "benchmarks", "book/execute.py", "book/minutes.py", "settings.ini")
SKIP = ("__pycache__", "results/claims", "results/running_times.json")
NOT_READ = ("EDM_NB_EXECUTED", "EDM_NB_CLAIMS", "EDM_NB_NOTEBOOKS", "EDM_NB_CACHE")


def source_hash(notebook):
    "A hash of all cells, sources and tags: ties an executed copy to the notebook it came from."
    cells = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def file_hash(path):
    "SHA-256 of a file, a block at a time."
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def contents(top, root):
    "Name and hash of every file at or below a path."
    for path in [top] if top.is_file() else sorted(top.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and path.suffix not in (".pyc", ".tmp") and not any(f"/{skip}/" in f"/{name}/" for skip in SKIP):
            yield name, file_hash(path)


def listing(top):
    "Name, size and time of every file in a folder that may be large; the hash of a single file."
    if top.is_file():
        return [str(top), file_hash(top)]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(top.rglob("*")) if path.is_file()]


def surroundings(root=ROOT, environ=os.environ):
    "A hash of everything that an execution may depend on, except the notebook: code, results, data, settings, versions, machine."
    found = [list(contents(root / name, root)) for name in READ]
    found += [list(contents(path, root)) for path in sorted((root / "nbs").glob("*")) if path.suffix not in (".ipynb", ".tmp")]
    for key in sorted(environ):
        if key.startswith(("EDM_NB_", "OMP_", "MKL_", "CUDA_VISIBLE")) and key not in NOT_READ:
            found.append([key, environ[key]])
            if environ[key]:         # the path of a data set; beside a training set the test set is read as well
                path = Path(environ[key])
                found += [listing(path), listing(path.with_name("test".join(path.name.rsplit("train", 1))))]
    found.append(listing(Path(environ.get("EDM_NB_CACHE") or Path.home() / ".cache/edm_nb") / "cifar-10-batches-py"))
    found.append([sys.version, platform.platform(), platform.machine(), os.cpu_count()])
    found.append(sorted(f"{package.metadata['Name']} {package.version}" for package in distributions()))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def is_true_still(record, source, code_cells, depends, copy):
    "Whether the report's line for a notebook says that its executed copy is what an execution would give now."
    return (record.get("source") == source and record.get("depends") == depends and not record["error"]
            and record["executed"] == code_cells and copy.is_file() and record.get("copy") == file_hash(copy))


def differs_from_commit(path):
    "Whether the cells of a notebook are others than in the last commit; true as well where git cannot tell."
    done = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True)
    if done.returncode:
        return True
    return source_hash(nbformat.reads(done.stdout.decode(), as_version=4)) != source_hash(nbformat.read(path, as_version=4))
