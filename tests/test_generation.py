"""Images by seed: the levels, the evaluations and the numbers behind them, checked against loops written from Algorithm 2."""
import ast
import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from edm_nb import generation as G
from edm_nb.data import digits, one_hot, to_uint8
from edm_nb.networks import tiny
from edm_nb.ode_solvers import count_nfe, edm_sigmas, sample_ode
from edm_nb.preconditioning import Preconditioned, iddpm_scalings, ve_scalings, vp_scalings

ROOT = Path(__file__).resolve().parent.parent


def network(label_dim=10, scalings=None, seed=0, **constants):
    "A small random network whose images differ by seed and class."
    generator = torch.Generator().manual_seed(seed)
    net = tiny(resolution=8, channels=1, label_dim=label_dim, model_channels=8, channel_mult=[1, 2], num_blocks=1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    more = {} if scalings is None else {"scalings": scalings}
    return Preconditioned(net, **more, **constants).eval()


def draw(denoise, seeds, *arguments, **named):
    return torch.cat([images for _, images, _ in G.generate(denoise, seeds, *arguments, **named)])


@torch.no_grad()
def algorithm_2(denoise, seed, t, churn, known=None, label=None, official=False):
    "Algorithm 2 for one image, with its own stream and its own rounding; the final level of `t` is 0."
    S_churn, S_tmin, S_tmax, S_noise = churn
    stream, n = torch.Generator().manual_seed(seed), len(t) - 1
    def nearest(sigma): return sigma if known is None else min(known, key=lambda u: abs(u - sigma))
    if official:
        x = torch.randn(1, 8, 8, generator=stream).double()
        chosen = torch.randint(10, (), generator=stream)
    else:
        chosen = torch.randint(10, (1,), generator=stream)[0]
        x = torch.randn(1, 8, 8, generator=stream).double()
    label = chosen if label is None else label
    cond = {"class_labels": torch.nn.functional.one_hot(torch.as_tensor(label), 10)[None].float()}
    x = x[None] * t[0]
    for i in range(n):
        gamma = min(S_churn / n, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0
        t_hat = nearest(t[i] + gamma * t[i])
        spare = math.sqrt(max(t_hat**2 - t[i]**2, 0))
        if official:
            x = x + spare * S_noise * torch.randn(1, 8, 8, generator=stream, dtype=torch.float64)
        elif spare > 0:
            x = x + spare * S_noise * torch.randn(1, 8, 8, generator=stream).double()
        d = (x - denoise(x, torch.tensor(t_hat), **cond)) / t_hat
        nxt = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            e = (nxt - denoise(nxt, torch.tensor(t[i + 1]), **cond)) / t[i + 1]
            nxt = x + (t[i + 1] - t_hat) * (d + e) / 2
        x = nxt
    return x[0]


def iddpm_known(M=1000, C_1=0.001, C_2=0.008):
    "u_j by the recursion of Table 1, from the last to the first."
    alpha = lambda j: math.sin(math.pi / 2 * j / (M * (C_2 + 1)))**2
    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1]**2 + 1) / max(alpha(j - 1) / alpha(j), C_1) - 1))
    return u[1:]


@pytest.mark.parametrize("S_churn", [0, 12])
def test_an_iddpm_network_is_sampled_on_its_own_levels_and_noise_comes_from_churn_alone(S_churn):
    "The kind of fault: a level rounded when its step has begun is taken for churn. The levels asked for are no u_j."
    denoise, known = network(scalings=iddpm_scalings), iddpm_known()
    asked = [75 * (0.0081 / 75)**(i / 17) for i in range(18)]
    assert all(min(abs(u / s - 1) for u in known) > 1e-5 for s in asked)
    settings = G.Sampling(levels=tuple(asked), S_churn=S_churn)
    t = [min(known, key=lambda u: abs(u - s)) for s in asked] + [0.0]
    if S_churn == 0:
        drew = []
        def spy(model, noise, levels, randn_like, **cond):
            return G.algorithm_2(settings, denoise.round_sigma)(model, noise, levels, lambda x: drew.append(1) or randn_like(x), **cond)
        draw(denoise, [5], settings, sampler=spy)
        assert not drew
    ours = draw(denoise, [5, 6], settings, as_bytes=False)
    for k, seed in enumerate((5, 6)):
        torch.testing.assert_close(ours[k].double(), algorithm_2(denoise, seed, t, (S_churn, 0, math.inf, 1), known), atol=2e-4, rtol=1e-4)


