"""Data: every source gives the same images, every kind of damage one clear line, and nothing is half-written."""
import functools
import http.server
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from edm_nb import archives, arrays, data, images, pickles
from edm_nb.data import ImageSet, load_images, write_zip
from edm_nb.files import DataError
from edm_nb.randomness import IndexStream

EXECUTED = "executed"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    "A cache of its own for every test, and no CIFAR-10 from outside."
    monkeypatch.setenv("EDM_NB_CACHE", str(tmp_path/"cache"))
    for name in ("EDM_NB_CIFAR10", "EDM_NB_CIFAR10_TEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path/EXECUTED).exists(), "code from a file was executed"
    assert not list(tmp_path.rglob("*.tmp")), "something half-written was left"


def random_set(n=12, channels=3, height=8, width=8, classes=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, height, width), generator=rng, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, classes, (n,), generator=rng), "random", tuple(f"class {k}" for k in range(classes)))


def same(a, b):
    return torch.equal(a.images, b.images) and (a.labels is None) == (b.labels is None) and (a.labels is None or torch.equal(a.labels, b.labels))


def refuse(action, match, name=""):
    with pytest.raises(DataError, match=match) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and name in message and len(message) < 500, message
    return message


# ---- range -----------------------------------------------------------------------------------------------------------

def test_byte_round_trip():
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(every)), every)
    assert torch.equal(data.to_uint8(data.to_float(every).double()), every)
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    assert data.to_uint8(torch.tensor([0.0])).item() == 128      # 127.5·0 + 128, truncated


def test_float_images_pass_through():
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(data.to_float(x), x)


def test_one_hot():
    assert data.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    vectors = torch.randn(2, 3)
    assert torch.equal(data.one_hot(vectors, 3), vectors)


def test_digits():
    d = data.digits()
    assert d.images.shape == (1797, 1, 8, 8) and d.images.dtype == torch.uint8
    assert d.images.min() == 0 and d.images.max() == 255 and len(d.images.unique()) == 17
    assert d.labels.bincount().min() >= 174 and d.label_dim == 10


def test_import_is_light():
    "Neither scikit-learn nor torchvision nor PIL when the module is imported."
    code = "import sys, edm_nb.data; print([m for m in ('sklearn', 'torchvision', 'PIL', 'nbdev', 'IPython') if m in sys.modules])"
    root = Path(data.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=dict(os.environ, PYTHONPATH=str(root)))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- contract --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images,labels,match", [
    (torch.zeros(2, 3, 4, 4), None, None), (torch.zeros(2, 7, 4, 9, dtype=torch.uint8), None, None),
    (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), None),
    (np.zeros((2, 3, 4, 4)), None, "got ndarray"), (torch.zeros(2, 3, 4), None, None), (torch.zeros(2, 3, 4, dtype=torch.uint8), None, r"\[2, 3, 4\]"), (torch.zeros(2), None, r"\[2\]"), (torch.zeros(2, 3, 4, 4).half(), None, "float16"),
    (torch.zeros(0, 3, 4, 4), None, "at least one"), (torch.zeros(2, 3, 0, 4), None, "at least one"),
    (torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64), "2 images but 3 labels"), (torch.zeros(2, 3, 4, 4), torch.zeros(2), "int64"),
    (torch.zeros(2, 3, 4, 4), torch.tensor([0, -1]), "from -1 to 0")])
def test_contract(images, labels, match):
    if match:
        refuse(lambda: ImageSet(images, labels), match)
    else:
        ImageSet(images, labels)


def test_take_keeps_the_label_space():
    found = random_set(20).take(slice(0, 3))
    assert len(found) == 3 and found.label_dim == 4
    unnamed = ImageSet(torch.zeros(5, 1, 2, 2), torch.tensor([0, 1, 2, 3, 4]))
    assert unnamed.take([0, 1]).label_dim == 5


# ---- zips and folders ------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_zip_round_trip(n, channels, height, width, labelled, seed):
    import tempfile
    original = random_set(n, channels, height, width, seed=seed)
    if not labelled:
        original = ImageSet(original.images)
    with tempfile.TemporaryDirectory() as folder:
        path = write_zip(Path(folder)/"set.zip", original)
        assert same(load_images(path, cache=False), original)
        first = path.read_bytes()
        assert write_zip(path, original).read_bytes() == first


