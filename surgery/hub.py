"""Read a repo of the Hugging Face Hub by byte range, as though it were a folder.

Streams ranges straight to where they belong and keeps no copy; files that lie in the local Hub cache are read there. Knows nothing of
tensors.

Why plain HTTP ranges and not Xet's own client: huggingface_hub (1.17 and 2.4) wraps only Xet's download of whole files. hf_xet 1.4
can do no other. hf_xet 1.8 has XetSession().new_download_stream_group().download_stream(file, start, end), but says that it is not to
be used directly; it fetches the whole chunks (some 64 KiB each) that cover a range, so bytes of dropped layers too; and it buffers
hundreds of MB. The /resolve route serves files in Xet storage by exact range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from .errors import DowncycleError
from .filenames import CONFIG, INDEX, SINGLE, leads_out
from .hub_faults import HTTPError, Patience, UnfitAnswer, endpoint
from .sources import LocalFolder, Progress, Source, write_at

if TYPE_CHECKING:
    from httpx import Response

CONNECTIONS = 8
MAX_REDIRECTS = 8
OPEN_ATTEMPTS, READ_ATTEMPTS = 3, 7  # without a byte of progress


class HubRepo:
    """A repo at one commit, read by byte range over HTTP; files that lie whole in the local cache are read there.

    files: size by path. identities: what changes with a file's content, by path. snapshot: the commit's folder in the cache, if any.
    """

    connections = CONNECTIONS

    def __init__(self, name: str, revision: str, files: dict[str, int], identities: dict[str, str], snapshot: LocalFolder | None):
        self.name = name
        self.revision: str | None = revision
        self.files = files
        self._identities = identities
        self._snapshot = snapshot
        self._cached = _whole(snapshot, files)
        self._locations: dict[str, str] = {}  # where /resolve led for each file: a signed URL that expires

    def identity(self, path: str) -> str:
        """Return the SHA of the file's content."""
        return self._identities[path]

    def local_path(self, path: str) -> Path | None:
        """Say where the local cache holds a file, if it does: its bytes are not fetched."""
        return self._snapshot.local_path(path) if self._snapshot and path in self._cached else None

    def keep(self, paths: Iterable[str]) -> None:
        """Put whole files into the local cache, by huggingface_hub's own download, and read them there from now on."""
        patience = Patience(self.name, self.revision, "", OPEN_ATTEMPTS)
        while missing := [path for path in paths if path not in self._cached]:
            try:
                snapshot_download(self.name, revision=self.revision, allow_patterns=[escape(path) for path in missing])
            except (HTTPError, LocalEntryNotFoundError) as fault:
                patience.wait(fault.__cause__ if isinstance(fault.__cause__, HTTPError) else fault)
                continue
            self._snapshot = _snapshot(self.name, str(self.revision))
            self._cached = _whole(self._snapshot, self.files)
            if missing[0] not in self._cached:  # where the Hub does not answer, huggingface_hub gives what the cache holds
                patience.wait(UnfitAnswer(f"{endpoint()} does not give {missing[0]}"))

    def read(self, path: str, start: int, length: int) -> bytes:
        """Return exactly these bytes of a file. Fetches no more of it, not even ahead of need: a dropped tensor never travels."""
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
            write_at(into, chunk, offset + done)
            progress(len(chunk))

        return self._stream(path, start, length, put)

    def _stream(self, path: str, start: int, length: int, put: Callable[[bytes, int], None]) -> None:
        """Give every chunk of a range to `put`, with the count of bytes before it; after a fault go on from the byte reached."""
        if not 0 <= start <= start + length <= self.files.get(path, -1):
            raise DowncycleError(f"{self.name}/{path}: has no bytes {start}-{start + length} at {self.revision}; it is truncated there")
        patience = Patience(self.name, self.revision, path, READ_ATTEMPTS)
        done = 0
        while done < length:
            try:
                for chunk in self._chunks(path, start + done, start + length):
                    put(chunk, done)
                    done += len(chunk)
                    patience.renew()
            except (HTTPError, UnfitAnswer) as fault:
                self._locations.pop(path, None)
                patience.wait(fault, partial(put, b"", done))

    def _chunks(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Ask once for bytes [start, end) and yield them as they come, 64 KiB or less at a time."""
        left = end - start
        with self._answer(path, start, end) as response:
            for chunk in response.iter_raw():
                left -= len(chunk)
                if left < 0:
                    raise UnfitAnswer(f"{response.url.host} sent more bytes than it was asked for")
                yield chunk
        if left:
            raise UnfitAnswer(f"{response.url.host} ended {left} bytes early")

    @contextmanager
    def _answer(self, path: str, start: int, end: int) -> Iterator[Response]:
        """Open the response that holds exactly bytes [start, end), following redirects by hand so that no token leaves the endpoint."""
        url = self._locations.get(path) or hf_hub_url(self.name, path, revision=self.revision, endpoint=constants.ENDPOINT)
        for _ in range(MAX_REDIRECTS):
            headers = _headers(url) | {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # between two packets, not for the whole
            with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=timeout) as response:
                if response.has_redirect_location:
                    response.read()  # lets the connection serve again
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status_code in (401, 403, 404, 410) and not is_endpoint(url):
                    raise UnfitAnswer(f"{response.url.host} refused the signed link ({response.status_code})")
                hf_raise_for_status(response)
                _check(response, start, end, self.files[path])
                self._locations[path] = url
                yield response
                return
        raise UnfitAnswer(f"{urlsplit(url).hostname} redirects without end")


def open_hub(repo_id: str, revision: str | None = None) -> Source:
    """Resolve a revision of a Hub repo to a commit and list its files; read nothing else.

    Offline (HF_HUB_OFFLINE=1), return the folder in the local cache of the commit that it has recorded for the revision.

    Raises:
        DowncycleError: gated, private, missing, no such revision, unreachable, or offline and not whole in the cache.
    """
    _check_settings(repo_id)
    if is_offline_mode():
        return _open_offline(repo_id, revision or constants.DEFAULT_REVISION)
    commit, files, identities = _list_files(repo_id, revision)
    return HubRepo(repo_id, commit, files, identities, _snapshot(repo_id, commit))


def _check_settings(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise DowncycleError(f"{repo_id}: no such folder, and not a Hub id (USER/NAME); check the spelling") from None
    check_access()


def check_access() -> None:
    """Refuse an address of the Hub or a token that cannot be one, before anything is sent."""
    if not re.match(r"https?://[^/]", constants.ENDPOINT):
        raise DowncycleError(f"HF_ENDPOINT={endpoint()}: not an address; set it to one such as https://huggingface.co, or unset it")
    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        raise DowncycleError("HF_TOKEN or the saved token holds a character that no token has; run `hf auth login` again")


def _list_files(repo_id: str, revision: str | None) -> tuple[str, dict[str, int], dict[str, str]]:
    """Ask the Hub for the commit of a revision and for the size and identity of each file at it."""
    api = HfApi(endpoint=constants.ENDPOINT, library_name="downcycle")
    patience = Patience(repo_id, revision or constants.DEFAULT_REVISION, "", OPEN_ATTEMPTS)
    while True:
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            siblings = {file.rfilename: file for file in info.siblings or ()}
            sizes = {path: int(file.size) for path, file in siblings.items()}  # type: ignore[arg-type]
            identities = {path: file.lfs.sha256 if file.lfs else str(file.blob_id) for path, file in siblings.items()}
            if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)) or any(map(leads_out, sizes)):
                raise ValueError
            return str(info.sha), sizes, identities
        except HTTPError as fault:
            patience.wait(fault)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise DowncycleError(f"{repo_id}: {endpoint()} does not answer as the Hub does; check HF_ENDPOINT and the proxy") from None


def _whole(snapshot: LocalFolder | None, files: dict[str, int]) -> set[str]:
    """Return the files that a cached snapshot holds in the size that they have on the Hub."""
    return {path for path, size in snapshot.files.items() if files.get(path) == size} if snapshot else set()


def _snapshot(repo_id: str, revision: str) -> LocalFolder | None:
    """Find the folder of a revision in the local Hub cache, whole or not."""
    config = try_to_load_from_cache(repo_id, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return LocalFolder(folder, name=repo_id, revision=folder.name)


def _open_offline(repo_id: str, revision: str) -> LocalFolder:
    snapshot = _snapshot(repo_id, revision)
    missing = _missing_weights(snapshot) if snapshot else [CONFIG]
    if snapshot and not missing:
        return snapshot
    raise DowncycleError(
        f"{repo_id}: no such folder; and as a Hub id, at {revision}: HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} lacks "
        f"{missing[0]}"
        f"{f' and {len(missing) - 1} more files' if missing[1:] else ''}; unset it, or run `hf download {repo_id}` when online"
    )


def _missing_weights(snapshot: LocalFolder) -> list[str]:
    """Name the weights that a cached snapshot lacks. Only its index, or the one name that needs none, tells which there should be."""
    if SINGLE in snapshot.files:
        return []
    if INDEX not in snapshot.files:
        return [SINGLE]
    try:
        shards = set(json.loads(snapshot.read(INDEX, 0, snapshot.files[INDEX]))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return [INDEX]
    return sorted(map(str, shards - snapshot.files.keys()))


def _check(response: Response, start: int, end: int, size: int) -> None:
    """Raise UnfitAnswer unless a response says that it holds bytes [start, end) of a file of `size` bytes, as they are."""
    given = response.headers.get("content-range", "no range")
    whole = response.status_code == 200 and end - start == size
    if not whole and (response.status_code != 206 or given not in (f"bytes {start}-{end - 1}/{size}", f"bytes {start}-{end - 1}/*")):
        raise UnfitAnswer(f"{response.url.host}, asked for bytes {start}-{end - 1} of {size}, answered {response.status_code} with {given}")
    length = response.headers.get("content-length", str(end - start))
    encoding = response.headers.get("content-encoding", "identity")
    if length != str(end - start) or encoding != "identity":
        raise UnfitAnswer(f"{response.url.host}, asked for {end - start} bytes, announced {length} ({encoding})")


def _headers(url: str) -> dict[str, str]:
    """Return huggingface_hub's headers for a request, with the user's token for the endpoint only."""
    return build_hf_headers(token=None if is_endpoint(url) else False, library_name="downcycle")


def is_endpoint(url: str) -> bool:
    """Whether an address is the Hub's own, to which the user's token may go."""
    return _origin(url) == _origin(constants.ENDPOINT)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
