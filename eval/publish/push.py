"""Send a planned push to the Hub: make the repo, upload what it lacks, commit once, and see that all arrived as it is here.

Sends exactly the planned files and deletes nothing there. The token is read where huggingface_hub keeps it, and shown to nobody.

Why create_commit, and neither upload_folder nor upload_large_folder: upload_folder of huggingface_hub 1 picks files by patterns, and
calls create_commit with them; that of 2 commits a large folder in parts, so that others may load half a model; upload_large_folder always
does, and leaves a folder of its own in the user's. Resuming needs neither: storage keeps what has arrived, and is asked first.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, is_offline_mode
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from ...surgery.errors import DowncycleError
from ...surgery.hub import check_access
from ...surgery.hub_faults import UnfitAnswer, asked_wait, endpoint
from .faults import AGAIN, UploadPatience, plain, underlying
from .files import PushPlan, shorten
from .legal import CARD
from .remote import Remote, differing, look

if TYPE_CHECKING:
    from httpx import Response

LIBRARY = "downcycle"
MESSAGE = "Upload with downcycle"
STALL = 300.0  # seconds without a byte or an answer, after which a connection counts as broken
LOGGERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")  # whose lines hold signed links
OWN = (".gitattributes",)  # what the Hub itself puts into a repo


@dataclass(frozen=True)
class Pushed:
    """What the Hub holds now. url: of the repo; commit: with these files. files, bytes: in all; new_files, new_bytes: what it lacked.

    others: files of the repo that are none of these, and stayed.
    """

    url: str
    commit: str
    private: bool
    files: int
    bytes: int
    new_files: int
    new_bytes: int
    others: tuple[str, ...] = ()


def push(
    plan: PushPlan,
    *,
    private: bool = False,
    revision: str | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Upload what a plan lists, in one commit, and compare what the Hub then lists with the folder, by size and hash.

    What storage has already is not sent again. Bars are shown on stderr, where that is a terminal.

    Args:
        private: make the repo private, where it is not there yet; refuse one that is there and public.
        revision: branch to commit to; made where there is none.
        quiet: show no bars.
        say: told in a few words why nothing happens for a while.
    Raises:
        DowncycleError: no fitting token, no right to write, a public repo where a private one is asked for, a file that changes, a card
            that the Hub refuses, or a network or Hub that fails for longer than patience lasts.
    """
    _check_settings(revision)
    patience = UploadPatience(plan.repo, revision)
    with warnings.catch_warnings(), _silent_loggers(), _bars(not quiet and sys.stderr.isatty()):
        warnings.simplefilter("ignore")
        try:
            upload = _Upload(plan, private, revision)
            while True:
                fault = upload.attempt(patience.renew)
                if fault is None:
                    return upload.result()
                if isinstance(fault, DowncycleError):
                    raise fault
                asked = asked_wait(fault)
                why = f"waiting {asked:.0f} s, as the Hub asks" if asked else "the upload broke off; trying again"
                patience.wait(fault, _once(say, why))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {AGAIN}") from None


