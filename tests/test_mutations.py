"""The mutation check: a wrong coefficient anywhere must make the fast tests fail (see mutate.py)."""
import os
import subprocess
import sys
from pathlib import Path

import mutate
import pytest

TESTS = Path(__file__).resolve().parent


def command(*arguments):
    return subprocess.run([sys.executable, TESTS / "mutate.py", *arguments], capture_output=True, text=True, cwd=TESTS.parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


def test_every_target_exists_once():
    for mutation in mutate.MUTATIONS:
        text = (mutate.ROOT / "edm_nb" / f"{mutation.module}.py").read_text(encoding="utf-8")
        altered = mutate.mutated(text, mutation.old, mutation.new)
        assert altered != text, mutation.name
        compile(altered, mutation.module, "exec")


def test_names_are_unique_and_groups_exist():
    names = [mutation.name for mutation in mutate.MUTATIONS]
    assert len(set(names)) == len(names)
    assert {mutation.group for mutation in mutate.MUTATIONS} == set(mutate.GROUPS)
    for files, _ in mutate.GROUPS.values():
        assert all((mutate.ROOT / file).is_file() for file in files)


def test_the_coefficients_of_the_paper_are_all_altered():
    names = " ".join(mutation.name for mutation in mutate.MUTATIONS)
    for word in ("c_skip", "c_out", "c_in", "c_noise", "lambda", "Heun weights", "gamma", "t_hat", "rho", "P_mean"):
        assert word in names


@pytest.mark.parametrize("old", ["not there", "a = 1"])
def test_a_stale_or_ambiguous_target_is_an_error(old):
    with pytest.raises(LookupError, match="up to date"):
        mutate.mutated("a = 1\nb = 2\na  =  1\n", old, "a = 3")


def test_spaces_in_the_source_do_not_matter():
    assert mutate.mutated("x = 2 * ( a+b )", "2*(a + b)", "3") == "x = 3"


def test_an_unknown_name_is_an_error():
    run = command("--only", "no such name")
    assert run.returncode == 2 and "--list" in run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_change_without_meaning_survives_and_is_reported(tmp_path):
    script = tmp_path / "harmless.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "import mutate\n"
        "mutate.GROUPS['row'] = (['tests/test_preconditioning.py'], 'by_hand')\n"
        "mutate.MUTATIONS[:] = [mutate.Mutation('harmless', 'preconditioning', 'sigma.log() / 4', '0.25 * sigma.log()', 'row')]\n"
        "sys.exit(mutate.main([]))\n", encoding="utf-8")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "SURVIVED" in run.stderr, run.stdout + run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_mutation_is_noticed():
    run = command()
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(mutate.MUTATIONS)} mutations, 0 complaints" in run.stdout
