"""Watch over the requests that huggingface_hub makes for a push: how long they wait, what is repeated, what is logged, and when to stop.

Knows the client's hooks and its extension `trace` (httpx, "Extensions"), and nothing of what is sent.
"""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, get_session, hf_raise_for_status

if TYPE_CHECKING:
    from httpx import Request, Response

STALL = 300.0  # seconds without a byte or an answer, after which a connection counts as broken
REPEATS = 5  # of requests that fail with a server's error, before each such answer ends the attempt
LOGGERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")  # whose lines hold signed links


class Stopped(Exception):
    """What a request ends with after the user has stopped the push."""


class Line:
    """The connections of one push, over all attempts, which can be cut. failures: server errors since something arrived."""

    def __init__(self) -> None:
        self.stopped, self.failures = False, 0
        self.sockets: list[socket.socket] = []

    def stop(self) -> None:
        """Cut every connection, and let no request begin."""
        self.stopped = True
        for one in list(self.sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise Stopped if it was stopped."""
        if self.stopped:
            raise Stopped

    @contextmanager
    def watch(self, arrived: Callable[[], None]) -> Iterator[None]:
        """Let no request of huggingface_hub wait without end, nor be repeated for ever, or where the answer says how long to wait, or no.

        Args:
            arrived: called when a large file has arrived.
        """
        client = get_session()
        hooks, timeout = client.event_hooks, client.timeout

        def begin(request: Request) -> None:
            self.check()
            request.extensions = {**request.extensions, "trace": self._trace}

        def judge(response: Response) -> None:
            if response.status_code < 300 and response.request.url.path.endswith("/verify"):
                self.failures = 0
                arrived()
            if self._ends(response):
                response.read()
                hf_raise_for_status(response)

        client.event_hooks = {**hooks, "request": [*hooks["request"], begin], "response": [*hooks["response"], judge]}  # type: ignore[dict-item]
        client.timeout = STALL
        try:
            yield
        finally:
            client.event_hooks, client.timeout = hooks, timeout

    def _ends(self, response: Response) -> bool:
        """Whether an answer ends the attempt; huggingface_hub itself would ask again."""
        status = response.status_code
        self.failures += status >= 500
        asks_to_wait = status == 429 or status == 503 and "retry-after" in response.headers
        return asks_to_wait or status > 400 and response.request.method == "POST" or status >= 500 and self.failures > REPEATS

    def _trace(self, event: str, seen: Mapping[str, Any]) -> None:
        """Learn of each new connection; end what a cut one is still busy with."""
        if event.startswith("connection.") and event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.sockets.append(seen["return_value"].get_extra_info("socket"))
        self.check()


@contextmanager
def silent(bars: bool) -> Iterator[None]:
    """Keep the clients' warnings and log lines back, whoever listens: they quote signed links; show their bars, or none."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LOGGERS]
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in {*names, *LOGGERS}}
    hide = not bars and not are_progress_bars_disabled()  # where settings forbid them, there are none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        if hide:
            disable_progress_bars()
        try:
            yield
        finally:
            if hide:
                enable_progress_bars()
            for logger, level in levels.items():
                logger.setLevel(level)