class _Upload:
    """One push and how far it is, over all attempts. lacked: what the repo did not hold at the beginning."""

    def __init__(self, plan: PushPlan, private: bool, branch: str | None):
        self.plan, self.private, self.branch = plan, private, branch
        self.api = HfApi(endpoint=constants.ENDPOINT, token=True, library_name=LIBRARY)
        self.lacked: list[str] | None = None
        self.remote: Remote | None = None

    @cached_property
    def operations(self) -> dict[str, CommitOperationAdd]:
        """What is to be there, by path; huggingface_hub 1 reads and hashes all of it here."""
        return {path: CommitOperationAdd(path, content) for path, content in self.plan.contents.items()}

    def attempt(self, arrived: Callable[[], None]) -> Exception | None:
        """Do what is left to do; return what went wrong, if anything did: raised here, it would carry signed links along."""
        try:
            with _watched(arrived):
                self._do()
        except Exception as error:
            fault = underlying(error, self.plan.repo)
        else:
            return None
        return self.plan.change() or fault

    def result(self) -> Pushed:
        """Say what the Hub holds."""
        assert self.remote is not None and self.lacked is not None
        files = self.plan.files
        return Pushed(
            url=f"{endpoint()}/{self.plan.repo}",
            commit=self.remote.commit,
            private=self.remote.private,
            files=len(files),
            bytes=self.plan.bytes,
            new_files=len(self.lacked),
            new_bytes=sum(files[path] for path in self.lacked),
            others=tuple(path for path in self.remote.files if path not in files and path not in OWN),
        )

    def _do(self) -> None:
        remote = self._find_or_make()
        lacking = differing(self.operations, remote.files)
        self.lacked = lacking if self.lacked is None else self.lacked
        if lacking:
            operations = [self.operations[path] for path in lacking]
            if CARD in lacking:
                self._check_card()
            self.api.preupload_lfs_files(self.plan.repo, operations, revision=self.branch, free_memory=False)
            if change := self.plan.change():
                raise change
            made = self.api.create_commit(
                self.plan.repo, operations, commit_message=MESSAGE, revision=self.branch, parent_commit=remote.commit
            )
            remote = self._look(made.oid)
            if otherwise := differing(self.operations, remote.files):
                raise DowncycleError(
                    f"{self.plan.repo}: holds {shorten(otherwise)} otherwise than {self.plan.folder}, or not at all, in {made.oid[:8]}; "
                    "see whether a .gitignore there names them, and push again"
                )
        self.remote = remote

    def _find_or_make(self) -> Remote:
        """Return the repo as it is at the branch; make what is not there."""
        repo = self.plan.repo
        remote = look(self.api, repo)
        if remote is None:
            self.api.create_repo(repo, private=self.private or None)  # None leaves it to the organisation
            remote = self._look(None)
        if self.private and not remote.private:
            raise DowncycleError(
                f"{repo}: is there and public, and --private was given; make it private at {endpoint()}/{repo}/settings, choose another "
                "name, or leave the option out"
            )
        if self.branch is None:
            return remote
        branch = look(self.api, repo, self.branch)
        if branch is None:
            self.api.create_branch(repo, branch=self.branch)
        return branch or self._look(self.branch)

    def _look(self, revision: str | None) -> Remote:
        if remote := look(self.api, self.plan.repo, revision):
            return remote
        raise UnfitAnswer("the repo was made, and is not there")

    def _check_card(self) -> None:
        """Ask the Hub whether it takes the card's metadata, before gigabytes are sent; create_commit asks it only then."""
        with self.operations[CARD].as_file() as file:
            body = {"content": file.read().decode(errors="replace"), "repoType": "model"}
        headers = build_hf_headers(token=True, library_name=LIBRARY)
        response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body, headers=headers)
        if response.status_code == 400:
            said = "; ".join(str(error.get("message")) for error in response.json().get("errors", []))
            raise DowncycleError(f"{self.plan.folder / CARD}: the Hub refuses its metadata block ({plain(said)}); mend it")
        hf_raise_for_status(response)


def _check_settings(branch: str | None) -> None:
    if is_offline_mode():
        raise DowncycleError("HF_HUB_OFFLINE is set, and a push needs the Hub; unset it")
    check_access()
    if not get_token():
        raise DowncycleError("no token for the Hub: run `hf auth login` with one that may write, or set HF_TOKEN")
    if branch is not None and (not re.fullmatch(r"\w[\w./-]*", branch) or re.fullmatch(r"[0-9a-f]{40}", branch)):
        raise DowncycleError(f"--revision {branch}: no name of a branch; give one, such as main")


def _once(say: Callable[[str], None], text: str) -> Callable[[], None]:
    """Return a function that says a text when it is first called."""
    left = [text]
    return lambda: say(left.pop()) if left else None


@contextmanager
def _watched(arrived: Callable[[], None]) -> Iterator[None]:
    """Let no request of huggingface_hub wait without end, nor be repeated where the answer says how long to wait, or no."""
    client = get_session()
    hooks, timeout = client.event_hooks, client.timeout

    def judge(response: Response) -> None:
        request, status = response.request, response.status_code
        if status < 300 and request.url.path.endswith("/verify"):
            arrived()
        asks_to_wait = status == 429 or status == 503 and "retry-after" in response.headers
        if asks_to_wait or status > 400 and request.method == "POST":
            response.read()
            hf_raise_for_status(response)

    client.event_hooks = {**hooks, "response": [*hooks["response"], judge]}  # type: ignore[dict-item]
    client.timeout = STALL
    try:
        yield
    finally:
        client.event_hooks, client.timeout = hooks, timeout


@contextmanager
def _silent_loggers() -> Iterator[None]:
    """Keep the clients' log lines back, whoever listens: they quote signed links, and headers of answers."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LOGGERS]
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in {*names, *LOGGERS}}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show huggingface_hub's own bars, or none; where its settings forbid them, there are none."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
