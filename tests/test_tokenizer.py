"""Prompts to ids: the reference's, and every tokenizer that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soprano_cupy.checkpoint.resolve import BUNDLED_FOLDER
from soprano_cupy.errors import CheckpointError, TextError
from soprano_cupy.testing import MIN_VOCAB, tokenizer_json
from soprano_cupy.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(tokenizer_json(200))
    return folder


def test_every_reference_prompt(shared_dir):
    tokenizer = Tokenizer.load(shared_dir / "soprano-1.1-80m")
    count = 0
    for line in (shared_dir / "golden/text.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        for prompt, row, ids in zip(case["prompts"], tokenizer.encode_batch(case["prompts"]), case["ids"], strict=True):
            np.testing.assert_array_equal(tokenizer.encode(prompt), ids)
            np.testing.assert_array_equal(row, ids)
            count += 1
    assert count == 52


@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa", "voice"])
def test_reference_checkpoints(shared_dir, name):
    tokenizer = Tokenizer.load(shared_dir / name)
    expected = np.load(shared_dir / name / "expected.npz")
    for number, prompt in enumerate(json.loads((shared_dir / name / "prompts.json").read_text())):
        np.testing.assert_array_equal(tokenizer.encode(prompt), expected[f"ids{number}"])


def test_encode(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("[STOP][TEXT]the hat[START]").dtype == np.int32
    vocabulary = json.loads(tokenizer_json(200))["model"]["vocab"]
    expected = ["[STOP]", "[TEXT]", "the", " ", "h", "at", "[START]"]
    np.testing.assert_array_equal(
        tokenizer.encode("[STOP][TEXT]the hat[START]"), [vocabulary[piece] for piece in expected]
    )


def test_encode_odd_text(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("").shape == (0,)
    np.testing.assert_array_equal(tokenizer.encode("HELLO\t\n you"), tokenizer.encode("hello you"))
    np.testing.assert_array_equal(tokenizer.encode("é😀"), [0, 0])
    assert len(tokenizer.encode("a" * 5000)) == 5000


@pytest.mark.parametrize("prompt", [None, 3, b"abc", "\ud800"])
def test_prompts_that_are_not_text(folder, prompt):
    with pytest.raises(TextError, match=r"a prompt must be text|cannot be tokenised") as caught:
        Tokenizer.load(folder).encode(prompt)
    assert "\n" not in str(caught.value)


def test_a_batch_is_its_prompts_one_by_one(folder):
    tokenizer = Tokenizer.load(folder)
    prompts = [
        "[STOP][TEXT]the hat[START]",
        "",
        "é😀",
        "[STOP][TEXT]a, b.[START]",
        "x" * 300,
        "[STOP][TEXT]a, b.[START]",
    ]
    rows = tokenizer.encode_batch(prompts)
    assert [row.dtype for row in rows] == [np.int32] * len(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        np.testing.assert_array_equal(row, tokenizer._encoder.encode(prompt).ids)
        np.testing.assert_array_equal(row, tokenizer.encode(prompt))
    assert tokenizer.encode_batch([]) == []
    assert len(tokenizer.encode_batch(tuple(prompts))) == len(prompts)


@pytest.mark.parametrize("odd", [None, 3, b"abc", ("a", "b"), ["a"], "\ud800"])
def test_a_batch_with_a_prompt_that_is_not_text(folder, odd):
    with pytest.raises(TextError, match=r"a prompt must be text|cannot be tokenised") as caught:
        Tokenizer.load(folder).encode_batch(["[STOP][TEXT]a[START]", odd])
    assert "\n" not in str(caught.value)


def test_settings_in_the_file_do_not_cut_or_pad(tmp_path):
    description = json.loads(tokenizer_json(200))
    description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    description["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[STOP]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert len(Tokenizer.load(tmp_path).encode("[STOP][TEXT]a b c[START]")) == 8


def test_check_against_the_model(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 200
    tokenizer.check(200)
    tokenizer.check(10_000)
    with pytest.raises(CheckpointError, match="ids up to 199, but the model's vocabulary ends at 198"):
        tokenizer.check(199)


def test_the_bundled_voice_has_one():
    tokenizer = Tokenizer.load(BUNDLED_FOLDER)
    assert tokenizer.vocab_size == 2240
    assert tokenizer.encode("[STOP][TEXT]yes.[START]")[:2].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a valid tokenizer"),
        (b"{}", "is not a valid tokenizer"),
        (b"[]", "is not a valid tokenizer"),
        (b'{"version":"1.0","model":{"type":"Nothing"}}', "is not a valid tokenizer"),
        (b"[" * 100_000, "is not a valid tokenizer"),
        (b"\xff\xfe", "is not valid UTF-8"),
        (tokenizer_json(MIN_VOCAB).encode()[:-500], "is not a valid tokenizer"),
        (
            tokenizer_json(MIN_VOCAB).replace("[START]", "[BEGIN]").encode(),
            r"lacks \[START\]; is it a Soprano tokenizer",
        ),
    ],
)
def test_unreadable_tokenizers(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: Is a directory"):
        Tokenizer.load(tmp_path)


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, 1 << 20), value=st.sampled_from(list('"{}[],:0-nt x\\9')), length=st.integers(0, 30))
def test_mutated_tokenizers(tmp_path, position, value, length):
    """Either refused or usable; the library's panics included."""
    text = tokenizer_json(MIN_VOCAB)
    at = position % len(text)
    (tmp_path / "tokenizer.json").write_text(text[:at] + value + text[at + length :])
    try:
        ids = Tokenizer.load(tmp_path).encode("[STOP][TEXT]hello there[START]")
    except (CheckpointError, TextError):
        ids = np.zeros(0, np.int32)
    assert ids.dtype == np.int32
