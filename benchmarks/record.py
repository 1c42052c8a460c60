"""What every benchmark notes beside its numbers, and how it times: shared by the scripts of this folder.

    from record import RESULTS, hardware, now, spread, timed, versions, write_json

Python puts the folder of the script that it runs first on its path, so this import works from any directory. It comes
before the imports of edm_nb, because it puts the repository first: a script measures the package that it lies beside.
"""
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
from edm_nb.files import write_atomic  # noqa: E402

# --- where, when, with what ---------------------------------------------------------------------------------------


def cpu_name():
    "The processor as Linux names it, else the architecture."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu_name():
    "The CUDA device, or None."
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cores():
    "Processor cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load():
    "How many processes wanted to run during the last minute; None where the system does not say."
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def hardware():
    "What the numbers were measured on."
    return dict(cpu=cpu_name(), cores=cores(), threads=torch.get_num_threads(), load=load(), gpu=gpu_name())


def hardware_line():
    "The processor part of `hardware` in words."
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads != 1)} of {cores()} cores"


def versions(*packages):   # names as pip knows them
    "Python, torch, and the packages: None for one that is not installed."
    found = dict(python=platform.python_version(), torch=torch.__version__)
    for name in packages:
        try: found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: found[name] = None
    return found


def now():
    "Date and time, UTC."
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_json(path, value, indent=1):
    "The old file or the new one, never a part."
    return write_atomic(path, lambda file: file.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8"))


# --- time and memory ----------------------------------------------------------------------------------------------


def spread(values, suffix=""):   # suffix: of the keys, "_ms" for instance
    "Median and extremes."
    return {f"median{suffix}": statistics.median(values), f"min{suffix}": min(values), f"max{suffix}": max(values)}


class Times(NamedTuple):
    "What `timed` found for one piece of work."
    wall: list       # seconds of each call
    cpu: list        # seconds of the processor, all threads
    result: object   # what the last call returned

    def summary(self):
        "n; median, min and max of the wall time; the same of the processor time."
        return dict(n=len(self.wall), **spread(self.wall), **{f"cpu_{key}": value for key, value in spread(self.cpu).items()})


def wait(device):
    "Let the device finish, so that a clock can be read."
    if torch.device(device).type == "cuda": torch.cuda.synchronize(device)


def clock(work, device="cpu"):
    "Call once: seconds of wall time, seconds of processor time, result."
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu, result


def timed(works, repeats, warmup=1, device="cpu"):   # works: name -> function; warmup: calls of each that do not count
    "Name -> `Times`. The works take turns and every round starts with another one, so a slow moment of the machine hits all alike."
    if repeats < 1: raise ValueError(f"repeats must be at least 1, not {repeats}")
    names, wall, cpu, last = list(works), {name: [] for name in works}, {name: [] for name in works}, {}
    for i in range(warmup + repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds, busy, last[name] = clock(works[name], device)
            if i >= warmup:
                wall[name].append(seconds)
                cpu[name].append(busy)
    return {name: Times(wall[name], cpu[name], last[name]) for name in names}


def memory(device="cpu"):
    "Bytes that this process holds now (where /proc tells, else its peak), or torch on the GPU."
    if torch.device(device).type == "cuda": return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else peak_memory()


def peak_memory(device="cpu"):
    "The most that `memory` has been. A process cannot reset its own: hence one process per row where it is reported."
    if torch.device(device).type == "cuda": return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(script, row, **options):   # script: its path; row, options: passed as `--row JSON --option VALUE`
    "Run one row of a benchmark in a process of its own; returns the JSON that it prints last."
    command = [sys.executable, str(script), "--row", json.dumps(row)]
    for name, value in options.items(): command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{Path(script).name}: {row} failed with\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