def test_round_trip_of_names_and_vectors(tmp_path):
    original = random_set()
    assert load_images(write_zip(tmp_path/"a.zip", original)).class_names == original.class_names
    vectors = ImageSet(original.images, torch.randn(len(original), 5))
    assert same(load_images(write_zip(tmp_path/"b.zip", vectors)), vectors)


def test_all_sources_agree(tmp_path):
    "The same images as zip, EDM folder, class folders, npz in both layouts."
    original = random_set(30)
    write_zip(tmp_path/"set.zip", original)
    with zipfile.ZipFile(tmp_path/"set.zip") as archive:
        archive.extractall(tmp_path/"folder")
    for i, (image, label) in enumerate(zip(original.images, original.labels)):
        (tmp_path/"classes"/f"class {label}").mkdir(parents=True, exist_ok=True)
        (tmp_path/"classes"/f"class {label}"/f"{i:03d}.png").write_bytes(images.png_bytes(image.numpy()))
    np.savez(tmp_path/"nchw.npz", images=original.images.numpy(), labels=original.labels.numpy())
    np.savez_compressed(tmp_path/"nhwc.npz", images=original.images.permute(0, 2, 3, 1).numpy(), labels=original.labels.numpy())
    for name in ("set.zip", "folder", "nchw.npz", "nhwc.npz"):
        assert same(load_images(tmp_path/name), original), name
    classes = load_images(tmp_path/"classes")
    order = original.labels.argsort(stable=True)
    assert torch.equal(classes.images, original.images[order]) and torch.equal(classes.labels, original.labels[order])
    assert classes.class_names == original.class_names
    (tmp_path/"folder"/"dataset.json").unlink()
    assert load_images(tmp_path/"folder").labels is None        # 00000 is a shelf and no class


def test_hidden_files_do_not_count(tmp_path):
    path = write_zip(tmp_path/"set.zip", random_set(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/00000/._img00000000.png", b"junk")
        archive.writestr(".hidden.png", b"junk")
        archive.writestr("readme.txt", b"text")
    assert len(load_images(path)) == 3


def test_workers_do_not_matter(tmp_path):
    path, original = tmp_path/"set.zip", random_set(101)
    write_zip(path, original)
    for workers in (1, 2, 7):
        assert same(load_images(path, cache=False, workers=workers), original)


def test_small_images_get_one_thread(tmp_path, monkeypatch):
    seen = []
    class Pool(archives.ThreadPoolExecutor):
        def __init__(self, workers):
            seen.append(workers)
            super().__init__(workers)
    monkeypatch.setattr(archives.os, "cpu_count", lambda: 6)
    write_zip(tmp_path/"small.zip", random_set(5))
    write_zip(tmp_path/"large.zip", random_set(5, height=64, width=64))
    monkeypatch.setattr(archives, "ThreadPoolExecutor", Pool)
    for name, workers in (("small", None), ("large", None), ("small", 3)):
        archives.decode_all(archives.open_zip(tmp_path/f"{name}.zip"), workers=workers)
    assert seen == [1, 6, 3]


def test_jpeg_equals_pil(tmp_path):
    import io
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for name, image, options in (("colour", pixels, dict(quality=75)), ("grey", pixels[..., 0], {}), ("smooth", pixels, dict(progressive=True)),
                                 ("fine", pixels, dict(subsampling=0, quality=98))):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", **options)
        folder = tmp_path/name
        folder.mkdir()
        (folder/"a.jpg").write_bytes(buffer.getvalue())
        found = load_images(folder).images[0].numpy()
        expected = np.asarray(Image.open(buffer))
        assert np.array_equal(found, expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)), name


# ---- cache -----------------------------------------------------------------------------------------------------------

def entries(tmp_path):
    return sorted((tmp_path/"cache").glob("decoded-*"))


def no_decoding(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("decoded although cached")
    monkeypatch.setattr(data, "decode_all", fail)


def test_second_load_decodes_nothing(tmp_path, monkeypatch):
    path, original = tmp_path/"set.zip", random_set(30)
    write_zip(path, original)
    load_images(path)
    no_decoding(monkeypatch)
    found = load_images(path)
    assert same(found, original) and found.class_names == original.class_names


def test_key_is_content_not_date(tmp_path, monkeypatch):
    path, original = tmp_path/"set.zip", random_set(30)
    write_zip(path, original)
    load_images(path)
    before = path.stat()
    changed = ImageSet(original.images ^ 1, original.labels, "random", original.class_names)
    write_zip(path, changed)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))            # same name, size and date, other content
    assert same(load_images(path), changed)
    shutil.move(path, tmp_path/"other name.zip")
    os.utime(tmp_path/"other name.zip", (1, 1))                             # other name and date, same content
    no_decoding(monkeypatch)
    assert same(load_images(tmp_path/"other name.zip"), changed)


