"""Distance against evaluations for solvers and rows of Table 1 (Figure 2), and the churn grid (Figure 4)."""
from edm_nb.framework import LINEAR, VE, vp_schedule
from edm_nb.ode_solvers import edm_sigmas, euler, heun, iddpm_sigmas, ve_sigmas, vp_sigmas
from edm_nb.stochastic import Churn
from studies.gpu.model import trained


def study(report):
    "Distance against evaluations for solvers and rows, and the churn grid; deterministic runs at equal evaluations."
    denoise, source = trained(report)
    report.reference()      # before anything is drawn: without the data there is no distance
    denoise, n = report.fast(denoise), 8 if report.toy else report.args.study_samples
    steps = (2, 3) if report.toy else (5, 9, 18, 40)
    levels = dict(EDM=edm_sigmas, VP=vp_sigmas, VE=ve_sigmas, iDDPM=iddpm_sigmas)
    schedules = dict(EDM=LINEAR, VP=vp_schedule(), VE=VE, iDDPM=LINEAR)
    solvers = dict(Heun=heun, Euler=euler)
    line = lambda what, name, row, solver, k, **more: dict(  # noqa: E731
        what=what, name=name, row=row, solver=solver, steps=k, NFE=2*k - 1 if solver == "Heun" else k, **more)
    cells = [line("solver", "Heun", "EDM", "Heun", k) for k in steps] + [line("solver", "Euler", "EDM", "Euler", 2*k - 1) for k in steps]
    amounts, counts = ((0, 10), (2, 3)) if report.toy else ((0, 10, 30, 80), (18, 9, 32))
    churns = [line("churn", f"S_churn = {s}", "EDM", "Heun", k, S_churn=s) for k in counts for s in amounts if s or k not in steps]
    rows = [line("row", name, name, "Euler", 2*k - 1) for k in sorted(steps, key=lambda k: abs(k - 18)) for name in ("VP", "VE", "iDDPM")]
    cells += rows[:3] + churns + rows[3:]       # the most telling first; no churn at the solver's steps is the solver's row

    def measure(cell):
        churn = Churn(cell.get("S_churn", 0), 0.01, 1, 1.007)
        return report.distance(denoise, n, levels[cell["row"]](cell["steps"]), churn, solvers[cell["solver"]], schedules[cell["row"]])
    return dict(rows=report.rows("study", cells, measure), weights=source, churn_range=[0.01, 1], S_noise=1.007, **report.measured_against())
