"""What is built while weights are read is what the first call asks for."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from soprano_cupy import SopranoTTS
from soprano_cupy.config import ModelConfig
from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.gpu import ahead, program
from soprano_cupy.gpu.batch_launches import BatchLaunches
from soprano_cupy.gpu.batch_sizes import one_voice
from soprano_cupy.gpu.forward import Forward
from soprano_cupy.gpu.packing import packed_shape
from soprano_cupy.gpu.weights import Layer
from soprano_cupy.testing import SOPRANO_1_1_80M, TINY, make_checkpoint

GPUS = [DeviceFacts(0, "a GPU", capability, 132, 50 << 20) for capability in ((7, 5), (8, 6), (9, 0), (12, 0))]
Kernels = set[tuple[str, tuple[Any, ...]]]


def kernels(launches: Any) -> Kernels:
    return {program._function(launch) for launch in launches}


class Placed:
    """An array of a size of its own, at an address of its own."""

    end = 1 << 30

    def __init__(self, features: int, depth: int) -> None:
        rows, columns = packed_shape(features, depth)
        self.nbytes = 2 * rows * columns
        self.data = SimpleNamespace(ptr=Placed.end)
        Placed.end += self.nbytes


class Buffers:
    def pointer(self, name: str, offset: int = 0) -> int:
        return (1 << 33) + (sum(map(ord, name)) << 20) + 256 * offset


def weights_of(c: ModelConfig) -> Any:
    def layer() -> Layer:
        norm = Placed(1, c.hidden_size)
        return Layer(
            norm, Placed(c.q_size + 2 * c.kv_size, c.hidden_size), norm, norm, Placed(c.hidden_size, c.q_size), norm,
            Placed(2 * c.intermediate_size, c.hidden_size), Placed(c.hidden_size, c.intermediate_size),
        )  # fmt: skip

    head = Placed(c.vocab_size, c.hidden_size)
    layers = [layer() for _ in range(c.num_layers)]
    return SimpleNamespace(layers=layers, head=head, embeddings=head, norm=head, rope=head)


@pytest.mark.parametrize("facts", GPUS, ids=lambda facts: str(facts.capability))
@pytest.mark.parametrize("config", [SOPRANO_1_1_80M, TINY], ids=["80M", "tiny"])
def test_one_layer_on_addresses_of_nothing_has_all_kernels(config: ModelConfig, facts: DeviceFacts) -> None:
    dtype = "float16" if facts.capability < (8, 0) else "bfloat16"
    forward = Forward(config, weights_of(config), dtype, facts)
    launches = BatchLaunches(forward, one_voice(config), Buffers(), tokens=1 << 40, progress=1 << 41, workspace=1 << 42)
    found = kernels(ahead.language_model_kernels(config, dtype, facts))
    assert found == kernels(launches.first_call())
    assert found >= kernels(launches.prompt(launches.prompt_class(60), 1, 0))
    assert found >= kernels(launches.tail(1))


def test_a_kernel_that_cannot_be_built_is_left_to_those_who_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(launches: Any, device: int) -> None:
        asked.append((launches, device))
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ahead, "load_kernels", refuse)
    ahead.begin(lambda: ["a launch"], 3)  # type: ignore[list-item, return-value]
    join()
    assert asked == [(["a launch"], 3)]


def join() -> None:
    for thread in threading.enumerate():
        if thread.name == "soprano-kernels":
            thread.join(60)


@pytest.mark.gpu
def test_the_first_call_asks_for_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, config=SOPRANO_1_1_80M)
    planned: Kernels = set()
    asked: Kernels = set()
    real = program.load_kernels

    def load(into: Kernels) -> Any:
        def record(launches: Any, device: int) -> Any:
            launches = list(launches)
            into.update(kernels(launches))
            return real(launches, device)

        return record

    monkeypatch.setattr(ahead, "load_kernels", load(planned))
    monkeypatch.setattr(program, "load_kernels", load(asked))
    tts = SopranoTTS(tmp_path, "cuda:0")
    next(tts.infer_stream("Hello there, how are you?"))
    tts.engine.decoder.decode(np.zeros((1, 60, 512), np.float32))
    join()
    beside = {"decode_persistent", "gather_blocks"}
    assert planned
    assert {kernel for kernel in asked - planned if kernel[0] not in beside} == set()
