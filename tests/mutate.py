"""Alter one coefficient of the package at a time and require the fast tests to notice.

    python tests/mutate.py                  # all mutations, about a minute on two cores
    python tests/mutate.py --only lambda    # those whose name contains a word
    python tests/mutate.py --list

A test suite that accepts a wrong coefficient is decoration. Every line of MUTATIONS names a module, a piece of its text and a
wrong replacement. For each the package is copied into a temporary folder, the copy is altered, and the tests of the
group run on the copy. They must fail. The text must occur exactly once: a mutation whose target is gone, or has become
ambiguous, is an error, so that this file cannot rot unseen. First the tests have to pass on an unaltered copy.

Importing torch costs seconds, so it is imported once and every run is a fork of this process. That needs POSIX.
"""
import argparse
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600      # of processor time, so that a busy machine changes nothing; an altered loop may not end
TESTS_FAILED = 1   # pytest's exit code when tests ran and at least one failed
QUICK = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]   # stop at the first failure; explain nothing


class Mutation(NamedTuple):
    "One wrong coefficient."
    name: str     # for people
    module: str   # file of edm_nb, without .py
    old: str      # text that must occur exactly once in it
    new: str      # what it becomes
    group: str    # key of GROUPS: the tests that must notice it


# Tests of each group: files, and pytest's -k expression that keeps what bears on the numbers and is quick.
GROUPS = {
    "framework": (["tests/test_framework.py"],
                  "derivatives or slope or score or gaussian or cells or time_steps or iddpm or quantile or weight or constants"),
    "solver": (["tests/test_ode_solvers.py"], "levels or order or fast_heun or alpha_one or weights or nfe or last_step or inversion"),
    "churn": (["tests/test_stochastic.py"], "equation_6 or gamma or algorithm_2 or x_hat or missing or recursion or naive_loop"),
    "row": (["tests/test_preconditioning.py"], "not compiles and not exports and not in_pieces and not known_scale"),
    "loss": (["tests/test_training.py"], "loss_ or quantiles or ema or ramp"),
    "guidance": (["tests/test_guidance.py"], "formula or told_any or exact or brute or hand or beyond"),
    "metrics": (["tests/test_metrics.py"], "closed_form or hand or factors or needs_no_qr or determinant or accepted or sum_of_singular or triangle or "
                                           "noise_on_a_thin or any_split or covariance or merge_is or published_rule or recovers_a_line or kid_ or shares"),
    "augmentation": (["tests/test_augmentation.py"], "signs or moves_the_picture or compose or labels_follow or published_filter or reconstructs"),
    "data": (["tests/test_data.py", "tests/test_inputs.py"],
             "byte_round_trip or float_images or stands_upright or plain_or_stated or bounded or scans or together or repeated"),
    "pickles": (["tests/test_pickles.py"], "paid or budget or colliding"),
    "edm2": (["tests/test_edm2.py"], "not features"),
    "likelihood": (["tests/test_likelihood.py"], "closed_form or schedule or signs or mean_and_variance or within_three or bits or dequantise"),
    "generation": (["tests/test_generation.py"], "own_levels or clamped or evaluations or published_order or told_any or first_noise"),
    "interop": (["tests/test_interop.py"], "ddim or flow_matching or unet_is_told or azula or v_denoiser or k_denoiser or other_weights or loop_of_diffusers"),
    "own": (["tests/test_own_network.py", "tests/test_finetuning.py"], "scale_per_channel or does_not_run or classes_begin"),
}

