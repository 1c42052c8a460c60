"""The hand-written kernels, run by Triton's interpreter on the CPU, against PyTorch in float64; and what an update asks of the host.

The interpreter is chosen when Triton is imported, so the comparison is a program of its own."""
import collections
import copy
import dataclasses
import json
import os
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edm_nb import configs, runs, updates
from edm_nb.data import ImageSet
from edm_nb.layers import GroupNorm
from edm_nb.networks import Block, STYLES
from edm_nb.randomness import IndexStream

CPU = torch.device("cpu")
NORMS = [(2, 64, 8, 8, False, True, True), (2, 96, 4, 4, True, True, True), (3, 192, 5, 3, False, False, True),
         (2, 32, 16, 16, False, True, False), (1, 384, 12, 12, False, True, True), (2, 16, 1, 1, False, True, True),
         (1, 16, 64, 66, False, True, True), (1, 80, 40, 40, True, True, True)]       # the last two are too large to be read in one go


def relative(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))


def compare_norm(kernels, B, C, H, W, per_image, shifted, silu):
    "Errors of output and gradients; the data have a mean ten times their spread, where a sum of squares would lose digits."
    generator = torch.Generator().manual_seed(C + H)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    norm, x = GroupNorm(C), 2*draw(B, C, H, W) + 5*draw(C)[:, None, None] + 20
    leaves = dict(x=x, shift=draw(B, C) if shifted else None, extra=draw(C) if shifted else None, weight=0.3*draw(*([B] if per_image else []), C) + 1,
                  bias=draw(*([B] if per_image else []), C))
    ours = {k: v.clone(memory_format=torch.channels_last if v.ndim == 4 else torch.preserve_format).requires_grad_()
            for k, v in leaves.items() if v is not None}
    exact, direction = {k: v.detach().double().requires_grad_() for k, v in ours.items()}, draw(B, C, H, W)
    y, again = kernels.NormSiLU.apply(ours["x"], ours.get("shift"), ours.get("extra"), ours["weight"], ours["bias"], norm.groups, norm.eps, silu)
    h = exact["x"] + (exact["shift"] + exact["extra"])[:, :, None, None] if shifted else exact["x"]
    wide = lambda v: v[..., None, None]
    h = F.group_norm(h, norm.groups, eps=norm.eps)*wide(exact["weight"]) + wide(exact["bias"])
    Y = F.silu(h) if silu else h
    torch.autograd.backward([y, again] if shifted else y, [direction, direction.flip(0, 1)] if shifted else direction)
    torch.autograd.backward([Y, exact["x"]] if shifted else Y, [v.double() for v in (direction, direction.flip(0, 1))] if shifted else direction.double())
    return max([relative(y.detach(), Y.detach()), *(relative(ours[k].grad, exact[k].grad) for k in ours)])


def compare_block(kernels, style, inputs, outputs, direction, attend):
    "Errors of a whole block against its plain version in float64."
    torch.manual_seed(inputs + outputs)
    block = Block(inputs, outputs, 32, STYLES[style], direction, 0.0, attend=attend)
    for p in block.parameters(): p.data.normal_(0, 0.1)
    exact, x, emb = copy.deepcopy(block).double(), torch.randn(2, inputs, 8, 8), torch.randn(2, 32)
    mine = [x.contiguous(memory_format=torch.channels_last).requires_grad_(), emb.clone().requires_grad_()]
    theirs = [v.detach().double().requires_grad_() for v in mine]
    y, Y = kernels.residual(block, *mine), exact(*theirs)
    if block.heads: y = kernels.attended(block, y)
    towards = torch.randn_like(Y)
    y.backward(towards.float())
    Y.backward(towards)
    pairs = [(y.detach(), Y.detach()), *((a.grad, b.grad) for a, b in zip([*mine, *block.parameters()], [*theirs, *exact.parameters()]))]
    return max(relative(a, b) for a, b in pairs)


def compare_sum(kernels):
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    h, x, bias = draw(3, 72, 40, 40).contiguous(memory_format=torch.channels_last).requires_grad_(), draw(3, 72, 40, 40).requires_grad_(), draw(72).requires_grad_()
    y, wide = kernels.ScaledSum.apply(h, x, bias, 0.7), draw(3, 96, 40, 40).contiguous(memory_format=torch.channels_last)
    towards = wide[:, 8:80]       # some channels of a larger map, as the gradient of a concatenation is
    assert kernels.pixelwise(towards)[0] is towards and kernels.pixelwise(towards)[1] == 96 and kernels.pixelwise(towards.contiguous())[1] == 72
    y.backward(towards)
    return max(relative(y.detach(), (h + bias[:, None, None] + x).detach()*0.7), relative(h.grad, 0.7*towards), relative(x.grad, 0.7*towards),
               relative(bias.grad, 0.7*towards.sum((0, 2, 3))))


def compare_sizes(kernels):
    "Errors of halving and doubling and of their gradients, against PyTorch's in float64."
    errors = []
    for layer, plain in ((kernels.Halve, lambda v: F.avg_pool2d(v, 2)), (kernels.Double, lambda v: F.interpolate(v, scale_factor=2.0))):
        for C in (3, 72):
            x = torch.randn(2, C, 6, 10, generator=torch.Generator().manual_seed(C)).requires_grad_()
            exact = x.detach().double().requires_grad_()
            y, Y = layer.apply(x), plain(exact)
            towards = torch.randn(Y.shape, generator=torch.Generator().manual_seed(1))
            y.backward(towards)
            Y.backward(towards.double())
            errors += [relative(y.detach(), Y.detach()), relative(x.grad, exact.grad)]
    return max(errors)


