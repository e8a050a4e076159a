"""The language model on the GPU engine."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import settings
from ..checkpoint import TensorFile
from ..config import ModelConfig
from ..cuda.module import device_facts
from ..device import cuda_index
from ..errors import DeviceError, ParameterError
from ..generation import Request
from ..runner import KVCache, LanguageModelRunner
from . import ahead
from .arena import Arena
from .batch import Batch
from .batch_sizes import BUCKETS, CAPACITY_STEP, BatchSizes, bucket_of, one_voice, sizes_for
from .forward import Activations, Cache, Forward, PromptSizes, PromptTables, activation_specs
from .launch import RowRange
from .linear import padded
from .persistent import PersistentDecoder
from .persistent_path import PersistentPath
from .program import driver_problem, load_program
from .rounds import GpuRounds
from .weights import Weights

logger = logging.getLogger(__name__)

Array = Any  # cupy.ndarray

DTYPES = ("bfloat16", "float16")
MIN_CAPABILITY = {"bfloat16": (8, 0), "float16": (7, 5)}
IDLE_BATCHES = 4  # kept for the next calls

# Batches in use. A generator that nobody can reach any more, in a cycle of references, is closed by the garbage
# collector, and gives its batch back then. What only the cycle knows may have been finalized by that time, and a CUDA
# stream that is destroyed already must not be used: so somebody else knows the batch.
_borrowed: set[Batch] = set()


def best_dtype(capability: tuple[int, int]) -> str:
    """bfloat16 where the tensor cores take it, which is the checkpoints' own precision; else float16."""
    return "bfloat16" if capability >= MIN_CAPABILITY["bfloat16"] else "float16"


def engine_problem(config: ModelConfig, device: str, dtype: str) -> str | None:
    """Why the GPU engine cannot run such a model there, as one line; None when it can."""
    reason = driver_problem()
    if reason is not None:
        return reason
    facts = device_facts(cuda_index(device))
    if facts.capability < MIN_CAPABILITY[dtype]:
        needed = "{}.{}".format(*MIN_CAPABILITY[dtype])
        return f"{dtype} needs compute capability {needed}, and {facts.name} has {facts.compute_capability / 10:.1f}"
    if config.head_dim not in (32, 64, 128):
        return f"its attention kernels take head_dim 32, 64 and 128, not {config.head_dim}"
    return None


