"""`SopranoTTS`: text in, samples out."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import settings
from .audio import check_writable, make_folder, write_wav
from .checkpoint import resolve_model
from .config import TOKEN_SAMPLES, ModelConfig, read_json
from .crowd.crowd import Crowd
from .crowd.job import Wish
from .crowd.plan import CrowdPlan, open_crowd
from .device import resolve_device
from .engine import Engine, Timings
from .errors import CheckpointError, Closed, ParameterError, TextError
from .generation import Request
from .joiner import Joiner
from .qwen3 import Qwen3
from .reader import Reader
from .sampling import SamplingParams
from .text.sentences import MAX_LENGTH
from .tokenizer import Tokenizer
from .vocos import VocosDecoder

if TYPE_CHECKING:
    from .crowd.processes import ProcessCrowd
    from .crowd.speech import Speech

logger = logging.getLogger(__name__)

MAX_RETRIES = 100
MIN_TEXT_LENGTH = 30  # characters; cut finer than this, no model speaks well


class SopranoTTS:
    """Speaks text with a Soprano checkpoint.

    model: a checkpoint folder, a hub id such as "ekwek/Soprano-1.1-80M", "mini" for the bundled voice, or None for
    the best one present. device: auto, cpu, cuda or cuda:N. attention: auto, flash or standard. dtype: auto,
    float32, bfloat16, float16, int8 or float64. Where an argument is left at auto (or None), the environment's
    SOPRANO_MODEL, SOPRANO_DEVICE, SOPRANO_ATTENTION and SOPRANO_DTYPE decide.

    For `submit` alone: max_batch, sentences spoken at once on a device (by default 8 on the CPU, 256 on a GPU, at most
    2,048); max_memory, bytes that their buffers may take of a GPU; max_queue, requests that may wait; devices, such as
    ("cuda:0", "cuda:1"), all that share the work, several GPUs in a process each (by default `device` alone);
    invariant, on a GPU, the same bits whatever is spoken beside, at some cost to small crowds (the CPU engine's never
    depend on that).

    `backend`, `cache_size_mb`, `decoder_batch_size` and `model_path` are accepted for programs written for the
    PyTorch package; only `model_path` has an effect: it is `model` by another name.

    Attributes: `model` (name, folder, reason), `device`, `engine`, and `timings` of the last call, which fill
    up while it runs.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        device: str = "auto",
        attention: str = "auto",
        dtype: str = "auto",
        *,
        max_batch: int | None = None,
        max_memory: int | None = None,
        max_queue: int = 1024,
        devices: Sequence[str] | None = None,
        invariant: bool = False,
        backend: str | None = None,
        cache_size_mb: int | None = None,
        decoder_batch_size: int | None = None,
        model_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if model is not None and model_path is not None:
            raise ParameterError("model and model_path name the same thing; give only one of them")
        for name, value in (
            ("backend", backend),
            ("cache_size_mb", cache_size_mb),
            ("decoder_batch_size", decoder_batch_size),
        ):
            if value is not None:
                logger.info("%s=%r has no effect here: soprano_cupy plans this itself", name, value)
        self.device, self.device_reason = resolve_device(settings.device(device))
        self.model = resolve_model(model if model is not None else model_path)
        logger.info("model %s: %s", self.model.name, self.model.reason)
        folder = self.model.folder
        tokenizer = Tokenizer.load(folder)
        kept_in = settings.dtype(dtype)
        attending = settings.attention(attention)
        self._crowd_plan = CrowdPlan(
            folder, kept_in, attending, max_batch, max_memory, max_queue, devices, bool(invariant)
        )
        language_model, decoder = load_models(folder, self.device, kept_in, attending)
        tokenizer.check(language_model.config.vocab_size)
        if decoder.config.input_size != language_model.config.hidden_size:
            raise CheckpointError(
                f"{folder}: the decoder reads states of {decoder.config.input_size} values and the language model "
                f"makes {language_model.config.hidden_size}; the two files belong to different checkpoints"
            )
        self.engine = Engine(language_model.runner, decoder.runner)
        self._reader = Reader(tokenizer, max_text_length(folder, language_model.config))
        self.timings = Timings()
        self._crowd: Crowd | ProcessCrowd | None = None
        self._crowd_lock, self._closed = threading.Lock(), False

    def infer(
        self,
        text: str,
        out_path: str | os.PathLike[str] | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        retries: int = 0,
        seed: int | None = None,
    ) -> np.ndarray:
        """Speak a text of any length; float32 samples (n,) at 32 kHz, written to `out_path` as 16-bit WAV if given.

        The sampling parameters are those of `SamplingParams`. retries: a sentence in which the voice gets stuck is
        made again up to so many times. Raises `TextError` for text with nothing to speak, `ParameterError` and
        `OutputError`; a file is written whole or not at all.
        """
        if out_path is not None:
            check_writable(out_path)
        params = SamplingParams(temperature, top_p, repetition_penalty, seed=seed)
        audio = self._speak([text], params, retries)[0]
        if out_path is not None:
            write_wav(out_path, audio)
        return audio

    def infer_batch(
        self,
        texts: Sequence[str],
        out_dir: str | os.PathLike[str] | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        retries: int = 0,
        seed: int | None = None,
    ) -> list[np.ndarray]:
        """Speak several texts together; their samples in order, each as `infer` gives them.

        With `out_dir`, which is created if its parent exists, text i is written to `out_dir/i.wav`.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ParameterError(f"texts = {texts!r:.60} must be a list of strings; use infer for one text")
        folder = make_folder(out_dir) if out_dir is not None else None
        params = SamplingParams(temperature, top_p, repetition_penalty, seed=seed)
        audio = self._speak(texts, params, retries)
        if folder is not None:
            for index, samples in enumerate(audio):
                write_wav(folder / f"{index}.wav", samples)
        return audio

    def infer_stream(
        self,
        text: str,
        chunk_size: int = 1,
        *,
        temperature: float = 0.0,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        retries: int = 0,
        seed: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Speak a text as it is made: chunks of `chunk_size` tokens (64 ms each), the last of a sentence shorter.

        The chunks, joined, are what `infer` returns (on a GPU, where one voice and several are computed in different
        orders, but for tokens that are nearly equally likely). Arguments are checked at the call, before the first
        chunk.
        With `retries`, a sentence is heard only once it is known not to be stuck.
        """
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, np.integer)) or chunk_size < 1:
            raise ParameterError(f"chunk_size = {chunk_size!r} must be a whole number of tokens, 1 or more")
        begin = time.perf_counter()
        params = SamplingParams(temperature, top_p, repetition_penalty, seed=seed).seeded()
        requests = self._reader.read(text, params)
        timings = Timings(text_s=time.perf_counter() - begin)
        return self._stream(requests, int(chunk_size) * TOKEN_SAMPLES, _check_retries(retries), timings, begin)

    def submit(
        self,
        text: str,
        *,
        stream: bool = False,
        dtype: Any = np.float32,
        deadline_s: float | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        retries: int = 0,
        seed: int | None = None,
    ) -> Speech:
        """Speak a text together with all others that are submitted; returns at once.

        The `Speech` is a future (`result`, `cancel`, `add_done_callback`, `await`) and an iterator (`for`, `async for`)
        of chunks: with `stream` pieces as early as they can be heard, else whole sentences. Any number of threads and
        event loops may submit. dtype: float32, or int16 for what stands in a WAV file. deadline_s: seconds after which
        it fails with `DeadlineExceeded` unless it is done. Raises what `infer` raises; `Busy` where `max_queue`
        requests wait already; `Closed`; `DeviceError` where no device works any more.
        """
        params = SamplingParams(temperature, top_p, repetition_penalty, seed=seed).seeded()
        wish = Wish(bool(stream), _is_pcm(dtype), _check_retries(retries), _check_deadline(deadline_s))
        crowd = self._opened()
        if isinstance(crowd, Crowd):
            return crowd.submit(self._reader.read(text, params), wish)
        return crowd.submit_text(text, params, wish)  # which prepares it where it is spoken

    def close(self, drain_s: float = 0.0) -> None:
        """Stop what was submitted, after waiting up to `drain_s` seconds for it; nothing can be submitted any more."""
        with self._crowd_lock:
            self._closed = True
            crowd = self._crowd
        if crowd is not None:
            crowd.close(drain_s)

    def __enter__(self) -> SopranoTTS:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> Crowd | ProcessCrowd:
        """What speaks submitted texts; its threads live until `close`, or until nobody has this object any more."""
        with self._crowd_lock:
            if self._closed:
                raise Closed("the voice has been closed; make another one")
            if self._crowd is None:
                self._crowd = open_crowd(self._crowd_plan, self.engine, self._reader.max_length)
                weakref.finalize(self, self._crowd.close)
            return self._crowd

    def _stream(
        self, requests: list[Request], chunk_samples: int, retries: int, timings: Timings, begin: float
    ) -> Iterator[np.ndarray]:
        self.timings = timings
        for request in requests:
            held = np.empty(0, np.float32)
            with closing(self.engine.stream(request, retries, timings)) as pieces:
                for piece in pieces:
                    held = np.concatenate((held, piece))
                    while len(held) >= chunk_samples:
                        timings.first_audio_s = timings.first_audio_s or time.perf_counter() - begin
                        yield held[:chunk_samples]
                        held = held[chunk_samples:]
            if len(held):
                timings.first_audio_s = timings.first_audio_s or time.perf_counter() - begin
                yield held

    def _speak(self, texts: Sequence[str], params: SamplingParams, retries: int) -> list[np.ndarray]:
        retries = _check_retries(retries)
        begin = time.perf_counter()
        params = params.seeded()
        per_text: list[list[Request]] = []
        for index, read in enumerate(self._reader.read_many(texts, [params] * len(texts))):
            if isinstance(read, TextError):
                raise TextError(f"texts[{index}]: {read}" if len(texts) > 1 else str(read))
            if isinstance(read, Exception):
                raise read
            per_text.append(read)
        self.timings = timings = Timings(text_s=time.perf_counter() - begin)
        with Joiner([len(requests) for requests in per_text]) as joiner:
            self.engine.speak([r for requests in per_text for r in requests], retries, timings, joiner.take)
            return joiner.results()


