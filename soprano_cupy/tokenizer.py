"""Prompts to token ids, with the checkpoint's own `tokenizer.json` (byte-pair encoding)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import CheckpointError, TextError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
MARKERS = ("[STOP]", "[TEXT]", "[START]")  # what every prompt is made with


class Tokenizer:
    """Encodes prompts such as `[STOP][TEXT]hello.[START]`; nothing is padded or cut off.

    The reference cuts at 512 tokens, [START] included, and the rest of the sentence is lost in silence. Here
    the caller sees every id and decides.
    """

    def __init__(self, encoder: tokenizers.Tokenizer, path: Path) -> None:
        self.path = path
        self._encoder = encoder
        self._encoder.no_padding()
        self._encoder.no_truncation()
        missing = [marker for marker in MARKERS if encoder.token_to_id(marker) is None]
        if missing:
            raise CheckpointError(f"{path} lacks {', '.join(missing)}; is it a Soprano tokenizer?")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.json` of a checkpoint folder; `CheckpointError` when it cannot be used."""
        import tokenizers

        path = Path(folder) / TOKENIZER
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror or error}; download the checkpoint again"
            ) from error
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{path} is not valid UTF-8 ({error.reason}); download the checkpoint again"
            ) from error
        try:
            encoder = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:
            if not _is_library_failure(error):
                raise
            raise CheckpointError(f"{path} is not a valid tokenizer ({_one_line(error)}); download it again") from error
        return cls(encoder, path)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can give."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values()) + 1

    def check(self, vocab_size: int) -> None:
        """`CheckpointError` when the model has fewer embeddings than this tokenizer has ids."""
        if self.vocab_size > vocab_size:
            raise CheckpointError(
                f"{self.path} has ids up to {self.vocab_size - 1}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; the files belong to different checkpoints"
            )

    def encode(self, prompt: str) -> np.ndarray:
        """The ids of one prompt: int32 (tokens,). Characters outside the vocabulary become [UNK]."""
        return self.encode_batch([prompt])[0]

    def encode_batch(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each prompt, as `encode` gives them, in one call of the library.

        The library lets other Python threads run only while it encodes a batch, be it of one, and spreads a larger one
        over its own threads. Where in the text a token stands is not asked for, which saves a third of the time.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TextError(f"a prompt must be text, not {type(prompt).__name__}")
        try:
            encodings = self._encoder.encode_batch_fast(list(prompts))
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        except BaseException as error:
            if not _is_library_failure(error):
                raise
            raise TextError(f"the text cannot be tokenised ({_one_line(error)}); remove unusual characters") from error


def _is_library_failure(error: BaseException) -> bool:
    """Errors of the Rust library; its panics are not even `Exception`s."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
