"""Augmentation: each transform against exact positions in float64, labels, rates, bounded memory, bad input."""
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edm_nb.augmentation import AugmentPipe, Draw, apply, centre, chunk_size, inverse_map, symlet, up_matrix, warp

FIELDS = list(Draw.__dataclass_fields__)


def one(n=1, dtype=torch.float64, **values):
    "A draw in which only the named fields are not zero."
    return Draw(*(torch.full((n,), float(values.get(f, 0)), dtype=dtype) for f in FIELDS))


def waves(x, y, height, width):
    "Cosines with the mirror symmetry of the border: the reflected image is this function everywhere."
    u, v = math.pi * x / (width - 1), math.pi * y / (height - 1)
    return np.stack([np.cos(u) + 0.5*np.cos(2*v), np.cos(2*u)*np.cos(v) - 0.3*np.cos(u)])


def pixels(height, width):
    y, x = np.mgrid[:height, :width].astype(float)
    return x, y


TRANSFORMS = {   # output position, from the centre -> input position, from the centre, by hand
    "zoom in": (dict(scale=1.5), lambda x, y, h, w: (x / 2**0.3, y / 2**0.3)),
    "zoom out": (dict(scale=-1.0), lambda x, y, h, w: (x * 2**0.2, y * 2**0.2)),
    "rotate 30°": (dict(angle=math.pi/6), lambda x, y, h, w: (math.sqrt(3)/2*x - 0.5*y, 0.5*x + math.sqrt(3)/2*y)),
    "rotate -2 rad": (dict(angle=-2.0), lambda x, y, h, w: (math.cos(2)*x + math.sin(2)*y, -math.sin(2)*x + math.cos(2)*y)),
    "stretch along x": (dict(aniso=1.0), lambda x, y, h, w: (x / 2**0.2, y * 2**0.2)),
    "stretch along the diagonal": (dict(aniso=2.0, direction=math.pi/4), lambda x, y, h, w: (
        (x - y)/2 * 2**-0.4 + (x + y)/2 * 2**0.4, -(x - y)/2 * 2**-0.4 + (x + y)/2 * 2**0.4)),   # up and to the right
    "shift": (dict(shift_x=1.0, shift_y=-0.7), lambda x, y, h, w: (x - w/8, y + 0.7*h/8)),
    "shift far": (dict(shift_x=-21.3), lambda x, y, h, w: (x + 21.3*w/8, y)),
}


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform_moves_the_picture_where_it_says(name, size):
    values, source = TRANSFORMS[name]
    h, w = size
    x, y = pixels(h, w)
    cx, cy = (w - 1)/2, (h - 1)/2
    sx, sy = source(x - cx, y - cy, h, w)
    want = waves(sx + cx, sy + cy, h, w)
    image = torch.tensor(waves(x, y, h, w))[None]
    got = apply(image, one(**values))[0].numpy()
    assert np.abs(want - image[0].numpy()).max() > 0.1
    assert np.abs(got - want).max() < 0.02            # what the bilinear step costs at this scale
    assert np.abs(got - want).mean() < 0.006


def test_flips_copy_pixels():
    image = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    draw = Draw(*torch.zeros(8, 2))
    draw.xflip[0], draw.yflip[1] = 1, 1
    out = apply(image, draw)
    assert torch.equal(out[0], image[0, :, :, [4, 3, 2, 1, 0]]) and torch.equal(out[1], image[1, :, [5, 4, 3, 2, 1, 0]])


def test_transforms_compose_zoom_rotate_stretch_shift():
    values = dict(scale=0.7, angle=0.4, aniso=-1.1, direction=0.9, shift_x=0.3, shift_y=-0.5)
    rotate = lambda a: np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])   # counter-clockwise: y points down
    forward = rotate(0.9) @ np.diag([2**-0.22, 2**0.22]) @ rotate(-0.9) @ rotate(0.4) * 2**0.14
    inverse = inverse_map(one(**values), 20, 30)[0].numpy()
    point = np.array([3.0, -4.0])
    out = forward @ point + [0.3*30/8, -0.5*20/8]
    np.testing.assert_allclose(inverse @ [*out, 1], point, atol=1e-12)


ARROW = """.....
           ...#.
           #####
           ...#.
           .....""".split()
TURNED = {90: """..#..
                 .###.
                 ..#..
                 ..#..
                 ..#..""".split(), -90: """..#..
                                           ..#..
                                           ..#..
                                           .###.
                                           ..#..""".split(), 180: """.....
                                                                     .#...
                                                                     #####
                                                                     .#...
                                                                     .....""".split()}


