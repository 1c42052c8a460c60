"""The authors' pickle files, imitated without their code: what must load, and what must be refused without running.

The files are written by Python's own pickler from stand-ins that carry the authors' module names. The stand-ins exist only
while a file is written; the reader never sees them.
"""
import collections
import io
import os
import pickle
import math
import random
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm_nb import checkpoints, networks, official
from edm_nb.checkpoints import CheckpointError
from edm_nb.official import Store, load_official
from edm_nb.preconditioning import Preconditioned, iddpm_levels, iddpm_scalings, ve_scalings, vp_scalings

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "import os\nos.system('touch executed')\nraise RuntimeError('embedded source was executed')\n"


# ---- writing such files ----------------------------------------------------------------------------------------------

def standin(module, name, value):
    value.__module__, value.__qualname__, value.__name__ = module, name, name
    return value


reconstruct = standin("torch_utils.persistence", "_reconstruct_persistent_obj", lambda meta: None)
EasyDict = standin("dnnlib.util", "EasyDict", type("EasyDict", (dict,), {}))


class Persistent:
    "Pickles as the authors' persistent classes do."
    def __init__(self, class_name, state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=SOURCE, class_name=self.class_name, state=self.state)
        return reconstruct, (meta,)


def to_bytes(content, protocol=4):
    "Pickle with the authors' modules in place, and only then."
    fakes = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    fakes["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(fakes)
    try:
        return pickle.dumps(content, protocol)
    finally:
        for name in fakes:
            del sys.modules[name]


def as_official(module, class_name=None, **more):
    "One of our modules, as the tree of persistent objects that the authors' file would hold."
    children = {name: as_official(child) for name, child in module._modules.items() if child is not None}
    state = dict(training=False, _parameters=collections.OrderedDict(module._parameters),
                 _buffers=collections.OrderedDict(module._buffers), _modules=collections.OrderedDict(children),
                 _backward_hooks=collections.OrderedDict(), **more)
    if isinstance(module, nn.ModuleDict):
        found = nn.ModuleDict()
        found.__dict__.clear()
        found.__dict__.update(state)
        return found
    names = {"Block": "UNetBlock", "Conv": "Conv2d", "PyramidConv": "Conv2d", "Resample": "Conv2d", "UNet": "SongUNet"}
    return Persistent(class_name or names.get(type(module).__name__, type(module).__name__), state)


def official_file(net, wrapper="EDMPrecond", buffers=None, modules=None, protocol=4, **settings):
    "The bytes of a network pickle."
    state = dict(img_resolution=net.resolution, img_channels=net.channels, label_dim=net.label_dim, use_fp16=False,
                 _init_args=(), _init_kwargs=EasyDict(img_resolution=net.resolution, model_type="SongUNet"),
                 _parameters=collections.OrderedDict(), _buffers=collections.OrderedDict(buffers or {}),
                 _modules=collections.OrderedDict(modules or {"model": as_official(net)}), **settings)
    if protocol >= 4:
        state["_non_persistent_buffers_set"] = set()
    return to_bytes(dict(ema=Persistent(wrapper, state), loss_fn=Persistent("EDMLoss", dict(P_mean=-1.2)),
                         augment_pipe=None, dataset_kwargs=EasyDict(path="data.zip")), protocol)


SMALL = dict(resolution=16, channels=3, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
NETS = {
    "ddpmpp": lambda: networks.ddpmpp(**SMALL, label_dim=10, augment_dim=9),
    "ncsnpp": lambda: networks.ncsnpp(**SMALL),
    "adm": lambda: networks.adm(**SMALL | dict(model_channels=64), label_dim=7, out_channels=6),
}


@pytest.fixture(scope="module")
def nets():
    "Networks with every parameter away from zero, so that each one matters."
    torch.manual_seed(0)
    found = {name: make().eval() for name, make in NETS.items()}
    for net in found.values():
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    return found


@pytest.fixture(autouse=True)
def tripwires(monkeypatch, tmp_path):
    "Whatever a hostile file could reach must not be called; the embedded source would leave a file."
    def trip(*args, **kwargs):
        raise AssertionError("code from the file was executed")
    for name in ("system", "popen", "execv"):
        monkeypatch.setattr(os, name, trip)
    monkeypatch.setattr(pickle, "load", trip)
    monkeypatch.setattr(pickle, "loads", trip)
    monkeypatch.setattr(torch, "load", trip)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path/"executed").exists()


def load_bytes(data, tmp_path, **kwargs):
    path = tmp_path/"network.pkl"
    path.write_bytes(data)
    return load_official(path, **kwargs)


# ---- what must load --------------------------------------------------------------------------------------------------

def published_levels(M=1000, C_1=0.001, C_2=0.008):
    "iDDPM's table as the published networks carry it: the recursion of Table 1 in float32, step by step, from no function of ours."
    bar = [torch.sin(torch.tensor(float(j)) * (math.pi / 2) / M / (C_2 + 1)) ** 2 for j in range(M + 1)]
    u = torch.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (bar[j - 1] / bar[j]).clip(min=C_1) - 1).sqrt()
    return u


