"""A Hub on loopback that takes what is pushed: repos, branches, commits, and large files on a second port, whole or in parts.

    with UploadServer(token="hf_...") as hub:
        hub.fail("/store/*", times=1, take=1000)
        ...
        assert hub.content("ann/model") == {"config.json": b"{}"}

Speaks the routes by which huggingface_hub writes; keeps all that it is sent, and needs the standard library only.
"""

import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import md5, sha1, sha256
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qs, unquote

from hub_server import Answer, Handler, HubServer, error_answer, json_answer

PLAIN = (".json", ".jinja", ".md", ".txt", ".yaml", "LICENSE", "NOTICE", ".gitattributes", ".gitignore")  # what git itself holds
LARGE = (".safetensors", "tokenizer.json")
SIGNATURE = "cafe0123456789"  # of links to storage
OTHERS = {".gitattributes": b"*.safetensors filter=lfs\n"}  # what a new repo holds


class Content(NamedTuple):
    """A file at a commit."""

    data: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """Its name in large storage, or git's."""
        return sha256(self.data).hexdigest() if self.is_large else git_id(self.data)


@dataclass
class Pushable:
    """A repo: the commits of each branch, the last one last, and the files at each commit."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": ["0" * 40]})
    commits: dict[str, dict[str, Content]] = field(default_factory=lambda: {"0" * 40: {k: Content(v, False) for k, v in OTHERS.items()}})

    def commit_of(self, revision: str) -> str | None:
        """Resolve a branch or commit."""
        return self.branches[revision][-1] if revision in self.branches else revision if revision in self.commits else None

    def add(self, branch: str, files: dict[str, Content]) -> str:
        """Commit files upon a branch."""
        whole = self.commits[self.branches[branch][-1]] | files
        commit = sha1(repr([self.branches[branch], sorted((path, file.oid) for path, file in whole.items())]).encode()).hexdigest()
        self.commits[commit] = whole
        self.branches[branch].append(commit)
        return commit


class UploadServer(HubServer):
    """The Hub while it runs. owners: whose repos the token may write. objects: large storage; parts_from: size of what goes in parts."""

    def __init__(self, token: str, owners: tuple[str, ...] = ("ann",), parts_from: int = 1 << 30, part: int = 10_000):
        self.token, self.owners, self.parts_from, self.part = token, owners, parts_from, part
        self.pushed: dict[str, Pushable] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.card_fault = ""
        self.renamed: dict[str, str] = {}
        self.actions: list[tuple[str, Callable[[], object]]] = []
        super().__init__()

    @property
    def handler(self) -> type[Handler]:
        return UploadHandler

    def content(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What was pushed into a repo."""
        files = self.pushed[repo].commits[self.pushed[repo].commit_of(branch)]
        return {path: file.data for path, file in files.items() if path not in OTHERS}

    def add_repo(self, repo: str, files: dict[str, bytes] | None = None, private: bool = False) -> Pushable:
        """Make a repo that holds files already."""
        self.pushed[repo] = Pushable(private)
        if files:
            self.pushed[repo].add("main", {path: Content(data, path.endswith(LARGE)) for path, data in files.items()})
        return self.pushed[repo]

    def meanwhile(self, pattern: str, action: Callable[[], object]) -> None:
        """Let something happen just before the next request whose path matches is answered."""
        self.actions.append((pattern, action))

    def act(self, path: str) -> None:
        """Do what was to happen before this request."""
        for pair in [pair for pair in self.actions if fnmatch(path, pair[0])][:1]:
            self.actions.remove(pair)
            pair[1]()

    def taken(self, pattern: str) -> int:
        """How many bytes of body came in with requests whose path matches."""
        return sum(len(request.body) for request in self.asked(pattern))


