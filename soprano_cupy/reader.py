"""Texts to requests: normalised, cut into sentences, tokenised; one at a time or many together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ParameterError, TextError
from .generation import Request
from .sampling import SamplingParams
from .text import build_prompts
from .tokenizer import Tokenizer


class Reader:
    """Reads texts for one voice, in any thread. max_length: characters that it speaks well in one sentence."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def read(self, text: Any, params: SamplingParams) -> list[Request]:
        """One request for each sentence; sentence i draws from random stream i.

        `ParameterError` for what is no string, `TextError` where there is nothing to speak.
        """
        return _requests(self.tokenizer.encode_batch(self._prompts(text)), params)

    def read_many(self, texts: Sequence[Any], params: Sequence[SamplingParams]) -> list[list[Request] | Exception]:
        """What `read` returns or raises for each text, tokenised together: the library's threads take a share each."""
        prompts: list[list[str] | Exception] = []
        for text in texts:
            try:
                prompts.append(self._prompts(text))
            except Exception as error:  # one text's trouble is not the others'
                prompts.append(error)
        try:
            every = [prompt for some in prompts if isinstance(some, list) for prompt in some]
            encoded = iter(self.tokenizer.encode_batch(every))
        except TextError:
            return [self._outcome(text, one) for text, one in zip(texts, params, strict=True)]
        return [
            some if isinstance(some, Exception) else _requests([next(encoded) for _ in some], one)
            for some, one in zip(prompts, params, strict=True)
        ]

    def _outcome(self, text: Any, params: SamplingParams) -> list[Request] | Exception:
        try:
            return self.read(text, params)
        except Exception as error:
            return error

    def _prompts(self, text: Any) -> list[str]:
        if not isinstance(text, str):
            raise ParameterError(f"text must be a string, not {type(text).__name__}")
        prompts = build_prompts(text, self.max_length)
        if not prompts:
            raise TextError(f"nothing to speak in {text!r:.60}; give at least one word or number")
        return prompts


def _requests(encoded: Sequence[Any], params: SamplingParams) -> list[Request]:
    return [Request(ids, params, index) for index, ids in enumerate(encoded)]