MUTATIONS = [
    # chapter 00: oracles, Eq. 4 and Table 1
    Mutation("Gaussian denoiser", "framework", "((self.std.to(spread) / spread)**2)", "((self.std.to(spread) / spread))", "framework"),
    Mutation("score", "framework", "- x) / broadcast_sigma(sigma, x)**2", "- x) / broadcast_sigma(sigma, x)", "framework"),
    Mutation("Eq. 4", "framework", "(sigma_deriv / sigma + s_deriv / s) * x", "(sigma_deriv / sigma - s_deriv / s) * x", "framework"),
    Mutation("VP schedule", "framework", "L = lambda t: 0.5 * beta_d", "L = lambda t: beta_d", "framework"),
    Mutation("VP slope", "framework", "0.5 * beta_vp(t) * (sigma(t) + 1 / sigma(t))", "beta_vp(t) * (sigma(t) + 1 / sigma(t))", "framework"),
    Mutation("Table 1, c_skip", "framework", "lambda sigma: sigma_data**2 / total(sigma)", "lambda sigma: sigma_data / total(sigma)", "framework"),
    Mutation("Table 1, lambda", "framework", "total(sigma) / (sigma * sigma_data)**2", "total(sigma) / (sigma + sigma_data)**2", "framework"),
    Mutation("Table 1, u_j", "framework", "/ (M * (C_2 + 1)))**2", "/ (M * C_2 + M + 1))**2", "framework"),
    Mutation("Table 1, rho", "framework", "rho:float=7.", "rho:float=6.", "framework"),
    # chapter 01: noise levels and steps
    Mutation("rho", "framework", "math.log(sigma_min/sigma_max) / rho)", "math.log(sigma_min/sigma_max))", "solver"),
    Mutation("VP levels", "ode_solvers", "t = 1 + _fractions(n) * (eps_s - 1)", "t = 1 + _fractions(n) * (2*eps_s - 1)", "solver"),
    Mutation("Heun weights", "ode_solvers", ".lerp_(x, 0.5)", ".lerp_(x, 0.45)", "solver"),
    Mutation("Heun, second slope at t", "ode_solvers", "flow.push(x_euler, t_next, h)", "flow.push(x_euler, t, h)", "solver"),
    Mutation("no Euler fallback", "ode_solvers", "if flow.at(t_next)[0] == 0: return x_euler", "", "solver"),
    Mutation("alpha family", "ode_solvers", "w = 1 / (2*alpha)", "w = 1 / (1 + alpha)", "solver"),
    Mutation("Adams-Bashforth", "ode_solvers", "basis.integ()(1.0)", "basis.integ()(0.9)", "solver"),
    Mutation("DPM-Solver++, extrapolation", "ode_solvers", "-h / (2 * (level_before - level))", "-h / (level_before - level)", "solver"),
    Mutation("slope of Eq. 4", "ode_solvers", "-h*dsigma/sigma)", "-h*dsigma*sigma)", "solver"),
    # chapter 02: Algorithm 2 and Eq. 6
    Mutation("gamma, min", "stochastic", "gamma = min(churn.S_churn/n, MAX_GAMMA)", "gamma = max(churn.S_churn/n, MAX_GAMMA)", "churn"),
    Mutation("gamma, bound", "stochastic", "MAX_GAMMA = math.sqrt(2) - 1", "MAX_GAMMA = math.sqrt(2) - 0.9", "churn"),
    Mutation("S_tmin", "stochastic", "if churn.S_tmin <= sigma <= churn.S_tmax", "if sigma <= churn.S_tmax", "churn"),
    Mutation("S_tmax", "stochastic", "if churn.S_tmin <= sigma <= churn.S_tmax", "if churn.S_tmin <= sigma", "churn"),
    Mutation("t_hat", "stochastic", "torch.tensor(sigma*(1 + gamma)", "torch.tensor(sigma*(1 + 2*gamma)", "churn"),
    Mutation("gamma = 0 when rounding", "stochastic", "if gamma == 0: return t, sigma", "if gamma < 0: return t, sigma", "churn"),
    Mutation("steps rounded first", "stochastic", "if round_sigma is None: return levels", "return levels", "churn"),
    Mutation("added variance", "stochastic", "math.sqrt(sigma_hat**2 - sigma**2)", "(sigma_hat - sigma)", "churn"),
    Mutation("S_noise", "stochastic", "s_hat*S_noise*math.sqrt", "s_hat*math.sqrt", "churn"),
    Mutation("D at the old sigma", "stochastic", "solver(flow, x_hat, t_hat, t_next, history)", "solver(flow, x_hat, t, t_next, history)", "churn"),
    Mutation("Langevin's Heun", "stochastic", "x_hat.mul_(1 + half/t_hat)", "x_hat.mul_(1 + half/t)", "churn"),
    Mutation("Eq. 6, noise", "stochastic", "s*sigma*math.sqrt(2*rate)", "s*sigma*math.sqrt(rate)", "churn"),
    Mutation("Eq. 6, score", "stochastic", "s*(rate - dsigma/sigma*dt)", "s*(2*rate - dsigma/sigma*dt)", "churn"),
    # chapter 03: the rows and Eq. 7
    Mutation("c_skip", "preconditioning", "c_skip = sigma_data**2 / variance", "c_skip = sigma_data / variance", "row"),
    Mutation("c_skip = 1", "preconditioning", "c_skip = sigma_data**2 / variance", "c_skip = torch.ones_like(variance)", "row"),
    Mutation("c_out", "preconditioning", "c_out = sigma * sigma_data / variance.sqrt()", "c_out = sigma * sigma_data / variance", "row"),
    Mutation("c_in", "preconditioning", "c_in = 1 / variance.sqrt()", "c_in = 1 / variance", "row"),
    Mutation("c_noise", "preconditioning", "c_noise = sigma.log() / 4", "c_noise = sigma.log() / 2", "row"),
    Mutation("lambda with a sum", "preconditioning", "/ (sigma * sigma_data)**2", "/ (sigma + sigma_data)**2", "row"),
    Mutation("lambda of a row", "preconditioning", "return 1 / c_out**2", "return 1 / c_out.abs()", "row"),
    Mutation("lambda of a denoiser", "preconditioning", "return 1 / self.coefficients(sigma, ndim)[1]**2",
             "return 1 / self.coefficients(sigma, ndim)[2]**2", "row"),
    Mutation("c_noise of VP", "preconditioning", "(M - 1) * vp_schedule(", "M * vp_schedule(", "row"),
    Mutation("range of VP", "preconditioning", "float(vp.sigma(1e-5))", "float(vp.sigma(1e-3))", "row"),
    Mutation("c_noise of VE", "preconditioning", "(sigma / 2).log()", "sigma.log()", "row"),
    Mutation("c_noise of iDDPM", "preconditioning", "(levels.shape[0] - 2 - j)", "(levels.shape[0] - 1 - j)", "row"),
    Mutation("own levels", "preconditioning", "levels = iddpm_levels(M, C_1, C_2) if levels is None else levels\n    j =", "levels = iddpm_levels(M, C_1, C_2)\n    j =", "row"),
    Mutation("sign of v", "preconditioning", "return c_in**2, -sigma * c_in", "return c_in**2, sigma * c_in", "row"),
    Mutation("c_in of flow", "preconditioning", "c_in = 1 / (1 + sigma)", "c_in = 1 / (1 + sigma**2)", "row"),
    Mutation("schedule of flow", "preconditioning", "sigma_deriv=lambda t: 1 / (1 - as_time(t))**2",
             "sigma_deriv=lambda t: 1 / (1 - as_time(t))", "row"),
    Mutation("Eq. 7, sign", "preconditioning", "* x + c_out.to(x.dtype) * F", "* x - c_out.to(x.dtype) * F", "row"),
    Mutation("Eq. 7, no c_in", "preconditioning", "network_input(c_in.to(x.dtype) * x,", "network_input(x,", "row"),
    Mutation("c_noise in low precision", "preconditioning", "c_noise.flatten().to(torch.promote_types(inputs.dtype, torch.float32))",
             "c_noise.flatten().to(inputs.dtype)", "row"),
    Mutation("sigma in low precision", "adapters", "as_time(sigma).to(dtype)", "torch.as_tensor(sigma).to(dtype)", "row"),
    Mutation("order of channels", "adapters", "torch.cat([x, extra], dim=1)", "torch.cat([extra, x], dim=1)", "row"),
    Mutation("learned variance", "adapters", "return F[:, :C]", "return F[:, -C:]", "row"),
    Mutation("merge of sigma_data", "preconditioning", "(count*k / (count + k))", "(count / (count + k))", "row"),
    Mutation("sigma_data between channels", "preconditioning", "(variance + (mean - mean.mean())**2)", "variance", "row"),
    Mutation("sigma_max", "preconditioning", "(ratio - ratio.log1p())", "ratio", "row"),
    # chapter 04: the loss and what surrounds it
    Mutation("loss", "training", "(weight(column, sigma_data) * (D - images)**2)", "((D - images)**2)", "loss"),
    Mutation("P_mean", "training", "P_mean:float=-1.2", "P_mean:float=-1.0", "loss"),
    Mutation("log-normal", "training", "P_std * math.sqrt(2) * torch.erfinv", "P_std * torch.erfinv", "loss"),
    Mutation("VE quantile", "training", "(sigma_max / sigma_min)**u", "(sigma_max / sigma_min)**(u*u)", "loss"),
    Mutation("EMA half-life", "training", "return 0.5**(batch / halflife)", "return 0.6**(batch / halflife)", "loss"),
    Mutation("EMA weights", "training", "current, 1 - beta)", "current, beta)", "loss"),
    Mutation("warm-up", "training", "lr * min(1.0, seen / rampup)", "lr * min(1.0, 2 * seen / rampup)", "loss"),
    # chapter 13: distances
    Mutation("Fréchet cross term", "frechet", "cov2.trace() - 2*root_trace(cov1, cov2)", "cov2.trace() - root_trace(cov1, cov2)", "metrics"),
    Mutation("Fréchet mean term", "frechet", "distance = (mean1 - mean2).square().sum()", "distance = (mean1 - mean2).norm()", "metrics"),
    Mutation("covariance, n - 1", "frechet", "full/(self._n - 1)", "full/self._n", "metrics"),
    Mutation("Chan's update", "frechet", "delta*math.sqrt(self._n*n/total)", "delta*math.sqrt(self._n*n)/total", "metrics"),
    Mutation("determinant check", "frechet", "if error <= tol*roots.sum() else None", "if error <= 1e9*roots.sum() else None", "metrics"),
    Mutation("determinant of R", "frechet", "2*r.diagonal().abs().log().sum()", "r.diagonal().abs().log().sum()", "metrics"),
    Mutation("pivot against noise", "frechet", "< 10*rounding_noise(cov)", "< 0*rounding_noise(cov)", "metrics"),
    Mutation("triangle blocks", "frechet", "k = max(i, j)", "k = max(i, j) + block*(i != j)", "metrics"),
    Mutation("uint8 offset", "features", "images*127.5 + 128", "images*127.5 + 127.5", "metrics"),
    Mutation("KID kernel", "metrics", "part @ b.T/a.shape[1] + 1 for", "part @ b.T + 1 for", "metrics"),
    Mutation("KID unbiased", "metrics", "saa/(n*(n - 1)) + sbb", "saa/(n*n) + sbb", "metrics"),
    Mutation("KID jackknife", "metrics", "(k - 1)/k*(w - w.mean())", "(w - w.mean())", "metrics"),
    Mutation("bias in 1/n", "metrics", "    x = 1/n\n    if len(x)", "    x = n**-0.5\n    if len(x)", "metrics"),
    # chapter 06: guidance and measurements
    Mutation("guidance", "guidance", "return D + w * gap", "return D + (1 + w) * gap", "guidance"),
    Mutation("a guide without labels", "guidance", '"label_dim", None) == 0', '"label_dim", None) == -1', "guidance"),
    Mutation("r², the spread of white data", "guidance", "level * spread / (level + spread)", "level * spread / (level + 1)", "guidance"),
    Mutation("Tweedie's covariance", "guidance", "self.pull(self.adjoint(self.level * u))", "self.pull(self.adjoint(self.level.sqrt() * u))", "guidance"),
    Mutation("noise of the measurement", "guidance", "float(noise_std)**2", "float(noise_std)", "guidance"),
    Mutation("not beyond the measurement", "guidance", "return clean + step / far.clamp(min=1)", "return clean + step", "guidance"),
    Mutation("weights of the posterior", "guidance", "- 0.5 * torch.logdet(S)", "- torch.logdet(S)", "guidance"),
    # images by seed
    Mutation("levels before the loop", "generation", "if rounding is not None: levels = rounding(levels)", "", "generation"),
    Mutation("levels within the range", "generation", "levels[levels > 0].clamp(low, high)", "levels[levels > 0].clamp(low)", "generation"),
    Mutation("draws of steps without churn", "generation", "for _ in range(skipped): self.randn", "for _ in range(0): self.randn", "generation"),
    Mutation("rows of given noise", "generation", "len(seeds), shape)[rank::world]", "len(seeds), shape)", "generation"),
    Mutation("guidance is counted", "generation", "guided(counter, counter, sampling.guidance)", "guided(counter, lambda x, sigma: x, sampling.guidance)", "generation"),
    # chapter 12: the published augmentations
    Mutation("rotation's sign", "augmentation", "turn(draw.angle) @ stretch", "turn(-draw.angle) @ stretch", "augmentation"),
    Mutation("stretch's sign", "augmentation", "turn(-draw.direction) @ stretch @ turn(draw.direction)",
             "turn(draw.direction) @ stretch @ turn(-draw.direction)", "augmentation"),
    Mutation("octaves of a zoom", "augmentation", "octaves:float=0.2,", "octaves:float=0.25,", "augmentation"),
    Mutation("an eighth of the size", "augmentation", "fraction:float=0.125,", "fraction:float=0.12,", "augmentation"),
    Mutation("centre of the filter", "augmentation", "2*t + shift + (n - 1)", "2*t + (n - 1)", "augmentation"),
    # chapter 10 and its rooms: bytes, orientation, layout, bounds
    Mutation("bytes to floats", "data", "images.float() / 127.5 - 1", "images.float() / 128 - 1", "data"),
    Mutation("floats to bytes", "data", "x * 127.5 + 128", "x * 127.5 + 127.5", "data"),
    Mutation("EXIF 7", "images", "if turn in (6, 7)", "if turn in (6, 8)", "data"),
    Mutation("square images have two equal axes", "arrays", "first = b == c != a", "first = a == c != b", "data"),
    Mutation("classes are bounded", "data", "MAX_CLASSES = 2**16", "MAX_CLASSES = 2**33", "data"),
    Mutation("decoded bytes are bounded", "archives", "2**30 + 256 * size", "2**40 + 256 * size", "data"),
    # chapter 04: the rows that are younger than the paper
    Mutation("angle of v-prediction", "training", "(math.pi/2 * (epsilon_t + (1 - 2*epsilon_t) * u)).tan()", "(math.pi/2 * (epsilon_t + (1 - epsilon_t) * u)).sin()", "loss"),
    Mutation("weight of flow matching", "training", "return (1 + 1/sigma)**2", "return 1 + 1/sigma**2", "loss"),
    Mutation("weight of v-prediction", "training", "return 1 + sigma**-2", "return sigma**-2", "loss"),
    Mutation("logit of a time", "training", "lognormal_quantile(u, mean, std).log().sigmoid()", "lognormal_quantile(u, mean, 2*std).log().sigmoid()", "loss"),
    # rooms 42 and 45: networks that the book did not write, weights that it did not train
    Mutation("own network, scale per channel", "training", "sigma_data = channels.reshape(", "sigma_data = channels.flip(0).reshape(", "own"),
    Mutation("own network, what may be imported", "own_network", 'table["import"] in names', "table", "own"),
    Mutation("own network, labels of other classes", "finetuning", "math.sqrt(theirs.shape[1]/own.shape[1])", "(theirs.shape[1]/own.shape[1])", "own"),
    # rooms 41 and 43: what other packages call the same thing
    Mutation("levels of a DDPM pipeline", "interop", "((1 - alphas)/alphas).sqrt().tolist()", "(1 - alphas).sqrt().tolist()", "interop"),
    Mutation("time of a flow pipeline", "interop", 'float(config.get("num_train_timesteps", 1000))', "1.0", "interop"),
    Mutation("no class of a UNet", "interop", "numbers.where(total > 0, none)", "numbers", "interop"),
    Mutation("sigma_data of a scheduler", "interop", "sigma_data=denoiser.sigma_data, rho=rho", "rho=rho", "interop"),
    Mutation("rho of a scheduler", "interop", "sigma_data=denoiser.sigma_data, rho=rho", "sigma_data=denoiser.sigma_data", "interop"),
    Mutation("scale of azula's state", "interop", "self.denoise(x_t / column,", "self.denoise(x_t,", "interop"),
    Mutation("level of azula's time", "interop", "(sigma/alpha).to(x_t.device)", "sigma.to(x_t.device)", "interop"),
    Mutation("scale of a state for azula", "interop", "self.denoiser(column * x,", "self.denoiser(x,", "interop"),
    Mutation("level of a batch for k-diffusion", "interop", "model(x.to(dtype), sigma.expand(x.shape[0])", "model(x.to(dtype), sigma", "interop"),
    Mutation("score of other weights", "hub", "measured != file_hash(file)", "False", "interop"),
    Mutation("budget of a pickle", "pickles", "machine.budget -= len(args[0])", "machine.budget -= 1", "pickles"),
    # chapter 04, what it takes from EDM2
    Mutation("edm2, learned weight", "training", "loss * (-v).exp() + v", "loss * (-v).exp() + 2*v", "edm2"),
    Mutation("edm2, factor of a power average", "training", "(seen / (seen + batch))**(gamma + 1)", "(seen / (seen + batch))**gamma", "edm2"),
    Mutation("edm2, width of a profile", "training", "(gamma + 1) / ((gamma + 2)**2 * (gamma + 3))", "(gamma + 1) / ((gamma + 2)**2 * (gamma + 2))", "edm2"),
    Mutation("edm2, product of profiles", "training", "(gamma_2 + 1) / (gamma + gamma_2 + 1) * share", "(gamma_2 + 1) / (gamma + gamma_2) * share", "edm2"),
    # chapter 05
    Mutation("likelihood, freedom", "likelihood", "A - (d - trace)", "A - (d + trace)", "likelihood"),
    Mutation("prior of the likelihood", "likelihood", "d * math.log(sigma * math.sqrt(2*math.pi))", "d * math.log(sigma * math.sqrt(math.pi))", "likelihood"),
    Mutation("scale at the start of the likelihood", "likelihood", " * flow.at(times[0])[2]", "", "likelihood"),
    Mutation("likelihood, signs of probes", "likelihood", "torch.where(v >= 0, 1.0, -1.0)", "torch.where(v >= 0, 1.0, -0.9)", "likelihood"),
    Mutation("likelihood, standard error", "likelihood", "estimates.std(1) / math.sqrt(estimates.shape[1])", "estimates.std(1) / estimates.shape[1]", "likelihood"),
    Mutation("likelihood, offset of bits", "likelihood", "(d * math.log(2)) - math.log2(bin_width)", "(d * math.log(2)) + math.log2(bin_width)", "likelihood"),
    Mutation("likelihood, dequantisation", "likelihood", "bin_width * (u.to(x) - 0.5)", "bin_width * u.to(x)", "likelihood"),
]


