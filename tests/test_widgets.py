"""The explorer's pictures inside Jupyter: sliders move, figures follow, and without ipywidgets a line says what to install."""
import sys

import matplotlib
import pytest
import torch

from edm_nb import widgets
from edm_nb.framework import MixtureDenoiser

matplotlib.use("Agg")


def slider(box, name):
    return next(child for child in box.children if getattr(child, "description", "") == name)


def test_the_denoiser_widget_draws_what_its_sliders_say():
    pytest.importorskip("ipywidgets")
    box = widgets.denoiser_widget()
    slider(box, "σ").value, slider(box, "x").value = 0.5, -0.25
    box.update()
    toy = MixtureDenoiser(torch.tensor([[-1.0], [0.0], [1.2]]).double(), torch.tensor([0.05, 0.05, 0.08]), torch.tensor([0.3, 0.2, 0.5]))
    D = toy(torch.tensor([[-0.25]]).double(), 0.5).item()
    top, middle, low = box.result.axes
    assert f"D = {D:.3f}" in top.get_title() and "x = -0.25, σ = 0.5" in top.get_title()
    marks = [line.get_xydata()[0] for line in middle.lines if len(line.get_xdata()) == 1]
    assert marks[0].tolist() == pytest.approx([-0.25, D])
    assert sum(bar.get_width() for bar in low.patches) == pytest.approx(1)


def test_the_trajectories_widget_draws_what_its_sliders_say():
    pytest.importorskip("ipywidgets")
    box = widgets.trajectories_widget()
    for solver, schedule in (("Heun", "VP"), ("DPM++(2M)", "flow")):
        slider(box, "solver").value, slider(box, "schedule").value, slider(box, "steps").value = solver, schedule, 7      # each change draws anew
        left, right = box.result.axes
        (stepped,) = [line for line in left.lines if line.get_label() == "solver"]
        assert schedule in left.get_title() and len(stepped.get_xdata()) == 8
        bold = max(right.lines, key=lambda line: line.get_linewidth())
        assert bold.get_label() == solver and len(right.lines) == 5
        (tangent,) = [line for line in left.lines if line.get_label() == "tangent at step 1"]
        (goal,) = [line for line in left.lines if line.get_label() == "D there"]
        gap = abs(tangent.get_ydata()[1] - goal.get_ydata()[0])
        assert (gap < 1e-9) == (schedule == "flow")              # straight flow's tangents end in D, VP's do not


def test_without_ipywidgets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for make in (widgets.denoiser_widget, widgets.trajectories_widget):
        with pytest.raises(ImportError, match=r"pip install 'edm_nb\[widgets\]'"):
            make()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="sigma must be finite and > 0"):
        widgets.draw_denoiser(sigma=0.0)
    with pytest.raises(ValueError, match="n >= 2"):
        widgets.draw_trajectories(n=1)
    with pytest.raises(ValueError, match="on a line only"):
        widgets.exact_path(MixtureDenoiser(torch.zeros(1, 2).double(), 1.0), torch.zeros(1).double(), 1.0, torch.ones(1))
