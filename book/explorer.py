"""The explorer's bundle: is it current, and build it where node is there.

    python book/explorer.py            # builds book/_static/explorer/explorer.js if it is stale and node is installed
    python book/explorer.py --check    # says whether the shipped bundle is current; needs no node

The bundle is shipped in the repository, so the book builds on machines without node.
"""
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "book/_static/explorer/explorer.js"


def sources(root=ROOT):
    "What the bundle is made from, sorted as explorer/build.mjs sorts it."
    folder = root / "explorer"
    paths = [path for path in (folder / "src").rglob("*") if path.is_file()]
    paths += [folder / name for name in ("build.mjs", "package.json", "package-lock.json")] + [root / "results/loss_per_sigma.json"]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def source_hash(root=ROOT):
    "SHA-256 over names and texts; a Windows checkout gives the same."
    digest = hashlib.sha256()
    for path in sources(root):
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        digest.update(f"{path.relative_to(root).as_posix()}\0{text}\0".encode())
    return digest.hexdigest()


def recorded_hash(bundle=BUNDLE):
    "The hash in the first line of a bundle; None without a bundle."
    if not bundle.is_file(): return None
    found = re.match(r"/\*! edm_nb explorer, sources ([0-9a-f]{64})", bundle.read_text(encoding="utf-8")[:200])
    return found and found[1]


def main():
    "Build if stale; a stale bundle without node, or a failed build, is a warning: the book still has a picture at its place."
    if not (ROOT / "results").is_dir(): return      # the source archive: it has the bundle, not all that the bundle is made from
    current = recorded_hash() == source_hash()
    if "--check" in sys.argv:
        print("the bundle is current" if current else "the bundle is stale: run `npm ci && npm run build` in explorer/")
        sys.exit(not current)
    if current: return
    npm = shutil.which("npm")
    if npm is None:
        print("explorer.py: the shipped bundle is older than its sources, and there is no node to build it", file=sys.stderr)
        return
    for command in (["ci", "--no-audit", "--no-fund"], ["run", "build"]):
        done = subprocess.run([npm, *command], cwd=ROOT / "explorer", capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"explorer.py: `npm {' '.join(command)}` failed, the shipped bundle stays as it is\n{done.stderr[-1000:]}", file=sys.stderr)
            return
    print(f"The explorer: {BUNDLE}")


if __name__ == "__main__":
    main()
