"""What a visitor of the repository looks for: metadata, templates, workflows. None of it can drift from settings.ini and the Makefile."""
import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="a source archive has no .github")


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def runs(workflow):
    "Every command of a workflow."
    return [step["run"] for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_call_make_and_nothing_else(path):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    commands = runs(path)
    assert commands
    for command in commands:
        assert (found := re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S.*)*", command)), command
        assert found[1] in targets, command


def test_hooks_call_make_and_nothing_else():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        make, target = hook["entry"].split()
        assert make == "make" and target in targets and hook["language"] == "system" and hook["pass_filenames"] is False


def test_the_workflow_is_the_local_check():
    (local,) = re.findall(r"make [a-z-]+", read(".ci/run").split("exec")[1])
    (command,) = runs(ROOT / ".github/workflows/test.yml")
    assert command.startswith(local + " ")


def test_the_workflow_covers_what_settings_claim():
    claimed = settings()["python_versions"].split()
    assert claimed[0] == settings()["min_python"]
    rows = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {"python": claimed[0], "versions": "oldest"} in rows                  # strings: 3.10 is not 3.1
    assert {(row["python"], row["versions"]) for row in rows} >= {(claimed[0], "newest"), (claimed[-1], "newest")}


def test_the_oldest_versions_are_those_of_settings():
    "The Makefile's sed turns the lower bounds of the requirements into pins, and nothing else."
    (script,) = re.findall(r"^\tsed -n '(.*?)' settings.ini", read("Makefile"), re.M)
    done = subprocess.run(["sed", "-n", script.replace("$$", "$"), ROOT / "settings.ini"], capture_output=True, text=True, check=True)
    required = [line.strip() for line in settings()["requirements"].splitlines() if line.strip()]
    assert [line.strip() for line in done.stdout.splitlines()] == [line.replace(">=", "==") for line in required]


@pytest.mark.parametrize("wrong", [("timeout-minutes:", "timeout-minute:"), ("runs-on:", "runs-at:"), ("      - uses: actions/checkout@v4\n", "      - {}\n")],
                         ids=lambda change: change[0].strip("- \n"))
def test_make_check_sees_a_broken_workflow(tmp_path, wrong):
    if not importlib.util.find_spec("check_jsonschema"):
        pytest.skip("check-jsonschema is not installed")
    (options,) = re.findall(r"check-jsonschema (.*?) \$\(WORKFLOWS\)", read("Makefile").split("\ncheck:")[1].split("\n\n")[0])
    sound = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert wrong[0] in sound
    for text, code in ((sound, 0), (sound.replace(*wrong), 1)):
        (tmp_path / "test.yml").write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "check_jsonschema", *options.split(), tmp_path / "test.yml"], capture_output=True, text=True)
        assert done.returncode == code, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_pass_actionlint(path):
    if not shutil.which("actionlint"):
        pytest.skip("actionlint is not installed")
    done = subprocess.run(["actionlint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=lambda p: p.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes") and field["attributes"]["label"]


def test_the_citation_is_of_this_project_and_of_the_paper():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0" and cited["license"] == "Apache-2.0" and cited["authors"] == [{"name": settings()["author"]}]
    assert cited["repository-code"] == f"https://github.com/{settings()['user']}/{settings()['repo']}"
    paper = cited["preferred-citation"]
    bibtex = read("README.md")
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in bibtex
    assert paper["title"] in bibtex and str(paper["year"]) in bibtex
    assert "version" not in cited                                                # it stands in settings.ini


def test_the_version_stands_in_one_place():
    version = settings()["version"]
    assert read("edm_nb/__init__.py").strip() == f'__version__ = "{version}"'   # written by the export
    headings = re.findall(r"^## \[(.*?)\]", read("CHANGELOG.md"), re.M)
    assert headings[0] == "Unreleased" and headings[1] == version
    for name in ("CITATION.cff", "setup.py", "pyproject.toml", "README.md"):
        assert not re.search(rf"\b{re.escape(version)}\b", read(name)), f"{name} repeats the version"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_and_targets_exist(name):
    text = read(name)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


def test_security_promises_hold():
    "The policy says that nothing in a file is ever run: none of the calls that would run it occurs in the package."
    for path in (ROOT / "edm_nb").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\(|pickle\.loads?\(|import pickle\b|joblib|allow_pickle=True", text), path.name
        calls = [node.func.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert not {"eval", "exec", "__import__"} & set(calls), path.name


@pytest.mark.parametrize("body, heavy", [
    ("T.train(config)", True), ("helper()", True), ("run('train', 'toy')", True), ("[T.fit(c) for c in range(3)]", True),
    ("T.loss(config)", False), ("other()", False),
])
def test_tests_that_train_are_found_by_their_source(body, heavy):
    import types

    import conftest
    module = types.ModuleType("test_made_here")
    exec(f"def helper(): subprocess.run(['x'])\ndef other(): return 'trained'\ndef test_it(): {body}", vars(module))
    assert bool(conftest.HEAVY & conftest.words(module.test_it, module, set())) == heavy


def test_known_trainings_carry_the_marker(request):
    "Of the tests that were collected: those that are known to train carry the marker."
    for item in request.session.items:
        if item.name in ("test_two_processes_equal_one", "test_every_stage_at_toy_size", "test_the_example_runs", "test_a_failing_notebook_is_executed_again"):
            assert item.get_closest_marker("training"), item.name


def test_names_of_tests_are_the_same_in_every_process(request):
    "A memory address in a name: nobody can ask for that test, and two processes cannot share the work."
    for item in request.session.items:
        assert not re.search(r"\b0x[0-9a-f]{6,}", item.name), item.nodeid
