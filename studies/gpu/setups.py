"""The two networks of the report, at their real and at their toy size, and whether they compile here."""
import dataclasses
import time

from edm_nb.configs import PRESETS
from edm_nb.randomness import IndexStream
from edm_nb.updates import compiled, how_to_compile, make_batch, new_state, train_step
from record import wait
from studies.gpu.session import in_words


def model_config(report, **changes):
    "The configuration that is trained for the book: the preset, but the clock ends it and the average knows no fixed half-life."
    if report.toy:
        changes = {"batch": 16, **changes, "images": 96, "log_every": 16, "save_every": 32, "lr_rampup": 16, "compile": "none",
                   "precision": "fp32", "network": dict(arch="ddpmpp", model_channels=8, channel_mult=[1, 1], num_blocks=1,
                                                        attn_resolutions=[], dropout=0.0)}
    else:
        changes = {"images": 10**9, "log_every": 102_400, "save_every": 512_000, "augment": 0.0, "xflip": True, **changes}      # by hand
    return dataclasses.replace(PRESETS["cifar10-25min"], grid_every=0, seed=report.args.seed, **changes)


def training_config(report, **changes):
    "The paper's CIFAR-10 configuration, or a toy of it."
    config = PRESETS["cifar10-cond-ddpmpp"]
    if report.toy:
        changes = {**changes, "batch": 8, "network": dict(arch="ddpmpp", model_channels=16, channel_mult=[1, 2], num_blocks=1,
                                                          attn_resolutions=[16], dropout=0.0)}
    return dataclasses.replace(config, **changes)


NETWORKS = {"56 M": training_config, "14 M": model_config}


def can_compile(report, config, data):
    "The configuration, without `compile` where that fails, and the seconds it took; a later training of it starts compiled."
    start = time.perf_counter()
    how = how_to_compile(config, report.device)
    if how != "none":
        try:
            state = new_state(config, data, report.device)
            train_step(compiled(state.denoiser, how), state, make_batch(config, data, IndexStream(len(data), 0), 0, report.device))
            wait(report.device)
        except Exception as error:
            report.compile_errors.append(in_words(error))
            print(f"  no torch.compile: {report.compile_errors[-1]}", flush=True)
            config = dataclasses.replace(config, compile="none")
    return config, round(time.perf_counter() - start, 1)
