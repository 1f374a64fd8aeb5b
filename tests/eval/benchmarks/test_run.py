import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from downcycle import keep_layers, open_checkpoint, write
from downcycle.eval.benchmarks.run import responses_path, run_task
from downcycle.eval.benchmarks.tasks import SUITES, parse_tasks
from downcycle.surgery.errors import DowncycleError


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_way_to_install_it_is_said():
    with pytest.raises(DowncycleError, match="pip install 'downcycle\\[eval\\]'"):
        run_task(None, SUITES["quick"][0])


torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
from downcycle.eval.measure.loading import load  # noqa: E402

TEXT = "parser reads words from text and returns a list of numbers for each line in the file that was given"
WORDS = list(dict.fromkeys(re.findall("[a-z]+", TEXT)))
CODE = """
from datasets import Dataset

WORDS = {words!r}
def document(n):
    words = [WORDS[(3 * n + i * (n + 1)) % len(WORDS)] for i in range(8)]
    choices = [words[0], words[1] + " and", "the " + words[2]][: 2 + n % 2]
    return {{"text": " ".join(words), "choices": choices, "label": n % 2, "word": words[3]}}
def splits(**metadata):
    parts = {{"train": range(100, 110), "test": range(9)}}
    return {{name: Dataset.from_list([document(n) for n in numbers]) for name, numbers in parts.items()}}
def fail(document):
    raise RuntimeError("the data\\nare odd")
"""
COMMON = "custom_dataset: !function code.splits\ntraining_split: train\ntest_split: test\n"
MEAN = "aggregation: mean\n    higher_is_better: true\n"
YAMLS = {
    "mc": "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: label\nmetadata:\n  version: 2.5\n",
    "mc_shots": "include: mc.yaml\nnum_fewshot: 2\nmetric_list:\n  - metric: acc\n    " + MEAN,
    "ll": "output_type: loglikelihood\ndoc_to_text: text\ndoc_to_target: ' {{word}}'\nmetric_list:\n  - metric: acc\n    " + MEAN,
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\nmetric_list:\n  - metric: bits_per_byte\n",
    "gen": "output_type: generate_until\ndoc_to_text: text\ndoc_to_target: word\nnum_fewshot: 1\n"
    "generation_kwargs:\n  until: ['\\n\\n']\n  max_gen_toks: 12\n  do_sample: false\n"
    "metric_list:\n  - metric: exact_match\n    " + MEAN + "filter_list:\n"
    "  - name: whole\n    filter:\n      - function: take_first\n"
    "  - name: first\n    filter:\n      - function: regex\n        regex_pattern: '([a-z]+)'\n      - function: take_first\n",
}
GROUP = "group: both\ntask: [mc, mc_shots]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\nmetadata:\n  version: 4\n"
NESTED = "group: outer\ntask: [both, ll]\n"


def write_tasks(folder, **more):
    folder.mkdir(exist_ok=True)
    (folder / "code.py").write_text(CODE.format(words=WORDS))
    for name, text in {**YAMLS, **more}.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + ("" if "include:" in text else COMMON) + text)
    (folder / "both.yaml").write_text(GROUP)
    (folder / "outer.yaml").write_text(NESTED)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers of the built-in model: folder and loaded."""
    demo = open_checkpoint("demo")
    folder = write(keep_layers(demo, [0, 1]), tmp_path_factory.mktemp("model") / "two")
    return folder, load(open_checkpoint(folder), "fp32", device="cpu")


@pytest.fixture(scope="module")
def direct(model, tasks):
    """What lm-eval itself says of the folder, called as its users call it."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=False, include_path=str(tasks))
    model_args = {"pretrained": str(model[0]), "dtype": "float32"}

    def ask(*names, **options):
        return lm_eval.simple_evaluate(
            "hf", model_args, tasks=list(names), task_manager=index, device="cpu", batch_size=4, bootstrap_iters=1000, **options
        )

    return ask


def run(model, tasks, name, **options):
    (task,) = parse_tasks(f"{tasks}/{name}")
    return run_task(model[1], task, batch=4, **options)


