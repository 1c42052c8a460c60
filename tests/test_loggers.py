"Where the numbers and pictures of a run go: the protocol, TensorBoard, Weights & Biases without a network."
import dataclasses
import functools
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from edm_nb import cli, loggers, runs
from edm_nb.configs import PRESETS
from edm_nb.data import digits

TOY = dataclasses.replace(PRESETS["toy"], images=256, batch=64, log_every=64, grid_every=128, save_every=0, lr_rampup=64)


class Keep:
    def __init__(self, *opened): self.opened, self.said, self.closed = opened, [], 0
    def on_record(self, record): self.said.append((record.images, record.loss))
    def on_images(self, name, images): self.said.append((name, tuple(images.shape)))
    def close(self): self.closed += 1


def run(*args, **more):
    return list(runs.train(*args, data=digits(), device="cpu", **more))


def test_a_logger_hears_every_record_and_then_the_pictures(tmp_path):
    "The same order and the same numbers, with a folder and without; what the caller made is not closed by the run."
    ours = Keep()
    records = run(TOY, tmp_path/"run", loggers=[ours])
    pictures = ("samples", (100, 1, 8, 8))
    numbers = [(r.images, r.loss) for r in records]
    assert ours.said == [numbers[0], numbers[1], pictures, numbers[2], numbers[3], pictures] and ours.closed == 0
    bare = Keep()
    run(TOY, loggers=[bare])
    assert bare.said == ours.said
    assert [json.loads(line)["images"] for line in (tmp_path/"run"/"log.jsonl").read_text().splitlines()] == [64, 128, 192, 256]
    assert sorted(p.name for p in (tmp_path/"run"/"samples").iterdir()) == ["000000128.png", "000000256.png"]


def test_what_a_run_makes_it_closes_however_it_ends(tmp_path):
    made = []
    def make(folder, config):
        made.append(Keep(folder, config))
        return made[-1]
    run(TOY, tmp_path/"run", loggers=[make])
    assert made[0].opened == (tmp_path/"run", TOY) and made[0].closed == 1
    records = runs.train(TOY, data=digits(), device="cpu", loggers=[make])
    next(records)
    assert made[1].closed == 0
    records.close()
    assert made[1].closed == 1 and made[1].opened == (None, TOY)
    class Broken(Keep):
        def on_record(self, record): raise OSError("the server is gone")
    with pytest.raises(OSError, match="the server is gone"): run(TOY, tmp_path/"other", loggers=[make, Broken])
    assert made[2].closed == 1
    assert len(run(dataclasses.replace(TOY, images=128), tmp_path/"other", loggers=[])) >= 1          # can be started again


def test_a_finished_run_opens_no_logger(tmp_path):
    run(TOY, tmp_path/"run")
    def never(folder, config): raise AssertionError("opened")
    assert run(TOY, tmp_path/"run", loggers=[never]) == []


def test_tensorboard_shows_numbers_and_a_sheet(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    records = run(TOY, tmp_path/"run")                                              # by itself, where it is installed
    board = EventAccumulator(str(tmp_path/"run"/"tensorboard"))
    board.Reload()
    points = [(e.step, e.value) for e in board.Scalars("loss")]
    assert points == [(r.images, pytest.approx(r.loss)) for r in records] and "state" not in board.Tags()["scalars"]
    assert [e.step for e in board.Images("samples")] == [128, 256] and board.Images("samples")[0].width == 89
    run(TOY, tmp_path/"twice", loggers=[loggers.TensorBoard])
    assert len(list((tmp_path/"twice"/"tensorboard").iterdir())) == 1


def pieces(data, block=2**15):
    "The messages in a file of Weights & Biases: a header of 7 bytes, then LevelDB's log format, whose blocks hold whole or cut messages."
    place, message = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block                      # no room for a header: the rest of the block is empty
            continue
        length, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
        message += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                                      # whole, or the last part
            yield message
            message = b""


def offline_runs(folder):
    "What Weights & Biases kept on the disk: name, configuration and history of every offline run, in the order of their start."
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    wandb.teardown()                                            # its service writes behind our back, and now has written all
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.name):
        name, config, history = None, {}, []
        for message in pieces(file.read_bytes()):
            record = Record()
            record.ParseFromString(message)
            if record.HasField("run"): name, config = record.run.run_id, {u.key: json.loads(u.value_json) for u in record.run.config.update} or config
            if record.HasField("history"): history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        found.append((name, config, history))
    return found


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    "Numbers over images, sheets, the configuration; a resumed run is the same run there, a replaced one is another."
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, log = tmp_path/"run", [functools.partial(loggers.WandB, project="tests")]
    records = run(dataclasses.replace(TOY, images=128), folder, loggers=log) + run(TOY, folder, loggers=log)
    (name, config, first), (again, _, second) = offline_runs(folder)
    assert name == again == (folder/"wandb-id.txt").read_text() and config["batch"] == 64 and config["network"]["arch"] == "tiny"
    numbers = [h for h in first + second if "loss" in h]
    assert [(h["images"], h["loss"]) for h in numbers] == [(r.images, pytest.approx(r.loss)) for r in records]
    assert all("state" not in h for h in numbers)
    sheets = [h for h in first + second if any(key.startswith("samples") for key in h)]
    assert [h["images"] for h in sheets] == [128, 256] and len(list(folder.glob("wandb/offline-*/files/media/images/samples_*.png"))) == 2
    run(TOY, folder, loggers=log, overwrite=True)
    assert (folder/"wandb-id.txt").read_text() != name and offline_runs(folder)[-1][0] != name


def test_the_command_line_names_loggers(tmp_path, monkeypatch):
    call = lambda *args: CliRunner().invoke(cli.app, ["train", "toy", "--images", "128", "--device", "cpu", *map(str, args)])
    refused = call("--out", tmp_path/"a", "--log", "mlflow")
    assert refused.exit_code == 2 and "--log 'mlflow': expected one of tensorboard, wandb" in refused.output + refused.stderr
    assert cli.LOGGERS == tuple(loggers.LOGGERS)
    made = []
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda folder, config: made.append(Keep(folder, config)) or made[-1])
    assert call("--out", tmp_path/"a", "--log", "wandb", "--set", "log_every=64").exit_code == 0
    assert [images for images, _ in made[0].said] == [64, 128] and made[0].closed == 1
    with pytest.raises(ValueError, match="--log 'x'"): loggers.by_name(["x"])


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'edm_nb\[wandb\]'"): run(TOY, tmp_path/"run", loggers=[loggers.WandB])
    assert not (tmp_path/"run"/"wandb-id.txt").exists()


def test_a_sheet_is_a_picture_in_colour():
    assert loggers.sheet(torch.zeros(20, 1, 8, 8)).shape == (17, 89, 3) and loggers.sheet(torch.zeros(20, 3, 8, 8)).shape == (17, 89, 3)