def drawn(rows):
    return torch.tensor([[float(c == "#") for c in row] for row in rows], dtype=torch.float64)[None, None]


@pytest.mark.parametrize("degrees, sine", [(90, 1), (-90, -1), (180, 0)])
def test_signs_of_the_published_pipeline_rotation(degrees, sine):
    "Worked by hand: the label with sin = +1 is an arrow that pointed right and points up, as in the published pipeline."
    draw = one(angle=math.radians(degrees))
    assert torch.equal(apply(drawn(ARROW), draw) > 0.5, drawn(TURNED[degrees]) > 0.5)
    assert draw.labels()[0, 4].item() == pytest.approx(sine, abs=1e-12)


def test_signs_of_the_published_pipeline_stretch():
    "A blob that is stretched with both labels positive leans like a slash: its extent is from bottom left to top right."
    y, x = torch.meshgrid(torch.arange(33.) - 16, torch.arange(33.) - 16, indexing="ij")
    blob = torch.exp(-(x**2 + y**2) / 18)[None, None].double()
    draw = one(aniso=2.0, direction=math.pi/4)
    weights = apply(blob, draw)[0, 0]
    assert (draw.labels()[0, 5:7] > 1).all()
    moment = lambda a, b: float((weights * a * b).sum() / weights.sum())
    assert moment(x, x) == pytest.approx(moment(y, y), rel=1e-2) and moment(x, y) < -0.4 * moment(x, x)   # y points down


@pytest.mark.parametrize("other", [torch.float64, torch.float16, torch.bfloat16])
def test_draws_do_not_depend_on_the_default_dtype(other):
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    run = lambda: AugmentPipe(0.5)(images, torch.Generator().manual_seed(0))
    want = run()
    torch.set_default_dtype(other)
    try: got = run()
    finally: torch.set_default_dtype(torch.float32)
    assert got[1].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(got, want))


def plain_warp(image, inverse, h):
    "Pad by mirroring (a lot), stuff zeros, filter, look up, filter, drop: in numpy, one channel, no matrix."
    height, width = image.shape
    pad, c = 3 * max(height, width), centre(h)
    fine = np.pad(image, pad, mode="reflect")
    for axis in 0, 1:
        stuffed = np.zeros([s * (2 if a == axis else 1) for a, s in enumerate(fine.shape)])
        stuffed[(slice(None, None, 2), slice(None)) if axis == 0 else (slice(None), slice(None, None, 2))] = fine
        fine = np.apply_along_axis(lambda line: np.convolve(line, 2*np.array(h)), axis, stuffed)
    my, mx = np.mgrid[:2*height - 2 + len(h), :2*width - 2 + len(h)]
    place = np.stack([(mx - c)/2 - (width - 1)/2, (my - c)/2 - (height - 1)/2, np.ones(mx.shape)])
    sx, sy = np.einsum("ij,jhw->ihw", inverse, place)
    rows, columns = (2*(s + (n - 1)/2 + pad) + c for s, n in ((sy, height), (sx, width)))
    warped = scipy.ndimage.map_coordinates(fine, [rows, columns], order=1, mode="constant", cval=np.nan)
    out = np.empty((height, width))
    for j in range(height):
        for i in range(width): out[j, i] = h @ warped[2*j:2*j + len(h), 2*i:2*i + len(h)] @ h
    return out


def test_the_whole_warp_against_a_plain_one():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 9, 12, dtype=torch.float64, generator=generator)
    noise = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    noise[:2] = 0
    inverse = inverse_map(Draw(*noise), 9, 12)
    got = warp(images, inverse)
    for k in range(4):
        want = plain_warp(images[k, 0].numpy(), inverse[k].numpy(), np.array(symlet(6)))
        np.testing.assert_allclose(got[k, 0].numpy(), want, atol=1e-9)


