"""One update under the profiler: which kernels take its time, how many are launched, and how long the device waits for the host."""
import time

from torch.autograd import DeviceType
from torch.profiler import profile as profiler, ProfilerActivity

from edm_nb.randomness import IndexStream
from edm_nb.runs import to_device
from edm_nb.updates import compiled, make_batch, new_state, train_step
from record import wait
from studies.gpu.report import tf32
from studies.gpu.setups import NETWORKS

TOP, UPDATES = 20, 2            # kernels listed; updates under the profiler


def covered(intervals):
    "Length of the union of (start, end) pairs, and the gaps between its parts, the longest first."
    busy, gaps, end = 0.0, [], None
    for start, stop in sorted(intervals):
        if end is not None and start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - (start if end is None else max(start, end)))
        end = stop if end is None else max(end, stop)
    return busy, sorted(gaps, reverse=True)


def grouped(pairs):
    "(name, microseconds) pairs, summed by name: name, count and ms per update, share of all; the largest first."
    sums, total = {}, sum(spent for _, spent in pairs)
    for name, spent in pairs:
        count, before = sums.get(name, (0, 0.0))
        sums[name] = count + 1, before + spent
    return [dict(name=name[:160], count=count / UPDATES, ms=spent / UPDATES / 1e3, share=spent / total)
            for name, (count, spent) in sorted(sums.items(), key=lambda item: -item[1][1])]


def digest(events, on_device):
    "What the profiler saw, per update. On a CPU the operators stand in for kernels: by their own time, and the outermost for busy."
    events = [event for event in events if not event.is_user_annotation]
    host = [event for event in events if event.device_type == DeviceType.CPU]
    if on_device:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        work = [(event.name, event.time_range.elapsed_us()) for event in kernels]
        launches = [event for event in host if "Launch" in event.name and event.name.startswith(("cuda", "cu"))]
    else:
        kernels = [event for event in host if event.cpu_parent is None]
        work = [(event.name, event.self_cpu_time_total) for event in host]
        launches = kernels
    if not kernels:
        raise RuntimeError("the profiler saw no kernel; is CUPTI there, and may this user read its counters?")
    busy, gaps = covered([(event.time_range.start, event.time_range.end) for event in kernels])
    found = grouped(work)
    return dict(launches=len(launches) / UPDATES, kernels=sum(row["count"] for row in found), busy_ms=busy / UPDATES / 1e3,
                gaps=len(gaps) / UPDATES, gap_ms=sum(gaps) / UPDATES / 1e3, longest_gaps_ms=[gap / 1e3 for gap in gaps[:5]],
                distinct=len(found), top=found[:TOP])


def one_profile(report, network, how, batch):
    "Time updates without the profiler, then look at some with it."
    device, data = report.device, to_device(report.data("train"), report.device)
    config = NETWORKS[network](report, batch=batch, precision="fp32" if report.toy else "bf16", channels_last=True)
    state, order = new_state(config, data, device), IndexStream(len(data), 0)
    forward = compiled(state.denoiser, how, **(dict(backend="eager") if report.toy and how == "blocks" else {}))
    repeats = 2 if report.toy else 10

    def update():
        train_step(forward, state, make_batch(config, data, order, state.images, device))
    with tf32(True):
        start = time.perf_counter()
        update()
        wait(device)
        first = time.perf_counter() - start
        for _ in range(UPDATES):
            update()
        wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            update()
        host = time.perf_counter() - start      # the host is free again; it waits itself where the device's queue is full
        wait(device)
        whole = time.perf_counter() - start
        on_device = device.type == "cuda"
        with profiler(activities=[ProfilerActivity.CPU] + on_device * [ProfilerActivity.CUDA]) as seen:
            for _ in range(UPDATES):
                update()
            wait(device)
    return dict(parameters=sum(p.numel() for p in state.denoiser.parameters()), first_step_seconds=round(first, 1),
                step_ms=1e3 * whole / repeats, host_ms=1e3 * host / repeats, n=repeats, images_per_second=config.batch * repeats / whole,
                profiled_updates=UPDATES, **digest(seen.events(), on_device))


def profile(report):
    "Where one update of the 56 M and of the 14 M network goes: top kernels, launches, host time, gaps."
    batch = 8 if report.toy else 512
    cells = [dict(network=network, how=how, batch=batch) for how, network in (("fused", "14 M"), ("fused", "56 M"), ("none", "14 M"), ("none", "56 M"))]
    return dict(rows=report.rows("profile", cells, lambda cell: one_profile(report, **cell)), precision="fp32" if report.toy else "bf16")
