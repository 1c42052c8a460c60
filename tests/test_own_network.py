"Networks that the book did not write, on data of any rank: trained, saved and loaded like its own; no file brings code."
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edm_nb import checkpoints, cli, runs
from edm_nb.configs import PRESETS, config_from, config_json, read_config
from edm_nb.data import ImageSet, digits, load_images
from edm_nb.files import DataError
from edm_nb.generation import Sampling, generate, load_model
from edm_nb.own_network import network_table, rebuild_own
from edm_nb.preconditioning import Preconditioned
from edm_nb.training import edm_loss

TOY = dataclasses.replace(PRESETS["toy"], conditional=False, images=512, batch=64, log_every=128, save_every=0, lr_rampup=0,
                          precond={"scalings": "edm", "sigma_data": 1.0})
SHAPES = [(2,), (3, 12), (1, 4, 6, 6)]


class Mixer(nn.Module):
    "A perceptron over all values of a sample, whatever their arrangement; drops, normalises, ties and forgets."
    def __init__(self, shape, width=32, label_dim=0):
        super().__init__()
        size = int(np.prod(shape))
        self.shape, self.label_dim = tuple(shape), label_dim
        self.config = dict(shape=list(shape), width=width, label_dim=label_dim)
        self.read, self.middle, self.write = nn.Linear(size + 1 + label_dim, width), nn.Linear(width, width), nn.Linear(width, size)
        self.again, self.norm, self.drop = self.middle, nn.BatchNorm1d(width), nn.Dropout(0.1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, c_noise, class_labels=None):
        more = [c_noise[:, None]] + ([] if class_labels is None else [class_labels])
        h = torch.relu(self.read(torch.cat([x.flatten(1), *more], 1)))
        return self.write(self.drop(self.norm(self.again(torch.relu(self.middle(h)))))).reshape(x.shape)


def points(shape, n=400, seed=0, labels=None):
    dice = torch.Generator().manual_seed(seed)
    return ImageSet(torch.randn(n, *shape, generator=dice), labels, "noise")