def test_no_motion_reconstructs_the_image():
    images = torch.randn(2, 3, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    still = inverse_map(one(2), 10, 7)
    torch.testing.assert_close(warp(images, still), images, atol=1e-12, rtol=0)
    torch.testing.assert_close(warp(images.float(), still.float()), images.float(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("scale, most", [(-2.0, 0.45), (-3.0, 0.25)])
def test_warping_suppresses_what_would_alias(scale, most):
    stripes = torch.cos(0.95 * math.pi * torch.arange(64, dtype=torch.float64)).expand(1, 1, 64, 64)
    draw = one(scale=scale)                                # the stripes become finer than pixels can hold
    theta = inverse_map(draw, 64, 64)
    grid = torch.nn.functional.affine_grid(theta, stripes.shape, align_corners=True)
    bilinear = torch.nn.functional.grid_sample(stripes, grid, align_corners=True, padding_mode="reflection")
    inner = (0, 0, slice(16, -16), slice(16, -16))
    assert apply(stripes, draw)[inner].std() < most * bilinear[inner].std()


# ---- the filter -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moments", [1, 2, 4, 6, 10, 14])
def test_filter_is_an_orthogonal_wavelet(moments):
    h = np.array(symlet(moments))
    assert len(h) == 2*moments and math.isclose(h.sum(), 1, abs_tol=1e-12)
    for k in range(moments):   # orthogonal to its own even shifts: perfect reconstruction
        assert abs(h[2*k:] @ h[:len(h) - 2*k] - 0.5*(k == 0)) < 1e-10
    n = np.arange(len(h)) - len(h)/2
    for k in range(moments):   # as many vanishing moments as there can be
        assert abs(((-1)**np.arange(len(h)) * n**k) @ h) < 1e-7 * max(1, np.abs(n**k).max())


@pytest.mark.parametrize("moments", [0, -1, 15, 2.5, "6"])
def test_orders_without_a_filter_are_refused(moments):
    with pytest.raises(ValueError, match="expected a whole number of vanishing moments from 1 to 14"):
        symlet(moments)


def test_sym6_is_the_published_filter():
    published = [0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
                 0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
                 0.0017677118642428036, -0.007800708325034148]   # Daubechies, Ten Lectures, table 6.3 (times a constant)
    h = np.array(symlet(6)) * math.sqrt(2)
    assert min(np.abs(h - published).max(), np.abs(h[::-1] - published).max()) < 1e-10


def test_up_matrix_is_one_period_of_the_mirrored_line():
    up = up_matrix(5, symlet(6))
    torch.testing.assert_close(up[0], up[-1])
    torch.testing.assert_close(up.sum(1), torch.ones(17, dtype=torch.float64))


# ---- labels ---------------------------------------------------------------------------------------------------------

def test_labels_follow_the_table():
    draw = one(xflip=1, yflip=1, scale=0.5, angle=2.0, aniso=-0.8, direction=1.1, shift_x=0.3, shift_y=-2.0)
    want = [1, 1, 0.5, math.cos(2.0) - 1, math.sin(2.0), -0.8*math.cos(1.1), -0.8*math.sin(1.1), 0.3, -2.0]
    assert draw.labels()[0].tolist() == pytest.approx(want)
    assert one().labels().abs().max() == 0 and not one().warps().any() and not one(xflip=1).warps().any()


def test_label_rates_and_moments():
    n, p = 200_000, 0.12
    draw = AugmentPipe(p).draw(n, torch.Generator().manual_seed(0))
    near = lambda value, want, sd: abs(value - want) < 4.5 * sd / math.sqrt(n)
    rate = lambda hit: hit.double().mean().item()
    binomial = lambda q: math.sqrt(q*(1 - q))
    assert near(rate(draw.xflip == 1), 0.5, 0.5) and set(draw.xflip.unique().tolist()) == {0, 1}
    assert near(rate(draw.yflip == 1), p/2, binomial(p/2))
    for field in "scale", "angle", "aniso", "shift_x":
        value = getattr(draw, field).double()
        assert near(rate(value != 0), p, binomial(p)), field
        active, spread = value[value != 0], (math.pi/math.sqrt(3) if field == "angle" else 1)
        assert abs(active.mean()) < 4.5 * spread / len(active)**0.5 and abs(active.std()/spread - 1) < 0.03
    assert torch.equal(draw.shift_x != 0, draw.shift_y != 0)
    together = (draw.scale != 0) & (draw.angle != 0)
    assert near(rate(together), p*p, binomial(p*p))              # transforms are switched independently
    turned = draw.direction != 0
    assert near(rate(turned), 0.5, 0.5) and draw.angle.abs().max() <= math.pi + 1e-6
    corr = torch.corrcoef(torch.stack([draw.shift_x, draw.shift_y, draw.scale, draw.aniso]))
    assert (corr - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("off, columns", [("xflip", [0]), ("yflip", [1]), ("scale", [2]), ("rotate_frac", [3, 4]),
                                          ("aniso", [5, 6]), ("translate_frac", [7, 8])])
def test_each_transform_switches_off_alone(off, columns):
    pipe = AugmentPipe(0.9, **{off: 0})
    labels = pipe.draw(500, torch.Generator().manual_seed(0)).labels()
    assert labels[:, columns].abs().max() == 0
    assert (labels.abs().amax(0) > 0).sum() == 9 - len(columns)


# ---- the pipe -------------------------------------------------------------------------------------------------------

def test_p_zero_returns_the_input_itself():
    images = torch.randn(3, 3, 8, 8)
    out, labels = AugmentPipe(p=0)(images)
    assert out is images and labels.shape == (3, 9) and labels.abs().max() == 0 and labels.dtype == torch.float32


def test_the_input_is_left_alone_and_zero_labels_mean_untouched():
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    out, labels = AugmentPipe(0.2)(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    same = (out == images).flatten(1).all(1)
    assert torch.equal(same, labels.abs().amax(1) == 0) and 0 < same.sum() < 64


def test_the_generator_decides():
    images = torch.randn(16, 1, 8, 8)
    run = lambda seed: AugmentPipe(0.5)(images, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(run(3), run(3)))
    assert not torch.equal(run(3)[1], run(4)[1])


@pytest.mark.parametrize("channels, size", [(1, (8, 8)), (3, (16, 24)), (5, (9, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_channels_size_and_float(channels, size, dtype):
    images = torch.rand(12, channels, *size, dtype=dtype)
    out, labels = AugmentPipe(0.9)(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and out.dtype == dtype and labels.shape == (12, 9) and torch.isfinite(out).all()
    assert labels.dtype == torch.float32


def test_chunks_and_selection_do_not_change_the_result():
    images = torch.randn(21, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    draw = AugmentPipe(0.3).draw(21, torch.Generator().manual_seed(0))
    inverse = inverse_map(draw, 16, 16)
    torch.testing.assert_close(warp(images, inverse, chunk=4), warp(images, inverse), atol=1e-5, rtol=0)
    torch.testing.assert_close(apply(images, draw, select=True), apply(images, draw, select=False), atol=1e-5, rtol=0)


class Watch(TorchDispatchMode):
    "Notes the largest tensor that any operation returns, and every operation that makes the host wait for data."
    def __init__(self):
        super().__init__()
        self.bytes, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select")):
            self.waits.append(str(func))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor): self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_an_extreme_draw_needs_no_more_memory():
    images = torch.randn(64, 3, 32, 32)
    sizes = []
    for reach in 0.1, 1e4:
        with Watch() as watch: apply(images, one(64, torch.float32, shift_x=reach, scale=-math.log2(reach)))
        sizes.append(watch.bytes)
    assert sizes[0] == sizes[1] < 32 * 2**20
    assert chunk_size(images) * 3 * 125 * 125 * 4 < 32 * 2**20


def test_memory_does_not_grow_with_the_batch():
    inverse = inverse_map(one(4096, torch.float32, angle=1.0), 8, 8)
    with Watch() as watch: warp(torch.zeros(4096, 1, 8, 8), inverse, chunk=64)
    assert watch.bytes <= 4096 * 64 * 4


def test_without_selection_the_host_never_looks():
    images = torch.randn(6, 3, 8, 8)
    pipe = AugmentPipe(0.5)
    pipe(images)                                             # builds the matrices once
    for select, waits in (False, 0), (True, 1):
        with Watch() as watch: apply(images, pipe.draw(6), select=select)
        assert len(watch.waits) == waits, watch.waits
    with Watch() as watch: pipe.draw(6).labels()
    assert not watch.waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_does_not_synchronise_and_agrees():
    images = torch.randn(64, 3, 32, 32, device="cuda")
    pipe, generator = AugmentPipe(0.3), torch.Generator("cuda").manual_seed(0)
    pipe(images, generator)                                     # builds the matrices once
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try: out, labels = pipe(images, generator)
    finally: torch.cuda.set_sync_debug_mode(mode)
    assert out.device == images.device and labels.device == images.device
    draw = pipe.draw(64, torch.Generator().manual_seed(0), "cuda")
    on_cpu = Draw(*(getattr(draw, f).cpu() for f in FIELDS))
    torch.testing.assert_close(apply(images, draw).cpu(), apply(images.cpu(), on_cpu), atol=1e-3, rtol=0)


@pytest.mark.parametrize("call, words", [
    (lambda: AugmentPipe()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "to_float"),
    (lambda: AugmentPipe()(torch.zeros(3, 8, 8)), r"\[B, C, H, W\]"),
    (lambda: AugmentPipe()(np.zeros((2, 3, 8, 8), np.float32)), "got ndarray; torch.from_numpy"),
    (lambda: AugmentPipe(p=1.2), "p = 1.2"),
    (lambda: AugmentPipe(p=-0.1), "p = -0.1"),
    (lambda: AugmentPipe(p=0.5, scale=3), "scale = 3"),
    (lambda: AugmentPipe(xflip=2), "xflip = 2"),
    (lambda: AugmentPipe(p=1)(torch.zeros(2, 3, 1, 8)), "2×2"),
])
def test_bad_input_is_refused_with_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
