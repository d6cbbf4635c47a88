"""Options of every HTTP service of this project, the socket it listens on, and its running."""

import importlib
import logging
import math
import re
import socket
from dataclasses import dataclass, field
from typing import ClassVar

from pagellm.stage import collector, hints
from pagellm.stage.command import Interrupted
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import StageConfig

__all__ = [
    "HttpOptions",
    "address",
    "answer_until_stopped",
    "listen",
    "needs_web",
    "warn_if_open",
]

log = logging.getLogger("pagellm")


@dataclass(frozen=True, kw_only=True)
class HttpOptions(StageConfig):
    """Options of what answers over HTTP."""

    ENVIRONMENT: ClassVar[str] = "PAGELLM_"
    SECRET: ClassVar[tuple[str, ...]] = ("api_key",)

    api_key: str = field(default="", repr=False)  # key that callers must send, as Authorization:
    # Bearer KEY. Give it as PAGELLM_API_KEY: other users of the machine can read command lines.
    # empty: no key
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # TCP port; 0 takes a free one and says which
    queue: int = 256  # requests that may wait; further ones are refused with 503
    timeout: float = 10.0  # seconds that a request may take to arrive, and again seconds that its
    # answer may take
    keep_alive: int = 75  # seconds an idle connection stays open; longer than clients and proxies
    # keep theirs (60 is usual), so that no request meets a connection that is just being closed
    max_body: int = 4 << 20  # largest request body, in bytes
    reload: float = 2.0  # seconds between two checks for newly trained weights; 0: never
    drain: int = 30  # seconds that open requests get to finish when the service is stopped
    log: str = "info"  # lowest level that is logged: debug, info, warning, error

    def __post_init__(self):
        super().__post_init__()
        if self.api_key and not re.fullmatch(r"[A-Za-z0-9._~+/=-]{16,512}", self.api_key):
            raise PageLLMError(  # the message does not repeat the key
                "api_key: want 16 to 512 letters, digits and . _ ~ + / = -, for example from\n"
                "  python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        check(
            self,
            port=(0 <= self.port < 65536, "0 to 65535"),
            queue=(self.queue > 0, "1 or more"),
            timeout=(0 < self.timeout < math.inf, "seconds above 0"),
            keep_alive=(self.keep_alive > 0, "1 or more"),
            max_body=(self.max_body > 0, "1 or more"),
            reload=(0 <= self.reload < math.inf, "0 or more"),
            drain=(self.drain >= 0, "0 or more"),
            log=(
                self.log in ("debug", "info", "warning", "error"),
                "debug, info, warning or error",
            ),
        )


def needs_web() -> None:
    """Raise PageLLMError, which says what to install, where the extra [serve] is missing."""
    try:
        for name in ("fastapi", "prometheus_client", "uvicorn"):
            importlib.import_module(name)
    except ImportError as error:
        raise PageLLMError(
            f"serving needs {error.name}, which is not installed\n"
            f"  Install it with: {hints.install('serve')}"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that listens. Raises PageLLMError if it cannot."""
    # asyncio switches Nagle's delay (40 ms an answer) off only where the protocol is named.
    sock = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise PageLLMError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); "
            "take another with --port, or --port 0 for any free one"
        ) from None
    return sock


def address(sock: socket.socket) -> str:
    """The address of a listening socket, as a browser takes it."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def warn_if_open(config: HttpOptions, sock: socket.socket) -> None:
    """Log a warning where others than this machine may ask, and no key is wanted."""
    host = sock.getsockname()[0]
    if not host.startswith("127.") and host != "::1" and not config.api_key:
        log.warning(
            "open", extra={"fields": {"why": f"listens on {host}, not loopback, and has no log-in"}}
        )


def answer_until_stopped(app, sock: socket.socket, config: HttpOptions) -> None:
    """Serve `app` until SIGINT or SIGTERM; requests under way are answered first."""
    import uvicorn

    from pagellm.serving.middleware import HttpWithTimeout

    http = type("Http", (HttpWithTimeout,), {"patience": config.timeout})
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=http,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=config.keep_alive,
            timeout_graceful_shutdown=config.drain,
            h11_max_incomplete_event_size=64 << 10,
        )
    )
    collector.settle()
    try:
        server.run(sockets=[sock])
    except (Interrupted, KeyboardInterrupt):
        pass  # uvicorn has answered what was under way, and raises the signal again: a clean end
