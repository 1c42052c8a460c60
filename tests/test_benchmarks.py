"""The bookkeeping that the benchmark scripts share: what stands beside a number, whole files, and a clock that calls the work."""
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for folder in ("benchmarks", "studies") for path in (ROOT / folder).glob("*.py") if path.name != "record.py")
SCRIPTS.append(ROOT / "studies/gpu/__main__.py")


@pytest.fixture(scope="module")
def record():
    "The module, imported as the scripts do."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import record
    yield record
    sys.path.remove(str(ROOT / "benchmarks"))


def test_hardware_and_versions_are_there(record):
    found = record.hardware()
    assert set(found) == {"cpu", "cores", "threads", "load", "gpu"}
    assert found["cpu"] and found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert found["cpu"] in record.hardware_line() and f"{found['threads']} thread" in record.hardware_line()
    versions = record.versions("numpy", "no-such-package-at-all")
    assert versions["torch"] == torch.__version__ and versions["python"].split(".")[0] == str(sys.version_info[0])
    assert versions["numpy"] and versions["no-such-package-at-all"] is None
    when = datetime.fromisoformat(record.now())
    assert when.tzinfo and abs((datetime.now(timezone.utc) - when).total_seconds()) < 60


def test_a_file_is_written_whole_or_not_at_all(record, tmp_path):
    path = tmp_path / "new folder" / "result.json"
    record.write_json(path, {"a": [1, 2], "b": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, 2], "b": "é"} and path.read_text().endswith("\n")
    with pytest.raises(TypeError):
        record.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_the_clock_calls_the_work(record, monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        seconds = iter(seconds)

        def run():
            calls.append(name)
            clock[0] += next(seconds)
            return f"{name} {calls.count(name)}"
        return run

    works = {"a": work("a", [100, 4, 1, 2]), "b": work("b", [200, 30, 20, 10])}
    times = record.timed(works, repeats=3, warmup=1)
    assert "".join(calls) == "abbaabba"                      # in turn, and another one first in every round
    assert times["a"].wall == [4, 1, 2] and times["b"].wall == [30, 20, 10]      # the warm-up does not count
    assert times["a"].result == "a 4"
    summary = times["b"].summary()
    assert (summary["n"], summary["median"], summary["min"], summary["max"]) == (3, 20, 10, 30)
    assert len(times["b"].cpu) == 3 and {"cpu_median", "cpu_min", "cpu_max"} <= set(summary)
    assert record.spread([5, 1, 2, 3], "_ms") == {"median_ms": 2.5, "min_ms": 1, "max_ms": 5}
    with pytest.raises(ValueError, match="at least 1"):
        record.timed(works, repeats=0)


def test_processor_time_is_of_the_work(record):
    import time
    slept = record.timed({"sleep": lambda: time.sleep(0.05)}, 1, warmup=0)["sleep"]
    assert slept.wall[0] >= 0.05 > slept.cpu[0]              # asleep: time passes, the processor does not work


def test_memory_of_a_fresh_process():
    "Alone in a process: what earlier tests have freed would be handed out again."
    script = ("import record, torch; before = record.memory(); held = torch.ones(2**24);"                     # 64 MiB
              "now, peak = record.memory(), record.peak_memory(); print(before, now, peak, held.numel())")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, now, peak, count = map(int, done.stdout.split())
    assert count == 2**24 and 0 < before + 2**25 < now < before + 2**27 and now <= peak + 2**22


def test_a_row_in_its_own_process(record, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, json\nif 'bad' in sys.argv[2]: sys.exit('no such row')\nprint('noise'); print(json.dumps(sys.argv[1:]))\n")
    assert record.in_own_process(script, {"k": 1}, rounds=3) == ["--row", '{"k": 1}', "--rounds", "3"]
    with pytest.raises(RuntimeError, match="(?s)script.py: .*no such row"):
        record.in_own_process(script, "bad")


def test_scripts_start_from_any_directory(tmp_path):
    "All in one process, because each of them imports torch; a script's own folder is first on the path, as Python puts it."
    program = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv, sys.path[0], shown = [script, "--help"], script.rsplit("/", 1)[0], io.StringIO()
    with contextlib.redirect_stdout(shown):
        try: runpy.run_path(script, run_name="__main__")
        except SystemExit as end: assert not end.code, (script, end.code)
    assert "--out" in shown.getvalue(), f"{script} has no --out"
"""
    done = subprocess.run([sys.executable, "-c", program, *map(str, SCRIPTS)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
