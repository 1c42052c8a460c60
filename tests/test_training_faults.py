"Runs that go wrong: killed, interrupted, non-finite, out of space, two in one folder. Nothing that was saved may be lost."
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from patience import PATIENCE

from edm_nb import checkpoints
from edm_nb import configs, folders, runs, updates
from edm_nb.data import digits

TOY = dataclasses.replace(configs.PRESETS["toy"], batch=32, images=640, lr_rampup=64, log_every=32, save_every=64, augment=0.3, label_dropout=0.1,
                          network=dict(arch="tiny", model_channels=8, channel_mult=[1, 2], num_blocks=1, dropout=0.1))
SCRIPT = """
import sys, json, signal
signal.signal(signal.SIGINT, signal.default_int_handler)    # a test run in the background hands Ctrl-C down ignored
from edm_nb import training as T
from edm_nb import configs, folders, generation, runs, updates
config = configs.config_from(json.loads(sys.argv[1]))
for record in runs.train(config, sys.argv[2], device="cpu"):
    print(record.images, flush=True)
"""


def run_all(config, folder=None, **more):
    for record in runs.train(config, folder, device="cpu", **more): pass
    return record


def everything(state):
    "All tensors of a state, in a fixed order."
    return {k: v.clone() for k, v in sorted(folders.state_tensors(state).items())}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


STEPS = SCRIPT.replace("for record", """
step, begun = updates.train_step, []
def told(*arguments):
    begun.append(1)
    print("step", len(begun), flush=True)
    return step(*arguments)
updates.train_step = told
for record""")


