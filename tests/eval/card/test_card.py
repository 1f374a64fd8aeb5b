"""The card says what is known of a model, however it came about, and nothing else; the Hub's own classes read it."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import yaml

from downcycle import DowncycleError, keep_layers, open_checkpoint, verify, write
from downcycle.eval.card.card import card_files, write_card
from downcycle.eval.card.facts import gather
from downcycle.eval.content import content_digest
from downcycle.eval.publish.legal import check_name
from downcycle.eval.results import ModelResult, Perplexity, Results, Score, Speed
from downcycle.surgery.choose import even, tail

META_NOTICE = "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"


def test_a_cut_of_the_built_in_model(home, read):
    parent = open_checkpoint("demo")
    child = keep_layers(parent, tail(12, 9), "tail")
    planned = card_files(child, "out/demo-2.8M")["README.md"].decode()
    folder = write(replace(child, files={**child.files, "README.md": planned.encode()}), home / "demo-2.8M")
    assert verify(folder).files == len(child.files) + 1
    card = read(folder)
    assert card.data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["downcycle", "depth-pruning"]}
    assert "████████░░░█" in card.text and "Layers kept 0-7,11; dropped 8-10" in card.text
    assert f"{child.num_elements:,}" in card.text and "9 of its 12 decoder layers" in card.text
    assert "not trained after the cut" in card.text and "## Training" not in card.text and "## Evaluation" not in card.text
    assert "The rule `tail`" in card.text and "Inheritune" not in card.text
    assert "Licen" not in card.text  # not known
    again = write_card(folder)
    assert again.kept_by_hand == [] and not (folder / "NOTICE").exists()
    assert (
        read(folder).text.replace("![Layers kept and dropped](figures/layers.png)\n\n", "").split("downcycle:making")[2:]
        == (planned.split("downcycle:making")[2:])
    )


@pytest.mark.parametrize(
    ("rule", "said"), [("first", "arXiv 2404.08634"), ("tail", "just before the last"), ("ends", "first and the last half")]
)
def test_each_rule_has_its_reason(parent, rule, said, planned):
    assert said in planned(keep_layers(open_checkpoint(parent), [0, 1, 7], rule), "Llama-3-x").section("## How it was made")


def test_layers_that_stand_more_than_once(parent, planned):
    card = planned(keep_layers(open_checkpoint(parent), [*range(8), *range(4, 8)], "layers"), "Llama-3-deep")
    assert "████2222" in card.text and "12 of them where that has 8" in card.text and "2312.15166" in card.text


def test_a_cut_of_llama_3_carries_its_licence(parent, home, read):
    child = keep_layers(open_checkpoint(parent), [*range(6)], "first")
    files = card_files(child, "Llama-3-6B")
    assert files["NOTICE"].decode() == META_NOTICE
    card = read(files["README.md"].decode())
    assert card.data["license"] == "llama3" and card.data["language"] == ["en"]
    assert card.data["tags"] == ["downcycle", "depth-pruning", "llama", "llama-3"]
    assert "base_model" not in card.data  # a folder of this machine
    assert card.text.index("**Built with Meta Llama 3**") < card.text.index("## How it was made")
    assert "Llama 3 Model Card" in card.section("## Citation") and "2404.08634" in card.section("## Citation")
    assert META_NOTICE.strip() in card.section("## Licence")
    folder = write(replace(child, files={**child.files, **files}), home / "Llama-3-6B")
    assert verify(folder)
    (folder / "LICENSE").write_text("another")
    with pytest.raises(DowncycleError, match="LICENSE differs"):
        verify(folder)


def test_a_notice_that_is_there_is_not_written_again(child, read):
    (child / "Notice.txt").write_text("mine")
    written = write_card(child)
    assert not written.notice and not (child / "NOTICE").exists()
    (child / "Notice.txt").unlink()
    assert write_card(child).notice and (child / "NOTICE").read_text() == META_NOTICE
    assert not write_card(child).notice


def test_a_notice_that_is_no_longer_due_goes_and_one_of_a_persons_stays(make, home, read):
    make(home / "m")
    card = home / "m" / "README.md"
    card.write_text("---\nlicense: llama3\n---\n")
    assert write_card(home / "m").notice and (home / "m" / "NOTICE").read_text() == META_NOTICE
    card.write_text(card.read_text().replace("license: llama3", "license: gemma"))
    assert write_card(home / "m").notice and "Gemma is provided" in (home / "m" / "NOTICE").read_text()
    card.write_text(card.read_text().replace("license: gemma", "license: mit"))
    assert not write_card(home / "m").notice and not (home / "m" / "NOTICE").exists()
    (home / "m" / "NOTICE").write_text(META_NOTICE + "Mine.\n")
    write_card(home / "m")
    assert (home / "m" / "NOTICE").read_text() == META_NOTICE + "Mine.\n"


def test_a_notice_that_only_a_farther_parent_asks_for_stays(parent, child, home):
    (child / "README.md").write_text("---\nlicense: mit\n---\n")
    (child / "LICENSE").unlink()
    near = write(keep_layers(open_checkpoint(child), [0, 1]), home / "near")
    (near / "NOTICE").write_text(META_NOTICE)
    write_card(near)
    assert "license: mit" in (near / "README.md").read_text() and (near / "NOTICE").read_text() == META_NOTICE


def test_a_licence_written_by_hand_is_not_said_to_be_the_parents(home, read):
    folder = write(keep_layers(open_checkpoint("demo"), [0, 11], "ends"), home / "small")
    (folder / "axolotl.yaml").write_text("base_model: small\n")
    for licence, said in (("foo-bar", "`foo-bar`."), ("mit", "MIT License.")):
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        write_card(folder)
        assert read(folder).section("## Licence").splitlines()[1] == said
        assert "A copy of the licence" not in read(folder).text and "in this repo" not in read(folder).text
    assert "Where it was made, `axolotl.yaml` beside it is a recipe" in read(folder).text
    (folder / "LICENSE").write_text("MIT License\n")
    write_card(folder)
    assert "A copy of the licence goes with the model." in read(folder).text


def test_an_unknown_licence_of_a_parents_is_said_to_be_its(parent, planned):
    text = (parent / "README.md").read_text()
    (parent / "README.md").write_text(text.replace("license: llama3", "license: foo-bar"))
    card = planned(keep_layers(open_checkpoint(parent), [0], "first"), "x")
    assert "`foo-bar`, as that of `Meta-Llama-3-8B`." in card.section("## Licence")


@pytest.mark.parametrize("name", ["bad name/x", "a/b/c", "", "alone", "me/naïve", "me/x..y"])
def test_a_name_that_the_hub_does_not_take_is_refused(child, tree, home, name):
    before = tree(home)
    with pytest.raises(DowncycleError, match="USER/") as raised:
        write_card(child, name=name)
    assert "\n" not in str(raised.value) and tree(home) == before


def test_the_name_of_the_folder_is_checked_against_the_licence(child, home):
    assert any("begins with 'Llama 3'" in line for line in write_card(child).missing)
    child.rename(home / "Llama-3-small")
    assert not any(line.startswith("name") for line in write_card(home / "Llama-3-small").missing)
    assert any(line.startswith("name") for line in write_card(home / "Llama-3-small", name="jane/Alpaca").missing)


def test_a_licence_that_wants_a_copy_of_itself_is_told_where_there_is_none(child):
    assert not any(line.startswith("LICENSE") for line in write_card(child).missing)
    (child / "LICENSE").unlink()
    assert any(line.startswith("LICENSE") and "llama3/license" in line for line in write_card(child).missing)


def test_a_healed_model(healed, read):
    written = write_card(healed)
    assert written.kept_by_hand == [] and (healed / "NOTICE").read_text() == META_NOTICE
    card = read(healed)
    assert card.data["datasets"] == ["prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "HuggingFaceFW/fineweb"]
    assert card.data["tags"] == ["downcycle", "depth-pruning", "llama", "llama-3", "axolotl", "qlora"]
    summary = card.section("# Llama-3-6B-v0.1")
    assert "6 of its 8 decoder layers" in summary and "from 7.1806 to 2.4942" in summary and "not trained" not in card.text
    training = card.section("## Training")
    assert "1,000,000,000 tokens" in training and "`own.jsonl`" in training
    for row in ("`learning_rate` | 0.0002", "`lora_r` | 128", "`num_devices` | 4", "`total_train_batch_size` | 1,024", "`num_epochs` | 2"):
        assert f"| {row} |" in training
    assert "40 optimiser steps, 2.00 epochs, 20,971,520 tokens" in training
    assert re.findall(r"^\| [\d.]+ \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", training, re.M) == [
        ("0.0010", "1", "7.1806"),
        ("0.5000", "10", "2.5872"),
        ("2.0000", "40", "2.4942"),
    ]
    assert card.section("## Framework versions").splitlines()[1:4] == ["- PEFT 0.20.0", "- Transformers 5.16.1", "- Pytorch 2.13.0+cpu"]
    folded = re.search(r"<details><summary>.*?```yaml\n(.*?)\n```\n\n</details>", card.section("## Recipe"), re.S)[1]
    recipe = yaml.safe_load(folded)
    assert (recipe["base_model"], recipe["output_dir"], recipe["lora_r"]) == ("child", "training", 128)
    assert recipe["hf_token"] == recipe["wandb_entity"] == recipe["hub_model_id"] == "REDACTED"
    assert recipe["special_tokens"] == {"pad_token": "<|pad|>"}
    assert "two steps" not in card.text and "QLoRA" in card.section("## Citation")
    assert "allows 64" in card.section("## Limitations") and "up to 8 tokens" in card.section("## Limitations")


def test_the_training_is_left_out_where_it_is_gone(healed, home, read):
    shutil.rmtree(home / "training")
    missing = write_card(healed).missing
    assert [line.partition(":")[0] for line in missing] == ["training", "recipe", "evaluation"]
    card = read(healed)
    assert "healed by training it further" in card.text and "## Training" not in card.text and "datasets" not in card.data
    assert "not trained after the cut" not in card.text


@pytest.mark.parametrize("where", ["beside the models", "in the cut child", "in the output"])
def test_a_recipe_is_found_where_axolotl_kept_none(healed, home, read, where):
    (home / "training" / "README.md").write_text("# my notes\n")
    places = {"beside the models": home, "in the cut child": home / "child", "in the output": home / "training"}
    (places[where] / "axolotl.yaml").write_text(f"base_model: child\noutput_dir: {home}/training\nlearning_rate: 0.5\n")
    write_card(healed)
    assert "| `learning_rate` | 0.5 |" in read(healed).text


def test_the_recipe_of_another_training_is_not_taken_for_this_ones(healed, home, read):
    (home / "training" / "README.md").unlink()
    (home / "child" / "axolotl.yaml").write_text("base_model: child\noutput_dir: outputs/other\nlearning_rate: 0.5\n")
    assert any(line.startswith("recipe") for line in write_card(healed).missing)
    assert "learning_rate" not in read(healed).text and "### Losses" in read(healed).text


def test_an_adapter(adapter, read):
    write_card(adapter)
    card = read(adapter)
    assert card.data["library_name"] == "peft" and card.data["license"] == "llama3" and "base_model" not in card.data
    assert set(card.data["tags"]) == {"axolotl", "lora", "downcycle", "depth-pruning", "llama", "llama-3", "qlora"} - {"lora"}
    assert "adapter of rank 128 for `child`" in card.text and "PeftModel.from_pretrained(base" in card.text
    assert "More information needed" not in card.text and "See axolotl config" not in card.text  # the trainer's text is replaced
    before = card.text
    write_card(adapter)
    assert (adapter / "README.md").read_text() == before  # what was read from the trainer's card is read from ours
    with pytest.raises(DowncycleError, match="adapter"):
        write_card(adapter, Results((measured("x", "y"),)))


def test_an_adapter_of_a_model_on_the_hub(adapter, read):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write_card(adapter)
    data = read(adapter).data
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("meta-llama/Llama-3.2-1B", "adapter", "llama3.2")
    assert "European Union" in read(adapter).section("## Licence") and "**Built with Llama**" in read(adapter).text


def test_an_adapter_of_a_cut_fits_no_model_of_the_hub(adapter, child, read):
    lineage = json.loads((child / "downcycle.json").read_text()) | {"parent": "meta-llama/Meta-Llama-3-8B", "revision": "0" * 40}
    (child / "downcycle.json").write_text(json.dumps(lineage))
    write_card(adapter)
    card = read(adapter)
    assert "base_model" not in card.data and "(https://huggingface.co/meta-llama/Meta-Llama-3-8B) with 6 of its 8" in card.text


@pytest.mark.parametrize("config", ["", "[]", "{}", "{", '{"base_model_name_or_path": null}'])
def test_an_adapter_whose_config_says_nothing(adapter, read, config):
    (adapter / "adapter_config.json").write_text(config)
    if "null" in config:
        write_card(adapter)
        assert read(adapter).data["library_name"] == "peft"
        return
    before = (adapter / "README.md").read_text()
    with pytest.raises(DowncycleError, match="no config of an adapter"):
        write_card(adapter)
    assert (adapter / "README.md").read_text() == before


def test_a_fully_trained_model_leads_to_the_cut_that_it_was_trained_from(trained, read):
    write_card(trained)
    card = read(trained)
    assert "6 of its 8 decoder layers" in card.text and "██████░░" in card.text and "**Train** what was left" in card.text
    assert card.data["datasets"] == ["HuggingFaceFW/fineweb"] and card.data["license"] == "llama3" and card.data["language"] == ["en"]
    before = card.text
    write_card(trained)
    assert (trained / "README.md").read_text() == before


def test_a_fully_trained_model_whose_base_is_on_the_hub(trained, home, read):
    shutil.rmtree(home / "child")
    text = (trained / "README.md").read_text()
    (trained / "README.md").write_text(
        text.replace(f"base_model: {home}/child\ndatasets:\n  -", "base_model: meta-llama/Llama-3.1-8B\ndatasets:\n  -")
    )
    write_card(trained)
    data = read(trained).data
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("meta-llama/Llama-3.1-8B", "finetune", "llama3.1")
    assert "depth-pruning" not in data["tags"] and "trained further" in read(trained).text


def test_a_model_of_which_nothing_is_known(make, home, read):
    make(home / "m", config={"torch_dtype": "float16"})
    written = write_card(home / "m")
    card = read(home / "m")
    assert card.data == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert 'dtype="float16"' in card.text and "## Limitations" not in card.text and "## Citation" not in card.text
    assert [line.partition(":")[0] for line in written.missing] == ["licence", "evaluation"]


def test_a_parent_that_is_gone_leaves_its_name(child, parent, read):
    shutil.rmtree(parent)
    (child / "LICENSE").unlink()
    write_card(child)
    card = read(child)
    assert "`Meta-Llama-3-8B`" in card.text and "license" not in card.data and "Built with" not in card.text


def test_a_hub_parent_is_named_without_being_asked(child, read):
    revision = "0" * 40
    lineage = json.loads((child / "downcycle.json").read_text()) | {"parent": "meta-llama/Meta-Llama-3-8B", "revision": revision}
    (child / "downcycle.json").write_text(json.dumps(lineage))
    (child / "LICENSE").unlink()
    write_card(child)
    card = read(child)
    assert (card.data["base_model"], card.data["base_model_relation"]) == ("meta-llama/Meta-Llama-3-8B", "finetune")
    assert card.data["license"] == "llama3"  # by the id alone
    assert f"revision `{revision[:12]}`" in card.text
    assert "(https://huggingface.co/meta-llama/Meta-Llama-3-8B)" in card.text


@pytest.mark.parametrize("way", ["cache", "config", "card"])
def test_a_local_parent_that_tells_its_hub_id(parent, home, way, planned):
    place = parent
    if way == "cache":
        place = home / "models--meta-llama--Meta-Llama-3-8B" / "snapshots" / ("1" * 40)
        shutil.copytree(parent, place)
    elif way == "config":
        config = json.loads((parent / "config.json").read_text()) | {"_name_or_path": "meta-llama/Meta-Llama-3-8B"}
        (parent / "config.json").write_text(json.dumps(config))
    else:
        text = (parent / "README.md").read_text()
        (parent / "README.md").write_text(text.replace("license:", "base_model: meta-llama/Meta-Llama-3-8B\nlicense:"))
    child = keep_layers(open_checkpoint(place), [0, 1], "first")
    assert planned(child, "Llama-3-1B").data["base_model"] == "meta-llama/Meta-Llama-3-8B"
    cut = keep_layers(open_checkpoint(write(child, home / "first")), [0], "first")  # and through a cut that was written
    card = planned(cut, "Llama-3-1B")
    assert card.data["base_model"] == "meta-llama/Meta-Llama-3-8B" and "2. **Cut** `first` to its layers 0," in card.text


@pytest.mark.parametrize("named", ["models/child", "checkpoints/llama-cut", "org/model"])
def test_what_may_be_a_folder_is_no_model_of_the_hub(trained, adapter, home, read, named):
    shutil.rmtree(home / "child")
    for folder in (trained, adapter):
        text = (folder / "README.md").read_text().replace(f"{home}/child", named)
        (folder / "README.md").write_text(text.replace("HuggingFaceFW/fineweb", "corpus/train"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": named}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for folder in (trained, adapter):
        missing = write_card(folder).missing
        card = read(folder)
        assert "base_model" not in card.data and f"huggingface.co/{named}" not in card.text and f"`{named.partition('/')[2]}`" in card.text
        assert any(line.startswith(f"base_model: `{named}` may be a folder") for line in missing)
        assert "corpus/train" not in card.data.get("datasets", []) and "huggingface.co/datasets/corpus" not in card.text
    assert any(line.startswith("datasets: `corpus/train`") for line in write_card(trained).missing)
    text = read(trained).text
    (trained / "README.md").write_text(text.replace("library_name:", f"base_model: {named}\nlibrary_name:", 1))
    assert not any(line.startswith("base_model") for line in write_card(trained).missing)
    assert f"(https://huggingface.co/{named})" in read(trained).text  # a person has said so


def test_what_a_local_parents_config_was_saved_as_is_no_model_of_the_hub(parent, planned):
    config = json.loads((parent / "config.json").read_text()) | {"_name_or_path": "outputs/merged"}
    (parent / "config.json").write_text(json.dumps(config))
    card = planned(keep_layers(open_checkpoint(parent), [0, 1], "first"), "Llama-3-1B")
    assert "base_model" not in card.data and "outputs/merged" not in card.text


def test_the_record_of_another_training_is_not_taken_for_this_ones(healed, home, read):
    config = json.loads((home / "training" / "adapter_config.json").read_text()) | {"r": 64}
    (home / "training" / "adapter_config.json").write_text(json.dumps(config))
    assert any(line.startswith("training: ") and "another adapter" in line for line in write_card(healed).missing)
    card = read(healed)
    assert "## Training" not in card.text and "learning_rate" not in card.text and "healed by training it further" in card.text


def test_the_licence_of_what_the_card_says_it_was_made_from_counts(make, home, read):
    make(home / "m")
    (home / "m" / "README.md").write_text("---\nbase_model:\n- meta-llama/Meta-Llama-3-8B\n---\n# Mine\n")
    written = write_card(home / "m")
    assert read(home / "m").data["license"] == "llama3" and written.notice and "**Built with Meta Llama 3**" in read(home / "m").text
    assert any(line.startswith("name: ") for line in written.missing)
    text = read(home / "m").text.replace("license: llama3", "license: mit")
    (home / "m" / "README.md").write_text(text)
    with pytest.raises(DowncycleError, match="begins with 'Llama 3'"):
        check_name(gather(open_checkpoint(home / "m"), "small", home / "m", read(home / "m").data), "me/small")


def test_a_licence_that_the_hub_does_not_list(parent, planned):
    text = (parent / "README.md").read_text()
    (parent / "README.md").write_text(text.replace("license: llama3", "license: other\nlicense_name: acme\nlicense_link: LICENSE"))
    data = planned(keep_layers(open_checkpoint(parent), [0], "first"), "x").data
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "acme", "LICENSE")
    (parent / "README.md").write_text(text.replace("license: llama3", "license: other\nlicense_name: llama4"))
    data = planned(keep_layers(open_checkpoint(parent), [0], "first"), "x").data
    assert (data["license"], data["license_name"]) == ("other", "llama4") and "llama4/license" in data["license_link"]


@pytest.mark.parametrize("text", ["\xff\xfe", "---\na: [\n---\n", "---\n- x\n---\n", "", "# only words"])
def test_a_parents_card_that_says_nothing_does_no_harm(parent, text, planned):
    (parent / "README.md").write_bytes(text.encode("latin-1"))
    assert planned(keep_layers(open_checkpoint(parent), [0], "first"), "x").data["license"] == "llama3"  # its LICENSE says so


def test_data_made_here_tell_where_they_are_from(healed, home, read):
    report = {"arguments": {"src": "HuggingFaceFW/fineweb", "name": "CC-MAIN-2024-10", "language": "en"}, "revision": "a" * 40}
    report |= {"splits": {"train": {"tokens": 1234567, "documents": 890}, "test": {"tokens": 5, "documents": 1}}}
    (home / "web").mkdir()
    (home / "web" / "downcycle-data.json").write_text(json.dumps(report))
    text = (home / "training" / "README.md").read_text()
    entry = f"  - path: {home}/own.jsonl\n    ds_type: json\n"
    text = text.replace(entry, f"  - path: {home}/web\n").replace("prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "data/private")
    (home / "training" / "README.md").write_text(text)
    write_card(healed)
    card = read(healed)
    assert card.data["datasets"] == ["HuggingFaceFW/fineweb"]
    assert "1,234,567 tokens in 890 documents" in card.text and "part `CC-MAIN-2024-10`" in card.text and "- `private`" in card.text


@pytest.mark.parametrize(
    "log", ["", "{", '{"log_history": 3}', '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "eval_loss": "x"}]}']
)
def test_a_damaged_trainers_log_does_no_harm(healed, home, read, log):
    (home / "training" / "checkpoint-40" / "trainer_state.json").write_text(log)
    write_card(healed)
    assert "| `learning_rate` | 0.0002 |" in read(healed).text and "nan" not in read(healed).text.lower().replace("finance", "")


def test_a_long_log_is_thinned_to_a_table_that_people_read(healed, home, read):
    log = [{"step": step, "epoch": step / 1000, "loss": 5 - step / 1000} for step in range(1, 1001)]
    (home / "training" / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    write_card(healed)
    rows = re.findall(r"^\| ([\d.]+) \| [\d.]+ \| ([\d,]+) \|$", read(healed).text, re.M)
    assert len(rows) == 40 and rows[0] == ("4.9990", "1") and rows[-1] == ("4.0000", "1,000")


@pytest.mark.parametrize("lineage", [{"x": 1}, {"parent": 3, "layers": [0]}, {"parent": "p", "layers": 5}, {"parent": "p", "layers": [0]}])
def test_a_lineage_that_was_changed_is_refused_in_one_line(child, tree, home, lineage):
    (child / "downcycle.json").write_text(json.dumps(lineage))
    before = tree(home)
    with pytest.raises(DowncycleError, match="downcycle.json: does not say how") as raised:
        write_card(child)
    assert "\n" not in str(raised.value) and tree(home) == before


def test_a_result_that_is_no_number_is_refused(healed, results):
    spoilt = replace(results.models[1], scores=(replace(results.models[1].scores[0], value=float("nan")),))
    with pytest.raises(DowncycleError, match="no finite number"):
        write_card(healed, replace(results, models=(results.models[0], spoilt)))


def measured(name, content, role="model", shift=0.0, **more):
    scores = (
        Score("arc_challenge", "ARC-Challenge", "acc_norm", 0.5321 - shift, 0.0146, 25, 1172, None, "1.0", group="openllm"),
        Score("truthfulqa_mc2", "TruthfulQA", "acc", 0.4412 - shift, 0.014, 0, 817, None, "3.0", group="openllm"),
        Score("own_task", "Own task", "word_perplexity", 12.3456, None, None, 10, 10, "0", higher_is_better=False, group="own"),
    )
    text = Perplexity("/home/jane-doe/held-out.txt", "d", 2.5 + shift, 0.01, 12.18, 0.91, 1000, 4000, 3, 64, 32)
    sizes = {"layers": 6, "parameters": 1000, "nbytes": 2000, "load": "bf16", "device": "cpu"}
    return ModelResult(name, content, role, **sizes, perplexity=(text,), scores=scores, speed=Speed(64, 32, 900.0, 30.0, 5000, 3), **more)


@pytest.fixture
def results(healed, parent):
    """What a comparison of parent and healed model would say."""
    contents = [content_digest(open_checkpoint(folder)) for folder in (parent, healed)]
    models = (
        measured(str(parent), contents[0], "parent"),
        measured("Llama-3-6B-v0.1", contents[1], "healed", 0.1, depth=8, kept=tuple(range(6))),
    )
    return Results(models, "AMD EPYC, 2 cores, 24 GiB", {"torch": "2.13.0", "lm_eval": "0.4.11"}, "2026-01-01")


def test_results_become_a_model_index_as_the_leaderboard_spelt_it(healed, results, read):
    write_card(healed, results)
    card = read(healed)
    index = card.data["model-index"][0]
    assert index["name"] == "Llama-3-6B-v0.1"
    arc = index["results"][0]
    assert arc["dataset"] == {
        **{"name": "AI2 Reasoning Challenge (25-Shot)", "type": "ai2_arc", "config": "ARC-Challenge", "split": "test"},
        "args": {"num_few_shot": 25},
    }
    assert arc["metrics"] == [{"type": "acc_norm", "value": 43.21, "name": "normalized accuracy"}]
    assert arc["task"] == {"type": "text-generation", "name": "Text Generation"}
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in card.results}
    assert found == {
        **{("ai2_arc", "acc_norm"): 43.21, ("truthful_qa", "mc2"): 34.12, ("own_task", "word_perplexity"): 12.3456},
        **{("held-out.txt", "perplexity"): 12.18, ("held-out.txt", "bits_per_byte"): 0.91},
    }


def test_ways_of_measuring_one_data_set_stay_apart(healed, results, read):
    def score(shots, metric, value, limit=None):
        return Score("hellaswag", "HellaSwag", metric, value, 0.01, shots, 100, limit, "1.0", group="openllm")

    scores = (score(10, "acc_norm", 0.4), score(0, "acc_norm", 0.3), score(10, "acc", 0.2), score(10, "acc_norm", 0.1, limit=50))
    texts = tuple(replace(results.models[1].perplexity[0], length=length, perplexity=float(length)) for length in (64, 128))
    models = (results.models[0], replace(results.models[1], scores=scores, perplexity=texts))
    write_card(healed, replace(results, models=models))
    found = [(one.dataset_args, one.metric_type, one.metric_value) for one in read(healed).results if one.metric_type != "bits_per_byte"]
    assert found == [
        ({"num_few_shot": 10}, "acc_norm", 40.0),
        ({"num_few_shot": 10}, "acc", 20.0),
        ({"num_few_shot": 0}, "acc_norm", 30.0),
        ({"num_few_shot": 10, "limit": 50}, "acc_norm", 10.0),
        ({"window": 64, "stride": 32, "tokens": 1000}, "perplexity", 64.0),
        ({"window": 128, "stride": 32, "tokens": 1000}, "perplexity", 128.0),
    ]


def test_the_evaluation_shows_the_models_side_by_side(healed, results, read):
    written = write_card(healed, results)
    section = read(healed).section("## Evaluation")
    assert "| Benchmark | Metric | Meta-Llama-3-8B | Llama-3-6B-v0.1 |" in section
    assert "| ARC-Challenge (25-shot) | acc_norm | 53.2 ± 1.5 | 43.2 ± 1.5 (81.2%) |" in section
    assert "| **Average** | of 2 | 48.7 ± 1.0 | 38.7 ± 1.0 (79.5%) |" in section
    assert "2.5000 ± 0.0100 | 2.6000 ± 0.0100" in section and "windows of 64 with a stride of 32" in section
    assert "lm-evaluation-harness 0.4.11" in section and "AMD EPYC" in section and "decode, tokens per second | 30.00" in section
    assert "No benchmark results" not in read(healed).text
    assert "lost most on TruthfulQA (77.3% left)" in read(healed).section("## Limitations")
    assert not any(line.startswith("evaluation") for line in written.missing)


def test_the_evaluation_names_chance_and_how_much_was_used(healed, results, read):
    def changed(model):
        first, second, third = model.scores
        return replace(model, scores=(replace(first, chance=0.25, limit=100), replace(second, limit=1000), replace(third, chance=None)))

    write_card(healed, replace(results, models=tuple(map(changed, results.models))))
    section = read(healed).section("## Evaluation")
    assert "| ARC-Challenge (25-shot) | acc_norm, first 100, chance 25 |" in section
    assert "| TruthfulQA (0-shot) | acc |" in section  # it has 817 examples, and all were used
    assert "| Own task | word_perplexity, first 10 |" in section


def test_results_of_other_weights_are_refused_and_nothing_is_written(parent, results, tree, home):
    child = write(keep_layers(open_checkpoint(parent), [1, 2]), home / "other")
    before = tree(home)
    with pytest.raises(DowncycleError, match="holds results of .* and not of these weights") as raised:
        write_card(child, results)
    assert "\n" not in str(raised.value) and tree(home) == before


def test_results_stay_in_the_card_when_a_later_run_has_none(healed, results, read):
    write_card(healed, results)
    before = read(healed).text
    write_card(healed)
    after = read(healed)
    assert after.section("## Evaluation") == before.partition("\n## Evaluation\n")[2].partition("\n## ")[0]
    assert len(after.results) == 5 and "No benchmark results" not in after.text


def test_results_that_come_later_get_their_place(healed, results, read):
    write_card(healed)
    write_card(healed, results)
    assert re.findall(r"^## (.*)$", read(healed).text, re.M) == [
        *(
            "How it was made",
            "How to use it",
            "Training",
            "Recipe",
            "Evaluation",
            "Framework versions",
            "Limitations",
            "Licence",
            "Citation",
        ),
    ]


def test_pictures_are_drawn_where_matplotlib_is(healed, results, read):
    pytest.importorskip("matplotlib")
    written = write_card(healed, results)
    assert written.pictures == ["figures/layers.png", "figures/loss.png", "figures/benchmarks.png"]
    for path in written.pictures:
        assert (healed / path).read_bytes().startswith(b"\x89PNG") and f"]({path})" in read(healed).text
    assert sorted(path.name for path in (healed / "figures").iterdir()) == ["benchmarks.png", "layers.png", "loss.png"]


def test_a_picture_that_the_card_no_longer_shows_is_deleted(healed, home, results, read):
    pytest.importorskip("matplotlib")
    write_card(healed, results)
    (healed / "figures" / "mine.png").write_bytes(b"mine")
    shutil.rmtree(home / "training")  # so that there is no loss to draw
    text = (healed / "README.md").read_text()
    (healed / "README.md").write_text(re.sub(r"<!-- downcycle:(training|making) .*?<!-- /downcycle:\1 -->\n", "", text, flags=re.S))
    assert write_card(healed).pictures == []
    assert sorted(path.name for path in (healed / "figures").iterdir()) == ["benchmarks.png", "mine.png"]  # what the card still shows
    assert "](figures/benchmarks.png)" in read(healed).text


def test_a_picture_of_a_persons_is_not_deleted_with_the_first_card(healed):
    shutil.rmtree(healed.parent / "training")
    (healed / "figures").mkdir()
    (healed / "figures" / "loss.png").write_bytes(b"mine")
    write_card(healed)
    assert (healed / "figures" / "loss.png").read_bytes() == b"mine"


def test_without_matplotlib_the_card_is_text(healed, results, read, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert write_card(healed, results).pictures == []
    assert "figures/" not in read(healed).text and not (healed / "figures").exists()


def test_the_same_input_gives_the_same_bytes(healed, results, home):
    write_card(healed, results)
    first = (healed / "README.md").read_bytes()
    write_card(healed, results)
    assert (healed / "README.md").read_bytes() == first
    (healed / "README.md").unlink()
    write_card(healed, results)
    assert (healed / "README.md").read_bytes() == first
    child = keep_layers(open_checkpoint("demo"), even(12, 6), "even")
    assert card_files(child, "x") == card_files(child, "elsewhere/x")


def test_names_that_are_no_plain_words_do_not_break_the_card(parent, planned):
    child = keep_layers(open_checkpoint(parent), [0], "first")
    card = planned(child, 'we|ird `name` "<!-- /downcycle:summary -->"')
    assert card.text.count("<!-- /downcycle:summary -->") == 1
    compile(re.search(r"```python\n(.*?)```", card.text, re.S)[1], "card", "exec")


def test_a_packed_model_states_bytes_and_no_parameters(make, home, planned):
    make(home / "m", config={"quantization_config": {"quant_method": "gptq"}, "dtype": "float16"})
    card = planned(open_checkpoint(home / "m"), "m")
    assert "of packed weights" in card.text and "parameters" not in card.text and "dtype=" not in card.text


def test_the_snippet_runs(home, read, capsys, monkeypatch):
    pytest.importorskip("torch")
    folder = write(keep_layers(open_checkpoint("demo"), [0, 11], "tail"), home / "tiny")
    write_card(folder)
    exec(re.search(r"```python\n(.*?)```", read(folder).text, re.S)[1], {})  # the folder lies in the current one
    assert capsys.readouterr().out.startswith("The best thing about a small model is")


def test_a_real_merge(home, tmp_path, read):
    pytest.importorskip("peft")
    import tiny_adapters

    from downcycle import merge_adapter

    base, adapter = tiny_adapters.make(home, "llama", target_modules=["q_proj", "down_proj"])
    child = open_checkpoint(write(keep_layers(open_checkpoint(base), [0], "first"), home / "cut"))
    planned = card_files(merge_adapter(open_checkpoint(base), adapter), "merged")
    assert "**Merge** the adapter `adapter`" in read(planned["README.md"].decode()).text
    assert "`base`, trained further" in read(planned["README.md"].decode()).text
    folder = write(merge_adapter(open_checkpoint(base), adapter), home / "merged")
    write_card(folder)
    assert read(folder).data["library_name"] == "transformers" and verify(folder) and child.num_layers == 1


def test_a_cut_loads_neither_torch_nor_the_hubs_client():
    import subprocess

    code = (
        "import sys; from downcycle import open_checkpoint, keep_layers; from downcycle.eval.card.card import card_files; "
        "card_files(keep_layers(open_checkpoint('demo'), [0], 'first'), 'x'); "
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'huggingface_hub', 'lm_eval') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}).stdout == "[]\n"