def numbers(scores):
    return {(score.task, score.metric): (score.value, score.stderr, score.shots, score.examples) for score in scores}


def theirs(answer, name):
    row, found = answer["results"][name], {}
    for key in row:
        if "," in key and "_stderr," not in key:
            metric, chosen = key.split(",")
            stderr = row[f"{metric}_stderr,{chosen}"]
            spelled = metric if chosen == "none" else key
            stderr = None if stderr == "N/A" else stderr
            found[name, spelled] = (row[key], stderr, answer["n-shot"].get(name), answer["n-samples"].get(name, {}).get("effective"))
    return found


@pytest.mark.parametrize("name", ["mc", "mc_shots", "ll", "gen"])
def test_numbers_are_those_of_lm_eval(model, tasks, direct, name):
    assert numbers(run(model, tasks, f"{name}.yaml")) == theirs(direct(name), name)


def test_every_metric_and_filter_is_reported_with_what_is_known_of_it(model, tasks):
    mc = run(model, tasks, "mc.yaml")
    assert [(one.metric, one.shots, one.examples, one.version, one.chance, one.group, one.limit) for one in mc] == [
        ("acc", 0, 9, "2.5", pytest.approx((5 / 2 + 4 / 3) / 9), "mc", None),
        ("acc_norm", 0, 9, "2.5", pytest.approx((5 / 2 + 4 / 3) / 9), "mc", None),
    ]
    gen = run(model, tasks, "gen.yaml", limit=4)
    assert [(one.metric, one.shots, one.examples, one.chance, one.limit) for one in gen] == [
        ("exact_match,whole", 1, 4, None, 4),
        ("exact_match,first", 1, 4, None, 4),
    ]


def test_one_metric_is_reported_where_the_suite_names_it(model, tasks):
    (task,) = parse_tasks(f"{tasks}/gen.yaml")
    (score,) = run_task(model[1], replace(task, metric="exact_match,first", title="Words", suite="mine"), limit=1)
    assert (score.metric, score.title, score.group, score.stderr) == ("exact_match,first", "Words", "mine", None)
    with pytest.raises(DowncycleError, match="gave no number for acc,none"):
        run_task(model[1], replace(task, metric="acc,none"), limit=1)


def test_limit_and_shots_are_those_of_lm_eval(model, tasks, direct):
    assert numbers(run(model, tasks, "mc.yaml:3", limit=5)) == theirs(direct("mc", limit=5, num_fewshot=3), "mc")


def test_a_group_has_one_score(model, tasks, direct):
    (score,) = run(model, tasks, "both.yaml")
    row = direct("both")["results"]["both"]
    assert (score.task, score.metric, score.value, score.stderr) == ("both", "acc", row["acc,none"], row["acc_stderr,none"])
    assert (score.shots, score.examples, score.version, score.group) == (None, 18, "4", "both")
    assert score.chance == pytest.approx((5 / 2 + 4 / 3) / 9)


def test_a_group_that_sums_nothing_up_has_the_scores_of_its_parts(model, tasks):
    scores = run(model, tasks, "outer.yaml", limit=3)
    assert sorted((score.task, score.metric, score.title, score.examples, score.group) for score in scores) == [
        ("both", "acc", "both", 6, "outer"),
        ("ll", "acc", "ll", 3, "outer"),
    ]


def test_a_rolling_task_and_its_direction(model, tasks, direct):
    (score,) = run(model, tasks, "rolling.yaml")
    assert numbers([score]) == theirs(direct("rolling"), "rolling")
    assert not score.higher_is_better and score.stderr is None and score.value > 1