def test_levels_are_clamped_rounded_and_merged_before_the_loop():
    assert torch.equal(G.step_levels(G.Sampling()), edm_sigmas(18))
    known = torch.tensor(iddpm_known(), dtype=torch.float64)
    levels = G.step_levels(G.Sampling(256), network(scalings=iddpm_scalings))
    assert len(levels) < 257 and (levels.diff() < 0).all() and levels[-1] == 0
    assert all((known / level - 1).abs().min() < 1e-9 for level in levels[:-1])
    for scalings in (vp_scalings, ve_scalings):
        denoise = network(scalings=scalings)
        for settings in (G.Sampling(), G.Sampling(levels=(1e4, 1.0, 1e-6))):
            levels = G.step_levels(settings, denoise)
            assert levels[0] <= denoise.sigma_max and levels[-2] >= denoise.sigma_min
    narrow = network(sigma_min=0.1, sigma_max=5.0)
    assert G.step_levels(G.Sampling(), narrow)[[0, -2]].tolist() == [5.0, 0.1]
    assert G.step_levels(G.Sampling(), network(), narrow)[[0, -2]].tolist() == [5.0, 0.1]        # a guide limits as well
    with pytest.raises(ValueError, match="knows 0.1 to 5"): G.step_levels(G.Sampling(sigma_min=6.0), narrow)


def counted(denoise):
    "Calls of the network itself, which no formula knows of."
    calls, inner = [], denoise.net.forward
    def forward(*arguments, **named):
        calls.append(1)
        return inner(*arguments, **named)
    denoise.net.forward = forward
    return calls


@pytest.mark.parametrize("solver", list(G.SOLVERS))
@pytest.mark.parametrize("more", [{}, {"guidance": 1.0}, {"S_churn": 5.0}, {"row": "vp"}, {"levels": (9.0, 3.0, 1.0, 0.2)}], ids=str)
def test_evaluations_are_those_of_the_network(solver, more):
    denoise = network()
    settings = G.Sampling(**({} if "levels" in more else {"steps": 5}), solver=solver, **more)
    expected, calls = G.count_evaluations(settings, denoise), counted(denoise)
    draw(denoise, [1], settings)
    assert len(calls) == expected


def test_merged_levels_cost_nothing():
    denoise = network(scalings=iddpm_scalings)
    expected, calls = G.count_evaluations(G.Sampling(300), denoise), counted(denoise)
    draw(denoise, [1], G.Sampling(300))
    assert len(calls) == expected < 599


@pytest.mark.parametrize("churn", [(0, 0, math.inf, 1), (6, 0.05, 3, 1.007), (40, 0, math.inf, 1)], ids=str)
def test_official_seeds_are_those_of_the_published_order(churn):
    "Noise, then class, then float64 noise in every step, used or not."
    denoise, names = network(), ("S_churn", "S_tmin", "S_tmax", "S_noise")
    settings = G.Sampling(6, **dict(zip(names, churn)))
    ours, labels = zip(*[(x, y) for _, x, y in G.generate(denoise, [3, 2**32 - 1], settings, official=True, as_bytes=False, batch=1)])
    for k, seed in enumerate((3, 2**32 - 1)):
        expected = algorithm_2(denoise, seed, edm_sigmas(6).tolist(), churn, official=True)
        torch.testing.assert_close(ours[k][0].double(), expected, atol=2e-4, rtol=1e-4)
    own = draw(denoise, [3], settings, as_bytes=False)
    torch.testing.assert_close(own[0].double(), algorithm_2(denoise, 3, edm_sigmas(6).tolist(), churn), atol=2e-4, rtol=1e-4)
    assert (own[0] - ours[0][0]).abs().max() > 0.01
    chosen = draw(denoise, [3], settings, [4], official=True, as_bytes=False)
    torch.testing.assert_close(chosen[0].double(), algorithm_2(denoise, 3, edm_sigmas(6).tolist(), churn, label=4, official=True), atol=2e-4, rtol=1e-4)


