import json
import multiprocessing

import pytest

from downcycle.eval.benchmarks import responses
from downcycle.eval.benchmarks.responses import Responses, open_responses


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(responses, "EVERY", 0.0)


def test_answers_come_back_as_they_were(tmp_path, at_once):
    answers = {"a": (-1.25e-7, True), "b": (float("-inf"), False), "c": "text\nof two lines, é \ud800 \u2028", "d": -3.5, "e": ""}
    with open_responses(tmp_path / "new" / "x.jsonl") as kept:
        for key, answer in answers.items():
            kept.add(key, answer)
    assert Responses(tmp_path / "new" / "x.jsonl").known == answers


def test_what_came_is_written_when_the_run_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_responses(tmp_path / "x") as kept:
        kept.add("a", "1")
        raise KeyboardInterrupt
    assert Responses(tmp_path / "x").known == {"a": "1"}


def test_a_line_that_was_cut_off_is_all_that_is_lost(tmp_path, at_once):
    path = tmp_path / "x"
    for key in "abc":
        Responses(path).add(key, key)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        left = Responses(path).known
        assert left.items() <= {"a": "a", "b": "b", "c": "c"}.items()
        assert len(left) >= whole[:cut].count(b"]")
        Responses(path).add("d", "d")
        assert Responses(path).known == {**left, "d": "d"}


def test_lines_that_say_something_else_are_passed_over(tmp_path):
    (tmp_path / "x").write_bytes(b'{}\n1\n["a"]\n["b", "1", 2]\n\xff\n["c", "3"]\n')
    assert Responses(tmp_path / "x").known == {"c": "3"}


def fill(path, name):
    responses.EVERY = 0.0
    with open_responses(path) as kept:
        for number in range(300):
            kept.add(f"{name}{number}", (number, True))


def test_two_processes_write_one_file(tmp_path):
    writers = [multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path / "x", name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Responses(tmp_path / "x").known) == 600
    for line in (tmp_path / "x").read_text().split("\n"):
        assert not line or len(json.loads(line)) == 2


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path, at_once):
    (tmp_path / "file").write_text("")
    with open_responses(tmp_path / "file" / "x") as kept:
        kept.add("a", "1")
        assert kept.known == {"a": "1"}
