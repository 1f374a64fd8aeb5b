"""The card of a model with ternary weights: the whole chain from its parent, and whether it learnt them."""

import json

import pytest

from downcycle import keep_layers, open_checkpoint, write
from downcycle.eval.card.card import card_files, write_card
from downcycle.eval.content import content_digest
from downcycle.eval.results import LayerWeights, ModelResult, Results
from downcycle.surgery.ternary.ternarize import ternarize

RECORD = {"schedule": "linear", "warmup_steps": 10, "k": None, "include": [], "exclude": [], "norm": False, "strength": 1.0, "steps": 40}


@pytest.fixture
def learnt(trained):
    """The trained child, as a training of ternary weights leaves it."""

    def make(**changes):
        config = json.loads((trained / "config.json").read_text()) | {"downcycle_ternary": RECORD | changes}
        (trained / "config.json").write_text(json.dumps(config))
        return trained

    return make


def steps(card):
    return [line for line in card.section("## How it was made").splitlines() if line[:1].isdigit()]


def test_rounded_without_training(parent, planned):
    card, count = planned(ternarize(open_checkpoint(parent)), "Llama-3-8B-1.58"), open_checkpoint(parent).num_elements
    said = f"is `Meta-Llama-3-8B` with ternary weights: {count / 1000:.3g}K parameters ({count:,}; packed in "
    assert f"**Llama-3-8B-1.58** {said}" in card.text
    assert "Its ternary weights were not learnt but rounded: it is of no use but for measuring" in card.text
    assert "**It was never trained with ternary weights.**" in card.section("## Limitations")
    assert len(steps(card)) == 1 and steps(card)[0].startswith("1. **Convert** the linear maps")
    assert "bitnet" in card.data["tags"] and "depth-pruning" not in card.data["tags"]
    assert "2402.17764" in card.section("## Citation") and "TORCH_COMPILE_DISABLE=1" in card.section("## How to use it")
    assert "dtype=" not in card.section("## How to use it")


def test_cut_and_rounded(parent, planned):
    card = planned(ternarize(keep_layers(open_checkpoint(parent), [*range(6)], "first")), "Llama-3-6B-1.58")
    assert "is `Meta-Llama-3-8B` with 6 of its 8 decoder layers" in card.text
    assert [step[:11] for step in steps(card)] == ["1. **Cut** ", "2. **Conver"]
    assert "never trained with ternary weights" in card.text and "not trained after the cut" in card.section("## Limitations")
    assert {"depth-pruning", "bitnet"} <= {*card.data["tags"]}


def test_the_whole_chain(learnt, planned):
    """Parent, cut, trained with ternary weights, packed: the folder of the training leads to the cut, and that to its parent."""
    card = planned(ternarize(open_checkpoint(learnt())), "Llama-3-6B-1.58")
    cut, train, convert = steps(card)
    assert cut.startswith("1. **Cut** `Meta-Llama-3-8B` to its layers 0-5")
    assert (
        train
        == "2. **Train** all of it while its weights become ternary: λ went from 0 to 1, on the schedule `linear`, as described below."
    )
    assert convert.startswith("3. **Convert**")
    assert "is `Meta-Llama-3-8B` with 6 of its 8 decoder layers" in card.text
    assert "Its ternary weights were learnt by training it further on" in card.text and "from 7.1806 to 2.4942." in card.text
    assert "never trained" not in card.text and "not trained after the cut" not in card.text
    assert "HuggingFaceFW/fineweb" in card.section("## Training") and "2.4942" in card.section("## Training")
    assert card.data["license"] == "llama3"
    assert "██████░░" in card.text


def test_a_chain_whose_training_is_gone(learnt, planned, home):
    packed = ternarize(open_checkpoint(learnt()))
    learnt(strength=0.5)  # another training was put there
    card = planned(packed, "Llama-3-6B-1.58")
    assert [step[:12] for step in steps(card)] == ["1. **Train**", "2. **Convert"] and "described below" not in card.text
    assert "Its ternary weights were learnt by training it further." in card.text and "## Training" not in card.text


def test_a_training_that_was_not_finished(learnt, planned):
    card = planned(ternarize(open_checkpoint(learnt(strength=0.75))), "Llama-3-6B-1.58")
    assert "but not to the end: λ reached 0.75 of 1" in card.text and "λ went from 0 to 0.75" in card.text
    assert "**Its training ended before its weights were wholly ternary** (λ = 0.75)." in card.section("## Limitations")


def test_a_healed_model_that_was_only_rounded(healed, planned):
    """The adapter's training is told as what it was, and the rounding as what it is."""
    card = planned(ternarize(open_checkpoint(healed)), "Llama-3-6B-1.58")
    assert [step[:11] for step in steps(card)] == ["1. **Cut** ", "2. **Merge*", "3. **Conver"] and "trained as described below" in steps(
        card
    )[1]
    assert "not learnt but rounded" in card.text and "not trained after the cut" not in card.text


def test_the_folder_of_a_training_is_not_yet_packed(learnt, read):
    """What a training leaves is a floating-point model, whose card says nothing of codes."""
    write_card(learnt())
    card = read(learnt())
    assert "**Convert**" not in card.text and "bitnet" not in card.data["tags"]
    assert "they are not the model that was trained, which `downcycle ternarize` makes of them" in card.text
    assert "with ternary weights its loss on held-out text went from 7.1806 to 2.4942" in card.text and "it was healed" not in card.text


def test_a_cut_of_a_model_that_others_packed(parent, stored, make, planned, home):
    """Nobody here knows whether that was trained."""
    how = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    extra = {f"model.layers.{layer}.mlp.up_proj.weight": stored("U8", (2, 4)) for layer in range(4)}
    extra |= {f"{name}_scale": stored("F32", (1,)) for name in extra}
    make(home / "others", extra=extra, config={"quantization_config": how})
    card = planned(keep_layers(open_checkpoint(home / "others"), [0, 1]), "others-small")
    assert "ternary weights" not in card.text.replace("for these weights", "") and "not trained after the cut" in card.text


def test_what_was_counted_is_shown(home, read):
    pytest.importorskip("torch")
    folder = write(ternarize(keep_layers(open_checkpoint("demo"), [0])), home / "demo-1.58")
    checkpoint = open_checkpoint(folder)
    layers = tuple(LayerWeights(layer, 30, 50, 20, 29, 200, 0.5, 2.0) for layer in range(8))
    one = ModelResult("demo-1.58", content_digest(checkpoint), "ternary", 1, 1124, 999, "packed by bitnet", "cpu", ternary=layers)
    write_card(folder, Results((one,)))
    making = read(folder).section("## How it was made")
    assert "Of its 800 ternary weights 30.0% are -1, 50.0% are 0 and 20.0% are 1; |W - sT| / |W| is 50.0%" in making
    pytest.importorskip("matplotlib")
    assert "](figures/ternary.png)" in making and (folder / "figures" / "ternary.png").read_bytes()[:4] == b"\x89PNG"


def test_no_card_tells_what_is_not_there(parent, home):
    text = card_files(ternarize(open_checkpoint(parent)), "Llama-3-8B-1.58")["README.md"].decode()
    assert "figures/ternary.png" not in text
