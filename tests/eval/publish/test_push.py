"""What arrives at the Hub is byte for byte what lies in the folder, in one commit, through every fault; or one line says why not."""

import json
import sys
from hashlib import sha256

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from downcycle.eval.publish.faults import ATTEMPTS
from downcycle.eval.publish.files import plan_push
from downcycle.eval.publish.push import push

REPO = "ann/small"
COMMITS = f"/api/models/{REPO}/commit/*"


def send(folder, repo=REPO, **options):
    return push(plan_push(folder, repo), **options)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_all_arrives_in_one_commit(hub, model, files_of):
    there = files_of(model)
    done = send(model)
    assert hub.content(REPO) == there
    assert len(shards(model)) == 3
    assert (done.url, done.private) == (f"{hub.endpoint}/{REPO}", False)
    assert done.commit == hub.pushed[REPO].branches["main"][-1]
    assert (done.files, done.new_files) == (len(there), len(there))
    assert done.bytes == done.new_bytes == sum(map(len, there.values()))
    assert done.others == ()
    assert len(hub.asked(COMMITS)) == 1
    assert {path for path, file in hub.pushed[REPO].commits[done.commit].items() if file.is_large} == {
        *(path.name for path in shards(model)),
        "tokenizer.json",
        "figures/layers.png",
    }