def test_a_guide_without_labels_is_not_told_any():
    denoise, plain = network(), network(label_dim=0, seed=1)
    settings = G.Sampling(4, guidance=1.5)
    ours = draw(denoise, [1], settings, guide=plain, as_bytes=False)
    def by_hand(x, sigma, class_labels=None):
        D = denoise(x, sigma, class_labels=class_labels)
        return D + 1.5 * (D - plain(x, sigma))
    expected = draw(denoise, [1], G.Sampling(4), through=by_hand, as_bytes=False)
    torch.testing.assert_close(ours, expected)
    other = Preconditioned(tiny(resolution=16, channels=1, model_channels=8, channel_mult=[1, 2], num_blocks=1))
    for guide, words in ((other, "the guide draws"), (network(label_dim=3), "knows 3 classes")):
        with pytest.raises(ValueError, match=words): draw(denoise, [1], settings, guide=guide)
    with pytest.raises(ValueError, match="without guidance"): draw(denoise, [1], G.Sampling(4), guide=plain)
    with pytest.raises(ValueError, match="conditional model"): draw(plain, [1], settings)


def test_the_share_of_a_process_and_the_batch_do_not_change_an_image():
    denoise, settings = network(), G.Sampling(4, S_churn=4)
    together = dict(zip(range(7), draw(denoise, range(7), settings)))
    for world, batch in ((1, 2), (3, 64), (9, 1)):
        found = {seed: image for rank in range(world)
                 for part, images, _ in G.generate(denoise, range(7), settings, batch=batch, rank=rank, world=world) for seed, image in zip(part, images)}
        assert sorted(found) == list(range(7))
        assert all((found[s].int() - together[s].int()).abs().max() <= 1 for s in found)


def test_the_first_noise_may_be_given_and_everything_else_stays_the_seeds():
    "The noise that the seeds would have drawn changes nothing, with churn and drawn classes; rows go with places, whatever seed, batch and process."
    denoise, settings, seeds = network(), G.Sampling(4, S_churn=4), [11, 3, 8, 3, 40]
    def start_of(official):
        starts = []
        def spy(model, noise, levels, randn_like, **cond):
            starts.append(noise.clone())
            return noise
        draw(denoise, seeds, settings, sampler=spy, official=official)
        return torch.cat(starts)
    for official in (False, True):
        start = start_of(official)
        assert start.std() > 0.5 and start.dtype == torch.float64
        plain = draw(denoise, seeds, settings, official=official, as_bytes=False)
        given = draw(denoise, seeds, settings, official=official, as_bytes=False, noise=start)
        assert given.dtype == torch.float64 and torch.equal(given.float(), plain)
        asked = []
        found = draw(denoise, seeds, settings, official=official, batch=2, as_bytes=False, noise=lambda part: asked.append(part) or start[[seeds.index(s) for s in part]].float())
        assert asked == [[11, 3], [8, 3], [40]] and found.dtype == torch.float32
    other = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    together = draw(denoise, seeds, settings, noise=other)
    assert (together.int() - draw(denoise, seeds, settings).int()).abs().max() > 10
    for world, batch in ((1, 2), (2, 1), (3, 64)):
        shares = [torch.cat([x for _, x, _ in G.generate(denoise, seeds, settings, noise=other, batch=batch, rank=rank, world=world)]) for rank in range(world)]
        assert all((share.int() - together[rank::world].int()).abs().max() <= 1 for rank, share in enumerate(shares))


def test_given_noise_is_not_scaled_rounded_or_overwritten():
    denoise, seen = network(), []
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = start.clone()
    def destructive(model, noise, levels, randn_like, **cond):
        seen.append(noise.clone())
        return noise.zero_()
    draw(denoise, range(3), noise=start, sampler=destructive)
    assert torch.equal(seen[0], before) and torch.equal(start, before)
    half = draw(denoise, range(3), noise=start.half(), as_bytes=False, sampler=lambda model, noise, levels, randn_like, **cond: noise)
    assert half.dtype == torch.float32 and torch.equal(half, start.half().float())
    exact = draw(denoise, range(3), noise=start, as_bytes=False, sampler=lambda model, noise, levels, randn_like, **cond: noise)
    assert torch.equal(exact, start)


@pytest.mark.parametrize("noise, words", [
    (torch.randn(3, 1, 8, 8), r"\[4, 1, 8, 8\], one row for each seed, got \[3, 1, 8, 8\]"), (torch.randn(5, 1, 8, 8), "one row for each seed"), (torch.randn(4, 1, 8, 9), "got .4, 1, 8, 9"),
    (torch.randn(4, 64), "got .4, 64"), (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "floating-point tensor.*uint8"), (torch.zeros(4, 1, 8, 8, dtype=torch.complex64), "complex64"),
    (torch.zeros(4, 1, 8, 8).numpy(), "ndarray"), (torch.full((4, 1, 8, 8), math.nan), "finite"), (torch.full((4, 1, 8, 8), math.inf), "finite"),
    (lambda seeds: torch.randn(1, 1, 8, 8), r"\[2, 1, 8, 8\]"), (lambda seeds: None, "NoneType"), (lambda seeds: torch.full((2, 1, 8, 8), math.nan), "finite")], ids=range(12))
