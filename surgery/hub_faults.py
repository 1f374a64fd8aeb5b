"""What to do when the Hub fails: ask again and for how long, or what to tell the user.

Knows the exceptions of huggingface_hub and of the HTTP client under it. Sends nothing itself.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from .errors import DowncycleError

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx under huggingface_hub 1, of httpx2 under 2
FIRST_WAIT, LONGEST_WAIT = 0.5, 320.0  # seconds; the Hub counts requests in windows of 300 s and asks to wait for the next one


class UnfitAnswer(Exception):
    """An answer that came but does not hold the bytes asked for; its text says so in a few words."""


class Patience:
    """How often and how long to wait when nothing comes: exponential back-off with jitter, then a DowncycleError."""

    def __init__(self, repo: str, revision: str | None, path: str, attempts: int):
        self.repo, self.revision, self.path = repo, revision, path
        self.attempts, self.failures = attempts, 0

    def renew(self) -> None:
        """Forget earlier failures: something came."""
        self.failures = 0

    def wait(self, fault: Exception, tick: Callable[[], None] = lambda: None) -> None:
        """Sleep before the next attempt, or raise what the user should know where another cannot help.

        Calls `tick` every second; if it raises, the wait is over.
        """
        self.failures += 1
        asked = asked_wait(fault)
        if not self.may_pass(fault) or self.failures >= self.attempts or asked > LONGEST_WAIT:
            # `from None`: the chain would show signed URLs.
            raise DowncycleError(f"{self.repo}{self.explain(fault, asked)}") from None
        end = time.monotonic() + asked + FIRST_WAIT * 2 ** (self.failures - 1) * random.uniform(0.5, 1)
        while (left := end - time.monotonic()) > 0:
            tick()
            time.sleep(min(left, 1))

    def may_pass(self, fault: Exception) -> bool:
        """Whether the same request may succeed later."""
        return status_of(fault) in (0, 408, 425, 429) or status_of(fault) >= 500

    def explain(self, fault: Exception, asked: float) -> str:
        """Say, after the repo's name, what is wrong and what to do; never in the server's own words, which may quote the request."""
        if isinstance(fault, GatedRepoError):
            return f" is gated: ask for access at {endpoint()}/{self.repo}, then run `hf auth login`"
        if isinstance(fault, RevisionNotFoundError):
            return f" has no revision {self.revision}; see {endpoint()}/{self.repo}/commits/main for its branches, tags and commits"
        if isinstance(fault, EntryNotFoundError):
            return f"/{self.path}: not there at {self.revision}; check that HF_ENDPOINT serves the whole repo"
        if isinstance(fault, RepositoryNotFoundError):
            return f": no such folder, and no public model at {endpoint()} has this name; check it, or run `hf auth login` if it is private"
        if isinstance(fault, DisabledRepoError):
            return f": the Hub has disabled access to it; see {endpoint()}/{self.repo}"
        return f"{self.path and f'/{self.path}'}: {self._explain_transport(fault, asked)}"

    def _explain_transport(self, fault: Exception, asked: float) -> str:
        host, status = host_of(fault), status_of(fault)
        times = f", {self.failures} times in a row" if self.failures > 1 else ""
        if isinstance(fault, UnfitAnswer):
            return f"{fault}{times}; a proxy may stand between: try another network, or `hf download {self.repo}` and give the folder"
        if not status:
            broken = f"no connection to {host} ({reason_of(fault)}){times}"
            return f"{broken}; check the network and proxy, or set HF_HUB_OFFLINE=1 to use the cache"
        if status == 401:
            return f"{host} wants a valid token (401); run `hf auth login`, or set HF_TOKEN"
        if status == 403:
            return f"{host} forbids it to this token (403); let it read the repo at {endpoint()}/settings/tokens, or use another"
        if status == 429:
            wait = f"wait {asked or 300:.0f} s"
            return f"{host} limits the rate of requests (429){times}; {wait}, or run `hf auth login` for a higher limit"
        if status >= 500:
            return f"{host} fails ({status}){times}; try again later"
        return f"{host} answered {status}; check HF_ENDPOINT and the proxy"


def endpoint() -> str:
    """Return the Hub's address as it may be shown: without the password that HF_ENDPOINT may hold."""
    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


def status_of(fault: Exception) -> int:
    """Return the HTTP status of an error answer, or 0 where there was no such answer."""
    return fault.response.status_code if isinstance(fault, HfHubHTTPError) else 0


def asked_wait(fault: Exception) -> float:
    """Return how many seconds the server asks to wait: its rate limit's reset or Retry-After, a number or a date."""
    if not isinstance(fault, HfHubHTTPError) or status_of(fault) not in (429, 503):
        return 0.0
    limit = parse_ratelimit_headers(fault.response.headers)
    if limit and not limit.remaining:
        return float(limit.reset_in_seconds)
    text = fault.response.headers.get("retry-after", "0").strip()
    try:
        return float(text) if text.isdigit() else max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def host_of(fault: Exception) -> str:
    """Name the server that a fault came from: the Hub or its storage, as a firewall may block either."""
    return str(urlsplit(address_of(fault)).hostname)


def address_of(fault: Exception) -> str:
    """Return the address that was asked when a fault came; it may be signed, and is not to be shown."""
    try:
        request = fault.response.request if isinstance(fault, HfHubHTTPError) else fault.request  # type: ignore[attr-defined]
        return str(request.url)
    except (RuntimeError, AttributeError):
        return constants.ENDPOINT


def reason_of(fault: BaseException) -> str:
    """Say why a connection failed in the system's own words, not in the HTTP client's, which may quote a header."""
    cause: BaseException | None = fault
    while cause is not None:
        if isinstance(cause, OSError) and (cause.strerror or isinstance(cause, TimeoutError)):
            return cause.strerror or "timed out"
        cause = cause.__cause__ or cause.__context__
    return type(fault).__name__
