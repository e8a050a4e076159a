"""Whole voices on the GPU: their activations, their programs, and the tables that go with each run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..config import DecoderConfig
from ..errors import DeviceError
from . import program, vocos_plan
from .arena import Arena
from .launch import RowRange, row_class
from .vocos_plan import Capacity, Plan
from .vocos_tables import Piece
from .vocos_upload import HostTables

logger = logging.getLogger(__name__)

# Most frames of a program: a product's kernel is chosen for a range of rows.
ROW_CLASSES = (16, 64, 256, 1024, 3072)
LEAST_ROWS = 1024
TABLES_UNDER_WAY = 2  # slices whose tables the host has written ahead


class Slices:
    """Runs pieces of whole voices, up to `rows` frames at a time; nothing is allocated while it does.

    classes: the most frames of each program but the largest. None, and a voice has the same bits whatever is beside it.
    """

    def __init__(
        self, config: DecoderConfig, plan: Plan, rows: int, device: int, classes: Sequence[int] = ROW_CLASSES
    ) -> None:
        import cupy

        self.rows, self._plan, self._device, self._classes = rows, plan, device, classes
        self._capacity = Capacity.of_rows(rows)
        tables = vocos_plan.table_specs(self._capacity)
        specs = tables | vocos_plan.activation_specs(config, self._capacity)
        self._arena = Arena(specs)
        self._places = {name: self._arena.pointer(name) for name in specs}
        self._tables = [HostTables(tables, self._places) for _ in range(TABLES_UNDER_WAY)]
        self._programs: dict[int, program.Program] = {}
        self._turn = 0
        cupy.cuda.runtime.deviceSynchronize()  # the arena is zeroed: our own streams would not wait for that
        logger.info("decoder: %d frames at a time, %.0f MB of activations", rows, self.nbytes / 1e6)

    @property
    def nbytes(self) -> int:
        """GPU memory of all activations and tables."""
        return self._arena.nbytes

    def run(self, pieces: Sequence[Piece], stream: int, *, samples: int = 0, pcm: int = 0) -> None:
        """Queue a slice. samples, pcm: where the hops go as float32 and as 16-bit integers; 0: nowhere."""
        hops = sum([piece.hops for piece in pieces])
        hops_of_a_block = self._plan.transform.span_hops(hops, self._plan.facts.multiprocessors)
        self._turn = (self._turn + 1) % len(self._tables)
        tables = self._tables[self._turn]
        counts = tables.send(pieces, hops_of_a_block, stream, samples=samples, pcm=pcm)
        self._program(row_class(counts[0], self.rows, self._classes)).run(stream, *counts)

    def prepare(self) -> None:
        """Build every program now, so that no run waits for it."""
        for rows in (*(end for end in self._classes if end < self.rows), self.rows):
            self._program(row_class(rows, self.rows, self._classes))

    def _program(self, rows: RowRange) -> program.Program:
        if rows.most not in self._programs:
            launches = list(self._plan.whole(self._places, rows, min(self._capacity.tokens, rows.most)))
            self._programs[rows.most] = program.load_program(launches, self._device)
        return self._programs[rows.most]


def make_slices(
    config: DecoderConfig, plan: Plan, rows: int, device: int, classes: Sequence[int] = ROW_CLASSES
) -> Slices:
    """`Slices` of `rows` frames, or of as many as there is memory for; `DeviceError` where there is too little."""
    import cupy

    wanted = rows
    while True:
        try:
            return Slices(config, plan, rows, device, classes)
        except MemoryError as error:
            cupy.get_default_memory_pool().free_all_blocks()
            if rows <= LEAST_ROWS:
                raise DeviceError(
                    f"the GPU has no memory left for the decoder's activations of {rows} frames; close other programs "
                    "that use it"
                ) from error
            rows = max(LEAST_ROWS, rows // 2)
            logger.warning("no GPU memory for %d frames at a time; trying %d, which is slower", wanted, rows)
