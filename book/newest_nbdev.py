"""Try the newest nbdev on a copy of the project.

    python book/newest_nbdev.py

The project is specified with settings.ini, which is nbdev 2's configuration; nbdev 3 refuses it and brings a program that
turns it into a pyproject.toml. Here that is done in an environment and a folder of their own, and the modules that come
out are compared with ours. Exit code 0: moving would change nothing but the line with the address that nbdev 3 adds to
every module's docstring.
"""
import difflib
import re
import shutil
import subprocess
import sys
import venv

from execute import ROOT

PLACE = ROOT / "_build/newest-nbdev"
DOCS_LINE = re.compile(r'\n\nDocs: \S+"""', re.M)


def main():
    "Install, migrate, export, compare."
    shutil.rmtree(PLACE, ignore_errors=True)
    copy, binaries = PLACE / "project", PLACE / "venv/bin"
    venv.create(PLACE / "venv", with_pip=True)
    subprocess.run([binaries / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "nbdev"], check=True)
    for name in ("nbs", "edm_nb"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    newest = subprocess.run([binaries / "python", "-c", "from importlib.metadata import version; print(version('nbdev'))"],
                            check=True, capture_output=True, text=True).stdout.strip()
    dash = "-" if (binaries / "nbdev-export").exists() else "_"          # nbdev 3 writes its commands with a dash
    steps = [f"nbdev{dash}export"]
    if (binaries / "nbdev-migrate-config").exists():
        steps.insert(0, "nbdev-migrate-config")
    for step in steps:
        done = subprocess.run([binaries / step], cwd=copy, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"nbdev {newest}: {step} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        if step == "nbdev-migrate-config":
            (copy / "settings.ini").unlink()
    differ = 0
    for path in sorted((ROOT / "edm_nb").glob("*.py")):
        ours, theirs = path.read_text(encoding="utf-8"), (copy / "edm_nb" / path.name).read_text(encoding="utf-8")
        lines = list(difflib.unified_diff(ours.splitlines(), DOCS_LINE.sub('"""', theirs, count=1).splitlines(), "ours", "newest", n=0, lineterm=""))
        differ += bool(lines)
        print(*(f"edm_nb/{path.name}: {line}" for line in lines[:20]), sep="\n", end="\n" if lines else "")
    if differ:
        sys.exit(f"nbdev {newest}: {differ} modules would differ")
    print(f"nbdev {newest}: after its own migration of settings.ini it exports the same package, but for the line with the address")


if __name__ == "__main__":
    main()
