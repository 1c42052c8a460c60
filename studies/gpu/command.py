"""Everything that the book owes a GPU, in one resumable run: the command line.

    python -m studies.gpu --data cifar10-train.zip --test cifar10-test.zip        # one CUDA machine; or python studies/gpu/__main__.py
    python -m studies.gpu --toy --device cpu --out /tmp/report                    # the same code at toy size

Each stage writes its own file under --out (default results/gpu) as it ends, with hardware, versions, seed and date; its module
has its name. The most valuable first:

    kernels       our kernels against float64, a recorded update against a launched one
    tilings       our norm kernels in every layout, beside PyTorch's
    profile       one update of the 56 M and of the 14 M network: top kernels, launches, host time, gaps
    correctness   networks, gradients, loss, samplers and augmentation on the device against float64 on the CPU
    training      ms and images/s of the paper's 56 M network, from plain fp32 to bf16 + channels-last + compile
    sampling      images/s of 18 Heun steps, and how much of the time lies inside the network
    trials        short trainings of variants, to choose what the budget is spent on
    model         the training itself with its snapshots, the weights, and the Fréchet distance of each
    study         distance against evaluations, the rows of Table 1, the churn grid
    artefacts     sample grid, nearest neighbours, Langevin strips
    levels        loss against noise level on test photographs, before and after

Time. It says beforehand what it will do and for how long. A stage takes at most four minutes, the training of `model` excepted
(--minutes): it starts no row for which its time is too short (--limit study=600) and says which rows it left out; `--redo study`
measures those and keeps the others. A machine that is lent in short calls gets --stop-after SECONDS: the command then ends with exit
code 3 between two rows, and the same command goes on where it stopped, inside a training too. A stage whose file is there is not run
again. A stage or row that fails is recorded and the rest still runs; the exit code is 1. `study`, `artefacts` and `levels` need
nothing but weights.safetensors, so they may run on another day, on another machine, and with --device cpu on one without a GPU. --bundle FOLDER packs what is to be kept into parts of at
most --part-mb each: `cat FOLDER/report.tar.* | tar x`.

The distance is `cifar-features`, never an FID, and the images it is measured against may be JPEG-recoded: it compares with
other numbers of this report only.
"""
import argparse
import sys
import traceback
from pathlib import Path

import torch

from record import ROOT
from studies.gpu.artefacts import artefacts
from studies.gpu.correctness import correctness
from studies.gpu.kernels import kernels
from studies.gpu.levels import levels
from studies.gpu.model import model
from studies.gpu.profiling import profile
from studies.gpu.report import Report
from studies.gpu.sampling import sampling
from studies.gpu.session import bundle, LIMITS, OutOfTime
from studies.gpu.study import study
from studies.gpu.tilings import tilings
from studies.gpu.training import training
from studies.gpu.trials import TRIALS, trials

STAGES = (kernels, tilings, profile, correctness, training, sampling, trials, model, study, artefacts, levels)
ANYWHERE = {"study", "artefacts", "levels"}       # need the weights alone, and may run on a CPU if that is asked for


def seconds_of(text):
    "`stage=seconds` of --limit."
    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{name!r} is no stage; expected one of {', '.join(LIMITS)}, as in study=600")
    return name, float(value)


def parse(arguments=None):
    "Command line."
    names = [stage.__name__ for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m studies.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="training images: an EDM zip, a folder, an npz; default: CIFAR-10 where the package finds it")
    parser.add_argument("--test", help="test images, for the floor")
    parser.add_argument("--out", default=str(ROOT / "results/gpu"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--redo", nargs="*", choices=names, default=[], help="stages to run again although their file is there")
    parser.add_argument("--minutes", type=float, default=12, help="training time of the model")
    parser.add_argument("--choice", choices=list(TRIALS), help="what the model is, by hand and not by trials")
    parser.add_argument("--marks", type=float, nargs="*", default=[2, 5, 10], help="minutes at which a snapshot is taken on the way")
    parser.add_argument("--trial-minutes", type=float, default=0.75)
    parser.add_argument("--samples", type=int, default=50_000, help="samples behind the final distances")
    parser.add_argument("--curve-samples", type=int, default=10_000, help="samples behind every other distance of the model")
    parser.add_argument("--study-samples", type=int, default=5_000, help="samples per cell of the study")
    parser.add_argument("--level-images", type=int, default=1_000, help="images per noise level and seed of `levels`")
    parser.add_argument("--sample-batch", type=int, default=500)
    parser.add_argument("--search", action="store_true", help="let cuDNN try its algorithms at each new shape: slower to start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=seconds_of, nargs="*", default=[], metavar="STAGE=SECONDS", help=f"other than {LIMITS}")
    parser.add_argument("--stop-after", type=float, default=0, metavar="SECONDS", help="end this call, to be called again; 0: never")
    parser.add_argument("--bundle", help="folder for the packed results, also when the call ends early")
    parser.add_argument("--part-mb", type=float, default=15)
    parser.add_argument("--toy", action="store_true", help="toy sizes: minutes on a CPU; its numbers mean nothing")
    args = parser.parse_args(arguments)
    args.limit = dict(args.limit)
    return args


def main():
    "Run the stages; 0: all is well, 1: something failed, 3: call again."
    args = parse()
    if torch.device(args.device).type != "cuda" and not args.toy and not set(args.stages) <= ANYWHERE:
        sys.exit("studies.gpu: no CUDA device; add --toy to rehearse the same code at toy size on the CPU, or ask for no more than "
                 f"--stages {' '.join(sorted(ANYWHERE))}")
    torch.backends.cudnn.benchmark = args.search               # all shapes are fixed: cuDNN may try its algorithms once
    torch._dynamo.config.automatic_dynamic_shapes = False      # one graph per shape: a second batch size must not slow the first
    torch._dynamo.config.recompile_limit = 64                  # past the limit code would run eagerly, with no more than a warning
    torch.manual_seed(args.seed)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    report, failed = Report(args), []
    by_name = {stage.__name__: stage for stage in STAGES}
    chosen = [by_name[name] for name in args.stages]          # in the order that was asked for
    print(report.outlook(chosen), flush=True)
    try:
        for stage in chosen:
            try:
                result = report.run(stage)
                if any("failed" in row for row in result.get("rows", [])) or result.get("passed") is False:
                    failed.append(stage.__name__)
            except OutOfTime:
                print(f"{stage.__name__}: out of time; the same command goes on from here", flush=True)
                sys.exit(3)
            except Exception:
                traceback.print_exc()
                failed.append(stage.__name__)
    finally:
        if args.bundle:
            print(bundle(args.out, args.bundle, args.part_mb), flush=True)
    if failed:
        sys.exit(f"studies.gpu: failed, see above and the files: {', '.join(failed)}")
