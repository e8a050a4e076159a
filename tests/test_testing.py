"""Made-up checkpoints: the published formats, the same files from the same seed, well-behaved numbers."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from soprano_cupy.checkpoint import (
    decoder_config,
    language_model_shapes,
    open_decoder,
    open_language_model,
)
from soprano_cupy.checkpoint.shapes import parameter_count
from soprano_cupy.config import DecoderConfig, ModelConfig
from soprano_cupy.errors import ParameterError
from soprano_cupy.qwen3 import Qwen3
from soprano_cupy.testing import (
    MIN_VOCAB,
    SOPRANO_1_1_80M,
    SOPRANO_1_1_80M_DECODER,
    SOPRANO_80M,
    SOPRANO_80M_DECODER,
    TINY,
    TINY_DECODER,
    config_json,
    make_checkpoint,
    tokenizer_json,
)
from soprano_cupy.tokenizer import Tokenizer
from soprano_cupy.vocos import VocosDecoder

TIED = dataclasses.replace(TINY, tie_embeddings=True)
TEXTS = ("hello there.", "the weather is nice today, isn't it?", "one two three four five six seven", "why?")


def prompt_ids(folder: Path, text: str) -> np.ndarray:
    return Tokenizer.load(folder).encode(f"[STOP][TEXT]{text}[START]")


def test_files_are_those_of_a_published_checkpoint(tmp_path):
    folder = make_checkpoint(tmp_path / "new" / "voice")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "decoder.pth",
    }
    assert zipfile.is_zipfile(folder / "decoder.pth")
    assert ModelConfig.from_folder(folder) == TINY
    with open_decoder(folder) as file:
        assert decoder_config(file) == TINY_DECODER
    Tokenizer.load(folder).check(TINY.vocab_size)


def test_a_seed_decides_every_byte(tmp_path):
    first, again, other = (make_checkpoint(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
        differs = path.suffix in (".pth", ".safetensors")
        assert (path.read_bytes() != (other / path.name).read_bytes()) == differs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(tmp_path, dtype):
    folder = make_checkpoint(tmp_path, dtype=dtype, decoder_dtype=dtype, decoder_format="safetensors")
    with open_language_model(folder) as model, open_decoder(folder) as decoder:
        assert decoder.path.name == "decoder.safetensors"
        for file in (model, decoder):
            assert {file.dtype(name) for name in file.names()} == {dtype}


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TINY, hidden_size=33, num_heads=6, num_kv_heads=1, head_dim=64, num_layers=1),
        dataclasses.replace(TINY, num_heads=2, num_kv_heads=2, head_dim=128, intermediate_size=1, eos_token_id=7),
        dataclasses.replace(TIED, vocab_size=MIN_VOCAB, rope_theta=1e6, rms_norm_eps=1e-5, max_positions=64),
    ],
)
def test_other_sizes(tmp_path, config):
    decoder = DecoderConfig(config.hidden_size, 12, 20, 3, embed_kernel=3, n_fft=512, hop_length=128)
    folder = make_checkpoint(tmp_path, config=config, decoder=decoder)
    assert ModelConfig.from_folder(folder) == config
    assert ModelConfig.from_dict(config_json(config)) == config
    with open_language_model(folder) as file:
        for name, shape in language_model_shapes(config).items():
            assert np.isfinite(file.pop(name, shape)).all()
        file.finish()
    with open_decoder(folder) as file:
        assert decoder_config(file) == decoder
    assert Tokenizer.load(folder).vocab_size == config.vocab_size


def test_the_real_shapes_are_the_published_ones(shared_dir):
    published = ModelConfig.from_folder(shared_dir / "soprano-1.1-80m")
    assert published == SOPRANO_1_1_80M
    assert dataclasses.replace(published, max_positions=512) == SOPRANO_80M
    # model.safetensors has 159 MB of bfloat16
    assert round(2 * parameter_count(language_model_shapes(SOPRANO_1_1_80M)) / 1e6) == 159
    for decoder, sizes in ((SOPRANO_1_1_80M_DECODER, (768, 2304, 8, 1)), (SOPRANO_80M_DECODER, (512, 1536, 8, 3))):
        assert (decoder.dim, decoder.intermediate_size, decoder.num_blocks, decoder.embed_kernel) == sizes
        assert (decoder.input_size, decoder.n_fft, decoder.hop_length) == (512, 2048, 512)


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_they_behave_like_voices(tmp_path, config):
    """Logits apart, states that move, sentences that end, audio that is neither silent nor clipped."""
    lengths: list[int] = []
    gaps: list[float] = []
    for seed in range(3):
        folder = make_checkpoint(tmp_path / str(seed), seed=seed, config=config)
        model, decoder = Qwen3.load(folder), VocosDecoder.load(folder)
        for text in TEXTS:
            ids = prompt_ids(folder, text)
            _, logits = model.forward(ids)
            assert 2 < logits.std() < 8
            best, second = np.sort(logits, axis=-1)[:, :-3:-1].T
            gaps.extend(best - second)
            out = model.generate(ids, max_new_tokens=200)
            lengths.append(len(out.tokens))
            states = np.asarray(out.states)
            if len(states) >= 16:
                steps = np.abs(np.diff(states, axis=0)).sum(axis=1)
                assert np.median(steps) > 600
                audio = decoder(states[None])
                assert 0.05 < audio.std() < 0.2
                assert np.abs(audio).max() < 1
    assert np.median(gaps) > 0.3
    assert 5 <= np.median(lengths) <= 100
    assert np.mean(np.array(lengths) < 200) >= 0.75


def test_without_a_stop(tmp_path):
    folder = make_checkpoint(tmp_path, mean_tokens=None)
    out = Qwen3.load(folder).generate(prompt_ids(folder, TEXTS[0]), max_new_tokens=300)
    assert (len(out.tokens), out.finish_reason) == (300, "length")


@pytest.mark.parametrize(("stuck", "low", "high"), [(True, 0, 300), (False, 300, np.inf)])
def test_a_stuck_voice(tmp_path, stuck, low, high):
    """Every step of a stuck voice is below the loop check's limit, nearly every one of another's above."""
    folder = make_checkpoint(tmp_path, stuck=stuck, mean_tokens=None)
    out = Qwen3.load(folder).generate(prompt_ids(folder, TEXTS[0]), max_new_tokens=60)
    steps = np.abs(np.diff(np.asarray(out.states), axis=0)).sum(axis=1)
    share = np.mean((low <= steps) & (steps < high))
    assert share == 1 if stuck else share > 0.9


def test_a_tokenizer_of_ones_own(tmp_path):
    (tmp_path / "mine.json").write_text(tokenizer_json(300))
    folder = make_checkpoint(tmp_path / "voice", tokenizer=tmp_path / "mine.json")
    assert (folder / "tokenizer.json").read_text() == tokenizer_json(300)


def test_the_made_up_tokenizer_speaks_all_of_ascii():
    description = json.loads(tokenizer_json(MIN_VOCAB))
    vocabulary = description["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(MIN_VOCAB))
    assert {chr(code) for code in range(32, 127) if not chr(code).isupper()} <= vocabulary.keys()
    for merge in description["model"]["merges"]:
        left, right = merge.split()
        assert {left, right, left + right} <= vocabulary.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"decoder": dataclasses.replace(TINY_DECODER, input_size=47)},
            "decoder.input_size = 47 is not hidden_size = 48",
        ),
        ({"decoder_format": "onnx"}, "decoder_format = 'onnx' is not one of pth, safetensors"),
        ({"config": dataclasses.replace(TINY, vocab_size=MIN_VOCAB - 1)}, f"{MIN_VOCAB} is the least"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"decoder_dtype": "fp32"}, "decoder_dtype = 'fp32'"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ParameterError, match=message):
        make_checkpoint(tmp_path / "voice", **arguments)
    assert not (tmp_path / "voice").exists()
