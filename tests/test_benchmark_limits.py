"""The least work of a GPU and the texts that the benchmark of the runtime speaks."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ lies beside the package, and is no part of it

from benchmarks import least_work, random_text
from soprano_cupy.testing import SOPRANO_1_1_80M, SOPRANO_1_1_80M_DECODER, SOPRANO_80M_DECODER
from soprano_cupy.text import build_prompts

H200 = {"copy_tb_s": 4.14, "matmul_tflop_s": 783.0}


# ---- texts ----


def test_sentences_are_the_same_for_a_seed() -> None:
    texts = random_text.sentences(50, seed=3)
    assert texts[:20] == random_text.sentences(20, seed=3)
    assert texts != random_text.sentences(50, seed=4)
    assert len(set(texts)) == 50


def test_sentences_have_the_lengths_asked_for() -> None:
    lengths = {len(text) for text in random_text.sentences(2000, seed=0)}
    assert (min(lengths), max(lengths)) == (20, 200)
    generator = random.Random(0)
    assert [len(random_text.sentence(generator, length)) for length in range(3, 60)] == list(range(3, 60))


def test_sentences_are_read_as_they_stand() -> None:
    """No word is expanded or spelled out, and each text is one prompt."""
    for text in random_text.sentences(200, seed=1):
        assert build_prompts(text) == [f"[STOP][TEXT]{text.lower()}[START]"]
        words = text.lower().strip(".").split(" ")
        assert all(2 <= len(word) <= 10 for word in words)


# ---- limits ----


def test_a_step_reads_the_weights_once() -> None:
    """151 MB and 36.5 us at 4.14 TB/s for Soprano-1.1-80M."""
    work = least_work.step_work(SOPRANO_1_1_80M, 1, 0)
    assert work.moved == 2 * least_work.language_model_parameters(SOPRANO_1_1_80M) == 2 * 75_497_472
    assert work.flops == work.moved
    assert work.seconds(H200) * 1e6 == pytest.approx(36.5, abs=0.05)


@pytest.mark.parametrize(
    ("batch", "context", "us"), [(32, 128, 45), (128, 256, 105), (512, 256, 312), (1024, 256, 588), (2048, 512, 2241)]
)
def test_a_step_reads_every_cache(batch: int, context: int, us: float) -> None:
    assert least_work.cache_bytes(SOPRANO_1_1_80M) == 17 * 512
    seconds = least_work.step_work(SOPRANO_1_1_80M, batch, context).seconds(H200)
    assert seconds * 1e6 == pytest.approx(us, rel=0.01)


def test_the_larger_of_bytes_and_arithmetic_counts() -> None:
    limits = {"copy_tb_s": 2.0, "matmul_tflop_s": 5.0}
    assert least_work.Work(4e12, 5e12).seconds(limits) == 2.0
    assert least_work.Work(4e12, 15e12).seconds(limits) == 3.0


def test_a_prompt_is_its_tokens_times_the_weights() -> None:
    """As many tokens as one step at a time, less the heads that nobody reads."""
    head = SOPRANO_1_1_80M.vocab_size * SOPRANO_1_1_80M.hidden_size
    steps = sum(least_work.step_work(SOPRANO_1_1_80M, 1, context).flops for context in range(1, 65))
    assert least_work.prefill_work(SOPRANO_1_1_80M, [64]).flops == steps - 63 * 2 * head
    two = least_work.prefill_work(SOPRANO_1_1_80M, [64, 64])
    assert two.flops == 2 * least_work.prefill_work(SOPRANO_1_1_80M, [64]).flops


def test_the_decoder_counts_its_frames() -> None:
    """240 MFLOP a token; 61 MB of weights; about 208,000 times real time for 64 voices."""
    one = least_work.decoder_work(SOPRANO_1_1_80M_DECODER, 1, 1)
    assert one.flops == pytest.approx(240e6, rel=0.01)
    assert least_work.decoder_work(SOPRANO_1_1_80M_DECODER, 0, 0).moved == pytest.approx(60.5e6, rel=0.01)
    many = least_work.decoder_work(SOPRANO_1_1_80M_DECODER, 64, 128)
    assert many.flops == 64 * 128 * one.flops
    assert 64 * 128 * 0.064 / many.seconds(H200) == pytest.approx(208_000, rel=0.01)
    wide = least_work.decoder_work(SOPRANO_80M_DECODER, 1, 1)  # its first layer reads three frames, at frame rate
    blocks = 8 * 2 * 512 * 1536 + 512 * 2050
    assert wide.flops == 2 * 4 * (blocks + 3 * 512 * 512)


def test_sentences_cost_their_steps_and_their_sound() -> None:
    model, decoder = SOPRANO_1_1_80M, SOPRANO_1_1_80M_DECODER
    seconds = least_work.speech_seconds(model, decoder, [40], 128, H200)
    steps = 127 * least_work.step_work(model, 1, 40 + 64).seconds(H200)
    rest = least_work.prefill_work(model, [40]).seconds(H200) + least_work.decoder_work(decoder, 1, 127).seconds(H200)
    assert seconds == pytest.approx(steps + rest, rel=1e-9)