@pytest.mark.parametrize("file,damage", [("images.npy", "flip"), ("images.npy", "cut"), ("images.npy", "gone"), ("meta.json", "cut"),
                                         ("meta.json", "gone"), ("labels.npy", "cut"), ("labels.npy", "gone")])
def test_damaged_entry_is_made_again(tmp_path, file, damage):
    path, original = tmp_path/"set.zip", random_set(30)
    write_zip(path, original)
    load_images(path)
    target, = (entry/file for entry in entries(tmp_path))
    content = bytearray(target.read_bytes())
    if damage == "flip":
        content[-5] ^= 4
    target.unlink()
    if damage != "gone":
        target.write_bytes(content[:-7] if damage == "cut" else content)
    assert same(load_images(path), original)
    assert target.stat().st_size == len(content)


def test_changing_a_loaded_set_leaves_the_cache(tmp_path):
    path, original = tmp_path/"set.zip", random_set(30)
    write_zip(path, original)
    load_images(path).images.zero_()
    assert same(load_images(path), original)


def test_larger_than_memory(tmp_path, monkeypatch):
    "Read-only map; batches come out right; nothing is checked that would read it all."
    path, original = tmp_path/"set.zip", random_set(64)
    write_zip(path, original)
    monkeypatch.setattr(data, "memory_bytes", lambda: 1000)
    for _ in range(2):
        found = load_images(path)
        index = torch.tensor([5, 63, 0])
        assert torch.equal(found.images[index], original.images[index])
    assert not data.map_images(entries(tmp_path)[0]/"images.npy").flags.writeable


