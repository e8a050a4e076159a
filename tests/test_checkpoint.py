"""A checkpoint's folder: its files, `convert`, a decoder's sizes, the reference checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as library

from soprano_cupy.checkpoint import (
    convert,
    decoder_config,
    decoder_shapes,
    language_model_shapes,
    open_decoder,
    open_language_model,
)
from soprano_cupy.checkpoint.safetensors import write_safetensors
from soprano_cupy.config import DecoderConfig, ModelConfig
from soprano_cupy.errors import CheckpointError
from soprano_cupy.testing import TINY, TINY_DECODER, make_checkpoint


def write(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> Path:
    specs = {name: (dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_a_whole_language_model(tiny):
    with open_language_model(tiny) as file:
        shapes = language_model_shapes(TINY)
        assert file.names() == shapes.keys()
        for name, shape in shapes.items():
            assert file.dtype(name) == "bfloat16"
            assert np.isfinite(file.pop(name, shape)).all()
        file.finish()


@pytest.mark.parametrize("where", ["missing", "file"])
def test_wrong_folders(tmp_path, where):
    (tmp_path / "file").write_text("x")
    for opener in (open_language_model, open_decoder, convert):
        with pytest.raises(CheckpointError, match=f"{where} is (missing|not a folder); name a checkpoint's folder"):
            opener(tmp_path / where)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; download the checkpoint again"):
        open_language_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither decoder\.safetensors nor decoder\.pth"):
        open_decoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"decoder\.pth is missing"):
        convert(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in several files; save it as one model\.safetensors"):
        open_language_model(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: Is a directory"):
        open_language_model(tmp_path)


def test_unreadable_file(tmp_path, tiny, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: Permission denied"):
        open_language_model(tiny)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_convert_keeps_every_bit(tmp_path, dtype):
    folder = make_checkpoint(tmp_path / "m", decoder_dtype=dtype)
    shapes = decoder_shapes(TINY_DECODER)
    with open_decoder(folder) as file:
        assert file.path.name == "decoder.pth"
        before = {name: file.pop(name, shape, dtype) for name, shape in shapes.items()}
    path = convert(folder)
    assert path == folder / "decoder.safetensors"
    with open_decoder(folder) as file:
        assert file.path == path
        assert file.names() == shapes.keys()
        for name, shape in shapes.items():
            assert file.dtype(name) == dtype
            np.testing.assert_array_equal(file.pop(name, shape, dtype), before[name])


def test_convert_to_elsewhere(tmp_path, tiny):
    (tmp_path / "out").mkdir()
    assert convert(tiny, tmp_path / "out") == tmp_path / "out" / "decoder.safetensors"
    assert convert(tiny, tmp_path / "voice.safetensors") == tmp_path / "voice.safetensors"
    assert (tmp_path / "voice.safetensors").read_bytes() == (tmp_path / "out" / "decoder.safetensors").read_bytes()
    assert (tmp_path / "voice.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(CheckpointError, match="cannot write"):
        convert(tiny, tmp_path / "nowhere" / "voice.safetensors")
    assert not (tiny / "decoder.safetensors").exists()


SIZES = [
    DecoderConfig(12, dim=8, intermediate_size=20, num_blocks=1, embed_kernel=1),
    DecoderConfig(5, dim=16, intermediate_size=7, num_blocks=11, embed_kernel=3, n_fft=256, hop_length=64),
    DecoderConfig(3, dim=4, intermediate_size=4, num_blocks=2, embed_kernel=7, block_kernel=7, n_fft=16, hop_length=4),
]


def write_decoder(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    write(
        folder / "decoder.safetensors", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, "float32"
    )
    return folder


@pytest.mark.parametrize("config", SIZES)
def test_decoder_config_is_inferred(tmp_path, config):
    with open_decoder(write_decoder(tmp_path, decoder_shapes(config))) as file:
        assert decoder_config(file) == config


def test_decoder_without_its_window(tmp_path):
    shapes = decoder_shapes(SIZES[0])
    del shapes["head.istft.window"]
    with open_decoder(write_decoder(tmp_path, shapes)) as file:
        assert decoder_config(file) == SIZES[0]


@pytest.mark.parametrize("name", sorted(decoder_shapes(SIZES[0])))
def test_any_decoder_tensor_missing_or_of_another_size(tmp_path, name):
    """Sizes that no other tensor contradicts are right by definition; every contradiction is found."""
    shapes = decoder_shapes(SIZES[0])
    if name != "head.istft.window":
        with (
            open_decoder(write_decoder(tmp_path, {key: shapes[key] for key in shapes if key != name})) as file,
            pytest.raises(CheckpointError, match=r"is missing|ConvNeXt blocks"),
        ):
            decoder_config(file)
    for axis, size in enumerate(shapes[name]):
        if name in ("decoder.embed.weight", "decoder.convnext.0.dwconv.weight") and axis:
            continue
        changed = shapes | {name: (*shapes[name][:axis], size + 4, *shapes[name][axis + 1 :])}
        with open_decoder(write_decoder(tmp_path, changed)) as file, pytest.raises(CheckpointError, match="expected"):
            decoder_config(file)
    for wrong in ((), (*shapes[name], 1), (0,) * len(shapes[name])):
        with (
            open_decoder(write_decoder(tmp_path, shapes | {name: wrong})) as file,
            pytest.raises(CheckpointError, match="expected"),
        ):
            decoder_config(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.embed.weight": (8, 12, 2)}, "even width 2, 3"),
        ({"head.out.weight": (2049, 8)}, "has 2049 rows"),
        ({"head.out.weight": (2, 8)}, "has 2 rows"),
        ({"decoder.convnext.2.gamma": (8,)}, r"convnext\.1\.gamma is missing"),
    ],
)
def test_decoder_sizes_that_cannot_be(tmp_path, change, message):
    with (
        open_decoder(write_decoder(tmp_path, decoder_shapes(SIZES[0]) | change)) as file,
        pytest.raises(CheckpointError, match=message),
    ):
        decoder_config(file)


@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa", "voice"])
def test_reference_checkpoints_hold_what_their_configuration_says(shared_dir, name):
    config = ModelConfig.from_folder(shared_dir / name)
    with open_language_model(shared_dir / name) as file:
        for tensor_name, shape in language_model_shapes(config).items():
            file.pop(tensor_name, shape)
        file.finish()
    with open_decoder(shared_dir / name) as file:
        decoder = decoder_config(file)
        assert decoder.input_size == config.hidden_size
        for tensor_name, shape in decoder_shapes(decoder).items():
            file.pop(tensor_name, shape)
        file.finish()


@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa"])
def test_reference_decoder_window_is_hanns(shared_dir, name):
    """A tensor whose values are known from elsewhere: offsets into the archive are right."""
    with open_decoder(shared_dir / name) as file:
        window = file.pop("head.istft.window", (2048,))
    np.testing.assert_allclose(window, np.hanning(2049)[:-1], atol=1e-6)


@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa"])
def test_reference_decoder_converts(shared_dir, tmp_path, name):
    shutil.copy(shared_dir / name / "decoder.pth", tmp_path)
    converted = library.load_file(convert(tmp_path))
    with open_decoder(shared_dir / name) as file:
        assert converted.keys() == file.names()
        for tensor_name, array in converted.items():
            np.testing.assert_array_equal(file.pop(tensor_name, array.shape), array)
