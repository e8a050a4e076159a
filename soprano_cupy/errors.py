"""Every error this package raises on purpose.

Each message is one line that says what is wrong and what to do about it; the command line prints that
line and exits with code 1 (2 for `ParameterError`). Anything else that escapes is a bug.
"""


class SopranoError(Exception):
    """Base of every error raised on purpose."""


class ParameterError(SopranoError, ValueError):
    """An argument is out of range or of the wrong type; the message names it and its value."""


class TextError(SopranoError, ValueError):
    """The text holds nothing that can be spoken, or is not text."""


class CheckpointError(SopranoError):
    """A checkpoint's folder, file, tensor or configuration is missing, damaged or unsupported."""


class UnsafePickleError(CheckpointError):
    """A `decoder.pth` asks for something other than tensors; nothing in it was run."""


class DownloadError(SopranoError):
    """A checkpoint could not be fetched from the hub, or what arrived does not match its hash."""


class DeviceError(SopranoError):
    """The device asked for does not exist or cannot be used.

    sticky: the GPU context is lost, and nothing works on the GPU any more in this process.
    """

    sticky = False


class AttentionUnavailable(SopranoError):
    """The flash-attention kernels were asked for explicitly and cannot serve the call."""


class Busy(SopranoError):
    """Too much is waiting to be spoken already; try again later."""


class DeadlineExceeded(SopranoError, TimeoutError):
    """A request was not spoken in the time it was given."""


class Closed(SopranoError):
    """The voice was closed before it had spoken, or before it was asked."""


class OutputError(SopranoError):
    """Audio could not be written: folder missing, disk full, no permission, no speakers."""