def test_noise_that_does_not_fit_is_refused_before_the_first_image(noise, words):
    denoise = network()
    calls = counted(denoise)
    with pytest.raises(ValueError, match=words): next(G.generate(denoise, range(4), G.Sampling(2), batch=2, noise=noise))
    assert not calls


@pytest.mark.parametrize("change", [
    {"steps": 0}, {"steps": 1.5}, {"steps": 10**9}, {"sigma_min": 1e-320}, {"sigma_max": 1e308}, {"sigma_min": 90.0}, {"rho": 1e-300}, {"rho": 1e300},
    {"guidance": math.nan}, {"guidance": math.inf}, {"guidance": 1e308}, {"guidance": "a"}, {"S_tmin": math.inf}, {"S_noise": 1e300}, {"S_churn": -1.0},
    {"solver": "magic"}, {"row": "magic"}, {"row": "vp", "sigma_min": 0.1}, {"levels": (1.0, 2.0)}, {"levels": (2.0, math.nan)}, {"levels": (2.0, 1.0), "steps": 3}],
    ids=str)
def test_settings_that_no_sampler_can_use_are_refused(change):
    with pytest.raises(ValueError): G.Sampling(**change)


@pytest.mark.parametrize("seeds, more", [([2**32], {}), ([-1], {}), ([1], {"batch": 0}), ([1], {"classes": [10]}), ([1], {"classes": [-1]}), ([1], {"classes": []}),
                                         ([1], {"vectors": torch.ones(2, 3)}), ([1], {"vectors": torch.ones(2, 10), "classes": [1]})], ids=str)
def test_what_cannot_be_drawn_is_refused_before_the_first_image(seeds, more):
    with pytest.raises(ValueError): next(G.generate(network(), [0, *seeds], G.Sampling(2), **{"batch": 1} | more))


def test_a_bare_function_is_told_where_it_belongs():
    with pytest.raises(ValueError, match="denoise must be a model.*got function.*through="): next(G.generate(lambda x, sigma: x, [1]))


def test_settings_describe_themselves():
    assert G.Sampling().describe() == {"row": "edm", "solver": "heun", "steps": 18}
    assert G.Sampling(row="vp", S_churn=3.0).describe() == {"row": "vp", "solver": "euler", "steps": 18, "S_churn": 3.0}
    assert dataclasses.replace(G.Sampling(), row="ve").solver is None


def test_a_network_that_does_not_say_its_size_is_asked_for_it():
    class Plain(torch.nn.Module):
        def forward(self, x, c_noise, class_labels=None, augment_labels=None): return 0*x
    denoise = Preconditioned(Plain()).eval()
    with pytest.raises(ValueError, match="shape="): draw(denoise, [1])
    assert draw(denoise, [1], shape=(3, 5, 4), as_bytes=False).shape == (1, 3, 5, 4)


# --- nobody else draws by seed ----------------------------------------------------------------------------------------

DRAWS = {"sample", "sample_ode", "sample_sde", "sample_states", "ode_states", "rk45", "SeededNoise"}
OTHERS = {   # file: for what it calls a sampler or makes streams itself; everything that is not here calls `generate`
    "edm_nb/generation.py": "this function",
    "edm_nb/widgets.py": "pictures of paths, not images by seed",
    "edm_nb/measuring.py": "the likelihood's probes and dequantisation, one stream an image; nothing is drawn",
    "benchmarks/samplers.py": "times the samplers",
    "benchmarks/stochastic.py": "times the samplers and the noise",
    "studies/churn.py": "Langevin iterations from real images; streams that begin with the noise, and a path that several samplers share",
    "studies/gpu/artefacts.py": "Langevin iterations from real images",
    "studies/gpu/correctness.py": "the samplers against float64",
    "studies/gpu/sampling.py": "times the sampler",
    "studies/likelihood.py": "dequantisation and probes, one stream an image; nothing is drawn",
}


