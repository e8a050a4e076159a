"""The CPU engine's decoder against the reference's outputs and against the portable oracle in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cpu_models import DECODERS, decoder, portable_decoder
from numerics import round_to_bfloat16, snr_db

from soprano_cupy.checkpoint import decoder_shapes, write_safetensors
from soprano_cupy.config import DecoderConfig
from soprano_cupy.cpu import _engine
from soprano_cupy.cpu.vocos import CpuDecoder
from soprano_cupy.errors import ParameterError
from soprano_cupy.portable import vocos as portable_vocos
from soprano_cupy.runner import DecoderRunner, DecoderStream
from soprano_cupy.testing import SOPRANO_1_1_80M_DECODER, TINY, TINY_DECODER, make_checkpoint

ISAS = _engine.instruction_sets()
DTYPES = ["float32", "bfloat16"]
MIN_SNR_DB = {"float32": 90, "int8": 40}


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = _engine.get_threads()
    yield
    _engine.set_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    result = {}
    for name, sizes in DECODERS.items():
        config = dataclasses.replace(TINY, hidden_size=sizes.input_size)
        result[name] = make_checkpoint(root / name, config=config, decoder=sizes, decoder_format="safetensors")
    return result


def states_for(config: DecoderConfig, tokens: int, batch: int = 1) -> np.ndarray:
    """Unit vectors as large as `make_checkpoint`'s decoders expect them."""
    scale = 1000 / (config.input_size * 2 / math.sqrt(math.pi))
    shape = (batch, tokens, config.input_size)
    return (np.random.default_rng(tokens).standard_normal(shape) * scale).astype(np.float32)


def streamed(model: DecoderRunner, states: np.ndarray, pieces: list[int]) -> list[np.ndarray]:
    stream, result, start = model.stream(), [], 0
    for count in pieces:
        result.append(stream.push(states[start : start + count]))
        start += count
    return [*result, stream.push(states[start:]), stream.finish()]


# ---- against the oracle ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", DECODERS)
def test_float32_audio(folders: dict[str, Path], name: str, isa: str) -> None:
    model, exact = decoder(folders[name], "float32", isa), portable_decoder(folders[name], "float64")
    for tokens in (2, 3, 5, 70):
        states = states_for(model.config, tokens, batch=2)
        audio = model.decode(states)
        assert audio.dtype == np.float32
        assert audio.shape == (2, (tokens - 1) * model.config.token_samples)
        assert snr_db(audio, exact.decode(states.astype(np.float64))) >= 110


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", DECODERS)
def test_audio_of_smaller_weights(folders: dict[str, Path], name: str, dtype: str, isa: str) -> None:
    """bfloat16: at most twice the error of products that round both sides; int8: at least 40 dB."""
    model = decoder(folders[name], dtype, isa)
    states = states_for(model.config, 40)
    exact = portable_decoder(folders[name], "float64").decode(states.astype(np.float64))
    quality = snr_db(model.decode(states), exact)
    if dtype == "int8":
        assert quality >= MIN_SNR_DB["int8"]
        return
    linear = portable_vocos.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable_vocos, "linear", lambda x, w, *b: linear(round_to_bfloat16(x), round_to_bfloat16(w), *b))
        plain = snr_db(portable_decoder(folders[name], "float32").decode(states), exact)
    assert quality >= plain - 20 * math.log10(2)


# ---- streams ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_streams_are_whole_utterances_bit_for_bit(folders: dict[str, Path], name: str, dtype: str) -> None:
    model = decoder(folders[name], dtype)
    states = states_for(model.config, 75)[0]
    whole = model.decode(states[None])[0]
    for pieces in ([1] * 75, [7] * 10, [40], [1, 2, 0, 33, 39], [75], [0, 75]):
        np.testing.assert_array_equal(np.concatenate(streamed(model, states, pieces)), whole)
    short = model.decode(states[None, :2])[0]
    np.testing.assert_array_equal(np.concatenate(streamed(model, states[:2], [1])), short)


def test_first_audio_comes_after_the_receptive_field(tmp_path: Path) -> None:
    """8 blocks look 8 frames ahead and overlap-add 2 more: of 5 tokens' 17 frames, 7 hops are final, more than the 4 of
    a token; after 4 tokens it would have been 3."""
    sizes = dataclasses.replace(TINY_DECODER, num_blocks=8)
    model = decoder(make_checkpoint(tmp_path, decoder=sizes))
    pieces = streamed(model, states_for(sizes, 12)[0], [1] * 12)
    hop, token = sizes.hop_length, model.config.token_samples
    assert [len(piece) for piece in pieces[:7]] == [0, 0, 0, 0, 7 * hop, token, token]


def test_an_utterance_too_short_for_sound(folders: dict[str, Path]) -> None:
    model = decoder(folders["tiny"])
    for tokens in (0, 1):
        assert sum(len(piece) for piece in streamed(model, states_for(model.config, 1)[0][:tokens], [])) == 0


def test_nothing_follows_the_end(folders: dict[str, Path]) -> None:
    model = decoder(folders["tiny"])
    stream = model.stream()
    assert isinstance(stream, DecoderStream)
    stream.push(states_for(model.config, 3)[0])
    stream.finish()
    with pytest.raises(ParameterError, match="ended"):
        stream.push(states_for(model.config, 3)[0])
    with pytest.raises(ParameterError, match="ended"):
        stream.finish()


