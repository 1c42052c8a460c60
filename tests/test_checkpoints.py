"""Checkpoints: exact round trips, atomic files, damage found, runs resumed bit for bit."""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from edm_nb import checkpoints, official
from edm_nb.checkpoints import CheckpointError, latest_state, load, load_state, read_config, rng_state, save, save_state, set_rng_state, state_files
from edm_nb.files import file_hash
from edm_nb.networks import adm, ddpmpp, ncsnpp, tiny
from edm_nb.preconditioning import SCALINGS, Preconditioned

ROOT = Path(checkpoints.__file__).parent.parent


def shaken(net):
    "No parameter at its initial zero, so that each one matters."
    torch.manual_seed(0)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


SIZES = dict(resolution=8, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
NETS = dict(tiny=lambda: tiny(8, 3, label_dim=4, augment_dim=9), ddpmpp=lambda: ddpmpp(**SIZES, label_dim=4), ncsnpp=lambda: ncsnpp(**SIZES),
            adm=lambda: adm(**SIZES | dict(model_channels=64), label_dim=5, out_channels=6), wide=lambda: tiny((8, 16), 3))


def refuse(action, match, name):
    with pytest.raises(CheckpointError, match=match) as caught:
        action()
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("target", ["folder", "named.safetensors"])
def test_round_trip(tmp_path, name, target):
    net = shaken(NETS[name]())
    denoiser = Preconditioned(net, sigma_data=0.7).train()
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    file = save(tmp_path/target, denoiser, images=12, note={"a": [1, 2]})
    assert denoiser.training and all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    assert file.suffix == ".safetensors" and read_config(file)["extra"] == {"images": 12, "note": {"a": [1, 2]}}
    assert not list(tmp_path.rglob("*.tmp"))
    found = load(tmp_path/target)
    x = torch.randn(2, 3, 8, 16 if name == "wide" else 8, dtype=torch.float64)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    assert torch.equal(found(x, torch.tensor([0.1, 20.0]), class_labels=labels), denoiser.eval()(x, torch.tensor([0.1, 20.0]), class_labels=labels))
    assert found.config == denoiser.config and found.net.config == net.config and not found.training


@pytest.mark.parametrize("row", sorted(SCALINGS))
def test_every_row_comes_back(tmp_path, row):
    more = dict(M=500) if row in ("vp", "iddpm") else dict(sigma_data=[0.4, 0.5, 0.6]) if row == "edm" else {}
    denoiser = Preconditioned(NETS["tiny"](), SCALINGS[row], sigma_max=50.0, **more)
    save(tmp_path/"m", denoiser)
    assert load(tmp_path/"m").config == json.loads(json.dumps(denoiser.config))


def test_bfloat16_stays(tmp_path):
    denoiser = Preconditioned(shaken(NETS["ncsnpp"]()).to(torch.bfloat16))
    save(tmp_path/"m", denoiser)
    found = load(tmp_path/"m")
    assert {k: v.dtype for k, v in found.state_dict().items()} == {k: v.dtype for k, v in denoiser.state_dict().items()}
    assert all(torch.equal(v, denoiser.state_dict()[k]) for k, v in found.state_dict().items())


def test_ordinary_permissions(tmp_path):
    "Temporary files are private; the finished one must not be."
    if os.name != "posix":
        pytest.skip("POSIX permissions")
    old = os.umask(0o022)
    try:
        file = save(tmp_path/"m", Preconditioned(NETS["tiny"]()))
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o644


def test_not_savable_writes_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no torch.nn.Module"):
        save(tmp_path/"m", Preconditioned(lambda x, c_noise: x))
    with pytest.raises(TypeError):
        save(tmp_path/"m", Preconditioned(NETS["tiny"]()), note=object())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model(tmp_path):
    return save(tmp_path/"model.safetensors", Preconditioned(shaken(NETS["tiny"]())))


def test_our_own_files_need_no_conversion(model, tmp_path):
    for path, out in ((model, tmp_path/"out"), (model, model), (save(tmp_path/"run", Preconditioned(NETS["tiny"]())).parent, tmp_path/"out")):
        refuse(lambda: official.convert(path, out), "already an edm_nb checkpoint", path.name)
    assert not (tmp_path/"out").exists()
    model.with_suffix(".json").write_text("[1]")                      # a stranger's JSON is no reason to refuse
    refuse(lambda: official.convert(model, tmp_path/"out"), "tensors|network", "model.safetensors")


@pytest.mark.parametrize("size", [0, 3, 2**22, 2**22 + 1])
def test_file_hash_is_sha256_of_the_whole_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path/"file").write_bytes(content[:size])
    assert file_hash(tmp_path/"file") == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize("where", [0, 7, 20, 0.3, 0.9, -1])
