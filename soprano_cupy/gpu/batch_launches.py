"""What a batch runs, as launches on its buffers: prompts, decode steps, and the ends of both."""

from __future__ import annotations

from .arena import Buffers
from .batch_sizes import BatchSizes, prompt_capacity
from .forward import Activations, Cache, Forward, PromptSizes, PromptTables, SamplePlaces
from .launch import Launch, RowRange, row_class

PROMPT_CLASSES = (16, 64, 256, 1024)  # most rows of a prefill program; beyond, what the arena holds


class BatchLaunches:
    """Plans the launches of a batch on one GPU. tokens, progress, workspace: addresses outside of `buffers`."""

    def __init__(
        self, forward: Forward, sizes: BatchSizes, buffers: Buffers, *, tokens: int, progress: int, workspace: int
    ) -> None:
        self._forward, self._sizes, self._pointer = forward, sizes, buffers.pointer
        self._tokens, self._progress, self._workspace = tokens, progress, workspace
        self._prompts, self._steps = Activations.of(buffers, "prompt."), Activations.of(buffers, "step.")
        self._cache = Cache(self._pointer("keys"), self._pointer("values"), sizes.slots, sizes.capacity)

    def prompt_class(self, rows: int) -> RowRange:
        """The numbers of rows that one prefill program serves, among which `rows` is."""
        return row_class(rows, prompt_capacity(self._sizes), PROMPT_CLASSES)

    def prompt(self, rows: RowRange, sequences: int, first: int) -> list[Launch]:
        """All layers for so many rows of prompts, then the last row of each sequence to the decode step's buffers."""
        names = ("ids", "row_slots", "row_positions", "starts", "lengths", "queries")
        tables = PromptTables(**{name: self._pointer(name) for name in names})
        sizes = PromptSizes(sequences, first, -(-rows.most // sequences))
        layers = self._forward.prompt_layers(self._prompts, self._cache, tables, rows, sizes)
        return [*layers, self._forward.gather(self._prompts, self._steps, tables.starts, sequences, first)]

    def layers(self, rows: int) -> list[Launch]:
        """All layers for one new token in each row."""
        slots, slot_of_row = self._pointer("slots"), self._pointer("slot_of_row")
        return list(self._forward.decode_layers(self._steps, self._cache, rows, slots, slot_of_row, self._workspace))

    def tail(self, rows: int) -> list[Launch]:
        """From the residual stream of each row to its next token."""
        pointer = self._pointer
        places = SamplePlaces(
            slots=pointer("slots"), seen=pointer("seen"), slot_of_row=pointer("slot_of_row"), logits=pointer("logits"),
            states=pointer("states"), most_tokens=self._sizes.tokens, tokens=self._tokens, progress=self._progress,
        )  # fmt: skip
        return [self._forward.head(self._steps, rows, places.logits), self._forward.sample(self._steps, rows, places)]

    def step(self, rows: int) -> list[Launch]:
        """One token for each row."""
        return [*self.layers(rows), *self.tail(rows)]

    def shrink(self, rows: int) -> list[Launch]:
        """The rows that `starts` names together, in the prompts' buffers."""
        return [self._forward.gather(self._steps, self._prompts, self._pointer("starts"), rows, 0)]

    def first_call(self) -> list[Launch]:
        """What a call for one voice runs: its prompt, of a usual length, the first token, the next ones."""
        prompts = [launch for rows in self.usual_prompts() for launch in self.prompt(self.prompt_class(rows), 1, 0)]
        return [*prompts, *self.step(1)]

    def usual_prompts(self) -> list[int]:
        """The most rows of each prefill program that one voice is likely to need."""
        limit = prompt_capacity(self._sizes)
        return [rows for rows in PROMPT_CLASSES[:-1] if rows < limit]
