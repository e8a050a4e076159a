"""From a checkpoint and what was asked for to a crowd: which devices, and what runs on each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device import cuda_index, resolve_devices
from ..engine import Engine
from ..errors import ParameterError
from ..qwen3 import Qwen3
from ..vocos import VocosDecoder
from .crowd import Crowd, Maker
from .device import Device
from .runner_device import RunnerDevice

if TYPE_CHECKING:
    from .processes import ProcessCrowd
    from .processes_station import Post

logger = logging.getLogger(__name__)

OPENER = "soprano_cupy.crowd.processes_worker:SopranoVoice"
MOST_BATCH = 2048  # sentences at once on one device
SPARE_TOKENS = 16  # of a prompt beside its characters: the marks around them


@dataclass(frozen=True)
class CrowdPlan:
    """What was asked for; `ParameterError` where it is no sense. The fields are `SopranoTTS`'s."""

    folder: Path
    dtype: str
    attention: str
    max_batch: int | None
    max_memory: int | None
    max_queue: int
    devices: Sequence[str] | None
    invariant: bool = False

    def __post_init__(self) -> None:
        _whole("max_batch", self.max_batch, MOST_BATCH)
        _whole("max_memory", self.max_memory, 1 << 62)
        _whole("max_queue", self.max_queue, 1 << 31)
        if self.devices is not None and (isinstance(self.devices, str) or not self.devices):
            raise ParameterError(f"devices = {self.devices!r} must be a list such as ['cuda:0', 'cuda:1']")


def open_crowd(plan: CrowdPlan, engine: Engine, max_text_length: int) -> Crowd | ProcessCrowd:
    """A crowd on the engine's device, or on all of `plan.devices`, for texts cut to so many characters.

    Several GPUs get a process each.
    """
    names = device_names(plan, engine.language_model.device)
    if wants_processes(names):
        from .processes import ProcessCrowd

        logger.info("%s: a process for each", ", ".join(names))
        return ProcessCrowd([post(plan, name) for name in names], max_queue=plan.max_queue)

    def maker(name: str) -> Maker:
        loaded: list[Engine] = [engine] if name == engine.language_model.device else []

        def make() -> Device:
            if not loaded:
                loaded.append(_load(plan, name))
            return make_device(loaded[0], plan, max_text_length + SPARE_TOKENS)

        return make

    return Crowd([maker(name) for name in names], max_queue=plan.max_queue)


def device_names(plan: CrowdPlan, own: str) -> list[str]:
    """The devices that are to share the work: `plan.devices`, or the engine's own."""
    if plan.devices is None:
        return [own]
    return resolve_devices(plan.devices, f"devices = {list(plan.devices)!r}")


def wants_processes(names: Sequence[str]) -> bool:
    """Whether these devices get a process each: one Python process keeps one GPU busy at best."""
    return sum(name.startswith("cuda:") for name in names) > 1


def post(plan: CrowdPlan, name: str) -> Post:
    """What a process on one device opens."""
    from .processes_station import Post

    options = {
        "model": plan.folder, "device": "cuda:0" if name.startswith("cuda:") else name,
        "attention": plan.attention, "dtype": plan.dtype,
        "max_batch": plan.max_batch, "max_memory": plan.max_memory, "max_queue": 1 << 30, "invariant": plan.invariant,
    }  # fmt: skip
    return Post(name, OPENER, options, only_this(name))


def only_this(name: str) -> dict[str, str]:
    """The environment of a process that is to see one GPU, as cuda:0, and to touch no other."""
    if not name.startswith("cuda:"):
        return {}
    index = cuda_index(name)
    seen = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return {"CUDA_VISIBLE_DEVICES": seen[index] if index < len(seen) else str(index)}


def make_device(engine: Engine, plan: CrowdPlan, most_prompt: int) -> Device:
    """The device that goes with an engine's runners."""
    if type(engine.language_model).__name__ == "GpuLanguageModel" and type(engine.decoder).__name__ == "GpuDecoder":
        from ..gpu.crowd_device import open_device

        gpu_language_model: Any = engine.language_model
        gpu_decoder: Any = engine.decoder
        device: Device = open_device(
            gpu_language_model, gpu_decoder, most_prompt, plan.max_batch, plan.max_memory, invariant=plan.invariant
        )
        return device
    return RunnerDevice(
        engine.language_model, engine.decoder, plan.max_batch or engine.language_model.batch, most_prompt
    )


def _load(plan: CrowdPlan, device: str) -> Engine:
    """A further device's own runners."""
    language_model = Qwen3.load(plan.folder, device, plan.dtype, plan.attention)
    return Engine(language_model.runner, VocosDecoder.load(plan.folder, device, plan.dtype).runner)


def _whole(name: str, value: Any, most: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
        raise ParameterError(f"{name} = {value!r} must be a whole number from 1 to {most}")
