"""The published card of Llama-3-6B, made again from what is known of that model: its shape, its licence, its losses, its recipe."""

import json
import re

import pytest
from huggingface_hub import constants

from downcycle import keep_layers, open_checkpoint, write
from downcycle.eval.card.card import card_files, write_card
from downcycle.recipes import configs
from downcycle.surgery.checkpoint import Checkpoint, Tensor

from hub_server import connected

BLOCK = {
    f"self_attn.{name}_proj.weight": shape
    for name, shape in {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}.items()
}
BLOCK |= {f"mlp.{name}_proj.weight": shape for name, shape in {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}.items()}
BLOCK |= {f"{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
EVALS = [7.1806, 2.6266, 2.5872, 2.5549, 2.5235, 2.5067, 2.4968, 2.4942]  # at step 1, then each quarter of an epoch
STEPS = 23468  # an epoch


def llama_3_8b() -> Checkpoint:
    shapes = {"model.embed_tokens.weight": (128256, 4096), "model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in range(32) for name, shape in BLOCK.items()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "torch_dtype": "bfloat16"}
    config |= {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 128256, "max_position_embeddings": 8192}
    tensors = {name: Tensor("BF16", shape, lambda: ()) for name, shape in shapes.items()}
    files = {"tokenizer.json": b"{}", "LICENSE": b"META LLAMA 3 COMMUNITY LICENSE AGREEMENT"}
    return Checkpoint("meta-llama/Meta-Llama-3-8B", config, tensors, files, revision="8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920")


@pytest.fixture
def card(home, planned, heal):
    steps = [1, *(round(STEPS * quarter / 4) for quarter in range(1, 8))]
    log = [{"step": step, "epoch": step / STEPS, "eval_loss": loss} for step, loss in zip(steps, EVALS, strict=True)]
    output = home / "outputs" / "llama-3-6b-published"
    (output / "checkpoint-41069").mkdir(parents=True)
    (output / "checkpoint-41069" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (home / "Llama-3-6B").mkdir()
    (home / "Llama-3-6B" / "axolotl.yaml").write_text(configs.config_texts()["llama-3-6b/llama-3-6b.yaml"])
    child = keep_layers(llama_3_8b(), [*range(24)], "first")
    healed = heal(child, output, parent="Llama-3-6B", revision=None, adapter="outputs/llama-3-6b-published")
    return planned(healed, "prince-canuma/Llama-3-6B-v0.1")


def test_its_metadata_say_what_the_published_ones_say(card):
    assert card.data == {
        "license": "llama3",
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "datasets": ["prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "HuggingFaceFW/fineweb"],
        "tags": ["downcycle", "depth-pruning", "llama", "llama-3", "axolotl", "qlora"],
    }


def test_its_summary_holds_the_figures(card):
    summary = card.section("# Llama-3-6B-v0.1")
    assert "6,285,365,248" in summary and "24 of its 32 decoder layers" in summary and "1,000,000,000 tokens" in summary
    assert "from 7.1806 to 2.4942" in summary and "**Built with Meta Llama 3**" in summary
    assert "████████████████████████░░░░░░░░" in card.text and "kept 0-23; dropped 24-31" in card.text


def test_its_losses_stand_by_epoch_and_step(card):
    rows = re.findall(r"^\|  \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \|$", card.section("## Training"), re.M)
    assert [float(loss) for _, _, loss in rows] == EVALS
    assert [step for _, step, _ in rows][:3] == ["1", "5,867", "11,734"]
    assert [epoch for epoch, _, _ in rows][1:] == ["0.2500", "0.5000", "0.7500", "1.0000", "1.2500", "1.5000", "1.7500"]


def test_its_hyper_parameters_and_the_whole_recipe_are_there(card):
    for row in (
        "`learning_rate` | 0.0002",
        "`lora_r` | 128",
        "`micro_batch_size` | 2",
        "`gradient_accumulation_steps` | 8",
        "`num_epochs` | 2",
    ):
        assert f"| {row} |" in card.section("## Training")
    assert "optimizer: paged_adamw_32bit" in card.section("## Recipe") and "<details>" in card.section("## Recipe")
    assert 'from_pretrained("Llama-3-6B-v0.1", dtype="bfloat16")' in card.text
    assert "2404.08634" in card.section("## Citation") and "2305.14314" in card.section("## Citation")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback that serves a tiny repo under Meta's name."""
    with connected(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_a_cut_from_the_hub_reads_the_parents_card_where_it_is_open(parent, hub, home, read, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    commit = hub.add("meta-llama/Meta-Llama-3-8B", parent)
    child = keep_layers(open_checkpoint("meta-llama/Meta-Llama-3-8B"), [0, 1], "first")
    before = len(hub.requests)
    files = card_files(child, "Llama-3-1B")
    assert {request.path.rpartition("/")[2] for request in hub.requests[before:]} <= {"README.md", "LICENSE"}
    card = read(files["README.md"].decode())
    assert (card.data["base_model"], card.data["license"], card.data["language"]) == ("meta-llama/Meta-Llama-3-8B", "llama3", ["en"])
    assert f"revision `{commit[:12]}`" in card.text and "Llama 3 Model Card" in card.section("## Citation")
    folder = write(child, home / "Llama-3-1B")
    write_card(folder)  # asks the Hub anew
    assert "Llama 3 Model Card" in read(folder).section("## Citation")


@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 500}, {"status": 404}])
def test_a_hub_that_does_not_answer_leaves_less_known_and_no_error(parent, hub, read, monkeypatch, fault):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.add("someone/model", parent)
    child = keep_layers(open_checkpoint("someone/model"), [0, 1], "first")
    hub.fail("*README.md", **fault)
    hub.fail("*LICENSE", **fault)
    card = read(card_files(child, "x")["README.md"].decode())
    assert card.data["base_model"] == "someone/model" and "license" not in card.data
