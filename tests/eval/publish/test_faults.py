"""When a push fails it tries again where that helps, waits as it is asked to, and else says in one line what to do."""

import re
from hashlib import sha256

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session, get_session

from downcycle.eval.publish.connection import REPEATS
from downcycle.eval.publish.faults import ATTEMPTS, plain
from downcycle.eval.publish.files import plan_push
from downcycle.eval.publish.push import push

from upload_server import SIGNATURE, Content

REPO = "ann/small"
ROUTES = {
    "look": f"/api/models/{REPO}",
    "create": "/api/repos/create",
    "validate": "/api/validate-yaml",
    "preupload": f"/api/models/{REPO}/preupload/main",
    "batch": f"/{REPO}.git/info/lfs/objects/batch",
    "store": "/store/*",
    "complete": f"/{REPO}/complete/*",
    "verify": f"/{REPO}.git/info/lfs/objects/verify",
    "commit": f"/api/models/{REPO}/commit/main",
    "look again": f"/api/models/{REPO}/revision/*",
}
ENDLESS = [route for route in ROUTES if route not in ("verify", "look again")]  # after these, the next attempt finds all there
TOLD = [
    (401, r"^ann/small: 127\.0\.0\.1 wants a valid token \(401\); run `hf auth login`, or set HF_TOKEN$"),
    (403, r"forbids it \(403: no\); give the token the right to write to ann at http://127\.0\.0\.1:\d+/settings/tokens"),
    (404, r"does not find it \(404\); check ann"),
    (400, r"refuses it \(400: no\); check HF_ENDPOINT"),
    (413, r"takes nothing of this size \(413\); write the model with a smaller --max-shard-size"),
]


@pytest.fixture
def plan(model):
    return plan_push(model, REPO)


@pytest.fixture
def arrived(hub, plan, files_of):
    return lambda: hub.content(REPO) == files_of(plan.folder)


def fail(hub, route, times=None, **fault):
    hub.parts_from, hub.part = (20_000, 7_000) if route == "complete" else (hub.parts_from, hub.part)
    hub.fail(ROUTES[route], times=times, **fault)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("status", [503, 429])
def test_what_passes_is_waited_for(hub, plan, arrived, waits, route, status):
    fail(hub, route, times=2, status=status, headers={"Retry-After": "7"})
    assert push(plan).new_files == len(plan.files)
    assert arrived() and waits
    assert len(hub.pushed[REPO].branches["main"]) == 2
    assert sum(waits) >= 7


@pytest.mark.parametrize("route", ENDLESS)
def test_what_does_not_pass_is_told(hub, plan, line, waits, route):
    fail(hub, route, status=500)
    text = line(push, plan)
    assert text.startswith(f"{REPO}: 127.0.0.1 fails (500), {ATTEMPTS} times in a row; try again later: what has arrived stays there")


def test_storage_that_fails_for_ever_is_not_asked_for_ever(hub, plan, line, waits):
    fail(hub, "store", status=503)
    assert f"fails (503), {ATTEMPTS} times in a row" in line(push, plan)
    files = 5  # that are large, and may be sent at once
    assert len(hub.asked(ROUTES["store"])) <= REPEATS + ATTEMPTS * files
    hub.faults.clear()
    push(plan)
    assert len(hub.objects) == files


