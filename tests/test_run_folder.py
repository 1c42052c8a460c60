"The run folder: nothing of others is touched, nothing finished is lost, and what a kill leaves behind does no harm."
import dataclasses
import errno
import json
import os
import shutil
import signal
import stat
import time

import filelock
import pytest
import torch
from safetensors import SafetensorError

from edm_nb import checkpoints, configs, folders, runs, updates
from edm_nb.data import ImageSet

TOY = dataclasses.replace(configs.PRESETS["toy"], batch=32, images=64, lr_rampup=32, log_every=32, save_every=32,
                          network=dict(arch="tiny", model_channels=4, channel_mult=[1], num_blocks=1))
CPU = torch.device("cpu")


def run_all(folder, **change):
    "Records of a run to its end."
    return list(runs.train(dataclasses.replace(TOY, **change), folder, device="cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run, to be copied."
    folder = tmp_path_factory.mktemp("finished")/"run"
    run_all(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    "A finished run of one's own."
    return shutil.copytree(finished, tmp_path/"run")


def contents(folder):
    "Every file of a folder with what it holds."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("text", ['{"model_type": "bert"}', "{}", "[]", "null", "5", "[" * 100_000, '{"network": {"arch": []}}', '{"images": 1e400}', "\xff"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_a_run_only_if_its_configuration_is_ours(tmp_path, text, overwrite):
    "Models from a hub hold exactly config.json and model.safetensors."
    (tmp_path/"config.json").write_text(text, encoding="latin-1")
    (tmp_path/"model.safetensors").write_text("precious")
    (tmp_path/"src").mkdir(); (tmp_path/"src"/"main.py").write_text("work of years")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="belongs to something else.*hoose another folder"):
        next(runs.train(TOY, tmp_path, device="cpu", overwrite=overwrite))
    assert contents(tmp_path) == before


def test_files_with_our_names_but_no_configuration_are_not_replaced(tmp_path):
    (tmp_path/"model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="model.safetensors, but no run"): run_all(tmp_path)
    assert contents(tmp_path) == {"model.safetensors": b"precious"}


def test_overwriting_deletes_only_what_a_run_writes(run):
    (run/"notes.txt").write_text("mine"); (run/"samples").mkdir(exist_ok=True); (run/"samples"/"best.png").write_text("mine too")
    (run/"state"/"thesis.pdf").write_text("and this")
    folders.clear_run(run)
    assert contents(run) == {"notes.txt": b"mine", "samples/best.png": b"mine too", "state/thesis.pdf": b"and this"}


@pytest.mark.parametrize("name", [".lock", "state", "samples", "log.jsonl", "model.safetensors"])
def test_links_inside_a_run_folder_are_not_followed_out_of_it(run, tmp_path, name):
    outside = tmp_path/"outside"
    outside.mkdir(); (outside/"state-000000000001.safetensors").write_text("precious")
    path = run/name
    if path.is_dir(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)
    path.symlink_to(outside if name in ("state", "samples") else outside/"new")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a link"): next(runs.train(TOY, run, device="cpu", overwrite=overwrite))
    assert [p.name for p in outside.iterdir()] == ["state-000000000001.safetensors"]


def test_a_model_without_its_states_is_not_trained_over(run):
    shutil.rmtree(run/"state")
    before = contents(run)
    for images in (64, 128):
        with pytest.raises(ValueError, match="states .* are gone"): run_all(run, images=images)
    assert contents(run) == before
    assert runs.train(dataclasses.replace(TOY, images=128), run, device="cpu", overwrite=True)


def test_a_run_killed_before_its_first_state_begins_again_unless_it_is_another(run):
    shutil.rmtree(run/"state")
    for name in ("model.safetensors", "model.json"): (run/name).unlink()
    with pytest.raises(ValueError, match="another configuration.*lr: 0.002"): run_all(run, lr=0.1)
    assert run_all(run)[-1].images == 64


def test_what_killed_processes_leave_is_swept_and_does_not_block_the_folder(tmp_path):
    names = [".lock", "tmpab_c1234.tmp", "config.json.x1y2.tmp", "log.jsonl.q.tmp", "model.safetensors.1.tmp", "model-000000032.json.2.tmp"]
    for name in names: (tmp_path/name).write_text("part")
    (tmp_path/"state").mkdir(); (tmp_path/"state"/"state-000000000032.safetensors.3.tmp").write_text("part")
    assert not folders.holds_run(tmp_path) and [p.name for p in folders.foreign(tmp_path)] == ["state"]
    run_all(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_partial_and_foreign_lines_of_a_log_are_skipped(run):
    good = (run/"log.jsonl").read_text()
    for rubbish in (b'{"images": 64, "lo', b"garbage}", b"\xff\xfe}", b"[1]}", b"{}", b"[" * 50_000, b'{"images": "64"}', b'{"images": true}'):
        (run/"log.jsonl").write_bytes(good.encode() + rubbish)
        assert len(folders.read_log(run)) == 2
    assert run_all(run) == [] and (run/"log.jsonl").read_text() == good


def test_a_record_lost_between_saving_and_logging_comes_back(run):
    lines = (run/"log.jsonl").read_text().splitlines(True)
    (run/"log.jsonl").write_text(lines[0])
    run_all(run)
    assert (run/"log.jsonl").read_text() == "".join(lines)


def test_what_cuts_a_batch_and_where_it_lies_may_change_when_a_run_goes_on(run):
    assert run_all(run, images=128, micro_batch=16, compile="none", channels_last=False)[-1].images == 128
    with pytest.raises(ValueError, match="another configuration.*precision"): run_all(run, images=192, precision="bf16")


def test_a_run_that_goes_on_keeps_the_length_of_its_decay(tmp_path):
    preset = dataclasses.replace(TOY, images=640, lr_rampup=320, lr_rampdown=640)
    short = folders.with_length(preset, 64, tmp_path)
    assert (short.lr_rampup, short.lr_rampdown) == (32, 64)
    for record in runs.train(short, tmp_path, device="cpu"): pass
    longer = folders.with_length(preset, 128, tmp_path)
    assert (longer.lr_rampup, longer.lr_rampdown) == (32, 64)
    for record in runs.train(longer, tmp_path, device="cpu"): pass
    assert record.images == 128 and record.lr == pytest.approx(TOY.lr / 2)             # of 2 updates in the last 64 images


@pytest.mark.parametrize("change", [dict(images=-64), dict(images=10**30), dict(images="64"), dict(seconds="x"), dict(config=None), dict(record=[]), dict(data=3)])
def test_a_state_with_notes_that_make_no_sense_is_refused(run, change):
    file = checkpoints.latest_state(run/"state")
    tensors, meta, _ = checkpoints.load_state(file)
    checkpoints.save_state(run/"state", 64, tensors, meta | change)
    with pytest.raises(checkpoints.CheckpointError, match="notes are not those of a training"): run_all(run, images=128)


def test_a_state_of_another_network_is_refused(run):
    _, meta, _ = checkpoints.load_state(run/"state")
    for tensors in ({}, {"weights.x": torch.zeros(2)}, {"list": [torch.zeros(1)]}):
        checkpoints.save_state(run/"state", 64, tensors, meta)
        with pytest.raises(checkpoints.CheckpointError, match="does not fit this network"): run_all(run, images=128)
    with pytest.raises(ValueError, match="counter from 0"): checkpoints.save_state(run/"state", -1, {})


def test_a_disk_that_is_really_full_is_an_oserror_that_names_the_last_state(monkeypatch, run):
    "safetensors has an error class of its own, which is no OSError."
    def full(*args, **more): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    before = contents(run/"state")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left.*state-000000000064.*same command") as caught: run_all(run, images=128)
    assert caught.value.errno == errno.ENOSPC and contents(run/"state") == before and not list(run.rglob("*.tmp"))


def test_a_kept_model_is_written_before_the_state_that_passes_it(monkeypatch, tmp_path):
    "A kill between the two must not lose the model: the run goes on from before it."
    def killed(*args, **more): raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints, "save_state", killed)
    with pytest.raises(KeyboardInterrupt): run_all(tmp_path, keep_every=32)
    assert (tmp_path/"model-000000032.safetensors").exists() and checkpoints.latest_state(tmp_path/"state") is None
    monkeypatch.undo()
    run_all(tmp_path, keep_every=32)
    assert [p.name for p in sorted(tmp_path.glob("model-*.safetensors"))] == ["model-000000032.safetensors", "model-000000064.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(monkeypatch, tmp_path, number):
    def unable(*args, **more): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(filelock.FileLock, "acquire", unable)
    with pytest.warns(UserWarning, match="no locks.*no second run"):
        with folders.lock_folder(tmp_path): pass


def test_an_interrupt_in_an_update_whose_record_is_due_loses_no_record(monkeypatch, request, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    step = updates.train_step
    def pressed(forward, state, batch, world=1):
        done = step(forward, state, batch, world)
        if state.images == 64: signal.raise_signal(signal.SIGINT)
        return done
    monkeypatch.setattr(updates, "train_step", pressed)
    with pytest.raises(KeyboardInterrupt): run_all(tmp_path)
    assert [r["images"] for r in folders.read_log(tmp_path)] == [32, 64]


@pytest.mark.parametrize("clock", [lambda: 5.0, iter(range(10**6, 0, -1)).__next__])
def test_a_clock_that_stands_or_runs_backwards_gives_no_speed(monkeypatch, clock):
    monkeypatch.setattr(time, "perf_counter", clock)
    for record in run_all(None): assert record.seconds >= 0 and record.images_per_second == 0


def test_texts_have_the_modes_that_files_usually_have(run):
    modes = {name: stat.S_IMODE((run/name).stat().st_mode) for name in ("config.json", "log.jsonl", "model.json")}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")     # TensorBoard's writer
def test_a_folder_that_was_removed_in_mid_run_can_be_used_again(tmp_path):
    training = runs.train(dataclasses.replace(TOY, images=96), tmp_path/"run", device="cpu")
    next(training)
    (tmp_path/"run").rename(tmp_path/"gone")     # in one go: TensorBoard's thread adds a file while a tree is removed piece by piece
    try:
        for _ in training: pass
    except OSError: pass
    assert folders.holds_run(tmp_path/"run")


def test_numbers_that_are_not_finite_stay_out_of_the_log():
    record = runs.Progress(32, float("nan"), float("inf"), 0.1, 0, 1.0, 1.0, None)
    assert json.loads(json.dumps(record.values(), allow_nan=False))["loss"] is None


def test_labels_and_images_that_are_not_finite_are_refused_before_training():
    x = torch.randn(64, 1, 8, 8)
    labels, images = ImageSet(x, torch.zeros(64, 3)), ImageSet(x.clone(), torch.zeros(64, 3))
    labels.labels[7], images.images[5] = float("nan"), float("inf")
    for data, what in ((labels, "labels"), (images, "images")):
        with pytest.raises(ValueError, match=f"{what} .* NaN or infinite"): runs.check_data(TOY, data)


def test_float_images_stay_float_when_they_are_shrunk():
    x = torch.randn(8, 4, 8, 8)
    small = runs.shrink(ImageSet(x), 4).images
    assert small.dtype == torch.float32
    torch.testing.assert_close(small, x.reshape(8, 4, 4, 2, 4, 2).mean((3, 5)))


@pytest.mark.parametrize("environment, words", [(dict(WORLD_SIZE="-3"), "WORLD_SIZE='-3'"), (dict(WORLD_SIZE="two"), "whole number"),
    (dict(RANK="5", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1"), "RANK=5 of WORLD_SIZE=2")])
def test_an_environment_that_makes_no_sense_is_an_error(monkeypatch, environment, words):
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words): runs.told_by_torchrun()
