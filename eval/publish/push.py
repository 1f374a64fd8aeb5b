"""Send a planned push to the Hub: make the repo, upload what it lacks, commit once, and see that all arrived as it is here.

Sends exactly the planned files and deletes nothing there. The token is read where huggingface_hub keeps it, and shown to nobody.

Why create_commit, and neither upload_folder nor upload_large_folder: upload_folder of huggingface_hub 1 picks files by patterns, and
calls create_commit with them; that of 2 commits a large folder in parts, so that others may load half a model; upload_large_folder always
does, and leaves a folder of its own in the user's. Resuming needs neither: storage keeps what has arrived, and is asked first.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, is_offline_mode
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ...surgery.errors import DowncycleError
from ...surgery.filenames import README
from ...surgery.hub import check_access
from ...surgery.hub_faults import UnfitAnswer, asked_wait, endpoint
from .connection import Line, silent
from .faults import AGAIN, UploadPatience, plain, underlying
from .files import PushPlan, shorten
from .remote import Remote, differing, look

LIBRARY = "downcycle"
MESSAGE = "Upload with downcycle"
GRACE = 1.0  # seconds that an interrupted attempt has to end in
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

    What storage has already is not sent again. Bars are shown on stderr, where that is a terminal. Ctrl-C ends it at once: nothing more
    is sent, nor committed; a thread of huggingface_hub that waits to try again may live for some seconds yet.

    Args:
        private: make the repo private, where it is not there yet; refuse one that is there and public.
        revision: branch to commit to; made where there is none.
        quiet: show no bars.
        say: told in a few words why nothing happens for a while.
    Raises:
        DowncycleError: no fitting token, no right to write, a public repo where a private one is asked for, a file that changes, a card
            that the Hub refuses, or a network or Hub that fails for longer than patience lasts.
        KeyboardInterrupt: by Ctrl-C, with a line about what stays.
    """
    check_settings(revision)
    patience = UploadPatience(plan.repo, revision)
    upload = _Upload(plan, private, revision, not quiet and sys.stderr.isatty())
    try:
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
        upload.stop()
        raise KeyboardInterrupt(f"interrupted; {AGAIN}") from None


class _Upload:
    """One push and how far it is, over all attempts. lacked: what the repo did not hold at the beginning."""

    def __init__(self, plan: PushPlan, private: bool, branch: str | None, bars: bool):
        self.plan, self.private, self.branch, self.bars = plan, private, branch, bars
        self.repo = plan.repo  # as the Hub calls it, once it has answered
        self.line = Line()
        self.ended = threading.Event()  # while no attempt runs
        self.ended.set()
        self.api = HfApi(endpoint=constants.ENDPOINT, token=True, library_name=LIBRARY)
        self.lacked: list[str] | None = None
        self.remote: Remote | None = None

    @cached_property
    def operations(self) -> dict[str, CommitOperationAdd]:
        """What is to be there, by path; huggingface_hub 1 reads and hashes all of it here."""
        return {path: CommitOperationAdd(path, content) for path, content in self.plan.contents.items()}

    def attempt(self, arrived: Callable[[], None]) -> Exception | None:
        """Do what is left to do; return what went wrong, if anything did: raised here, it would carry signed links along.

        A thread of its own does it, for huggingface_hub waits for its threads, whoever interrupts it; this one only waits.
        """
        faults: list[Exception] = []
        self.ended.clear()
        threading.Thread(target=self._try, args=(arrived, faults), daemon=True).start()
        while not self.ended.wait(GRACE):
            pass  # Thread.join would take the thread for ended after Ctrl-C
        return faults[0] if faults else None

    def stop(self) -> None:
        """End the attempt that runs: whatever it is about to send or to commit is not."""
        self.line.stop()
        self.ended.wait(GRACE)

    def _try(self, arrived: Callable[[], None], faults: list[Exception]) -> None:
        try:
            with silent(self.bars), self.line.watch(arrived):
                self._do()
        except Exception as error:
            fault = underlying(error, self.plan.repo)
            faults.append(self.plan.change() or fault)
        finally:
            self.ended.set()

    def result(self) -> Pushed:
        """Say what the Hub holds."""
        assert self.remote is not None and self.lacked is not None
        files = self.plan.files
        return Pushed(
            url=f"{endpoint()}/{self.repo}",
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
            if README in lacking:
                self._check_card()
            self.api.preupload_lfs_files(self.repo, operations, revision=self.branch, free_memory=False)
            if change := self.plan.change():
                raise change
            self.line.check()
            made = self.api.create_commit(self.repo, operations, commit_message=MESSAGE, revision=self.branch, parent_commit=remote.commit)
            remote = self._look(made.oid)
            if otherwise := differing(self.operations, remote.files):
                raise DowncycleError(
                    f"{self.plan.repo}: holds {shorten(otherwise)} otherwise than {self.plan.folder}, or not at all, in {made.oid[:8]}; "
                    "see whether a .gitignore there names them, and push again"
                )
        self.remote = remote

    def _find_or_make(self) -> Remote:
        """Return the repo as it is at the branch; make what is not there."""
        remote = look(self.api, self.repo)
        if remote is None:
            self.api.create_repo(self.repo, private=self.private or None)  # None leaves it to the organisation
            remote = self._look(None)
        repo = self.repo = remote.name  # a repo that was renamed answers to its old name
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
        if remote := look(self.api, self.repo, revision):
            return remote
        raise UnfitAnswer("the repo was made, and is not there")

    def _check_card(self) -> None:
        """Ask the Hub whether it takes the card's metadata, before gigabytes are sent; create_commit asks it only then."""
        with self.operations[README].as_file() as file:
            body = {"content": file.read().decode(errors="replace"), "repoType": "model"}
        headers = build_hf_headers(token=True, library_name=LIBRARY)
        response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body, headers=headers)
        if response.status_code == 400:
            said = "; ".join(str(error.get("message")) for error in response.json().get("errors", []))
            raise DowncycleError(f"{self.plan.folder / README}: the Hub refuses its metadata block ({plain(said)}); mend it")
        hf_raise_for_status(response)


def check_settings(branch: str | None) -> None:
    """Refuse what no push can come of: no network wanted, no token, no name of a branch."""
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
