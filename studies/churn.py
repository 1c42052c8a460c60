"""Chapter 02 on a trained network: what stirring does to digits, and what churn does to their Fréchet distance.

    python studies/churn.py stirring    # Langevin rounds at one level, learned and ideal denoiser: results/langevin.json
    python studies/churn.py quality     # few steps, with and without churn: results/churn_study.json
    python studies/churn.py maruyama    # Euler-Maruyama at equal evaluations: results/churn_maruyama.json
    python studies/churn.py fine        # 64 steps: S_noise and the range: results/churn_fine.json
    python studies/churn.py healing     # a wrong start, a half-trained network: results/churn_healing.json

A file grows setting by setting, and a second run goes on where the first one stopped (`--fresh` starts over). One thread
on purpose: the seconds in the files are seconds of one core.
"""
import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import RESULTS, hardware_line, now, versions, write_json

from edm_nb.checkpoints import load
from edm_nb.configs import PRESETS
from edm_nb.data import digits, one_hot, to_float, to_uint8
from edm_nb.features import feature_stats, pixels, stats_distance
from edm_nb.generation import generate, Sampling
from edm_nb.ode_solvers import Flow, edm_sigmas, heun
from edm_nb.oracles import IdealDenoiser
from edm_nb.randomness import SeededNoise
from edm_nb.runs import train
from edm_nb.stochastic import Churn, churn_gammas, churn_loop, langevin_states, MAX_GAMMA, sample, sample_sde, sample_states, song_beta
from edm_nb.updates import ema_denoiser


class Record:
    "A result file that grows setting by setting and is whole at every moment."

    def __init__(self, path, about, fresh=False, **more):
        self.path = path
        header = {"about": about, **more, "hardware": hardware_line(), "date": now(), "versions": versions()}
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not fresh else {}
        self.data = {**header, "results": old["results"] if old.get("about") == about else {}}

    def measure(self, key, function, *args, **more):
        "Run `function` unless its result is there already; say how long it took."
        if key in self.data["results"]: return
        start = time.process_time()
        self.data["results"][key] = {**function(*args, **more), "cpu_seconds": round(time.process_time() - start, 2)}
        write_json(self.path, self.data, indent=None)
        print(f"{self.path.name}: {key}  {self.data['results'][key]['cpu_seconds']} s", flush=True)


# ---------------------------------------------------------------- stirring (C20)

def look(D):
    "Three properties of every image, `[B, C, H, W]` -> name -> `[B]`; each can move in both directions for any denoiser."
    across, down = D[..., 1:] - D[..., :-1], D[..., 1:, :] - D[..., :-1, :]
    return {"contrast": D.flatten(1).std(1), "detail": (across.square().flatten(1).mean(1) + down.square().flatten(1).mean(1))/2,
            "extremes": (D.abs() > 0.95).double().flatten(1).mean(1)}


def energy_distance(a, b):
    "Of two sets of images, 0 in expectation where their distributions agree; without the zero distances of an image to itself."
    a, b = a.flatten(1), b.flatten(1)
    own = lambda x: torch.cdist(x, x).sum() / (len(x)*(len(x) - 1))
    return float(2*torch.cdist(a, b).mean() - own(a) - own(b))


def stirring(arguments):
    "Both denoisers from the same noisy digits with the same noise; all of it compared with where it began."
    n, rounds, pairs = (200, [0, 1, 3, 10, 30, 100, 300], 20) if not arguments.quick else (12, [0, 1, 2], 3)
    data = digits()
    images, network = to_float(data.images).double(), load(arguments.model)
    denoisers = {"learned": network, "ideal": IdealDenoiser(images, data.labels, data.label_dim)}
    record = Record(arguments.out/"langevin.json", f"Langevin rounds, gamma = sqrt(2) - 1, {n} digits drawn from the data, class-conditional "
                    f"{Path(arguments.model).name} and the ideal denoiser of the same digits", arguments.fresh, n=n, rounds=rounds)

    def draw(seed):
        "Digits drawn from the data, their labels, and the noise of their own seeds."
        picks = torch.randint(len(images), (n,), generator=torch.Generator().manual_seed(seed))
        return images[picks], one_hot(data.labels[picks], data.label_dim), SeededNoise(range(seed*n, (seed + 1)*n))

    def fresh(denoise, sigma, seed):
        "What the denoiser makes of a fresh, exact draw of p(x; sigma)."
        clean, labels, noise = draw(seed)
        return denoise(clean + sigma*noise.randn_like(clean), clean.new_tensor(sigma), class_labels=labels).double()

    def run(denoise, sigma, S_noise):
        clean, labels, noise = draw(0)
        x = clean + sigma*noise.randn_like(clean)
        reference, points, per_image = fresh(denoise, sigma, 1), [], {}
        for k, state in langevin_states(denoise, x, sigma, rounds, S_noise, randn_like=noise.randn_like, class_labels=labels):
            D = denoise(state, state.new_tensor(sigma), class_labels=labels).double()
            per_image[k] = look(D)
            points.append({"round": k, "energy": energy_distance(D, reference), **{name: float(v.mean()) for name, v in per_image[k].items()}})
        null = [energy_distance(fresh(denoise, sigma, 2*i + 2), fresh(denoise, sigma, 2*i + 3)) for i in range(pairs)]
        kept = {str(k): {name: [round(v, 4) for v in values.tolist()] for name, values in per_image[k].items()}
                for k in (rounds[0], rounds[-3], rounds[-1])}
        return {"sigma": sigma, "S_noise": S_noise, "points": points, "null": null, "per_image": kept}

    for sigma in (0.05, 0.2, 1.0, 4.0):
        for who, denoise in denoisers.items(): record.measure(f"{who}, sigma {sigma:g}, S_noise 1", run, denoise, sigma, 1.0)
    for sigma in (0.05, 1.0): record.measure(f"learned, sigma {sigma:g}, S_noise 1.007", run, network, sigma, 1.007)


