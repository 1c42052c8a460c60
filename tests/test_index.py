"""The table of symbols in the index: every name in it is a name of the package."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def names_in_package():
    "Every identifier that a module of edm_nb defines, takes as a parameter or reads as an attribute."
    names = set()
    for path in (ROOT / "edm_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= {getattr(node, key) for key in ("id", "arg", "attr", "name") if isinstance(getattr(node, key, None), str)}
    return names


def symbols():
    "The second column of the table under the heading Symbols."
    import json
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = ["".join(c["source"]) for c in cells if "".join(c["source"]).startswith("## Symbols")]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| $")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]


def test_symbols_are_names_of_the_package():
    listed = symbols()
    assert len(listed) >= 25
    assert set(listed) - names_in_package() == set()


def test_symbols_of_table_1_and_of_the_sde_are_listed():
    "What chapters 00 to 02 use in their formulas, each with a row; the two rates called beta are told apart."
    text = (ROOT / "nbs/index.ipynb").read_text(encoding="utf-8").replace("\\\\", "\\")
    for symbol in ("N", "i", "h", r"\omega", r"\varepsilon", r"\bar\alpha_j", "u_j", "j_0", r"\epsilon_s", r"\beta(t)", r"\beta_\mathrm{VP}(t)"):
        assert f"| ${symbol}$ |" in text or f"| ${symbol}, " in text, f"the table of symbols has no row for {symbol}"
