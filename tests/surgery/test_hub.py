"""A Hub repo gives exactly the bytes that were asked for and fetches no others, through every fault of a network; or says what to do."""

import json
import os
import random
import re
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import close_session

from downcycle import DowncycleError, keep_layers, open_checkpoint, plan_write, write
from downcycle.surgery import hub as hub_module
from downcycle.surgery import hub_faults, transfer
from downcycle.surgery.hub import READ_ATTEMPTS, open_hub

from hub_server import connected, skip_waits

REPO = "ann/Tiny-Llama"
TOKEN = "hf_doNotTellAnyone"
WEIGHTS = random.Random(1).randbytes(300_000)
SIZE = len(WEIGHTS)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that huggingface_hub takes for its own, with an empty cache and a token, and waits too short to notice."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with connected(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """What the repo holds: weights that a CDN serves, and small files that the Hub itself serves."""
    folder = tmp_path / "repo"
    (folder / "templates").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "empty").write_bytes(b"")
    (folder / "templates" / "tool use #1.jinja").write_bytes(b"{{ x }}" * 50)
    return folder


@pytest.fixture
def repo(hub, folder):
    hub.add(REPO, folder, revisions={"v1", "refs/pr/3"})
    return open_hub(REPO)


def copy(source, start, length, tmp_path):
    """Copy weights between two marks; return what lies between them and the steps that were reported."""
    steps = []
    with open(tmp_path / "into", "wb+") as into:
        into.write(b"<" * 10 + b"." * length + b">" * 10)
        into.flush()
        try:
            source.copy("model.safetensors", start, length, into.fileno(), 10, steps.append)
        finally:
            into.seek(0)
            written = into.read()
            assert (written[:10], written[10 + length :]) == (b"<" * 10, b">" * 10)
    return written[10 : 10 + length], steps


def line(call, *arguments):
    """The one line of what a call must refuse with."""
    with pytest.raises(DowncycleError) as refused:
        call(*arguments)
    text = str(refused.value)
    assert "\n" not in text
    assert not re.search(f"{TOKEN}|Signature=", "".join(traceback.format_exception(refused.value)))
    return text


def test_opening_asks_once_and_pins_the_commit(hub, folder):
    commit = hub.add(REPO, folder, revisions={"v1", "refs/pr/3"})
    for revision in (None, "main", "v1", "refs/pr/3", commit):
        hub.requests.clear()
        repo = open_hub(REPO, revision)
        assert (repo.name, repo.revision) == (REPO, commit)
        assert len(hub.requests) == 1
    assert repo.connections > 1
    assert repo.files == {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert not any(map(repo.local_path, repo.files))


def test_identity_follows_content(hub, folder):
    hub.add(REPO, folder)
    before = {path: open_hub(REPO).identity(path) for path in ("model.safetensors", "config.json", "empty")}
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    (folder / "config.json").write_text('{"a": 2}')
    hub.add(REPO, folder)
    after = {path: open_hub(REPO).identity(path) for path in before}
    assert [path for path in before if before[path] == after[path]] == ["empty"]
    assert len(set(before.values())) == 3


@pytest.mark.parametrize(("start", "length"), [(0, SIZE), (0, 8), (SIZE - 1, 1), (7, 77_777), (SIZE, 0)])
def test_ranges_are_exact_and_nothing_else_travels(hub, repo, tmp_path, start, length):
    expected = WEIGHTS[start : start + length]
    assert repo.read("model.safetensors", start, length) == expected
    written, steps = copy(repo, start, length, tmp_path)
    assert (written, sum(steps)) == (expected, length)
    assert hub.sent("/cdn/*") == 2 * length
    assert {request.range for request in hub.asked("/cdn/*")} <= {(start, start + length)}


def test_small_files_and_odd_names(repo, folder):
    for path, size in repo.files.items():
        assert repo.read(path, 0, size) == (folder / path).read_bytes()
    assert repo.read("templates/tool use #1.jinja", 7, 14) == b"{{ x }}" * 2


def test_copies_stream(hub, folder, tmp_path):
    big = random.Random(2).randbytes(8 << 20)
    (folder / "model.safetensors").write_bytes(big)
    hub.add(REPO, folder)
    written, steps = copy(open_hub(REPO), 1, len(big) - 1, tmp_path)
    assert written == big[1:]
    assert max(steps) <= 1 << 20


def test_threads_share_a_repo_and_its_redirect(hub, repo, tmp_path):
    hub.fail("/cdn/*", times=4, drop_after=1000)
    pieces = list(range(0, SIZE, 10_000))
    with open(tmp_path / "into", "wb+") as into, ThreadPoolExecutor(repo.connections) as pool:

        def fetch(at):
            repo.copy("model.safetensors", at, min(10_000, SIZE - at), into.fileno(), at, lambda count: None)

        list(pool.map(fetch, pieces))
        assert into.read() == WEIGHTS
    assert hub.sent("/cdn/*") == SIZE
    assert len(hub.asked("*/resolve/*")) <= repo.connections + 2 * 4


@pytest.mark.parametrize("after", [0, 1, 10_000])
def test_a_dropped_connection_goes_on_from_its_last_byte(hub, repo, tmp_path, after):
    hub.fail("/cdn/*", times=READ_ATTEMPTS - 1, drop_after=after)
    written, steps = copy(repo, 1000, 200_000, tmp_path)
    assert written == WEIGHTS[1000:201_000]
    assert sum(steps) == hub.sent("/cdn/*") == 200_000
    reached = [request.range for request in hub.asked("/cdn/*")]
    assert reached == [(1000 + after * i, 201_000) for i in range(READ_ATTEMPTS)]


def test_only_attempts_without_a_byte_are_counted(hub, repo, tmp_path):
    hub.fail("/cdn/*", times=5 * READ_ATTEMPTS, drop_after=5000)
    assert copy(repo, 0, SIZE, tmp_path)[0] == WEIGHTS
    assert hub.sent("/cdn/*") == SIZE


def test_a_slow_link_is_not_a_dead_one(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.fail("/cdn/*", times=1, pause=0.02)
    assert repo.read("model.safetensors", 0, 80_000) == WEIGHTS[:80_000]
    assert len(hub.asked("/cdn/*")) == 1


def test_a_stalled_link_is_dropped(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.fail("/cdn/*", times=1, pause=0.5)
    assert repo.read("model.safetensors", 0, 5000) == WEIGHTS[:5000]
    monkeypatch.setattr(hub_module, "READ_ATTEMPTS", 2)
    hub.fail("/cdn/*", pause=0.5)
    assert "no connection to 127.0.0.1 (timed out), 2 times in a row; check the network" in line(repo.read, "model.safetensors", 0, 5000)


UNFIT = {
    "ignores the range": {"ignore_range": True},
    "another range": {"shift": 100},
    "too long a length": {"lie": 7},
    "too short a length": {"lie": -7},
    "another file": {"body": WEIGHTS + b"more"},
    "a shorter file": {"body": WEIGHTS[:2000]},
    "no length, cut short": {"headers": {"Content-Length": None}, "drop_after": 0},
    "compressed": {"headers": {"Content-Encoding": "gzip"}},
    "no range said": {"headers": {"Content-Range": None}},
    "no content": {"status": 204},
    "a page of a proxy": {"status": 200, "body": b"<html>Please log in</html>", "headers": {"Content-Type": "text/html"}},
    "too many bytes": {"status": 206, "body": b"!" * 6000, "headers": {"Content-Range": f"bytes 1000-5999/{SIZE}", "Content-Length": None}},
    "not modified": {"status": 304},
    "a redirect to itself": {"status": 302, "headers": {"Location": "/cdn/loop"}},
}


@pytest.mark.parametrize("fault", UNFIT.values(), ids=UNFIT)
def test_a_wrong_answer_is_never_written(hub, repo, tmp_path, fault):
    hub.fail("/cdn/*", times=2, **fault)
    assert copy(repo, 1000, 5000, tmp_path)[0] == WEIGHTS[1000:6000]
    hub.fail("/cdn/*", **fault)
    text = line(copy, repo, 1000, 5000, tmp_path)
    assert (tmp_path / "into").read_bytes() == b"<" * 10 + b"." * 5000 + b">" * 10
    assert text.startswith(f"{REPO}/model.safetensors: 127.0.0.1") or "no connection to 127.0.0.1" in text
    assert f"{READ_ATTEMPTS} times in a row" in text


def test_a_whole_file_may_come_without_a_range(hub, repo):
    hub.fail("*", ignore_range=True)
    assert repo.read("model.safetensors", 0, SIZE) == WEIGHTS
    assert repo.read("config.json", 0, 8) == b'{"a": 1}'


def test_ranges_beyond_the_file_are_refused_unasked(hub, repo):
    hub.requests.clear()
    for path, start, length in (("model.safetensors", SIZE, 1), ("model.safetensors", -1, 5), ("nothing", 0, 1)):
        assert "truncated" in line(repo.read, path, start, length)
    assert not hub.requests


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 429])
def test_passing_faults_pass(hub, repo, status):
    hub.fail("*", times=3, status=status)
    assert repo.read("model.safetensors", 5, 50) == WEIGHTS[5:55]
    hub.fail("*", times=2, status=status)
    assert open_hub(REPO).files == repo.files


def test_lasting_faults_are_given_up(hub, repo):
    hub.fail("/cdn/*", status=503)
    hub.requests.clear()
    text = line(repo.read, "model.safetensors", 0, 5)
    assert text == f"{REPO}/model.safetensors: 127.0.0.1 fails (503), {READ_ATTEMPTS} times in a row; try again later"
    assert len(hub.asked("/cdn/*")) == READ_ATTEMPTS
    hub.fail("/api/*", status=500)
    assert "fails (500), 3 times in a row" in line(open_hub, REPO)


@pytest.fixture
def slept(monkeypatch):
    """Let waits pass at once; list them."""
    return skip_waits(monkeypatch)


def test_waits_grow_and_differ(hub, repo, slept, monkeypatch):
    monkeypatch.setattr(hub_faults, "FIRST_WAIT", 1)
    spans = []
    for _ in range(5):
        hub.fail("/cdn/*", times=4, status=500)
        slept.clear()
        repo.read("model.safetensors", 0, 5)
        spans.append(sum(slept))
    assert 15 / 2 <= min(spans) < max(spans) <= 15
    assert max(slept) <= 1


ASKED = {
    "seconds": (429, lambda: {"Retry-After": "7"}, 7),
    "seconds of a failing server": (503, lambda: {"Retry-After": "300"}, 300),
    "date": (503, lambda: {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=101), usegmt=True)}, 100),
    "date gone by": (429, lambda: {"Retry-After": format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)}, 0),
    "rate limit": (429, lambda: {"RateLimit": '"resolvers";r=0;t=55', "Retry-After": "5"}, 55),
    "rate limit not reached": (429, lambda: {"RateLimit": '"resolvers";r=9;t=55', "Retry-After": "5"}, 5),
    "nonsense": (503, lambda: {"Retry-After": "soon"}, 0),
    "not for others": (500, lambda: {"Retry-After": "7"}, 0),
}


@pytest.mark.parametrize(("status", "headers", "seconds"), ASKED.values(), ids=ASKED)
def test_the_wait_that_a_server_asks_for_is_kept(hub, repo, slept, status, headers, seconds):
    hub.fail("*/resolve/*", times=1, status=status, headers=headers())
    assert repo.read("config.json", 0, 3) == b'{"a'
    assert seconds <= sum(slept) < seconds + 1.1


def test_a_wait_beyond_patience_is_told(hub, repo, slept):
    hub.fail("*/resolve/*", status=429, headers={"Retry-After": "3600"})
    assert "limits the rate of requests (429); wait 3600 s, or run `hf auth login`" in line(repo.read, "config.json", 0, 3)


def test_a_wait_ends_when_the_work_is_stopped(hub, repo, slept, tmp_path):
    def stop(count):
        raise InterruptedError

    hub.fail("/cdn/*", status=503, headers={"Retry-After": "300"})
    with open(tmp_path / "into", "wb") as into, pytest.raises(InterruptedError):
        repo.copy("model.safetensors", 0, 100, into.fileno(), 0, stop)


REFUSALS = [
    (403, "GatedRepo", r"^ann/Tiny-Llama is gated: ask for access at http://127\.0\.0\.1:\d+/ann/Tiny-Llama, then run `hf auth login`$"),
    (401, "GatedRepo", "is gated: ask for access"),
    (401, "RepoNotFound", "no public model .* check it, or run `hf auth login` if it is private"),
    (404, "RepoNotFound", "no public model"),
    (404, "RevisionNotFound", "has no revision .*; see http://.*/ann/Tiny-Llama/commits/main"),
    (401, "", r"wants a valid token \(401\); run `hf auth login`, or set HF_TOKEN"),
    (403, "", r"forbids it to this token \(403\); let it read the repo at http://.*/settings/tokens"),
    (400, "", "answered 400; check HF_ENDPOINT"),
    (416, "", "answered 416"),
]


@pytest.mark.parametrize(("status", "code", "expected"), REFUSALS)
def test_refusals_say_what_to_do_at_once(hub, repo, status, code, expected):
    hub.fail(
        "*", status=status, headers={"X-Error-Code": code, "X-Error-Message": f"no, {TOKEN}"}, body=json.dumps({"error": TOKEN}).encode()
    )
    hub.requests.clear()
    assert re.search(expected, line(open_hub, REPO))
    assert re.search(expected, line(repo.read, "config.json", 0, 5))
    assert len(hub.requests) == 2


def test_more_refusals(hub, repo, folder):
    assert line(open_hub, REPO, "v9").startswith(f"{REPO} has no revision v9; see {hub.endpoint}/{REPO}")
    assert line(open_hub, "ann/nothing").startswith(f"ann/nothing: no such folder, and no public model at {hub.endpoint}")
    hub.add("ann/secret", folder, private=True)
    assert open_hub("ann/secret").read("config.json", 0, 3) == b'{"a'
    del hub.repos[REPO].files[0]
    assert "/config.json: not there at" in line(repo.read, "config.json", 0, 3)
    hub.fail("*", status=403, headers={"X-Error-Message": "Access to this resource is disabled."})
    assert "has disabled access to it" in line(open_hub, REPO)


def test_without_a_token_private_repos_are_missing(hub, folder, monkeypatch, tmp_path):
    hub.add("ann/secret", folder, private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "or run `hf auth login` if it is private" in line(open_hub, "ann/secret")


@pytest.mark.parametrize("repo_id", ["a/b/c", "-a/b", "a--b", "a..b", "", "a b", "a/b.git", "https://huggingface.co/a/b"])
def test_bad_ids(hub, repo_id):
    assert line(open_hub, repo_id) == f"{repo_id}: no such folder, and not a Hub id (USER/NAME); check the spelling"
    assert not hub.requests


@pytest.mark.parametrize("token", ["hf_ two words", "hf_“quoted”", "hf_zero\u200bwidth"])
def test_bad_tokens_are_not_sent_nor_shown(hub, folder, monkeypatch, token):
    hub.add(REPO, folder)
    monkeypatch.setenv("HF_TOKEN", token)
    text = line(open_hub, REPO)
    assert "run `hf auth login` again" in text and token not in text and token[3:] not in text
    assert not hub.requests


def test_the_token_goes_to_the_endpoint_only(hub, repo, folder):
    repo.read("model.safetensors", 0, 10)
    hub.add("ann/renamed", folder)
    hub.fail(f"/{REPO}/resolve/*/config.json", status=307, headers={"Location": "/ann/renamed/resolve/main/config.json"})
    assert repo.read("config.json", 0, 3) == b'{"a'
    assert hub.asked(server="cdn")
    assert all("authorization" not in request.headers and TOKEN not in str(request) for request in hub.asked(server="cdn"))
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in hub.asked(server="hub"))


def test_signed_links_are_kept_until_they_expire(hub, repo):
    for at in range(5):
        repo.read("model.safetensors", at, 10)
    assert len(hub.asked("*/resolve/*")) == 1
    hub.expire()
    assert repo.read("model.safetensors", 50, 10) == WEIGHTS[50:60]
    assert [request.path for request in hub.asked("*/resolve/*")] == [f"/{REPO}/resolve/{repo.revision}/model.safetensors"] * 2
    assert len({request.connection for request in hub.asked(server="hub")}) == 1
    hub.fail("/cdn/*", status=403)
    assert f"127.0.0.1 refused the signed link (403), {READ_ATTEMPTS} times in a row" in line(repo.read, "model.safetensors", 0, 10)


NOT_A_HUB = {
    "html": b"<html>hello</html>",
    "a list": b"[]",
    "no id": b"{}",
    "no commit": b'{"id": "ann/Tiny-Llama", "siblings": []}',
    "no sizes": b'{"id": "ann/Tiny-Llama", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}' % (b"a" * 40),
    "a way out": b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": "../x.model", "size": 1, "blobId": "b"}]}' % (b"a" * 40),
}


@pytest.mark.parametrize("body", NOT_A_HUB.values(), ids=NOT_A_HUB)
def test_something_else_than_a_hub(hub, body):
    hub.fail("*", status=200, body=body)
    assert line(open_hub, REPO) == f"{REPO}: {hub.endpoint} does not answer as the Hub does; check HF_ENDPOINT and the proxy"


def test_nobody_there(hub, repo, monkeypatch):
    hub.__exit__()
    close_session()
    monkeypatch.setattr(hub_module, "READ_ATTEMPTS", 2)
    expected = "no connection to 127.0.0.1 (Connection refused), 2 times in a row; check the network and proxy, or set HF_HUB_OFFLINE=1"
    assert expected in line(repo.read, "model.safetensors", 0, 5)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//user:secret@"))
    text = line(open_hub, REPO)
    assert "(Connection refused), 3 times in a row" in text and "secret" not in text


@pytest.mark.parametrize("address", ["huggingface.co", "ftp://huggingface.co", "", "http://"])
def test_bad_endpoints(hub, monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert line(open_hub, REPO).startswith(f"HF_ENDPOINT={address}: not an address; set it to one such as https://huggingface.co")


def fill_cache(hub, **options):
    """Let huggingface_hub make the cache as it always does."""
    snapshot = Path(snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=constants.HF_HUB_CACHE, **options))
    hub.requests.clear()
    return snapshot


@pytest.fixture
def sharded(hub, make, tmp_path):
    """A repo in three shards, and its tensors."""
    tensors = make(tmp_path / "sharded", layers=6, hidden=16, shards=3)
    hub.add(REPO, tmp_path / "sharded", revisions={"v1"})
    return tensors


def test_cached_files_are_read_where_they_are(hub, sharded, tmp_path):
    snapshot = fill_cache(hub)
    repo = open_hub(REPO)
    assert repo.revision == snapshot.name
    for path, size in repo.files.items():
        assert repo.local_path(path) == snapshot / path
        assert repo.read(path, 1, size - 1) == (tmp_path / "sharded" / path).read_bytes()[1:]
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}"]


def test_a_partial_cache_is_no_whole_one(hub, sharded, tmp_path):
    fill_cache(hub, allow_patterns=["config.json", "*-00001-of-*", "*-00002-of-*"])
    broken = Path(open_hub(REPO).local_path("model-00002-of-00003.safetensors"))
    os.truncate(broken, broken.stat().st_size - 1)
    repo = open_hub(REPO)
    assert {path for path in repo.files if repo.local_path(path)} == {"config.json", "model-00001-of-00003.safetensors"}
    for path, size in repo.files.items():
        assert repo.read(path, 0, size) == (tmp_path / "sharded" / path).read_bytes()
    assert not hub.asked("*/config.json") and not hub.asked("*-00001-of-*") and hub.asked("*-00002-of-*")


def test_a_cache_of_another_commit_is_not_used(hub, sharded, tmp_path):
    fill_cache(hub)
    (tmp_path / "sharded" / "config.json").write_text("{}")
    hub.add(REPO, tmp_path / "sharded")
    assert not any(map(open_hub(REPO).local_path, open_hub(REPO).files))


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_offline_a_whole_cache_serves(hub, sharded, monkeypatch, read_back, revision):
    snapshot = fill_cache(hub, revision=revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for wanted in (revision, snapshot.name):
        source = open_hub(REPO, wanted)
        assert (source.name, source.revision, source.local_path("config.json")) == (REPO, snapshot.name, snapshot / "config.json")
    assert {name: tensor.nbytes for name, tensor in open_checkpoint(REPO, revision).tensors.items()} == {
        name: len(tensor.data) for name, tensor in sharded.items()
    }
    assert not hub.requests


LACKING = {
    "a shard": (["*.json", "*-00001-of-*", "*-00002-of-*"], "lacks model-00003-of-00003.safetensors;"),
    "two shards": (["*.json", "*-00001-of-*"], "lacks model-00002-of-00003.safetensors and 1 more files;"),
    "the index": (["config.json", "*.safetensors"], "lacks model.safetensors;"),
    "the config": (["*.safetensors"], "lacks config.json;"),
}


@pytest.mark.parametrize(("patterns", "expected"), LACKING.values(), ids=LACKING)
def test_offline_a_partial_cache_is_refused(hub, sharded, monkeypatch, patterns, expected):
    fill_cache(hub, allow_patterns=patterns)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = line(open_hub, REPO)
    assert expected in text and f"unset it, or run `hf download {REPO}` when online" in text
    assert not hub.requests


def test_offline_damage_and_absence_are_refused(hub, sharded, monkeypatch):
    snapshot = fill_cache(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "lacks config.json" in line(open_hub, REPO, "v2")
    assert "lacks config.json" in line(open_hub, "ann/other")
    (snapshot / "model-00001-of-00003.safetensors").resolve().unlink()
    assert "lacks model-00001-of-00003.safetensors" in line(open_hub, REPO)
    (snapshot / "model.safetensors.index.json").resolve().write_text('{"weight_map": 1}')
    assert "lacks model.safetensors.index.json" in line(open_hub, REPO)


def test_settings_of_the_environment_are_honoured(hub, folder, tmp_path):
    hub.add(REPO, folder)
    program = "import sys; from downcycle.surgery.hub import open_hub; print(open_hub(sys.argv[1]).read('config.json', 0, 8))"
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    for offline in ("0", "1"):
        environment = os.environ | settings | {"HF_HUB_OFFLINE": offline}
        ran = subprocess.run([sys.executable, "-c", program, REPO], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert (ran.stdout == "b'{\"a\": 1}'\n") == (offline == "0"), ran.stderr
        assert ("HF_HUB_OFFLINE is set and the cache" in ran.stderr) == (offline == "1")
    assert hub.asked("*/resolve/*")[0].headers["user-agent"].startswith("downcycle")


def spans(folder):
    """Where each tensor lies: file, first byte and the one after the last; headers too. Read from the files, not by the package."""
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        found[file.name] = (file.name, 0, head)
        for name, entry in json.loads(content[8:head]).items():
            if name != "__metadata__":
                found[name] = (file.name, *(head + offset for offset in entry["data_offsets"]))
    return found


def requested(hub, folder):
    """The names of all tensors and headers of which a byte was asked for, or sent."""
    asked = [(request.path.rpartition("/")[2], *request.range) for request in hub.asked("*.safetensors")]
    return {
        name
        for name, (file, start, end) in spans(folder).items()
        if any(file == other and first < end and start < last for other, first, last in asked)
    }


def test_a_cut_fetches_what_it_keeps_and_no_byte_of_a_dropped_layer(hub, sharded, tmp_path, read_back, cut_by_hand):
    child = keep_layers(open_checkpoint(REPO), [0, 3, 4])
    headers = sum(end - start for name, (_, start, end) in spans(tmp_path / "sharded").items() if name.endswith(".safetensors"))
    assert hub.sent("/cdn/*.safetensors") == headers
    plan = plan_write(child)
    write(child, tmp_path / "child")
    expected = cut_by_hand(sharded, [0, 3, 4])
    assert read_back(tmp_path / "child") == expected
    kept = sum(len(tensor.data) for tensor in expected.values())
    small = sum(path.stat().st_size for path in (tmp_path / "sharded").glob("*.j*"))
    assert hub.sent("*.safetensors") - len(b"Found. Redirecting") * len(hub.asked("/ann/*.safetensors")) == kept + headers
    assert hub.sent("/cdn/*") <= kept + headers + small
    assert plan.download_bytes <= kept + small
    dropped = re.compile(r"model\.layers\.[125]\.")
    assert requested(hub, tmp_path / "sharded") == {name for name in spans(tmp_path / "sharded") if not dropped.match(name)}
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_cut_survives_a_bad_network(hub, sharded, tmp_path, read_back, cut_by_hand):
    for fault in ({"drop_after": 100}, {"status": 503}, {"shift": 1}, {"ignore_range": True}, {"lie": 3}):
        hub.fail("*.safetensors", times=3, **fault)
    write(keep_layers(open_checkpoint(REPO, "v1"), [5, 1]), tmp_path / "child")
    assert read_back(tmp_path / "child") == cut_by_hand(sharded, [5, 1])


def test_a_cut_that_broke_off_goes_on(hub, sharded, tmp_path, monkeypatch, read_back, cut_by_hand):
    monkeypatch.setattr(transfer, "PIECE", 1000)
    monkeypatch.setattr(hub_module.HubRepo, "connections", 1)
    child = keep_layers(open_checkpoint(REPO), [0, 1, 2, 3])
    read = hub.sent("/cdn/*.safetensors")
    hub.faults.clear()
    hub.fail("/cdn/*-00003-of-*.safetensors", status=500)
    with pytest.raises(DowncycleError, match="fails .500."):
        write(child, tmp_path / "child")
    assert not (tmp_path / "child").exists()
    done = hub.sent("/cdn/*.safetensors") - read
    assert done > 1000
    hub.faults.clear()
    write(keep_layers(open_checkpoint(REPO), [0, 1, 2, 3]), tmp_path / "child")
    assert read_back(tmp_path / "child") == cut_by_hand(sharded, [0, 1, 2, 3])
    kept = sum(len(tensor.data) for tensor in cut_by_hand(sharded, [0, 1, 2, 3]).values())
    assert hub.sent("/cdn/*.safetensors") <= kept + 2 * read + 1000


def test_a_cached_parent_is_cut_without_a_byte_of_weights(hub, sharded, tmp_path, read_back, cut_by_hand):
    fill_cache(hub)
    child = keep_layers(open_checkpoint(REPO), [0, 5])
    assert plan_write(child).download_bytes == 0
    write(child, tmp_path / "child")
    assert read_back(tmp_path / "child") == cut_by_hand(sharded, [0, 5])
    assert {request.path for request in hub.requests} == {f"/api/models/{REPO}"}


def test_the_command_says_one_line(hub, folder, refused):
    hub.add(REPO, folder)
    hub.fail("*/resolve/*", status=403, headers={"X-Error-Code": "GatedRepo"})
    assert "is gated: ask for access at" in refused("inspect", REPO)
