"""Short trainings that choose what the model's budget is spent on."""
import dataclasses
import math
import time

from edm_nb.ode_solvers import edm_sigmas
from edm_nb.randomness import IndexStream, stream_seed
from edm_nb.runs import to_device
from edm_nb.training import EMA, ema_beta
from edm_nb.updates import compiled, ema_denoiser, how_to_compile, new_state, updater
from studies.gpu.session import good
from studies.gpu.setups import can_compile, model_config

TRIALS = {                      # what is tried for `--trial-minutes` each, the most promising first
    "lr 2e-3": {"lr": 2e-3},
    "preset": {},
    "augmentation": {"augment": 0.12, "xflip": False},
    "fewer channels at 32×32": {"network": {"arch": "ddpmpp", "model_channels": 96, "channel_mult": [1, 2, 2], "num_blocks": 3,
                                            "attn_resolutions": [16], "dropout": 0.0}},     # 20 M, 9.8 GFLOP
    "batch 256": {"batch": 256},
}
RAMPUP, SAMPLES = 50_000, 2_000     # of a trial: its warm-up in images, and the samples behind its distance
EMA_SHARES = (0.05, 0.02, 0.1, 0.2)     # half-life of the average in shares of the images seen; the first is the preset's


def trial(report, cell):
    "Train one variant for the trial's time, the compiler's not counted; the distance of its averages."
    shares = cell["shares"]
    config = model_config(report, ema_halflife=1e12, ema_rampup=shares[0], **TRIALS[cell["trial"]])
    if not report.toy:
        config = dataclasses.replace(config, lr_rampup=RAMPUP)
    data = to_device(report.data("train"), report.device)
    config, compiling = can_compile(report, config, data)
    state = new_state(config, data, report.device)
    averages = {shares[0]: state.ema, **{share: EMA(state.denoiser) for share in shares[1:]}}
    how = how_to_compile(config, report.device)
    forward = compiled(state.denoiser, how)
    order, start = IndexStream(len(data), stream_seed(config.seed, "order")), time.perf_counter()
    update = updater(forward, state, data, order, report.device)
    seconds, loss, losses = 60 * report.args.trial_minutes, math.nan, []
    while state.images < config.images and time.perf_counter() - start < seconds:
        for _ in range(2 if report.toy else 20):      # between two looks at the clock
            seen = state.images
            loss = update()[0]
            for share in shares[1:]:
                averages[share].update(state.denoiser, ema_beta(config.batch, math.inf, seen, share))
        losses.append(float(loss))                    # waits for the device
    spent, distances = time.perf_counter() - start, {}
    for share, ema in averages.items():
        state.ema = ema
        found = report.distance(report.fast(ema_denoiser(state)), 8 if report.toy else SAMPLES, edm_sigmas(18))
        distances[str(share)] = found["distance"]
    return dict(distance=distances[str(EMA_SHARES[0])], distances=distances, n=found["n"], NFE=35, images=state.images,
                loss=sum(losses[-10:]) / len(losses[-10:]), seconds=round(spent, 1), compile_seconds=compiling, compiled=how,
                images_per_second=state.images / spent)


def trials(report):
    "Short trainings of every variant at equal time; every average of the first one."
    names = list(TRIALS)[:2] if report.toy else list(TRIALS)
    rows = report.rows("trials", [dict(trial=name, shares=list(EMA_SHARES) if name == names[0] else [EMA_SHARES[0]])
                                  for name in names], lambda cell: trial(report, cell))
    found = good(rows)
    if not found:
        raise RuntimeError("no trial was measured")
    first = next((row["distances"] for row in found if row["trial"] == names[0]), {str(EMA_SHARES[0]): 0.0})
    return dict(rows=rows, minutes=report.args.trial_minutes, best=min(found, key=lambda row: row["distance"])["trial"],
                ema_share=float(min(first, key=first.get)))