def main():
    from edm_nb import kernels
    found = {f"norm {case}": compare_norm(kernels, *case) for case in NORMS} | {"sum": compare_sum(kernels), "sizes": compare_sizes(kernels)}
    table = torch.randn(2, 300, 50)
    found["column sums"] = relative(kernels.sums(table), table.double().sum(1))
    for style in ("ddpmpp", "ncsnpp", "adm"):
        for case in ((64, 64, "", False), (64, 128, "", True), (64, 64, "down", False), (64, 64, "up", True)):
            found[f"{style} {case}"] = compare_block(kernels, style, *case)
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, _ = kernels.NormSiLU.apply(x, None, None, torch.ones(8, requires_grad=True), torch.zeros(8), 2, 1e-6, True)
    try: torch.autograd.grad(y.square().sum(), x, create_graph=True)
    except RuntimeError as error: found["second derivative"] = str(error)
    print(json.dumps(found))


def test_kernels_give_outputs_and_gradients_of_pytorch_in_float64():
    pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux only")
    environment = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "no second derivative" in found.pop("second derivative")      # and not in silence without these layers
    assert len(found) == 23 and all(0 < error < 5e-6 for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_rates_of_a_recorded_update_do_not_depend_on_the_default_dtype(dtype):
    data = blobs()
    state = updates.new_state(SMALL, data, CPU)
    step = updates.Captured(state.denoiser, state, data, IndexStream(len(data), 0))
    torch.set_default_dtype(dtype)
    try: step()
    finally: torch.set_default_dtype(torch.float32)
    lr, beta = updates.rates(SMALL, 0)
    assert step.numbers.tolist() == torch.tensor([lr, 1 - beta], dtype=torch.float32).tolist()


def test_float64_is_left_to_pytorch():
    from edm_nb.layers import by_kernels
    where = lambda dtype, cuda, fused=True: by_kernels(SimpleNamespace(fused=fused), SimpleNamespace(dtype=dtype, is_cuda=cuda))
    assert where(torch.bfloat16, True) and where(torch.float32, True)
    assert not (where(torch.float64, True) or where(torch.float32, False) or where(torch.float32, True, fused=False))


SMALL = dataclasses.replace(configs.PRESETS["cifar10-25min"], batch=8, images=40, lr_rampup=16, log_every=40, save_every=0, precision="fp32", augment=0.5,
                            network=dict(arch="ddpmpp", model_channels=16, num_blocks=1, channel_mult=[1, 1], attn_resolutions=[16], dropout=0.1))


def blobs():
    generator = torch.Generator().manual_seed(0)
    return ImageSet(torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(32) % 10, "blobs", tuple("0123456789"))


def test_updates_that_read_their_numbers_from_memory_give_the_weights_of_launched_ones():
    data = blobs()
    plain, read = (updates.new_state(SMALL, data, CPU) for _ in range(2))
    order = IndexStream(len(data), 0)
    step = updates.Captured(read.denoiser, read, data, order)
    for k in range(6):
        torch.manual_seed(k)        # of the dropout
        one = updates.train_step(plain.denoiser, plain, updates.make_batch(SMALL, data, order, plain.images, CPU))
        torch.manual_seed(k)
        other = step()
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=1e-4, atol=1e-6)
    assert plain.images == read.images == 48
    for a, b in zip([*plain.denoiser.parameters(), *plain.ema.averages.values()], [*read.denoiser.parameters(), *read.ema.averages.values()]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)      # Adam divides what is near zero by itself


def test_an_update_reads_nothing_from_the_device():
    """A number that the host reads makes it wait, and no recording can hold it. On the CPU only checks look, which say that they do not
    elsewhere; a width of labels taken from the labels once made every update on a GPU wait."""
    data, read = blobs(), collections.Counter()
    state = updates.new_state(SMALL, data, CPU)
    step = updates.Captured(state.denoiser, state, data, IndexStream(len(data), 0))
    step()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
                own = [line for line in traceback.extract_stack() if f"{os.sep}edm_nb{os.sep}" in line.filename]
                read[own[-1].name if own else "elsewhere"] += 1
            return function(*args, **(kwargs or {}))
    with Watch(): step.work()
    assert set(read) <= {"one_hot", "require_noise_level", "apply"}, read     # each asks for the device first


def test_a_recording_is_refused_where_there_can_be_none():
    with pytest.raises(ValueError, match="cuda_graph=True needs one process on a CUDA device"):
        list(runs.train(dataclasses.replace(SMALL, cuda_graph=True), data=blobs(), device="cpu"))
    assert list(runs.train(dataclasses.replace(SMALL, cuda_graph=False), data=blobs(), device="cpu"))[-1].images == 40


def test_only_our_own_layers_are_marked_for_the_kernels():
    state = updates.new_state(SMALL, blobs(), CPU)
    plain = updates.ema_denoiser(state)
    marked = updates.compiled(copy.deepcopy(plain), "fused")
    count = sum(isinstance(m, (Block, GroupNorm)) for m in marked.modules())
    assert count == sum(getattr(m, "fused", False) for m in marked.modules()) > 0
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(marked(x, 1.0), plain(x, 1.0)) and list(marked.state_dict()) == list(plain.state_dict())   # on a CPU nothing changes


def test_a_run_that_diverges_says_where_nan_stands():
    state = updates.new_state(SMALL, blobs(), CPU)
    name, first = next(iter(state.denoiser.named_parameters()))
    assert runs.what_is_bad(state) == "all weights are finite; all gradients are finite"
    first.grad = torch.full_like(first, float("nan"))
    assert runs.what_is_bad(state) == f"all weights are finite; not finite are the gradients of {name}"
    for p in state.denoiser.parameters(): p.data.fill_(float("inf"))
    assert "not finite are the weights of" in runs.what_is_bad(state) and " and " in runs.what_is_bad(state).split(";")[0]


if __name__ == "__main__": main()
