"""Short trainings that choose what the model's budget is spent on."""
import math
import time

from edm_nb.ode_solvers import edm_sigmas
from edm_nb.randomness import IndexStream, stream_seed
from edm_nb.runs import to_device
from edm_nb.training import EMA, ema_beta
from edm_nb.updates import compiled, ema_denoiser, how_to_compile, make_batch, new_state, train_step
from record import wait
from studies.gpu.session import good
from studies.gpu.setups import can_compile, model_config

TRIALS = {                      # what is tried for `--trial-minutes` each, the most promising first
    "preset": {},
    "lr 2e-3": {"lr": 2e-3},
    "no augmentation": {"augment": 0.0, "xflip": True},
    "fewer channels at 32×32": {"network": {"arch": "ddpmpp", "model_channels": 96, "channel_mult": [1, 2, 2], "num_blocks": 3,
                                            "attn_resolutions": [16], "dropout": 0.0}},     # 20 M, 9.8 GFLOP
    "batch 256": {"batch": 256},
}
EMA_SHARES = (0.05, 0.02, 0.1, 0.2)     # half-life of the average in shares of the images seen; the first is the preset's


def trial(report, cell):
    "Train one variant for the trial's time, the compiler's not counted; the distance of its averages."
    config = model_config(report, **TRIALS[cell["trial"]])
    data = to_device(report.data("train"), report.device)
    config, compiling = can_compile(report, config, data)
    state = new_state(config, data, report.device)
    averages = {share: EMA(state.denoiser) for share in cell["shares"]}
    how = how_to_compile(config, report.device)
    forward = compiled(state.denoiser, how)
    order, start = IndexStream(len(data), stream_seed(config.seed, "order")), time.perf_counter()
    seconds, loss = 60 * report.args.trial_minutes, math.nan
    while state.images < config.images and time.perf_counter() - start < seconds:
        for _ in range(2 if report.toy else 20):      # between two looks at the clock
            beta = [ema_beta(config.batch, math.inf, state.images, share) for share in averages]
            loss = train_step(forward, state, make_batch(config, data, order, state.images, report.device))[0]
            for ema, b in zip(averages.values(), beta):
                ema.update(state.denoiser, b)
        wait(report.device)
    spent, distances = time.perf_counter() - start, {}
    for share, ema in averages.items():
        state.ema = ema
        found = report.distance(report.fast(ema_denoiser(state)), 8 if report.toy else 5_000, edm_sigmas(18))
        distances[str(share)] = found["distance"]
    return dict(distance=distances[str(EMA_SHARES[0])], distances=distances, n=found["n"], NFE=35, images=state.images,
                loss=float(loss), seconds=round(spent, 1), compile_seconds=compiling, compiled=how,
                images_per_second=state.images / spent)


def trials(report):
    "Short trainings of every variant at equal time; every average of the first one."
    names = list(TRIALS)[:2] if report.toy else list(TRIALS)
    rows = report.rows("trials", [dict(trial=name, shares=list(EMA_SHARES) if name == "preset" else [EMA_SHARES[0]])
                                  for name in names], lambda cell: trial(report, cell))
    found = good(rows)
    if not found:
        raise RuntimeError("no trial was measured")
    first = next((row["distances"] for row in found if row["trial"] == "preset"), {str(EMA_SHARES[0]): 0.0})
    return dict(rows=rows, minutes=report.args.trial_minutes, best=min(found, key=lambda row: row["distance"])["trial"],
                ema_share=float(min(first, key=first.get)))
