"""Models side by side: what is measured is what the parts measure, nothing is measured twice, and nothing that was measured is lost."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from downcycle import DowncycleError, first, keep_layers, open_checkpoint, write  # noqa: E402
from downcycle.eval.evaluate import evaluate  # noqa: E402
from downcycle.eval.measure.perplexity import perplexity  # noqa: E402
from downcycle.eval.results import find_model, read_results, retained  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A parent of three layers, for speed, and a child of two."""
    folder = tmp_path_factory.mktemp("models")
    parent = open_checkpoint(write(replace(keep_layers(open_checkpoint("demo"), first(12, 3)), lineage={}), folder / "parent"))
    write(keep_layers(parent, first(3, 2)), folder / "child")
    return folder


@pytest.fixture
def parent(made):
    return str(made / "parent")


@pytest.fixture
def child(made):
    return made / "child"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held-out.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 20)
    return str(path)


@pytest.fixture
def task(tmp_path):
    rows = [{"q": f"{a} plus {b} is", "choices": ["small", "large"], "answer": int(a + b > 9)} for a in range(5) for b in range(3, 9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    return str(tmp_path / "sums.yaml")


class Told(list):
    """What was told of the progress, by stage."""

    def __call__(self, what, done, total):
        if what not in self:
            self.append(what)


def test_floats_beneath_ternary_weights_are_called_so(parent, child, text, tmp_path):
    model = open_checkpoint(child)
    learnt = replace(model, config={**model.config, "downcycle_ternary": {"schedule": "linear", "strength": 1.0}}, lineage={})
    results = evaluate([parent, str(write(learnt, tmp_path / "trained"))], [text], length=64)
    assert [one.role for one in results.models] == ["parent", "floats beneath ternary weights"]


def test_models_are_measured_side_by_side_and_only_once(parent, child, text, task):
    told, again = Told(), Told()
    results = evaluate([parent, str(child)], [text], task, limit=12, length=64, progress=told)
    first_one, cut = results.models
    assert (first_one.name, first_one.role, cut.name, cut.role) == ("parent", "parent", "child", "cut")
    assert (cut.kept, cut.depth, cut.layers, first_one.layers) == ((0, 1), 3, 2, 3)
    assert cut.parameters == open_checkpoint(child).num_elements
    alone = perplexity(open_checkpoint(child), text, length=64)
    assert cut.perplexity[0].loss == pytest.approx(alone.loss, abs=1e-5)
    assert cut.perplexity[0].text == "held-out.txt"
    assert [(score.task, score.metric, score.examples) for score in cut.scores] == [("sums", "acc", 12)]
    assert first_one.speed.decode_rate > 0 < cut.speed.peak_bytes
    assert (first_one.load, first_one.device) == ("bf16", "cuda" if torch.cuda.is_available() else "cpu")
    assert [what for what in told if "loading" in what] == ["loading parent", "loading child"]
    assert evaluate([parent, str(child)], [text], task, limit=12, length=64, progress=again).models == results.models
    assert again == []


def test_only_what_is_new_is_measured(parent, child, text, task):
    evaluate([parent, str(child)], [text], length=64)
    told = Told()
    evaluate([parent, str(child)], [text], task, limit=4, length=64, progress=told)
    assert not any("speed" in what or "loss" in what for what in told)
    assert "child, sums" in told


def test_a_run_that_is_stopped_goes_on(parent, child, text):
    def stop(what, done, total):
        if what == "child, measuring the loss":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([parent, str(child)], [text], length=64, progress=stop)
    told = Told()
    results = evaluate([parent, str(child)], [text], length=64, progress=told)
    assert [what for what in told if not what.startswith("reading")] == [
        "loading child",
        "child, reading the text",
        "child, measuring the loss",
    ]
    assert len(results.models) == 2


def test_a_weight_that_changed_is_measured_again(made, text, tmp_path):
    child = Path(shutil.copytree(made / "child", tmp_path / "child"))
    before = evaluate([str(child)], [text], length=64).models[0]
    path = child / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(2000)
    path.write_bytes(data)
    after = evaluate([str(child)], [text], length=64).models[0]
    assert after.content != before.content
    assert after.perplexity[0].loss != before.perplexity[0].loss


def test_the_second_time_no_torch_is_imported(child, text, tmp_path):
    evaluate([str(child)], [text], length=64)
    code = (
        "import sys; from downcycle.eval.evaluate import evaluate; "
        f"evaluate([{str(child)!r}], [{text!r}], length=64); print('torch' in sys.modules, 'lm_eval' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("False False\n", 0), done.stderr


def test_names_are_short_where_they_are_clear(tmp_path, child, text):
    other = write(open_checkpoint(child), tmp_path / "b" / "child")
    models = evaluate([str(child), str(other)], [text], length=64).models
    assert [model.name for model in models] == [str(child), str(other)]
    with pytest.raises(DowncycleError, match="given twice"):
        evaluate([str(child), str(child)], [text])


def test_the_command_prints_writes_and_answers(downcycle, parent, child, text, tmp_path):
    pytest.importorskip("matplotlib")
    told = downcycle("eval", parent, child, "--text", text, "--length", "64", "--report", tmp_path / "report")
    assert told.code == 0
    results = read_results(tmp_path / "report" / "results.json")
    cut = find_model(results, results.models[1].content, tmp_path)
    assert f"{retained(cut.parameters, results.baseline.parameters):.1%}" in told.out
    assert (tmp_path / "report" / "report.html").is_file()
    answer = downcycle("eval", parent, child, "--text", text, "--length", "64", "--json")
    assert json.loads(answer.out)["models"][1]["perplexity"][0]["loss"] == cut.perplexity[0].loss
    assert answer.err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "empty.txt"], "empty"),
        (["--text", "one.txt"], "two"),
        (["--text", "binary.txt"], "UTF-8|binary"),
        (["--text", "none.txt"], "no such file"),
        (["--load", "nf3"], "stored, bf16, fp32, int8, nf4"),
        (["--tasks", "helaswag"], "hellaswag"),
        (["--tasks", ","], "names none"),
        (["--limit", "0"], "1 or more"),
        (["--length", "64", "--stride", "65"], "stride"),
        (["--length", "100000000"], "positions"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff" * 50)
    line = refused("eval", "demo", "--json", *options)
    assert re.search(said, line), line
