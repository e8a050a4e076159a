"""`decoder.pth` as an archive: members, storages, strides, checksums, everything that can be cut or bent."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from soprano_cupy.checkpoint import convert, decoder_shapes, open_decoder
from soprano_cupy.checkpoint.torch_zip import open_torch_zip
from soprano_cupy.checkpoint.write_torch_zip import (
    STORAGE_ALIGNMENT,
    global_opcode,
    state_dict_pickle,
    tensor_opcodes,
    text_opcode,
    write_member,
    write_torch_zip,
)
from soprano_cupy.errors import CheckpointError, UnsafePickleError
from soprano_cupy.testing import TINY_DECODER, make_checkpoint

DATA = np.arange(24, dtype=np.float32)


def index(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text_opcode(name) + opcodes for name, opcodes in tensors.items()) + b"u."


def view(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, count: int = 24, key: str = "0") -> bytes:
    return tensor_opcodes(key, "float32", count, offset, shape, strides)


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """A file with the given index; members: further files, or other contents for the usual ones."""
    with zipfile.ZipFile(path, "w") as out:
        write_member(out, "data.pkl", data)
        for key, content in ({"0": DATA.tobytes()} if storages is None else storages).items():
            write_member(out, f"data/{key}", content)
        for name, content in members.items():
            write_member(out, name, content)
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "decoder.pth"


# What PyTorch writes


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((24,), (1,), 0),
        ((4, 6), (6, 1), 0),
        ((6, 4), (1, 6), 0),
        ((2, 3, 4), (12, 4, 1), 0),
        ((4, 3, 2), (1, 4, 12), 0),
        ((3, 2, 4), (4, 12, 1), 0),
        ((5,), (1,), 19),
        ((2, 3), (7, 2), 5),
        ((12,), (2,), 1),
        ((1, 24), (999, 1), 0),
        ((24, 1), (1, 999), 0),
        ((), (), 23),
        ((0,), (1,), 24),
        ((3, 0), (1, 1), 0),
    ],
)
def test_views_of_a_storage(path, shape, strides, offset):
    archive(path, index(x=view(shape, strides, offset)))
    byte_strides = tuple(4 * stride for stride in strides)
    expected = np.lib.stride_tricks.as_strided(DATA[offset:], shape, byte_strides)
    with open_torch_zip(path) as file:
        array = file.pop("x", shape)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, expected)


def test_strided_views_longer_than_a_block(path):
    data = np.random.default_rng(0).standard_normal((700, 900)).astype(np.float32)
    archive(path, index(x=view((900, 700), (1, 900), count=data.size)), {"0": data.tobytes()})
    with open_torch_zip(path) as file:
        np.testing.assert_array_equal(file.pop("x", (900, 700)), data.T)


def test_several_views_of_one_storage(path):
    archive(path, index(a=view((10,), (1,)), b=view((14,), (1,), 10)))
    with open_torch_zip(path) as file:
        np.testing.assert_array_equal(file.pop("b", (14,)), DATA[10:])
        np.testing.assert_array_equal(file.pop("a", (10,)), DATA[:10])


def test_a_state_dict_inside_and_parameters(path):
    tensor = global_opcode("torch._utils", "_rebuild_parameter") + b"(" + view((24,), (1,)) + b"\x88}tR"
    inner = b"}" + text_opcode("w") + tensor + b"s"
    archive(path, b"\x80\x02}(" + text_opcode("epoch") + b"K\x07" + text_opcode("state_dict") + inner + b"u.")
    with open_torch_zip(path) as file:
        assert file.names() == {"w"}
        np.testing.assert_array_equal(file.pop("w", (24,)), DATA)


@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa"])
def test_files_written_by_pytorch(shared_dir, name):
    """Every tensor against the raw bytes that the standard zip module reads."""
    path = shared_dir / name / "decoder.pth"
    with zipfile.ZipFile(path) as raw, open_torch_zip(path) as file:
        assert file.names()
        for key, tensor_name in enumerate(_names_in_order(raw.read("decoder/data.pkl"))):
            array = file.pop(tensor_name, file.shape(tensor_name)).ravel()
            expected = np.frombuffer(raw.read(f"decoder/data/{key}"), "<f4")  # the window's holds one value more
            assert expected.size - array.size == (tensor_name == "head.istft.window")
            np.testing.assert_array_equal(array, expected[: array.size])
        file.finish()


def _names_in_order(data: bytes) -> list[str]:
    import pickletools

    texts = [argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "BINUNICODE"]
    return [text for text in texts[: texts.index("_metadata")] if "." in text]


def test_our_writer_aligns_and_the_zip_module_agrees(path):
    specs = {"a": ("float32", (3,)), "b": ("bfloat16", (2, 2)), "c": ("float64", ())}
    values = {"a": np.ones(3, np.float32), "b": np.full((2, 2), 0x3F80, np.uint16), "c": np.array(2.5)}
    write_torch_zip(path, specs, values.__getitem__)
    with zipfile.ZipFile(path) as raw:
        assert raw.testzip() is None
        assert raw.read("decoder/data/1") == values["b"].tobytes()
    with open_torch_zip(path) as file:
        for name, (dtype, shape) in specs.items():
            assert file.dtype(name) == dtype
            assert file._entries[name].storage.start % STORAGE_ALIGNMENT == 0
            np.testing.assert_array_equal(file.pop(name, shape, dtype), values[name])


# Archives that are not right


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (view((25,), (1,)), "reaches beyond its storage"),
        (view((24,), (1,), 1), "reaches beyond its storage"),
        (view((2, 3), (24, 1)), "reaches beyond its storage"),
        (view((1,), (1,), 1 << 40), "reaches beyond its storage"),
        (view((1 << 20, 1 << 20), (0, 0)), "reaches beyond its storage"),
        (view((25,), (0,)), "reaches beyond its storage"),
        (view((1,) * 9, (1,) * 9), "has 9 dimensions"),
        (view((24,), (1,), count=23), "has 96 bytes, expected 92"),
        (view((24,), (1,), count=25), "has 96 bytes, expected 100"),
        (view((24,), (1,), count=1 << 40), "has 96 bytes, expected 4398046511104"),
        (view((24,), (1,), key="1"), r"'decoder/data/1' is missing"),
        (view((24,), (1,), key="../data.pkl"), "is missing"),
        (view((24,), (1,), key=""), "is missing"),
    ],
)
def test_storages_and_views_are_checked(path, opcodes, message):
    with pytest.raises(CheckpointError, match=message):
        open_torch_zip(archive(path, index(x=opcodes)))


def test_tensors_that_multiply_a_storage(path):
    whole = view((4096,), (1,), count=4096)
    with open_torch_zip(archive(path, index(x=whole), {"0": bytes(4 * 4096)})) as file:
        assert file.names() == {"x"}
    with pytest.raises(CheckpointError, match="share storages"):
        open_torch_zip(archive(path, index(x=whole, y=whole), {"0": bytes(4 * 4096)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK", "not a zip archive"),
        (pickle.dumps({"a": 1}), "not a zip archive: cut off, or written by PyTorch before 1.6"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "not a zip archive"),
        (b"PK\x03\x04" + bytes(100), "zip directory is missing or damaged"),
        (b"PK\x05\x06" + bytes(18), "not a zip archive"),
    ],
)
def test_other_files(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_torch_zip(path)


@pytest.mark.parametrize(("order", "accepted"), [(b"little", True), (b"big", False), (b"", False), (bytes(99), False)])
def test_byte_order(path, order, accepted):
    archive(path, index(x=view((24,), (1,))), byteorder=order)
    if accepted:
        open_torch_zip(path).close()
    else:
        with pytest.raises(CheckpointError, match=r"byte order|more than 16"):
            open_torch_zip(path)


@pytest.mark.parametrize("count", [0, 2])
def test_index_missing_or_twice(path, count):
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("first", b"")
        for number in range(count):
            out.writestr(f"root{number}/data.pkl", index(x=view((24,), (1,))))
    with pytest.raises(CheckpointError, match=f"holds {count} data.pkl, expected 1"):
        open_torch_zip(path)


def test_compressed_members(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("decoder/data.pkl", index(x=view((24,), (1,))))
        out.writestr("decoder/data/0", bytes(1 << 24))
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        open_torch_zip(path)


def directory_entries(content: bytearray) -> list[int]:
    return [i for i in range(len(content)) if content[i : i + 4] == b"PK\x01\x02"]


def bend(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, struct.pack("<H", 1), "compressed or encrypted"),  # flag: encrypted
        (10, struct.pack("<H", 8), "compressed or encrypted"),  # method: deflate
        (10, struct.pack("<H", 99), "compressed or encrypted"),
        (20, struct.pack("<I", 1 << 30), "compressed or encrypted"),  # compressed size
        (20, struct.pack("<2I", 1 << 30, 1 << 30), "is not where|header .* is missing|overlaps"),
        (42, struct.pack("<I", 7), "header .* is missing"),  # offset of the local header
        (42, struct.pack("<I", 0), "is not where"),
        (42, struct.pack("<I", 0xFFFFFFF0), "header .* is missing"),
    ],
)
def test_bent_directory_entries(path, offset, value, message):
    archive(path, index(x=view((24,), (1,))))

    def change(content: bytearray) -> None:
        entry = directory_entries(content)[1]
        content[entry + offset : entry + offset + len(value)] = value

    bend(path, change)
    with pytest.raises(CheckpointError, match=message):
        open_torch_zip(path)


def test_members_twice_or_over_each_other(path):
    with zipfile.ZipFile(path, "w") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out.writestr("decoder/data.pkl", index(x=view((24,), (1,))))
        out.writestr("decoder/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="twice"):
        open_torch_zip(path)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as out:
        out.writestr("decoder/data/1", b"inside")
    local = inner.getvalue().split(b"PK\x01\x02")[0]
    archive(path, index(x=view((24,), (1,))), {"0": local.ljust(96, b"\0"), "1": b"inside"})

    def change(content: bytearray) -> None:
        entry = directory_entries(content)[2]
        content[entry + 42 : entry + 46] = struct.pack("<I", content.index(local))

    bend(path, change)
    with pytest.raises(CheckpointError, match="overlaps another file"):
        open_torch_zip(path)


def test_damaged_bytes_are_found_by_checksum(path):
    archive(path, index(x=view((24,), (1,))))
    storage = path.read_bytes().index(DATA.tobytes())
    bend(path, lambda content: content.__setitem__(storage + 50, content[storage + 50] ^ 1))
    with open_torch_zip(path) as file, pytest.raises(CheckpointError, match="tensor x is damaged"):
        file.pop("x", (24,))
    archive(path, index(x=view((24,), (1,))))
    position = path.read_bytes().index(b"cpu")
    bend(path, lambda content: content.__setitem__(position, ord("g")))
    with pytest.raises(CheckpointError, match=r"'decoder/data\.pkl' is damaged"):
        open_torch_zip(path)


def test_an_absurd_index_is_not_read(path):
    with pytest.raises(CheckpointError, match="more than 2097152"):
        open_torch_zip(archive(path, bytes(3 << 20)))


def test_many_members(path, monkeypatch):
    monkeypatch.setattr("soprano_cupy.checkpoint.torch_zip.MAX_MEMBERS", 3)
    with pytest.raises(CheckpointError, match="lists 4 files, more than 3"):
        open_torch_zip(archive(path, index(x=view((24,), (1,))), a=b"", b=b""))


def test_cut_off_anywhere(tmp_path):
    """A zip's directory is at its end, so every shorter file is refused; checked at each byte of a small one."""
    path = tmp_path / "decoder.pth"
    content = archive(path, index(x=view((24,), (1,)))).read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            open_torch_zip(path)
        assert "\n" not in str(caught.value)


def test_cut_off_reference_files(shared_dir, tmp_path):
    content = (shared_dir / "golden/mqa/decoder.pth").read_bytes()
    path = tmp_path / "decoder.pth"
    for length in [*range(1, len(content), 9973), *range(len(content) - 300, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            open_torch_zip(path)


def test_hostile_decoders_cannot_be_converted(tmp_path):
    archive(tmp_path / "decoder.pth", b"\x80\x02cos\nsystem\n" + text_opcode("true") + b"\x85R.")
    with pytest.raises(UnsafePickleError, match=r"os\.system"):
        convert(tmp_path)
    with pytest.raises(UnsafePickleError, match=r"os\.system"):
        open_decoder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.pth"]


def test_made_up_checkpoints_have_such_a_decoder(tmp_path):
    with open_decoder(make_checkpoint(tmp_path)) as file:
        assert file.path.name == "decoder.pth"
        assert file.names() == decoder_shapes(TINY_DECODER).keys()


def test_the_index_names_ordered_dict():
    assert state_dict_pickle({}).startswith(b"\x80\x02ccollections\nOrderedDict\n")