def test_flipped_bit(model, where):
    data = bytearray(model.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 16
    model.write_bytes(data)
    refuse(lambda: load(model), "sha256", "model.safetensors")


def test_truncated_and_missing(model):
    data = model.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        model.write_bytes(data[:size])
        refuse(lambda: load(model), "sha256", "model.safetensors")
        refuse(lambda: checkpoints.read_tensors(model), "truncated", "model.safetensors")
    model.unlink()
    refuse(lambda: load(model), "no such file", "model.safetensors")
    model.write_bytes(data)
    model.with_suffix(".json").unlink()
    refuse(lambda: load(model), "no such file", "model.json")


@pytest.mark.parametrize("change,match", [
    (dict(format=2), "format 2, this version reads 1"), (dict(network={"arch": "x"}), "builds no network"), (dict(network=[]), "network is list, expected dict"),
    (dict(network=None), "network is NoneType"), (dict(denoiser={}), "denoiser lacks scalings"), (dict(denoiser={"scalings": "edm", "sigma_data": -1}), "do not fit"),
    (dict(denoiser={"scalings": "edm", "colour": 1}), "do not fit"), (dict(denoiser=[]), "denoiser is list"), (dict(sha256=5), "sha256")])
def test_odd_record(model, change, match):
    file = model.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refuse(lambda: load(model), match, "model.")


@pytest.mark.parametrize("change,match", [
    (dict(model_channels=10**6), "shape|missing"), (dict(num_blocks=10**9), "more than 256 blocks"), (dict(num_blocks=2), "missing"),
    (dict(label_dim=5), "shape"), (dict(label_dim=0), "left over"), (dict(channels=1), "shape"), (dict(channel_mult=[1, 10**6]), "shape"), (dict(channel_mult=[]), "builds no"),
    (dict(resolution="8"), "builds no")])
def test_configuration_that_does_not_fit(model, change, match):
    "Terabytes are refused by arithmetic, before memory is asked for."
    file = model.with_suffix(".json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | dict(network=record["network"] | change)))
    refuse(lambda: load(model), match, "model.safetensors")


def test_the_committed_digits_model_loads():
    "Chapters read it: its notes are those of the script that trained it, without all that a run folder notes."
    path = Path(__file__).resolve().parent.parent / "results" / "models" / "digits.safetensors"
    assert "train_config" in checkpoints.read_config(path)["extra"] and load(path).net.label_dim == 10


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"format": 1}', "[" * 100_000])
def test_json_that_is_none(model, content):
    model.with_suffix(".json").write_text(content)
    refuse(lambda: load(model), "not JSON|lacks", "model.json")


# ---- states ----------------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(lambda n: torch.arange(float(n)), st.integers(0, 3))
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.tuples(t, t) | st.dictionaries(st.text(max_size=5) | st.integers(), t, max_size=3), max_leaves=12)


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_any_tree_comes_back(tree):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder, 3, tree, dict(a=1))
        found, meta, path = load_state(folder)
        assert equal(found, tree) and meta == dict(a=1) and path.name == "state-000000000003.safetensors"


def test_keys_that_look_alike():
    "Paths are no names: a/b, a and b, and 1 beside '1' must not collide."
    tree = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    flat = {}
    assert equal(checkpoints.unpack(json.loads(json.dumps(checkpoints.pack(tree, flat))), flat), tree)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_dtypes_and_layouts(tmp_path, dtype):
    value = torch.arange(24).view(2, 3, 4).to(dtype)
    tree = dict(plain=value, turned=value.permute(2, 0, 1), view=value[:, 1:2], scalar=value[1, 2, 3], empty=value[:0], twice=value)
    save_state(tmp_path, 0, tree)
    assert equal(load_state(tmp_path)[0], tree)


