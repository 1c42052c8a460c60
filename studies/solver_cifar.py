"""Solvers at equal evaluations on the CIFAR-10 network: how far each image ends from the exact end of its path.

    python studies/solver_cifar.py --images 4       # results/solver_cifar.json; a quarter of an hour of one core

A Fréchet distance needs thousands of images, which needs a GPU; the truncation error of single images does not. Every method starts
from the same noise, so the errors are paired. The exact end comes from 72 Heun steps; their own error is estimated from 36.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from record import hardware_line, now, RESULTS, versions, write_json

from edm_nb import checkpoints
from edm_nb.files import file_hash
from edm_nb.generation import Sampling, generate
from edm_nb.ode_solvers import count_nfe
from edm_nb.randomness import SeededNoise

METHODS = {"Euler": "euler", "Heun": "heun", "multistep 3": "ab3", "DPM++(2M)": "dpmpp_2m"}
BUDGETS = (5, 9, 19, 39)        # odd, so that Heun's 2N − 1 meets each exactly


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RESULTS / "gpu" / "weights.safetensors")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--exact", type=int, default=72, help="Heun steps of the reference")
    parser.add_argument("--out", type=Path, default=RESULTS / "solver_cifar.json")
    args = parser.parse_args()
    denoise, start = checkpoints.load(args.model).float().eval().to(memory_format=torch.channels_last), time.process_time()
    def first_noise(seeds):
        return SeededNoise(seeds).randn([len(seeds), 3, 32, 32])
    def run(through, steps, solver="heun"):
        (_, x, _), = generate(denoise, range(args.images), Sampling(steps, solver=solver), range(10), batch=args.images, as_bytes=False,
                              noise=first_noise, through=through)
        return x
    exact, half = run(denoise, args.exact), run(denoise, args.exact // 2)
    error = lambda x: (x - exact).flatten(1).square().mean(1).sqrt().tolist()  # noqa: E731
    record = dict(about=__doc__.splitlines()[0], model=args.model.name, model_sha256=file_hash(args.model), n=args.images, seeds=list(range(args.images)),
                  reference=f"{args.exact} Heun steps", reference_error=[e / 3 for e in error(half)], rows=[],
                  hardware=hardware_line(), date=now(), versions=versions())
    for budget in BUDGETS:
        for name, solver in METHODS.items():
            counter = count_nfe(denoise)
            x = run(counter, (budget + 1) // 2 if name == "Heun" else budget, solver)
            record["rows"].append(dict(method=name, nfe=counter.nfe, error=error(x)))
            record["cpu_seconds"] = round(time.process_time() - start, 1)
            write_json(args.out, record)
            print(record["rows"][-1], record["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