# ---------------------------------------------------------------- quality (C17, C18, C19, C21)

def in_pieces(denoise, size=256):
    "The same denoiser, a piece of the batch at a time: what fits the processor's cache is done in two thirds of the time."
    def pieces(x, sigma, class_labels):
        return torch.cat([denoise(part, sigma, class_labels=labels) for part, labels in zip(x.split(size), class_labels.split(size), strict=True)])
    return pieces


class Digits:
    "Samples of one denoiser with the data's own labels, measured against the data: as many images as there are, pixel features."

    def __init__(self, denoise, seeds, n):
        self.denoise, self.seeds, self.n, self.data, self.paths = denoise, seeds, n, digits(), {}
        self.real = feature_stats(self.data, pixels())

    def distance(self, images): return float(stats_distance(feature_stats(to_uint8(images), pixels()), self.real))

    def noise(self, seed):
        "The streams of a seed's images and the first noise drawn from them."
        streams = SeededNoise(range(seed*self.n, (seed + 1)*self.n))
        return streams, streams.randn((self.n, *self.data.images.shape[1:]))

    def drawn(self, seed, sampling, noise, sampler):
        "A seed's images in float64, image k with label k, from noise and by a sampler that share the streams of `noise`."
        (_, images, _), = generate(self.denoise, range(seed*self.n, (seed + 1)*self.n), sampling, self.data.labels[:self.n].tolist(),
                                   batch=self.n, as_bytes=False, noise=noise, sampler=sampler, through=in_pieces(self.denoise))
        return images

    def plain(self, name, states, i):
        "State i of an ODE, kept: a run with churn shares all of it that comes before its first noise."
        states, known = self.paths.setdefault(name, (states, []))
        while len(known) <= i: known.append(next(states))
        return known[i]

    def churned(self, steps, gammas, S_noise, seed):
        first = next((i for i, gamma in enumerate(gammas) if gamma > 0), steps)
        streams, noise = self.noise(seed)
        def sampler(model, noise, levels, randn_like, **cond):
            x, flow = self.plain((steps, seed), sample_states(model, noise, levels, **cond), first), Flow(model, **cond)
            for x in churn_loop(flow, x, flow.prepare(levels)[first:], gammas[first:], heun, S_noise=S_noise, randn_like=streams.randn_like): pass
            return x
        return self.drawn(seed, Sampling(steps), noise, sampler)

    def algorithm_2(self, steps, churn):
        gammas = churn_gammas(edm_sigmas(steps), churn)
        values = [self.distance(self.churned(steps, gammas, churn.S_noise, seed)) for seed in self.seeds]
        top = churn.S_tmax if churn.S_tmax < math.inf else None
        return {"steps": steps, "S_churn": churn.S_churn, "S_tmin": churn.S_tmin, "S_tmax": top, "S_noise": churn.S_noise, "distances": values}

    def song_rate(self, steps):
        "Algorithm 2 with the noise of Song's SDE, as far as the cap allows."
        sigmas = edm_sigmas(steps).tolist()
        gammas = [min((t - t_next)/t, MAX_GAMMA) if t_next > 0 else 0.0 for t, t_next in zip(sigmas, sigmas[1:], strict=False)]
        return {"steps": steps, "distances": [self.distance(self.churned(steps, gammas, 1.0, seed)) for seed in self.seeds]}

    def euler_maruyama(self, steps):
        def images(seed):
            streams, noise = self.noise(seed)
            def sampler(model, noise, levels, randn_like, **cond):
                return sample_sde(model, noise, levels, song_beta(), streams.randn_like, **cond)
            return self.drawn(seed, Sampling(steps), noise, sampler)
        return {"steps": steps, "distances": [self.distance(images(seed)) for seed in self.seeds]}

    def wrong_start(self, steps, churn):
        "All images too bright by 0.3 at sigma = 2, an error that somebody made earlier."
        def images(seed):
            streams, noise = self.noise(seed)
            start = (to_float(self.data.images[:self.n]).double() + 0.3)/2.0 + noise
            def sampler(model, noise, levels, randn_like, **cond):
                return sample(model, noise, levels, churn, streams.randn_like, **cond)
            return self.drawn(seed, Sampling(steps, sigma_max=2.0), start, sampler)
        return {"steps": steps, "S_churn": churn.S_churn, "distances": [self.distance(images(seed)) for seed in self.seeds]}

    def floor(self):
        "Real images, drawn with replacement within each class, against all of them."
        values = []
        for seed in self.seeds:
            generator, picks = torch.Generator().manual_seed(seed), torch.empty(self.n, dtype=torch.int64)
            for k in range(self.data.label_dim):
                mine, pool = (self.data.labels[:self.n] == k).nonzero().flatten(), (self.data.labels == k).nonzero().flatten()
                picks[mine] = pool[torch.randint(len(pool), (len(mine),), generator=generator)]
            values.append(self.distance(to_float(self.data.images[picks])))
        return {"distances": values}


