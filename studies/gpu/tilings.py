"""The norm kernels layout by layout: how many channels and pixels a program holds, and how many threads share them."""
import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import profile as profiler, ProfilerActivity

from edm_nb import kernels
from edm_nb.layers import GroupNorm
from record import wait
from studies.gpu.report import clock

MAPS = [(128, 32), (128, 16), (128, 8), (256, 32), (256, 16), (256, 8)]      # channels and resolution, of both networks
LAYOUTS = {32: [(16, 1024, 8), (16, 1024, 16), (16, 1024, 32), (32, 1024, 32), (64, 64, 8), (64, 64, 4), (32, 128, 8), (32, 64, 4), (64, 32, 4)],
           16: [(64, 256, 16), (64, 256, 8), (32, 256, 8), (32, 256, 4), (16, 256, 4), (64, 64, 8), (64, 64, 4), (64, 32, 4)],
           8: [(64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 64, 16), (32, 64, 4), (32, 64, 2), (16, 64, 2)]}       # lanes, rows, warps
CALLS = 5


@contextlib.contextmanager
def laid_out(layout):
    "Kernels with this layout in place of their own; None: their own."
    before = kernels.tiling
    if layout is not None:
        kernels.tiling = lambda channels, groups, pixels: kernels.fit(channels, groups, *layout)
    try:
        yield
    finally:
        kernels.tiling = before


def norm(cell, batch, device):
    "A norm with shift, SiLU and a skip, forwards and backwards, as a block uses it."
    C, r = cell["channels"], cell["resolution"]
    layer, generator = GroupNorm(C).to(device), torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    x = draw(batch, C, r, r).to(torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    shift, bias, dy = draw(batch, C).to(torch.bfloat16).requires_grad_(), draw(C).requires_grad_(), torch.randn_like(x)
    leaves = [x, shift, bias, layer.weight, layer.bias]

    def forward():
        if cell["layout"] == "PyTorch":
            h = x + (shift + bias)[:, :, None, None].to(x.dtype)
            return F.silu(F.group_norm(h, layer.groups, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)), x
        return kernels.norm_silu(x, layer, shift=shift, extra=bias)

    def both():
        y, again = forward()
        torch.autograd.grad([y, again], leaves, [dy, dy])
    return forward, both


def milliseconds(device, work):
    "What the kernels of one call take, by the profiler: at this size the host takes longer than they do."
    work()
    wait(device)
    if device.type != "cuda":
        return 1e3 * clock(device, work, CALLS, 1, 1)["median"]
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            work()
        wait(device)
    return sum(event.time_range.elapsed_us() for event in seen.events() if event.device_type == DeviceType.CUDA) / CALLS / 1e3


def one_layout(cell, batch, device):
    "Milliseconds of one layer's forward and backward pass."
    layout = tuple(cell["layout"]) if isinstance(cell["layout"], list) else None
    with laid_out(layout):
        forward, both = norm(cell, batch, device)
        with torch.no_grad():
            once = milliseconds(device, forward)
        whole = milliseconds(device, both)
    return dict(forward_ms=once, backward_ms=whole - once)


def prepare(cell):
    "Compile the kernels of a layout, in a process of its own."
    try:
        one_layout(cell, 2, torch.device("cuda"))
    except Exception as error:
        return f"{cell}: {error}"


def tilings(report):
    "Milliseconds of the norm kernels in every layout, beside PyTorch's own."
    maps = [(8, 4)] if report.toy else MAPS
    cells = [dict(channels=C, resolution=r, layout=layout) for C, r in maps
             for layout in (["PyTorch"] if report.toy else ["ours", "PyTorch", *map(list, LAYOUTS[r])])]
    if report.device.type == "cuda":
        with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
            for failure in pool.map(prepare, [cell for cell in cells if cell["layout"] != "PyTorch"]):
                if failure:
                    print(f"  {failure[:300]}", flush=True)
    batch = 2 if report.toy else 512
    return dict(rows=report.rows("tilings", cells, lambda cell: one_layout(cell, batch, report.device)), batch=batch, calls=CALLS)
