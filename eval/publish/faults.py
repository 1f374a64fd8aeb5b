"""What to do when a push fails: try again and for how long, or what to tell the user, in one line and never with token or signed link.

Knows the ways in which huggingface_hub wraps a fault. Sends nothing itself.
"""

from __future__ import annotations

import json
import re

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ...surgery.errors import DowncycleError
from ...surgery.hub import is_endpoint
from ...surgery.hub_faults import HTTPError, Patience, UnfitAnswer, address_of, endpoint, host_of, reason_of, status_of

ATTEMPTS = 7  # without a file that arrived
CONFLICT, MOVED = 409, 412
AGAIN = "what has arrived stays there, and the same command goes on from there"


class UploadPatience(Patience):
    """How often a push is tried, and what is said when it fails for good."""

    def __init__(self, repo: str, revision: str | None):
        super().__init__(repo, revision, "", ATTEMPTS)
        self.owner = repo.partition("/")[0]

    def may_pass(self, fault: Exception) -> bool:
        """Whether another attempt may succeed: also after a conflict with another change, or where a link to storage is too old."""
        return status_of(fault) in (CONFLICT, MOVED) or _by_storage(fault) or super().may_pass(fault)

    def explain(self, fault: Exception, asked: float) -> str:
        """Say, after the repo's name, what is wrong and what to do."""
        host, status = host_of(fault), status_of(fault)
        times = f", {self.failures} times in a row" if self.failures > 1 else ""
        if isinstance(fault, UnfitAnswer):
            return f": {fault}{times}; check the network, the proxy and HF_ENDPOINT; {AGAIN}"
        if not status:
            return f": the connection to {host} broke ({reason_of(fault)}){times}; check the network and proxy; {AGAIN}"
        if _by_storage(fault):
            return (
                f": the storage at {host} refuses it ({status}){times}; check the network and proxy, and the clock of this machine; {AGAIN}"
            )
        if status == 401:
            return f": {host} wants a valid token (401); run `hf auth login`, or set HF_TOKEN"
        if status == 403:
            return (
                f": {host} forbids it (403{_said(fault)}); give the token the right to write to {self.owner} at "
                f"{endpoint()}/settings/tokens, or push to a name that is yours"
            )
        if isinstance(fault, RevisionNotFoundError):
            return f": has no branch {self.revision}; see {endpoint()}/{self.repo}/tree/main for those that it has"
        if isinstance(fault, RepositoryNotFoundError) or status == 404:
            return f": {host} does not find it (404); check {self.owner}, the rights of the token, and HF_ENDPOINT"
        if status == CONFLICT:
            return f": {host} sees a conflict (409){times}; wait for what else is done to it, or choose another name"
        if status == MOVED:
            return f": others commit to it at this moment (412){times}; wait for them: {AGAIN}"
        if status == 413:
            return f": {host} takes nothing of this size (413); write the model with a smaller --max-shard-size"
        if status == 429:
            return f": {host} limits the rate of requests (429){times}; wait {_span(asked or 300)}: {AGAIN}"
        if status >= 500:
            return f": {host} fails ({status}){times}; try again later: {AGAIN}"
        return f": {host} refuses it ({status}{_said(fault)}); check HF_ENDPOINT and the proxy"


def underlying(error: Exception, repo: str) -> Exception:
    """Return the fault of the network or the Hub in what huggingface_hub raised, which wraps it; a DowncycleError where it is neither."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, HTTPError | DowncycleError | UnfitAnswer):
            return chain
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, json.JSONDecodeError | LookupError | TypeError | AttributeError):
        return UnfitAnswer("the answer was not one of the Hub")
    if isinstance(error, OSError) and error.filename:
        return DowncycleError(f"{error.filename}: {error.strerror}; it could be read when the push began: push again")
    if isinstance(error, ValueError):
        return DowncycleError(f"{repo}: refused: {plain(str(error))}")
    if found := re.search(r"\b(401|403)\b", str(error)):  # hf_xet has no classes for them
        return DowncycleError(f"{repo}: the storage refused the upload ({found[1]}); run `hf auth login` with a token that may write there")
    return UnfitAnswer(f"the upload broke off ({type(error).__name__})")


def plain(text: str) -> str:
    """Put another's words on one line, short, without what could be a token or a signed link."""
    token = get_token()
    text = text.replace(token, "…") if token else text
    text = re.sub(r"https?://\S+|(hf_|Bearer\s+)\S+|[A-Za-z0-9_+/=.-]{32,}", "…", text)
    return " ".join(text.split())[:200]


def _span(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _by_storage(fault: Exception) -> bool:
    """Whether a signed link was refused, and not the user's token: a new link may serve."""
    return 400 <= status_of(fault) < 500 and status_of(fault) != 429 and not is_endpoint(address_of(fault))


def _said(fault: Exception) -> str:
    words = plain(fault.server_message or "") if isinstance(fault, HfHubHTTPError) else ""
    return f": {words}" if words else ""
