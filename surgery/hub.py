"""Read a repo of the Hugging Face Hub by byte range, as though it were a folder.

Streams ranges straight to where they belong and keeps no copy; files that lie in the local Hub cache are read there. Knows nothing of
tensors or configs.

Why plain HTTP ranges and not Xet's own client: huggingface_hub (1.17 and 2.4) wraps only Xet's download of whole files. hf_xet 1.4
can do no other. hf_xet 1.8 has XetSession().new_download_stream_group().download_stream(file, start, end), but says that it is not to
be used directly; it fetches the whole chunks (some 64 KiB each) that cover a range, so bytes of dropped layers too; and it buffers
hundreds of MB. The /resolve route serves files in Xet storage by exact range.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers, validate_repo_id

from .errors import DowncycleError
from .sources import LocalFolder, Progress, Source

if TYPE_CHECKING:
    from httpx import Response

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx under huggingface_hub 1, of httpx2 under 2
CONNECTIONS = 8
REDIRECTS = 8
OPEN_ATTEMPTS, READ_ATTEMPTS = 3, 7  # without a byte of progress
FIRST_WAIT, LONGEST_WAIT = 0.5, 600.0  # seconds; a server may ask for the longest (the Hub counts requests in windows of 300 s)


class HubRepo:
    """A repo at one commit, read by byte range over HTTP; files that lie whole in the local cache are read there.

    files: size by path. identities: what changes with a file's content, by path. snapshot: the commit's folder in the cache, if any.
    """

    connections = CONNECTIONS

    def __init__(self, name: str, revision: str, files: dict[str, int], identities: dict[str, str], snapshot: LocalFolder | None):
        self.name, self.revision, self.files = name, revision, files
        self._identities = identities
        self._snapshot = snapshot
        self._cached = {path for path, size in snapshot.files.items() if files.get(path) == size} if snapshot else set()
        self._locations: dict[str, str] = {}  # where /resolve led for each file: a signed URL that expires

    def identity(self, path: str) -> str:
        """Return the SHA of the file's content."""
        return self._identities[path]

    def read(self, path: str, start: int, length: int) -> bytes:
        """Return exactly these bytes of a file. Reads no more of it than is asked, so that a dropped tensor never travels."""
        if self._snapshot and path in self._cached:
            return self._snapshot.read(path, start, length)
        data = bytearray()
        self._stream(path, start, length, lambda chunk, done: data.extend(chunk))
        return bytes(data)

    def copy(self, path: str, start: int, length: int, into: int, offset: int, progress: Progress) -> None:
        """Write exactly these bytes of a file into the file descriptor `into`, at `offset`, as they arrive."""
        if self._snapshot and path in self._cached:
            return self._snapshot.copy(path, start, length, into, offset, progress)

        def put(chunk: bytes, done: int) -> None:
            _write_at(into, chunk, offset + done)
            progress(len(chunk))

        self._stream(path, start, length, put)

    def _stream(self, path: str, start: int, length: int, put: Callable[[bytes, int], None]) -> None:
        """Give every chunk of a range to `put`, with the count of bytes before it; after a fault go on from the byte reached."""
        if not 0 <= start <= start + length <= self.files.get(path, -1):
            raise DowncycleError(f"{self.name}/{path}: no bytes {start} to {start + length} at {self.revision}; the file is truncated")
        patience = _Patience(self.name, self.revision, path, READ_ATTEMPTS)
        done = 0
        while done < length:
            try:
                for chunk in self._chunks(path, start + done, start + length):
                    put(chunk, done)
                    done += len(chunk)
                    patience.renew()
            except (HTTPError, _Unfit) as fault:
                self._locations.pop(path, None)
                patience.wait(fault)

    def _chunks(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Ask once for bytes [start, end) and yield them as they come, 64 KiB or less at a time."""
        left = end - start
        with self._answer(path, start, end) as response:
            for chunk in response.iter_raw():
                left -= len(chunk)
                if left < 0:
                    raise _Unfit(f"{response.url.host} sent more bytes than it was asked for")
                yield chunk
        if left:
            raise _Unfit(f"{response.url.host} ended {left} bytes early")

    @contextmanager
    def _answer(self, path: str, start: int, end: int) -> Iterator[Response]:
        """Open the response that holds exactly bytes [start, end), following redirects by hand so that no token leaves the endpoint."""
        url = self._locations.get(path) or hf_hub_url(self.name, path, revision=self.revision, endpoint=constants.ENDPOINT)
        for _ in range(REDIRECTS):
            headers = _headers(url) | {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # between two packets, not for the whole
            with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=timeout) as response:
                if response.has_redirect_location:
                    response.read()  # lets the connection serve again
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status_code in (401, 403, 404, 410) and not _is_endpoint(url):
                    raise _Unfit(f"{response.url.host} refused the signed link ({response.status_code})")
                hf_raise_for_status(response)
                _check(response, start, end, self.files[path])
                self._locations[path] = url
                yield response
                return
        raise _Unfit(f"{urlsplit(url).hostname} redirects without end")


def open_hub(repo_id: str, revision: str | None = None) -> Source:
    """Resolve a revision of a Hub repo to a commit and list its files; read nothing else.

    Offline (HF_HUB_OFFLINE=1), return the folder of that revision in the local cache.

    Raises:
        DowncycleError: gated, private, missing, no such revision, unreachable, or offline and not whole in the cache.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise DowncycleError(f"{repo_id}: no such folder, and not a Hub id (USER/NAME); check the spelling") from None
    if is_offline_mode():
        return _open_offline(repo_id, revision or constants.DEFAULT_REVISION)
    commit, files, identities = _list_files(repo_id, revision)
    return HubRepo(repo_id, commit, files, identities, _snapshot(repo_id, commit))


def _list_files(repo_id: str, revision: str | None) -> tuple[str, dict[str, int], dict[str, str]]:
    """Ask the Hub for the commit of a revision and for the size and identity of each file at it."""
    api = HfApi(endpoint=constants.ENDPOINT, library_name="downcycle")
    patience = _Patience(repo_id, revision or constants.DEFAULT_REVISION, "", OPEN_ATTEMPTS)
    while True:
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            siblings = [file for file in info.siblings or () if file.size is not None]
            identities = {file.rfilename: file.lfs.sha256 if file.lfs else str(file.blob_id) for file in siblings}
            return str(info.sha), {file.rfilename: int(file.size or 0) for file in siblings}, identities
        except HTTPError as fault:
            patience.wait(fault)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DowncycleError(f"{repo_id}: {_endpoint()} does not answer as the Hub does; check HF_ENDPOINT and the proxy") from None


def _snapshot(repo_id: str, revision: str) -> LocalFolder | None:
    """Find the folder of a revision in the local Hub cache, whole or not."""
    config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return LocalFolder(folder, name=repo_id, revision=folder.name)


def _open_offline(repo_id: str, revision: str) -> LocalFolder:
    snapshot = _snapshot(repo_id, revision)
    missing = _missing(snapshot) if snapshot else ["config.json"]
    if snapshot and not missing:
        return snapshot
    raise DowncycleError(
        f"{repo_id} at {revision}: HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} lacks {missing[0]}"
        f"{f' and {len(missing) - 1} more files' if missing[1:] else ''}; unset it, or run `hf download {repo_id}` when online"
    )


def _missing(snapshot: LocalFolder) -> list[str]:
    """Name the weights that a cached snapshot lacks. Only its index, or the one name that needs none, tells which there should be."""
    index, single = "model.safetensors.index.json", "model.safetensors"
    if index not in snapshot.files:
        return [] if single in snapshot.files else [single]
    try:
        shards = set(json.loads(snapshot.read(index, 0, snapshot.files[index]))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return [index]
    return sorted(map(str, shards - snapshot.files.keys()))


class _Unfit(Exception):
    """An answer that came but does not hold the bytes asked for; its text says so in a few words."""


class _Patience:
    """How often and how long to wait when nothing comes: exponential back-off with jitter, then a DowncycleError."""

    def __init__(self, repo: str, revision: str, path: str, attempts: int):
        self.repo, self.revision, self.path = repo, revision, path
        self.attempts, self.failures = attempts, 0

    def renew(self) -> None:
        """Forget earlier failures: something came."""
        self.failures = 0

    def wait(self, fault: Exception) -> None:
        """Sleep before the next attempt, or raise what the user should know if another cannot help."""
        self.failures += 1
        asked = _asked_wait(fault)
        if not _may_pass(fault) or self.failures >= self.attempts or asked > LONGEST_WAIT:
            # `from None`: the chain would show signed URLs, and for a token that is no header value the token.
            raise DowncycleError(f"{self.repo}{_explain(fault, self, asked)}") from None
        time.sleep(asked + FIRST_WAIT * 2 ** (self.failures - 1) * random.uniform(0.5, 1))


def _may_pass(fault: Exception) -> bool:
    """Whether the same request may succeed later."""
    return not isinstance(fault, HfHubHTTPError) or _status(fault) in (408, 425, 429) or _status(fault) >= 500


def _status(fault: HfHubHTTPError) -> int:
    return fault.response.status_code if fault.response is not None else 0


def _asked_wait(fault: Exception) -> float:
    """Return how many seconds the server asks to wait: its rate limit's reset or Retry-After, a number or a date."""
    if not isinstance(fault, HfHubHTTPError) or _status(fault) not in (429, 503):
        return 0.0
    limit = parse_ratelimit_headers(fault.response.headers)
    if limit and not limit.remaining:
        return float(limit.reset_in_seconds)
    text = fault.response.headers.get("retry-after", "0").strip()
    try:
        return float(text) if text.isdigit() else max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _explain(fault: Exception, request: _Patience, asked: float) -> str:
    """Say, after the repo's name, what went wrong and what to do; never the server's own words, which may quote the request."""
    repo, path, at = request.repo, f"/{request.path}" if request.path else "", _endpoint()
    times = f", {request.failures} times in a row" if request.failures > 1 else ""
    if isinstance(fault, GatedRepoError):
        return f" is gated: ask for access at {at}/{repo}, then run `hf auth login`"
    if isinstance(fault, RevisionNotFoundError):
        return f" has no revision {request.revision}; see {at}/{repo}/commits/main for its branches, tags and commits"
    if isinstance(fault, EntryNotFoundError):
        return f"{path}: not there at {request.revision}; check that HF_ENDPOINT serves the whole repo"
    if isinstance(fault, RepositoryNotFoundError):
        return f": no such folder, and no such public model at {at}; check the spelling, or run `hf auth login` if it is private"
    if isinstance(fault, DisabledRepoError):
        return f": the Hub has disabled access to it; see {at}/{repo}"
    if isinstance(fault, HfHubHTTPError):
        return _explain_status(_status(fault), f"{path}: {_host(fault)}", times, asked)
    if isinstance(fault, _Unfit):
        return f"{path}: {fault}{times}; a proxy may stand between: try another network, or `hf download {repo}` and give the folder"
    return f"{path}: no connection to {_host(fault)} ({_reason(fault)}){times}; check the network and proxy, or set HF_HUB_OFFLINE=1 to use the cache"


def _explain_status(status: int, where: str, times: str, asked: float) -> str:
    if status == 401:
        return f"{where} wants a valid token (401); run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"{where} forbids it to this token (403); let the token read it at {_endpoint()}/settings/tokens, or log in as another user"
    if status == 429:
        return f"{where} limits the rate of requests (429){times}; wait {asked or 300:.0f} s, or run `hf auth login` for a higher limit"
    if status >= 500:
        return f"{where} fails ({status}){times}; try again later"
    return f"{where} answered {status}{times}; check HF_ENDPOINT and the proxy"


def _host(fault: Exception) -> str:
    """Name the server that a fault came from: the Hub or its storage, as a firewall may block either."""
    try:
        return fault.request.url.host  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError):
        return str(urlsplit(constants.ENDPOINT).hostname)


def _reason(fault: BaseException) -> str:
    """Say why a connection failed in the system's own words, not in httpx's, which may quote a header."""
    cause: BaseException | None = fault
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__
    return type(fault).__name__


def _check(response: Response, start: int, end: int, size: int) -> None:
    """Raise _Unfit unless a response says that it holds bytes [start, end) of a file of `size` bytes, as they are."""
    given = response.headers.get("content-range", "no range")
    whole = response.status_code == 200 and end - start == size
    if not whole and (response.status_code != 206 or given not in (f"bytes {start}-{end - 1}/{size}", f"bytes {start}-{end - 1}/*")):
        raise _Unfit(f"{response.url.host}, asked for bytes {start}-{end - 1} of {size}, answered {response.status_code} with {given}")
    length = response.headers.get("content-length", str(end - start))
    encoding = response.headers.get("content-encoding", "identity")
    if length != str(end - start) or encoding != "identity":
        raise _Unfit(f"{response.url.host}, asked for {end - start} bytes, announced {length} ({encoding})")


def _headers(url: str) -> dict[str, str]:
    """Return huggingface_hub's headers for a request, with the user's token for the endpoint only."""
    return build_hf_headers(token=None if _is_endpoint(url) else False, library_name="downcycle")


def _is_endpoint(url: str) -> bool:
    return _origin(url) == _origin(constants.ENDPOINT)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _endpoint() -> str:
    """Return the endpoint as it may be shown: without the password that its URL may hold."""
    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


def _write_at(into: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(into, view, offset)
        view, offset = view[written:], offset + written
