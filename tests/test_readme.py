"""What the README shows is what happens."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**__import__("os").environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    distance = float(re.search(r"pixel space: ([\d.]+)", done.stdout)[1])
    assert losses[-1] < 0.75 * losses[0]
    assert 0 < distance < 40, "an untrained network scores several times as much"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_chapter_is_in_the_list():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        assert path.stem == "index" or f"](nbs/{path.name})" in TEXT, f"the README does not list {path.name}"


def test_the_commands_are_commands():
    "Every edm-nb command and make target in the README exists."
    from typer.testing import CliRunner

    from edm_nb.cli import app
    names = set(re.findall(r"edm-nb (\w+)", TEXT)) | set(re.findall(r"edm_nb\.cli (\w+)", TEXT))
    for name in names:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.M)) <= set(targets)
