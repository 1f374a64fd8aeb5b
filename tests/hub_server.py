"""A Hub on loopback: serves folders as model repos over real HTTP, with a CDN on a second port, and fails on demand.

    with HubServer() as hub:
        hub.add("user/model", folder)
        hub.fail("/cdn/*", times=1, drop_after=1000)

Speaks the routes and headers that huggingface_hub uses to read; the server needs the standard library only.
"""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

STORED_APART = (".safetensors", "tokenizer.json")  # what git-lfs or Xet hold, and a CDN serves


@dataclass
class Fault:
    """What goes wrong with the requests whose path matches, and for how many of them (None: all)."""

    pattern: str
    times: int | None = None
    status: int = 0
    headers: dict[str, str | None] = field(default_factory=dict)  # added to the answer; None leaves one out
    body: bytes | None = None  # instead of the file's bytes
    drop_after: int | None = None  # bytes of the body after which the connection breaks
    take: int | None = None  # bytes of what the client sends after which it breaks
    hold: threading.Event | None = None  # before the client's bytes are read, this is waited for
    pause: float = 0.0  # seconds before every 4 KiB of the body
    ignore_range: bool = False  # answer 200 with the whole file
    shift: int = 0  # serve a range that lies this many bytes further on
    lie: int = 0  # added to Content-Length


@dataclass
class Request:
    """A request that was answered, what came with it, and how many bytes of body went out."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    connection: int  # the client's port
    body: bytes = b""  # what the client sent
    status: int = 0
    sent: int = 0

    @property
    def range(self) -> tuple[int, int] | None:
        """First byte asked for, and the one after the last."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None


@dataclass
class Repo:
    """A folder served as a repo at one commit, under any name that `revisions` lists. files: as the API describes them."""

    folder: Path
    files: list[dict]
    commit: str
    revisions: set[str]
    private: bool = False


