"""What people feed to the loader: one set of rules for zips and folders, nothing lost in silence, nothing for free.

Every input is made here, by other tools than the package's own.
"""
import functools
import io
import itertools
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from edm_nb import data
from edm_nb.data import ImageSet, load_images, write_zip
from edm_nb.files import DataError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    "A cache of its own for every test, which holds nothing half-written afterwards."
    monkeypatch.setenv("EDM_NB_CACHE", str(tmp_path/"cache"))
    yield
    assert not list((tmp_path/"cache").glob("*.tmp"))


def saved(image, kind="PNG", **options):
    "The bytes of a PIL image."
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed=0, size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def picture(k):
    "One grey level all over, so that images can be told apart."
    return saved(Image.new("RGB", (8, 8), (10 * k,) * 3))


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def in_folder(path, members):
    for name, content in members.items():
        file = path/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, **options):
    "(grey levels / 10, labels, class names, warnings) of a set."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = load_images(path, **options)
    labels = None if found.labels is None else found.labels.tolist()
    return (found.images[:, 0, 0, 0] // 10).tolist(), labels, found.class_names, [str(w.message) for w in said]


def refuse(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        load_images(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and Path(path).name in str(caught.value)
    return str(caught.value)


# ---- one set of rules for zips and folders -----------------------------------------------------------------------------

def labels_json(names, labels=(0, 1, 0)):
    return json.dumps({"labels": [list(pair) for pair in zip(names, labels)]})


E_COMPOSED, E_SPLIT = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
EDM = ["00000/img0.png", "00000/img1.png", "00000/img2.png"]
RULES = {     # members, labels, class names, what the warning says
    "as published": ([*EDM, "dataset.json"], EDM, [0, 1, 0], (), None),
    "one wrapping folder": ([*("mydata/" + n for n in EDM), "mydata/dataset.json"], EDM, [0, 1, 0], (), None),
    "two wrapping folders": ([*("a/b/" + n for n in EDM), "a/b/dataset.json"], EDM, [0, 1, 0], (), None),
    "wrapped, and the labels know it": ([*("my/" + n for n in EDM), "my/dataset.json"], ["my/" + n for n in EDM], [0, 1, 0], (), None),
    "backslashes": ([n.replace("/", "\\") for n in EDM] + ["dataset.json"], EDM, [0, 1, 0], (), None),
    "backslashes in the labels": ([*EDM, "dataset.json"], [n.replace("/", "\\") for n in EDM], [0, 1, 0], (), None),
    "hidden behind a backslash": ([*EDM, "__MACOSX\\00000\\._img0.png", "00000\\.thumb\\img0.png", "dataset.json"], EDM, [0, 1, 0], (), None),
    "dots in the labels": (["a.png", "b.png", "c.png", "dataset.json"], ["./a.png", "./b.png", "c.png"], [0, 1, 0], (), None),
    "capitals in the labels": (["a.png", "b.PNG", "c.png", "Dataset.json"], ["a.PNG", "b.png", "c.png"], [0, 1, 0], (), None),
    "accents": ([E_SPLIT + "1.png", E_COMPOSED + "2.png", E_COMPOSED + "z.png", "dataset.json"],
                [E_COMPOSED + "1.png", E_SPLIT + "2.png", E_COMPOSED + "z.png"], [0, 1, 0], (), None),
    "class folders": (["cat/1.png", "cat/2.jfif", "dog/1.png"], None, [0, 0, 1], ("cat", "dog"), None),
    "wrapped class folders": (["pets/cat/1.png", "pets/cat/2.png", "pets/dog/x/1.png", "pets/.DS_Store"], None, [0, 0, 1], ("cat", "dog"), None),
    "a folder alone is no class": (["photos/1.png", "photos/2.png", "photos/3.png"], None, None, (), None),
    "shelves are no classes": (EDM + ["00001/img3.png"], None, None, (), None),
    "a stray picture": (["cat/1.png", "cat/2.png", "dog/1.png", "preview.png"], None, [0, 0, 1], ("cat", "dog"), r"preview.png, \.\.\.\), left out: 1"),
    "other kinds": (["1.png", "2.png", "3.png", "4.heic", "5.heic", "6.mp4", "readme.txt", "LICENSE"], None, None, (), r"\.heic files, left out: 2"),
    "labels without a file": (["a.png", "b.png", "dataset.json"], ["a.png", "b.png", "c.png"], [0, 1], (), "without an image, left out: 1"),
}


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("rule", RULES)
def test_one_set_of_rules(tmp_path, rule, kind):
    names, labelled, labels, class_names, said = RULES[rule]
    members, k = {}, itertools.count(1)
    for name in names:
        if name.lower().endswith("dataset.json"):
            members[name] = labels_json(labelled)
        else:
            members[name] = picture(next(k)) if Path(name).suffix.lower() in (".png", ".jfif") and "._" not in name else b"junk"
    path = zipped(tmp_path/"set.zip", members) if kind == "zip" else in_folder(tmp_path/"set", members)
    count = 3 if labels is None else len(labels)
    count += rule.startswith("shelves")
    for _ in range(2):                                        # decoded, then from the cache: with the same words
        levels, got, classes, messages = read(path)
        assert levels == list(range(1, count + 1)) and got == labels and classes == class_names
        assert len(messages) == bool(said), messages
        if said:
            assert re.search(said, messages[0]), messages


def test_dots_in_the_members_of_a_zip(tmp_path):
    for names in (["./a.png", "./b.png", "./c.png", "./dataset.json"], ["./a.png", "b.png", "./c.png", "dataset.json"]):
        members = {n: labels_json(["a.png", "b.png", "c.png"]) if n.endswith("json") else picture(k) for k, n in enumerate(names, 1)}
        assert read(zipped(tmp_path/"set.zip", members))[:2] == ([1, 2, 3], [0, 1, 0])


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("names, match", [
    (["train/cat/1.png", "test/cat/1.png"], "folders test and train are parts of a set and no classes"),
    (["a/dataset.json", "a/1.png", "b/2.png"], "labels are in a/dataset.json, but they are looked for at the top"),
    (["dataset.json", "Dataset.JSON", "1.png"], "expected one label file"),
    (["cat/1.png", "dog/1.png", "1.png", "2.png", "3.png"], "3 images lie beside the class folders cat, dog and 2 in them"),
    (["a/1.png", "a\\1.png"], "are one name"),
])
def test_labels_that_would_be_lost_are_an_error(tmp_path, names, match, kind):
    members = {n: '{"labels": null}' if n.lower().endswith("json") else picture(k) for k, n in enumerate(names)}
    refuse(zipped(tmp_path/"set.zip", members) if kind == "zip" else in_folder(tmp_path/"set", members), match)


def test_two_labels_for_one_image_are_an_error(tmp_path):
    refuse(zipped(tmp_path/"set.zip", {"a.png": picture(1), "dataset.json": '{"labels": [["a.png", 1], ["./a.png", 2]]}'}), "two labels for a.png")


def test_a_folder_entry_is_no_picture(tmp_path):
    with zipfile.ZipFile(tmp_path/"set.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("set.png/"), b"")
        archive.writestr("set.png/1.png", picture(1))
    assert read(tmp_path/"set.zip")[0] == [1]


# ---- links and things that are no files --------------------------------------------------------------------------------

def test_linked_class_folders_are_read(tmp_path):
    in_folder(tmp_path, {"set/cat/1.png": picture(1), "elsewhere/2.png": picture(2)})
    (tmp_path/"set/dog").symlink_to(tmp_path/"elsewhere")
    assert read(tmp_path/"set")[:3] == ([1, 2], [0, 1], ("cat", "dog"))
    (tmp_path/"linked").mkdir()
    for name, target in (("cat", "set/cat"), ("dog", "elsewhere")):
        (tmp_path/"linked"/name).symlink_to(tmp_path/target)
    assert read(tmp_path/"linked")[:3] == ([1, 2], [0, 1], ("cat", "dog"))


def test_links_in_circles_and_shared_links_are_walked_once(tmp_path):
    "Ten folders of ten links each to the next: work grows with the folders, not with the paths through them."
    in_folder(tmp_path, {f"set/level{k}/{k}.png": picture(k) for k in range(10)})
    for k in range(10):
        for j in range(10):
            (tmp_path/f"set/level{k}/link{j}").symlink_to(tmp_path/f"set/level{(k + 1) % 10}")
    levels, labels, classes, said = read(tmp_path/"set")
    assert levels == list(range(10)) == labels and len(classes) == 10
    assert "linked a second time, left out: 100" in said[0]


def test_what_is_no_regular_file_is_left_out_and_counted(tmp_path):
    in_folder(tmp_path, {"set/a.png": picture(1)})
    os.mkfifo(tmp_path/"set/b.png")
    (tmp_path/"set/c.png").symlink_to("/dev/zero")
    (tmp_path/"set/d.png").symlink_to("nowhere")
    levels, _, _, said = read(tmp_path/"set")
    assert levels == [1] and "links to nothing, pipes and devices, left out: 3" in said[0]
    refuse(tmp_path/"set/b.png", "neither a file nor a folder")
    refuse(tmp_path/"set/c.png", "neither a file nor a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    in_folder(tmp_path, {"set/a.png": picture(1), "set/b/c.png": picture(2)})
    (tmp_path/"set/b").chmod(0)
    try: refuse(tmp_path/"set", "cannot be listed")
    finally: (tmp_path/"set/b").chmod(0o700)


# ---- what one picture may be -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, options", [("JPEG", dict(quality=95)), ("PNG", {}), ("WEBP", dict(lossless=True)), ("TIFF", {})])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_format_stands_upright(tmp_path, kind, options, turn):
    tag = Image.Exif()
    tag[0x112] = turn
    content = saved(noise(3, (12, 7)), kind, exif=tag, **options)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))).transpose(2, 0, 1)
    members = {f"{k}.{kind.lower()}": content for k in range(3)}
    found = load_images(zipped(tmp_path/"set.zip", members)) if turn == 1 else None
    if found is None:
        with pytest.warns(UserWarning, match="images turned upright, as their EXIF orientation says: 3"):
            found = load_images(zipped(tmp_path/"set.zip", members))
    assert found.images.shape[1:] == want.shape == ((3, 12, 7) if turn > 4 else (3, 7, 12))
    assert all(np.array_equal(image, want) for image in found.images.numpy())


def test_damaged_exif_changes_nothing(tmp_path):
    tag = Image.Exif()
    tag[0x112] = 6
    content = saved(noise(3, (12, 7)), "JPEG", exif=tag)
    at = content.index(b"Exif\0\0") + 6
    for position in range(at, at + 24, 3):
        for value in (0, 9, 255):
            damaged = bytearray(content)
            damaged[position] = value
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shape = load_images(zipped(tmp_path/"set.zip", {"a.jpg": bytes(damaged)}), cache=False).images.shape
            assert sorted(shape[2:]) == [7, 12]


def palette():
    "Colours 0 to 63, each used once."
    image = Image.frombytes("P", (8, 8), bytes(range(64)))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def transparent_png(mode, transparency):
    return saved(noise(1).convert(mode), transparency=transparency)


RAMP = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
PPM16 = b"P6 8 8 65535\n" + np.random.default_rng(0).integers(0, 65536, 192, dtype=np.uint16).astype(">u2").tobytes()


def png16rgb():
    "A PNG with 16 bits a channel, which PIL would cut to eight."
    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16rgb():
    "A TIFF with 16 bits a channel, uncompressed, one strip."
    pixels = np.random.default_rng(0).integers(0, 65536, 192, dtype=np.uint16).tobytes()
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 256), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(pixels))]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    return head.ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16).ljust(56, b"\0") + pixels


