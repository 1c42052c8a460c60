"How long a chapter takes to read: one rule, for the index and for the sentence that opens a chapter."
import re

FORMULA = re.compile(r"\$\$.+?\$\$", re.S)
FOLDED = {"hide-input", "solution"}


def minutes_to_read(cells):
    """200 words a minute, half a minute for a figure and for a displayed formula, a line of unfolded code a second; to five minutes.

    `cells` are those of a notebook with its outputs, as JSON has them."""
    text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    words = sum(len(re.findall(r"[A-Za-z]{2,}", FORMULA.sub(" ", part))) for part in text)
    formulas = sum(len(FORMULA.findall(part)) for part in text)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    figures = sum("image/png" in found or "<svg" in "".join(found.get("text/html", ""))
                  for cell in code for found in (output.get("data", {}) for output in cell.get("outputs", [])))
    lines = sum(1 for cell in code if not FOLDED & set(cell["metadata"].get("tags", []))
                for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#"))
    return max(5, 5 * round((words / 200 + (figures + formulas) / 2 + lines / 60) / 5))