class Answer(NamedTuple):
    """What goes back; a header whose value is None is left out."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str | None] = {}


def describe(folder: Path) -> list[dict]:
    """List every file of a folder with the hashes that git and git-lfs give it."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        oid = sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        apart = {"lfs": lfs} if path.name.endswith(STORED_APART) else {}
        files.append({"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(content), "oid": oid, **apart})
    return files


class HubServer:
    """The Hub and its CDN while they run, what they serve and what they were asked."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.signature = 0
        self._lock = threading.Lock()
        self._servers = {name: self._serve(name) for name in ("hub", "cdn")}
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers.values())

    def add(self, repo_id: str, folder: Path, revisions: set[str] = frozenset(), private: bool = False) -> str:
        """Serve a folder as it is now; return its commit."""
        files = describe(folder)
        commit = sha1(json.dumps([repo_id, *files]).encode()).hexdigest()
        self.repos[repo_id] = Repo(folder, files, commit, {"main", *revisions}, private)
        return commit

    def fail(self, pattern: str, times: int | None = None, **fault: object) -> None:
        """Let the next requests whose path matches fail; faults take effect in the order in which they were given."""
        self.faults.append(Fault(pattern, times, **fault))

    def expire(self) -> None:
        """Make every signed URL that was handed out useless."""
        self.signature += 1

    def asked(self, pattern: str = "*", server: str = "") -> list[Request]:
        """The requests whose path matches."""
        return [request for request in self.requests if fnmatch(request.path, pattern) and server in request.server]

    def sent(self, pattern: str = "*") -> int:
        """How many bytes of body went out for them."""
        return sum(request.sent for request in self.asked(pattern))

    def next_fault(self, path: str) -> Fault:
        """Take the first fault that is left for a path; one that does nothing if there is none."""
        with self._lock:
            for fault in self.faults:
                if fault.times != 0 and fnmatch(path, fault.pattern):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return Fault("")

    @property
    def handler(self) -> "type[Handler]":
        """What answers."""
        return Handler

    def __enter__(self) -> "HubServer":
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def _serve(self, name: str) -> ThreadingHTTPServer:
        handler = type("Handler", (self.handler,), {"hub": self, "server_name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.handle_error = lambda *given: None  # a client that hangs up is no news
        return server


@contextmanager
def connected(monkeypatch, cache: Path, server: HubServer | None = None) -> Iterator[HubServer]:
    """Run a Hub that huggingface_hub takes for its own in this process, with this cache, and waits too short to notice."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from downcycle.surgery import hub_faults

    with server or HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_faults, "FIRST_WAIT", 0.002)
        yield hub
    close_session()  # the next test's Hub may get the same port


def skip_waits(monkeypatch) -> list[float]:
    """Let the waits between attempts pass at once; return the list that they are put into."""
    from downcycle.surgery import hub_faults

    waits: list[float] = []

    class Clock:
        monotonic = staticmethod(lambda: sum(waits))
        sleep = staticmethod(waits.append)

    monkeypatch.setattr(hub_faults, "time", Clock)
    return waits


class Handler(BaseHTTPRequestHandler):
    """Answer one connection's requests, on either port."""

    hub: HubServer
    server_name: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer, or fail as was asked."""
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked = Request(self.server_name, self.command, unquote(url.path), headers, self.client_address[1])
        if self.asked.path != "/api/agent-harnesses":  # huggingface_hub 2 asks this once a day, for its own ends
            self.hub.requests.append(self.asked)
        self.fault = self.hub.next_fault(self.asked.path)
        length = int(self.headers["Content-Length"] or 0)
        if self.fault.hold:
            self.fault.hold.wait()
        self.asked.body = self.rfile.read(length if self.fault.take is None else min(length, self.fault.take))
        if self.fault.take is not None:
            self.close_connection = True
        elif self.fault.status:
            self._send(Answer(self.fault.status, self.fault.body or b""))
        else:
            self._send(self._cdn(url) if self.server_name == "cdn" else self._hub(url))

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *given: object) -> None:
        """Say nothing."""

    def _hub(self, url: SplitResult) -> Answer:
        api = re.fullmatch(r"/api/(?:models/)?(.+?)(?:/(revision|tree|paths-info)/([^/]+)(/.+)?)?", url.path)
        resolve = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path)
        if not api and not resolve:
            return error_answer(404, "", "no such route")
        repo_id, revision = (api[1], unquote(api[3] or "main")) if api else (resolve[1], unquote(resolve[2]))
        repo = self.hub.repos.get(repo_id)
        if not repo or (repo.private and "authorization" not in self.asked.headers):
            return error_answer(401 if repo else 404, "RepoNotFound", "Repository not found")
        if revision not in {repo.commit, *repo.revisions}:
            return error_answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if resolve:
            return self._resolve(repo_id, repo, unquote(resolve[3]))
        if api[2] == "tree":
            return json_answer([file for file in repo.files if file["path"].startswith(unquote(api[4] or "/")[1:])])
        if api[2] == "paths-info":
            return json_answer([entry for path in parse_qs(self.asked.body.decode())["paths"] if (entry := _entry(repo, path))])
        return self._info(repo_id, repo, "blobs" in parse_qs(url.query))

    def _info(self, repo_id: str, repo: Repo, blobs: bool) -> Answer:
        siblings = []
        for file in repo.files:
            lfs = {"lfs": {"sha256": file["lfs"]["oid"], **file["lfs"]}} if "lfs" in file else {}
            siblings.append({"rfilename": file["path"], **({"size": file["size"], "blobId": file["oid"], **lfs} if blobs else {})})
        return json_answer(
            {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": repo.commit, "private": repo.private, "siblings": siblings}
        )

    def _resolve(self, repo_id: str, repo: Repo, path: str) -> Answer:
        file = next((file for file in repo.files if file["path"] == path), None)
        if not file:
            return error_answer(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{file["oid"]}"'}
        if "lfs" not in file:
            return self._range(repo.folder / path, headers)
        location = f"{self.hub.cdn}/cdn/{quote(repo_id)}/{quote(path)}?Signature={self.hub.signature}"
        headers |= {"Location": location, "X-Linked-Etag": f'"{file["lfs"]["oid"]}"', "X-Linked-Size": str(file["size"])}
        return Answer(302, b"Found. Redirecting", headers)

    def _cdn(self, url: SplitResult) -> Answer:
        if parse_qs(url.query).get("Signature") != [str(self.hub.signature)]:
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        repo_id = next(repo_id for repo_id in self.hub.repos if self.asked.path.startswith(f"/cdn/{repo_id}/"))
        return self._range(self.hub.repos[repo_id].folder / self.asked.path.removeprefix(f"/cdn/{repo_id}/"), {})

    def _range(self, file: Path, headers: dict[str, str]) -> Answer:
        content = file.read_bytes() if self.fault.body is None else self.fault.body
        if not self.asked.range or self.fault.ignore_range:
            return Answer(200, content, headers)
        start, end = self.asked.range[0] + self.fault.shift, min(self.asked.range[1] + self.fault.shift, len(content))
        if start >= len(content):
            return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        return Answer(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    def _send(self, answer: Answer) -> None:
        self.asked.status = answer.status
        self.send_response(answer.status)
        headers = {**answer.headers, "Content-Length": str(len(answer.body) + self.fault.lie), **self.fault.headers}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer.body[: self.fault.drop_after])
        if self.fault.lie or self.fault.drop_after is not None or headers["Content-Length"] is None:
            self.close_connection = True

    def _send_body(self, body: bytes) -> None:
        step = 4096 if self.fault.pause else max(1, len(body))
        for start in range(0, len(body), step):
            time.sleep(self.fault.pause)
            self.asked.sent += len(body[start : start + step])  # first, for the client may look as soon as it has the bytes
            self.wfile.write(body[start : start + step])


def _entry(repo: Repo, path: str) -> dict | None:
    """Describe a file or a folder as the API does, if it is there."""
    folder = {"type": "directory", "path": path, "oid": repo.commit}
    inside = any(file["path"].startswith(f"{path}/") for file in repo.files)
    return next((file for file in repo.files if file["path"] == path), folder if inside else None)


def json_answer(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def error_answer(status: int, code: str, message: str) -> Answer:
    return Answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})