class GpuCache(KVCache):
    """Keys and values as (layers, slots, capacity, kv_heads, head_dim), 16-bit numbers as their bits."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.lengths = np.zeros(slots, np.int32)
        shape = (config.num_layers, slots, capacity, config.num_kv_heads, config.head_dim)
        self.arena = Arena({"keys": (shape, np.uint16), "values": (shape, np.uint16)})
        self.places = Cache(self.arena.pointer("keys"), self.arena.pointer("values"), slots, capacity)

    def move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for name in ("keys", "values"):
            array = self.arena[name]
            array[:, target, :length] = array[:, source, :length]
        self.lengths[target] = length


class GpuLanguageModel(LanguageModelRunner):
    """Runs in bfloat16 or float16 weights, keys and values; residual stream, norms, softmax and sums are float32."""

    attention = "flash"
    batch = BUCKETS[-1]

    def __init__(self, file: TensorFile, config: ModelConfig, device: str, dtype: str, reason: str) -> None:
        import cupy

        self.config, self.device, self.dtype, self.reason = config, device, dtype, reason
        self._facts = device_facts(cuda_index(device))
        self._on_device = cupy.cuda.Device(self._facts.index)
        with self._on_device:
            weights: Future[Weights] = Future()
            decoder = PersistentDecoder(config, weights.result, self._facts, dtype)
            self._path = PersistentPath(decoder, self._facts, settings.persistent())
            self._path.prepare()  # beside what follows
            ahead.begin(lambda: ahead.language_model_kernels(config, dtype, self._facts), self._facts.index)
            try:
                weights.set_result(Weights(file, config, dtype))
            finally:
                weights.cancel()  # where they could not be read
            self._weights = weights.result()
            self._forward = Forward(config, self._weights, dtype, self._facts)
            first = Batch(self._forward, one_voice(config), self._path)
            first.prepare()  # a kernel that does not compile is known now, while there is another way
        self._idle: list[Batch] = [first]
        self._lock = threading.Lock()

    @property
    def forward(self) -> Forward:
        """Plans the model's launches, for somebody who keeps sequences of his own."""
        return self._forward

    @property
    def persistent(self) -> PersistentPath:
        """The persistent kernel, and whether it is taken."""
        return self._path

    @property
    def weight_bytes(self) -> int:
        """GPU memory of the weights, in both orders where the persistent kernel has its own."""
        return self._weights.nbytes + self._path.nbytes

    @property
    def nbytes(self) -> int:
        """GPU memory planned so far: weights, and the batches that wait for calls."""
        return self.weight_bytes + sum(batch.nbytes for batch in self._idle)

    def begin(self, requests: Sequence[Request], *, give_up: bool = False) -> GpuRounds:
        return GpuRounds(self, requests, give_up=give_up)

    @contextmanager
    def borrowed(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """A batch that serves these requests, for this call alone; kept for later calls when it went well."""
        sizes = sizes_for(requests, self.config.max_positions)
        with self._lock:
            fitting = [batch for batch in self._idle if batch.sizes.serves(sizes)]
            batch = min(fitting, key=lambda batch: batch.sizes.slots, default=None)
            if batch is not None:
                self._idle.remove(batch)
        with self._on_device:
            batch = batch or Batch(self._forward, sizes, self._path)
            _borrowed.add(batch)
            try:
                yield batch
            except DeviceError:
                batch.abandon()  # whatever state it is in: the next call makes another
                raise
            except BaseException:  # the caller lost interest
                self._give_back(batch, len(requests))
                raise
            else:
                self._give_back(batch, len(requests))
            finally:
                _borrowed.discard(batch)

    def _give_back(self, batch: Batch, count: int) -> None:
        if sys.is_finalizing():  # a stream that was never read to its end; CuPy may be gone already
            return
        batch.settle(count)
        with self._lock:
            self._idle = [*self._idle, batch][-IDLE_BATCHES:]

    # -- measuring ------------------------------------------------------------------------------------------------

    def benchmark_step(
        self, batch: int, context: int, steps: int = 32, repeats: int = 5, temperature: float = 0.0
    ) -> list[float]:
        """Seconds of a decode step for `batch` sequences of about `context` tokens; a mean for each repeat.

        By the persistent kernel where that would generate them, else by graphs.
        """
        stays = self._path.problem(batch, drawn=temperature > 0) is None
        with self._measured(batch, context + steps) as measured:
            if stays:
                return measured.time_persistent(self._path, batch, context, steps, repeats, temperature)
            return measured.time_steps(batch, context, steps, repeats, temperature)

    def profile(self, batch: int, context: int) -> list[tuple[str, float]]:
        """Microseconds that each kind of kernel takes of a decode step, with what it waits for the one before."""
        with self._measured(batch, context + 8) as measured:
            return measured.profile_step(batch, context)

    @contextmanager
    def _measured(self, batch: int, tokens: int) -> Iterator[Batch]:
        """A batch for a measurement, given up at its end."""
        if not 1 <= tokens <= self.config.max_positions or not 1 <= batch <= BUCKETS[-1]:
            raise ParameterError(
                f"{batch} sequences of {tokens} tokens cannot be measured: at most {BUCKETS[-1]} of "
                f"{self.config.max_positions}"
            )
        capacity = min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, self.config.max_positions)
        with self._on_device:
            measured = Batch(self._forward, BatchSizes(bucket_of(batch), capacity, min(64, capacity)))
            yield measured
            measured.stream.synchronize()

    # -- the forward pass by itself -------------------------------------------------------------------------------

    def new_cache(self, slots: int, capacity: int) -> GpuCache:
        with self._on_device:
            return GpuCache(self.config, slots, capacity)

    def extend(self, cache: KVCache, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False) -> Array:
        assert isinstance(cache, GpuCache)
        import cupy

        counts = np.diff(cu_seqlens)
        before = cache.lengths[: len(counts)]
        rows, sequences = len(ids), len(counts)
        with self._on_device:
            stream = cupy.cuda.get_current_stream()
            arena = Arena(self._extend_specs(rows, sequences))
            host = {
                "ids": ids,
                "row_slots": np.repeat(np.arange(sequences), counts),
                "row_positions": np.arange(rows) - np.repeat(cu_seqlens[:-1] - before, counts),
                "starts": cu_seqlens,
                "lengths": before + counts,
            }
            for name, values in host.items():
                arena[name].set(np.ascontiguousarray(values, np.int32))
            activations = Activations.of(arena)
            tables = PromptTables(**{name: arena.pointer(name) for name in (*host, "queries")})
            sizes = PromptSizes(sequences, 0, int(counts.max()))
            launches = list(self._forward.prompt_layers(activations, cache.places, tables, RowRange(rows, rows), sizes))
            launches.append(self._forward.final_norm(activations, rows, arena.pointer("states")))
            program = load_program(launches, self._facts.index)
            program.run(stream.ptr, rows=rows, sequences=sequences, longest=int(counts.max()))
            cache.lengths[:sequences] = before + counts
            states = arena["states"]
            return (states[cupy.asarray(np.asarray(cu_seqlens[1:]) - 1)] if last_only else states).copy()

    def logits(self, states: Array) -> Array:
        import cupy

        with self._on_device:
            states = cupy.asarray(states, np.float32)
            rows = len(states)
            width = padded(self.config.hidden_size)
            arena = Arena(
                {"hidden": ((rows, width), np.uint16), "logits": ((rows, self.config.vocab_size), np.float32)}
            )
            narrow = np.float16
            if self.dtype == "bfloat16":
                import ml_dtypes

                narrow = ml_dtypes.bfloat16
            arena["hidden"][:, : self.config.hidden_size] = states.astype(narrow).view(np.uint16)
            launch = self._forward.logits_of_states(arena.pointer("hidden"), rows, arena.pointer("logits"))
            load_program([launch], self._facts.index).run(cupy.cuda.get_current_stream().ptr)
            return arena["logits"].copy()

    def _extend_specs(self, rows: int, sequences: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        c = self.config
        specs: dict[str, tuple[tuple[int, ...], Any]] = dict(activation_specs(c, rows, "uint16"))
        specs["queries"] = ((rows, c.num_heads, c.head_dim), np.uint16)
        specs["states"] = ((rows, c.hidden_size), np.float32)
        specs |= dict.fromkeys(("ids", "row_slots", "row_positions"), ((rows,), np.int32))
        return specs | {"starts": ((sequences + 1,), np.int32), "lengths": ((sequences,), np.int32)}