ODD = {
    "16-bit grey PNG": ("png", lambda: saved(RAMP), "divide by 257"), "16-bit RGB PNG": ("png", png16rgb, "divide by 257"),
    "16-bit TIFF": ("tif", lambda: saved(RAMP, "TIFF"), "divide by 257"), "16-bit RGB TIFF": ("tif", tiff16rgb, "divide by 257|not a readable image"),
    "16-bit PGM": ("pgm", lambda: saved(RAMP, "PPM"), "divide by 257"), "16-bit PPM": ("ppm", lambda: PPM16, "divide by 257"),
    "float TIFF": ("tif", lambda: saved(noise().convert("F"), "TIFF"), "divide by 257|floats"),
    "CMYK JPEG": ("jpg", lambda: saved(noise().convert("CMYK"), "JPEG"), r"is CMYK.*convert\('RGB'\)"),
    "CMYK TIFF": ("tif", lambda: saved(noise().convert("CMYK"), "TIFF"), r"is CMYK.*convert\('RGB'\)"),
    "LAB TIFF": ("tif", lambda: saved(noise().convert("LAB"), "TIFF"), r"is LAB.*convert\('RGB'\)"),
    "RGBA PNG": ("png", lambda: saved(noise().convert("RGBA")), "transparency.*background"), "LA PNG": ("png", lambda: saved(noise().convert("LA")), "transparency"),
    "palette with a transparent colour": ("png", lambda: transparent_png("P", 3), "transparency"),
    "grey with a transparent level": ("png", lambda: transparent_png("L", 3), "transparency"),
    "RGB with a transparent colour": ("png", lambda: transparent_png("RGB", (1, 2, 3)), "transparency"),
    "WebP with alpha": ("webp", lambda: saved(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", lossless=True), "transparency"),
    "GIF with transparency": ("gif", lambda: saved(palette(), "GIF", transparency=3), "transparency"),
    **{f"animated {kind}": (kind.lower(), lambda kind=kind: saved(noise(), kind, save_all=True, append_images=[noise(1), noise(2)]), "several pictures")
       for kind in ("GIF", "WEBP", "PNG", "TIFF")},
}


@pytest.mark.parametrize("kind", ODD)
def test_what_needs_a_choice_is_refused_with_advice(tmp_path, kind):
    suffix, make, match = ODD[kind]
    refuse(zipped(tmp_path/"set.zip", {f"a.{suffix}": make()}), f"a.{suffix} .*({match})", cache=False)


def test_the_advice_for_16_bits_keeps_the_picture():
    levels = lambda pixels: len(np.unique(pixels))
    assert levels((np.asarray(RAMP) // 257).astype("uint8")) == levels(RAMP) == 64


@pytest.mark.parametrize("name, kind, mode", [("a.gif", "GIF", "P"), ("a.GIF", "GIF", "L"), ("a.jfif", "JPEG", "RGB"), ("a.jpe", "JPEG", "L")])
def test_still_pictures_of_every_ending(tmp_path, name, kind, mode):
    content = saved(noise(2).convert(mode), kind)
    opened = Image.open(io.BytesIO(content))
    shown = np.asarray(opened.convert("L" if opened.mode == "L" else "RGB"))
    found = load_images(zipped(tmp_path/"set.zip", {name: content})).images[0].numpy()
    assert np.array_equal(found, shown[None] if shown.ndim == 2 else shown.transpose(2, 0, 1))


def test_jpeg_with_stray_bytes_and_jpeg_cut_short(tmp_path):
    content = saved(noise(4, (32, 32)), "JPEG")
    at = content.index(b"\xff\xdb")
    want = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    for stray in (b"abc", b"\x00\x00", b"\xff\xff", b"\xff\x00x"):
        found = load_images(zipped(tmp_path/"set.zip", {"a.jpg": content[:at] + stray + content[at:]}), cache=False)
        assert np.array_equal(found.images[0].numpy(), want)
    refuse(zipped(tmp_path/"set.zip", {"a.jpg": content[:-60]}), r"a.jpg cannot be decoded \(.*(truncated|incomplete)")


def test_packed_in_a_way_that_python_does_not_read(tmp_path):
    content = bytearray(zipped(tmp_path/"set.zip", {"a.png": picture(1)}).read_bytes())
    content[8:10] = struct.pack("<H", 9)                                    # deflate64, as Windows packs large files
    at = content.index(b"PK\x01\x02")
    content[at+10:at+12] = struct.pack("<H", 9)
    (tmp_path/"set.zip").write_bytes(content)
    refuse(tmp_path/"set.zip", "packed in a way that Python does not read .*pack the images anew with plain deflate")


@pytest.mark.parametrize("name, content, match", [
    ("a.npz", b"\x93NUMPY\x01\x00", "one numpy array; store it with np.savez"), ("a.zip", b"\x93NUMPY\x01\x00", "one numpy array"),
    ("a.tar.gz", b"\x1f\x8b\x08", "gzip or tar.gz archive; unpack it"), ("a.zip", b"7z\xbc\xaf\x27\x1c", "7z archive"),
    ("a.png", picture(1), "one picture; give the folder"), ("a.zip", b"<!DOCTYPE html><html>", "web page, so the download went wrong"),
    ("a.npz", b"<!DOCTYPE html><html>", "web page"), ("a.zip", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("a.zip", b"text", "not a readable zip")])
def test_other_kinds_of_file_are_called_by_their_name(tmp_path, name, content, match):
    (tmp_path/name).write_bytes(content)
    refuse(tmp_path/name, match)


def test_names_of_strangers_stay_in_their_line(tmp_path):
    "A name with a newline and a terminal escape is spelled out; é stays é."
    for name in ("é\n\x1b[31m.png", "é\n\x1b[31m/a.png"):
        said = refuse(zipped(tmp_path/"set.zip", {name: b"junk", "z/b.png": picture(1)}), r"é\\n\\x1b")
        assert said.isprintable()


# ---- labels ------------------------------------------------------------------------------------------------------------

def test_vector_labels_of_any_length(tmp_path):
    "What the writer makes, the reader takes: 512 numbers for each of 200 small images."
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    original = ImageSet(images, torch.randn(200, 512))
    path = write_zip(tmp_path/"set.zip", original)
    assert torch.equal(load_images(path).labels, original.labels)
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(tmp_path/"packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for other in (tmp_path/"packed.zip", in_folder(tmp_path/"folder", members)):
        found = load_images(other)
        assert torch.equal(found.labels, original.labels) and torch.equal(found.images, images)
    few = ImageSet(images[:10], torch.arange(10), class_names=tuple(f"a long name of class {k}" for k in range(21_841)))
    with pytest.warns(UserWarning, match="21,831 of 21,841 classes have no image"):
        assert load_images(write_zip(tmp_path/"few.zip", few)).class_names == few.class_names


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    one = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    for image_set, match in ((ImageSet(one, torch.rand(1, 10**6)), "labels take .* store them in an npz"),
                             (ImageSet(torch.zeros(1, 1, 1, 8193, dtype=torch.uint8)), "sides up to 8192")):
        with pytest.raises(DataError, match=match):
            write_zip(tmp_path/"set.zip", image_set)
        assert not (tmp_path/"set.zip").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1e39", "-1e39", "1" + "0" * 400])
def test_vector_labels_are_finite_in_float32(tmp_path, value):
    for members in ({"a.png": picture(1), "b.png": picture(2), "dataset.json": '{"labels": [["a.png", [0, 1]], ["b.png", [%s, 1]]]}' % value},):
        refuse(zipped(tmp_path/"set.zip", members), "label of b.png or a later one holds NaN, infinity|label of a.png or a later one")
        refuse(in_folder(tmp_path/"set", members), "NaN, infinity")


def test_npz_labels_are_finite_after_the_cast(tmp_path):
    for value in (np.nan, np.inf, 1e39, -1e300):
        np.savez(tmp_path/"a.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([[0, 1], [1, value]]))
        with pytest.raises(DataError, match="a: labels hold NaN, infinity or numbers beyond float32|a.npz"):
            load_images(tmp_path/"a.npz")
    with pytest.raises(DataError, match="NaN"):
        ImageSet(torch.zeros(1, 3, 8, 8), torch.tensor([[torch.nan]]))


@pytest.mark.parametrize("label", [70_000, 5_000_000, 10**9, 2**31 - 1])
def test_class_numbers_are_bounded(tmp_path, label):
    np.savez(tmp_path/"a.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, label]))
    with pytest.raises(DataError, match=r"a\.(npz|zip): [\d,]+ classes by its labels .* at most 65,536"):
        load_images(tmp_path/"a.npz")
    with pytest.raises(DataError, match=r"a\.(npz|zip): [\d,]+ classes by its labels .* at most 65,536"):
        load_images(zipped(tmp_path/"a.zip", {"a.png": picture(1), "dataset.json": '{"labels": [["a.png", %d]]}' % label}))
    ImageSet(torch.zeros(70_001, 1, 1, 1), torch.arange(70_001))           # as many classes as images are fine


@pytest.mark.parametrize("label", [2**62, 2**63, 2**64 - 1])
def test_class_numbers_beyond_int64(tmp_path, label):
    np.savez(tmp_path/"a.npz", images=np.zeros((1, 3, 8, 8), np.uint8), labels=np.array([label], np.uint64))
    with pytest.raises(DataError, match="class numbers"):
        load_images(tmp_path/"a.npz")


def test_gaps_between_classes_are_said(tmp_path):
    np.savez(tmp_path/"a.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, 2]))
    assert "1 of 3 classes have no image (class 1)" in read(tmp_path/"a.npz")[3][0]
    members = {"a.png": picture(1), "b.png": picture(2), "dataset.json": labels_json(["a.png", "b.png"], [0, 2])}
    assert "1 of 3 classes have no image (class 1)" in read(zipped(tmp_path/"a.zip", members))[3][0]


def test_one_hot_of_a_class_that_does_not_exist():
    for labels in ([-1, 0], [0, 3]):
        with pytest.raises(ValueError, match=r"expected 0 to 2"):
            data.one_hot(torch.tensor(labels), 3)
    with pytest.raises(ValueError, match="must be a tensor, got ndarray"):
        data.one_hot(np.array([0, 1]), 3)
    assert data.one_hot(torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)


# ---- npz layout --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, first", [
    ((5, 16, 4, 4), True), ((5, 8, 2, 2), True), ((5, 10, 1, 1), True), ((5, 3, 32, 32), True), ((5, 4, 64, 64), True), ((5, 3, 24, 40), True),
    ((5, 1, 28, 28), True), ((5, 3, 4, 4), True), ((2, 32, 32, 13), False), ((5, 32, 32, 8), False), ((5, 4, 4, 3), False), ((5, 24, 40, 3), False),
    ((5, 28, 28, 1), False), ((5, 5, 80, 4), None), ((5, 4, 8, 6), None), ((5, 3, 3, 3), None), ((5, 8, 16, 2), None), ((5, 3, 20, 3), None)])
def test_layout_is_plain_or_stated_never_guessed_in_silence(tmp_path, shape, first):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    chw = {"NCHW": x, "NHWC": x.transpose(0, 3, 1, 2)}
    for layout, want in chw.items():
        np.savez(tmp_path/"stated.npz", images=x, layout=layout)
        assert np.array_equal(load_images(tmp_path/"stated.npz").images.numpy(), want)
    np.savez(tmp_path/"silent.npz", images=x)
    if first is None:
        refuse(tmp_path/"silent.npz", "could be .* say which, with np.savez")
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = load_images(tmp_path/"silent.npz")
    assert np.array_equal(found.images.numpy(), chw["NCHW" if first else "NHWC"])
    assert len(said) == (not first and shape[3] not in (1, 3))              # an unusual reading is said


def test_layout_that_is_none(tmp_path):
    np.savez(tmp_path/"a.npz", images=np.zeros((2, 3, 8, 8), np.uint8), layout="CHWN")
    refuse(tmp_path/"a.npz", "its layout is 'CHWN'")


@pytest.mark.parametrize("shape", [(5, 16, 4, 4), (5, 8, 16, 3), (5, 3, 3, 3), (5, 5, 80, 4)])
def test_what_the_project_writes_it_reads_back(tmp_path, shape):
    from edm_nb.commands import write_images
    x = torch.randn(shape)
    write_images(tmp_path/"a.npz", list(range(5)), x, torch.arange(5))
    found = load_images(tmp_path/"a.npz")
    assert torch.equal(found.images, x) and found.labels.tolist() == [0, 1, 2, 3, 4]


def test_the_unnamed_arrays_of_guided_diffusion(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path/"a.npz", x, np.array([1, 0, 1, 0]))
    found = load_images(tmp_path/"a.npz")
    assert np.array_equal(found.images.numpy(), x.transpose(0, 3, 1, 2)) and found.labels.tolist() == [1, 0, 1, 0]
    (tmp_path/"a.npz").rename(tmp_path/"A.NPZ")
    assert torch.equal(load_images(tmp_path/"A.NPZ").images, found.images)


@pytest.mark.parametrize("header", [b"-" * 9000, b"(" * 9000, b"[" * 400, b"{'descr': ", b"\xff\xfe", b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -3)}",
                                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (1e9,)}", b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1,)}",
                                    b"{'descr': '<u9', 'fortran_order': False, 'shape': (1,)}", b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s,)}" % (b"9" * 500)],
                         ids=lambda h: h[:24].decode("latin-1"))
def test_headers_of_arrays_that_are_none(tmp_path, header):
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    refuse(zipped(tmp_path/"a.npz", {"images.npy": content}), "not a readable npz file")
    refuse(zipped(tmp_path/"a.npz", {"images.npy": b"\x93NUMPY\x03\x00" + content[8:]}), "not a readable npz file .array format")


# ---- no home -----------------------------------------------------------------------------------------------------------

def test_a_user_without_a_home(tmp_path, monkeypatch):
    path = zipped(tmp_path/"set.zip", {"a.png": picture(1)})
    for name in ("EDM_NB_CACHE", "EDM_NB_CIFAR10", "HOME"):
        monkeypatch.delenv(name, raising=False)
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    levels, _, _, said = read(path)
    assert levels == [1] and "not kept: no home directory" in said[0] and "EDM_NB_CACHE" in said[0]
    assert data.find_cifar10() is None and data.book_images(3).name == "digits"
    with pytest.raises(DataError, match="no home directory.*EDM_NB_CACHE"):
        data.cifar10(download=True)


def test_a_tilde_in_the_cache_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDM_NB_CACHE", "~/here")
    assert data.cache_folder() == tmp_path/"here"


# ---- work is bounded by what a file is worth ---------------------------------------------------------------------------

@functools.cache
def solid(side):
    return saved(Image.new("RGB", (side, side)), compress_level=9)


def test_all_images_together_decode_to_a_bounded_size(tmp_path, monkeypatch):
    "Thirty pictures of one colour in 30 kB: known from the first header, nothing is decoded."
    flat = solid(8192)
    with zipfile.ZipFile(tmp_path/"bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(30):
            archive.writestr(f"{k:02d}.png", flat)
    assert (tmp_path/"bomb.zip").stat().st_size < 50_000
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    refuse(tmp_path/"bomb.zip", "would decode to 6,039,797,760, expected at most 1,0")
    refuse(in_folder(tmp_path/"bomb", {f"{k}.png": flat for k in range(30)}), "would decode to")


def test_scans_of_a_jpeg_are_counted(tmp_path):
    content = saved(noise(1, (64, 64)), "JPEG", progressive=True)
    assert content.count(b"\xff\xda") > 3 and len(load_images(zipped(tmp_path/"a.zip", {"a.jpg": content}))) == 1
    at = content.rindex(b"\xff\xda")
    bomb = content[:at] + content[at:-2] * 3000 + content[-2:]
    refuse(zipped(tmp_path/"a.zip", {"a.jpg": bomb}), r"a.jpg has 3,0\d\d scans, expected at most 32")


def sparse(path, size, head=b""):
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    for name, members in (("image", {"a.png": picture(1)}), ("labels", {"a.png": picture(1)})):
        in_folder(tmp_path/name, members)
    sparse(tmp_path/"image/b.png", 6 * 2**30, picture(2))
    sparse(tmp_path/"labels/dataset.json", 6 * 2**30)
    monkeypatch.setattr(Path, "read_bytes", lambda *a: pytest.fail("read"))
    monkeypatch.setattr(data, "blake2b", lambda *a: pytest.fail("hashed"))
    refuse(tmp_path/"image", "b.png: has 6,442,450,944 bytes, expected at most 67,108,864")
    refuse(tmp_path/"labels", "dataset.json: has 6,442,450,944 bytes, expected at most")


def test_the_wrong_folder_is_not_hashed(tmp_path, monkeypatch):
    in_folder(tmp_path/"set", {f"{k}.png": saved(Image.new("RGB", (8 + k, 8))) for k in range(50)})
    monkeypatch.setattr(data, "blake2b", lambda *a: pytest.fail("hashed"))
    refuse(tmp_path/"set", r"\.png is 3×8×\d+ .* but 0.png is 3×8×8")


def test_only_wanted_members_of_an_npz_are_read(tmp_path, monkeypatch):
    np.savez(tmp_path/"a.npz", images=np.zeros((2, 3, 8, 8), np.uint8), other=np.zeros(1000), arr_0=np.zeros(5), more=np.zeros(7))
    opened, real = [], zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, member, *a, **k: opened.append(getattr(member, "filename", member)) or real(self, member, *a, **k))
    load_images(tmp_path/"a.npz")
    assert set(opened) == {"images.npy"}


BOMBS = """
import io, json, resource, struct, sys, warnings, zipfile
from pathlib import Path
from edm_nb.data import load_images
from edm_nb.files import DataError
import torchvision.io, PIL.Image, numpy as np
warnings.simplefilter("ignore")
load_images(Path(sys.argv[1])/"sound.zip", cache=False)                           # libraries are loaded
used = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 320 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try: print(path.name, "loaded", tuple(load_images(path, cache=False).images.shape))
    except DataError as error: print(path.name, "refused", str(error)[:200])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_bombs_under_a_memory_limit(tmp_path):
    "Every file that asks for more than it is worth, within 320 MiB above what the libraries take."
    room = tmp_path/"bombs"
    room.mkdir()
    zipped(room/"sound.zip", {"a.png": picture(1)})
    def packed(name, **members):
        with zipfile.ZipFile(room/name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                with archive.open(member, "w", force_zip64=True) as file:
                    for piece in content:
                        file.write(piece)
    zeros = lambda mib: itertools.repeat(bytes(2**20), mib)
    def array(shape):
        header = ("{'descr': '|u1', 'fortran_order': False, 'shape': %s, }" % (shape,)).encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    packed("images.npz", **{"images.npy": itertools.chain([array((400, 1, 1024, 1024))], zeros(400))})
    packed("unwanted.npz", **{"images.npy": [array((2, 1, 8, 8)), bytes(128)], **{f"x{k}.npy": itertools.chain([array((400 * 2**20,))], zeros(400)) for k in range(2)}})
    packed("labels.npz", **{"images.npy": [array((2, 1, 8, 8)), bytes(128)], "labels.npy": itertools.chain([array((400 * 2**20, 1))], zeros(400))})
    np.savez(room/"class.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, 2**31 - 1]))
    packed("pictures.zip", **{f"{k:02d}.png": [solid(8192)] for k in range(30)})
    packed("json.zip", **{"a.png": [picture(1)], "dataset.json": itertools.chain([b'{"labels": ['], itertools.repeat(b"[]," * 2**18, 100), [b"[]]}"])})
    packed("deep.zip", **{"a.png": [picture(1)], "dataset.json": [b"[" * 2**22]})
    os.mkdir(room/"device")
    (room/"device/a.png").symlink_to("/dev/zero")
    os.mkdir(room/"sparse")
    sparse(room/"sparse/a.png", 2**34, picture(1))
    code = subprocess.run([sys.executable, "-c", BOMBS, str(room)], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(Path(data.__file__).parent.parent)))
    assert code.returncode == 0, code.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in code.stdout.splitlines())
    assert said.pop("sound.zip").startswith("loaded") and said.pop("unwanted.npz") == "loaded (2, 1, 8, 8)"
    assert len(said) == 8 and all(words.startswith("refused") for words in said.values()), said


def test_the_memory_limit_would_be_felt():
    "The limit of the test above is one: the same process cannot take 400 MiB under it."
    code = """
import resource
used = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 320 * 2**20,) * 2)
try: bytearray(400 * 2**20); print("taken")
except MemoryError: print("refused")
"""
    assert resource.RLIMIT_DATA and subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "refused\n"


# ---- damage of every kind ----------------------------------------------------------------------------------------------

def damaged(content, rng):
    "Bits flipped, bytes replaced, cut out or put in."
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(content))
        what = rng.randrange(4)
        if what == 0: content[at] ^= 1 << rng.randrange(8)
        elif what == 1: content[at] = rng.choice([0, 1, 127, 128, 255])
        elif what == 2: del content[at:at + rng.choice([1, 4, 20])]
        else: content[at:at] = bytes(rng.randrange(256) for _ in range(8))
    return bytes(content)


def sound_files():
    tag = Image.Exif()
    tag[0x112] = 6
    arrays = io.BytesIO()
    np.savez_compressed(arrays, images=np.zeros((4, 3, 8, 8), np.uint8), labels=np.arange(4), layout="NCHW")
    one = noise(1)
    yield "a.npz", arrays.getvalue()
    yield "dataset.json", b'{"labels": [["a.png", 0]], "class_names": ["x"]}'
    for name, content in (("a.png", saved(one, exif=tag)), ("b.png", saved(palette())), ("c.jpg", saved(one, "JPEG", exif=tag)), ("d.webp", saved(one, "WEBP", lossless=True, exif=tag)),
                          ("e.tif", saved(one, "TIFF", exif=tag)), ("f.tif", saved(one, "TIFF", compression="tiff_lzw")), ("g.gif", saved(palette(), "GIF")),
                          ("h.ppm", saved(one, "PPM")), ("i.bmp", saved(one, "BMP"))):
        yield name, content


@pytest.mark.parametrize("name, content", list(sound_files()), ids=[name for name, _ in sound_files()])
@pytest.mark.filterwarnings("ignore")
def test_damage_ends_in_one_line(tmp_path, name, content):
    "Forty damaged files of every kind: refused in one line that can be printed, or read; never another exception."
    rng = random.Random(name)
    refused = 0
    for _ in range(40):
        bad = damaged(content, rng)
        if name.endswith("npz"): (path := tmp_path/"set.npz").write_bytes(bad)
        elif name.endswith("json"): path = zipped(tmp_path/"set.zip", {"a.png": picture(1), name: bad})
        else: path = zipped(tmp_path/"set.zip", {name: bad})
        try: load_images(path, cache=False)
        except DataError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 700
    assert refused > 3
