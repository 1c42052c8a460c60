"""The site as a reader meets it: links that lead somewhere, claims that are all there, pages that fit the screen, formulas that are drawn.

`make test` builds the site from the executed notebooks and sets EDM_NB_SITE to its folder. The static half needs nothing else; the other
half opens every page in a headless Chromium without network.
"""
import html.parser
import json
import os
import re
import sys
import urllib.parse
from pathlib import Path

import pytest
from browser import browser, missing, screen

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / os.environ["EDM_NB_SITE"] if os.environ.get("EDM_NB_SITE") else None
PAGES = sorted(path.name for path in SITE.glob("*.html")) if SITE else []
CHAPTERS = [name for name in PAGES if re.match(r"0\d_", name)]
pytestmark = pytest.mark.skipif(SITE is None, reason="`make test` builds the site first and then sets EDM_NB_SITE")
in_browser = pytest.mark.skipif(missing() is not None, reason=f"pages are opened in a browser: {missing()}")
sys.path.insert(0, str(ROOT / "book"))


class Page(html.parser.HTMLParser):
    "What a page links to, which places it has, and its pictures."
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.images, self.inside, self.text = [], set(), [], 0, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "article": self.inside += 1
        if tag == "a" and found.get("href"): self.links.append((found["href"], self.inside > 0))
        if tag == "img": self.images.append(found)

    def handle_endtag(self, tag):
        if tag == "article": self.inside -= 1


@pytest.fixture(scope="module")
def pages():
    return {name: Page(SITE / name) for name in PAGES}


def test_every_link_and_every_anchor_leads_somewhere(pages):
    lost = []
    for name, page in pages.items():
        for link, _ in page.links:
            target = urllib.parse.urlsplit(link)
            if target.scheme or link.startswith("//"): continue
            path = urllib.parse.unquote(target.path) or name
            if not (SITE / path).exists(): lost.append(f"{name}: {link}")
            elif target.fragment and path in pages and urllib.parse.unquote(target.fragment) not in pages[path].ids:
                lost.append(f"{name}: {link}")
    assert not lost, lost[:20]


def test_no_page_needs_the_network(pages):
    "Style sheets, scripts and pictures lie beside the pages."
    outside = [(name, match[2]) for name in PAGES for match in
               re.finditer(r'<(script|link|img)[^>]+(?:src|href)="((?:https?:)?//[^"]+)"', (SITE / name).read_text(encoding="utf-8"))
               if 'rel="canonical"' not in match[0]]
    assert not outside, outside[:5]


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_link_to_functions_claims_chapters_and_works(pages, name):
    article = [link for link, inside in pages[name].links if inside]
    kinds = {"functions": r"^api-|#edm_nb\.", "claims": r"claims\.html#c\d\d", "chapters": r"^\d\d_\w+\.html", "works": r"bibliography\.html#|arxiv", "symbols": r"index\.html#symbols"}
    counts = {kind: sum(bool(re.search(pattern, link)) for link in article) for kind, pattern in kinds.items()}
    assert all(counts.values()), counts
    numbers = [int(n) for n in re.findall(r'class="eqno">\((\d+)\)', (SITE / name).read_text(encoding="utf-8"))]
    assert numbers and numbers == list(range(1, len(numbers) + 1)), "displayed formulas have numbers of their own"


def test_alternative_texts_say_what_a_figure_shows(pages):
    "A file name is no description."
    bare = [(name, image.get("src", "")[-40:]) for name, page in pages.items() for image in page.images
            if "_static/images/" not in image.get("src", "")         # the theme's own, beside their text
            and (len(image.get("alt") or "") < 12 or re.search(r"\.(png|svg)$", image.get("alt") or ""))]
    assert not [entry for entry in bare if entry[0] in CHAPTERS + ["index.html", "claims.html"]], bare[:10]


def test_all_thirty_claims_stand_on_their_page(pages):
    page = pages["claims.html"]
    assert {f"c{k:02d}" for k in range(1, 31)} <= page.ids
    text = (SITE / "claims.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr[^>]*>(?:(?!</tr>).)*?<span id="(c\d\d)">(.*?)</tr>', text, re.S)
    assert [claim for claim, _ in rows] == [f"c{k:02d}" for k in range(1, 31)]
    for claim, row in rows:
        assert re.search(r'href="0\d_\w+\.html#[\w-]+"', row), f"{claim} has no link to its section"
        assert 'class="verdict ' in row, f"{claim} has no verdict"


def test_verdicts_on_the_page_are_those_that_chapters_recorded(pages):
    text = (SITE / "claims.html").read_text(encoding="utf-8")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (SITE.parent / "claims").glob("C*.json")]
    assert len({entry["claim"] for entry in records}) == 30
    for entry in records:
        row = re.search(rf'<span id="{entry["claim"].lower()}">.*?</tr>', text, re.S)[0]
        assert f'verdict-{entry["verdict"].replace(" ", "-")}"' in row, entry["claim"]