def mutated(text, old, new):
    "`text` with its one occurrence of `old` replaced, spaces ignored. LookupError where there is none, or more than one."
    pattern = r"\s*".join(re.escape(token) for token in re.findall(r"\w+|[^\w\s]", old))
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise LookupError(f"the text {old!r} occurs {len(found)} times, expected 1: bring tests/mutate.py up to date")
    return text[:found[0].start()] + new + text[found[0].end():]


def copy_package(folder, mutation=None):
    "The package under `folder`, altered where a mutation is given."
    target = Path(folder) / "edm_nb"
    shutil.copytree(ROOT / "edm_nb", target, ignore=shutil.ignore_patterns("__pycache__"))
    if mutation:
        path = target / f"{mutation.module}.py"
        path.write_text(mutated(path.read_text(encoding="utf-8"), mutation.old, mutation.new), encoding="utf-8")


def run_tests(folder, group, log):
    "In a fork: import the package from `folder`, run the tests of a group, exit with pytest's code."
    import pytest
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    files, expression = GROUPS[group]
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        import edm_nb
        if not Path(edm_nb.__file__).is_relative_to(folder):
            raise RuntimeError(f"imported {edm_nb.__file__}, not the copy in {folder}")
        code = pytest.main([*QUICK, "-m", "not slow and not gpu and not cifar", "-k", expression, *files])
    log.write_text(output.getvalue(), encoding="utf-8")
    os._exit(int(code))   # no clean-up of the parent's libraries in the fork