def test_memory_while_streaming(tmp_path):
    "A set of 256 MiB, written as a mapped file, is sampled within 100 MiB of fresh memory."
    code = f"""
import json, resource, numpy as np, torch
from pathlib import Path
from edm_nb import data
from edm_nb import randomness
data.memory_bytes = lambda: 2**28
entry = Path({str(tmp_path)!r})/'entry'; entry.mkdir()
images = np.lib.format.open_memmap(entry/'images.npy', 'w+', np.uint8, (87382, 3, 32, 32))
images[::1000] = 7; images.flush(); del images
(entry/'meta.json').write_text(json.dumps(dict(crc='', shape=[87382, 3, 32, 32], labels=False, class_names=[], notes={{}})))
def own(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]
before = own()
found = data.ImageSet(data.as_tensor(data.read_cache(entry)[0]))
stream = randomness.IndexStream(len(found))
total = sum(int(found.images[stream.next(64)].sum() > 0) for _ in range(50))
print((own() - before) // 1024, total > 0)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    root = Path(data.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(root)))
    assert done.returncode == 0, done.stderr
    grown, sampled = done.stdout.split()
    assert int(grown) < 100 and sampled == "True", done.stdout


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path, original = tmp_path/"set.zip", random_set(10)
    write_zip(path, original)
    (tmp_path/"blocked").write_text("a file where the cache folder should be")
    monkeypatch.setenv("EDM_NB_CACHE", str(tmp_path/"blocked"))
    with pytest.warns(UserWarning, match="EDM_NB_CACHE"):
        assert same(load_images(path), original)


def test_full_disk_is_said_before_decoding(tmp_path, monkeypatch):
    path = write_zip(tmp_path/"set.zip", random_set(10))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 5))
    refuse(lambda: load_images(path), "decodes to 1,920 bytes, but .* has 5 free", "set.zip")
    assert not entries(tmp_path)


def test_two_processes_at_once(tmp_path):
    "Both decode, one entry results, both get the images."
    path, original = tmp_path/"set.zip", random_set(200)
    write_zip(path, original)
    code = f"import sys, torch; from edm_nb.data import load_images; print(int(load_images({str(path)!r}).images.long().sum()))"
    root = Path(data.__file__).parent.parent
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(root))) for _ in range(2)]
    sums = [int(p.communicate()[0]) for p in running]
    assert sums == [int(original.images.long().sum())] * 2 and len(entries(tmp_path)) == 1


# ---- bad input -------------------------------------------------------------------------------------------------------

def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


GOOD = images.png_bytes(np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8))
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60000, 60000) + b"\x08\x02\0\0\0" + bytes(4)
LABELS = '{"labels": [["a.png", 0], ["b.png", 1]]}'

BAD_MEMBERS = [
    ({}, "no images inside"), ({"a.txt": "x"}, "no images inside"), ({"a.png": b""}, "a.png is not a readable image"),
    ({"a.png": b"junk"}, "a.png is not a readable image"), ({"a.jpg": b"\xff\xd8\xff\xe0"}, "a.jpg is not a readable image"),
    ({"a.png": GOOD, "b.png": GOOD[:60]}, "b.png"), ({"a.png": GOOD[:70]}, "a.png cannot be decoded"),
    ({"a.png": GOOD, "b.png": images.png_bytes(np.zeros((3, 8, 9), np.uint8))}, "b.png is 3×8×9 .* but a.png is 3×8×8"),
    ({"a.png": GOOD, "b.png": images.png_bytes(np.zeros((1, 8, 8), np.uint8))}, "b.png is 1×8×8 .* but a.png is 3×8×8"),
    ({"a.png": HUGE}, "a.png declares 3 channels and 60000×60000"), ({"a.png": GOOD, "b.png": HUGE}, "b.png declares"),
    ({"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}, "none of the formats"),
    ({"a.png": GOOD, "dataset.json": "{"}, "dataset.json is not JSON"), ({"a.png": GOOD, "dataset.json": "[" * 100_000}, "dataset.json"),
    ({"a.png": GOOD, "dataset.json": b"\xff\xfe\x00"}, "dataset.json is not JSON"),
    ({"a.png": GOOD, "dataset.json": "[1]"}, "dataset.json holds a list"), ({"a.png": GOOD, "dataset.json": '{"labels": 3}'}, "labels in dataset.json are a int"),
    ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png"]]}'}, "label entry"), ({"a.png": GOOD, "dataset.json": '{"labels": []}'}, "no label for a.png"),
    ({"a.png": GOOD, "c.png": GOOD, "dataset.json": LABELS}, "no label for c.png"),
    ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png", -1]]}'}, "class numbers"), ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png", true]]}'}, "class numbers"),
    ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png", 1.5]]}'}, "class numbers"), ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png", 99999999999]]}'}, "class numbers"),
    ({"a.png": GOOD, "b.png": GOOD, "dataset.json": '{"labels": [["a.png", [1, 2]], ["b.png", [1]]]}'}, "one length"),
    ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png", 5]], "class_names": ["x", "y"]}'}, "expected 0 to 1"),
    ({"a.png": GOOD, "dataset.json": '{"labels": [["a.png", 0]], "class_names": "cat"}'}, "list of strings"),
]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("members,match", BAD_MEMBERS, ids=[m for _, m in BAD_MEMBERS])
def test_bad_zip(tmp_path, members, match, cache):
    path = zip_of(tmp_path/"bad.zip", members)
    refuse(lambda: load_images(path, cache=cache), match, "bad.zip")
    assert not (tmp_path/"cache").exists() or not list((tmp_path/"cache").iterdir())


@pytest.mark.parametrize("members,match", [case for case in BAD_MEMBERS if case[0]], ids=[m for c, m in BAD_MEMBERS if c])
def test_bad_folder(tmp_path, members, match):
    (tmp_path/"bad").mkdir()
    for name, content in members.items():
        (tmp_path/"bad"/name).write_bytes(content.encode() if isinstance(content, str) else content)
    refuse(lambda: load_images(tmp_path/"bad"), match, "bad")


def test_missing_and_empty(tmp_path):
    refuse(lambda: load_images(tmp_path/"absent.zip"), "no such file or folder; expected", "absent.zip")
    (tmp_path/"empty.zip").touch()
    (tmp_path/"empty").mkdir()
    (tmp_path/"text.zip").write_text("not a zip")
    refuse(lambda: load_images(tmp_path/"empty.zip"), "the file is empty; expected", "empty.zip")
    refuse(lambda: load_images(tmp_path/"empty"), "no images inside; expected", "empty")
    refuse(lambda: load_images(tmp_path/"text.zip"), "not a readable zip", "text.zip")


def test_truncated_and_damaged_zips(tmp_path):
    "Cut or changed anywhere: one line, or (where the byte means nothing) the right images."
    original = random_set(20)
    whole, rng = write_zip(tmp_path/"whole.zip", original).read_bytes(), random.Random(0)
    path = tmp_path/"bad.zip"
    for at in [1, 10, len(whole)//2, len(whole) - 1] + [rng.randrange(1, len(whole)) for _ in range(30)]:
        path.write_bytes(whole[:at])
        refuse(lambda: load_images(path, cache=False), ".", "bad.zip")
    refused = 0
    for _ in range(200):
        bad = bytearray(whole)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            found = load_images(path, cache=False)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
        else:       # flips in dates, attributes and labels cannot be seen; pixels are under a checksum
            assert torch.equal(found.images, original.images) or len(found) < len(original)
    assert refused > 100


def test_zip_bombs(tmp_path, monkeypatch):
    "Declared sizes are refused before a byte is inflated."
    path = tmp_path/"bomb.zip"

    def declare(sizes):
        "A zip of small members whose directory says that they are large."
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, size in sizes.items():
                archive.writestr(name, GOOD)
                if size: archive.filelist[-1].file_size = size
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *args: pytest.fail("inflated"))
    declare({"a.png": 70 * 2**20})
    refuse(lambda: load_images(path), "a.png declares 73,400,320 bytes", "bomb.zip")
    declare({"a.png": None, "dataset.json": 9 * 2**20})
    refuse(lambda: load_images(path), "dataset.json declares 9,437,184 bytes", "bomb.zip")
    declare({f"{i}.png": 30 * 2**20 for i in range(40)})
    refuse(lambda: load_images(path), "expected at most 100 times its size", "bomb.zip")


def test_escaping_names_write_nothing(tmp_path):
    path = zip_of(tmp_path/"set.zip", {"../../escaped.png": GOOD, "/etc/b.png": GOOD})
    assert len(load_images(path)) == 1                   # ".." begins with a dot: a hidden name
    assert not (tmp_path.parent/"escaped.png").exists()


# ---- npz -------------------------------------------------------------------------------------------------------------

def test_npz_floats_and_latents(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (5, 4, 8, 6)).astype(np.float64)
    np.savez(tmp_path/"latents.npz", images=x, labels=np.eye(5), layout="NCHW")
    found = load_images(tmp_path/"latents.npz")
    assert found.images.dtype == torch.float32 and np.allclose(found.images, x) and found.labels.shape == (5, 5)


def test_npz_labels_are_never_rounded(tmp_path):
    images, ages = np.zeros((3, 1, 4, 4), np.uint8), np.array([0.05, 4.5, 9.9])
    np.savez(tmp_path/"classes.npz", images=images, labels=np.array([2.0, 0.0, 1.0]))     # whole numbers, stored as floats
    found = load_images(tmp_path/"classes.npz")
    assert found.is_class and found.labels.tolist() == [2, 0, 1]
    np.savez(tmp_path/"ages.npz", images=images, labels=ages[:, None])
    found = load_images(tmp_path/"ages.npz")
    assert not found.is_class and found.label_dim == 1 and torch.equal(found.labels, torch.tensor(ages[:, None], dtype=torch.float32))


@pytest.mark.parametrize("arrays,match", [
    (dict(x=np.zeros(3)), "array named images"), (dict(images=np.zeros((3, 3), np.uint8)), "rank 4"), (dict(images=np.zeros(3)), "rank 4"), (dict(images=np.zeros((2, 3, 4, 4)) + np.nan), "NaN"),
    (dict(images=np.zeros((2, 3, 4, 4)) + 200.0), "reach 200"), (dict(images=np.zeros((2, 3, 4, 4), int)), "int64"),
    (dict(images=np.zeros((0, 3, 4, 4), np.uint8)), "at least one"), (dict(images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.array(["a", "b"])), "expected numbers"),
    (dict(images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.zeros(3, int)), "2 images but 3 labels"),
    (dict(images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.array([0.05, 9.9])), r"one is 0\.05.*labels\[:, None\]"),
    (dict(images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.array([0, np.nan])), "labels hold NaN")])
def test_bad_npz(tmp_path, arrays, match):
    np.savez(tmp_path/"bad.npz", **arrays)
    refuse(lambda: load_images(tmp_path/"bad.npz"), match)


def test_hostile_npz(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (EXECUTED, "w")
    np.savez(tmp_path/"bad.npz", images=np.array([Attack()], dtype=object))
    refuse(lambda: load_images(tmp_path/"bad.npz"), "Python objects", "bad.npz")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 3, 1000, 1000), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    zip_of(tmp_path/"big.npz", {"images.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"x" * 50})
    refuse(lambda: load_images(tmp_path/"big.npz"), "declared", "big.npz")
    for junk in (b"", b"junk", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x01\x00\x10\x00" + b"__import__('os')"):
        zip_of(tmp_path/"junk.npz", {"images.npy": junk})
        refuse(lambda: load_images(tmp_path/"junk.npz"), "not a readable npz", "junk.npz")
    (tmp_path/"text.npz").write_text("text")
    refuse(lambda: load_images(tmp_path/"text.npz"), "not a readable zip", "text.npz")


# ---- pickled batches -------------------------------------------------------------------------------------------------

def batch(n, seed=0):
    rng = np.random.default_rng(seed)
    return {b"batch_label": b"batch", b"labels": rng.integers(0, 10, n).tolist(), b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"filenames": [b"%d.png" % i for i in range(n)]}


def write_batches(folder, n=4, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        (folder/name).write_bytes(pickle.dumps(batch(n, i), protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches(tmp_path, protocol, monkeypatch):
    folder = write_batches(tmp_path/"cifar-10-batches-py", protocol=protocol)
    monkeypatch.setattr(pickle, "load", lambda *a: pytest.fail("unpickled"))
    found, test = load_images(folder), load_images(folder, split="test")
    expected = np.concatenate([batch(4, i)[b"data"] for i in range(5)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(found.images.numpy(), expected) and found.labels.tolist() == sum((batch(4, i)[b"labels"] for i in range(5)), [])
    assert np.array_equal(test.images.numpy(), batch(4, 5)[b"data"].reshape(-1, 3, 32, 32)) and found.class_names == data.CIFAR10_CLASSES


def test_python_2_batch(tmp_path):
    "The original files: byte strings and arrays as Python 2 spelled them."
    raw = np.arange(2*3072, dtype=np.uint8).reshape(2, 3072)
    text = (b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x04testq\x03U\x06labelsq\x04]q\x05(K\x03K\x07eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\n"
            b"q\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNN"
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", raw.nbytes) + raw.tobytes() + b"tbu.")
    assert np.array_equal(pickle.loads(text, encoding="bytes")[b"data"], raw)          # the file is what it should imitate
    (tmp_path/"b").write_bytes(text)
    images, labels = data.read_batch(tmp_path/"b")
    assert np.array_equal(images.reshape(2, 3072), raw) and labels == [3, 7]


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function,args", [(os.system, (f"touch {EXECUTED}",)), (open, (EXECUTED, "w")), (eval, ("1",)), (exec, ("x=1",)),
                                           (np.load, ("x",)), (np.zeros, (10**12,)), (bytearray, (10**11,))], ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("key", [b"data", b"labels", b"extra"])
def test_hostile_batch(tmp_path, function, args, key):
    folder = write_batches(tmp_path/"cifar-10-batches-py")
    (folder/"data_batch_3").write_bytes(pickle.dumps(batch(4) | {key: Attack(function, *args)}, 2))
    refuse(lambda: load_images(folder), "refused: the file asks for .*nothing was executed", "data_batch_3")


def array_call(shape, dtype="u1", raw=b"", order=False, name="numpy.core.multiarray._reconstruct"):
    kind = pickles.Call("numpy.dtype", (dtype, False, True))
    return pickles.Call(name, (), (1, shape, kind, order, raw))


@pytest.mark.parametrize("value", [
    None, 5, [1], array_call((2, 3072), raw=b"x"), array_call((10**6, 10**6), raw=b"x" * 10), array_call((2, 5), "O", b"x" * 10), array_call((2, 5), "f8", b"x" * 80),
    array_call((2.0, 5), raw=b"x" * 10), array_call((-2, -5), raw=b"x" * 10), array_call([2, 5], raw=b"x" * 10), array_call((2, 5), raw=[1]),
    array_call((2, 5), raw=b"x" * 10, name="numpy.dtype"), array_call((10,), raw="\u1234" * 10)], ids=lambda v: "")
def test_odd_arrays(value):
    with pytest.raises(DataError, match="^here"):
        arrays.pickled_array(value, "here")


def test_odd_batches(tmp_path):
    folder = write_batches(tmp_path/"cifar-10-batches-py")
    for changed, match in (({b"labels": [1, 2, 3]}, "expected 4 labels"), ({b"labels": [0, 1, 2, 10]}, "labels from 0 to 9"), ({b"labels": [True]*4}, "labels"),
                           ({b"data": np.zeros((4, 3071), np.uint8)}, "expected \\[n, 3072\\]"), ({b"data": np.zeros((4, 3072))}, "uint8")):
        (folder/"data_batch_1").write_bytes(pickle.dumps(batch(4) | changed, 2))
        refuse(lambda: load_images(folder), match, "data_batch_1")
    (folder/"data_batch_1").write_bytes(pickle.dumps([1, 2], 2))
    refuse(lambda: load_images(folder), "pickled dict", "data_batch_1")
    for content in (b"", b"\x80", b"junk", pickle.dumps(batch(4), 2)[:-3000]):
        (folder/"data_batch_1").write_bytes(content)
        refuse(lambda: load_images(folder), "pickle", "data_batch_1")
    (folder/"data_batch_4").unlink()
    (folder/"data_batch_1").write_bytes(pickle.dumps(batch(4), 2))
    refuse(lambda: load_images(folder), "missing", "data_batch_4")


# ---- finding CIFAR-10 ------------------------------------------------------------------------------------------------

def cifar_like(n=6):
    return ImageSet(random_set(n, 3, 32, 32, classes=3).images, torch.arange(n) % 3, "x", ("a", "b", "c"))


def test_environment(tmp_path, monkeypatch):
    assert data.find_cifar10() is None and data.book_images(5).name == "digits"
    refuse(data.cifar10, "EDM_NB_CIFAR10")
    train, test = write_zip(tmp_path/"c-train.zip", cifar_like(6)), write_zip(tmp_path/"c-test.zip", cifar_like(4))
    monkeypatch.setenv("EDM_NB_CIFAR10", str(train))
    assert data.find_cifar10() == train and data.find_cifar10("test") == test
    assert len(data.cifar10()) == 6 and len(data.cifar10("test")) == 4 and data.cifar10().name == "CIFAR-10"
    assert data.book_images(5).name == "CIFAR-10" and len(data.book_images(5)) == 5
    test.unlink()
    assert data.find_cifar10("test") is None
    other = write_zip(tmp_path/"elsewhere.zip", cifar_like(3))
    monkeypatch.setenv("EDM_NB_CIFAR10_TEST", str(other))
    assert len(data.cifar10("test")) == 3
    folder = write_batches(tmp_path/"cifar-10-batches-py")
    monkeypatch.delenv("EDM_NB_CIFAR10_TEST")
    monkeypatch.setenv("EDM_NB_CIFAR10", str(folder))
    assert len(data.cifar10()) == 20 and len(data.cifar10("test")) == 4
    monkeypatch.setenv("EDM_NB_CIFAR10", str(tmp_path/"absent.zip"))
    refuse(data.cifar10, "no such file", "absent.zip")          # never replaced by digits silently
    refuse(data.book_images, "no such file", "absent.zip")
    refuse(lambda: data.find_cifar10("val"), "expected train or test")


def test_wrong_size_is_not_cifar10(tmp_path):
    path = write_zip(tmp_path/"small.zip", random_set())
    refuse(lambda: data.cifar10(path=path), r"expected \[3, 32, 32\]", "small.zip")


def test_download_through_torchvision(tmp_path, monkeypatch):
    "The real path, with torchvision's address and checksum pointing at a local archive."
    from torchvision.datasets import CIFAR10
    import hashlib
    write_batches(tmp_path/"server"/"cifar-10-batches-py")
    archive = tmp_path/"server"/"cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path/"server"/"cifar-10-batches-py", "cifar-10-batches-py")
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path/"server"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    refuse(lambda: data.cifar10(download=True), "could not be downloaded from http.*set EDM_NB_CIFAR10")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(data.cifar10(download=True)) == 20 and len(data.cifar10("test", download=True)) == 4
    assert data.find_cifar10() == tmp_path/"cache"/"cifar-10-batches-py"
    server.shutdown()
    server.server_close()
    shutil.rmtree(tmp_path/"server")
    assert len(data.cifar10()) == 20                             # found again with no network
    (tmp_path/"cache"/"cifar-10-batches-py"/"data_batch_1").unlink()
    shutil.rmtree(tmp_path/"cache")
    refuse(lambda: data.cifar10(download=True), "could not be downloaded")


# ---- order -----------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 200), st.integers(0, 120))
def test_any_span_equals_the_whole(n, seed, first, count):
    whole = IndexStream(n, seed).span(0, first + count)
    assert torch.equal(IndexStream(n, seed).span(first, count), whole[first:])
    for epoch in range(len(whole) // n):
        assert torch.equal(whole[epoch*n:(epoch+1)*n].sort().values, torch.arange(n))


def test_order_is_pinned():
    "A changed order would break every resumed run: these numbers may only change with a new major version."
    assert IndexStream(10, seed=0).next(14).tolist() == [1, 9, 8, 3, 7, 6, 4, 2, 5, 0, 8, 1, 5, 9]


@pytest.mark.parametrize("before,after", [(1, 1), (1, 4), (4, 1), (2, 3)])
def test_resume_with_other_processes(before, after):
    whole = IndexStream(97, seed=5).span(0, 24*20)
    streams = [IndexStream(97, 5, rank=r, world=before) for r in range(before)]
    seen = [torch.cat([s.next(24 // before) for s in streams]) for _ in range(7)]
    state = json.loads(json.dumps(streams[-1].state()))
    assert all(s.state() == state for s in streams)
    streams = [IndexStream(97, rank=r, world=after).load_state(state) for r in range(after)]
    seen += [torch.cat([s.next(24 // after) for s in streams]) for _ in range(13)]
    assert torch.equal(torch.cat(seen), whole)


def test_bad_streams():
    for arguments in (dict(n=0), dict(n=5, position=-1), dict(n=5, rank=2, world=2), dict(n=5, rank=-1)):
        with pytest.raises(ValueError, match="expected n ≥ 1"):
            IndexStream(**arguments)
    with pytest.raises(ValueError, match="set of 5 items, this one has 6"):
        IndexStream(6).load_state(IndexStream(5).state())


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        return i


def test_as_sampler_for_any_number_of_workers():
    from itertools import islice
    expected = IndexStream(30, seed=2).span(0, 40).view(10, 4)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Rows(), batch_size=4, sampler=IndexStream(30, seed=2), num_workers=workers)
        assert torch.equal(torch.stack(list(islice(loader, 10))), expected), workers


def test_position_is_independent_of_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = IndexStream(50, 1).next(20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(IndexStream(50, 1).next(20), a)


# ---- the real thing --------------------------------------------------------------------------------------------------

CIFAR, CACHE = os.environ.get("EDM_NB_CIFAR10"), os.environ.get("EDM_NB_CACHE")


@pytest.fixture
def real(monkeypatch):
    "The user's own cache: decoded once per machine, not once per test."
    monkeypatch.setenv("EDM_NB_CIFAR10", CIFAR)
    monkeypatch.delenv("EDM_NB_CACHE")
    if CACHE:
        monkeypatch.setenv("EDM_NB_CACHE", CACHE)


@pytest.mark.cifar
@pytest.mark.skipif(not CIFAR, reason="set EDM_NB_CIFAR10")
def test_real_cifar10(real, monkeypatch):
    test = data.find_cifar10("test")
    if test is None:
        pytest.skip("no test set beside EDM_NB_CIFAR10")
    first = data.cifar10("test")
    assert first.images.shape == (10_000, 3, 32, 32) and first.images.dtype == torch.uint8
    assert first.labels.bincount().tolist() == [1000] * 10 and first.class_names == data.CIFAR10_CLASSES
    assert 0.45 < float(data.to_float(first.images).std()) < 0.55
    no_decoding(monkeypatch)
    assert same(data.cifar10("test"), first)


@pytest.mark.cifar
@pytest.mark.skipif(not CIFAR, reason="set EDM_NB_CIFAR10")
def test_real_cifar10_training_set(real):
    found = data.cifar10()
    assert found.images.shape == (50_000, 3, 32, 32) and found.labels.bincount().tolist() == [5000] * 10
