"""A generation step's own kernels compile for every architecture, without spills and within their registers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from compiling import MULTIPROCESSORS, REGISTERS, case_name, registers_without_spills

from soprano_cupy.cuda.compiler import Nvrtc
from soprano_cupy.gpu import step
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.persistent_weights import plan_gather

DECODE_WARPS = {8: 16, 16: 12, 32: 8}  # of attention's, that a multiprocessor is to hold, by TILE_ROWS


def attention(number: int, rows: int, heads: int = 4, head_dim: int = 128) -> Launch:
    return step.plan_attention_step(
        dtype="float16" if number < 80 else "bfloat16", capability=(number // 10, number % 10),
        multiprocessors=MULTIPROCESSORS[number], rows=rows, num_heads=heads, num_kv_heads=1, head_dim=head_dim,
        epsilon=1e-6, qkv=0, attended=0, attended_stride=heads * head_dim, q_gain=0, k_gain=0, rope=0, keys=0, values=0,
        capacity=1024, slot_of_row=0, slots=0,
    )  # fmt: skip


def sampling(number: int, vocab: int, hidden: int) -> Launch:
    addresses = dict.fromkeys(
        ("logits", "residual", "square_sums", "final_gain", "embeddings", "next_gain", "next_residual", "next_hidden",
         "next_square_sums", "slot_of_row", "next_slot_of_row", "slots", "seen", "tokens", "states", "progress"), 0,
    )  # fmt: skip
    return step.plan_sample(
        dtype="float16" if number < 80 else "bfloat16", capability=(number // 10, number % 10),
        multiprocessors=MULTIPROCESSORS[number], rows=1, hidden_size=hidden, vocab_size=vocab, end_token=3,
        epsilon=1e-6, stride=hidden, most_tokens=512, **addresses,
    )  # fmt: skip


def prompt_kernels(number: int) -> Iterator[Launch]:
    dtype = "float16" if number < 80 else "bfloat16"
    facts = {"dtype": dtype, "capability": (number // 10, number % 10), "multiprocessors": MULTIPROCESSORS[number]}
    yield step.plan_final_norm(
        **facts, rows=1, hidden_size=512, epsilon=1e-6, residual=0, square_sums=0, gain=0, states=0, stride=512
    )
    yield step.plan_qkv_finish(
        **facts, rows=1, num_heads=4, num_kv_heads=1, head_dim=128, epsilon=1e-6, qkv=0, q_gain=0, k_gain=0, rope=0,
        queries=0, keys=0, values=0, capacity=1024, row_slots=0, row_positions=0,
    )  # fmt: skip


def cases() -> Iterator[tuple[int, Launch]]:
    """One voice and many on 9.0, with every shape of tile; elsewhere one of both, in turns; sampling everywhere."""
    for i, number in enumerate(MULTIPROCESSORS):
        yield number, sampling(number, 8192, 512)
        yield number, plan_gather(0, 0, 1, "float16" if number < 80 else "bfloat16")
        if number == 90:
            launches = [attention(number, rows, heads) for rows, heads in ((1, 4), (20, 4), (512, 4), (1, 12), (1, 20))]
            yield from ((number, launch) for launch in (*launches, attention(number, 1, 4, 64)))
            yield from ((number, sampling(number, *sizes)) for sizes in ((2240, 256), (50_001, 768)))
        else:
            yield number, attention(number, 512 if i % 2 else 1)
        if number in (75, 90, 120):
            yield from ((number, launch) for launch in prompt_kernels(number))


CASES = list(cases())


@pytest.mark.parametrize(("number", "launch"), CASES, ids=[case_name(*case) for case in CASES])
def test_compiles_within_its_registers(nvrtc: Nvrtc, number: int, launch: Launch) -> None:
    if number not in nvrtc.architectures:
        pytest.skip("NVRTC {}.{} does not compile for sm_{}".format(*nvrtc.version, number))
    assert max(registers_without_spills(nvrtc, number, launch)) <= register_ceiling(launch)


def register_ceiling(launch: Launch) -> int:
    """What each thread may use for the intended number of warps to fit a multiprocessor."""
    constants = dict(launch.defines)
    warps = DECODE_WARPS[constants["TILE_ROWS"]] if launch.kernel == "attention_step" else launch.threads // 32
    return min(255, REGISTERS // 32 // warps // 8 * 8)
