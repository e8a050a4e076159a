from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ..crowd.device import News
from ..generation import Request

PARTS: int

class Piece:
    states: int
    ring: int
    frames: int
    first_frame: int
    end_frame: int
    first_token: int
    end_token: int
    first_hop: int
    end_hop: int
    output: int
    lag: int
    history: int
    resumes: bool
    def __init__(
        self,
        *,
        states: int,
        ring: int,
        frames: int,
        first_frame: int,
        end_frame: int,
        first_token: int,
        end_token: int,
        first_hop: int,
        end_hop: int,
        output: int,
        lag: int = 0,
        history: int = -1,
        resumes: bool = False,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def hops(self) -> int: ...

def pieces_between(
    first_hop: int,
    end_hop: int,
    most_hops: int,
    *,
    states: int,
    ring: int,
    known: int,
    frames: int,
    output: int,
    margin: int,
) -> list[Piece]: ...

class SliceTables:
    def __init__(
        self, output: np.ndarray, segments: np.ndarray, tokens: np.ndarray, rows: np.ndarray, spans: np.ndarray
    ) -> None: ...
    def write(
        self, pieces: Sequence[Piece], hops_of_a_block: int, *, samples: int = 0, pcm: int = 0
    ) -> tuple[int, int, int]: ...

def write_prompts(
    tables: Mapping[str, np.ndarray],
    prompts: Sequence[np.ndarray],
    slots: Sequence[int],
    padded: Callable[[int], int],
) -> tuple[int, int]: ...
def write_seen_masks(seen: np.ndarray, prompts: Sequence[np.ndarray]) -> None: ...
def write_slot_states(
    records: np.ndarray, requests: Sequence[Request], give_up: Sequence[bool], capacity: int, tokens: int = ...
) -> None: ...
def write_column(column: np.ndarray, values: Sequence[int], end: int, nothing: int) -> None: ...
def joined(parts: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]: ...
def watched_slots(words: np.ndarray, watched: array[int]) -> list[News]: ...