def test_large_files_go_in_parts(hub, model, files_of):
    hub.parts_from, hub.part = 14_000, 7_001
    send(model)
    assert hub.content(REPO) == files_of(model)
    sizes = [size for path in shards(model) if (size := path.stat().st_size) >= 14_000]
    assert len(hub.asked("/store/*/*")) == sum(-(-size // 7_001) for size in sizes) > 2 * len(sizes) > 2
    assert len(hub.asked("/ann/small/complete/*")) == len(sizes) == len(hub.parts)


def test_a_second_push_sends_nothing_and_commits_nothing(hub, model):
    first = send(model)
    hub.requests.clear()
    second = send(model)
    assert (second.new_files, second.new_bytes, second.commit, second.files) == (0, 0, first.commit, first.files)
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}"]


def test_a_changed_card_is_all_that_is_committed(hub, model, files_of):
    send(model)
    (model / "README.md").write_text("# Another\n")
    hub.requests.clear()
    done = send(model)
    assert (done.new_files, done.new_bytes) == (1, 10)
    assert hub.content(REPO) == files_of(model)
    assert len(hub.asked(COMMITS)[0].body.splitlines()) == 2
    assert not hub.asked("/store/*")


def test_a_small_file_of_the_same_size_is_told_apart(hub, model, files_of):
    send(model)
    card = (model / "README.md").read_bytes()
    (model / "README.md").write_bytes(card.replace(b"small", b"SMALL"))
    assert (model / "README.md").stat().st_size == len(card)
    assert send(model).new_files == 1
    assert hub.content(REPO) == files_of(model)


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repo_is_private_where_that_is_asked(hub, model, private):
    assert send(model, private=private).private == private
    assert hub.pushed[REPO].private == private
    asked = json.loads(hub.asked("/api/repos/create")[0].body)
    assert asked.get("visibility") == ("private" if private else None)  # without a word the organisation's default holds


def test_a_public_repo_is_not_taken_for_a_private_one(hub, model, line):
    hub.add_repo(REPO)
    text = line(send, model, private=True)
    assert text.startswith(f"{REPO}: is there and public, and --private was given")
    assert [request.method for request in hub.requests] == ["GET"]
    hub.add_repo(REPO, private=True)
    assert send(model).private


def test_a_repo_that_was_made_public_against_the_word_gets_nothing(hub, model, line):
    hub.meanwhile(f"/api/models/{REPO}", lambda: None)
    hub.meanwhile(f"/api/models/{REPO}", lambda: setattr(hub.pushed[REPO], "private", False))
    assert "is there and public" in line(send, model, private=True)
    assert hub.content(REPO) == {} and not hub.objects


def test_what_else_a_repo_holds_stays(hub, model, files_of):
    hub.add_repo(REPO, {"notes.txt": b"mine", "pytorch_model.bin": b"old", "config.json": b"{}"})
    done = send(model)
    assert done.others == ("notes.txt", "pytorch_model.bin")
    assert hub.content(REPO) == files_of(model) | {"notes.txt": b"mine", "pytorch_model.bin": b"old"}


def test_a_branch_is_made_and_used(hub, model, files_of):
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    done = send(model, revision="v0.1")
    assert hub.content(REPO) == {"notes.txt": b"mine"}
    assert hub.content(REPO, "v0.1") == files_of(model) | {"notes.txt": b"mine"}
    assert done.commit == hub.pushed[REPO].branches["v0.1"][-1]
    again = send(model, revision="v0.1")
    assert (again.new_files, again.commit) == (0, done.commit)
    send(model, "ann/new", revision="x/y")
    assert hub.content("ann/new", "x/y") == files_of(model)


@pytest.mark.parametrize("branch", ["", "a" * 40, "-b", "two words"])
def test_no_branch(hub, model, line, branch):
    assert line(send, model, revision=branch) == f"--revision {branch}: no name of a branch; give one, such as main"
    assert not hub.requests


def test_a_broken_connection_is_taken_up_again(hub, model, files_of, waits):
    hub.fail("/store/*", times=2, take=5_000)
    done = send(model)
    assert hub.content(REPO) == files_of(model)
    assert done.new_files == done.files and waits


def test_a_second_run_sends_only_what_is_missing(hub, model, files_of, line):
    last = sha256(shards(model)[2].read_bytes()).hexdigest()
    hub.fail(f"/store/{last}", take=9_000)
    text = line(send, model)
    assert "the connection to 127.0.0.1 broke (" in text and f"{ATTEMPTS} times in a row" in text
    assert text.endswith("what has arrived stays there, and the same command goes on from there")
    assert hub.content(REPO) == {} and len(hub.objects) == 4
    hub.faults.clear()
    hub.requests.clear()
    send(model)
    assert hub.content(REPO) == files_of(model)
    assert [request.path for request in hub.asked("/store/*")] == [f"/store/{last}"]
    assert hub.taken("/store/*") == shards(model)[2].stat().st_size


def test_files_that_arrive_renew_patience(hub, model, files_of):
    for shard in shards(model):
        hub.fail(f"/store/{sha256(shard.read_bytes()).hexdigest()}", times=ATTEMPTS - 1, status=403)
    hub.fail(COMMITS, times=ATTEMPTS - 1, status=500)
    send(model)
    assert hub.content(REPO) == files_of(model)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, model, files_of):
    hub.fail(COMMITS, times=1, drop_after=0)
    done = send(model)
    assert hub.content(REPO) == files_of(model)
    assert len(hub.asked(COMMITS)) == 1 and len(hub.pushed[REPO].branches["main"]) == 2
    assert done.commit == hub.pushed[REPO].branches["main"][-1]
    assert done.new_files == done.files


def test_a_repo_that_was_renamed_is_called_by_its_new_name(hub, model, files_of):
    hub.add_repo("ann/new-name", {"notes.txt": b"mine"})
    hub.renamed[REPO] = "ann/new-name"
    done = send(model)
    assert done.url == f"{hub.endpoint}/ann/new-name"
    assert hub.content("ann/new-name") == files_of(model) | {"notes.txt": b"mine"}
    assert REPO not in hub.pushed
    assert send(model).new_files == 0


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_bars_are_for_terminals(hub, model, capsys, monkeypatch, terminal, quiet):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    settings = sys.modules["huggingface_hub.utils.tqdm"]  # what the environment said at import, and what other tests left
    monkeypatch.setattr(settings, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(settings, "progress_bar_states", {})
    before = are_progress_bars_disabled()
    send(model, quiet=quiet)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("100%" in err) == (terminal and not quiet)
    assert are_progress_bars_disabled() == before
