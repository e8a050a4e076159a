"""`soprano-cupy serve`: an HTTP server for one voice; see speech_api.py for what it answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError, SopranoError
from .console import Terminated, say
from .options import add_devices_option, add_voice_options, named_devices, open_voice

if TYPE_CHECKING:
    from .speech_api import SpeechServer

DRAIN_SECONDS = 5.0

EPILOG = """\
example:
  curl http://127.0.0.1:8000/v1/audio/speech -H "Content-Type: application/json" \\
       -d '{"input": "Hello."}' -o hello.wav
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer HTTP requests in the shape of OpenAI's speech API",
        description="Answer POST /v1/audio/speech and GET /health until Ctrl-C.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (8000)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is used, and log each request")
    add_voice_options(parser)
    add_devices_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, which are the ordinary ends: exit code 0."""
    if not 0 <= options.port <= 65535:
        raise ParameterError(f"--port {options.port} must be from 0 to 65535")
    from ..crowd.crowd import SWITCH_S

    devices = named_devices(options)
    with open_voice(options, devices) as tts:
        sys.setswitchinterval(SWITCH_S)
        if devices is not None:
            tts._opened()  # takes a while for each, and may fail: rather now than when somebody asks
        server = _listen(options.host, options.port, tts, devices or [tts.device])
        try:
            host = f"[{options.host}]" if ":" in options.host else options.host
            say(f"listening on http://{host}:{server.server_port}; Ctrl-C stops")
            server.serve_forever()
        except (KeyboardInterrupt, Terminated):
            say("stopping")
        finally:
            server.server_close()
            if not server.drain(DRAIN_SECONDS):
                say("a request was cut off")
    return 0


def _listen(host: str, port: int, tts: Any, devices: Sequence[str]) -> SpeechServer:
    from .speech_api import SpeechServer

    try:
        return SpeechServer(host, port, tts, devices)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise SopranoError(f"cannot listen on {host} port {port}: {why}; choose another --host or --port") from error
