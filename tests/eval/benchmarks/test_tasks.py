import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from downcycle.eval.benchmarks.tasks import SUITES, Task, parse_tasks, task_key
from downcycle.surgery.errors import DowncycleError


def write_task(folder, name="mine", text=""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(f"task: {name}\noutput_type: multiple_choice\n{text}")
    return path


def test_openllm_is_the_six_of_the_leaderboard():
    assert [(task.name, task.shots, task.metric) for task in parse_tasks("openllm")] == [
        ("arc_challenge", 25, "acc_norm,none"),
        ("hellaswag", 10, "acc_norm,none"),
        ("mmlu", 5, "acc,none"),
        ("truthfulqa_mc2", 0, "acc,none"),
        ("winogrande", 5, "acc,none"),
        ("gsm8k", 5, "exact_match,strict-match"),
    ]
    assert {task.suite for task in parse_tasks("openllm")} == {"openllm"}


def test_openllm_is_what_lm_eval_has_under_that_name():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import load_yaml_config

    tasks = Path(sys.modules["lm_eval"].__file__).parent / "tasks"
    theirs = {entry["task"]: entry for entry in load_yaml_config(tasks / "benchmarks" / "openllm.yaml", mode="simple")["task"]}
    ours = {task.name.replace("truthfulqa_mc2", "truthfulqa"): task for task in SUITES["openllm"]}
    assert {name: (one.get("num_fewshot"), one.get("fewshot_split")) for name, one in theirs.items()} == {
        name: (one.shots, one.fewshot_split) for name, one in ours.items()
    }
    index = TaskManager(include_defaults=False, include_path=[str(tasks / name) for name in ("arc", "gsm8k", "truthfulqa", "winogrande")])
    index.task_index.update(
        TaskManager(include_defaults=False, include_path=[str(tasks / "hellaswag"), str(tasks / "mmlu/default")]).task_index
    )
    for task in SUITES["openllm"]:
        config = load_yaml_config(index.task_index[task.name]["yaml_path"], mode="simple")
        metrics = [entry["metric"] for entry in config.get("metric_list") or config["aggregate_metric_list"]]
        filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
        metric, chosen = task.metric.split(",")
        assert metric in metrics and chosen in filters
        assert task.fewshot_split in (None, "train") and (task.fewshot_split is None or config["training_split"] == "train")


def test_commas_spaces_and_repeats(tmp_path):
    path = write_task(tmp_path)
    tasks = parse_tasks(f" quick,{path} ,openllm, quick,,{path}")
    assert tasks == [*SUITES["quick"], Task("mine", "mine", path=path), *SUITES["openllm"]]


def test_shots_are_said_behind_a_colon(tmp_path):
    path = write_task(tmp_path)
    assert [(task.name, task.shots) for task in parse_tasks(f"{path}:5,{path},downcycle_endings:3")] == [
        ("mine", 5),
        ("mine", None),
        ("downcycle_endings", 3),
    ]


def test_a_path_is_from_the_current_folder(tmp_path, monkeypatch):
    path = write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert parse_tasks("mine.yaml")[0].path == path


def test_a_name_can_be_included(tmp_path):
    write_task(tmp_path, "base")
    (tmp_path / "same.yaml").write_text("include: base.yaml\nnum_fewshot: 2\n")
    assert parse_tasks(str(tmp_path / "same.yaml"))[0].name == "base"


def test_functions_of_a_yaml_are_not_run_while_planning(tmp_path):
    path = write_task(tmp_path, text="doc_to_text: !function evil.run\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    task_key(parse_tasks(str(path))[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", " , ", ","])
