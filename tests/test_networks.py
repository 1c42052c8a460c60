"""Networks: published sizes, a plain re-computation of every family, first values, precision, compilation, bad input."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

from edm_nb.layers import BINOMIAL, BOX, Conv, GroupNorm, Linear, Positional, double, filter_kernel, halve
from edm_nb.networks import STYLES, Block, adm, attention, build_network, ddpmpp, ncsnpp, tiny

SMALL = dict(resolution=16, channels=3, label_dim=4, augment_dim=9, channel_mult=(1, 2), num_blocks=1, dropout=0.0)
FAMILIES = {
    "ddpmpp": lambda **kw: ddpmpp(**(SMALL | dict(model_channels=16, attn_resolutions=(8,)) | kw)),
    "ncsnpp": lambda **kw: ncsnpp(**(SMALL | dict(model_channels=16, attn_resolutions=(8,)) | kw)),
    "adm": lambda **kw: adm(**(SMALL | dict(model_channels=64, attn_resolutions=(8,)) | kw)),
    "tiny": lambda **kw: tiny(**(SMALL | dict(model_channels=16, attn_resolutions=(8,)) | kw)),
}
family = pytest.mark.parametrize("arch", FAMILIES)


def count(net):
    return sum(p.numel() for p in net.parameters())


def randomised(net, seed=0):
    "Every parameter away from its special first value, so that each one matters to the output."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = math.prod(p.shape[1:]) or 1
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.1 if p.ndim == 1 else fan**-0.5))
    return net


def inputs(batch=3, size=(16, 16), channels=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return dict(x=rand(batch, channels, *size), c_noise=rand(batch), class_labels=F.one_hot(torch.arange(batch) % 4, 4).to(dtype),
                augment_labels=rand(batch, 9))


# ---- published sizes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, published", [
    (lambda: ddpmpp(augment_dim=9), 55_733_891),
    (lambda: ddpmpp(label_dim=10, augment_dim=9), 55_735_299),
    (lambda: ncsnpp(label_dim=10, augment_dim=9), 56_400_643),
    (lambda: ddpmpp(64, channel_mult=(1, 2, 2, 2), augment_dim=9), 61_805_571),
    (lambda: adm(), 295_899_267),
])
def test_parameter_counts_are_the_published_ones(make, published):
    with torch.device("meta"):
        assert count(make()) == published


def test_names_of_the_published_layout():
    with torch.device("meta"):
        song, dhariwal = ncsnpp(label_dim=10, augment_dim=9), adm()
    names = set(song.state_dict())
    for name in ("map_noise.freqs", "map_label.weight", "map_label.bias", "map_augment.weight", "map_layer0.weight",
                 "map_layer1.bias", "enc.32x32_conv.weight", "enc.32x32_block0.norm0.weight", "enc.16x16_down.conv0.resample_filter",
                 "enc.16x16_down.skip.weight", "enc.16x16_aux_residual.resample_filter", "enc.16x16_block3.qkv.weight",
                 "dec.8x8_in0.proj.bias", "dec.8x8_in1.affine.weight", "dec.16x16_up.skip.resample_filter",
                 "dec.16x16_block4.norm2.weight", "dec.32x32_aux_norm.weight", "dec.32x32_aux_conv.bias"):
        assert name in names, name
    assert "map_augment.bias" not in names and "dec.16x16_block3.qkv.weight" not in names
    names = set(dhariwal.state_dict())
    assert {"out_norm.weight", "out_conv.bias", "dec.16x16_block2.qkv.weight", "dec.32x32_up.skip.resample_filter"} <= names
    assert not {"map_label.bias", "dec.32x32_up.skip.weight", "dec.64x64_aux_conv.weight"} & names
    assert dhariwal.state_dict()["enc.32x32_block0.affine.weight"].shape == (2*384, 768)   # scale and shift


# ---- an independent computation -------------------------------------------------------------------------------------

class Plain:
    "The networks once more: zero-stuffing, explicit sums, no module. Sizes and order come from the parameter names."
    def __init__(self, net, taps, eps, scale, heads):
        self.w = {k: v.double() for k, v in net.state_dict().items()}
        f = torch.tensor(taps, dtype=torch.float64)
        self.f, self.eps, self.scale, self.heads = f.outer(f) / f.sum()**2, eps, scale, heads

    def filter(self, x, left, gain=1.0):
        right = len(self.f) - 1 - left
        x = F.pad(x, (left, right, left, right)).flatten(0, 1)[:, None]
        return F.conv2d(x, gain * self.f[None, None])[:, 0]

    def up(self, x):
        z = x.new_zeros(*x.shape[:2], 2*x.shape[2], 2*x.shape[3])
        z[..., ::2, ::2] = x
        return self.filter(z, len(self.f)//2, 4.0).view(z.shape)

    def down(self, x):
        return self.filter(x, len(self.f)//2 - 1).view(x.shape)[..., ::2, ::2]

    def conv(self, name, x):
        if name + ".weight" not in self.w: return x
        w = self.w[name + ".weight"]
        return F.conv2d(x, w, self.w[name + ".bias"], padding=w.shape[-1]//2)

    def norm(self, name, x):
        c, groups = x.shape[1], min(32, x.shape[1]//4)
        g = x.view(len(x), groups, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, unbiased=False, keepdim=True) + self.eps).sqrt()
        return g.view(x.shape) * self.w[name + ".weight"].view(1, c, 1, 1) + self.w[name + ".bias"].view(1, c, 1, 1)

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0)

    def attend(self, name, x):
        b, c, h, w = x.shape
        qkv = self.conv(name + ".qkv", self.norm(name + ".norm2", x)).view(b, self.heads(c), c//self.heads(c), 3, h*w)
        q, k, v = qkv.unbind(3)   # [B, head, channel, position]
        weights = torch.einsum("bhcq,bhck->bhqk", q, k).div((c//self.heads(c))**0.5).softmax(3)
        return self.conv(name + ".proj", torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, c, h, w))

    def block(self, name, x, emb):
        move = self.up if name.endswith("_up") else self.down if name.endswith("_down") else lambda x: x
        h = self.conv(name + ".conv0", move(F.silu(self.norm(name + ".norm0", x))))
        p = self.linear(name + ".affine", emb)[..., None, None]
        if p.shape[1] == h.shape[1]: h = self.norm(name + ".norm1", h + p)
        else: h = self.norm(name + ".norm1", h) * (1 + p[:, :h.shape[1]]) + p[:, h.shape[1]:]
        h = self.conv(name + ".conv1", F.silu(h))
        x = (h + self.conv(name + ".skip", move(x))) * self.scale
        return (x + self.attend(name, x)) * self.scale if name + ".qkv.weight" in self.w else x


def plain_song(net, x, c_noise, class_labels, augment_labels, pyramid):
    p = Plain(net, (1, 3, 3, 1) if pyramid else (1, 1), 1e-6, 0.5**0.5, lambda c: 1)
    if pyramid: angles = c_noise[:, None] * p.w["map_noise.freqs"] * 2 * math.pi
    else: angles = c_noise[:, None] * 10000.0 ** -torch.linspace(0, 1, 8, dtype=torch.float64)
    emb = torch.cat([angles.sin(), angles.cos()], 1) + p.linear("map_label", class_labels * 2.0) + p.linear("map_augment", augment_labels)
    emb = F.silu(p.linear("map_layer1", F.silu(p.linear("map_layer0", emb))))
    image, skips = x, []
    skips.append(x := p.conv("enc.16x16_conv", x))
    skips.append(x := p.block("enc.16x16_block0", x, emb))
    x = p.block("enc.8x8_down", x, emb)
    if pyramid:   # convolve on the fine grid, then filter and stride: the kept part of the plane is the same
        w, wide = p.w["enc.8x8_aux_residual.weight"], F.pad(image, (2, 2, 2, 2))
        fine = F.conv2d(wide, w)
        coarse = F.conv2d(fine.flatten(0, 1)[:, None], p.f[None, None])[:, 0, ::2, ::2].view(x.shape)
        x = (x + coarse + p.w["enc.8x8_aux_residual.bias"][:, None, None]) * 0.5**0.5
    skips.append(x)
    skips.append(x := p.block("enc.8x8_block0", x, emb))
    x = p.block("dec.8x8_in1", p.block("dec.8x8_in0", x, emb), emb)
    for name in "8x8_block0", "8x8_block1", "16x16_up", "16x16_block0", "16x16_block1":
        x = p.block("dec." + name, x if name.endswith("up") else torch.cat([x, skips.pop()], 1), emb)
    assert not skips
    return p.conv("dec.16x16_aux_conv", F.silu(p.norm("dec.16x16_aux_norm", x)))


def plain_adm(net, x, c_noise, class_labels, augment_labels):
    p = Plain(net, (1, 1), 1e-5, 1.0, lambda c: c // 64)
    angles = c_noise[:, None] * 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    emb = torch.cat([angles.cos(), angles.sin()], 1) + p.linear("map_augment", augment_labels)
    emb = p.linear("map_layer1", F.silu(p.linear("map_layer0", emb)))
    emb = F.silu(emb + p.linear("map_label", class_labels))
    skips = [x := p.conv("enc.16x16_conv", x)]
    for name in "16x16_block0", "8x8_down", "8x8_block0": skips.append(x := p.block("enc." + name, x, emb))
    for name in "8x8_in0", "8x8_in1", "8x8_block0", "8x8_block1", "16x16_up", "16x16_block0", "16x16_block1":
        x = p.block("dec." + name, torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
    return p.conv("out_conv", F.silu(p.norm("out_norm", x)))


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_every_layer_does_what_the_paper_says(arch):
    net = randomised(FAMILIES[arch]().double()).eval()
    data = inputs(dtype=torch.float64)
    data["c_noise"] = data["c_noise"].float().double()   # the embedding is computed in float32
    ours = net(**data)
    theirs = plain_adm(net, **data) if arch == "adm" else plain_song(net, **data, pyramid=arch == "ncsnpp")
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=3e-4 if arch == "ncsnpp" else 2e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_head_order(heads):
    g = torch.Generator().manual_seed(0)
    tokens, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 5, 12), (36, 12), (36,)))
    out, rows = torch.empty(2, 5, 12, dtype=torch.float64), (tokens @ weight.T + bias)
    for head in range(heads):
        n = 12 // heads
        q, k, v = (torch.stack([rows[..., (head*n + c)*3 + part] for c in range(n)], -1) for part in range(3))
        out[..., head*n:(head + 1)*n] = (q @ k.mT / n**0.5).softmax(-1) @ v
    torch.testing.assert_close(attention(tokens, weight, bias, heads), out)


@pytest.mark.parametrize("taps", [BOX, BINOMIAL])
def test_resampling_filters(taps):
    kernel = filter_kernel(taps)
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    naive = Plain(tiny(), taps, 0, 0, None)
    torch.testing.assert_close(halve(x, kernel), naive.down(x.double()).float())
    torch.testing.assert_close(double(x, kernel), naive.up(x.double()).float())
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    ones = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(double(ones, kernel)[inner], torch.ones(1, 1, 14, 14))   # zeros lie outside the image
    torch.testing.assert_close(halve(ones, kernel)[inner], torch.ones(1, 1, 2, 2))
    assert math.isclose(kernel.sum(), 1, rel_tol=1e-6)


# ---- first values ---------------------------------------------------------------------------------------------------

@family
def test_output_is_near_zero_at_first_and_gradients_flow(arch):
    net = FAMILIES[arch](generator=torch.Generator().manual_seed(0))
    out = net(**inputs(8))
    assert out.abs().max() < 1e-3 and torch.isfinite(out).all()
    out.sub(1).square().mean().backward()
    last = net.out_conv if arch == "adm" else net.dec["16x16_aux_conv"]
    assert last.weight.grad.abs().max() > 1e-3


def test_first_values_have_the_stated_spread():
    g = torch.Generator().manual_seed(0)
    song, adm_style = STYLES["ddpmpp"], STYLES["adm"]
    conv = Conv(64, 128, 3, song.layer)
    conv.reset(g)
    assert conv.weight.std().item() == pytest.approx((2 / (9*64 + 9*128))**0.5, rel=0.01) and conv.bias.abs().max() == 0
    conv = Conv(64, 192, 1, song.qkv)
    conv.reset(g)
    assert conv.weight.std().item() == pytest.approx((0.2 * 2 / (64 + 192))**0.5, rel=0.02)
    conv = Conv(64, 128, 3, adm_style.layer)
    conv.reset(g)
    assert conv.weight.std().item() == pytest.approx((1 / 3 / (9*64))**0.5, rel=0.01)
    assert conv.weight.abs().max() <= (9*64)**-0.5 and conv.bias.std().item() == pytest.approx((1 / 3 / (9*64))**0.5, rel=0.15)
    conv.init = adm_style.last
    conv.reset(g)
    assert conv.weight.abs().max() == 0 and conv.bias.abs().max() == 0
    label = Linear(10, 4000, STYLES["ddpmpp"].layer, bias=False)
    label.reset(g)
    assert label.weight.std().item() == pytest.approx((2 / 4010)**0.5, rel=0.02)
    freqs = ncsnpp(model_channels=512, num_blocks=1, channel_mult=(1,), generator=g).map_noise.freqs
    assert freqs.std().item() == pytest.approx(16, rel=0.15)


def test_adm_starts_with_standard_normal_classes_and_silent_augmentation_labels():
    net = adm(16, model_channels=64, channel_mult=(1,), num_blocks=1, label_dim=100, augment_dim=9, attn_resolutions=(),
              generator=torch.Generator().manual_seed(0))
    table = net.map_label.weight.flatten().double()                                       # 25,600 values
    assert table.std().item() == pytest.approx(1, rel=0.02) and abs(table.mean().item()) < 0.02
    assert (table**4).mean().item() == pytest.approx(3, rel=0.1)                          # normal; a uniform distribution has 1.8
    assert table.abs().max() > 3
    assert net.map_augment.weight.abs().max() == 0
    song = ddpmpp(16, model_channels=64, channel_mult=(1,), num_blocks=1, label_dim=100, augment_dim=9, attn_resolutions=(),
                  generator=torch.Generator().manual_seed(0))
    assert song.map_augment.weight.std().item() == pytest.approx((2 / (64 + 9))**0.5, rel=0.1)
    assert song.map_label.weight.std().item() == pytest.approx((2 / (64 + 100))**0.5, rel=0.05)


@family
def test_activations_keep_their_scale_through_depth(arch):
    net = FAMILIES[arch](channel_mult=(1, 2, 2), num_blocks=3, generator=torch.Generator().manual_seed(0))
    inside, ratios = [], []

    def watch(module, args, out):
        inside.append(module.norm0(args[0]).std().item())
        if module.skip is None: ratios.append((out.std() / args[0].std()).item() / module.style.skip_scale ** (1 + bool(module.heads)))

    for module in net.modules():
        if isinstance(module, Block): module.register_forward_hook(watch)
    net(**inputs(16))
    early = inside[:5]   # further down, the stream of a √½ network has shrunk to where eps is felt
    assert all(0.9 < s < 1.1 for s in (inside if arch == "adm" else early)), inside
    assert len(ratios) >= 7 and all(abs(r - 1) < 1e-3 for r in ratios), ratios   # a fresh branch adds nothing


@family
def test_the_generator_decides_the_first_values(arch):
    a, b, c = (FAMILIES[arch](generator=torch.Generator().manual_seed(s)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["map_layer0.weight"], c["map_layer0.weight"])
    if arch == "ncsnpp": assert not torch.equal(a["map_noise.freqs"], c["map_noise.freqs"])


# ---- configuration, conditioning ------------------------------------------------------------------------------------

@family
def test_config_survives_json_and_rebuilds_the_network(arch):
    net = randomised(FAMILIES[arch](resolution=(16, 32), out_channels=6, label_dropout=0.1)).eval()
    again = build_network(json.loads(json.dumps(net.config))).eval()
    assert again.config == net.config and net.config["arch"] == arch
    again.load_state_dict(net.state_dict())
    data = inputs(size=(16, 32))
    assert net(**data).shape == (3, 6, 16, 32)
    assert torch.equal(net(**data), again(**data))


@family
@pytest.mark.parametrize("channels, size", [(1, (16, 16)), (4, (8, 24)), (2, (20, 4))])
def test_any_channels_and_rectangles(arch, channels, size):
    net = FAMILIES[arch](channels=channels).eval()
    data = inputs(2, size, channels)
    out = net(**data)
    assert out.shape == (2, channels, *size)
    turned = net(**(data | dict(x=data["x"].mT)))
    assert turned.shape == (2, channels, *size[::-1])


@family
def test_noise_condition_scalar_or_batch(arch):
    net = randomised(FAMILIES[arch]()).eval()
    x = inputs()["x"]
    assert torch.equal(net(x, torch.tensor(0.3)), net(x, torch.full((3,), 0.3)))
    assert not torch.allclose(net(x, torch.tensor(0.3)), net(x, torch.tensor(0.6)), atol=1e-4)


@family
def test_missing_labels_are_zero_labels(arch):
    net, data = randomised(FAMILIES[arch]()).eval(), inputs()
    zero = net(data["x"], data["c_noise"], torch.zeros(3, 4), torch.zeros(3, 9))
    torch.testing.assert_close(net(data["x"], data["c_noise"]), zero)
    assert not torch.allclose(net(**data), zero, atol=1e-4)


@family
def test_label_dropout_only_while_training(arch):
    net, data = randomised(FAMILIES[arch](label_dropout=1.0)), inputs()
    hidden = net.train()(**(data | dict(class_labels=None)))
    torch.testing.assert_close(net(**data), hidden)
    assert not torch.allclose(net.eval()(**data), hidden, atol=1e-4)


def test_label_dropout_rate():
    net = tiny(label_dim=3, label_dropout=0.25)
    torch.manual_seed(0)
    kept = net.label(torch.ones(8000, 3), torch.zeros(1)).mean(1)
    assert set(kept.tolist()) == {0.0, 1.0} and kept.mean().item() == pytest.approx(0.75, abs=4 * (0.1875/8000)**0.5)


def test_dropout_acts_in_training_only():
    net = randomised(FAMILIES["ddpmpp"](dropout=0.5))
    data = inputs()
    assert not torch.equal(net.train()(**data), net(**data))
    assert torch.equal(net.eval()(**data), net(**data))


@pytest.mark.parametrize("call, words", [
    (lambda: tiny(resolution=9), "divisible by 2"),
    (lambda: ddpmpp(resolution=(16, 18)), "divisible by 4"),
    (lambda: tiny()(torch.zeros(1, 3, 8, 8), torch.zeros(1)), r"\[B, 1, H, W\]"),
    (lambda: tiny()(torch.zeros(1, 1, 8, 9), torch.zeros(1)), "image size"),
    (lambda: tiny()(torch.zeros(1, 1, 8, 8), torch.zeros(1), class_labels=torch.zeros(1, 10)), "takes none"),
    (lambda: tiny(label_dim=10)(torch.zeros(2, 1, 8, 8), torch.zeros(2), class_labels=torch.tensor([1, 2])), "one_hot"),
    (lambda: tiny(augment_dim=9)(torch.zeros(2, 1, 8, 8), torch.zeros(2), augment_labels=torch.zeros(2, 6)), r"\[B, 9\]"),
    (lambda: adm(model_channels=96, channel_mult=(1,), attn_resolutions=(64,), label_dim=0), "heads of 64"),
    (lambda: build_network({"arch": "unet"}), "unknown arch 'unet'"),
    (lambda: build_network({"resolution": 8}), "unknown arch None"),
    (lambda: build_network({"arch": "tiny", "widht": 8}), "tiny has no argument 'widht'; expected resolution, channels"),
    (lambda: tiny(num_blocks=0), "num_blocks = 0"),
    (lambda: tiny(model_channels=33), "must be even"),
    (lambda: tiny(channel_mult=(1, 0)), "channel_mult"),
    (lambda: ddpmpp(dropout=13), "dropout = 13"),
    (lambda: ddpmpp(label_dim=-1), "label_dim = -1"),
])
def test_bad_input_is_refused_with_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("make", [ddpmpp, ncsnpp, adm, tiny])
def test_attention_at_a_height_that_no_level_has_is_an_error(make):
    "It was left out in silence: the network had no attention, and nobody was told."
    sizes = dict(resolution=(32, 16), model_channels=64, channel_mult=(1, 1), num_blocks=1)
    with torch.device("meta"):
        for heights in ((8,), (16, 64), [31]):
            with pytest.raises(ValueError, match=r"no level of \d+ pixels; its levels are 32, 16 high"): make(**sizes, attn_resolutions=heights)
        assert make(**sizes, attn_resolutions=(16,)).config["attn_resolutions"] == [16]
        assert make(**sizes, attn_resolutions=()).config["attn_resolutions"] == []
        usual = {"ddpmpp": [16], "ncsnpp": [16], "adm": [32, 16], "tiny": []}[make.__name__]
        assert make(**sizes).config["attn_resolutions"] == usual                       # who names none gets the published ones that exist
        assert build_network(make(**sizes).config).config == make(**sizes).config


def test_presets_and_published_networks_attend_where_they_say():
    from edm_nb.configs import PRESETS
    for name, config in PRESETS.items():
        size = dict(resolution=8, channels=1) if config.data == "digits" else dict(resolution=32, channels=3)
        with torch.device("meta"): net = build_network({**size, **config.network})
        named = config.network.get("attn_resolutions", [])
        attending = {int(key.split("x")[0]) for key, block in net.enc.items() if getattr(block, "heads", 0)}
        assert attending == set(named), name


@pytest.mark.parametrize("make", [ddpmpp, ncsnpp, adm, tiny])
def test_a_misspelt_size_is_an_error(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'modelchannels'"): make(modelchannels=64)


def test_all_networks_are_called_alike():
    "Help and completion show the same arguments in the same order, so one call fits all."
    import inspect
    shown = [list(inspect.signature(make).parameters) for make in (ddpmpp, ncsnpp, adm, tiny)]
    assert all(names == shown[0] for names in shown) and shown[0][:4] == ["resolution", "channels", "label_dim", "augment_dim"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for make in (ddpmpp, ncsnpp, adm, tiny) for p in inspect.signature(make).parameters.values())
    for make in (ddpmpp, ncsnpp, tiny):
        net = make(16, 2, 5, 9, 8, (1, 2), 2, (8,), 0.25, 0.5, 4)
        assert net.config == dict(arch=net.config["arch"], resolution=16, channels=2, label_dim=5, augment_dim=9, model_channels=8, channel_mult=[1, 2],
                                  num_blocks=2, attn_resolutions=[8], dropout=0.25, label_dropout=0.5, out_channels=4)


@pytest.mark.parametrize("arch", ["tiny"])
@pytest.mark.parametrize("change", [dict(num_blocks="x" * 60_000, channel_mult=[1] * 60_000), dict(num_blocks=10**9), dict(channel_mult=[1] * 300), dict(num_blocks=True),
                                    dict(resolution="16"), dict(resolution=16.0), dict(resolution=[16]), dict(resolution=10**400), dict(attn_resolutions=["a"]),
                                    dict(model_channels=10**400), dict(channels=[3]), dict(dropout="much"), dict(channel_mult=7), dict(label_dim=None)], ids=lambda v: str(v)[:40])
def test_configurations_from_strangers_end_in_a_value_error(arch, change):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        with torch.device("meta"): build_network(dict(FAMILIES[arch]().config) | change)
    assert len(str(caught.value)) < 400_000


# ---- statistics, waves, export ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("channels, mean", [(64, 0.0), (64, 3.0), (8, 30.0)])
def test_norms_take_low_precision_in_and_out_with_statistics_in_float32(dtype, ulp, channels, mean):
    "Against float64 of the same rounded numbers: the error is that of rounding the result, three times, not that of a sum in low precision."
    g = torch.Generator().manual_seed(0)
    norm, x = GroupNorm(channels), (torch.randn(4, channels, 16, 16, generator=g) + mean).to(dtype)
    with torch.no_grad(): norm.weight.add_(torch.randn(channels, generator=g) * 0.3); norm.bias.add_(torch.randn(channels, generator=g) * 0.3)
    with torch.autocast("cpu", dtype): out = norm(x)
    groups = x.double().reshape(4, norm.groups, -1)
    plain = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    exact = plain.reshape(x.shape) * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= 1.5 * ulp * (exact.abs() + plain.reshape(x.shape).abs() + 1)).all()


def test_norms_run_outside_autocast():
    "On CUDA autocast would store their result in float32, twice the memory traffic; on a CPU only the switch can be seen."
    seen, norm, plain = [], GroupNorm(8), F.group_norm
    try:
        F.group_norm = lambda *args: (seen.append((torch.is_autocast_enabled("cpu"), args[0].dtype, args[2].dtype)), plain(*args))[1]
        with torch.autocast("cpu", torch.bfloat16): norm(torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16))
        norm(torch.zeros(1, 8, 4, 4))
    finally:
        F.group_norm = plain
    assert seen == [(False, torch.bfloat16, torch.bfloat16), (False, torch.float32, torch.float32)]
    with torch.device("meta"): assert GroupNorm(8)(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)      # a device without autocast


@pytest.mark.parametrize("endpoint", [True, False])
def test_the_narrowest_embedding_is_finite(endpoint):
    "One frequency: (half - 1) is 0 there, and 0/0 made every output NaN."
    waves = Positional(2, endpoint)(torch.tensor([0.0, 1.0]))
    assert waves.isfinite().all() and waves[1].sort().values.tolist() == pytest.approx([math.cos(1), math.sin(1)])
    assert tiny(model_channels=2)(torch.randn(2, 1, 8, 8), torch.ones(2)).isfinite().all()


@pytest.mark.parametrize("arch", ["tiny", "ncsnpp"])
def test_exports_with_a_dynamic_batch(arch):
    net, data = randomised(FAMILIES[arch]()).eval(), inputs(4)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (), data, dynamic_shapes={name: {0: batch} for name in data}).module()
    for n in (1, 2, 5):
        other = inputs(n, seed=n)
        torch.testing.assert_close(program(**other), net(**other), atol=1e-5, rtol=1e-4)


# ---- memory format, precision, compilation --------------------------------------------------------------------------

@family
def test_channels_last_gives_the_same_numbers(arch):
    net, data = randomised(FAMILIES[arch]()).eval(), inputs()
    want = net(**data)
    net.to(memory_format=torch.channels_last)
    data["x"] = data["x"].contiguous(memory_format=torch.channels_last)
    out = net(**data)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)


@family
def test_bfloat16(arch):
    net, data = randomised(FAMILIES[arch]()).eval(), inputs(4)
    want = net(**data)
    with torch.autocast("cpu", torch.bfloat16): mixed = net(**data)
    pure = net.to(torch.bfloat16)(**(data | dict(x=data["x"].bfloat16())))
    assert pure.dtype == torch.bfloat16
    for out in mixed, pure: assert (out.float() - want).std() < 0.05 * want.std()


def test_bfloat16_keeps_the_fourier_frequencies():
    net = FAMILIES["ncsnpp"]()
    before = net.map_noise.freqs.clone()
    net.to(torch.bfloat16)
    assert net.map_noise.freqs.dtype == torch.float32 and torch.equal(net.map_noise.freqs, before)


@family
def test_compiles_into_one_graph(arch):
    torch._dynamo.reset()
    net, data = randomised(FAMILIES[arch](dropout=0.1, label_dropout=0.1)), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(**data).square().mean().backward()          # training: dropout and label dropout are inside
    assert all(p.grad is not None for p in net.parameters())
    torch.testing.assert_close(torch.compile(net.eval(), fullgraph=True, backend="eager")(**data), net(**data),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_code_gives_the_same_numbers():
    net, data = randomised(FAMILIES["ddpmpp"]()).eval(), inputs()
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(**data), net(**data), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@family
def test_cuda_bfloat16_channels_last_compiled(arch):
    net, data = randomised(FAMILIES[arch]()).eval(), inputs(8)
    want = net(**data)
    net.cuda().to(memory_format=torch.channels_last)
    data = {k: v.cuda() for k, v in data.items()}
    compiled = torch.compile(net, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16): out = compiled(**data)
    assert (out.float().cpu() - want).std() < 0.05 * want.std()


@family
def test_training_lowers_a_loss(arch):
    torch.manual_seed(0)
    net, data = FAMILIES[arch](), inputs(4)
    target = torch.roll(data["x"], 1, 3)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = (net(**data) - target).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
