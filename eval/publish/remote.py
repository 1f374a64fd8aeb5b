"""What the Hub holds: a repo's visibility, commit and files, and how they differ from what is to be there. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ...surgery.hub_faults import UnfitAnswer, status_of

TIMEOUT = 60.0  # seconds for an answer about a repo
UNSEEN = (401,)  # with which the Hub hides a repo from those without a token, and refuses a token that is none


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it. sha256: of its content, where large storage holds it; blob_id: git's, of its content where none does."""

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class Remote:
    """A repo at one commit. name: what the Hub calls it, which is another than was asked for where it was renamed."""

    name: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]


def look(api: HfApi, repo: str, revision: str | None = None) -> Remote | None:
    """Ask for a repo at a branch or commit; None where there is no such repo, or no such branch."""
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as fault:
        if status_of(fault) in UNSEEN:
            raise
        return None
    if not info.sha or info.siblings is None:
        raise UnfitAnswer("the answer was not one of the Hub")
    files = {
        sibling.rfilename: RemoteFile(sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id or "")
        for sibling in info.siblings
    }
    return Remote(info.id, info.sha, bool(info.private), files)


def differing(wanted: Mapping[str, CommitOperationAdd], files: Mapping[str, RemoteFile]) -> list[str]:
    """Return the paths that the Hub lacks or holds with other bytes, by size and hash."""
    return [path for path, operation in wanted.items() if path not in files or not _is_same(operation, files[path])]


def _is_same(operation: CommitOperationAdd, there: RemoteFile) -> bool:
    if operation.upload_info.size != there.size:
        return False
    return operation.upload_info.sha256.hex() == there.sha256 if there.sha256 else _blob_id(operation) == there.blob_id


def _blob_id(operation: CommitOperationAdd) -> str:
    """Return what git calls this content."""
    digest = sha1(b"blob %d\0" % operation.upload_info.size)
    with operation.as_file() as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
