"""Frames per second of the explorer's particles in headless Chromium, and the static pictures of its five pages.

    python benchmarks/explorer.py              # results/explorer.json and results/explorer/*.png; a minute

Needs chromium, chromedriver and selenium (`make browser`). Two loads on page 3, 500 particles in each of its two panels: the
animation alone, and a slider that moves in every frame, so that every frame computes both samplers anew. The number of
frames is what requestAnimationFrame delivers, which Chromium caps at 60 a second and a busy machine lowers. Processor time of
the page's thread per frame hardly depends on what else the machine does: it says how much room is left below 16.7 ms.
"""
import argparse
import base64
import sys
import tempfile
import time
from pathlib import Path

from record import RESULTS, ROOT, hardware, now, spread, versions, write_json

sys.path.insert(0, str(ROOT / "tests"))
from browser import browser, page

PAGES = ["denoiser", "trajectories", "churn", "preconditioning", "training"]
COUNT = """
const [seconds, drag, done] = arguments, stage = window.edmExplorer.stages.churn, gaps = [];
stage.frames.ms.length = 0;
if (!drag) stage.play({ loop: true });
let first = null, last = null, k = 0;
const tick = now => {
  if (last !== null) gaps.push(now - last);
  first ??= now; last = now;
  if (drag) stage.set("S_churn", 1 + k++ % 79);
  if (now - first < 1000 * seconds) return requestAnimationFrame(tick);
  stage.stop();
  done({ gaps, work: [...stage.frames.ms], seconds: (last - first) / 1000 });
};
requestAnimationFrame(tick);
"""


def processor_seconds(driver):
    "Of the page's main thread so far: all of it, and of scripts alone."
    found = {entry["name"]: entry["value"] for entry in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    return found["TaskDuration"], found["ScriptDuration"]


def measure(driver, seconds, drag):
    "Frames a second, the gaps between frames and the time that a frame takes, in milliseconds."
    before = processor_seconds(driver)
    found = driver.execute_async_script(COUNT, seconds, drag)
    cpu, script = (1000 * (b - a) / len(found["gaps"]) for a, b in zip(before, processor_seconds(driver)))
    gaps = sorted(found["gaps"])
    return dict(frames=len(gaps), seconds=found["seconds"], frames_per_second=round(len(gaps) / found["seconds"], 2),
                gap_ms_95=round(gaps[int(0.95 * len(gaps))], 2), cpu_ms_per_frame=round(cpu, 2), script_cpu_ms_per_frame=round(script, 2),
                **{k: round(v, 3) for k, v in spread(found["work"], "_drawing_ms").items()})


def pictures(driver, folder):
    "What stands in a page's place where JavaScript is off."
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        driver.get(page([name], folder=Path(tempfile.mkdtemp())).as_uri())
        time.sleep(1)
        while name == "trajectories" and not driver.execute_script("return document.querySelector('svg[data-done]')"):
            time.sleep(0.2)                 # the error curves appear one by one
        driver.execute_script("document.querySelector('.player')?.remove()")     # nothing to press in a picture
        x, y, w, h = driver.execute_script("const b = document.querySelector('.plots').getBoundingClientRect(); return [b.left, b.top, b.width, b.height]")
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", dict(
            format="png", captureBeyondViewport=True, clip=dict(x=x - 8, y=y - 4, width=w + 16, height=h + 12, scale=1)))
        (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "explorer.json")
    args = parser.parse_args()
    with browser(width=1400, height=1000) as driver, tempfile.TemporaryDirectory() as folder:
        driver.set_script_timeout(60)
        driver.execute_cdp_cmd("Performance.enable", dict(timeDomain="threadTicks"))
        driver.get(page(["churn"], folder=Path(folder)).as_uri())
        time.sleep(2)
        runs = {"animation": [], "a slider moves in every frame": []}
        for _ in range(args.repeats):
            for name, found in runs.items():
                found.append(measure(driver, args.seconds, drag=name != "animation"))
                print(name, found[-1], flush=True)
        agent = driver.execute_script("return navigator.userAgent")
        pictures(driver, args.out.parent / "explorer")
    write_json(args.out, dict(
        about="page 3 of the explorer: 500 particles in each of two panels, 1400 x 1000 pixels, software rendering",
        particles=500, steps=24, runs=runs, browser=agent, hardware=hardware(), versions=versions("selenium"), date=now()))
    print(f"wrote {args.out}")


if __name__ == "__main__": main()