def weights(denoiser):
    return [value.clone() for value in denoiser.state_dict().values()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A package on the path that leaves a mark when it is imported."
    place = tmp_path/"code"
    place.mkdir()
    (place/"my_nets.py").write_text(f"""
from pathlib import Path
import torch
from torch import nn
Path({str(place/'imported')!r}).write_text("yes")
class Line(nn.Module):
    def __init__(self, channels, width=8):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(channels + 1, width), nn.SiLU(), nn.Linear(width, channels))
    def forward(self, x, c_noise): return self.inner(torch.cat([x, c_noise[:, None]], 1))
def line(channels, width=8): return Line(channels, width)
def none(): return 3
""")
    monkeypatch.syspath_prepend(str(place))
    yield place
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_module_trains_resumes_and_draws_like_ours(tmp_path, shape):
    "The same run in one piece and in two, bit for bit; the caller's module stays as it was; samples follow from their seeds."
    torch.manual_seed(0)
    net, data = Mixer(shape), points(shape)
    before = weights(net)
    whole = list(runs.train(TOY, data=data, device="cpu", net=net))
    assert same(before, weights(net)) and whole[-1].state.denoiser.net is not net
    assert not same(before, weights(whole[-1].state.denoiser.net))
    list(runs.train(dataclasses.replace(TOY, images=256), tmp_path/"run", data, "cpu", net=net))
    parts = list(runs.train(TOY, tmp_path/"run", data, "cpu", net=net))
    assert same(weights(whole[-1].state.denoiser), weights(parts[-1].state.denoiser)) and parts[0].images == 384
    assert all(torch.equal(a, b) for a, b in zip(whole[-1].state.ema.averages.values(), parts[-1].state.ema.averages.values()))
    denoiser = runs.fit(TOY, folder=tmp_path/"run", data=data, device="cpu", net=net)         # finished: read from the folder
    again = load_model(tmp_path/"run", net=lambda **sizes: Mixer(**sizes))
    assert same(weights(denoiser), weights(again)) and again.data_shape == shape and same(before, weights(net))
    (seeds, x, _), = generate(again, range(4), Sampling(4), as_bytes=False)
    (_, y, _), = generate(denoiser, [3], Sampling(4), as_bytes=False)
    assert x.shape == (4, *shape) and x.isfinite().all()
    torch.testing.assert_close(x[3:], y)


def test_training_learns_the_data():
    "Points on a circle of radius 1.5 around (1, 0): samples lie on it far better than the points of an untrained network."
    angle = torch.linspace(0, 2*np.pi, 401)[:400]
    ring = torch.stack([1 + 1.5*angle.cos(), 1.5*angle.sin()], 1)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        def forward(self, x, c_noise): return self.inner(torch.cat([x, c_noise[:, None]], 1))
    torch.manual_seed(1)
    config = dataclasses.replace(TOY, images=60_000, batch=200, lr=3e-3, ema_halflife=2_000, log_every=30_000, sigma_args={"P_mean": -1.0, "P_std": 1.4},
                                 precond={"scalings": "edm", "sigma_data": 1.1})
    untrained, denoiser = Net(), None
    denoiser = runs.fit(config, data=ImageSet(ring.float()), device="cpu", net=untrained)
    def error(D):
        x = next(generate(D.eval(), range(200), batch=200, as_bytes=False, shape=(2,)))[1]
        return ((x - torch.tensor([1.0, 0.0])).norm(dim=1) - 1.5).abs().mean().item()
    assert error(denoiser) < 0.15 < 0.5 < error(Preconditioned(untrained, sigma_data=1.1))


def test_labels_reach_the_network_and_must_fit(tmp_path):
    labels = torch.arange(400) % 3
    data = points((2,), labels=labels)
    config = dataclasses.replace(TOY, conditional=True, images=128, label_dropout=0.2)
    list(runs.train(config, tmp_path/"run", data, "cpu", net=Mixer((2,), label_dim=3)))
    drawn = list(generate(load_model(tmp_path/"run", net=Mixer((2,), label_dim=3)), range(6), Sampling(2), classes=[0, 2], as_bytes=False))
    assert drawn[0][2].argmax(1).tolist() == [0, 2, 0, 2, 0, 2]
    with pytest.raises(ValueError, match="Mixer has label_dim 0, the training tells it 3.*conditional"):
        next(runs.train(config, data=data, device="cpu", net=Mixer((2,))))
    with pytest.raises(ValueError, match="Mixer has label_dim 3, the training tells it 0"):
        next(runs.train(TOY, data=data, device="cpu", net=Mixer((2,), label_dim=3)))


class Bad(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.ones(1)), answer
    def forward(self, x, c_noise): return self.weight*self.answer(x, c_noise)


@pytest.mark.parametrize("net, said", [
    (Bad(lambda x, c: x[:1]), "returned"), (Bad(lambda x, c: x*c[:, None].log()), "NaN or infinity"),
    (nn.Linear(2, 2), r"Linear is called as net\(x, c_noise\)"), (nn.Identity(), "no parameters"), (nn.LazyLinear(2), "lazy"),
    (lambda x, c: x, "expected a torch.nn.Module"), (Preconditioned(Mixer((2,))), "is a denoiser"),
], ids=["shape", "nan", "signature", "parameters", "lazy", "function", "denoiser"])
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, net, said):
    with pytest.raises(ValueError, match=said): next(runs.train(TOY, tmp_path/"run", points((2,)), "cpu", net=net))
    assert not (tmp_path/"run"/"config.json").exists()


def test_our_networks_and_pictures_stay_with_images():
    data = points((2,))
    with pytest.raises(ValueError, match=r"tiny takes images \[N, C, H, W\].*net=, or network.import"): next(runs.train(TOY, data=data, device="cpu"))
    for change in (dict(xflip=True), dict(augment=0.1), dict(grid_every=64)):
        with pytest.raises(ValueError, match=f"{[*change][0]} is for pictures"):
            next(runs.train(dataclasses.replace(TOY, **change), data=data, device="cpu", net=Mixer((2,))))
    with pytest.raises(ValueError, match="only square ones are shrunk"): runs.shrink(data, 4)


def test_a_configuration_names_code_and_a_file_does_not_run_it(tmp_path, package):
    "Checking and reading import nothing; training does; loading only for a caller who brings the code or names it."
    table = {"import": "my_nets:line", "width": 16}
    config = config_from(json.loads(config_json(dataclasses.replace(TOY, network=table))))
    data, run, mark = points((2,)), tmp_path/"run", package/"imported"
    assert not mark.exists()
    records = list(runs.train(config, run, data, "cpu"))
    assert mark.exists() and records[-1].state.denoiser.net.inner[0].out_features == 16
    assert checkpoints.read_config(run)["network"] == {"import": "my_nets:line", "width": 16, "channels": 2}
    assert read_config(run/"config.json").network == table
    expected = weights(runs.fit(config, folder=run, data=data, device="cpu"))
    mark.unlink(); sys.modules.pop("my_nets")
    for allow in ((), ["my_nets:none"], "my_nets", ["my_nets:line2"]):
        with pytest.raises(checkpoints.CheckpointError, match="its network is my_nets:line, code that no file may run"): load_model(run, allow=allow)
    assert not mark.exists() and "my_nets" not in sys.modules
    assert same(weights(load_model(run, allow=["my_nets:line"])), expected) and mark.exists()
    a, b = (weights(next(runs.train(dataclasses.replace(config, seed=s), data=data, device="cpu")).state.denoiser) for s in (0, 1))
    torch.manual_seed(3)
    c = weights(next(runs.train(config, data=data, device="cpu")).state.denoiser)
    assert same(a, c) and not same(a, b)                      # first weights follow from the seed of the configuration alone