def test_not_a_tree(tmp_path):
    for wrong in (object(), {"a": np.zeros(3)}, {(1, 2): 3}, {None: 3}, {"a": {1, 2}}):
        with pytest.raises(TypeError):
            save_state(tmp_path, 0, wrong)
    with pytest.raises(TypeError):
        save_state(tmp_path, 0, {}, dict(a=torch.zeros(1)))
    with pytest.raises(ValueError, match="keep=0"):
        save_state(tmp_path, 0, {}, keep=0)
    assert not list(tmp_path.iterdir())


def test_last_k(tmp_path):
    assert latest_state(tmp_path) is None and latest_state(tmp_path/"absent") is None
    for step in (5, 10, 20, 40, 1000):
        path = save_state(tmp_path, step, dict(x=torch.tensor(step)), keep=3)
        assert latest_state(tmp_path) == path
    assert [int(p.stem[6:]) for p in state_files(tmp_path)] == [20, 40, 1000]
    save_state(tmp_path, 30, {}, keep=1)              # from an older branch: what was just written stays
    assert [int(p.stem[6:]) for p in state_files(tmp_path)] == [30, 1000]
    refuse(lambda: load_state(tmp_path/"absent"), "no training state", "absent")


def test_overwriting_a_step(tmp_path):
    for value in (1, 2):
        save_state(tmp_path, 7, dict(x=torch.tensor(value)))
    assert load_state(tmp_path)[0]["x"] == 2 and len(list(tmp_path.iterdir())) == 1


def test_damage_names_the_last_good_state(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, step, dict(x=torch.full((100,), float(step))), dict(step=step))
    files = state_files(tmp_path)
    data = bytearray(files[2].read_bytes())
    data[-9] ^= 2
    files[2].write_bytes(data)
    refuse(lambda: load_state(tmp_path), f"checksum.*last good state is {files[1]}", files[2].name)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    refuse(lambda: load_state(tmp_path), f"last good state is {files[0]}", files[2].name)
    assert load_state(files[0])[1] == dict(step=1)
    files[0].write_bytes(b"")
    refuse(lambda: load_state(tmp_path), "no earlier good state", files[2].name)


def test_every_flipped_bit_is_seen(tmp_path):
    path = save_state(tmp_path, 1, dict(w=torch.arange(40.0), n=5), dict(images=3, text="é"))
    whole = path.read_bytes()
    for at in range(len(whole)):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        try:
            tensors, meta, _ = load_state(path)
        except CheckpointError:
            continue
        assert equal(tensors, dict(w=torch.arange(40.0), n=5)) and meta == dict(images=3, text="é"), at


def test_other_safetensors_is_no_state(tmp_path):
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(3)}, tmp_path/"state-000000000009.safetensors")
    refuse(lambda: load_state(tmp_path), "no training state", "state-000000000009")


def test_failure_while_writing_leaves_the_old_state(tmp_path, monkeypatch):
    import safetensors.torch
    save_state(tmp_path, 1, dict(x=torch.zeros(3)))
    whole = state_files(tmp_path)[0].read_bytes()

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(whole[:50])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    for step in (1, 2):
        with pytest.raises(OSError):
            save_state(tmp_path, step, dict(x=torch.ones(3)))
    assert [p.name for p in tmp_path.iterdir()] == ["state-000000000001.safetensors"] and state_files(tmp_path)[0].read_bytes() == whole