class UploadHandler(Handler):
    """Answer one connection's requests, on either port."""

    hub: UploadServer

    def _hub(self, url: SplitResult) -> Answer:
        self.hub.act(self.asked.path)
        if self.asked.headers.get("authorization") != f"Bearer {self.hub.token}" and "/complete/" not in url.path:
            return error_answer(401, "", "Invalid credentials in Authorization header")
        for old, new in self.hub.renamed.items():
            if f"/{old}" in url.path:
                return Answer(307, b"", {"Location": self.path.replace(f"/{old}", f"/{new}")})
        fixed = {"/api/repos/create": self._create, "/api/validate-yaml": self._validate}
        if url.path in fixed:
            return fixed[url.path]()
        for pattern, route in ROUTES.items():
            if found := re.fullmatch(pattern, url.path):
                repo_id, *rest = map(unquote, found.groups())
                if repo_id not in self.hub.pushed:
                    return error_answer(404, "RepoNotFound", "Repository not found")
                if self.command == "POST" and not self._may_write(repo_id):
                    return error_answer(403, "", "You have no right to write here")
                return getattr(self, route)(repo_id, self.hub.pushed[repo_id], *rest)
        return error_answer(404, "", "no such route")

    def _may_write(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in self.hub.owners

    def _json(self) -> dict:
        return json.loads(self.asked.body)

    def _create(self) -> Answer:
        asked = self._json()
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repo_id):
            return error_answer(403, "", f"You don't have the rights to create a model under the namespace {asked['organization']}")
        if repo_id in self.hub.pushed:
            return error_answer(409, "", "You already created this model repo")
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return json_answer({"url": f"{self.hub.endpoint}/{repo_id}"})

    def _validate(self) -> Answer:
        assert self._json()["repoType"] == "model"
        errors = [{"message": self.hub.card_fault}] if self.hub.card_fault else []
        return json_answer({"errors": errors, "warnings": []})._replace(status=400 if errors else 200)

    def _info_of(self, repo_id: str, repo: Pushable, revision: str = "main") -> Answer:
        if not (commit := repo.commit_of(revision)):
            return error_answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = []
        for path, file in repo.commits[commit].items():
            size = len(file.data)
            lfs = {"lfs": {"sha256": file.oid, "size": size, "pointerSize": 134}} if file.is_large else {}
            siblings.append({"rfilename": path, "size": size, "blobId": git_id(b"pointer" if lfs else file.data), **lfs})
        return json_answer({"_id": "0", "id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings})

    def _branch(self, repo_id: str, repo: Pushable, branch: str) -> Answer:
        if branch in repo.branches:
            return error_answer(409, "", "Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        return json_answer({})

    def _preupload(self, repo_id: str, repo: Pushable, revision: str) -> Answer:
        if not (commit := repo.commit_of(revision)):
            return error_answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        there = repo.commits[commit]
        ignored = there.get(".gitignore", Content(b"", False)).data.decode().split()
        answers = []
        for file in self._json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) or not path.endswith(PLAIN) else "regular"
            oid = {"oid": there[path].oid} if path in there else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, **oid})
        return json_answer({"files": answers})

    def _batch(self, repo_id: str, repo: Pushable) -> Answer:
        asked = self._json()
        assert {"basic", "multipart"} <= set(asked["transfers"])
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        objects = [self._offer(repo_id, one["oid"], one["size"]) for one in asked["objects"]]
        return json_answer({"transfer": "multipart", "objects": objects})

    def _offer(self, repo_id: str, oid: str, size: int) -> dict:
        """Say where an object is to be sent, unless it is there."""
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        store = f"{self.hub.cdn}/store/{oid}"
        upload: dict = {"href": f"{store}?Signature={SIGNATURE}"}
        if size >= self.hub.parts_from:
            count = -(-size // self.hub.part)
            header = {str(n): f"{store}/{n}?Signature={SIGNATURE}" for n in range(1, count + 1)}
            upload = {"href": f"{self.hub.endpoint}/{repo_id}/complete/{oid}", "header": {"chunk_size": str(self.hub.part), **header}}
        verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _complete(self, repo_id: str, repo: Pushable, oid: str) -> Answer:
        """Join the parts of an object, each named by the tag that its upload was answered with."""
        parts = self.hub.parts.get(oid, {})
        named = {part["partNumber"]: part["etag"] for part in self._json()["parts"]}
        whole = b"".join(parts[number] for number in sorted(parts))
        if named != {number: tag_of(part) for number, part in parts.items()} or sha256(whole).hexdigest() != oid:
            return error_answer(400, "", "parts do not fit")
        self.hub.objects[oid] = whole
        return json_answer({})

    def _verify(self, repo_id: str, repo: Pushable) -> Answer:
        asked = self._json()
        whole = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        return json_answer({}) if whole else error_answer(404, "", "no such object")

    def _commit(self, repo_id: str, repo: Pushable, revision: str) -> Answer:
        lines = [json.loads(line) for line in self.asked.body.splitlines()]
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        if revision not in repo.branches or lines[0]["value"].get("parentCommit", repo.commit_of(revision)) != repo.commit_of(revision):
            return error_answer(412, "", "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in self.hub.objects:
                return error_answer(400, "", f"Your push was rejected: {value['oid']} was not uploaded")
            data = self.hub.objects[value["oid"]] if line["key"] == "lfsFile" else b64decode(value["content"], validate=True)
            files[value["path"]] = Content(data, line["key"] == "lfsFile")
        commit = repo.add(revision, files)
        return json_answer({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}"})

    def _cdn(self, url: SplitResult) -> Answer:
        found = re.fullmatch(r"/store/([0-9a-f]{64})(?:/(\d+))?", url.path)
        if self.command != "PUT" or not found or parse_qs(url.query).get("Signature") != [SIGNATURE]:
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if found[2]:
            self.hub.parts.setdefault(found[1], {})[int(found[2])] = self.asked.body
            return Answer(200, b"", {"ETag": tag_of(self.asked.body)})
        if sha256(self.asked.body).hexdigest() != found[1]:
            return Answer(400, b"<Error><Code>BadDigest</Code></Error>")
        self.hub.objects[found[1]] = self.asked.body
        return Answer(200)


REPO = "([^/]+/[^/]+?)"
ROUTES = {
    rf"/api/models/{REPO}": "_info_of",
    rf"/api/models/{REPO}/revision/([^/]+)": "_info_of",
    rf"/api/models/{REPO}/branch/([^/]+)": "_branch",
    rf"/api/models/{REPO}/preupload/([^/]+)": "_preupload",
    rf"/api/models/{REPO}/commit/([^/]+)": "_commit",
    rf"/{REPO}\.git/info/lfs/objects/batch": "_batch",
    rf"/{REPO}\.git/info/lfs/objects/verify": "_verify",
    rf"/{REPO}/complete/([0-9a-f]{{64}})": "_complete",
}


def git_id(data: bytes) -> str:
    """Return what git calls a content."""
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tag_of(part: bytes) -> str:
    """Return the tag that storage gives a part."""
    return f'"{md5(part).hexdigest()}"'