def test_names_that_lead_nowhere_are_errors_with_advice(package):
    def start(**table): return next(runs.train(dataclasses.replace(TOY, network=table), data=points((2,)), device="cpu"))
    for name, said in (("no_such_package:f", "installed, or on the path"), ("my_nets:nothing", "my_nets has no nothing"), ("my_nets:nn.nothing", "has no nn.nothing"),
                       ("my_nets:none", "returned int"), ("my_nets:__name__", "no function or class")):
        with pytest.raises(ValueError, match=said): start(**{"import": name})
    with pytest.raises(ValueError, match="unexpected keyword argument 'wide'"): start(**{"import": "my_nets:line", "wide": 3})
    for table in ({"import": "os.system"}, {"import": "a:b; c"}, {"import": 3}, {"import": "a:b", "arch": "tiny"}, {"import": "a:b", "given": "c"}):
        with pytest.raises(ValueError, match="network"): dataclasses.replace(TOY, network=table)
    with pytest.raises(ValueError, match="given as a module and is in no file; give it again"): start(given="Mixer")


def test_save_and_load_any_module(tmp_path):
    "With a config the class is named; without one only the module's name; integer buffers and tied weights come back."
    torch.manual_seed(0)
    net = Mixer((2,))
    net(torch.randn(8, 2), torch.zeros(8))                    # moves the running averages and the counter of BatchNorm
    denoiser = Preconditioned(net, sigma_data=[1.0, 2.0]).eval()
    file = checkpoints.save(tmp_path/"own", denoiser)
    name = f"{Mixer.__module__}:Mixer"
    assert checkpoints.read_config(file)["network"] == {"import": name, "shape": [2], "width": 32, "label_dim": 0}
    again = checkpoints.load(file, allow=[name])
    assert same(weights(again), weights(denoiser)) and again.net.again is again.net.middle and not again.training
    assert int(again.net.norm.num_batches_tracked) == 1 and again.sigma_data == (1.0, 2.0)
    del net.config
    assert network_table(net) == {"given": name}
    file = checkpoints.save(tmp_path/"nameless", denoiser)
    with pytest.raises(checkpoints.CheckpointError, match="bring it .net=") as refused: checkpoints.load(file, allow=[name])
    assert "allow the import" not in str(refused.value)
    assert same(weights(checkpoints.load(file, net=Mixer((2,)))), weights(denoiser))
    for other, said in ((Mixer((2,), width=8), "has shape"), (nn.Linear(2, 2), "tensors missing"), (lambda: 3, "net gave int"), ("Mixer", "net gave str")):
        with pytest.raises(checkpoints.CheckpointError, match=said): checkpoints.load(file, net=other)
    with open(file, "r+b") as f: f.seek(-1, 2); f.write(b"\x01")
    with pytest.raises(checkpoints.CheckpointError, match="damaged"): checkpoints.load(file, net=Mixer((2,)))
    with pytest.raises(checkpoints.CheckpointError, match="no torch.nn.Module"): checkpoints.save(tmp_path/"f", Preconditioned(lambda x, c: x))


def test_a_class_made_inside_a_function_is_only_named():
    class Hidden(Mixer): pass
    assert network_table(Hidden((2,))).keys() == {"given", "shape", "width", "label_dim"}
    assert isinstance(rebuild_own(network_table(Hidden((2,))), net=Hidden), Hidden)


def test_a_network_of_diffusers_is_saved_by_its_own_config(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    file = checkpoints.save(tmp_path/"unet", Preconditioned(unet))
    name = checkpoints.read_config(file)["network"]["import"]
    assert name.startswith("diffusers.") and name.endswith(":UNet2DModel")
    again = checkpoints.load(file, allow=[name])
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.net(x, 3).sample, unet.eval()(x, 3).sample)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_scale_per_channel_works_at_any_rank(shape):
    "Loss and coefficients against their formulas, one sample and one channel at a time."
    dice = torch.Generator().manual_seed(0)
    C = shape[0]
    scale = [0.5, 2.0, 7.0][:C]
    y, noise = torch.randn(5, *shape, generator=dice), torch.randn(5, *shape, generator=dice)
    sigma = torch.tensor([0.01, 0.3, 1.0, 5.0, 60.0])
    denoiser = Preconditioned(lambda x, c_noise: torch.sin(3*x), sigma_data=scale)
    loss = edm_loss(denoiser, y, sigma, noise)
    for b, s in enumerate(sigma.tolist()):
        total = 0.0
        for c, d in enumerate(scale):
            x, v = y[b, c] + s*noise[b, c], s*s + d*d
            D = d*d/v*x + s*d/v**0.5*torch.sin(3*x/v**0.5)
            total += (v/(s*d)**2*(D - y[b, c])**2).sum().item()
        assert loss[b].item() == pytest.approx(total/y[b].numel(), rel=1e-4)


