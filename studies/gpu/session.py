"""What makes a run of minutes worth starting: stages whose results are on disk as they end, rows that are kept, and the clock."""
import io
import json
import math
import tarfile
import time
import traceback
from pathlib import Path

import torch

from record import gpu_name, hardware, now, versions, write_json

# Seconds that a stage may take: a call is at most four minutes. Of `model` the measuring only, its training is bounded by --minutes.
LIMITS = dict(kernels=60, tilings=90, profile=240, correctness=60, training=240, sampling=150, trials=240, model=240, study=240, artefacts=150, levels=60)


class OutOfTime(Exception):
    "This call has to end; what is done is kept."


def environment():
    "What a number cannot be read without."
    return dict(date=now(), **hardware(), **versions("torchvision", "triton"), cuda=torch.version.cuda)


def in_words(error):
    "One line about an exception."
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def size(cell):
    "What a row's seconds grow with: samples and evaluations of each, where it names them."
    return cell.get("samples", 1) * cell.get("NFE", 1)


def good(rows):
    "Rows that hold a measurement."
    return [row for row in rows if "failed" not in row and "skipped" not in row]


class Session:
    "Arguments, time and result files of one call."
    def __init__(self, args):
        self.args, self.device, self.toy, self.out = args, torch.device(args.device), args.toy, Path(args.out)
        self.call_end = time.monotonic() + (args.stop_after or math.inf)
        self.stage_end, self.longest, self.compile_errors = math.inf, 0.0, []

    def limit(self, name):
        "Seconds that a stage may take."
        return self.args.limit.get(name, LIMITS[name])

    def proceed(self, times=1):
        """Whether the stage has time for another row, taken to be as long for its size as the longest so far.

        Raises OutOfTime where the whole call must end.
        """
        over = time.monotonic() + self.longest*times
        if over >= self.call_end:
            raise OutOfTime
        return over < self.stage_end

    def settings(self):
        "Rows are kept between calls where these agree."
        names = ("toy", "seed", "minutes", "marks", "trial_minutes", "study_samples", "curve_samples", "samples", "sample_batch", "search")
        return {name: getattr(self.args, name) for name in names} | dict(gpu=gpu_name(), torch=torch.__version__)

    def rows(self, stage, cells, measure):
        "One row per cell: from an earlier call, or measure(cell), or why there is none. Good rows are on disk at once."
        path = self.out / f"{stage}.partial.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("settings") != json.loads(json.dumps(self.settings())):
            kept = dict(settings=self.settings(), rows=[])
        found, rows = {json.dumps(row["cell"]): row for row in kept["rows"]}, []
        for cell in cells:
            key = json.dumps(cell)
            if key not in found:
                try:
                    if self.proceed(size(cell)):
                        start = time.monotonic()
                        found[key] = dict(cell=cell, **measure(cell))
                        write_json(path, kept | dict(rows=list(found.values())))
                        self.pack()
                        self.longest = max(self.longest, (time.monotonic() - start) / size(cell))
                        print(f"  {found[key]}", flush=True)
                    else:
                        rows.append(dict(cell, skipped="the stage's time was over"))
                except OutOfTime:
                    raise
                except Exception as error:
                    traceback.print_exc()
                    rows.append(dict(cell, failed=in_words(error)))
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            if key in found:
                rows.append(cell | {name: value for name, value in found[key].items() if name != "cell"})
        return rows

    def pack(self):
        "Pack what is there for --bundle, row by row: a machine may be taken away before the end."
        if self.args.bundle:
            bundle(self.out, self.args.bundle, self.args.part_mb)

    def load(self, name):
        "The result of an earlier stage, or None."
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, stage):
        "Run one stage unless its file is there."
        name, path = stage.__name__, self.out / f"{stage.__name__}.json"
        if path.exists() and name not in self.args.redo:
            print(f"{name}: done before ({path})", flush=True)
            return self.load(name)
        self.stage_end, self.longest = math.inf, 0.0
        self.proceed()
        print(f"{name}: started", flush=True)
        start = time.perf_counter()
        self.stage_end = time.monotonic() + self.limit(name)
        result = stage(self)
        result = dict(stage=name, toy=self.toy, seed=self.args.seed, seconds=round(time.perf_counter() - start, 1),
                      environment=environment(), compile_errors=self.compile_errors, settings=self.settings(), **result)
        write_json(path, result)
        bad = [row for row in result.get("rows", []) if "failed" in row or "skipped" in row]
        if not bad:
            (self.out / f"{name}.partial.json").unlink(missing_ok=True)
        print(f"{name}: {result['seconds']:.0f} s -> {path}" + (f"; {len(bad)} rows are missing, see --redo" if bad else ""), flush=True)
        return result

    def outlook(self, stages):
        "What this call will do and for how long, in lines of text."
        lines, total = [], 0.0
        for stage in stages:
            name, what = stage.__name__, stage.__doc__.splitlines()[0]
            seconds = self.limit(name) + (60 * self.args.minutes if name == "model" else 0)
            if (self.out / f"{name}.json").exists() and name not in self.args.redo:
                lines.append(f"  {name:12} is there already")
                continue
            total += seconds
            lines.append(f"  {name:12} at most {seconds / 60:4.1f} min  {what}")
        end = f"; this call ends after {self.args.stop_after / 60:.1f} min, the next one goes on" if self.args.stop_after else ""
        return "\n".join([f"{self.out}: at most {total / 60:.1f} min, not counting a row that is longer than those before it{end}", *lines])


def bundle(out, folder, part_mb):
    "One tar of everything but the run folder, cut into parts: for machines that give back small files only."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(Path(out).iterdir()):
            if path.is_file() and not path.name.endswith(".tmp"):
                tar.add(path, arcname=path.name)
    folder, size, content = Path(folder), int(part_mb * 2**20), buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("report.tar.*"):
        old.unlink()
    parts = [content[i:i + size] for i in range(0, len(content), size)]
    for number, part in enumerate(parts):
        (folder / f"report.tar.{number:02d}").write_bytes(part)
    return f"bundle: {len(parts)} parts, {len(content) / 2**20:.1f} MiB in {folder}"