WRAPPED = [
    ("ddpmpp", "EDMPrecond", {}, dict(sigma_data=0.6, sigma_min=0, sigma_max=float("inf"))),
    ("ddpmpp", "VPPrecond", dict(scalings=vp_scalings), dict(beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5)),
    ("ncsnpp", "VEPrecond", dict(scalings=ve_scalings), dict(sigma_min=0.02, sigma_max=100)),
    ("adm", "iDDPMPrecond", dict(scalings=iddpm_scalings), dict(C_1=0.001, C_2=0.008, M=1000)),
    ("adm", "EDMPrecond", {}, dict(sigma_data=0.5)),
]


@pytest.mark.parametrize("name,wrapper,ours,settings", WRAPPED, ids=[f"{w[0]}-{w[1]}" for w in WRAPPED])
def test_loads_exactly(nets, tmp_path, name, wrapper, ours, settings):
    net = nets[name]
    buffers = {"u": published_levels()} if wrapper == "iDDPMPrecond" else {}
    if buffers:
        ours = dict(ours, levels=buffers["u"])
    loaded = load_bytes(official_file(net, wrapper, buffers, **settings), tmp_path)
    if wrapper == "EDMPrecond":
        ours = dict(sigma_data=settings["sigma_data"])
    expected = Preconditioned(net, **ours).eval()
    x, sigma = 3 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 3.0])
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    assert torch.equal(loaded(x, sigma, class_labels=labels), expected(x, sigma, class_labels=labels))
    assert not loaded.training
    assert loaded.net.state_dict().keys() == net.state_dict().keys()


def test_a_files_own_table_is_what_its_network_is_told(nets, tmp_path):
    "The table differs from the exact one by more than a fourth digit, and the network rounds to *it*, in and out of JSON."
    table = published_levels()
    exact = iddpm_levels()
    assert 1e-4 < (table.double() / exact - 1)[:-1].abs().max() < 2e-3
    source = tmp_path/"network.pkl"
    source.write_bytes(official_file(nets["adm"], "iDDPMPrecond", {"u": table}, C_1=0.001, C_2=0.008, M=1000))
    loaded = load_official(source)
    again = checkpoints.load(official.convert(source, tmp_path/"out"))
    for denoiser in (loaded, again):
        assert torch.equal(denoiser.round_sigma(exact), table.double())
        assert (denoiser.sigma_min, denoiser.sigma_max) == (table[-2].item(), table[0].item())
    far = table[300:302].double().mean()        # nearer to the one or the other by less than the tables differ
    x, labels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.eye(7)[:2]
    assert torch.equal(loaded(x, float(far), class_labels=labels), again(x, float(far), class_labels=labels))
    missing = load_bytes(official_file(nets["adm"], "iDDPMPrecond", C_1=0.001, C_2=0.008, M=1000), tmp_path)
    assert torch.equal(missing.levels, exact)   # a file without a table: the schedule that it declares