def test_vectors_and_series_come_from_files(tmp_path):
    def stored(array, **more):
        np.savez(tmp_path/"set.npz", images=array, **more)
        return load_images(tmp_path/"set.npz").images
    series = np.arange(24, dtype=np.float32).reshape(2, 4, 3)*50
    assert stored(np.ones((5, 2))).shape == (5, 2)
    assert torch.equal(stored(series, layout="NLC"), torch.from_numpy(series).transpose(1, 2)) and stored(series, layout="NCL").shape == (2, 4, 3)
    assert stored(np.zeros((2, 5, 6, 7, 1)), layout="NDHWC").shape == (2, 1, 5, 6, 7)
    for array, layout, said in ((series, None, "layout='NCL'. or layout='NLC'"), (series, "NHWC", "its layout is 'NHWC'"), (series, "NLL", "say which"),
                                (np.ones((5, 2)), "CN", "say which"), (np.full((5, 2), np.nan), None, "NaN"), (np.ones(5), None, "of rank 4"),
                                (np.zeros((2, 8, 8), np.uint8), None, "of rank 4")):
        with pytest.raises(DataError, match=said): stored(array, **({} if layout is None else {"layout": layout}))
    with pytest.raises(DataError, match="expected a uint8 or float32 tensor"): ImageSet(torch.zeros(4, 8, 8, dtype=torch.uint8))


def test_the_command_line_trains_draws_and_measures_vectors(tmp_path, package):
    run = lambda *args: CliRunner().invoke(cli.app, [str(a) for a in args])
    np.savez(tmp_path/"points.npz", images=points((2,), 600).images.numpy())
    (tmp_path/"config.json").write_text(config_json(dataclasses.replace(TOY, data=str(tmp_path/"points.npz"), network={"import": "my_nets:line"})))
    done = run("train", tmp_path/"config.json", "--out", tmp_path/"run")
    assert done.exit_code == 0, done.output
    model, allow = tmp_path/"run", ["--allow", "my_nets:line"]
    refused = run("sample", model, "--out", tmp_path/"x.npz")
    assert refused.exit_code == 2 and "allow=['my_nets:line']" in refused.output + refused.stderr
    refused = run("sample", model, "--out", tmp_path/"x.png", *allow)
    assert refused.exit_code == 2 and "write an .npz" in refused.output + refused.stderr
    done = run("sample", model, "--out", tmp_path/"x.npz", "--seeds", "0-99", *allow)
    assert done.exit_code == 0, done.output
    drawn = load_images(tmp_path/"x.npz")
    assert drawn.images.shape == (100, 2) and drawn.images.dtype == torch.float32
    of_model = run("fid", model, "--ref", tmp_path/"points.npz", "--n", 100, "--repeats", 1, "--json", *allow)
    of_file = run("fid", tmp_path/"x.npz", "--ref", tmp_path/"points.npz", "--json")
    assert of_model.exit_code == of_file.exit_code == 0, (of_model.output, of_file.output)
    a, b = (json.loads(r.stdout.splitlines()[-1]) for r in (of_model, of_file))
    assert a["protocol"]["features"] == b["protocol"]["features"] == "values-2" and a["mean"] == pytest.approx(b["mean"], rel=1e-6)
    mean, real = drawn.images.double(), load_images(tmp_path/"points.npz").images.double()
    gap = (mean.mean(0) - real.mean(0)).square().sum().item()
    A, B = torch.cov(mean.T), torch.cov(real.T)
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum().item()
    assert b["mean"] == pytest.approx(gap + (A.trace() + B.trace()).item() - 2*root, rel=1e-6)


def test_digits_still_train_with_ours():
    "The engine without net= is as it was."
    config = dataclasses.replace(PRESETS["toy"], images=64, lr_rampup=0)
    (record,) = list(runs.train(config, data=digits().take(slice(0, 200)), device="cpu"))
    assert not hasattr(record.state.denoiser, "data_shape") and network_table(record.state.denoiser.net)["arch"] == "tiny"
