"""The explorer as a reader meets it: a headless Chromium without network moves the sliders and reads the numbers back."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser, missing, page, screen
from patience import PATIENCE

from edm_nb.framework import LINEAR, VE, MixtureDenoiser, score, vp_schedule
from edm_nb.ode_solvers import edm_sigmas, euler, heun, ode_states
from edm_nb.preconditioning import FLOW, edm_scalings, flow_scalings, v_scalings, vp_scalings

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the explorer's browser tests need a browser: {missing()}")

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["denoiser", "trajectories", "churn", "preconditioning", "training"]
f64 = torch.float64
STATE = "return window.edmExplorer.stages[arguments[0]].state"


class Reader:
    "What a reader can do with one page."
    def __init__(self, driver, name):
        self.driver, self.name = driver, name

    def script(self, code, *args):
        return self.driver.execute_script(code, *args)

    def settle(self):
        "Two frames: a change is drawn in the next one."
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def find(self, selector):
        from selenium.webdriver.common.by import By
        return self.driver.find_element(By.CSS_SELECTOR, f'[data-page="{self.name}"] {selector}')

    def move(self, field, position):
        "Pull a slider to a place on its track, as the mouse would."
        self.script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', { bubbles: true }))",
                    self.find(f'input[data-field="{field}"]'), position)
        self.settle()

    def choose(self, field, value):
        self.script("arguments[0].click()", self.find(f'input[data-field="{field}"][value="{value}"]'))
        self.settle()

    def press(self, selector):
        self.script("arguments[0].click()", self.find(selector))
        self.settle()

    def read(self, name):
        return float(self.script("return arguments[0].dataset.value", self.find(f'[data-read="{name}"]')))

    @property
    def state(self):
        return self.script(STATE, self.name)

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def open_page(driver, tmp_path):
    "open_page(name, fragment): a fresh page with that part of the explorer."
    def open_it(*names, fragment="", **settings):
        screen(driver, **settings)
        driver.get("about:blank")
        driver.get(page(names, tmp_path).as_uri() + fragment)
        reader = Reader(driver, names[0])
        reader.settle()
        return reader
    return open_it


def denoiser_of(means, std, weights):
    return MixtureDenoiser(*(torch.tensor(part, dtype=f64) for part in (means, std, weights)))


def test_denoiser_follows_its_sliders(open_page):
    from selenium.webdriver.common.keys import Keys
    reader = open_page("denoiser")
    exact = denoiser_of([[-1.0], [0.0], [1.2]], [0.05, 0.05, 0.08], [0.3, 0.2, 0.5])
    for sigma_at, x_at in [(60, 40), (150, 120), (230, 200)]:
        reader.move("sigma", sigma_at)
        reader.move("x", x_at)
        sigma, x = reader.state["sigma"], torch.tensor([[reader.state["x"]]], dtype=f64)
        assert sigma == pytest.approx(0.02 * 500 ** (sigma_at / 240), rel=1e-3)
        assert reader.read("D") == pytest.approx(exact(x, sigma).item(), abs=1e-12)
        assert reader.read("score") == pytest.approx(score(exact, x, sigma).item(), rel=1e-9)
        weights = exact.joint(x, sigma)[0].softmax(1)[0].tolist()
        bars = reader.find('svg[aria-label^="Posterior"]')
        shown = [float(reader.script("return arguments[0].getAttribute(arguments[1])", bars, f"data-weight-{n}")) for n in ("left", "middle", "right")]
        np.testing.assert_allclose(shown, weights, rtol=1e-9, atol=1e-12)
    before = reader.state["x"]
    reader.find('input[data-field="x"]').send_keys(Keys.ARROW_RIGHT)
    reader.settle()
    assert before < reader.state["x"] < before + 0.05        # the keyboard moves by one notch
    assert reader.errors() == []


def test_a_finger_drags_the_picture(open_page):
    reader = open_page("denoiser", width=390, height=800)
    x, y, w, h = reader.script("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top, b.width, b.height]", reader.find("svg"))
    touch = lambda kind, *points: reader.driver.execute_cdp_cmd(
        "Input.dispatchTouchEvent", dict(type=kind, touchPoints=[dict(x=x + w * u, y=y + h / 2) for u in points]))
    touch("touchStart", 0.3)
    touch("touchMove", 0.35)
    touch("touchMove", 0.5)
    touch("touchEnd")
    reader.settle()
    inner = (w * 0.5 - 46) / (w - 46 - 18)                     # the margins of the plot
    assert reader.state["x"] == pytest.approx(-3.6 + 7.2 * inner, abs=0.15)


def test_trajectories_are_those_of_the_package(open_page):
    reader = open_page("trajectories")
    exact = denoiser_of([[-1.0], [0.0], [1.2]], [0.2] * 3, [0.3, 0.2, 0.5])
    schedules = {"linear": LINEAR, "vp": vp_schedule(), "ve": VE, "flow": FLOW}
    for name, schedule in schedules.items():
        for solver, step in {"euler": euler, "heun": heun}.items():
            reader.choose("schedule", name)
            reader.choose("solver", solver)
            s = reader.state
            levels = edm_sigmas(int(s["N"]), 0.002, s["sigma_max"], s["rho"])
            *_, end = ode_states(exact, torch.tensor([[s["z"]]], dtype=f64), levels, schedule, step)
            assert reader.read("end") == pytest.approx(end.item(), abs=1e-9)
        if name in ("linear", "flow"):                         # σ = t, and straight flow: tangents end in D
            assert reader.read("tangentEnd") == pytest.approx(reader.read("D"), abs=1e-9)
        else:
            assert abs(reader.read("tangentEnd") - reader.read("D")) > 0.01
    reader.move("N", 240)
    *_, end = ode_states(exact, torch.tensor([[reader.state["z"]]], dtype=f64), edm_sigmas(1500, 2e-4, reader.state["sigma_max"]), LINEAR, heun)
    assert reader.read("exact") == pytest.approx(end.item(), abs=1e-5)
    assert abs(reader.read("end") - reader.read("exact")) < 0.01 and reader.read("nfe") == 2 * reader.state["N"] - 1


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp2m", 2)])
def test_the_error_curve_has_the_order_of_its_solver(open_page, solver, order):
    from selenium.webdriver.support.ui import WebDriverWait
    reader = open_page("trajectories", fragment=f"#explorer?trajectories.solver={solver}&trajectories.width=0.4")
    WebDriverWait(reader.driver, PATIENCE).until(lambda _: reader.script("return document.querySelector('svg[data-done]')"))
    assert reader.read("slope") == pytest.approx(-order, abs=0.2)


def test_churn_of_nothing_is_heun_and_every_table_cell_is_a_number(open_page):
    reader = open_page("churn")
    assert 0 <= reader.read("distance.algorithm2") < 0.3
    reader.move("S_churn", 0)
    for row in ("share0", "width1", "shift", "distance"):
        assert reader.read(f"{row}.algorithm2") == reader.read(f"{row}.heun")
    for column in ("heun", "algorithm2", "sde", "exact"):
        assert sum(reader.read(f"share{k}.{column}") for k in range(3)) == pytest.approx(1)
        assert reader.read(f"distance.{column}") < 0.3
    narrow = reader.read("width0.algorithm2")
    reader.move("excess", 240)                                  # takes away 10 % too much, no churn: the blobs shrink
    assert reader.read("width0.algorithm2") < 0.85 * narrow
    shrunk = reader.read("width0.algorithm2")
    reader.move("S_churn", 240)                                 # and noise widens them again
    assert reader.read("width0.algorithm2") > shrunk + 0.05


def test_particles_move_and_stop(open_page):
    reader = open_page("churn")
    reader.press("button.play")
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(reader.driver, PATIENCE).until(lambda _: 0.02 < reader.state["time"] < 1)
    reader.press("button.play")
    held = reader.state["time"]
    reader.settle()
    assert reader.state["time"] == held and 0 < held < 1 and reader.read("sigma") > 0
    still = open_page("churn", still=True)                     # reduced motion: nothing runs by itself, a press is one step
    assert still.find("button.play").text == "One step"
    still.press("button.play")
    still.press("button.play")
    still.settle()
    assert still.state["time"] == pytest.approx(1 / still.state["N"])


def test_preconditioning_shows_the_rows_of_table_1(open_page):
    reader = open_page("preconditioning")
    rows = {"noise": vp_scalings, "v": v_scalings, "flow": flow_scalings, "edm": edm_scalings}
    for position in (20, 120, 220):
        reader.move("sigma", position)
        for kind, function in rows.items():
            reader.choose("kind", kind)
            wanted = [float(part) for part in function(reader.state["sigma"])[:3]]
            np.testing.assert_allclose([reader.read(name) for name in ("c_skip", "c_out", "c_in")], wanted, rtol=1e-9)
        assert reader.read("input") == pytest.approx(1) and reader.read("target") == pytest.approx(1)     # EDM is the last
    reader.move("c_skip", 77)
    assert reader.state["kind"] == "free" and reader.read("c_skip") == pytest.approx(77 / 240, abs=1e-3)
    assert reader.read("target") == pytest.approx(1)


def test_training_noise_weighs_the_measured_curve(open_page):
    reader = open_page("training")
    reader.move("P_mean", 100)
    reader.choose("from", "0")
    s, found = reader.state, json.loads((ROOT / "results/loss_per_sigma.json").read_text())
    gain = np.maximum(0, np.array(found["curves"][0]["loss"]) - found["curves"][-1]["loss"])
    log_sigma = np.linspace(math.log(found["sigmas"][0]), math.log(found["sigmas"][-1]), 40_001)
    density = np.exp(-0.5 * ((log_sigma - s["P_mean"]) / s["P_std"]) ** 2) / (s["P_std"] * math.sqrt(2 * math.pi))
    curve = density * np.interp(log_sigma, np.log(found["sigmas"]), gain)
    useful = float(((curve[1:] + curve[:-1]) / 2 * np.diff(log_sigma)).sum()) / gain.max()
    assert reader.read("edm") == pytest.approx(useful, rel=1e-3)
    ve = np.interp(np.linspace(math.log(0.02), math.log(100), 40_001), np.log(found["sigmas"]), gain, right=0).mean() / gain.max()
    assert reader.read("ve") == pytest.approx(ve, abs=0.01)


def test_the_address_holds_the_setting(open_page):
    reader = open_page("churn", "denoiser")
    reader.move("S_churn", 240)
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(reader.driver, PATIENCE).until(lambda d: "churn.S_churn=80" in d.current_url)
    Reader(reader.driver, "denoiser").move("x", 0)
    WebDriverWait(reader.driver, PATIENCE).until(lambda d: "denoiser.x=-3" in d.current_url and "churn.S_churn=80" in d.current_url)
    fragment = "#" + reader.driver.current_url.split("#")[1]
    again = open_page("churn", "denoiser", fragment=fragment)
    assert again.state["S_churn"] == 80 and Reader(again.driver, "denoiser").state["x"] == -3
    again.press(".tools button:last-child")                     # Reset
    WebDriverWait(reader.driver, PATIENCE).until(lambda d: "churn" not in d.current_url)
    assert again.state["S_churn"] == 20 and "denoiser.x" in again.driver.current_url
    bad = open_page("churn", fragment="#explorer?churn.S_churn=x&churn.N=1e9&churn.S_noise=-3&churn.nonsense=1&churn.seed=NaN")
    assert (bad.state["S_churn"], bad.state["N"], bad.state["S_noise"], bad.state["seed"]) == (20, 128, 0.95, 4)
    assert bad.errors() == []


def test_a_chapter_may_start_elsewhere(driver, tmp_path):
    screen(driver)
    driver.get("about:blank")
    driver.get(page(["trajectories"], tmp_path, start="solver=heun&amp;N=900&amp;z=x").as_uri())
    reader = Reader(driver, "trajectories")
    reader.settle()
    assert (reader.state["solver"], reader.state["N"], reader.state["z"]) == ("heun", 64, -0.9)
    reader.choose("solver", "euler")
    reader.press(".tools button:last-child")
    assert reader.state["solver"] == "heun"


def test_every_experiment_can_be_set_up(open_page):
    reader = open_page(*PAGES)
    for name in PAGES:
        one, seen = Reader(reader.driver, name), []
        for k in (1, 2, 3):
            one.press(f'button[data-try="{k}"]')
            seen.append(json.dumps(one.state, sort_keys=True))
        assert len(set(seen)) == 3
    assert reader.errors() == []


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_is_wider_than_the_screen_and_labels_can_be_read(open_page, width, dark):
    reader = open_page(*PAGES, width=width, height=900, dark=dark)
    assert reader.script("return document.documentElement.scrollWidth") <= width
    outside = reader.script("return [...document.querySelectorAll('.edm-x :is(div, p, canvas, svg, input, button, td, figure)')].filter(e => e.getClientRects().length && "
                            "e.getBoundingClientRect().right > e.closest('.edm-x').getBoundingClientRect().right + 1).map(e => e.className + e.textContent.slice(0, 40))")
    assert outside == []                                        # what is cut off does not make the page wider
    sizes = reader.script("return [...document.querySelectorAll('.edm-x *')].filter(e => e.childNodes.length && e.firstChild.nodeType === 3 && e.firstChild.data.trim())"
                          ".map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 9 and np.mean(np.array(sizes) < 12) < 0.05        # subscripts alone are smaller
    back, ink = (reader.script(f"return getComputedStyle(document.querySelector('.edm-x')).{name}") for name in ("backgroundColor", "color"))
    light = lambda colour: sum(int(part) for part in colour[colour.index("(") + 1:-1].split(",")[:3]) / 3
    assert (light(back) < light(ink)) == dark and abs(light(back) - light(ink)) > 150
    unnamed = reader.script("return [...document.querySelectorAll('.edm-x input, .edm-x button, .edm-x svg[role], .edm-x canvas[role]')]"
                            ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length")
    assert unnamed == 0 and reader.errors() == []


def test_the_theme_of_the_site_wins(driver, tmp_path):
    screen(driver, dark=False)
    driver.get(page(["denoiser"], tmp_path, theme="dark").as_uri())
    reader = Reader(driver, "denoiser")
    dark = "return document.querySelector('.edm-x').classList.contains('dark')"
    assert reader.script(dark)
    reader.script("document.documentElement.dataset.theme = 'light'")
    reader.settle()
    assert not reader.script(dark)


def test_without_scripts_the_picture_stays(tmp_path):
    with browser(scripts=False) as driver:
        driver.get(page(["churn"], tmp_path).as_uri())
        assert "a static picture of churn" in driver.page_source and "edm-x" not in driver.page_source.split("<script")[0]