class Run:
    "One fork with its copy of the package."
    def __init__(self, group, folder, mutation=None):
        self.group, self.mutation, self.folder = group, mutation, Path(folder)
        self.name = mutation.name if mutation else f"unaltered, {group}"
        copy_package(self.folder, mutation)
        self.log = self.folder / "log.txt"
        self.process = multiprocessing.get_context("fork").Process(target=run_tests, args=(self.folder, group, self.log))
        self.process.start()
        self.started = time.monotonic()

    def verdict(self):
        "None while it runs, then '' for what should be and a complaint for what should not."
        if self.process.is_alive():
            return None
        self.process.join()
        code, wanted = self.process.exitcode, TESTS_FAILED if self.mutation else 0
        if code == wanted or (self.mutation and code == -signal.SIGXCPU):   # a loop that no longer ends was noticed
            return ""
        tail = self.log.read_text(encoding="utf-8")[-1500:] if self.log.exists() else "(no output)"
        if self.mutation and code == 0:
            return f"SURVIVED: {self.mutation.old!r} -> {self.mutation.new!r} passes {GROUPS[self.group]}"
        return f"exit code {code}, expected {wanted}\n{tail}"


def run_all(tasks, jobs):
    "Run (group, mutation) pairs, some at a time; returns the complaints."
    complaints, waiting, running = [], list(tasks), []
    with tempfile.TemporaryDirectory(prefix="edm_nb_mutate_") as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(folder, "hypothesis")
        while waiting or running:
            while waiting and len(running) < jobs:
                group, mutation = waiting.pop(0)
                running.append(Run(group, tempfile.mkdtemp(dir=folder), mutation))
            wait([run.process.sentinel for run in running], timeout=1)
            for run in list(running):
                verdict = run.verdict()
                if verdict is None:
                    continue
                running.remove(run)
                print(f"{'ok ' if not verdict else 'BAD'} {run.name:32s} {time.monotonic() - run.started:5.1f} s", flush=True)
                if verdict:
                    complaints.append(f"{run.name}: {verdict}")
                shutil.rmtree(run.folder)
    return complaints


