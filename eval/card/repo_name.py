"""What a repo of the Hub may be called. Asks nobody."""

from __future__ import annotations

from ...surgery.errors import DowncycleError


def check_repo_name(repo: str) -> None:
    """Refuse what cannot be the id of a repo."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo if repo.isascii() else "")
    except HFValidationError:
        raise DowncycleError(f"{repo}: no name that the Hub takes; write USER/NAME, of letters, digits, '-', '_' and '.'") from None
    if "/" not in repo:
        raise DowncycleError(f"{repo}: no user or organisation before it; write USER/{repo}")
