"One update: the engine against the loop of chapter 04, draws under other default dtypes, graphs of compiled blocks, configurations."
import dataclasses
import functools

import pytest
import torch

from edm_nb import configs, runs, updates
from edm_nb import training as T
from edm_nb.data import digits, ImageSet
from edm_nb.networks import Block
from edm_nb.preconditioning import Preconditioned
from edm_nb.randomness import IndexStream

TOY = dataclasses.replace(configs.PRESETS["toy"], batch=64, images=384, lr_rampup=128, log_every=384, save_every=0)
CPU = torch.device("cpu")


def test_the_loop_of_chapter_04_gives_the_weights_of_the_engine_bit_for_bit():
    data = digits()
    engine = list(runs.train(TOY, data=data, device="cpu"))[-1].state
    D = updates.build_denoiser(TOY, data).train().to(memory_format=torch.channels_last)
    quantile = functools.partial(T.lognormal_quantile, **TOY.sigma_args)
    *_, (seen, loss, ema) = T.train_loop(D, data, quantile, TOY.images, TOY.batch, TOY.lr, TOY.lr_rampup, TOY.ema_halflife, TOY.seed)
    assert seen == engine.images
    for k, p in engine.denoiser.named_parameters(): assert torch.equal(p, dict(D.named_parameters())[k]), k
    for k, v in engine.ema.averages.items(): assert torch.equal(v, ema.averages[k]), k


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_batch_is_the_same_under_every_default_dtype(dtype):
    config, data = dataclasses.replace(TOY, augment=0.5, label_dropout=0.2, xflip=True), digits()
    draw = lambda: updates.make_batch(config, data, IndexStream(len(data), 0), 64, CPU)
    plain = draw()
    torch.set_default_dtype(dtype)
    try: other = draw()
    finally: torch.set_default_dtype(torch.float32)
    for a, b in [(plain.noise, other.noise), (plain.sigma, other.sigma), *zip(plain.cond.values(), other.cond.values())]:
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def graphs(num_blocks, precision="fp32"):
    "Graphs after each of three updates, and the number of blocks."
    torch._dynamo.reset()
    config = dataclasses.replace(TOY, batch=8, precision=precision, network=dict(arch="tiny", model_channels=8, channel_mult=[1, 2], num_blocks=num_blocks))
    state, made, counts, data = updates.new_state(config, digits(), CPU), [], [], digits()
    forward = updates.compiled(state.denoiser, "blocks", backend=lambda graph, inputs: made.append(1) or graph)
    for k in range(3):
        updates.train_step(forward, state, updates.make_batch(config, data, IndexStream(len(data), 0), 8*k, CPU))
        counts.append(len(made))
    return counts, sum(isinstance(m, Block) for m in state.denoiser.modules())


def test_blocks_of_a_kind_share_a_graph_and_no_update_adds_one():
    (few, blocks), (many, more) = graphs(2), graphs(3)
    assert few[0] == few[2] and many == few and more > blocks and few[0] < blocks


def test_compiled_blocks_change_neither_names_nor_copies_nor_numbers():
    state = updates.new_state(TOY, digits(), CPU)
    names, x = list(state.denoiser.state_dict()), torch.randn(4, 1, 8, 8)
    label, plain = torch.eye(10)[:4], updates.ema_denoiser(state)(x, torch.ones(4), class_labels=torch.eye(10)[:4])
    forward = updates.compiled(state.denoiser, "blocks", backend="eager")
    assert list(state.denoiser.state_dict()) == names and forward is state.denoiser
    torch.testing.assert_close(forward(x, torch.ones(4), class_labels=label), plain)
    torch.testing.assert_close(updates.ema_denoiser(state)(x, torch.ones(4), class_labels=label), plain)
    with pytest.raises(ValueError, match="none, fused, blocks, whole"): updates.compiled(state.denoiser, "all")


def test_what_is_compiled_follows_the_device_unless_it_is_said():
    assert updates.how_to_compile(TOY, CPU) == "none"
    assert updates.how_to_compile(dataclasses.replace(TOY, compile="blocks"), CPU) == "blocks"
    assert updates.how_to_compile(TOY, torch.device("cuda:0")) in ("blocks", "none")
    for old, new in ((True, "whole"), (False, "none"), ("blocks", "blocks"), (None, None)): assert dataclasses.replace(TOY, compile=old).compile == new


def test_a_shorter_training_keeps_the_shares_of_its_ramps():
    paper = configs.PRESETS["cifar10-cond-ddpmpp"]
    short = configs.scale_durations(paper, 1_000_000)
    assert (short.images, short.lr_rampup, short.ema_halflife) == (1_000_000, 50_000, 2_500)
    long = configs.scale_durations(paper, 400_000_000)
    assert (long.images, long.lr_rampup, long.ema_halflife) == (400_000_000, 10_000_000, 500_000)      # may continue the shorter one
    with pytest.raises(ValueError, match="lr_rampup is 10,000,000.*only 1,000,000.*10% of lr.*scale_durations"):
        next(runs.train(dataclasses.replace(paper, images=1_000_000, data="digits"), data=digits(), device="cpu"))