def early_network(images):
    "The digits network after a tenth of its training: a denoiser with errors that churn could heal."
    config = dataclasses.replace(PRESETS["digits"], images=images, lr_rampup=min(images, PRESETS["digits"].lr_rampup))
    with torch.enable_grad():
        for last in train(config, device="cpu"): pass
    return ema_denoiser(last.state).eval()


def opened(arguments, name, about):
    "Sizes, the record of a part, and a function that measures one cell of Algorithm 2 into it."
    n, seeds = (1797, range(5)) if not arguments.quick else (70, range(2))
    record = Record(arguments.out/name, f"{about}: Fréchet distance, pixel features, {n} samples with the data's labels against all 1797 digits, "
                    f"class-conditional {Path(arguments.model).name}, Heun, seeds 0 to {len(seeds) - 1}", arguments.fresh, n=n, seeds=list(seeds))

    def cell(who, samples, steps, churn):
        top = "inf" if churn.S_tmax == math.inf else f"{churn.S_tmax:g}"
        record.measure(f"{who}: N {steps}, S_churn {churn.S_churn:g}, [{churn.S_tmin:g}, {top}], S_noise {churn.S_noise:g}",
                       samples.algorithm_2, steps, churn)

    return n, seeds, record, cell


INSIDE = dict(S_tmin=0.05, S_tmax=1.0)   # the range published for CIFAR-10, VE


def quality(arguments):
    "Few steps, with and without churn."
    n, seeds, record, cell = opened(arguments, "churn_study.json", "few steps")
    trained = Digits(load(arguments.model), seeds, n)
    record.measure("floor", trained.floor)
    for S_churn in (0, 4): cell("trained", trained, 16, Churn(S_churn, **INSIDE))
    cell("trained", trained, 8, Churn(0, **INSIDE))


def maruyama(arguments):
    "Euler-Maruyama and Algorithm 2 at the same rate of noise and equal evaluations."
    n, seeds, record, _ = opened(arguments, "churn_maruyama.json", "equal evaluations")
    trained = Digits(load(arguments.model), seeds, n)
    for steps in (8, 16, 32):
        record.measure(f"Algorithm 2 at Song's rate: N {steps}", trained.song_rate, steps)
        record.measure(f"Euler-Maruyama: N {2*steps - 1}", trained.euler_maruyama, 2*steps - 1)


def fine(arguments):
    "64 steps, S_churn 16: S_noise, the range, and no churn."
    n, seeds, record, cell = opened(arguments, "churn_fine.json", "many steps")
    trained = Digits(load(arguments.model), seeds, n)
    for S_noise in (1.0, 1.007): cell("trained", trained, 64, Churn(16, **INSIDE, S_noise=S_noise))
    cell("trained", trained, 64, Churn(16, S_tmin=0.0, S_tmax=1.0))
    cell("trained", trained, 64, Churn(0))


def healing(arguments):
    "Where there is something to heal: a wrong start, and a network after a tenth of its training."
    n, seeds, record, cell = opened(arguments, "churn_healing.json", "healing")
    trained = Digits(load(arguments.model), seeds, n)
    for S_churn in (0, 6): record.measure(f"wrong start: N 16, S_churn {S_churn}", trained.wrong_start, 16, Churn(S_churn, S_tmin=0.05))
    early = Digits(early_network(40_000 if not arguments.quick else 256), seeds, n)
    for S_churn in (0, 4): cell("early", early, 16, Churn(S_churn, **INSIDE))
    cell("early", early, 16, Churn(4, S_tmin=0.05))


PARTS = {"stirring": stirring, "quality": quality, "maruyama": maruyama, "fine": fine, "healing": healing}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--model", default=str(RESULTS/"models"/"digits.safetensors"))
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="do not continue an earlier run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for part in arguments.parts: PARTS[part](arguments)


if __name__ == "__main__":
    main()