def test_data_in_a_file(model, tmp_path):
    rows = [{"text": "one two", "choices": ["three", "four"], "label": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  cache_dir: {tmp_path / 'cache'}\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
    (tmp_path / "file.yaml").write_text(f"task: file\ntest_split: test\n{data}{YAMLS['mc']}")
    scores = run(model, tmp_path, "file.yaml")
    assert {(score.metric, score.value, score.chance) for score in scores} == {("acc", 0.5, 0.5), ("acc_norm", 0.5, 0.5)}


def test_a_task_of_the_same_name_as_one_of_lm_eval_is_the_one_in_the_file(model, tasks, tmp_path):
    write_tasks(tmp_path / "same")
    (tmp_path / "same" / "hellaswag.yaml").write_text("include: mc.yaml\ntask: hellaswag\n")
    assert run(model, tmp_path / "same", "hellaswag.yaml")[0].version == "2.5"


# What is asked of the model.


class Counted:
    """Rows that went through a model."""

    def __init__(self, model):
        self.rows = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, given, named):
        self.rows += len(given[0] if given else named["input_ids"])


@pytest.fixture
def counted(model):
    counted = Counted(model[1].model)
    yield counted
    counted.handle.remove()


@pytest.mark.parametrize("name", ["mc_shots", "ll", "gen", "rolling"])
def test_what_was_answered_is_not_asked_again(model, tasks, counted, name):
    first = run(model, tasks, f"{name}.yaml", content="one")
    rows = counted.rows
    assert rows > 0
    assert run(model, tasks, f"{name}.yaml", content="one") == first and counted.rows == rows
    assert run(model, tasks, f"{name}.yaml", content="another") == first and counted.rows == 2 * rows


def test_without_a_content_nothing_is_kept(model, tasks, cache, counted):
    run(model, tasks, "ll.yaml")
    rows = counted.rows
    run(model, tasks, "ll.yaml")
    assert counted.rows == 2 * rows and not list(cache.rglob("*.jsonl"))


def test_answers_are_kept_apart_by_what_decides_them(model):
    loaded = model[1]
    paths = {responses_path(one, "c") for one in (loaded, replace(loaded, load="bf16"), replace(loaded, device=torch.device("cuda:1")))}
    paths |= {responses_path(loaded, "d")}
    assert len(paths) == 4
    assert responses_path(replace(loaded, device=torch.device("cuda:0")), "c") in paths


def test_a_higher_limit_asks_only_for_what_is_new(model, tasks, counted):
    run(model, tasks, "ll.yaml", limit=4, content="c")
    assert counted.rows == 4
    assert run(model, tasks, "ll.yaml", content="c") == run(model, tasks, "ll.yaml")
    assert counted.rows == 4 + 5 + 9


def test_other_prompts_and_other_stops_are_other_requests(model, tasks, tmp_path, counted):
    run(model, tasks, "gen.yaml", content="c")
    other = write_tasks(tmp_path / "other", gen=YAMLS["gen"].replace("max_gen_toks: 12", "max_gen_toks: 2"))
    rows = counted.rows
    assert numbers(run(model, other, "gen.yaml", content="c")) == numbers(run(model, other, "gen.yaml"))
    assert counted.rows > rows


def test_sampled_answers_are_drawn_again(model, tmp_path, counted):
    drawn = YAMLS["gen"].replace("do_sample: false", "do_sample: true\n  temperature: 1.0")
    folder = write_tasks(tmp_path / "drawn", gen=drawn)
    run(model, folder, "gen.yaml", content="c")
    rows = counted.rows
    run(model, folder, "gen.yaml", content="c")
    assert counted.rows > rows


KILLED = """
import signal, sys
from downcycle import open_checkpoint
from downcycle.eval.benchmarks import responses
from downcycle.eval.benchmarks.run import run_task
from downcycle.eval.benchmarks.tasks import SUITES
from downcycle.eval.measure.loading import load
responses.EVERY = 0.0
loaded = load(open_checkpoint(sys.argv[1]), "fp32", device="cpu")
def wait(what, done, total):
    if done == 150:
        print("now", file=sys.__stdout__, flush=True)
        signal.pause()
run_task(loaded, SUITES["quick"][0], limit=100, content="c", progress=wait)
"""


def test_a_killed_run_goes_on_where_it_was(model, cache, counted):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(model[0])], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = [json.loads(line) for line in responses_path(model[1], "c").read_text().splitlines() if line]
    assert len(kept) == 150
    told = []
    scores = run_task(model[1], SUITES["quick"][0], limit=100, content="c", progress=lambda what, done, total: told.append(done))
    assert counted.rows <= 400 - len(kept) and told[1] == len(kept) and told[-1] == 400
    rows = counted.rows
    whole = run_task(model[1], SUITES["quick"][0], limit=100)
    assert counted.rows > rows + len(kept)
    assert scores[0].value == pytest.approx(whole[0].value, abs=2 / 100)  # other batches round otherwise


