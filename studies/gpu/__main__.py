"""Start the GPU report: `python -m studies.gpu` from the repository, or this file from anywhere."""
import sys
from pathlib import Path

if not __package__:     # started as a file: its own folder leaves the path and the repository takes its place
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from studies.gpu.command import main  # noqa: E402

if __name__ == "__main__":
    main()
