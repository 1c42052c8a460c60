"""The GPU report: one module per stage, `session` for time and files, `report` for what stages share, `command` to start them."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))     # for `record`, as every study does