def test_the_batch_that_fits_is_found_with_texts_as_long_as_there_are(model, tasks, tmp_path):
    from downcycle.eval.benchmarks.harness import quiet
    from downcycle.eval.benchmarks.indexing import find_task
    from downcycle.eval.benchmarks.language_model import LanguageModel
    from downcycle.eval.benchmarks.responses import Responses

    shapes = []
    hook = model[1].model.register_forward_pre_hook(
        lambda module, given, named: shapes.append((given[0] if given else named["input_ids"]).shape), with_kwargs=True
    )
    index, asked = find_task(parse_tasks(f"{tasks}/gen.yaml")[0])
    wrapped = LanguageModel(model[1], "auto", Responses(tmp_path / "x"), lambda done, total: None)
    window = wrapped.max_length
    with quiet():
        answer = lm_eval.simple_evaluate(wrapped, tasks=[asked], task_manager=index)
    hook.remove()
    assert shapes[0][0] == 64 and 20 < shapes[0][1] < 200 < window == wrapped.max_length
    assert max(rows for rows, _ in shapes[5:]) == 9
    assert {key: value for (_, key), (value, *_) in theirs(answer, "gen").items()} == {
        one.metric: one.value for one in run(model, tasks, "gen.yaml")
    }


# Models and tokenizers as they come.


def test_sampling_in_the_generation_config_does_not_leak(model, tasks):
    greedy = run(model, tasks, "gen.yaml", content="greedy")
    loaded = replace(model[1], model=deepcopy(model[1].model))
    loaded.model.generation_config.update(do_sample=True, temperature=9.0, top_p=0.5, top_k=3)
    assert run((None, loaded), tasks, "gen.yaml", content="drawn") == greedy
    assert Path(responses_path(loaded, "greedy")).read_text() == Path(responses_path(loaded, "drawn")).read_text()