def test_streams_do_not_disturb_each_other(folders: dict[str, Path]) -> None:
    model = decoder(folders["odd"])
    first, second = states_for(model.config, 20)[0], states_for(model.config, 21)[0]
    streams = [model.stream(), model.stream()]
    pieces: list[list[np.ndarray]] = [[], []]
    for start in range(0, 21, 3):
        for stream, states, parts in zip(streams, (first, second), pieces, strict=True):
            parts.append(stream.push(states[start : start + 3]))
    for stream, states, parts in zip(streams, (first, second), pieces, strict=True):
        parts.append(stream.finish())
        np.testing.assert_array_equal(np.concatenate(parts), model.decode(states[None])[0])


# ---- what a result may not depend on ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_audio_depends_on_neither_batch_nor_threads(folders: dict[str, Path], isa: str, dtype: str) -> None:
    model = decoder(folders["odd"], dtype, isa)
    states = states_for(model.config, 45, batch=3)
    _engine.set_threads(1)
    expected = np.concatenate([model.decode(one[None]) for one in states])
    for threads in (1, 2, 7):
        _engine.set_threads(threads)
        np.testing.assert_array_equal(model.decode(states), expected)


# ---- the spectrum ----


@pytest.mark.parametrize("isa", ISAS)
def test_magnitudes_and_phases_of_any_size(tmp_path: Path, isa: str) -> None:
    """A head that is all bias gives every frame one spectrum: phases up to 1e9 turn exactly, loud bins are clipped."""
    sizes = dataclasses.replace(TINY_DECODER, num_blocks=1)
    random = np.random.default_rng(3)
    phases = random.uniform(-1, 1, sizes.num_bins) * 10.0 ** random.integers(-3, 10, sizes.num_bins)
    magnitudes = random.uniform(-120, 6, sizes.num_bins)
    bias = np.concatenate((magnitudes, phases)).astype(np.float32)

    def tensor(name: str) -> np.ndarray:
        shape = decoder_shapes(sizes)[name]
        return bias if name == "head.out.bias" else np.zeros(shape, np.float32)

    names = [name for name in decoder_shapes(sizes) if "window" not in name]
    path = tmp_path / "decoder.safetensors"
    write_safetensors(path, {name: ("float32", decoder_shapes(sizes)[name]) for name in names}, tensor)
    states = states_for(sizes, 4)
    audio = decoder(tmp_path, "float32", isa).decode(states)
    assert snr_db(audio, portable_decoder(tmp_path, "float64").decode(states.astype(np.float64))) >= 120


# ---- the reference's outputs ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa", "voice"])
def test_reference_audio(shared_dir: Path, name: str, dtype: str, isa: str) -> None:
    expected = np.load(shared_dir / name / "expected.npz")
    model = decoder(shared_dir / name, dtype, isa)
    pairs = [(expected[f"states{i}"][None], expected[f"audio{i}"][None]) for i in range(3)]
    if "dec_in" in expected:
        pairs.append((expected["dec_in"].transpose(0, 2, 1), expected["dec_out"]))
    for states, audio in pairs:
        assert snr_db(model.decode(states), audio) >= MIN_SNR_DB[dtype]


# ---- interface ----


def test_the_decoder_says_what_it_is(folders: dict[str, Path]) -> None:
    model = decoder(folders["tiny"], "int8", "portable")
    assert isinstance(model, DecoderRunner)
    assert (model.device, model.dtype) == ("cpu", "bfloat16")
    assert "portable kernels" in model.reason


def test_wrong_calls_are_refused(folders: dict[str, Path]) -> None:
    model = decoder(folders["tiny"])
    with pytest.raises(ParameterError):
        model.decode(np.zeros((1, 4, model.config.input_size + 1), np.float32))
    with pytest.raises(ParameterError):
        model.stream().push(np.zeros((4, model.config.input_size - 1), np.float32))
    with pytest.raises(ParameterError, match="float16"):
        decoder(folders["tiny"], "float16")


def test_bfloat16_weights_take_half_the_memory(tmp_path: Path) -> None:
    sizes = dataclasses.replace(TINY_DECODER, dim=128, intermediate_size=512, num_blocks=4)
    folder = make_checkpoint(tmp_path, decoder=sizes)
    models: dict[str, CpuDecoder] = {dtype: decoder(folder, dtype) for dtype in (*DTYPES, "int8")}
    assert models["float32"].weight_bytes > 1.9 * models["bfloat16"].weight_bytes
    assert models["int8"].weight_bytes == models["bfloat16"].weight_bytes


def test_int8_is_kept_as_bfloat16_at_the_published_size(tmp_path: Path) -> None:
    """Of int8 matrices 37 dB would be left here."""
    folder = make_checkpoint(
        tmp_path,
        config=dataclasses.replace(TINY, hidden_size=512, num_layers=1, vocab_size=128),
        decoder=SOPRANO_1_1_80M_DECODER,
        decoder_format="safetensors",
    )
    states = states_for(SOPRANO_1_1_80M_DECODER, 9)
    exact = decoder(folder, "float32").decode(states)
    assert snr_db(decoder(folder, "int8").decode(states), exact) >= MIN_SNR_DB["int8"]