def start(config, folder, script=SCRIPT):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen([sys.executable, "-c", script, configs.config_json(config), str(folder)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(autouse=True)
def one_thread():
    "Bit-exactness is promised for equal thread counts."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_kill_minus_nine_then_resume_is_bit_exact(tmp_path):
    "Weights, averages, Adam's moments, counters, data order, noise, dropout: all as if nothing had happened."
    whole = run_all(TOY, tmp_path/"whole")
    process = start(TOY, tmp_path/"killed")
    for line in process.stdout:
        if int(line) >= 224: break          # past a checkpoint, between two
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    process.stdout.close(); process.stderr.close()
    kept = checkpoints.load_state(tmp_path/"killed"/"state")[1]["images"]
    assert 64 <= kept < 640
    resumed = run_all(TOY, tmp_path/"killed")
    assert same(everything(whole.state), everything(resumed.state))
    log = lambda name: [json.loads(line) for line in (tmp_path/name/"log.jsonl").read_text().splitlines()]
    numbers = lambda name: [(r["images"], r["loss"], r["skipped"]) for r in log(name)]
    assert [r[0] for r in numbers("killed")] == list(range(32, 641, 32))     # no record twice, none missing
    assert numbers("killed")[-1] == numbers("whole")[-1]


def test_resume_in_memory_of_the_test_process(tmp_path):
    "Break off at a record, start again: same final state, and the averaged model on disk is the state's."
    whole = run_all(TOY)
    for record in runs.train(TOY, tmp_path, device="cpu"):
        if record.images >= 320: break
    del record
    resumed = run_all(TOY, tmp_path)
    assert same(everything(whole.state), everything(resumed.state))
    model = checkpoints.load(tmp_path/"model.safetensors")
    for (k, a), b in zip(model.named_parameters(), resumed.state.ema.averages.values()): assert torch.equal(a, b), k


def test_longer_training_continues_a_finished_run(tmp_path):
    run_all(dataclasses.replace(TOY, images=320), tmp_path)
    assert same(everything(run_all(TOY, tmp_path).state), everything(run_all(TOY).state))


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    run_all(dataclasses.replace(TOY, images=64), tmp_path)
    with pytest.raises(ValueError, match="another configuration.*lr: 0.002"): run_all(dataclasses.replace(TOY, lr=1.0), tmp_path)


def test_other_data_in_the_same_folder_is_refused(tmp_path):
    data, config = digits(), dataclasses.replace(TOY, images=64)
    run_all(config, tmp_path, data=data)
    changed = data.images.clone()
    changed[3, 0, 2, 2] ^= 1
    for other in (dataclasses.replace(data, images=changed), dataclasses.replace(data, images=data.images[:-1], labels=data.labels[:-1])):
        with pytest.raises(ValueError, match="trained on other data.*sha256"): run_all(TOY, tmp_path, data=other)
    assert run_all(dataclasses.replace(TOY, data="elsewhere.zip", images=128), tmp_path, data=data).images == 128      # a path may change


def test_kept_models_stay(tmp_path):
    for record in runs.train(dataclasses.replace(TOY, images=320, keep_every=128, save_every=64), tmp_path, device="cpu"):
        if record.images == 128: average = {k: v.clone() for k, v in record.state.ema.averages.items()}
    assert [p.name for p in sorted(tmp_path.glob("model-*.safetensors"))] == [f"model-{n:09d}.safetensors" for n in (128, 256, 320)]
    kept = checkpoints.load(folders.model_at(tmp_path, 128))
    assert all(torch.equal(p, average[k]) for k, p in kept.named_parameters())


def poison(monkeypatch, when):
    "Make the loss NaN at chosen updates (counted from 0)."
    plain, count = updates.backward, iter(range(10**9))
    def broken(forward, state, batch, world=1):
        loss = plain(forward, state, batch, world)
        if when(next(count)):
            loss = loss * float("nan")
            for p in state.denoiser.parameters(): p.grad.fill_(float("nan"))
        return loss
    monkeypatch.setattr(updates, "backward", broken)


def test_non_finite_update_is_skipped_and_counted(monkeypatch):
    poison(monkeypatch, lambda k: k in (3, 7, 8))
    before = {}
    config = TOY
    for record in runs.train(config, device="cpu"):
        now = everything(record.state)
        step = record.images // 32 - 1
        if step in (3, 7, 8):
            assert all(torch.equal(now[k], before[k]) for k in now if k.startswith(("weights.", "adam.")))
            assert record.loss != record.loss                   # nothing finite to report
        before = now
    assert record.skipped == 3
    assert all(v.isfinite().all() for v in now.values())


def test_infinite_loss_with_finite_gradients_is_skipped_too(monkeypatch):
    plain = updates.backward
    monkeypatch.setattr(updates, "backward", lambda *a: plain(*a) + float("inf"))
    with pytest.raises(runs.TrainingDiverged): run_all(TOY)


def test_ten_in_a_row_end_the_run_and_name_the_last_good_checkpoint(monkeypatch, tmp_path):
    poison(monkeypatch, lambda k: k >= 4)
    with pytest.raises(runs.TrainingDiverged, match=r"updates in a row.*state-0000000\d+\.safetensors"): run_all(TOY, tmp_path)
    tensors, _, _ = checkpoints.load_state(tmp_path/"state")
    assert all(v.isfinite().all() for v in tensors.values())


def test_nine_in_a_row_do_not(monkeypatch):
    poison(monkeypatch, lambda k: 4 <= k < 13)
    assert run_all(TOY).skipped == 9


def test_two_runs_in_one_folder(tmp_path):
    first = runs.train(TOY, tmp_path, device="cpu")
    next(first)
    with pytest.raises(RuntimeError, match="another run is training in"): next(runs.train(TOY, tmp_path, device="cpu"))
    first.close()
    run_all(TOY, tmp_path)                         # the lock is gone with its owner


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the run folder"): next(runs.train(TOY, tmp_path/"file"/"run", device="cpu"))


def test_disk_full_leaves_the_last_checkpoint(monkeypatch, tmp_path):
    whole, plain, calls = run_all(TOY), checkpoints.save_state, []
    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args, **kwargs)
    monkeypatch.setattr(checkpoints, "save_state", full)
    with pytest.raises(OSError, match="No space left.*state-000000000192.*same command"): run_all(TOY, tmp_path)
    monkeypatch.setattr(checkpoints, "save_state", plain)
    assert checkpoints.load_state(tmp_path/"state")[1]["images"] == 192
    assert same(everything(run_all(TOY, tmp_path).state), everything(whole.state))


def test_ctrl_c_leaves_a_checkpoint_of_the_last_finished_update(tmp_path):
    config = dataclasses.replace(TOY, images=10**7, save_every=10**7)
    process = start(config, tmp_path)
    for line in process.stdout:
        if int(line) >= 96: break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    seen = checkpoints.load_state(tmp_path/"state")[1]["images"]
    assert seen >= 96
    short = dataclasses.replace(TOY, images=seen, save_every=0)
    run = run_all(short)
    tensors = checkpoints.load_state(tmp_path/"state")[0]
    assert same(everything(run.state), dict(sorted(tensors.items())))


def test_interrupt_is_deferred_to_the_end_of_the_step(request):
    # a shell starts background jobs with Ctrl-C ignored, and a test run may be one
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with runs.deferred_interrupt() as pressed:
        signal.raise_signal(signal.SIGINT)        # unlike os.kill, it returns when Python has seen the signal
        assert pressed                            # noticed, not raised
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_log_grid_and_configuration_are_written(tmp_path):
    config = dataclasses.replace(TOY, images=128, grid_every=64)
    run_all(config, tmp_path)
    assert configs.config_from(json.loads((tmp_path/"config.json").read_text())) == config
    assert sorted(p.name for p in (tmp_path/"samples").glob("*.png")) == ["000000064.png", "000000128.png"]
    assert len((tmp_path/"log.jsonl").read_text().splitlines()) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_image_set_that_does_not_fit_stays_where_it_is():
    data = digits()
    assert runs.to_device(data, torch.device("cpu")).images.data_ptr() == data.images.data_ptr()


def test_a_finished_run_gives_its_model_and_is_not_trained_again(tmp_path):
    config = dataclasses.replace(TOY, images=128)
    trained = runs.fit(config, folder=tmp_path, device="cpu")
    for images in (128, 64):
        again = runs.fit(dataclasses.replace(config, images=images), folder=tmp_path, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_a_run_killed_between_its_last_state_and_its_model_gets_the_model(tmp_path):
    config = dataclasses.replace(TOY, images=128)
    run_all(dataclasses.replace(config, images=64), tmp_path)
    old = [(tmp_path/name).read_bytes() for name in ("model.safetensors", "model.json")]
    run_all(config, tmp_path)
    new = (tmp_path/"model.safetensors").read_bytes()
    for name, content in zip(("model.safetensors", "model.json"), old): (tmp_path/name).write_bytes(content)
    runs.fit(config, folder=tmp_path, device="cpu")
    assert (tmp_path/"model.safetensors").read_bytes() == new


def test_overwriting_needs_the_lock_and_a_run(tmp_path):
    run_all(dataclasses.replace(TOY, images=64), tmp_path/"run")
    other = runs.train(TOY, tmp_path/"run", device="cpu")
    next(other)
    with pytest.raises(folders.FolderBusy): next(runs.train(TOY, tmp_path/"run", device="cpu", overwrite=True))
    other.close()
    assert checkpoints.latest_state(tmp_path/"run"/"state") is not None
    first = next(runs.train(TOY, tmp_path/"run", device="cpu", overwrite=True))
    assert first.images == 32
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt, but no run"): next(runs.train(TOY, tmp_path/"mine", device="cpu", overwrite=True))
    assert (tmp_path/"mine"/"thesis.txt").exists()


def test_sigterm_leaves_a_checkpoint_and_exit_code_143(tmp_path):
    process = start(dataclasses.replace(TOY, images=10**7, save_every=10**7, log_every=10**7), tmp_path, STEPS)
    try:
        for line in process.stdout:
            if line == "step 3\n": break                # well inside the updates; no record is due for a long time
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    finally: process.kill()
    assert process.returncode == 143
    assert checkpoints.load_state(tmp_path/"state")[1]["images"] >= 64