def bare_model(folder):
    """A Llama of random weights with a tokenizer that has no special token at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(dict.fromkeys([*WORDS, "\n"]))}, unk_token="a"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
    network = LlamaForCausalLM(config).eval()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(open_checkpoint(folder), "fp32", device="cpu")


def test_a_tokenizer_without_special_tokens(tmp_path):
    loaded = bare_model(tmp_path / "bare")
    assert loaded.tokenizer.all_special_tokens == []
    empty = YAMLS["mc"].replace("doc_to_text: text", "doc_to_text: ''")
    uneven = YAMLS["gen"].replace("doc_to_text: text", "doc_to_text: '{{text if label else word}}'")  # so that some are padded
    folder = write_tasks(tmp_path / "tasks", empty=empty, gen=uneven)
    for name in ("mc", "empty", "ll", "gen"):
        run((None, loaded), folder, f"{name}.yaml", content=name)
    kept = dict(json.loads(line) for line in responses_path(loaded, "mc").read_text().splitlines() if line)
    namespace = {}
    exec(CODE.format(words=WORDS), namespace)
    expected = []
    for document in map(namespace["document"], range(9)):
        for choice in document["choices"]:
            context, ids = (
                loaded.tokenizer(text, return_tensors="pt").input_ids for text in (document["text"], f"{document['text']} {choice}")
            )
            logits = loaded.model(ids).logits[0].log_softmax(-1)
            expected.append(sum(logits[i - 1, ids[0, i]].item() for i in range(context.shape[1], ids.shape[1])))
    assert sorted(answer[0] for answer in kept.values()) == pytest.approx(sorted(set(expected)), abs=1e-4)
    generated = [json.loads(line)[1] for line in responses_path(loaded, "gen").read_text().splitlines() if line]
    assert all(len(text.split()) == 12 for text in generated)
    assert loaded.tokenizer.pad_token is None


@pytest.mark.parametrize("name", ["mc", "gen", "rolling"])
def test_nan_is_refused_with_the_layer_where_it_arises(model, tasks, name):
    loaded = replace(model[1], model=deepcopy(model[1].model))
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(DowncycleError, match="the output of layer 1 .*is not finite"):
        run((None, loaded), tasks, f"{name}.yaml", content="nan")
    assert not responses_path(loaded, "nan").exists()


# What cannot be run.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (COMMON + YAMLS["mc"] + "unsafe_code: true\n", "it runs code that the model writes, which is not done here"),
        ("dataset_path: nobody/has-this\ntest_split: test\n" + YAMLS["mc"], "its data, nobody/has-this on the Hub.*or take --tasks quick"),
        (COMMON + YAMLS["mc"].replace("doc_to_text: text", "doc_to_text: !function code.fail"), "RuntimeError: the data are odd"),
        (
            COMMON + YAMLS["mc"].replace("doc_to_text: text", "doc_to_text: !function code.none"),
            "AttributeError: .*has no attribute 'none'",
        ),
        (COMMON.replace("test_split: test", "test_split: dev") + YAMLS["mc"], "lm-eval failed: KeyError: 'dev'"),
        (COMMON + "output_type: multiple_guess\n", "lm-eval failed: ValueError: Got invalid output_type 'multiple_guess'"),
        ("dataset_path: nobody/has-this\nclass: !function code.none\n", "lm-eval failed: AttributeError"),
    ],
)
def test_what_cannot_be_run_is_one_line(model, tmp_path, text, said):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "odd.yaml").write_text("task: odd\n" + text)
    with pytest.raises(DowncycleError, match=said) as error:
        run(model, folder, "odd.yaml")
    assert str(error.value).startswith("--tasks odd: ") and "\n" not in str(error.value)


def test_a_member_that_does_not_exist_is_one_line(model, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "both.yaml").write_text(GROUP.replace("mc_shots", "mc_shorts"))
    with pytest.raises(DowncycleError, match="mc_shorts"):
        run(model, folder, "both.yaml")


# The terminal.


def test_nothing_is_written_to_the_terminal_and_all_is_as_before(model, tasks, capfd, caplog):
    import datasets  # noqa: F401 - sets its level
    import tqdm

    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")}
    told, before = [], vars(tqdm.tqdm)["__init__"]
    capfd.readouterr()
    for name in ("mc", "gen", "rolling", "both"):
        run(model, tasks, f"{name}.yaml", progress=lambda *now: told.append(now))
    with contextlib.suppress(DowncycleError):
        run(model, tasks, "missing.yaml")
    assert capfd.readouterr() == ("", "") and [record.name for record in caplog.records] == []
    assert vars(tqdm.tqdm)["__init__"] is before and levels == {name: logging.getLogger(name).level for name in levels}
    assert [one for one in told if one[0] == "mc"] == [("mc", done, 22) for done in range(23)]
    assert {stage.partition(":")[0] for stage, _, _ in told} == {"mc", "gen", "rolling", "both"}


def test_quick_asks_the_same_on_every_machine(cache):
    from downcycle.eval.benchmarks import quick_items
    from downcycle.recipes.demo.corpus import read_text

    text = "../../recipes/demo/held_out.txt"
    documents = [" ".join(document.split()) for document in read_text(Path(quick_items.__file__).parent / text)]
    items = quick_items.endings(text, version=1.0)["test"]
    assert len(items) == 500 and len(set(items["context"])) == 500
    for item in items:
        own = item["endings"][item["label"]]
        assert len(set(item["endings"])) == 4 and {len(ending.split()) for ending in item["endings"]} == {6}
        (home,) = {number for number, document in enumerate(documents) if f"{item['context']} {own}" in document}
        assert all(ending in documents[home] for ending in item["endings"])
    assert 100 < items["label"].count(0) < 150
    assert items.to_list() == quick_items.endings(text)["test"].to_list()
    for item in quick_items.last_words(text)["test"]:
        assert re.fullmatch("[a-z]{4,}", item["word"]) and len(item["context"].split()) == 60
        assert item["word"] in re.sub(r"[^\w\s]", "", item["context"]).lower().split()
        assert any(f"{item['context']} {item['word']}." in document for document in documents)
