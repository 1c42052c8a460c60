"""Several machines, played by two agents of torchrun on one: they train what one process trains, and one goes on when the other dies.

`python -m torch.distributed.run` is torchrun. Run by hand or nightly: `pytest -m slow tests/test_machines.py`, some minutes.
"""
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from patience import PATIENCE, wait_for

from edm_nb import checkpoints, configs, runs
from edm_nb.data import load_images

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"), pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")]
# The paper's baseline rate keeps rounding below 1e-5, as in test_ddp.
TOY = dataclasses.replace(configs.PRESETS["toy"], images=1280, lr_rampup=320, lr=2e-4, log_every=320, save_every=640)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def agent(port, *command, nodes="2", restarts=0):
    "One machine: an agent in a process group of its own, which its workers share, as a machine shares a power supply."
    conf = "join_timeout=120,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", "1", "--max_restarts", str(restarts),
                             "--rdzv_backend", "c10d", "--rdzv_id", "book", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf", conf,
                             "-m", "edm_nb", *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def unplug(process):
    "The machine is gone: agent and workers at once, without a word."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass


def finish(agents, seconds=PATIENCE):
    try: return [p.communicate(timeout=seconds)[0] for p in agents]
    finally:
        for p in agents: unplug(p)


def log(folder):
    file = folder/"log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def reached(folder):
    return log(folder)[-1]["images"] if log(folder) else 0


def worker_of(process):
    "Whether an agent has a worker."
    return bool(open(f"/proc/{process.pid}/task/{process.pid}/children").read())


def write(folder, config):
    folder.mkdir(exist_ok=True)
    (folder/"config.json").write_text(configs.config_json(config))
    return folder/"config.json"


def together(*command):
    port = free_port()
    agents = [agent(port, *command) for _ in range(2)]
    outputs = finish(agents)
    assert [p.returncode for p in agents] == [0, 0], "\n".join(outputs)
    return outputs


def test_two_machines_train_draw_and_measure_as_one_process_does(tmp_path):
    run = tmp_path/"run"
    together("train", write(tmp_path/"given", TOY), "--out", run, "--device", "cpu")
    for record in runs.train(TOY, device="cpu"): pass
    model = checkpoints.load(run/"model.safetensors")
    for a, b in zip(model.parameters(), record.state.ema.averages.values()): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert [r["images"] for r in log(run)] == [320, 640, 960, 1280]
    together("sample", run, "--seeds", "0-20", "--steps", 4, "--out", tmp_path/"two.npz", "--device", "cpu")
    subprocess.run([sys.executable, "-m", "edm_nb", "sample", run, "--seeds", "0-20", "--steps", "4", "--out", tmp_path/"one.npz", "--device", "cpu"], check=True)
    assert (load_images(tmp_path/"two.npz").images.int() - load_images(tmp_path/"one.npz").images.int()).abs().max() <= 1
    measure = ("fid", run, "--ref", "digits", "--count", 100, "--repeats", 1, "--steps", 4, "--device", "cpu", "--out")
    outputs = together(*measure, tmp_path/"two.json")
    subprocess.run([sys.executable, "-m", "edm_nb", *map(str, measure), tmp_path/"one.json"], check=True)
    two, one = (json.loads((tmp_path/f"{name}.json").read_text()) for name in ("two", "one"))
    assert two["mean"] == pytest.approx(one["mean"], rel=1e-3) and two["protocol"]["seeds"] == one["protocol"]["seeds"]
    assert sum("evaluations, about" in out for out in outputs) == 1                                  # said once


def test_a_run_goes_on_from_its_last_state_when_a_machine_dies(tmp_path):
    "Two agents begin, one is unplugged in mid-run; the other gathers again, alone, resumes and ends where an unbroken run ends."
    run, config, port = tmp_path/"run", dataclasses.replace(TOY, images=64*200, log_every=64, save_every=320, compile="none"), free_port()
    command = "train", write(tmp_path/"given", config), "--out", run, "--device", "cpu", "--timeout", 60
    agents = [agent(port, *command, nodes="1:2", restarts=3)]
    time.sleep(1)                                                       # the first hosts the meeting point, and survives
    agents.append(agent(port, *command, nodes="1:2", restarts=3))
    try:
        wait_for(lambda: worker_of(agents[1]), *agents)                        # the second has joined: no update from now on without both
        met = reached(run)
        wait_for(lambda: reached(run) >= met + 640, *agents)
        assert worker_of(agents[1])
        unplug(agents[1])
        agents[1].wait()
        before = log(run)[-1]["images"]
        output = finish(agents[:1])[0]
    finally:
        for p in agents: unplug(p)
    assert agents[0].returncode == 0 and met + 640 <= before < config.images, output
    records = log(run)
    assert [r["images"] for r in records] == list(range(64, config.images + 1, 64))                  # none twice, none missing
    assert checkpoints.read_config(run)["extra"]["images"] == config.images
    for record in runs.train(config, device="cpu"): pass
    assert records[-1]["loss"] == pytest.approx(record.loss, rel=2e-2)
    for a, b in zip(checkpoints.load(run).parameters(), record.state.ema.averages.values()): torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
