"What a training that begins with another model takes over, what it makes anew, and what it refuses."
import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edm_nb import checkpoints, cli, finetuning, runs
from edm_nb.configs import PRESETS
from edm_nb.data import ImageSet, digits
from edm_nb.networks import build_network
from edm_nb.preconditioning import Preconditioned
from edm_nb.updates import new_state

TOY = dataclasses.replace(PRESETS["toy"], images=128, batch=64, log_every=64, save_every=0, lr_rampup=64, ema_halflife=256, channels_last=False)
CPU = torch.device("cpu")
ARCHS = {"ddpmpp": dict(num_blocks=1, attn_resolutions=[8]), "ncsnpp": dict(num_blocks=1, attn_resolutions=[8]),
         "adm": dict(num_blocks=1, attn_resolutions=[8]), "tiny": dict(num_blocks=1)}


def net(arch, resolution=16, label_dim=4, seed=0, **more):
    "A small network in which no weight is 0."
    config = dict(ARCHS[arch], arch=arch, resolution=resolution, channels=3, label_dim=label_dim, model_channels=32, channel_mult=[1, 2]) | more
    made = build_network(config, torch.Generator().manual_seed(seed))
    dice = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for p in made.parameters(): p.add_(0.02*torch.randn(p.shape, generator=dice))
    return made.eval()


def into(old, new):
    found = finetuning.fit_tensors(old.state_dict(), new)
    new.load_state_dict(found.values, strict=False)
    return found


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"old"
    list(runs.train(dataclasses.replace(TOY, images=512, seed=5), folder, digits(), "cpu"))
    return folder


@pytest.mark.parametrize("arch", ARCHS)
def test_all_is_taken_at_another_size_and_computes_the_same(arch):
    "A network renamed for images twice as large answers what the old one answers there: nothing of a U-Net depends on the size but names."
    old, new = net(arch), net(arch, 32, seed=1, **({} if arch == "tiny" else dict(attn_resolutions=[16])))
    found = into(old, new)
    assert len(found.taken) == len(new.state_dict()) and not found.resized + found.anew + found.left
    x, c_noise, labels = torch.randn(2, 3, 32, 32), torch.tensor([0.3, -1.0]), torch.eye(4)[:2]
    with torch.no_grad(): torch.testing.assert_close(new(x, c_noise, labels), old(x, c_noise, labels))


@pytest.mark.parametrize("arch", ARCHS)
def test_other_classes_begin_at_the_mean_of_the_old(arch):
    "The embedding of every new class is the mean of the old embeddings, whatever factor the network puts on its labels."
    old, new = net(arch, label_dim=4), net(arch, label_dim=9, seed=1)
    found = into(old, new)
    assert found.resized == ["map_label.weight"] and not found.anew + found.left
    heard = {}
    for which, n in (("old", old), ("new", new)):
        n.map_label.register_forward_hook(lambda module, inputs, output, which=which: heard.setdefault(which, []).append(output))
        with torch.no_grad():
            for k in range(n.label_dim): n(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.eye(n.label_dim)[k:k + 1])
    mean = torch.cat(heard["old"]).mean(0)
    for answer in heard["new"]: torch.testing.assert_close(answer[0], mean)


def test_labels_come_and_go():
    old, new = net("tiny", label_dim=4), net("tiny", label_dim=0, seed=1)
    found = into(old, new)
    assert not found.anew and {name.split(".")[0] for name in found.left} == {"map_label"}
    found = into(net("tiny", label_dim=0), net("tiny", label_dim=4, seed=1))
    assert {name.split(".")[0] for name in found.anew} == {"map_label"} and not found.left


def test_levels_are_paired_where_most_fits():
    "A level more: equal heights. All widths the same, half the size and a level less: also equal heights. More levels at one end: from the other."
    same = finetuning.fit_tensors(net("tiny", 16, channel_mult=[1, 2]).state_dict(), net("tiny", 32, channel_mult=[1, 1, 2], seed=1))
    assert "enc.16x16_block0.conv0.weight" in same.taken
    old, new = net("tiny", 16, channel_mult=[1, 2]), net("tiny", 32, channel_mult=[1, 2, 4], seed=1)
    found = finetuning.fit_tensors(old.state_dict(), new)
    assert torch.equal(found.values["enc.32x32_block0.conv0.weight"], old.state_dict()["enc.16x16_block0.conv0.weight"])
    assert "enc.8x8_block0.conv0.weight" in found.anew
    new = net("tiny", 64, channel_mult=[4, 1, 2], seed=1)
    found = finetuning.fit_tensors(old.state_dict(), new)                                        # coarsest with coarsest
    assert torch.equal(found.values["enc.16x16_block0.conv0.weight"], old.state_dict()["enc.8x8_block0.conv0.weight"])