def handed_over(tree):
    "What is inside the `sampler`, the `noise` and the `through` of a call of `generate`: expressions, and functions of the file by name."
    inside = set()
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "generate"): continue
        given = [k.value for k in call.keywords if k.arg in ("sampler", "noise", "through")]
        names = {value.id for value in given if isinstance(value, ast.Name)}
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
        inside.update(n for part in given + functions for n in ast.walk(part))
    return inside


def drawing_calls(tree):
    "Calls by name of what `DRAWS` lists, but for those that `generate` makes; `commands.sample` is the command of that name."
    theirs = handed_over(tree)
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", getattr(n.func, "attr", "")) in DRAWS
            and n not in theirs and ast.unparse(n.func) != "commands.sample"]


def scripts():
    "All code that people import or start, but for the rooms that define samplers and streams."
    for folder in ("edm_nb", "benchmarks", "studies"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in ("edm_nb/stochastic.py", "edm_nb/ode_solvers.py", "edm_nb/randomness.py", "edm_nb/_modidx.py", "edm_nb/framework.py"):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_nobody_else_draws_images_by_seed():
    "A second loop over seeds is where a wrong sampler would live; a new caller of a sampler has to say why, and a reason goes with its caller."
    found = {name for name, tree in scripts() if drawing_calls(tree)}
    assert found == set(OTHERS), sorted(found ^ set(OTHERS))


def study(name, monkeypatch):
    "A script of studies/ as a module."
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(f"{name}_study", ROOT / "studies" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_the_ladder_draws_from_the_noise_that_its_numbers_came_from(monkeypatch):
    "One tensor for all networks of a seed, labels in the order of the data, a float32 state, levels that the network knows."
    ladder, data = study("ladder", monkeypatch), digits()
    noise, labels = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1000)), one_hot(data.labels[:40], 10)
    known = torch.tensor(iddpm_known(), dtype=torch.float64)
    for denoise, way in ((network(), "edm"), (network(label_dim=0), "vp"), (network(scalings=iddpm_scalings), "ve"), (network(scalings=ve_scalings), "vp")):
        given = ladder.SAMPLERS[way](9)
        levels = given["sigmas"][:-1].clamp(denoise.sigma_min, denoise.sigma_max)
        if denoise.levels is not None: levels = torch.stack([known[(known - sigma).abs().argmin()] for sigma in levels])
        levels = torch.cat([levels.unique().flip(0), levels.new_zeros(1)])
        cond = {"class_labels": labels} if denoise.net.label_dim else {}
        expected = to_uint8(sample_ode(denoise, noise, levels, given["schedule"], given["solver"], dtype=torch.float32, **cond))
        seen = set()
        denoise.register_forward_pre_hook(lambda _, arguments: seen.add(arguments[0].dtype))  # noqa: B023
        assert (ladder.draw(denoise, data, 40, **given).int() - expected.int()).abs().max() <= (denoise.levels is not None)   # u_j by another sum
        assert seen == {torch.float32}


@torch.no_grad()
def test_the_solver_study_draws_from_the_noise_that_its_numbers_came_from(monkeypatch):
    solvers, denoise, data = study("solver_study", monkeypatch), network(), digits()
    noise = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(solvers.shared_noise(data, 3, 12), noise)
    first, *_, last = solvers.batches()[1:]
    for _, levels, schedule, solver, steps in (*first, last[-1]):
        x, nfe = solvers.one_method(denoise, noise, data.labels[:12], levels(steps), schedule, solver(3))
        counter = count_nfe(denoise)
        expected = sample_ode(counter, noise, levels(steps), schedule, solver(3), class_labels=one_hot(data.labels[:12], 10))
        assert x.dtype == torch.float64 and torch.equal(x, expected) and nfe == counter.nfe


def test_the_callers_of_generate_are_known():
    "Commands, grids of a run, models of the studies, the GPU report: they call the one function; `measure` is handed it."
    callers = {name for name, tree in scripts() for n in ast.walk(tree) if isinstance(n, ast.Call)
               and "generate" in (getattr(n.func, "id", ""), *(getattr(a, "id", "") for a in n.args))}
    assert {"edm_nb/commands.py", "edm_nb/measuring.py", "edm_nb/folders.py", "edm_nb/inpainting.py", "studies/gpu/report.py", "studies/digits_model.py",
            "studies/ladder.py", "studies/churn.py", "studies/guidance.py", "studies/precond_study.py", "studies/solver_cifar.py", "studies/solver_study.py"} <= callers, callers
