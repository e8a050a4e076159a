"""What the host hands to a generation step's kernels: their structs, constants and records."""

from __future__ import annotations

from pathlib import Path

import emulation
import numpy as np
from slot_records import slot_state
from struct_layouts import compiled_layout, numpy_layout

from soprano_cupy.generation import Request
from soprano_cupy.gpu import attention_step, slots, step
from soprano_cupy.gpu.launch import Blocks, Symbol
from soprano_cupy.sampling import SamplingParams

STRUCTS = {
    "SlotState": step.SLOT_STATE, "EmbedParams": step.EMBED_PARAMS, "GatherParams": step.GATHER_PARAMS,
    "FinalNormParams": step.FINAL_NORM_PARAMS, "QkvFinishParams": step.QKV_FINISH_PARAMS,
    "AttentionStepParams": attention_step.ATTENTION_STEP_PARAMS, "SampleParams": step.SAMPLE_PARAMS,
}  # fmt: skip


def test_structs_lie_in_memory_as_the_kernels_have_them(tmp_path: Path) -> None:
    """Offsets of all fields and the sizes, as the kernels' compiler sees them."""
    assert compiled_layout(tmp_path, "step_params.cuh", STRUCTS) == numpy_layout(STRUCTS)


def test_the_constants_are_those_of_the_kernels() -> None:
    text = (emulation.KERNELS / "step_params.cuh").read_text(encoding="utf-8")
    for name in ("RUNNING", "STOP", "LENGTH", "STUCK", "FAILED"):
        assert f"STATUS_{name} = {getattr(step, name)};" in text
    for name in ("GREEDY", "GIVE_UP"):
        assert f"OPTION_{name} = {getattr(slots, f'OPTION_{name}')};" in text
    search = (emulation.KERNELS / "sample_search.cuh").read_text(encoding="utf-8")
    assert f"CANDIDATES = {step.CANDIDATES};" in search
    assert "DIGIT_BITS = 6, BINS = 1 << DIGIT_BITS" in search
    assert step.BINS == 1 << 6
    scores = (emulation.KERNELS / "sample_scores.cuh").read_text(encoding="utf-8")
    assert f"MOST_HELD = {step.MOST_HELD};" in scores


def test_symbols_become_fields_and_grids() -> None:
    launch = step.plan_embed(
        dtype="bfloat16", capability=(9, 0), multiprocessors=132, rows=Symbol.ROWS, hidden_size=512, ids=1,
        embeddings=2, gain=3, residual=4, hidden=5, square_sums=6, stride=512,
    )  # fmt: skip
    assert launch.grid == (Blocks(Symbol.ROWS, 1), 1, 1)
    ((offset, symbol),) = launch.fields
    assert symbol is Symbol.ROWS
    assert offset == step.EMBED_PARAMS.fields["rows"][1]
    packed = np.frombuffer(launch.params, step.EMBED_PARAMS)[0]
    assert (packed["ids"], packed["square_sums"], packed["columns"], packed["rows"]) == (1, 6, 512, 0)


def test_records_of_slots() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, max_new_tokens=50, seed=2**63 + 5)
    record = slot_state(Request(np.zeros(10, np.int32), params, stream=7 << 32), 40, give_up=True)
    assert (record["seed"], record["stream"], record["top_p"]) == (2**63 + 5, 7 << 32, 0.9)
    scale = float(record["scale_high"]) + float(record["scale_low"])
    assert abs(scale * 0.7 / np.log2(np.e) - 1) < 2**-46
    assert (record["limit"], record["position"], record["options"]) == (31, 9, slots.OPTION_GIVE_UP)
    assert slot_state(Request(np.zeros(10, np.int32), params), 60)["limit"] == 50
    coldest = slot_state(Request(np.zeros(1, np.int32), SamplingParams(temperature=1e-320, seed=0)), 40)
    assert np.isfinite(coldest["scale_high"])
    greedy = slot_state(Request(np.zeros(1, np.int32), SamplingParams(repetition_penalty=1e300)), 40)
    assert greedy["options"] == slots.OPTION_GREEDY
    assert np.isfinite(greedy["penalty"])
