"Two gloo processes train what one process trains; when one dies, the other does not wait for ever."
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from patience import PATIENCE

from edm_nb import checkpoints
from edm_nb import configs, folders, runs

# Adam divides by the gradient's size and so enlarges rounding where a gradient nearly vanishes: the paper's baseline rate keeps
# that below 1e-5. It also hides a wrong scale of the gradient, which is why gradient norms are compared as well.
TOY = dataclasses.replace(configs.PRESETS["toy"], images=1280, lr_rampup=320, lr=2e-4, log_every=320, save_every=640, augment=0.3, label_dropout=0.1)
SCRIPT = """
import json, os, sys
import torch
from edm_nb import training as T
from edm_nb import configs, folders, generation, runs, updates
config = configs.config_from(json.loads(sys.argv[1]))
for record in runs.train(config, sys.argv[2], device="cpu", timeout=float(sys.argv[3])):
    print(json.dumps([int(os.environ["RANK"]), record.images, record.loss, record.grad_norm]), flush=True)
torch.save([p.detach() for p in record.state.denoiser.parameters()], f"{sys.argv[2]}-rank{os.environ['RANK']}.pt")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(config, folder, world=2, timeout=PATIENCE, script=SCRIPT):
    "What torchrun does: one process per rank, told by the environment who it is."
    port, processes = free_port(), []
    for rank in range(world):
        environment = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port), OMP_NUM_THREADS="1",
                           PYTHONPATH=os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
        processes.append(subprocess.Popen([sys.executable, "-c", script, configs.config_json(config), str(folder), str(timeout)],
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    return processes


def finish(processes, seconds=PATIENCE):
    "Outputs; no process outlives the test."
    try: return [p.communicate(timeout=seconds) for p in processes]
    finally:
        for p in processes: p.kill()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one(tmp_path):
    "20 updates: parameters within 1e-5 of a single process with the same whole batch, identical across ranks, one writer."
    processes = start(TOY, tmp_path/"two")
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    ranks = [torch.load(f"{tmp_path/'two'}-rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks))
    losses, norms = [], []
    for record in runs.train(TOY, device="cpu"): losses.append(record.loss); norms.append(record.grad_norm)
    for a, b in zip(record.state.denoiser.parameters(), ranks[0]): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith("[")] for out, _ in outputs]
    for r in (0, 1):
        assert [line[2] for line in lines[r]] == pytest.approx(losses, rel=1e-4)
        assert [line[3] for line in lines[r]] == pytest.approx(norms, rel=1e-3)
    log = [json.loads(line) for line in (tmp_path/"two"/"log.jsonl").read_text().splitlines()]
    assert [r["images"] for r in log] == [320, 640, 960, 1280]          # written once, by rank 0
    model = checkpoints.load(tmp_path/"two"/"model.safetensors")
    for a, b in zip(model.parameters(), record.state.ema.averages.values()): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_run_and_the_checkpoint_is_whole(tmp_path, victim):
    processes = start(dataclasses.replace(TOY, images=10**7, log_every=128, save_every=128), tmp_path/"run")
    try:
        for line in processes[victim].stdout:
            if line.startswith("[") and json.loads(line)[1] >= 256: break
        processes[victim].send_signal(signal.SIGKILL)
        survivor = processes[1 - victim]
        survivor.communicate(timeout=PATIENCE / 2)        # does not hang: it need not wait for its time-out
        assert survivor.returncode != 0
    finally:
        for p in processes: p.kill(); p.wait(); p.stdout.close(); p.stderr.close()
    tensors, meta, _ = checkpoints.load_state(tmp_path/"run"/"state")
    assert meta["images"] >= 128 and all(v.isfinite().all() for v in tensors.values())
    config = dataclasses.replace(TOY, images=meta["images"] + 128, save_every=128)
    for record in runs.train(config, tmp_path/"run", device="cpu"): pass     # one process goes on where two stopped
    assert record.images == meta["images"] + 128


def test_batch_must_divide():
    from edm_nb.data import digits
    with pytest.raises(ValueError, match="3 processes"): runs.check_data(TOY, digits(), 3)


def test_single_process_has_no_process_group():
    with runs.join_team("cpu") as team:
        assert team.world == 1 and not torch.distributed.is_initialized()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_a_folder_in_use_stops_every_process(tmp_path):
    "The first process finds the lock; the others hear of it at once and do not wait for their time-out."
    with folders.lock_folder(tmp_path/"run"):
        processes = start(TOY, tmp_path/"run", timeout=2*PATIENCE)
        outputs = finish(processes)
    assert all(p.returncode not in (0, None, -9) for p in processes)
    assert all("another run is training" in errors for _, errors in outputs), outputs


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_processes_that_see_different_folders_do_not_train(tmp_path):
    "As on machines without a common disk: one finds the state, the other cannot read it."
    for record in runs.train(dataclasses.replace(TOY, images=320), tmp_path/"run", device="cpu"): pass
    blind = "if os.environ['RANK'] == '1':\n    def lost(path): raise OSError(f'{path} is not here')\n    runs.checkpoints.load_state = lost\n"
    processes = start(TOY, tmp_path/"run", timeout=2*PATIENCE, script=SCRIPT.replace("for record", blind + "for record", 1))
    (_, first), (_, second) = finish(processes)
    assert all(p.returncode not in (0, None, -9) for p in processes)
    assert "process 0: 320; process 1:" in first and "is not here" in second, (first, second)
    assert checkpoints.load_state(tmp_path/"run"/"state")[1]["images"] == 320


def test_errors_and_disagreement_reach_every_process(monkeypatch):
    "The two helpers, with the exchange replaced by what another process would have said."
    team = runs.Team(0, 2, torch.device("cpu"))
    def other_says(pair):
        def exchange(everyone, mine): everyone[:] = [mine, pair]
        monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)
    other_says((5, None))
    assert runs.agree(team, lambda: 5) == 5 and runs.on_first(team, lambda: 7) == 7
    with pytest.raises(ValueError, match="process 0: 4; process 1: 5"): runs.agree(team, lambda: 4)
    other_says((None, OSError("no disk")))
    with pytest.raises(ValueError, match="process 1: no disk"): runs.agree(team, lambda: 5)
    def exchange(everyone, mine): everyone[:] = [(None, folders.FolderBusy("busy")), mine]
    monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)
    with pytest.raises(folders.FolderBusy, match="busy"): runs.on_first(runs.Team(1, 2, torch.device("cpu")), lambda: 1/0)


def pretend_gpus(monkeypatch, count):
    "A machine with `count` GPUs that nothing is ever run on; returns the devices that were chosen."
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    return chosen


def test_cuda_without_a_number_is_the_process_own_gpu(monkeypatch):
    chosen = pretend_gpus(monkeypatch, 2)
    for device in ("cuda", None, "cuda:1"):
        with runs.join_team(device): pass
    assert chosen == ["cuda:0", "cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with runs.join_team("cuda"): pass
    assert chosen[-1] == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="every process on one GPU.*say cuda"): runs.pick_device("cuda:1")
    with pytest.raises(ValueError, match="cuda:5.*this machine has cpu, cuda:0, cuda:1"):
        monkeypatch.setenv("LOCAL_RANK", "5"); runs.pick_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'foo'; this machine has cpu"): runs.pick_device("foo")


def test_half_an_environment_is_an_error(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    for names, lacks in ((["RANK"], "WORLD_SIZE"), (["WORLD_SIZE"], "RANK"), (["RANK", "WORLD_SIZE"], "MASTER_ADDR")):
        with monkeypatch.context() as m:
            for name in names: m.setenv(name, "2")
            with pytest.raises(ValueError, match=f"lacks {lacks}.*start through torchrun"):
                with runs.join_team("cpu"): pass


OWN = """
from torch import nn
from edm_nb.data import ImageSet
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.unused = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3)), nn.Linear(2, 2)
    def forward(self, x, c_noise): return self.inner(torch.cat([x, c_noise[:, None]], 1))