@pytest.mark.parametrize("route", ["create", "preupload", "store", "complete", "verify", "commit"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_connection_that_breaks_is_made_again(hub, plan, arrived, waits, route, times):
    fail(hub, route, times=times, take=0)
    push(plan)
    assert arrived()


@pytest.mark.parametrize("route", ["look", "create", "batch", "commit"])
@pytest.mark.parametrize(("status", "expected"), TOLD, ids=[str(status) for status, _ in TOLD])
def test_refusals_say_what_to_do_at_once(hub, plan, line, waits, route, status, expected):
    if (route, status) == ("look", 404):
        return  # says that the repo is to be made
    fail(hub, route, status=status, headers={"X-Error-Message": "no"})
    assert re.search(expected, line(push, plan))
    assert len(hub.asked(ROUTES[route])) == 1 and not waits
    assert hub.content(REPO) == {} if REPO in hub.pushed else True


def test_a_token_that_is_none(hub, plan, line, waits):
    hub.token = "hf_another"
    assert "wants a valid token (401)" in line(push, plan)
    assert len(hub.requests) == 1


def test_a_token_that_is_none_in_the_hubs_other_words(hub, plan, line, waits):
    fail(hub, "look", status=401, headers={"X-Error-Code": "RepoNotFound"})
    assert "wants a valid token (401)" in line(push, plan)
    assert len(hub.requests) == 1


def test_the_name_of_another(hub, model, line):
    text = line(push, plan_push(model, "bob/small"))
    assert "forbids it (403: You don't have the rights to create a model under the namespace bob)" in text
    assert "write to bob" in text
    hub.add_repo("bob/small")
    assert "write to bob" in line(push, plan_push(model, "bob/small"))
    assert hub.content("bob/small") == {}


def test_a_name_that_is_taken_otherwise(hub, plan, line, waits):
    fail(hub, "create", status=409, body=b'{"error": "Cannot create repo: another conflicting operation is in progress"}')
    assert f"sees a conflict (409), {ATTEMPTS} times in a row; wait for" in line(push, plan)
    assert len(hub.asked("/api/repos/create")) == ATTEMPTS


def test_a_repo_that_another_makes_meanwhile(hub, plan, arrived, waits):
    hub.meanwhile("/api/repos/create", lambda: hub.add_repo(REPO))
    push(plan)
    assert arrived()


def test_a_repo_that_another_makes_public_meanwhile(hub, plan, line, waits):
    hub.meanwhile("/api/repos/create", lambda: hub.add_repo(REPO))
    assert "is there and public" in line(push, plan, private=True)
    assert hub.content(REPO) == {}


def test_commits_of_others(hub, plan, files_of, line, waits):
    hub.add_repo(REPO)
    hub.meanwhile(ROUTES["commit"], lambda: hub.pushed[REPO].add("main", {"theirs.txt": Content(b"1", False)}))
    done = push(plan)
    assert done.others == ("theirs.txt",)
    assert hub.content(REPO) == files_of(plan.folder) | {"theirs.txt": b"1"}
    hub.add_repo(REPO)
    for number in range(ATTEMPTS):
        hub.meanwhile(ROUTES["commit"], lambda number=number: hub.pushed[REPO].add("main", {f"{number}.txt": Content(b"1", False)}))
    assert f"others commit to it at this moment (412), {ATTEMPTS} times in a row" in line(push, plan)


ASKED = [({"Retry-After": "100000"}, "28 h"), ({"RateLimit": '"api";r=0;t=900'}, "15 min"), ({"Retry-After": "321"}, "321 s")]


@pytest.mark.parametrize(("headers", "span"), ASKED)
@pytest.mark.parametrize("route", ["look", "create", "preupload", "store", "commit"])
def test_a_wait_beyond_patience_is_told(hub, plan, line, waits, route, headers, span):
    fail(hub, route, status=429, headers=headers)
    assert f"limits the rate of requests (429); wait {span}: what has arrived stays there" in line(push, plan)
    assert not waits


def test_a_wait_is_said(hub, plan, line, waits):
    fail(hub, "batch", times=1, status=429, headers={"RateLimit": '"api";r=0;t=55'})
    fail(hub, "commit", times=1, take=0)
    said = []
    push(plan, say=said.append)
    assert said == ["waiting 55 s, as the Hub asks", "the upload broke off; trying again"]
    hub.fail("*", status=403)
    line(push, plan, say=said.append)
    assert len(said) == 2


@pytest.mark.parametrize("route", ["look", "preupload", "batch", "commit"])
@pytest.mark.parametrize(
    "body", [b"<html>please log in</html>", b"{}", b"[]", b'{"files": 1, "objects": 1}'], ids=["html", "empty", "list", "odd"]
)
def test_something_else_than_a_hub(hub, plan, line, waits, route, body):
    fail(hub, route, status=200, body=body)
    text = line(push, plan)
    assert text.startswith(f"{REPO}: ") and ("not one of the Hub" in text or "refused: " in text), text
    assert hub.content(REPO) == {} if REPO in hub.pushed else True


def test_nobody_there(hub, plan, line, waits, monkeypatch):
    hub.__exit__()
    close_session()
    assert "the connection to 127.0.0.1 broke (Connection refused)" in line(push, plan)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//user:sesame@"))
    assert "sesame" not in line(push, plan)


def test_the_hub_goes_away_in_the_middle(hub, plan, line, waits):
    hub.meanwhile(ROUTES["batch"], hub.__exit__)
    hub.fail("/store/*", take=10)
    text = line(push, plan)
    assert f"{ATTEMPTS} times in a row" in text


def test_a_card_that_the_hub_does_not_take(hub, plan, line):
    hub.card_fault = '"license" must be one of [apache-2.0, mit]'
    text = line(push, plan)
    assert text == f'{plan.folder}/README.md: the Hub refuses its metadata block ("license" must be one of [apache-2.0, mit]); mend it'
    assert not hub.objects and hub.content(REPO) == {}


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["write", "remove"])
@pytest.mark.parametrize("route", ["batch", "verify"])
def test_files_that_change_are_not_committed(hub, plan, line, route, name, change):
    place = plan.folder / name
    hub.meanwhile(ROUTES[route], lambda: place.write_bytes(b"other") if change == "write" else place.unlink())
    text = line(push, plan)
    assert text.startswith(f"{plan.folder}: {name} changed while it was pushed; when nobody writes there")
    assert hub.content(REPO) == {}
    if change == "write":
        assert f"{name} changed" in line(push, plan)


def test_what_the_repo_ignores_is_missed(hub, plan, line):
    hub.add_repo(REPO, {".gitignore": b"tokenizer_config.json\nfigures/layers.png"})
    text = line(push, plan)
    assert text.startswith(f"{REPO}: holds figures/layers.png, tokenizer_config.json otherwise than {plan.folder}, or not at all, in ")
    assert "see whether a .gitignore there names them" in text


def test_what_arrived_otherwise_is_noticed(hub, plan, line):
    def spoil():
        repo = hub.pushed[REPO]
        files = repo.commits[repo.branches["main"][-1]]
        files["model-00002-of-00003.safetensors"] = Content(b"?" * len(files["model-00002-of-00003.safetensors"].data), True)
        files["config.json"] = Content(files["config.json"].data.upper(), False)

    hub.meanwhile(ROUTES["look again"], spoil)
    assert "holds config.json, model-00002-of-00003.safetensors otherwise" in line(push, plan)


def test_settings_are_checked_before_anything_is_sent(hub, plan, line, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert line(push, plan) == "HF_HUB_OFFLINE is set, and a push needs the Hub; unset it"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_ two words")
    assert "holds a character that no token has" in line(push, plan)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert line(push, plan) == "no token for the Hub: run `hf auth login` with one that may write, or set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(constants, "ENDPOINT", "huggingface.co")
    assert "not an address" in line(push, plan)
    assert not hub.requests


def test_an_implicit_token_that_is_switched_off_is_sent_all_the_same(hub, plan, arrived, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    push(plan)
    assert arrived()


def test_an_interrupted_push_says_what_stays(hub, plan, arrived, waits, monkeypatch):
    fail(hub, "commit", times=1, status=500)

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted; what has arrived stays there, and the same command goes on from there"):
        push(plan, say=stop)
    assert len(hub.objects) == 5
    push(plan)
    assert arrived() and len(hub.asked("/store/*")) == 5


def test_words_of_others_are_cleaned(token, monkeypatch):
    assert plain(f"a\n  b {token} c http://x.y/z?Signature=1 d {'e' * 40} hf_short Bearer abc") == "a b … c … d … … …"
    assert len(plain("word " * 100)) == 200
    monkeypatch.setenv("HF_TOKEN", "open-sesame")
    assert plain("you said open-sesame.") == "you said …."


def test_the_server_refuses_what_does_not_fit(hub, plan):
    """The oracle itself: parts out of order, other bytes and unsent objects do not pass as what was pushed."""

    def ask(method, url, body):
        session = get_session()
        return session.request(method, url, content=body).status_code

    assert ask("PUT", f"{hub.cdn}/store/{'0' * 64}?Signature={SIGNATURE}", b"x") == 400
    assert ask("PUT", f"{hub.cdn}/store/{sha256(b'x').hexdigest()}", b"x") == 403
    assert ask("POST", f"{hub.endpoint}/api/repos/create", b"{}") == 401
