"""The machine that reads pickles: what it reads, what it refuses, and how little a file can make it do."""
import io
import mmap
import pickle
import struct

import pytest
from hypothesis import given, settings, strategies as st

from edm_nb import pickles
from edm_nb.files import DataError
from edm_nb.pickles import PickleReader

ENCODE = {"_codecs.encode"}


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
                    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(-2**59, 2**59), inner, max_size=4), max_leaves=20),
       st.sampled_from([3, 4, 5]))
def test_machine_reads_plain_pickles(value, protocol):
    assert PickleReader(pickle.dumps(value, protocol), set(), "plain").read() == value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_machine_survives_anything(junk):
    try:
        PickleReader(junk, {"collections.OrderedDict"}, "junk", max_ops=1000).read()
    except DataError:
        pass


# ---- bounded work ----------------------------------------------------------------------------------------------------

def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def encoded_again(size, times):
    "One text that is turned into bytes `times` times by the one call that the machine carries out."
    arguments = text(b"a" * size) + text(b"latin1") + b"\x86q\x01"
    return b"\x80\x02c_codecs\nencode\nq\x00" + arguments + b"0(" + b"h\x00h\x01R" * times + b"t."


def test_repeated_calls_are_paid_by_the_file(monkeypatch):
    "Bound on bytes made, not on time: what `latin1` returns is counted."
    made, real = [], pickles.latin1
    monkeypatch.setattr(pickles, "latin1", lambda *a: made.append(real(*a)) or made[-1])
    content = encoded_again(2**20, 3000)
    with pytest.raises(DataError, match="bomb: refused: its calls would make more bytes than four times the file"):
        PickleReader(content, ENCODE, "bomb").read()
    assert sum(map(len, made)) <= 4 * len(content) + 2**20
    assert PickleReader(encoded_again(1000, 4), ENCODE, "sound").read() == (b"a" * 1000,) * 4


def test_the_budget_of_a_file_is_what_lies_ahead(tmp_path):
    "Bytes, a file that was read up to some place, and a memory map have the same budget."
    content = encoded_again(100, 2)
    (tmp_path/"f").write_bytes(b"skipped" + content)
    with open(tmp_path/"f", "rb") as file, open(tmp_path/"f", "rb") as again:
        file.seek(7)
        view = mmap.mmap(again.fileno(), 0, access=mmap.ACCESS_READ)
        view.seek(7)
        readers = [PickleReader(source, ENCODE, "x") for source in (content, bytearray(content), io.BytesIO(content), file, view)]
        assert {reader.budget for reader in readers} == {4 * len(content) + 2**20}
        assert all(reader.read() == (b"a" * 100,) * 2 for reader in readers)


@pytest.mark.parametrize("key", [2**61 - 1, 7 * (2**61 - 1), -(2**61 - 1), 10**400], ids=["one", "seven", "negative", "huge"])
def test_colliding_keys(key):
    "Integers of one hash make a dict quadratic; strings are hashed with a secret, small integers with themselves."
    for protocol in (2, 4):
        with pytest.raises(DataError, match="key of more than 60 bits"):
            PickleReader(pickle.dumps({key: 0}, protocol), set(), "bomb").read()
    with pytest.raises(DataError, match="memo number"):
        PickleReader(b"Np%d\n." % key, set(), "bomb").read()


def test_keys_that_real_files_have():
    content = {"a": 1, b"b": 2, 0: 3, -5: 4, 2**59: 5, 1.5: 6, True: 7}
    assert PickleReader(pickle.dumps(content, 4), set(), "sound").read() == content


def test_instructions_are_counted():
    for content in (b"]" * 1001 + b".", b"(" * 1001 + b"."):
        with pytest.raises(DataError, match="more than 1,000 instructions"):
            PickleReader(content, set(), "bomb", max_ops=1000).read()