torch.manual_seed(int(os.environ["RANK"]))
more = dict(net=Net(), data=ImageSet(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), None, "noise"))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_an_own_network_starts_the_same_on_every_process(tmp_path, monkeypatch):
    "Each process drew other first weights, and a layer is never used: all train what a single process trains with the first's."
    config = dataclasses.replace(TOY, conditional=False, label_dropout=0.0, augment=0.0, ema_rampup=None, precond={"scalings": "edm", "sigma_data": 1.0})
    script = SCRIPT.replace("for record", OWN + "for record", 1).replace("device=", "**more, device=")
    script = script.replace("[p.detach() for p in record.state.denoiser.parameters()]", "[*record.state.denoiser.parameters(), *record.state.ema.averages.values()]")
    outputs = finish(processes := start(config, tmp_path/"two", script=script))
    assert [p.returncode for p in processes] == [0, 0], outputs
    ranks = [torch.load(f"{tmp_path/'two'}-rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks))
    monkeypatch.setenv("RANK", "0"); monkeypatch.setenv("WORLD_SIZE", "1")
    names = dict(os=os, torch=torch)
    exec(OWN, names)
    for record in runs.train(config, device="cpu", **names["more"]): pass
    ours = [*record.state.denoiser.parameters(), *record.state.ema.averages.values()]
    assert len(ours) == len(ranks[0])
    for a, b in zip(ours, ranks[0]): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    saved = checkpoints.load(tmp_path/"two"/"model.safetensors", net=names["more"]["net"])
    for a, b in zip(saved.parameters(), record.state.ema.averages.values()): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
