"""A headless Chromium for the tests and the benchmark of the explorer: Debian's `chromium` and `chromedriver`, driven by selenium."""
import contextlib
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "book/_static/explorer/explorer.js"


def missing():
    "What a browser test lacks on this machine, in words; None where nothing is missing."
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install selenium)"
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"no `{name}` on the path (`make browser` installs it from Debian's packages)"
    return None


@contextlib.contextmanager
def browser(width=1400, height=1000, dark=False, still=False, scripts=True):
    "A driver without a window. dark, still: the preferences that the machine claims; scripts: is JavaScript on?"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--disable-background-networking"):    # no network
        options.add_argument(flag)
    if not scripts:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        screen(driver, width, height, dark, still)
        yield driver
    finally:
        driver.quit()


def screen(driver, width=1400, height=1000, dark=False, still=False):
    "Give the page another screen and other preferences."
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500))
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[
        dict(name="prefers-color-scheme", value="dark" if dark else "light"),
        dict(name="prefers-reduced-motion", value="reduce" if still else "no-preference")]))


def page(names, folder, theme=None, start=""):
    "An HTML file with the pages of the explorer that are named, as a chapter has them; its path."
    places = "".join(f'<div class="edm-explorer" data-page="{name}" data-start="{start}"><p>a static picture of {name}</p></div>' for name in names)
    path = Path(folder) / "page.html"
    path.write_text(f"""<!doctype html><html lang="en"{f' data-theme="{theme}"' if theme else ''}><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>explorer</title>
<style>body {{ margin: 0 auto; max-width: 1100px; padding: 12px }}</style></head>
<body>{places}<script src="{BUNDLE.as_uri()}"></script></body></html>""", encoding="utf-8")
    return path