def test_the_reference_lists_every_public_name():
    import api
    inventory = (SITE / "objects.inv").read_bytes()
    import zlib
    names = {line.split()[0] for line in zlib.decompress(inventory.split(b"zlib.\n", 1)[1]).decode().splitlines()}
    missing_names = [f"edm_nb.{e.module}.{e.name}" for e in api.package(ROOT) if f"edm_nb.{e.module}.{e.name}" not in names]
    assert not missing_names, missing_names[:10]


# --- in a browser --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        driver.set_page_load_timeout(120)
        driver.set_script_timeout(120)
        yield driver


WAIT = """const done = arguments[0];
const ready = () => (window.MathJax && MathJax.startup && MathJax.startup.promise) ? MathJax.startup.promise.then(() => done(true)) : done(true);
document.readyState === 'complete' ? ready() : addEventListener('load', ready);"""
WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT = """return [...document.querySelectorAll('div.cell.tag_exported div.cell_input pre')].filter(p => p.offsetParent !== null &&
    p.scrollWidth > p.clientWidth + 1).map(p => p.innerText.slice(0, 60))"""
RAW = """const copy = document.querySelector('article').cloneNode(true);
copy.querySelectorAll('pre, code, mjx-container, script, style').forEach(e => e.remove());
return [document.querySelectorAll('mjx-merror, [data-mjx-error]').length, (copy.innerText.match(/\\$\\$|\\\\\\(|\\{(cite|py|ref)[:}]/g) || []).slice(0, 3)]"""


@in_browser
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_both_screens_and_draws_its_formulas(driver, name):
    screen(driver, 1400, 1000)
    driver.get((SITE / name).as_uri())
    driver.execute_async_script(WAIT)
    errors = [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE" and "ERR_NAME_NOT_RESOLVED" not in e["message"]]
    assert not errors, errors[:3]
    assert driver.execute_script(WIDE) <= 0, "wider than 1,400 pixels"
    assert driver.execute_script(CUT) == [], "exported code is cut off at 1,400 pixels"
    if name not in ("genindex.html", "search.html", "py-modindex.html"):
        broken, raw = driver.execute_script(RAW)
        assert not broken and not raw, (broken, raw)
    screen(driver, 390, 844)
    assert driver.execute_script(WIDE) <= 0, "wider than 390 pixels"
    for theme in ("light", "dark"):
        driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        assert contrast(driver) > 4.5, f"text can hardly be read in the {theme} theme"


def contrast(driver):
    "Contrast ratio of running text, as the accessibility guidelines define it."
    colours = driver.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    def luminance(colour):
        parts = [float(v)/255 for v in re.findall(r"[\d.]+", colour)[:3]]
        linear = [v/12.92 if v <= 0.04045 else ((v + 0.055)/1.055)**2.4 for v in parts]
        return 0.2126*linear[0] + 0.7152*linear[1] + 0.0722*linear[2]
    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


@in_browser
def test_search_finds_c_skip(driver):
    screen(driver, 1400, 1000)
    driver.get((SITE / "search.html").as_uri() + "?q=c_skip")
    from selenium.webdriver.support.ui import WebDriverWait
    found = WebDriverWait(driver, 60).until(lambda d: d.execute_script(
        "return [...document.querySelectorAll('#search-results a')].map(a => a.getAttribute('href'))") or None)
    assert any("03_preconditioning" in link or "api-preconditioning" in link for link in found), found


@in_browser
def test_one_search_box_and_one_place_to_copy_from(driver):
    screen(driver, 1400, 1000)
    driver.get((SITE / "00_framework.html").as_uri())
    driver.execute_async_script(WAIT)
    assert driver.execute_script("return [...document.querySelectorAll('.search-button-field, input[type=search]')].filter(e => e.offsetParent !== null).length") == 1
    assert driver.execute_script("return document.querySelectorAll('button.copybtn').length") > 10
    assert driver.execute_script("return document.querySelectorAll('a[href$=\".ipynb\"]').length") >= 1


LETTERS = """return [...document.querySelectorAll('.edm-diagram')].map(box => {
    const sheet = getComputedStyle(box.closest('.text_html') || box).backgroundColor, words = [...box.querySelectorAll('text')];
    return {ink: getComputedStyle(words[0]).fill, page: getComputedStyle(document.body).color, sheet,
            least: Math.min(...words.map(w => parseFloat(getComputedStyle(w).fontSize) * w.getScreenCTM().d || 99).filter(v => v > 0))}})"""


@in_browser
@pytest.mark.parametrize("name", ["index.html", "00_framework.html", "01_ode_solvers.html", "02_stochastic.html", "03_preconditioning.html"])
def test_diagrams_take_ink_and_paper_of_the_page(driver, name):
    "In the dark too, where the theme puts other outputs on a light sheet; and their letters can be read on a telephone."
    driver.get((SITE / name).as_uri())
    screen(driver, 390, 844)
    driver.execute_async_script(WAIT)
    for theme in ("light", "dark"):
        driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        found = driver.execute_script(LETTERS)
        assert found, "no diagram"
        for diagram in found:
            assert diagram["ink"] == diagram["page"] and diagram["sheet"] == "rgba(0, 0, 0, 0)", diagram
            assert diagram["least"] > 8.5, diagram