def test_no_task_is_refused(text):
    with pytest.raises(DowncycleError, match="names none; give openllm, quick"):
        parse_tasks(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory; give the path of a task's YAML file"),
        ("task: [a\n", "no YAML"),
        ("task: a\nvalue: 9999-99-99\n", "no YAML"),
        ("- a\n", "holds no keys and values"),
        ("", "holds no keys and values"),
        ("output_type: multiple_choice\n", "names no task"),
        ("task:\n  - mmlu\n", "names no task"),
        ("task: 7\n", "names no task"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, content, said):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DowncycleError, match=said) as error:
        parse_tasks(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest(cache):
    pytest.importorskip("lm_eval")
    for text, nearest in {"hellaswga": "hellaswag", "opnllm": "openllm", "arc_chalenge:25": "arc_challenge"}.items():
        with pytest.raises(DowncycleError, match=f"knows no such task; the nearest are .*{nearest}"):
            parse_tasks(text)
    with pytest.raises(DowncycleError, match="`lm-eval ls tasks` lists them"):
        parse_tasks("§§§§§§§§§§§")
    assert [task.name for task in parse_tasks("hellaswag:3,hellaswag")] == ["hellaswag", "hellaswag"]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_a_name_cannot_be_looked_up():
    with pytest.raises(DowncycleError, match="benchmarks need lm-eval: pip install 'downcycle\\[eval\\]'"):
        parse_tasks("hellaswag")


def test_known_names_are_looked_up_once_and_planning_imports_no_library(cache, tmp_path):
    names = cache / "benchmarks"
    names.mkdir()
    script = (
        "import sys; from downcycle.eval.benchmarks.tasks import *; from downcycle.eval.benchmarks import harness\n"
        "harness.require_lm_eval = lambda: None\n"
        f"(harness.cache_folder() / 'benchmarks' / f'names-{{harness.lm_eval_version()}}.json').write_text('[\"known\"]')\n"
        f"for task in parse_tasks('openllm,quick,known,' + {str(write_task(tmp_path))!r}): task_key(task, 3)\n"
        "print([name for name in ('torch', 'lm_eval', 'datasets', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


def folder_of_a_task(folder):
    write_task(folder, "base", "doc_to_text: question\n")
    (folder / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / "data" / name).write_text(json.dumps({"question": name}))
    (folder / "code.py").write_text("import beside\n")
    (folder / "beside.py").write_text("x = 1\n")
    (folder / "unrelated.txt").write_text("1")
    text = "include: base.yaml\ntask: mine\ndoc_to_choice: !function code.choices\ndataset_kwargs:\n  data_files:\n    test: data/a.jsonl\n"
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def key_of_path(path, limit=None):
    return task_key(parse_tasks(str(path))[0], limit)


def test_the_key_follows_the_files_wherever_they_lie(tmp_path):
    path = folder_of_a_task(tmp_path / "one")
    assert key_of_path(path) == key_of_path(folder_of_a_task(tmp_path / "elsewhere" / "two"))
    seen = {key_of_path(path)}
    for name in ("mine.yaml", "base.yaml", "code.py", "beside.py", "data/a.jsonl"):
        with open(path.parent / name, "a") as file:
            file.write("\n")
        seen.add(key_of_path(path))
    assert len(seen) == 6
    for name in ("unrelated.txt", "data/b.jsonl"):
        (path.parent / name).write_text("2")
        seen.add(key_of_path(path))
    assert len(seen) == 6


def test_the_key_follows_what_included_files_name(tmp_path):
    write_task(tmp_path / "deep", "base", "doc_to_text: !function other.text\n")
    (tmp_path / "deep" / "other.py").write_text("")
    (tmp_path / "mine.yaml").write_text("include: deep/base.yaml\ntask: mine\n")
    before = key_of_path(tmp_path / "mine.yaml")
    (tmp_path / "deep" / "other.py").write_text("x = 1\n")
    assert key_of_path(tmp_path / "mine.yaml") != before


def test_the_key_follows_every_member_of_a_group(tmp_path):
    (tmp_path / "all.yaml").write_text("group: all\ntask:\n  - mine\n  - other\n")
    folder_of_a_task(tmp_path / "below")
    before = key_of_path(tmp_path / "all.yaml")
    (tmp_path / "below" / "data" / "a.jsonl").write_text("{}")
    assert key_of_path(tmp_path / "all.yaml") != before


def test_the_key_follows_folders_and_patterns_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.json").write_text("1")
    for text in ("dataset_path: data\n", "dataset_kwargs: {data_files: data/*.json}\n"):
        path = write_task(tmp_path, text=text)
        before = key_of_path(path)
        (tmp_path / "data" / "x.json").write_text((tmp_path / "data" / "x.json").read_text() + "1")
        assert key_of_path(path) != before


def test_yamls_that_include_each_other_end(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\ntask: a\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert key_of_path(tmp_path / "a.yaml")


def test_the_key_follows_shots_limit_and_metric():
    tasks = [*SUITES["openllm"], Task("mmlu", "MMLU"), Task("mmlu", "MMLU", "acc,none"), Task("mmlu", "MMLU", "acc,none", 5, "dev")]
    assert len({task_key(task, limit) for task in tasks for limit in (None, 10)}) == 2 * len(tasks)
    assert task_key(tasks[0], 10) == task_key(tasks[0], 10)
