"""Training steps per second (forward, backward, Adam) of the networks, beside denoising-diffusion-pytorch's U-Net.

    python benchmarks/networks.py                     # the CPU, and CUDA where there is one
    python benchmarks/networks.py --rounds 3 --only digits --out /tmp/bench.json

Every row runs in a process of its own, because a peak of memory can be read only once; the rows take turns `--turns`
times, so that a busy machine slows all of them and not one. The peer is left out, with a note, where it is not installed.
Wall time depends on what else the machine does; `images_per_cpu_second` counts the processor time of the process and
depends on it much less.
"""
import argparse
import json
from pathlib import Path

import torch
from record import RESULTS, cores, hardware, in_own_process, memory, now, peak_memory, spread, timed, versions, write_json

# name: (task, batch, image shape, device, options)
SIZES = {"cifar": (64, (3, 32, 32)), "digits": (128, (1, 8, 8)), "paper": (128, (3, 32, 32))}


def ours(task, **options):
    from edm_nb.networks import ddpmpp, tiny
    make = dict(cifar=lambda: ddpmpp(model_channels=32, channel_mult=(1, 2, 2), num_blocks=1),      # 1.26 M parameters
                digits=lambda: tiny(), paper=lambda: ddpmpp(label_dim=0, augment_dim=9))
    net = make[task]()
    if options.get("channels_last"): net = net.to(memory_format=torch.channels_last)
    return torch.compile(net) if options.get("compile") else net


def peer(task, **options):
    from denoising_diffusion_pytorch import Unet
    mults, dim = dict(cifar=((1, 2, 2), 32), digits=((1, 2), 32), paper=((1, 2, 2, 4), 128))[task]
    return Unet(dim=dim, dim_mults=mults, channels=SIZES[task][1][0])


def rows(cuda, only):
    "Every (task, network, device, options) to measure."
    table = [("digits", "edm_nb", "cpu", {}), ("digits", "edm_nb", "cpu", dict(channels_last=True)),
             ("digits", "edm_nb", "cpu", dict(bf16=True)), ("digits", "peer", "cpu", {}),
             ("cifar", "edm_nb", "cpu", {}), ("cifar", "edm_nb", "cpu", dict(channels_last=True)),
             ("cifar", "edm_nb", "cpu", dict(channels_last=True, bf16=True)), ("cifar", "peer", "cpu", {})]
    if cuda: table += [("paper", "edm_nb", "cuda", {}), ("paper", "peer", "cuda", {}),
                       ("paper", "edm_nb", "cuda", dict(bf16=True, channels_last=True, compile=True))]
    return [row for row in table if only in (None, row[0])]


def measure(task, network, device, options, rounds, seed):
    "One turn of one row."
    torch.manual_seed(seed)
    batch, shape = SIZES[task]
    before = memory(device)
    net = (ours if network == "edm_nb" else peer)(task, **options).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x, y, t = torch.randn(batch, *shape), torch.randn(batch, *shape), torch.rand(batch)
    if options.get("channels_last"): x = x.contiguous(memory_format=torch.channels_last)
    x, y, t = x.to(device), y.to(device), t.to(device)
    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bool(options.get("bf16"))): out = net(x, t)
        (out.float() - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    times = timed({"step": step}, rounds, warmup=2, device=device)["step"]
    return dict(wall=[batch / s for s in times.wall], cpu=[batch / s for s in times.cpu],
                peak_MiB=(peak_memory(device) - before) / 2**20, parameters=sum(p.numel() for p in net.parameters()))


def turn(row, args):
    "One turn of one row in a process of its own; None where the peer is missing."
    try: return in_own_process(__file__, row, rounds=args.rounds, seed=args.seed, threads=args.threads)
    except RuntimeError as error:
        if "No module named 'denoising_diffusion_pytorch'" in str(error): return None
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=3, help="how often the rows take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--only", choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS/"bench_networks.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row: return print(json.dumps(measure(*json.loads(args.row), rounds=args.rounds, seed=args.seed)))

    table = rows(torch.cuda.is_available(), args.only)
    turns = [[turn(row, args) for row in table] for _ in range(args.turns)]
    results, missing = [], []
    for (task, network, device, options), runs in zip(table, zip(*turns)):
        if runs[0] is None: missing.append(f"{task}: denoising-diffusion-pytorch is not installed"); continue
        flat = lambda key: spread([v for run in runs for v in run[key]])
        results.append(dict(task=task, network="denoising-diffusion-pytorch" if network == "peer" else network, device=device,
                            options=options, batch=SIZES[task][0], image=SIZES[task][1], parameters=runs[0]["parameters"],
                            n=args.rounds * args.turns, images_per_second=flat("wall"),
                            images_per_cpu_second=flat("cpu") if device == "cpu" else None,
                            peak_MiB=max(run["peak_MiB"] for run in runs)))
        r = results[-1]
        print(f"{task:7s} {r['network']:28s} {device} {json.dumps(options):50s} {r['parameters']:>11,} parameters "
              f"{r['images_per_second']['median']:8.1f} images/s {r['peak_MiB']:7.0f} MiB")
    for line in missing: print("left out:", line)
    write_json(args.out, dict(what="one training step: forward, backward, Adam", seed=args.seed, rows=results, missing=missing,
                              versions=versions("denoising-diffusion-pytorch"), date=now(), hardware=hardware()))


if __name__ == "__main__":
    main()