def test_a_run_begins_with_the_averages_and_a_new_optimiser(tmp_path, old_run, capsys):
    "Before the first update: weights and averages are those of the old model; after it, the counters say that it is a new run."
    config = dataclasses.replace(TOY, init=str(old_run), ema_rampup=None)
    state = new_state(config, digits(), CPU)
    lines = finetuning.start_from(state, old_run)
    theirs = checkpoints.read_tensors(old_run/"model.safetensors")
    assert all(torch.equal(v, theirs[k]) for k, v in state.denoiser.net.state_dict().items())
    assert all(torch.equal(v, theirs[k[4:]]) for k, v in state.ema.averages.items()) and not state.optimizer.state and state.images == 0
    records = list(runs.train(config, tmp_path/"new", digits(), "cpu"))
    said = capsys.readouterr().err
    assert f"init: {lines[0]}" in said and "100.0%" in said and records[-1].images == 128
    plain = list(runs.train(dataclasses.replace(TOY, ema_rampup=None), None, digits(), "cpu"))
    assert records[0].loss < 0.9*plain[0].loss
    list(runs.train(dataclasses.replace(config, images=256), tmp_path/"new", digits(), "cpu"))
    assert "init:" not in capsys.readouterr().err                     # going on is no beginning, and needs the old model no more
    with pytest.raises(ValueError, match="another configuration .*init"): next(runs.train(dataclasses.replace(TOY, ema_rampup=None, images=320), tmp_path/"new", digits(), "cpu"))


def test_weights_and_averages_apart(old_run):
    config = dataclasses.replace(TOY, init=str(old_run), init_averages=True, ema_rampup=None)
    state = new_state(config, digits(), CPU)
    finetuning.start_from(state, old_run, averages=True)
    tree = checkpoints.load_state(old_run/"state")[0]
    assert all(torch.equal(v, tree[f"weights.{k}"]) for k, v in state.denoiser.state_dict().items())
    assert all(torch.equal(v, tree[f"ema.{k}"]) for k, v in state.ema.averages.items())
    assert any(not torch.equal(v, state.ema.averages[k]) for k, v in state.denoiser.named_parameters())
    with pytest.raises(ValueError, match="one set of weights"): finetuning.start_from(state, old_run/"model.safetensors", averages=True)
    with pytest.raises(ValueError, match="init_averages needs init"): dataclasses.replace(TOY, init_averages=True)
    with pytest.raises(ValueError, match="init_averages needs ema_rampup=null"): next(runs.train(dataclasses.replace(config, ema_rampup=0.05), None, digits(), "cpu"))


def test_another_network_is_refused_in_words(tmp_path, old_run):
    for network, said in ((TOY.network | {"model_channels": 12}, r"weight is \[8.* there and \[12.* here"),
                          (dict(arch="adm", model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[]), " is .* there and .* here|There is .*, here ")):
        config = dataclasses.replace(TOY, network=network, init=str(old_run))
        with pytest.raises(ValueError, match=rf"another network: only \d+% of the numbers.*{said}"):
            next(runs.train(config, tmp_path/"new", digits(), "cpu"))
        assert not (tmp_path/"new"/"config.json").exists()
    for path, said in ((tmp_path/"none", "no model at"), (tmp_path/"x.pkl", "no model at|no such file")):
        with pytest.raises(ValueError, match=said): finetuning.read_source(path)


def test_a_run_cannot_begin_with_what_it_would_delete(old_run):
    before = (old_run/"model.safetensors").read_bytes()
    for init in (old_run, old_run/"model.safetensors"):
        with pytest.raises(ValueError, match="inside the folder of the new run"):
            next(runs.train(dataclasses.replace(TOY, init=str(init)), old_run, digits(), "cpu", overwrite=True))
    assert (old_run/"model.safetensors").read_bytes() == before


def test_damage_and_nan_are_seen(tmp_path, old_run):
    denoiser = checkpoints.load(old_run)
    with torch.no_grad(): next(denoiser.parameters()).fill_(math.nan)
    file = checkpoints.save(tmp_path/"nan", denoiser)
    state = new_state(TOY, digits(), CPU)
    with pytest.raises(ValueError, match="NaN"): finetuning.start_from(state, file)
    with open(file, "r+b") as f: f.seek(-3, 2); f.write(b"\x01")
    with pytest.raises(checkpoints.CheckpointError, match="damaged"): finetuning.start_from(state, file)