def test_killed_while_saving(tmp_path):
    "SIGKILL at any moment: the newest state is whole, and rubbish goes with the next save."
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("POSIX signals")
    code = f"""
import torch
from edm_nb.checkpoints import save_state
x = torch.zeros(2_000_000); step = 0
while True:
    save_state({str(tmp_path)!r}, step, dict(x=x + step), dict(step=step)); step += 1
    if step == 2: print('ready', flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.kill()
    process.wait()
    tensors, meta, path = load_state(tmp_path)
    assert torch.equal(tensors["x"], torch.zeros(2_000_000) + meta["step"])
    save_state(tmp_path, meta["step"] + 1, {})
    assert not list(tmp_path.glob("*.tmp"))


# ---- resuming --------------------------------------------------------------------------------------------------------

def draws(generator):
    return [torch.randn(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1), torch.rand(2, generator=generator).tolist()]


def test_random_numbers_go_on(tmp_path):
    generator = torch.Generator().manual_seed(3)
    draws(generator)                                     # odd counts: Gaussian generators keep a second value
    save_state(tmp_path, 0, rng_state(own=generator))
    expected = [draws(generator) for _ in range(3)]
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    other = torch.Generator()
    set_rng_state(load_state(tmp_path)[0], own=other)
    assert [draws(other) for _ in range(3)] == expected
    with pytest.raises(CheckpointError, match=r"generators \['own'\], given were \[\]"):
        set_rng_state(rng_state(own=generator))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), torch.optim.AdamW])
def test_half_and_half_is_the_whole(tmp_path, optimizer):
    "N steps = N/2 + save + load + N/2, bit for bit, with dropout drawing from the global generator."
    def make():
        torch.manual_seed(0)
        D = Preconditioned(tiny(8, 1, model_channels=8, dropout=0.2)).train()
        return D, optimizer(D.parameters())

    def train(D, opt, n):
        for _ in range(n):
            loss = (D(torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1) ** 2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()

    D, opt = make()
    train(D, opt, 8)
    E, opt = make()
    train(E, opt, 4)
    save_state(tmp_path, 4, dict(model=E.state_dict(), optimizer=opt.state_dict(), rng=rng_state()))
    E, opt = make()
    torch.manual_seed(77)
    state, _, _ = load_state(tmp_path)
    E.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])
    train(E, opt, 4)
    assert all(torch.equal(a, b) for a, b in zip(D.parameters(), E.parameters()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_generators_and_devices(tmp_path):
    x = torch.randn(3, device="cuda")
    generator = torch.Generator("cuda").manual_seed(4)
    save_state(tmp_path, 0, dict(rng=rng_state(g=generator), x=x))
    expected = torch.randn(5, device="cuda"), torch.randn(5, device="cuda", generator=generator)
    torch.cuda.manual_seed(1), generator.manual_seed(1)
    state, _, _ = load_state(tmp_path, device="cuda")
    set_rng_state(state["rng"], g=generator)
    assert torch.equal(torch.randn(5, device="cuda"), expected[0]) and torch.equal(torch.randn(5, device="cuda", generator=generator), expected[1])
    assert torch.equal(state["x"], x)


def test_no_pickle_and_no_unsafe_load():
    "Neither module may reach for the tools it replaces."
    for name in ("checkpoints", "data"):
        text = (ROOT/"edm_nb"/f"{name}.py").read_text()
        for word in ("pickle.load", "torch.load", "eval(", "exec(", "allow_pickle=True", "weights_only"):
            assert word not in text.replace("net.eval()", "").replace(".eval()", ""), (name, word)


# ---- what a stranger's file may contain ------------------------------------------------------------------------------

def rewritten(file, change):
    "The JSON half of a checkpoint after `change(record)`."
    config = file.with_suffix(".json")
    record = json.loads(config.read_text())
    config.write_text(json.dumps(change(record) or record))


def copies(file):
    "Tensors that are no longer mapped from the file: the oldest safetensors cuts a file before it has read what is to be written into it."
    return {name: value.clone() for name, value in checkpoints.read_tensors(file).items()}


@pytest.mark.parametrize("change", [
    lambda r: r.update(extra=[]), lambda r: r.update(extra=None), lambda r: r.update(extra={"train_config": {}, "images": 1, "data": "here"}), lambda r: r.update(extra={"train_config": 3}),
    lambda r: r.update(extra={"train_config": {}, "data": {}, "images": "many"}), lambda r: r.update(extra={"train_config": {}, "data": {}, "images": True}), lambda r: r.update(network=[1]), lambda r: r.update(sha256=None),
    lambda r: r.update(denoiser=None), lambda r: r["denoiser"].update(scalings=7), lambda r: r["denoiser"].update(scalings=["edm"]),
    lambda r: r["denoiser"].update(sigma_data=10**400), lambda r: r["denoiser"].update(sigma_data="0.5"), lambda r: r["denoiser"].update(sigma_min=10**400),
    lambda r: r["denoiser"].update(sigma_max=[1]), lambda r: r["denoiser"].update(scalings="flow", time_scale="1000"), lambda r: r["denoiser"].update(scalings="vp", beta_d=10**400),
    lambda r: r["denoiser"].update(scalings="iddpm", M=10**10), lambda r: r["denoiser"].update(scalings="iddpm", C_2=-1), lambda r: r["denoiser"].update(scalings="iddpm", C_1=0),
    lambda r: r["denoiser"].update(scalings="iddpm", levels=[1.0, 2.0, 0.0]), lambda r: r["denoiser"].update(scalings="iddpm", levels=[[1.0]]),
    lambda r: r["denoiser"].update(scalings="iddpm", levels=[3.0, float("nan"), 0.0]), lambda r: r["network"].update(num_blocks="x" * 60_000, channel_mult=[1] * 60_000),
    lambda r: r["network"].update(channel_mult=[1] * 100_000), lambda r: r["network"].update(resolution=10**400), lambda r: r["network"].update(attn_resolutions=[None]),
    lambda r: r["network"].update(arch={}), lambda r: r["network"].update({"\x1b]0;owned\x07": 1}), lambda r: r.update(format="\x1b[2J"), lambda r: [r]])
def test_records_from_strangers_end_in_one_line(model, change):
    rewritten(model, change)
    with pytest.raises(CheckpointError) as caught:
        load(model)
    message = str(caught.value)
    assert message.isprintable() and "model." in message and len(message) < 700, message


def test_a_record_without_notes_is_whole(model):
    rewritten(model, lambda r: {k: v for k, v in r.items() if k != "extra"})
    assert read_config(model)["extra"] == {} and load(model)


def test_sparse_files_are_refused_by_their_size(model, monkeypatch):
    "Eight gigabytes of nothing beside a small network: neither hashed nor parsed."
    monkeypatch.setattr(checkpoints, "file_hash", lambda path: pytest.fail("hashed"))
    with open(model, "r+b") as file:
        file.truncate(8 * 2**30)
    refuse(lambda: load(model), "bytes; the network that model.json describes has at most", "model.safetensors")
    with open(model.with_suffix(".json"), "r+b") as file:
        file.truncate(8 * 2**30)
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: pytest.fail("read"))
    refuse(lambda: read_config(model), "a configuration has at most", "model.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_pipes_are_no_files(model):
    for path, action in ((model.with_suffix(".json"), read_config), (model, load), (model, checkpoints.read_tensors)):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        refuse(lambda: action(model), "no such file", "model.")
        path.unlink()
        path.write_text("{}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_the_wrong_type(model, dtype):
    from safetensors.torch import save_file
    tensors = copies(model)
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].to(dtype)
    try:
        save_file(tensors, model)
    except KeyError:
        pytest.skip(f"this version of safetensors writes no {dtype}")
    rewritten(model, lambda r: r.update(sha256=file_hash(model)))
    refuse(lambda: load(model), "weights are float32|not a whole", "model.safetensors")


def test_mixed_precision_and_nan(model):
    from safetensors.torch import save_file
    sound = copies(model)
    name = sorted(sound)[3]
    for value, words in ((sound[name].half(), "parameters of types torch.float16, torch.float32"), (sound[name] * float("nan"), "holds NaN"),
                         (sound[name] / 0, "holds NaN or infinite")):
        save_file(sound | {name: value}, model)
        rewritten(model, lambda r: r.update(sha256=file_hash(model)))
        refuse(lambda: load(model), words, "model.safetensors")


def forged(folder, text, **tensors):
    "A state with a right checksum over whatever text."
    from safetensors.torch import save_file
    path = Path(folder)/"state-000000000001.safetensors"
    save_file(tensors, path, metadata={"state": text, "digest": checkpoints.digest(tensors, text)})
    return path


STATE = dict(format=1, version="0", step=1, tree={"dict": []}, meta={})


@pytest.mark.parametrize("text", [
    "{", "[]", "3", "null", '"x"', "[" * 100_000, json.dumps(STATE | dict(format=None)), json.dumps(STATE | dict(meta=[])), json.dumps({k: v for k, v in STATE.items() if k != "tree"}),
    json.dumps({k: v for k, v in STATE.items() if k != "meta"}), json.dumps(STATE | dict(tree={"tensor": "absent"})), json.dumps(STATE | dict(tree={"tensor": []})),
    json.dumps(STATE | dict(tree={"dict": 3})), json.dumps(STATE | dict(tree={"dict": [[1]]})), json.dumps(STATE | dict(tree={"dict": [[[], {"value": 1}]]})),
    json.dumps(STATE | dict(tree={"list": [3]})), json.dumps(STATE | dict(tree={"list": None})), json.dumps(STATE | dict(tree={"value": 1, "list": []})), json.dumps(STATE | dict(tree={})),
    json.dumps(STATE | dict(tree={"import": "os"})), json.dumps(STATE | dict(tree=None)), '{"format": 1, "meta": {}, "tree": ' + '{"list": [' * 3000 + "]}" * 3000 + "}"],
    ids=lambda text: text[:40])
def test_forged_states_end_in_one_line(tmp_path, text):
    "A checksum says that nothing changed, not who wrote it."
    path = forged(tmp_path, text, a=torch.zeros(2))
    refuse(lambda: load_state(path), ".", path.name)


@pytest.mark.parametrize("change", [
    lambda s: s.pop("cpu"), lambda s: s.update(cpu=torch.zeros(3)), lambda s: s.update(cpu=7), lambda s: s.update(numpy={}), lambda s: s["numpy"].update(pos=10**30),
    lambda s: s["numpy"].update(key=torch.zeros(3)), lambda s: s.update(numpy_gauss=[1]), lambda s: s.update(python=[3, [1, 2], None]), lambda s: s.update(python=None),
    lambda s: s.update(generators=None), lambda s: s.update(generators={"g": torch.zeros(2)}), lambda s: s.update(cuda=None)])
def test_generators_of_strangers(change):
    state = rng_state(g=torch.Generator())
    change(state)
    before = random.getstate()
    try:
        with pytest.raises(CheckpointError, match="generators"):
            set_rng_state(state, g=torch.Generator())
    finally:
        random.setstate(before)


@pytest.mark.parametrize("step", [-1, 1.5, True, None, 10**18])
def test_a_counter_that_is_none_is_not_written(tmp_path, step):
    with pytest.raises(ValueError, match="step="):
        save_state(tmp_path, step, {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    "The writer of tensors has an error of its own for it, which nobody above expects."
    import errno

    import safetensors.torch
    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for action in (lambda: save(tmp_path/"m", Preconditioned(NETS["tiny"]())), lambda: save_state(tmp_path/"s", 1, {"a": torch.zeros(1)})):
        with pytest.raises(OSError, match="No space left") as caught:
            action()
        assert caught.value.errno == errno.ENOSPC
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.pkl"])
def test_names_of_other_formats_are_no_folders(tmp_path, name):
    for action in (lambda: save(tmp_path/name, Preconditioned(NETS["tiny"]())), lambda: load(tmp_path/name)):
        refuse(action, "ends in .safetensors", name)
    assert not list(tmp_path.iterdir())


def test_a_networks_own_levels_come_back(tmp_path):
    levels = [9.0, 3.0, 1.0, 0.1, 0.0]
    save(tmp_path/"m", Preconditioned(shaken(NETS["tiny"]()), SCALINGS["iddpm"], levels=levels))
    found = load(tmp_path/"m")
    assert found.levels.tolist() == levels and found.round_sigma(2.5).item() == 3.0 and (found.sigma_min, found.sigma_max) == (0.1, 9.0)
