"""The decoder's kernels on the emulated machine: whole voices and streams against the float64 reference.

Unused rows, unused parts of tables and everything around the arrays is NaN, and the race checker is on.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from pathlib import Path

import numpy as np
import pytest
from emulation import Buffer, EmulationError, build
from numerics import relative_error, snr_db
from vocos_machine import Machine, StreamedVoice, aligned, blank

from soprano_cupy.audio import to_pcm16
from soprano_cupy.checkpoint import decoder_config, open_decoder
from soprano_cupy.config import DecoderConfig
from soprano_cupy.gpu.vocos_tables import Piece, frames_of, group_pieces, whole_pieces
from soprano_cupy.gpu.vocos_weights import inverse_envelopes
from soprano_cupy.portable.istft import InverseSTFT, OverlapAdd, hann
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.testing import TINY, make_checkpoint

# input, dim, inner, blocks, embed kernel, block kernel, n_fft; no size but n_fft is a multiple of 32
CONFIGS = {
    "matrix": DecoderConfig(16, 40, 72, 2, 1, 3, 64, 16),
    "windows": DecoderConfig(24, 136, 56, 2, 3, 5, 128, 32),
    "wide": DecoderConfig(8, 16, 24, 1, 1, 7, 256, 64),
}
TOKENS = (5, 2, 11, 30)  # 30 tokens are 117 frames, more than a slice has


@dataclasses.dataclass
class Case:
    machine: Machine
    utterances: list[np.ndarray]
    whole: list[np.ndarray]  # on the machine, together
    expected: list[np.ndarray]  # float64 array code


@functools.cache
def make_case(name: str, folder: Path) -> Case:
    config = CONFIGS[name]
    make_checkpoint(folder, seed=5, config=dataclasses.replace(TINY, hidden_size=config.input_size), decoder=config)
    with open_decoder(folder) as file:
        assert decoder_config(file) == config
        reference = PortableDecoder(file, config, "cpu", "float64", "test")
    with open_decoder(folder) as file:
        machine = Machine(file, config)
    rng = np.random.default_rng(0)
    utterances = [17 * rng.normal(size=(tokens, config.input_size)).astype(np.float32) for tokens in TOKENS]
    expected = [reference.decode(states[None])[0] for states in utterances]
    return Case(machine, utterances, machine.decode(utterances), expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest, folders: Path) -> Case:
    return make_case(request.param, folders / request.param)


def test_whole_voices(case: Case) -> None:
    for audio, expected in zip(case.whole, case.expected, strict=True):
        assert audio.shape == expected.shape
        quality = snr_db(audio, expected)
        assert quality >= 50, quality


def test_a_voice_does_not_depend_on_what_is_beside_it(case: Case) -> None:
    """Alone, first or last, and with other numbers of hops a thread block: the same bits."""
    for states, audio in zip(case.utterances[:3], case.whole[:3], strict=True):
        np.testing.assert_array_equal(case.machine.decode([states], hops_of_a_block=1)[0], audio)
    backwards = case.machine.decode(case.utterances[2::-1], hops_of_a_block=13)
    for audio, whole in zip(backwards[::-1], case.whole, strict=False):
        np.testing.assert_array_equal(audio, whole)


def test_streams_equal_whole_voices(case: Case) -> None:
    rng = np.random.default_rng(1)
    for states, audio in zip(case.utterances, case.whole, strict=True):
        voice, pieces = StreamedVoice(case.machine, states, slot=1), []
        while voice.done.tokens < len(states):
            piece = voice.take(int(rng.integers(1, 6)))
            pieces.append(case.machine.push([piece], [voice.ring]).reshape(-1))
        np.testing.assert_array_equal(np.concatenate(pieces), audio)


def test_streams_side_by_side(folders: Path) -> None:
    """Three voices, of which some rest while others go on; each push takes what is ready of all."""
    case = make_case("matrix", folders / "matrix")
    machine, lengths = case.machine, [5, 11, 7]
    states = [case.utterances[3][:length] for length in lengths]
    voices = [StreamedVoice(machine, s, slot, ring=8) for slot, s in enumerate(states)]
    got: list[list[np.ndarray]] = [[] for _ in voices]
    for turn in range(40):
        taken: list[Piece] = []
        owners = []
        output = 0
        for i, voice in enumerate(voices):
            if voice.done.tokens < len(voice.states) and (turn + i) % 3:
                taken.append(voice.take(1 + (turn + i) % 2, output))
                output += taken[-1].hops
                owners.append(i)
        if taken:
            samples = machine.push(taken, [voice.ring for voice in voices])
            for i, piece in zip(owners, taken, strict=True):
                got[i].append(samples[piece.output : piece.output + piece.hops].reshape(-1))
    for one, pieces in zip(states, got, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), machine.decode([one])[0])


def test_first_samples_come_after_the_fourth_state(folders: Path) -> None:
    """Two blocks look two frames ahead, the transform two: frame 2, so half of hop 2 and on, is done at frame 4."""
    case = make_case("matrix", folders / "matrix")
    voice = StreamedVoice(case.machine, case.utterances[2], slot=0)
    assert [voice.take(1).hops for _ in range(4)] == [0, 1, 4, 4]
    assert case.machine.lag == 2


def test_16_bit_samples(folders: Path) -> None:
    case = make_case("matrix", folders / "matrix")
    pcm = case.machine.decode(case.utterances[:1], pcm=True)[0]
    np.testing.assert_array_equal(pcm, to_pcm16(case.whole[0]))
    assert np.abs(pcm).max() > 1000


def transform(n_fft: int, frames: int, spectrum: np.ndarray, pcm: bool = False, **sabotage: int) -> np.ndarray:
    """The inverse transform alone of (F, n_fft) log2 magnitudes and turns, in spans of five hops."""
    count, hop = len(spectrum), n_fft // 4
    window = hann(n_fft)
    angles = 2 * np.pi * np.arange(n_fft // 2) / n_fft
    arrays = [
        aligned(spectrum.astype(np.float32)),
        aligned(
            np.array(
                [(h - 3, h - 3, h, min(h + 5, count + 1), count, -1, -1, h - 2) for h in range(2, count + 1, 5)],
                np.int32,
            ).view(np.float32)
        ),
        aligned((window / n_fft).astype(np.float32)),
        aligned(inverse_envelopes(window).astype(np.float32)),
        aligned(np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)),
    ]
    out = blank((count - 1, hop), "int16" if pcm else "float32")
    address = out.ctypes.data
    places = aligned(np.array((0, address) if pcm else (address, 0), np.uint64).view(np.float32))
    pointers = [array.ctypes.data for array in arrays]
    threads = max(32, frames * n_fft // 16)
    points = n_fft // 2
    build("vocos_istft.cu", {"DTYPE_FP16": 1, "N_FFT": n_fft, "FRAMES": frames, "RESIDENT": 1}).launch(
        "vocos_istft",
        struct.pack("<7Q2i", *pointers, 0, places.ctypes.data, n_fft, 0),
        grid=(len(arrays[1]), 1, 1),
        threads=threads,
        shared_bytes=frames * (points + points // 8) * 8,
        buffers=[Buffer(array) for array in (*arrays, places)] + [Buffer(out, writable=True)],
        **sabotage,
    )
    return out.reshape(-1)


def spectrum_and_samples(n_fft: int, count: int, turns: float) -> tuple[np.ndarray, np.ndarray]:
    """Random bins, and what they sound like by the reference's own inverse transform."""
    rng = np.random.default_rng(n_fft)
    bins = np.empty((count, n_fft // 2, 2), np.float32)
    bins[..., 0] = rng.normal(0, 3, bins.shape[:2])
    bins[..., 1] = turns * rng.normal(size=bins.shape[:2])
    bins[0, 1:3, 0] = (9, -200)  # clipped at 100, and nothing at all
    bins[1, 1:5, 1] = (0.125, -0.375, 0.5, -1.25)  # where the quarters meet
    full = np.zeros((count, n_fft // 2 + 1), complex)
    magnitude = np.minimum(np.exp2(np.minimum(bins[..., 0].astype(float), 80)), 100)
    angle = bins[..., 1].astype(float)
    full[:, 1:-1] = (magnitude * np.exp(2j * np.pi * (angle - np.rint(angle))))[:, 1:]
    overlap = OverlapAdd(InverseSTFT(hann(n_fft), n_fft // 4, np, "float64"), 1)
    expected = np.concatenate((overlap.push(full[None])[0], overlap.finish()[0]))
    bins[:, 0] = np.nan  # bin 0 is not even read
    return bins.reshape(count, n_fft), expected


# The error of an FFT in float32 grows with log2 of its size: some 3 roundings a radix-8 pass of 2^-24 each.
FFT_ERROR = 10 * 2.0**-24


@pytest.mark.parametrize(("n_fft", "frames"), [(64, 4), (64, 1), (128, 4), (256, 2), (512, 4), (2048, 4), (4096, 2)])
@pytest.mark.parametrize("turns", [1.0, 1e4])
def test_inverse_transform(n_fft: int, frames: int, turns: float) -> None:
    """Every last radix (2, 4 and 8), phases of any size, edges, and numbers of frames that are no multiple of four."""
    count = 14 if n_fft < 512 else 5 if n_fft < 2048 else 2
    spectrum, expected = spectrum_and_samples(n_fft, count, turns)
    assert relative_error(transform(n_fft, frames, spectrum), expected) < FFT_ERROR


def test_clipped_and_missing_samples() -> None:
    """16-bit samples are clipped at both ends; a frame of NaN spoils its own four hops and is 0 there."""
    spectrum, expected = spectrum_and_samples(64, 14, 1.0)
    assert expected.max() > 1
    assert expected.min() < -1
    quiet = transform(64, 4, spectrum, pcm=True)
    assert (np.abs(quiet - to_pcm16(expected).astype(int)) <= 1).all()
    assert {-32768, 32767} <= set(quiet.tolist())
    spectrum[7] = np.nan
    spoilt = transform(64, 4, spectrum).reshape(-1, 16)
    assert np.isnan(spoilt[5:9]).any(1).all()
    assert np.isfinite(np.delete(spoilt, range(5, 9), 0)).all()
    assert (transform(64, 4, spectrum, pcm=True).reshape(-1, 16)[5:9] == 0).mean() > 0.9


# Of one batch of 256-point frames: the points, two barriers for each of two passes, one for the last, the samples.
BARRIERS = 7


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_barrier_of_the_transform_is_needed(barrier: int) -> None:
    spectrum, _ = spectrum_and_samples(256, 14, 1.0)
    with pytest.raises(EmulationError, match="race"):
        transform(256, 4, spectrum, skip_barrier=barrier)


@pytest.mark.parametrize("most", [40, 64, 96])
@pytest.mark.parametrize("tokens", [2, 7, 25, 100])
def test_pieces_cover_a_voice(tokens: int, most: int) -> None:
    """Each hop once and in order, with all the frames that it needs, in no more rows than there are."""
    margin, frames = 9, frames_of(tokens)
    pieces = list(whole_pieces(4096, tokens, 7, margin, most))
    hops = [hop for piece in pieces for hop in range(piece.first_hop, piece.end_hop)]
    assert hops == list(range(2, frames + 1))
    assert [piece.output for piece in pieces] == [7 + piece.first_hop - 2 for piece in pieces]
    for piece in pieces:
        assert piece.rows <= most
        assert piece.first_frame <= max(0, piece.first_hop - 3 - margin)
        assert piece.end_frame >= min(frames, piece.end_hop + margin)
        assert piece.first_token * 4 <= piece.first_frame
        assert (piece.end_token - 1) * 4 >= piece.end_frame - 1
        assert piece.end_token <= tokens


def test_groups_are_even() -> None:
    """64 voices of 128 tokens, 32,576 frames, make four slices of 16 voices on 132 multiprocessors."""
    pieces = [piece for _ in range(64) for piece in whole_pieces(0, 128, 0, 8, 8448)]
    assert [len(group) for group in group_pieces(pieces, 8448)] == [16, 16, 16, 16]
    assert group_pieces(pieces[:1], 8448) == [pieces[:1]]
    assert [len(group) for group in group_pieces(pieces[:3], 509)] == [1, 1, 1]