def test_the_rate_falls_to_nothing_over_the_last_images():
    plain = dataclasses.replace(TOY, images=1_000, batch=10, lr=0.5, lr_rampup=100)
    falling = dataclasses.replace(plain, lr_rampdown=400)
    seen = list(range(0, 1_000, 10))
    rate = [[updates.rates(config, n)[0] for n in seen] for config in (plain, falling)]
    assert rate[0][:61] == rate[1][:61] and rate[0][60] == 0.5                         # until 600 images nothing is different
    assert rate[1][61:] == pytest.approx([0.5 * (100 - k)/40 for k in range(61, 100)])  # then a line to 0 at the end
    assert [updates.rates(c, 700)[1] for c in (plain, falling)] == [updates.rates(plain, 700)[1]]*2
    assert updates.rates(falling, 1_000)[0] == updates.rates(falling, 1_010)[0] == 0
    short, long = (configs.scale_durations(falling, n) for n in (100, 5_000))
    assert (short.lr_rampup, short.lr_rampdown, long.lr_rampdown) == (10, 40, 400) and configs.scale_durations(plain, 100).lr_rampdown is None
    with pytest.raises(ValueError, match="lr_rampdown is 400.*only 300.*scale_durations"): configs.check_length(dataclasses.replace(falling, images=300))
    with pytest.raises(ValueError, match="lr_rampdown is 0"): dataclasses.replace(falling, lr_rampdown=0)
    *_, record = runs.train(dataclasses.replace(TOY, lr_rampdown=192), data=digits(), device="cpu")
    assert record.lr == pytest.approx(TOY.lr / 3)                                       # of the last of three updates


@pytest.mark.parametrize("change, words", [
    (dict(lr=1e300), "lr is 1e"), (dict(lr=1e-320), "lr is"), (dict(lr=10**400), "lr is 1000"), (dict(images=10**30), "images is"), (dict(seed=2**80), "seed is"),
    (dict(network={"arch": []}), "network.arch"), (dict(network={"arch": {}}), "network.arch"), (dict(network={"arch": "tiny", "x": 1}), "network has no x"),
    (dict(precond={"scalings": "edm", "sigma_data": 1e-300}), "sigma_data is"), (dict(precond={"scalings": "edm", "sigma_data": 10**400}), "cannot be used"),
    (dict(precond={"scalings": "edm", "sigma_data": 0.5, "sigma_min": 5}), "declared for 5"), (dict(precond={"scalings": "edm", "sigma_data": 0.5, "sigma_max": 0.1}), "declared for 0 to 0.1"),
    (dict(augment_args={"yflip": 1.0}), "augment_args .* do nothing"), (dict(compile="yes"), "compile is 'yes'")])
def test_nonsense_in_a_configuration_is_an_error(change, words):
    with pytest.raises(ValueError, match=words): dataclasses.replace(TOY, **change)


def test_learned_variance_is_refused():
    with pytest.raises(ValueError, match="network.out_channels is 2, but the data make it 1"):
        updates.build_denoiser(dataclasses.replace(TOY, network=dict(TOY.network, out_channels=2)), digits())


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4), (6, 3, 2, 4, 4)])
def test_sigma_data_per_channel_for_data_of_any_rank(shape):
    "A tuple must mean the same as the numbers written out along the channels."
    y, sigma, per_channel = torch.randn(shape), torch.linspace(0.1, 2, 6), (0.2, 0.5, 2.0)
    noise, D = torch.randn(shape), lambda x, sigma: 0.3*x
    found = T.edm_loss(D, y, sigma, noise, sigma_data=per_channel)
    wanted = torch.zeros(6)
    for c, s in enumerate(per_channel):       # λ(σ) = (σ² + σ_d²)/(σ σ_d)², channel by channel
        weight = (sigma**2 + s**2) / (sigma*s)**2
        error = (0.3*(y + noise*sigma.reshape(-1, *[1]*(len(shape) - 1))) - y)[:, c].reshape(6, -1)
        wanted += weight * (error**2).mean(1) / 3
    torch.testing.assert_close(found, wanted)


def test_noise_of_another_shape_is_not_broadcast():
    for noise in (torch.randn(1), torch.randn(1, 1, 8, 8), torch.randn(4, 1, 8, 1)):
        with pytest.raises(ValueError, match="noise of the shape of the images"): T.edm_loss(lambda x, s: x, torch.randn(4, 1, 8, 8), torch.ones(4), noise)


def test_a_scale_is_measured_a_few_images_at_a_time(monkeypatch):
    "Large images must not become a float64 copy of thousands of them."
    seen = []
    plain = runs.estimate_sigma_data
    monkeypatch.setattr(runs, "estimate_sigma_data", lambda batches: plain(seen.append(b.numel()) or b for b in batches))
    data = ImageSet(torch.randint(0, 256, (40, 3, 256, 256), dtype=torch.uint8))
    runs.check_scale(Preconditioned(torch.nn.Identity(), sigma_data=0.58), data)
    assert sum(seen) == data.images.numel() and max(seen) <= 2**20