def test_a_file_of_the_authors_own_wrapper():
    "Written by the published iDDPMPrecond around a tiny network of random weights, with the source text taken out."
    loaded = load_official(Path(__file__).with_name("iddpm_tiny.pkl"))
    assert loaded.config["scalings"] == "iddpm" and len(loaded.config["levels"]) == 1001
    assert (loaded.levels / iddpm_levels() - 1)[:-1].abs().max() > 1e-4
    torch.testing.assert_close(loaded.levels.float(), published_levels(), rtol=3e-4, atol=0)
    net = loaded.net
    x = torch.randn(2, net.channels, net.config["resolution"], net.config["resolution"], generator=torch.Generator().manual_seed(0))
    assert loaded(x, 1.0).isfinite().all()


@pytest.mark.parametrize("spelling", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_numpy_spellings(nets, tmp_path, spelling):
    data = official_file(nets["ncsnpp"], protocol=3, sigma_data=np.float64(0.37))
    assert b"multiarray\nscalar\n" in data
    for other in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        data = data.replace(b"c" + other + b"\n", b"c" + spelling.encode() + b"\n")
    assert load_bytes(data, tmp_path).sigma_data == 0.37


def test_shared_and_strided_storages(tmp_path):
    "Views of one storage, transposed and offset, as torch pickles them."
    base = torch.arange(24.0)
    views = [base.view(4, 6), base.view(4, 6).t(), base[5:11], base[::3], torch.tensor(2.5), torch.empty(0, 3)]
    data = to_bytes(dict(views=views))
    path = tmp_path/"v.pkl"
    path.write_bytes(data)
    records, store = official.read_official(path)["views"], Store(2**20)
    for record, view in zip(records, views):
        assert torch.equal(official.read_tensor(record, "v", store), view)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_dtypes(tmp_path, dtype):
    value = torch.arange(6).to(dtype)
    path = tmp_path/"v.pkl"
    path.write_bytes(to_bytes(dict(v=value)))
    found = official.read_tensor(official.read_official(path)["v"], "v", Store(2**20))
    assert found.dtype == dtype and torch.equal(found, value)


def test_convert_writes_weights_and_licence(nets, tmp_path):
    source = tmp_path/"network.pkl"
    source.write_bytes(official_file(nets["ddpmpp"], sigma_data=0.5))
    file = official.convert(source, tmp_path/"out")
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["model.LICENCE.txt", "model.json", "model.safetensors"]
    assert "CC BY-NC-SA 4.0" in (tmp_path/"out"/"model.LICENCE.txt").read_text()
    assert "CC BY-NC-SA 4.0" in checkpoints.read_config(file)["licence"]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(checkpoints.load(file)(x, 1.0), load_official(source)(x, 1.0))
    with pytest.raises(CheckpointError, match="exists"):
        official.convert(source, tmp_path/"out")


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", NETS)
def test_plain_state_dict(nets, tmp_path, name, prefix):
    from safetensors.torch import save_file
    net = nets[name]
    save_file({prefix + k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path/"plain.safetensors")
    file = official.convert(tmp_path/"plain.safetensors", tmp_path/"out", scalings="edm", sigma_data=0.3)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(checkpoints.load(file)(x, 1.0), Preconditioned(net, sigma_data=0.3)(x, 1.0))


@pytest.mark.parametrize("make", [
    lambda: networks.ddpmpp(label_dim=10, augment_dim=9), lambda: networks.ncsnpp(augment_dim=9),
    lambda: networks.ddpmpp(64, model_channels=128, channel_mult=(1, 2, 2, 2), augment_dim=9), lambda: networks.adm(out_channels=6),
    lambda: networks.ddpmpp((16, 32), channels=1, channel_mult=(1, 2, 2), attn_resolutions=(8, 4), num_blocks=2)])
def test_published_sizes_are_inferred(make):
    "From names and shapes alone, without memory for the weights."
    with torch.device("meta"):
        net = make()
    found = official.infer_config(net.state_dict(), "here")
    expected = dict(net.config, dropout=0.0, label_dropout=0.0)
    reachable = {int(k.split("x")[0]) for k in (name.split(".")[1].split("_")[0] for name in net.state_dict() if name.startswith("enc."))}
    expected["attn_resolutions"] = [r for r in expected["attn_resolutions"] if r in reachable]
    assert sorted(found.pop("attn_resolutions")) == sorted(expected.pop("attn_resolutions"))
    assert found == expected


# ---- what must be refused: structure ---------------------------------------------------------------------------------

def refuse(data, tmp_path, match):
    "A `CheckpointError` of one line that names the file."
    with pytest.raises(CheckpointError, match=match) as caught:
        load_bytes(data, tmp_path)
    message = str(caught.value)
    assert "network.pkl" in message and "\n" not in message and len(message) < 600, message


def test_missing_tensor(nets, tmp_path):
    net = NETS["ddpmpp"]()
    del net.map_layer1._parameters["bias"]
    refuse(official_file(net, sigma_data=0.5), tmp_path, "1 tensors missing")


def test_tensor_left_over(tmp_path):
    net = NETS["ddpmpp"]()
    net.map_layer1.register_buffer("surprise", torch.zeros(3))
    refuse(official_file(net, sigma_data=0.5), tmp_path, "1 left over.*surprise")


def test_wrong_shape(tmp_path):
    net = NETS["ddpmpp"]()
    net.map_layer1.bias = nn.Parameter(torch.zeros(65))
    refuse(official_file(net, sigma_data=0.5), tmp_path, r"map_layer1.bias has shape \[65\]")


def test_declared_size_disagrees(nets, tmp_path):
    data = official_file(nets["ddpmpp"], sigma_data=0.5)
    key = b"\x8c\x0eimg_resolution\x94K\x10"
    assert data.count(key) == 1
    refuse(data.replace(key, key[:-1] + b"\x20"), tmp_path, "img_resolution = 32.*16")


def test_wrong_noise_levels(nets, tmp_path):
    table = published_levels()
    swapped, nan = table.clone(), table.clone()
    swapped[[500, 501]], nan[7] = table[[501, 500]], float("nan")
    for levels in (table * 1.01, table[:-1], table[1:], table[None], swapped, nan, torch.zeros(0)):
        refuse(official_file(nets["adm"], "iDDPMPrecond", {"u": levels}, C_1=0.001, C_2=0.008, M=1000), tmp_path, "noise levels")
    for constants in (dict(C_1=0.0), dict(C_2=-1.0), dict(C_1=5.0), dict(C_1=10**400), dict(C_1=float("nan")), dict(M=999)):
        declared = dict(C_1=0.001, C_2=0.008, M=1000) | constants
        refuse(official_file(nets["adm"], "iDDPMPrecond", {"u": table}, **declared), tmp_path, "noise levels|do not fit")
        refuse(official_file(nets["adm"], "iDDPMPrecond", **declared), tmp_path, "levels|do not fit|finite") if "M" not in constants else None


@pytest.mark.parametrize("wrapper, settings", [
    ("EDMPrecond", dict(sigma_data=10**400)), ("EDMPrecond", dict(sigma_data=0.5, sigma_min=10**400)), ("VPPrecond", dict(beta_d=10**400)), ("EDMPrecond", dict(sigma_data=float("nan"))),
    ("VPPrecond", dict(M=float("inf"))), ("VEPrecond", dict(sigma_min=3, sigma_max=2))], ids=str)
def test_settings_that_are_no_numbers(nets, tmp_path, wrapper, settings):
    refuse(official_file(nets["ddpmpp"], wrapper, **settings), tmp_path, "do not fit")


@pytest.mark.parametrize("dtypes", [dict(bias=torch.int64), dict(weight=torch.bool), dict(bias=torch.uint8), dict(weight=torch.float16)], ids=str)
def test_weights_of_the_wrong_type(tmp_path, dtypes):
    net = NETS["ddpmpp"]()
    for name, dtype in dtypes.items():
        net.map_layer1._parameters[name] = getattr(net.map_layer1, name).detach().to(dtype)
    refuse(official_file(net, sigma_data=0.5), tmp_path, "weights are float32|parameters of types")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    net = NETS["ddpmpp"]()
    net.map_layer1.bias.data[3] = value
    refuse(official_file(net, sigma_data=0.5), tmp_path, "map_layer1.bias holds NaN or infinite")


def test_a_files_words_do_not_reach_the_terminal(nets, tmp_path):
    "Escape sequences could move the cursor, set the title or hide the message."
    with pytest.raises(CheckpointError) as caught:
        load_bytes(official_file(nets["ncsnpp"], "Evil\x1b]0;owned\x07\x1b[2J\r\u202e"), tmp_path)
    assert str(caught.value).isprintable() and "Evil" in str(caught.value) and "\\x1b" in str(caught.value)
    net = NETS["ddpmpp"]()
    net.map_layer1.register_buffer("b\x1b[31m", torch.zeros(3))
    with pytest.raises(CheckpointError, match="left over") as caught:
        load_bytes(official_file(net, sigma_data=0.5), tmp_path)
    assert str(caught.value).isprintable()


def test_absurd_constants(nets, tmp_path):
    "A table of 10^10 noise levels would be 80 GB."
    for wrong in (10**10, 0, 1.5):
        refuse(official_file(nets["adm"], "iDDPMPrecond", C_1=0.001, C_2=0.008, M=wrong), tmp_path, "noise levels, expected 2 to")
    refuse(official_file(nets["adm"], sigma_data=-1.0), tmp_path, "do not fit.*sigma_data")


def test_unknown_wrapper_and_other_contents(nets, tmp_path):
    refuse(official_file(nets["ncsnpp"], "SomethingElse"), tmp_path, "SomethingElse.*expected one of EDMPrecond")
    refuse(to_bytes(dict(G_ema=1)), tmp_path, "no entry 'ema'")
    refuse(to_bytes([1, 2]), tmp_path, "expected a dict")
    refuse(b"", tmp_path, "0 bytes")
    refuse(b"not a pickle at all", tmp_path, "damaged|refused")
    buffer = io.BytesIO()
    torch.save({"ema": 1}, buffer)
    refuse(buffer.getvalue(), tmp_path, "zip")
    with pytest.raises(CheckpointError, match="no such file"):
        load_official(tmp_path/"absent.pkl")


# ---- what must be refused: attacks -----------------------------------------------------------------------------------

class Calls:
    "Pickles as a call of `function(*args)`."
    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def in_file(net, value):
    "A complete, otherwise sound file with `value` where sigma_data should be."
    return official_file(net, sigma_data=value)


REAL_SYSTEM, REAL_LOAD, REAL_LOADS = os.system, torch.load, pickle.loads


@pytest.mark.parametrize("function,args", [
    (REAL_SYSTEM, ("touch executed",)), (eval, ("1+1",)), (exec, ("x=1",)), (__import__, ("os",)), (getattr, (1, "real")),
    (REAL_LOADS, (b"N.",)), (REAL_LOAD, ("x",)), (open, ("executed", "w")), (bytearray, (10**10,)), (np.zeros, (10**10,)),
    (torch.nn.Linear, (3, 3)), (collections.defaultdict, (list,)),
], ids=lambda v: getattr(v, "__name__", ""))
def test_foreign_calls(nets, tmp_path, function, args, monkeypatch):
    monkeypatch.undo()      # the pickler must find the real functions by name; the reader has no use for them
    monkeypatch.chdir(tmp_path)
    for value in (Calls(function, *args), [Calls(function, *args)], {"a": (1, Calls(function, *args))}):
        refuse(in_file(nets["ncsnpp"], value), tmp_path, "refused: the file asks for .*nothing was executed")
    assert not (tmp_path/"executed").exists()


def test_foreign_call_before_and_after_a_sound_network(nets, tmp_path):
    "Nothing of a file is used before all of it has been read."
    sound = official_file(nets["ncsnpp"], sigma_data=0.5)
    call = b"cposix\nsystem\n(X\x0e\x00\x00\x00touch executedtR0"
    refuse(b"\x80\x04" + call + sound[2:], tmp_path, "refused")
    refuse(sound[:-1] + call + b".", tmp_path, "refused")


def test_instructions_without_use(tmp_path):
    "Old or indirect ways to reach a class: INST, OBJ, extension codes, persistent text, NEWOBJ_EX, buffers."
    for data in (b"(S'echo'\nios\nsystem\n.", b"(cos\nsystem\nS'echo'\no.", b"\x82\x01.", b"Pname\n.", b"\x97.",
                 b"(\x8c\x05posix\x8c\x06system\x93\x8c\x04echoo."):
        refuse(data, tmp_path, "refused|damaged")


REAL = {"collections.OrderedDict": collections.OrderedDict, "torch.nn.modules.container.ModuleDict": nn.ModuleDict}


def allowed(name, *args, state=None):
    "A call of an allow-listed global, with whatever arguments."
    module, function = name.rsplit(".", 1)
    if name in REAL:
        return Calls(REAL[name], *args, state=state), (module, function, REAL[name])
    fake = standin(module, function, lambda *args: None)
    return Calls(fake, *args, state=state), (module, function, fake)


def with_fakes(build, *fakes):
    "Pickle with stand-ins in `sys.modules` for a moment."
    saved = []
    for module, function, fake in fakes:
        if module not in sys.modules:
            saved.append((sys.modules, module, None))
            sys.modules[module] = types.ModuleType(module)
        holder = sys.modules[module]
        saved.append((holder, function, getattr(holder, function, None)))
        setattr(holder, function, fake)
    try:
        return build()
    finally:
        for holder, name, old in reversed(saved):
            if holder is sys.modules:
                del sys.modules[name]
            elif old is None:
                delattr(holder, name)
            else:
                setattr(holder, name, old)


@pytest.mark.parametrize("name,args,state", [
    ("numpy.core.multiarray.scalar", ("f8", b"12345678"), None),
    ("numpy._core.multiarray.scalar", (1, 2, 3), None),
    ("numpy.dtype", ("f8", False, True), None),
    ("torch.storage._load_from_bytes", (b"",), None),
    ("torch._utils._rebuild_tensor_v2", (), None),
    ("torch._utils._rebuild_parameter", (1, 2, 3), None),
    ("collections.OrderedDict", ([("a", 1)],), None),
    ("torch.nn.modules.container.ModuleDict", ({"a": 1},), {"forward": 1}),
], ids=lambda v: v if isinstance(v, str) else "")
def test_allowed_global_with_wrong_arguments(nets, tmp_path, name, args, state):
    call, fake = allowed(name, *args, state=state)
    refuse(with_fakes(lambda: in_file(nets["ncsnpp"], call), fake), tmp_path, "expected a number, found")
    data = with_fakes(lambda: official_file(nets["ncsnpp"], modules={"model": call}, sigma_data=0.5), fake)
    refuse(data, tmp_path, "expected a (module|dict)")


def tensor_file(nets, *args, storage=None):
    "A file in which one buffer is `_rebuild_tensor_v2(*args)`; `storage` is the argument of `_load_from_bytes`."
    load, fake = allowed("torch.storage._load_from_bytes", storage)
    rebuild, other = allowed("torch._utils._rebuild_tensor_v2", load, *args)
    return with_fakes(lambda: official_file(nets["ncsnpp"], buffers={"x": rebuild}, sigma_data=0.5), fake, other)


def storage_bytes(numel=4):
    buffer = io.BytesIO()
    torch.save(torch.arange(float(numel)).untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    typed = io.BytesIO()
    torch.save(torch.storage.TypedStorage(wrap_storage=torch.arange(float(numel)).untyped_storage(), dtype=torch.float32,
                                          _internal=True), typed, _use_new_zipfile_serialization=False)
    return typed.getvalue()


@pytest.mark.parametrize("args", [
    (0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (0, (10**10,), (0,)), (0, (10**5, 10**5), (0, 0)), (-1, (2,), (1,)),
    (0, (-2,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1)), (0, [2], [1]), (0.0, (2,), (1,)), (0, (2.0,), (1,)), (2**70, (1,), (1,)),
    (0, (1,)*9, (1,)*9)], ids=str)
def test_tensor_beyond_its_storage(nets, tmp_path, args):
    data = tensor_file(nets, *args, False, collections.OrderedDict(), storage=storage_bytes())
    refuse(data, tmp_path, "odd shape|reaches beyond")


def test_hostile_nested_storage(nets, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    evil = io.BytesIO()
    torch.save(Calls(REAL_SYSTEM, "touch executed"), evil, _use_new_zipfile_serialization=False)
    rest = (0, (4,), (1,), False, collections.OrderedDict())
    refuse(tensor_file(nets, *rest, storage=evil.getvalue()), tmp_path, "refused.*system")
    refuse(tensor_file(nets, *rest, storage=pickle.dumps(Calls(REAL_SYSTEM, "touch executed"))), tmp_path, "refused.*system")
    sound = storage_bytes()
    assert sound.count(b"storage") == 1
    swapped = sound.replace(b"ctorch\nFloatStorage\n", b"cposix\nsystem\n")
    assert swapped != sound
    refuse(tensor_file(nets, *rest, storage=swapped), tmp_path, "refused.*system")
    zipped = io.BytesIO()
    torch.save(torch.zeros(4), zipped)
    refuse(tensor_file(nets, *rest, storage=zipped.getvalue()), tmp_path, "damaged|refused")
    for wrong in ("text", None, 7, [b""]):
        refuse(tensor_file(nets, *rest, storage=wrong), tmp_path, "must hold bytes")
    assert not (tmp_path/"executed").exists()


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ten_gigabytes_declared(nets, tmp_path):
    "Sizes are compared with what is there before anything is reserved."
    sound, rest = storage_bytes(), (0, (4,), (1,), False, collections.OrderedDict())
    at = len(sound) - 16 - 8
    assert int.from_bytes(sound[at:at+8], "little") == 4
    count = sound[:at] + (10**10).to_bytes(8, "little") + sound[at+8:]
    header = sound.replace(b"K\x04N", b"\x8a\x05" + (10**10).to_bytes(5, "little") + b"N")
    assert header != sound
    for storage in (count, header):
        assert peak_of(lambda: refuse(tensor_file(nets, *rest, storage=storage), tmp_path, "declares|damaged")) < 20e6
    for literal in (b"\x8e" + (10**10).to_bytes(8, "little"), b"\x8d" + (10**10).to_bytes(8, "little"), b"B\xff\xff\xff\xff",
                    b"\x96" + (10**10).to_bytes(8, "little"), b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"r\xff\xff\xff\xff"):
        assert peak_of(lambda: refuse(b"\x80\x04" + literal + b"x", tmp_path, "damaged|refused")) < 20e6


def test_file_of_instructions(tmp_path, monkeypatch):
    "One byte of file can ask for a hundred of memory; the number of instructions is bounded."
    refuse(b"\x80\x04" + b"}" * 2_100_000 + b".", tmp_path, "instructions")


def test_cycles_and_depth(nets, tmp_path):
    net = as_official(nets["ncsnpp"])
    net.state["_modules"]["again"] = nn.ModuleDict()
    loop = net.state["_modules"]["again"]
    loop.__dict__.clear()
    loop.__dict__.update(_parameters={}, _buffers={}, _modules={})
    loop.__dict__["_modules"]["self"] = loop
    refuse(official_file(nets["ncsnpp"], modules={"model": net}, sigma_data=0.5), tmp_path, "circle")
    refuse(b"\x80\x04}\x94X\x03\x00\x00\x00emah\x00s.", tmp_path, "expected a module, found dict")
    deep = b"\x80\x04}X\x03\x00\x00\x00ema" + b"]" * 300_000 + b"a" * 299_999 + b"s."
    refuse(deep, tmp_path, "expected a module, found list")
    doubled = b"\x80\x04]\x94" + b"".join(b"]\x94(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)) + b"."
    refuse(doubled, tmp_path, "expected a dict, found list")


def tree(names, leaf, depth):
    "ModuleDicts, each with many names for the same next one."
    for _ in range(depth):
        module = nn.ModuleDict()
        module.__dict__.clear()
        module.__dict__.update(_parameters={}, _buffers={}, _modules={f"m{i}": leaf for i in range(names)})
        leaf = module
    return leaf


def test_shared_modules_are_visited_a_bounded_number_of_times(nets, tmp_path, monkeypatch):
    "Ten names for the next of fifteen modules are 10^15 paths in 2,680 bytes: visits are counted, not seconds."
    visits = []
    plain = official.read_module
    monkeypatch.setattr(official, "read_module", lambda *args: (visits.append(1), plain(*args))[1])
    leaf = tree(0, None, 1)
    data = official_file(nets["ncsnpp"], modules={"model": tree(10, leaf, 15)}, sigma_data=0.5)
    refuse(data, tmp_path, "more than 10,000 modules")
    assert len(data) < 5000 and len(visits) <= 10_002
    visits.clear()
    load_bytes(official_file(nets["adm"], sigma_data=0.5), tmp_path)
    assert len(visits) < 1000


def test_long_names_are_refused(nets, tmp_path):
    "A name of a megabyte before a thousand others is a gigabyte of names."
    inner = tree(0, None, 1)
    inner.__dict__["_buffers"] = {f"b{i}": None for i in range(1000)} | {"b": torch.zeros(1)}
    outer = tree(0, None, 1)
    outer.__dict__["_modules"] = {"x" * 1_000_000: inner}
    data = official_file(nets["ncsnpp"], modules={"model": outer}, sigma_data=0.5)
    assert peak_of(lambda: refuse(data, tmp_path, "odd name")) < 3 * len(data) + 2e7
    outer.__dict__["_modules"] = {7: inner}
    refuse(official_file(nets["ncsnpp"], modules={"model": outer}, sigma_data=0.5), tmp_path, "odd name")


LIMITED = """
import resource, sys
from edm_nb.official import load_official
from edm_nb.checkpoints import CheckpointError
def used(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used() + {room}, -1))
try: load_official(sys.argv[1])
except CheckpointError as error: print("refused:", error)
"""


def limited(path, room=300 * 2**20):
    "What the reader says where it may take 300 MiB and no more."
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", LIMITED.format(room=room), path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_views_of_one_storage_are_paid_for(nets, tmp_path):
    "An 8 MB storage under 2,000 buffers is 16 GB in a file of 8 MB; the same bytes as 2,000 storages are, too."
    content, path = storage_bytes(2_000_000), tmp_path/"views.pkl"
    load, fake = allowed("torch.storage._load_from_bytes", content)
    rebuild, other = allowed("torch._utils._rebuild_tensor_v2")
    for again in (lambda: load, lambda: Calls(load.function, content)):
        views = {f"b{i}": Calls(rebuild.function, again(), 0, (2_000_000,), (1,), False, collections.OrderedDict()) for i in range(2000)}
        path.write_bytes(with_fakes(lambda: official_file(nets["ncsnpp"], buffers=views, sigma_data=0.5), fake, other))
        assert path.stat().st_size < 9e6
        assert "more bytes than such a file can hold" in limited(path)


def test_state_on_what_takes_none(tmp_path):
    "BUILD on a global must not change the global."
    before = dict(vars(collections.OrderedDict))
    refuse(b"\x80\x04ccollections\nOrderedDict\n(N}X\x05\x00\x00\x00clearK\x01stb.", tmp_path, "damaged")
    assert dict(vars(collections.OrderedDict)) == before


def test_truncated_anywhere(nets, tmp_path):
    data = official_file(nets["ncsnpp"], sigma_data=0.5)
    random.seed(0)
    for at in [0, 1, 2, 10, len(data) - 1] + [random.randrange(len(data)) for _ in range(40)]:
        refuse(data[:at], tmp_path, ".")


def test_damaged_anywhere(tmp_path):
    "Any byte may change: the result is a sound network or a `CheckpointError`, never something else."
    net = networks.ncsnpp(4, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    data, rng, refused = official_file(net, sigma_data=0.5), random.Random(0), 0
    load_bytes(data, tmp_path)
    structure = [i for i in range(len(data)) if 32 <= data[i] < 127 or data[i] < 8]
    for _ in range(200):
        at, bad = rng.choice(structure), bytearray(data)
        for i in range(at, min(len(bad), at + rng.choice([1, 1, 4]))):
            bad[i] = rng.randrange(256)
        try:
            load_bytes(bytes(bad), tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 100
