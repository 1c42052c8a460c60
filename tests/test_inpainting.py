"Pictures with holes: what is read, what is refused, what stays and what is painted."
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from edm_nb import checkpoints, cli
from edm_nb.data import digits
from edm_nb.generation import load_model, Sampling
from edm_nb.guidance import METHODS
from edm_nb.inpainting import inpaint, mask_operator, read_mask, read_picture, ROUNDING
from edm_nb.networks import tiny
from edm_nb.preconditioning import Preconditioned


def edm_nb(*arguments): return CliRunner().invoke(cli.app, list(map(str, arguments)))


def digit_and_mask(folder):
    "A three, and a mask of its lower half."
    Image.fromarray(digits().images[13, 0].numpy()).save(folder / "digit.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")


@pytest.fixture
def place(tmp_path):
    "A digit, a mask of its lower half, an unconditional and a conditional network without training."
    digit_and_mask(tmp_path)
    for name, labels in (("plain", 0), ("labelled", 10)):
        net = tiny(resolution=8, channels=1, model_channels=8, channel_mult=[1, 2], num_blocks=1, label_dim=labels, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for p in net.parameters(): p += 0.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        checkpoints.save(tmp_path / f"{name}.safetensors", Preconditioned(net, sigma_data=0.75).eval())
    return tmp_path


def test_methods_are_those_of_the_chapter():
    assert cli.METHODS == tuple(METHODS)


@pytest.mark.parametrize("method", list(METHODS))
def test_what_is_known_stays_and_the_seed_paints_the_rest(place, method):
    common = ["inpaint", place / "plain.safetensors", place / "digit.png", "--mask", place / "mask.png", "--method", method, "--steps", 4, "--device", "cpu", "--json"]
    done = edm_nb(*common, "--seeds", "0-2", "--out", place / f"{method}.npz")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["painted"], found["pixels"], found["n"], found["evaluations_per_image"], found["method"]) == (32, 64, 3, 7, method)
    with np.load(place / f"{method}.npz") as file: images = torch.tensor(file["images"])
    assert torch.equal(images[:, :, :4], digits().images[13:14, :, :4].expand(3, -1, -1, -1))
    assert (images[0, :, 4:] != images[1, :, 4:]).any()
    assert edm_nb(*common, "--seeds", 1, "--out", place / "one.npz").exit_code == 0
    with np.load(place / "one.npz") as file: assert np.abs(file["images"].astype(int) - images[1:2].numpy()).max() <= 1
    noisy = edm_nb(*common, "--seeds", 1, "--noise-std", 0.5, "--out", place / "noisy.npz")
    with np.load(place / "noisy.npz") as file: assert (file["images"][:, :, :4] != images[1:2, :, :4].numpy()).any()
    assert json.loads(noisy.stdout)["noise_std"] == 0.5


def test_a_class_must_be_named(place):
    common = ["inpaint", place / "labelled.safetensors", place / "digit.png", "--mask", place / "mask.png", "--steps", 2, "--device", "cpu", "--out", place / "x.png"]
    refused = edm_nb(*common)
    assert refused.exit_code == 2 and "--classes" in refused.output and not (place / "x.png").exists()
    assert edm_nb(*common, "--classes", 3).exit_code == 0 and (place / "x.png").exists()
    again = edm_nb(*common, "--classes", 3)
    assert again.exit_code == 2 and "--overwrite" in again.output


@pytest.mark.parametrize("change, words", [
    (dict(picture="mask9.png"), "9 x 9 grey, but the model draws 8 x 8 grey"), (dict(picture="rgb.png"), "8 x 8 RGB"), (dict(picture="text.png"), "not a picture"),
    (dict(mask="mask9.png"), "its size is 9 x 9"), (dict(mask="white.png"), "everything"), (dict(mask="black.png"), "nothing"), (dict(mask="text.png"), "--mask"),
    (dict(mask="nowhere.png"), "no mask at"), (dict(picture="nowhere.png"), "no picture at"), (dict(more=["--method", "ddrm"]), "mmps, pgdm, dps, replace"),
    (dict(more=["--seeds", "5-1"]), "backwards"), (dict(out="x.jpg"), ".png, .npz, .zip"), (dict(more=["--classes", "3"]), "unconditional"),
])
def test_what_does_not_go_together_is_refused_in_one_line(place, change, words):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(place / "mask9.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / "rgb.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(place / "white.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / "black.png")
    (place / "text.png").write_text("not a picture")
    given = dict(picture="digit.png", mask="mask.png", out="x.npz", more=[]) | change
    done = edm_nb("inpaint", place / "plain.safetensors", place / given["picture"], "--mask", place / given["mask"], "--steps", 2, "--device", "cpu",
                  "--out", place / given["out"], *given["more"])
    assert done.exit_code == 2 and words in done.output and done.output.strip().count("\n") == 0, done.output
    assert not (place / given["out"]).exists()


def test_masks_of_any_kind_are_cut_at_the_middle(tmp_path):
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    for name, image in (("grey.png", Image.fromarray(ramp)), ("rgb.png", Image.fromarray(np.repeat(ramp[..., None], 3, 2))), ("bits.png", Image.fromarray(ramp > 127))):
        image.save(tmp_path / name)
        assert torch.equal(read_mask(tmp_path / name, (8, 8)), torch.tensor(ramp <= 127))
    assert torch.equal(read_picture(tmp_path / "grey.png", (1, 8, 8))[0], torch.tensor(ramp))


def test_the_mask_is_an_operator_with_its_adjoint():
    keep = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    forward, adjoint = mask_operator(keep, 3)
    x, u = torch.randn(2, 3, 5, 4), torch.randn(2, 3*int(keep.sum()))
    torch.testing.assert_close((forward(x)*u).sum(), (x*adjoint(u)).sum())
    assert ROUNDING == pytest.approx(1/127.5/12**0.5)


def test_a_trained_network_continues_the_strokes(tmp_path):
    "The misfit before the known pixels are put back is small, and the painted half resembles the digit more than another does."
    digit_and_mask(tmp_path)
    found = inpaint("results/models/digits.safetensors", tmp_path / "digit.png", tmp_path / "mask.png", tmp_path / "a.npz", list(range(8)), Sampling(), classes=[3], device="cpu")
    assert found["misfit"] < 0.05
    with np.load(tmp_path / "a.npz") as file: drawn = file["images"].astype(float)
    real = digits().images.double().numpy()
    distance = np.sqrt(((drawn[:, None, 0, 4:] - real[None, :, 0, 4:])**2).mean((2, 3)))
    threes = (digits().labels == 3).numpy()
    assert np.median(distance[:, threes].min(1)) < np.median(distance[:, threes].mean(1))*0.6
    assert load_model("results/models/digits.safetensors").net.label_dim == 10