def main(argv=None):
    "Command line; returns the exit status."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the mutations whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if args.only in m.name]
    if args.list:
        print("\n".join(f"{m.name:32s} {m.module:16s} {m.old}  ->  {m.new}" for m in chosen))
        return 0
    if not chosen:
        print(f"no mutation's name contains {args.only!r}; see --list", file=sys.stderr)
        return 2
    for m in chosen:   # a stale target is found before any time is spent
        try:
            mutated((ROOT / "edm_nb" / f"{m.module}.py").read_text(encoding="utf-8"), m.old, m.new)
        except LookupError as error:
            print(f"{m.name} in edm_nb/{m.module}.py: {error}", file=sys.stderr)
            return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in ("torch", "numpy", "pytest", "hypothesis", "scipy.stats"):   # once, for all forks
        __import__(name)
    sys.modules["torch"].set_num_threads(1)
    started = time.monotonic()
    groups = sorted({m.group for m in chosen})
    complaints = run_all([(group, None) for group in groups], args.jobs)
    if not complaints:
        complaints = run_all([(m.group, m) for m in chosen], args.jobs)
    print(f"{len(chosen)} mutations, {len(complaints)} complaints, {time.monotonic() - started:.0f} s")
    for complaint in complaints:
        print("\n" + complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