def load_models(folder: Path, device: str, dtype: str, attention: str) -> tuple[Qwen3, VocosDecoder]:
    """Both networks of a checkpoint; for a GPU one file is read beside the other, which takes more memory."""
    if device == "cpu":
        return Qwen3.load(folder, device, dtype, attention), VocosDecoder.load(folder, device, dtype)
    with ThreadPoolExecutor(1) as beside:
        decoder = beside.submit(VocosDecoder.load, folder, device, dtype)
        return Qwen3.load(folder, device, dtype, attention), decoder.result()


def max_text_length(folder: Path, config: ModelConfig) -> int:
    """Characters that the model speaks well in one sentence: longer ones are cut.

    A checkpoint may say so itself (`max_text_length` in generation_config.json). A character is at most one token,
    and half of the positions are kept for the sound.
    """
    path = folder / "generation_config.json"
    wanted = read_json(path).get("max_text_length", MAX_LENGTH) if path.is_file() else MAX_LENGTH
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not MIN_TEXT_LENGTH <= wanted <= MAX_LENGTH:
        raise CheckpointError(
            f"{path}: max_text_length = {wanted!r} must be a whole number from {MIN_TEXT_LENGTH} to {MAX_LENGTH}"
        )
    return max(MIN_TEXT_LENGTH, min(wanted, config.max_positions // 2))


def _is_pcm(dtype: Any) -> bool:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in ("float32", "int16"):
        raise ParameterError(f"dtype = {dtype!r} of samples is not available; use float32 or int16")
    return bool(name == "int16")


def _check_deadline(seconds: Any) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.floating, np.integer)) or not seconds > 0:
        raise ParameterError(f"deadline_s = {seconds!r} must be a number of seconds above 0")
    return float(seconds)


def _check_retries(retries: Any) -> int:
    if isinstance(retries, bool) or not isinstance(retries, (int, np.integer)) or not 0 <= retries <= MAX_RETRIES:
        raise ParameterError(f"retries = {retries!r} must be a whole number from 0 to {MAX_RETRIES}")
    return int(retries)