def test_the_licence_goes_with_the_weights(tmp_path, old_run):
    "Through a kill and into every model of the new run."
    file = checkpoints.save(tmp_path/"theirs", checkpoints.load(old_run), licence="CC BY-NC-SA 4.0, of somebody else")
    config = dataclasses.replace(TOY, init=str(file))
    list(runs.train(config, tmp_path/"new", digits(), "cpu"))
    file.unlink()
    list(runs.train(dataclasses.replace(config, images=256), tmp_path/"new", digits(), "cpu"))
    assert checkpoints.read_config(tmp_path/"new")["licence"] == "CC BY-NC-SA 4.0, of somebody else"
    list(runs.train(TOY, tmp_path/"plain", digits(), "cpu"))
    assert not checkpoints.read_config(tmp_path/"plain").get("licence")


def test_an_official_pickle(tmp_path):
    "The small published-style file of the tests: its averages, its licence, and a warning where the preconditioning differs."
    from pathlib import Path

    from edm_nb.official import LICENCE_NOTE, load_official
    path = Path(__file__).parent/"iddpm_tiny.pkl"
    theirs = load_official(path)
    config = theirs.net.config
    data = ImageSet(torch.zeros(8, config["channels"], *[config["resolution"]]*2).normal_(generator=torch.Generator().manual_seed(0)),
                    torch.arange(8) % config["label_dim"] if config["label_dim"] else None, "made", tuple(map(str, range(config["label_dim"]))))
    sizes = {k: config[k] for k in ("arch", "model_channels", "channel_mult", "num_blocks", "attn_resolutions")}
    state = new_state(dataclasses.replace(TOY, network=sizes, conditional=bool(config["label_dim"])), data, CPU)
    with pytest.warns(UserWarning, match="trained with the preconditioning iddpm, this run has edm"): lines = finetuning.start_from(state, path)
    own, old = state.denoiser.net.state_dict(), theirs.net.state_dict()
    same = [k for k in own if k in old and old[k].shape == own[k].shape]
    assert len(same) > 0.9*len(own) and all(torch.equal(own[k], old[k].to(own[k].dtype)) for k in same) and state.licence == LICENCE_NOTE
    assert f"{len(same)} tensors taken" in lines[0]


def test_an_own_network_is_read_without_its_code(tmp_path):
    class Net(nn.Module):
        def __init__(self, width=16):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))
        def forward(self, x, c_noise): return self.inner(torch.cat([x, c_noise[:, None]], 1))
    torch.manual_seed(0)
    denoiser = Preconditioned(Net())
    file = checkpoints.save(tmp_path/"own", denoiser)
    file.with_suffix(".json").write_text(file.with_suffix(".json").read_text().replace('"given"', '"import"').replace(Net.__module__, "no.such"))
    data = ImageSet(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), None, "points")
    config = dataclasses.replace(TOY, conditional=False, init=str(file), images=64)
    state = new_state(config, data, CPU, Net())
    finetuning.start_from(state, file)
    assert all(torch.equal(a, b) for a, b in zip(state.denoiser.parameters(), denoiser.parameters()))
    with pytest.raises(ValueError, match="another network"): finetuning.start_from(new_state(config, data, CPU, Net(9)), file)


def test_the_command_line(tmp_path, old_run):
    run = lambda *args: CliRunner().invoke(cli.app, [str(a) for a in args])
    common = ["train", "toy", "--images", 128, "--device", "cpu"]
    done = run(*common, "--init", old_run, "--out", tmp_path/"new")
    assert done.exit_code == 0 and "init:" in done.output + done.stderr, done.output
    assert json.loads((tmp_path/"new"/"config.json").read_text())["init"] == str(old_run)
    for more, said in ((["--init", tmp_path/"none"], "no model to begin with"), (["--init", old_run, "--init-averages"], "ema_rampup=null")):
        refused = run(*common, *more, "--out", tmp_path/"other")
        assert refused.exit_code == 2 and said in refused.output + refused.stderr, refused.output
    done = run(*common, "--init", old_run, "--init-averages", "--set", "ema_rampup=null", "--out", tmp_path/"both")
    assert done.exit_code == 0, done.output
