"""The Vocos decoder as launches: which kernels run in which order, on which buffers.

A block is three launches (convolution with norm; expanding product with GELU; contracting product with residual sum).
Six stand around the blocks: states, embedding product, interpolation with norm; final norm, head product and inverse
transform. Nothing runs here, and nothing needs a GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DecoderConfig
from .launch import ANY_ADDRESS, Blocks, Field, Launch, RowRange, Symbol
from .linear import End, LinearRequest, padded
from .vocos_tables import PARTS, ROW_BYTES, SEGMENT, SPAN_BYTES, TOKEN_BYTES, margins

EPSILON = 1e-6  # of every norm
STATE_THREADS = 128  # of vocos_states and vocos_windows
WARP_LANES = 32

# What these launches follow: Symbol.ROWS are frames, SEQUENCES tokens, LONGEST the thread blocks of the transform.
ROWS, TOKENS, SPANS = Symbol.ROWS, Symbol.SEQUENCES, Symbol.LONGEST

# Rows of a thread block. Eight have 30 KB of loads under way in each of the four blocks that a multiprocessor holds;
# streams have few rows, which are better spread over the multiprocessors.
WHOLE_ROWS, STREAM_ROWS = 8, 2

# Frames that a thread block of the transform takes at a time, and thread blocks that a multiprocessor should hold: from
# compute capability 10.0 on the compiler does not fit it into 64 registers.
SMALL_FRAMES, LARGE_N_FFT = 4, 4096
RESIDENT_THREADS = 1024
RESIDENT_THREADS_FROM_10 = 512

# Hops of a thread block. It transforms three frames more than that: few make a launch short, many make it cheap. The
# first number that leaves as many thread blocks as the multiprocessors hold, twice.
SPAN_HOPS = (29, 13, 5, 1)

_ROWS_PARAMS = struct.Struct("<11Q4ifi")  # VocosRowsParams
_ROWS_FIELD = 88
_ISTFT_PARAMS = struct.Struct("<7Q2i")  # VocosIstftParams

MAX_DIM = 4096  # channels that a thread block holds, four a thread
MAX_N_FFT = 4096
MIN_N_FFT = 64
MAX_MARGIN = 256  # frames; a slice has 1,024 at least


def unsupported(config: DecoderConfig) -> str | None:
    """Why the kernels cannot run such a decoder, as one line; None when they can."""
    for name, size in (("input size", config.input_size), ("dim", config.dim), ("inner", config.intermediate_size)):
        if size % 8:
            return f"the decoder's {name} {size} is no multiple of 8"
    if config.dim > MAX_DIM:
        return f"the decoder's dim {config.dim} is above {MAX_DIM}"
    if not MIN_N_FFT <= config.n_fft <= MAX_N_FFT or config.n_fft & (config.n_fft - 1):
        return f"the decoder's n_fft {config.n_fft} is no power of two from {MIN_N_FFT} to {MAX_N_FFT}"
    if config.hop_length * PARTS != config.n_fft:
        return f"the decoder's hop {config.hop_length} is not a quarter of its n_fft {config.n_fft}"
    if margins(config).total > MAX_MARGIN:
        return f"the decoder's convolutions reach {margins(config).total} frames far, more than {MAX_MARGIN}"
    return None


@dataclass(frozen=True)
class Capacity:
    """The most that one launch sequence takes."""

    rows: int
    tokens: int
    pieces: int
    spans: int

    @classmethod
    def of_rows(cls, rows: int) -> Capacity:
        """For pieces of at least 5 rows: the frames of two states."""
        return cls(rows=rows, tokens=rows // 2 + 8, pieces=rows // 5 + 1, spans=rows)


Specs = dict[str, tuple[tuple[int, ...], str]]


def table_specs(capacity: Capacity) -> Specs:
    """What the host writes before each run."""
    return {
        "output": ((2,), "uint64"),
        "segments": ((capacity.pieces, SEGMENT.itemsize), "uint8"),
        "tokens": ((capacity.tokens, TOKEN_BYTES), "uint8"),
        "rows": ((capacity.rows, ROW_BYTES), "uint8"),
        "spans": ((capacity.spans, SPAN_BYTES), "uint8"),
    }


def activation_specs(config: DecoderConfig, capacity: Capacity) -> Specs:
    """What the kernels hand to one another; 16-bit numbers as their bits. All of it begins as zeros."""
    c, rows = config, capacity.rows
    embedded = capacity.tokens if c.embed_kernel == 1 else rows
    return {
        "states": ((embedded, padded(c.embed_kernel * c.input_size)), "uint16"),
        "embedded": ((embedded, c.dim), "float32"),
        "residual": ((rows, c.dim), "float32"),
        "normed": ((rows, padded(c.dim)), "uint16"),
        "expanded": ((rows, padded(c.intermediate_size)), "uint16"),
        "spectrum": ((rows, c.n_fft), "float32"),
    }


def stream_specs(config: DecoderConfig, capacity: Capacity, slots: int) -> Specs:
    """What streams need besides: the second residual stream, and what `slots` voices remember."""
    c = config
    return {
        "delayed": ((capacity.rows, c.dim), "float32"),
        "history": ((c.num_blocks, 2 * slots, c.block_kernel - 1, c.dim), "float32"),
        "open": ((2 * slots, PARTS - 1, c.hop_length), "float32"),
    }


@dataclass(frozen=True)
class Facts:
    """What a plan depends on of the GPU."""

    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class Transform:
    """The shape of `vocos_istft.cu` for a window and a GPU."""

    n_fft: int
    capability: tuple[int, int]

    @property
    def frames(self) -> int:
        """Frames that a thread block takes at a time."""
        narrow = self.capability >= (10, 0)
        return SMALL_FRAMES // (1 + narrow) // (1 + (self.n_fft >= LARGE_N_FFT))

    @property
    def threads(self) -> int:
        return max(WARP_LANES, self.frames * self.n_fft // 16)

    @property
    def resident(self) -> int:
        """Thread blocks that a multiprocessor should hold."""
        most = RESIDENT_THREADS_FROM_10 if self.capability >= (10, 0) else RESIDENT_THREADS
        return max(1, min(4, most // self.threads))

    @property
    def shared_bytes(self) -> int:
        """FRAMES * FRAME_BYTES of `kernels/vocos_fft.cuh`."""
        points = self.n_fft // 2
        return self.frames * (points + points // 8) * 8

    def span_hops(self, hops: int, multiprocessors: int) -> int:
        """Hops of a thread block where there are `hops` in all."""
        enough = 2 * self.resident * multiprocessors
        return next((count for count in SPAN_HOPS if hops >= count * enough), SPAN_HOPS[-1])


Planned = Iterator[Launch]


class Plan:
    """Plans the launches of one decoder on one GPU.

    weights: device addresses of `HostWeights.arrays`, matrices packed. product: turns a request into a launch.
    """

    def __init__(
        self,
        config: DecoderConfig,
        facts: Facts,
        weights: Mapping[str, int],
        product: Callable[[LinearRequest], Any],
    ) -> None:
        self.config, self.facts = config, facts
        self.transform = Transform(config.n_fft, facts.capability)
        self._weights, self._product = weights, product
        self._margins = margins(config)

    def whole(self, at: Mapping[str, int], rows: RowRange, tokens: int) -> Planned:
        """Launches for whole voices. at: device addresses of tables and activations; tokens: the most there are."""
        yield from self._embed(at, rows, tokens, stream=False)
        for index in range(self.config.num_blocks):
            yield self._convolution(at, index)
            yield from self._feed_forward(at, index, rows, at["residual"])
        yield from self._head(at, rows, at["residual"], stream=False)

    def streams(self, at: Mapping[str, int], rows: RowRange, tokens: int, slots: int) -> Planned:
        """Launches for the next states of streams, each in one of `slots` slots."""
        yield from self._embed(at, rows, tokens, stream=True)
        source, target = at["residual"], at["delayed"]
        for index in range(self.config.num_blocks):
            yield self._stream_convolution(at, index, source, target, slots)
            yield from self._feed_forward(at, index, rows, target)
            source, target = target, source
        yield from self._head(at, rows, source, stream=True)

    def _embed(self, at: Mapping[str, int], rows: RowRange, tokens: int, *, stream: bool) -> Planned:
        """States to the residual stream."""
        c = self.config
        depth = c.embed_kernel * c.input_size
        table = {"segments": at["segments"], "output": at["states"], "output_stride": padded(depth)}
        if c.embed_kernel == 1:
            yield self._rows("vocos_states", stream, TOKENS, tokens=at["tokens"], **table)
        else:
            lag = self._margins.embed if stream else 0
            yield self._rows("vocos_windows", stream, ROWS, table=at["rows"], lag=lag, **table)
        by_token = c.embed_kernel == 1
        yield self._product(
            self._request(
                "embed", End.STORE, RowRange(1, tokens) if by_token else rows, TOKENS if by_token else ROWS,
                input=at["states"], input_stride=padded(depth), features=c.dim, depth=depth,
                output=at["embedded"], output_stride=c.dim,
            )
        )  # fmt: skip
        yield self._rows(
            "vocos_embed", stream, ROWS, table=at["rows"], segments=at["segments"], input=at["embedded"],
            output=at["residual"], output_stride=c.dim, **self._norm("embed"),
        )  # fmt: skip

    def _convolution(self, at: Mapping[str, int], index: int) -> Launch:
        name = f"block{index}"
        return self._rows(
            "vocos_convolution", False, ROWS, table=at["rows"], input=at["residual"],
            taps=self._weights[f"{name}.taps"], bias=self._weights[f"{name}.bias"], output=at["normed"],
            output_stride=padded(self.config.dim), **self._norm(name),
        )  # fmt: skip

    def _stream_convolution(self, at: Mapping[str, int], index: int, source: int, target: int, slots: int) -> Launch:
        name, c = f"block{index}", self.config
        return self._rows(
            "vocos_convolution_stream", True, ROWS, table=at["rows"], segments=at["segments"], input=source,
            taps=self._weights[f"{name}.taps"], bias=self._weights[f"{name}.bias"], output=at["normed"],
            output_stride=padded(c.dim), delayed=target,
            history=at["history"] + index * 2 * slots * (c.block_kernel - 1) * c.dim * 4,
            lag=self._margins.embed + (index + 1) * self._margins.block, **self._norm(name),
        )  # fmt: skip

    def _feed_forward(self, at: Mapping[str, int], index: int, rows: RowRange, residual: int) -> Planned:
        """residual += contract(gelu(expand(normed)))"""
        c, name = self.config, f"block{index}"
        yield self._product(
            self._request(
                f"{name}.expand", End.GELU, rows, ROWS, input=at["normed"], input_stride=padded(c.dim),
                features=c.intermediate_size, depth=c.dim,
                output=at["expanded"], output_stride=padded(c.intermediate_size),
            )
        )  # fmt: skip
        yield self._product(
            self._request(
                f"{name}.contract", End.ADD, rows, ROWS, input=at["expanded"],
                input_stride=padded(c.intermediate_size), features=c.dim, depth=c.intermediate_size,
                output=residual, output_stride=c.dim, residual=residual, residual_stride=c.dim,
            )
        )  # fmt: skip

    def _head(self, at: Mapping[str, int], rows: RowRange, residual: int, *, stream: bool) -> Planned:
        """The residual stream to samples."""
        c = self.config
        yield self._rows(
            "vocos_norm",
            stream,
            ROWS,
            input=residual,
            output=at["normed"],
            output_stride=padded(c.dim),
            **self._norm("head"),
        )
        yield self._product(
            self._request(
                "head", End.STORE, rows, ROWS, input=at["normed"], input_stride=padded(c.dim), features=c.n_fft,
                depth=c.dim, output=at["spectrum"], output_stride=c.n_fft,
            )
        )  # fmt: skip
        yield self._istft(at)

    def _norm(self, name: str) -> dict[str, int]:
        return {"gain": self._weights[f"{name}.gain"], "shift": self._weights[f"{name}.shift"]}

    def _request(self, name: str, end: End, rows: RowRange, symbol: Symbol, **fields: int) -> LinearRequest:
        return LinearRequest(
            end=end, dtype="float16", capability=self.facts.capability, multiprocessors=self.facts.multiprocessors,
            rows=symbol, rows_min=rows.least, rows_max=rows.most, weights=self._weights[f"{name}.weight"],
            bias=self._weights[f"{name}.bias"], **fields,
        )  # fmt: skip

    def _rows(
        self,
        kernel: str,
        stream: bool,
        symbol: Symbol = ROWS,
        *,
        table: int = 0,
        tokens: int = 0,
        segments: int = 0,
        input: int = 0,
        taps: int = 0,
        bias: int = 0,
        gain: int = 0,
        shift: int = 0,
        output: int = 0,
        delayed: int = 0,
        history: int = 0,
        output_stride: int = 0,
        lag: int = 0,
    ) -> Launch:
        """A launch of one of the kernels of `vocos_rows.cu`; addresses are of the device, 0 what it does not use."""
        c = self.config
        rows = STREAM_ROWS if stream else WHOLE_ROWS
        warps = -(-c.dim // (4 * WARP_LANES))
        by_column = kernel in ("vocos_states", "vocos_windows")
        pointers = (table, tokens, segments, input, taps, bias, gain, shift, output, delayed, history)
        return Launch(
            source="vocos_rows.cu",
            kernel=kernel,
            defines=(
                ("DTYPE_FP16", 1), ("DIM", c.dim), ("INPUT_SIZE", c.input_size), ("EMBED_KERNEL", c.embed_kernel),
                ("BLOCK_KERNEL", c.block_kernel), ("ROWS", rows), ("STREAM", int(stream)),
            ),
            grid=(Blocks(symbol, rows), 1, 1),
            threads=STATE_THREADS if by_column else warps * WARP_LANES,
            shared_bytes=0 if by_column else -(-2 * warps * rows * 4 // 16) * 16,
            params=_ROWS_PARAMS.pack(*pointers, 0, c.dim, output_stride, lag, EPSILON, 0),
            fields=(Field(_ROWS_FIELD, symbol),),
        )  # fmt: skip

    def _istft(self, at: Mapping[str, int]) -> Launch:
        n_fft, shape = self.config.n_fft, self.transform
        pointers = (at["spectrum"], at["spans"], *(self._weights[name] for name in ("window", "inverse", "roots")),
                    at.get("open", 0), at["output"])  # fmt: skip
        return Launch(
            source="vocos_istft.cu",
            kernel="vocos_istft",
            defines=(("DTYPE_FP16", 1), ("N_FFT", n_fft), ("FRAMES", shape.frames), ("RESIDENT", shape.resident)),
            grid=(Blocks(SPANS, 1), 1, 1),
            threads=shape.threads,
            shared_bytes=shape.shared_bytes,
            params=_ISTFT_PARAMS.pack(*pointers, n_fft, 0),
        )


def variants(
    config: DecoderConfig,
    facts: Facts,
    streams: Sequence[RowRange] = (RowRange(1, 64),),
    whole: Sequence[RowRange] = (RowRange(1, 64),),
) -> Planned:
    """Every launch of a decoder, products included, with addresses of nothing; for compiling ahead.

    streams, whole: the numbers of rows that programs of streams and of whole voices are planned for.
    """
    from .linear import plan_linear

    capacity = Capacity.of_rows(64)
    names = table_specs(capacity) | activation_specs(config, capacity) | stream_specs(config, capacity, 1)
    plan = Plan(config, facts, _AnyAddress(), plan_linear)
    places = dict.fromkeys(names, ANY_ADDRESS)
    for rows in streams:
        yield from plan.streams(places, rows, rows.most, 1)
    for rows in whole:
        yield from plan.whole(places, rows, rows.most)


class _AnyAddress(dict[str, int]):
    """The same address for every name."""

    def __missing__(self, name: str) -> int:
        return ANY_ADDRESS
