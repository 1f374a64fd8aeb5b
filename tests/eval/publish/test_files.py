"""What a push would send is listed with its bytes, what stays behind with the reason; what must not be published is refused."""

import json
import os
import shutil

import pytest

from downcycle import keep_layers, open_checkpoint, write
from downcycle.eval.publish.files import plan_push

REPO = "ann/small"
SECRET = "hf_" + "Planted2026" * 4


@pytest.fixture
def full(model):
    """A cut with all sorts of things beside it."""
    for path in ("notes/how.txt", "model-q4.gguf", "LICENSE", "NOTICE", "generate.py"):
        (model / path).parent.mkdir(exist_ok=True)
        (model / path).write_text(f"{path}\n")
    for path in (
        "checkpoint-120/optimizer.pt",
        "prepared/x/a.arrow",
        "datasets-cache/a.lock",
        "__pycache__/a.pyc",
        "runs/events",
        "wandb/a",
    ):
        (model / path).parent.mkdir(parents=True)
        (model / path).write_text("1")
    for path in ("axolotl.log", "debug.log", "training_args.bin", "trainer_state.json", ".gitattributes", "README.md~", "axolotl.yaml"):
        (model / path).write_text("a: 1\n")
    (model / ".cache").mkdir()
    (model / ".cache" / "token").write_text(SECRET)
    (model / "twin.txt").symlink_to("notes/how.txt")
    (model / "twins").symlink_to("notes")
    return model


GO = {"LICENSE", "NOTICE", "README.md", "chat_template.jinja", "config.json", "downcycle.json", "figures/layers.png", "generate.py"}
GO |= {
    "generation_config.json",
    "model-q4.gguf",
    "model.safetensors.index.json",
    "notes/how.txt",
    "tokenizer.json",
    "tokenizer_config.json",
}
GO |= {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)} | {"twin.txt"}
STAY = {
    **dict.fromkeys(("checkpoint-120/", "training_args.bin", "trainer_state.json"), "state of a training"),
    **dict.fromkeys(("prepared/", "datasets-cache/", "__pycache__/"), "cache"),
    **dict.fromkeys(("runs/", "wandb/", "axolotl.log", "debug.log"), "log"),
    **dict.fromkeys((".cache/", ".gitattributes"), "hidden"),
    "README.md~": "left by a program",
    "axolotl.yaml": "recipe; --include-recipe takes it along",
    "twins/": "link to a folder of this one",
}


def test_what_goes_and_what_stays(full, hub):
    plan = plan_push(full, REPO)
    assert set(plan.files) == GO
    assert plan.files == {path: (full / path).stat().st_size for path in sorted(GO)}
    assert plan.bytes == sum(plan.files.values())
    assert plan.left_out == STAY
    assert plan.proof.startswith(f"verified: layers 0-1,5 of {full.parent / 'parent'}, ")
    assert not hub.requests  # nothing is asked of the Hub, nor sent


def test_nothing_is_written(full, tree):
    before = tree(full)
    plan_push(full, REPO, include_recipe=True)
    assert tree(full) == before


RECIPE = f"""# heals it
base_model: /home/ann/models/child  # a path
output_dir: ./out
wandb_entity: ann-private
hub_token: {SECRET}
learning_rate: 0.0002
"""


def test_the_recipe_goes_where_that_is_asked_as_the_card_shows_it(model, hub):
    import yaml

    from downcycle.eval.publish.push import push

    (model / "axolotl.yaml").write_text(RECIPE)
    plan = plan_push(model, REPO, include_recipe=True)
    assert "axolotl.yaml" in plan.files and "axolotl.yaml" not in plan.left_out
    push(plan)
    arrived = hub.content(REPO)["axolotl.yaml"]
    assert len(arrived) == plan.files["axolotl.yaml"]
    assert b"/home/ann" not in arrived and b"ann-private" not in arrived and SECRET.encode() not in arrived
    assert yaml.safe_load(arrived)["learning_rate"] == 0.0002
    assert b"# heals it" in arrived
    assert (model / "axolotl.yaml").read_text() == RECIPE
    assert "axolotl.yaml" not in plan_push(model, REPO).files


def test_no_recipe(model, line):
    text = line(plan_push, model, REPO, include_recipe=True)
    assert text.startswith(f"--include-recipe: {model} has no axolotl.yaml")


def test_a_healed_model_brings_the_recipe_of_its_training(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("torch")
    from tiny_adapters import make

    from downcycle import merge_adapter

    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    write(merge_adapter(open_checkpoint(base), adapter), tmp_path / "healed")
    (tmp_path / "axolotl.yaml").write_text(f"base_model: {base}\noutput_dir: {adapter}\nadapter: lora\n")
    plan = plan_push(tmp_path / "healed", REPO, include_recipe=True)
    assert plan.contents["axolotl.yaml"].endswith(b"base_model: base\noutput_dir: adapter\nadapter: lora\n")
    assert plan.proof.startswith(f"verified: {base} with {adapter} merged into it")


PLANTED = {
    "in the card": ("README.md", f"# A\n\nuse {SECRET}\n", "README.md: a Hugging Face token in line 3"),
    "in a note": ("notes/a.txt", SECRET, "notes/a.txt: a Hugging Face token in line 1"),
    "in a small file": ("generation_config.json", f'{{"a": "{SECRET}"}}', "generation_config.json: a Hugging Face token in line 1"),
    "by name": (".env", "A=1", "secrets by their names (.env)"),
    "by name, below": ("notes/id_rsa", "A=1", "secrets by their names (notes/id_rsa)"),
    "in a picture": ("figures/a.png", f"\0{SECRET}", "figures/a.png: a Hugging Face token"),
    "optimizer": ("optimizer.pt", "x", "states of an optimizer (optimizer.pt)"),
    "scheduler": ("scheduler.pt", "x", "states of an optimizer (scheduler.pt)"),
    "random": ("rng_state_0.pth", "x", "states of an optimizer (rng_state_0.pth)"),
    "optimizer, numpy": ("optimizer_state.npz", "x", "states of an optimizer (optimizer_state.npz)"),
    "optimizer, short": ("opt.npz", "x", "states of an optimizer (opt.npz)"),
    "optimizer, safetensors": ("optimizer.safetensors", "x", "states of an optimizer (optimizer.safetensors)"),
    "netrc": ("netrc", "x", "secrets by their names (netrc)"),
    "utf-16": ("a.txt", f"\ufeff{SECRET}".encode("utf-16-le"), "a.txt: a Hugging Face token in line 1"),
    "sharded": ("__0_0.distcp", "x", "states of an optimizer (__0_0.distcp)"),
    "deepspeed": ("global_step12/a.txt", "x", "states of an optimizer (global_step12/)"),
    "optimizer below": ("notes/optimizer.bin", "x", "states of an optimizer (notes/optimizer.bin)"),
    "pickle": ("pytorch_model.bin", "x", "pickles, which can run code when read (pytorch_model.bin)"),
    "pickle, pt": ("consolidated.00.pth", "x", "pickles, which can run code when read (consolidated.00.pth)"),
    "other weights": ("extra.safetensors", "x", "weights of which nothing is known (extra.safetensors)"),
    "other weights below": ("old/model.safetensors", "x", "weights of which nothing is known (old/model.safetensors)"),
    "line break": ("a\nb.txt", "x", "names that the Hub cannot hold"),
    "backslash": ("a\\b.txt", "x", "names that the Hub cannot hold"),
    "not utf-8": (b"\xff.txt", "x", "names that the Hub cannot hold"),
}


@pytest.mark.parametrize(("path", "content", "expected"), PLANTED.values(), ids=PLANTED)
def test_what_is_refused(model, line, path, content, expected):
    place = os.path.join(os.fsencode(model), path if isinstance(path, bytes) else os.fsencode(path))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    text = line(plan_push, model, REPO)
    assert text.startswith(f"{model}: not pushed, as it holds ") and expected in text
    assert "Take that out, and push again" in text and SECRET not in text


def test_all_that_is_refused_is_named_together(model, line):
    for path in ("id_rsa", "optimizer.pt", "a.bin", "b.bin", "c.bin", "d.bin", "e.bin"):
        (model / path).write_text("1")
    (model / "notes.txt").write_text(SECRET)
    assert line(plan_push, model, REPO) == (
        f"{model}: not pushed, as it holds pickles, which can run code when read (a.bin, b.bin, c.bin and 2 more); secrets by their names "
        "(id_rsa); states of an optimizer (optimizer.pt); what looks like secrets (notes.txt: a Hugging Face token in line 1). Take that "
        "out, and push again; a secret that others have seen is to be replaced"
    )


def test_the_users_own_secrets_are_found(model, line, token, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "plain words")
    (model / "notes.txt").write_text(f"here are plain words, and {token}")
    text = line(plan_push, model, REPO)
    assert "SOME_API_KEY in line 1" in text and "your token for the Hub in line 1" in text


def test_a_secret_in_the_metadata_of_weights(model, line, make, pack_file, read_back):
    tensors = read_back(model)
    shutil.rmtree(model)
    make(model)
    (model / "model.safetensors").write_bytes(pack_file(tensors, {"format": "pt", "made by": SECRET}))
    assert "model.safetensors: a Hugging Face token)" in line(plan_push, model, REPO)


def test_links(model, line, tmp_path):
    (tmp_path / "outside.txt").write_text("1")
    (model / "a.txt").symlink_to(tmp_path / "outside.txt")
    (model / "b").symlink_to(tmp_path)
    (model / "c.txt").symlink_to("gone.txt")
    assert "links that lead out of the folder (a.txt, b/); links that lead nowhere (c.txt)" in line(plan_push, model, REPO)


def test_what_is_no_file_stays(model):
    os.mkfifo(model / "pipe")
    assert plan_push(model, REPO).left_out == {"pipe": "no plain file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read(model, line):
    (model / "notes.txt").write_text("1")
    (model / "notes.txt").chmod(0)
    assert "files that cannot be read (notes.txt)" in line(plan_push, model, REPO)


@pytest.mark.parametrize("repo", ["small", "a/b/c", "-a/b", "ann/a b", "ann/a..b", "", "ann/", "ann/x.git", "https://huggingface.co/ann/x"])
def test_bad_names(model, line, hub, repo):
    text = line(plan_push, model, repo)
    assert text.startswith(repo) and "USER/" in text
    assert not hub.requests


def test_no_folder(tmp_path, line):
    assert line(plan_push, tmp_path / "none", REPO).startswith(f"{tmp_path / 'none'}: no such folder")
    assert line(plan_push, tmp_path, REPO).startswith(f"{tmp_path}: neither a model nor an adapter")


def llama(folder, tmp_path, make, origin="meta-llama/Meta-Llama-3-8B"):
    """Make a cut of what names itself a Llama 3."""
    make(tmp_path / "meta", config={"_name_or_path": origin})
    write(keep_layers(open_checkpoint(tmp_path / "meta"), [0, 3]), folder)
    return folder


@pytest.mark.parametrize(
    ("repo", "good"), [("ann/small", False), ("ann/My-Llama-3-6B", False), ("ann/Llama-3-6B", True), ("ann/llama3-6b", True)]
)
def test_a_llama_is_called_one(tmp_path, make, line, hub, repo, good):
    folder = llama(tmp_path / "child", tmp_path, make)
    if good:
        assert plan_push(folder, repo).files
    else:
        text = line(plan_push, folder, repo)
        assert "Meta Llama 3 Community License" in text and "begins with 'Llama 3'" in text
    assert not hub.requests


@pytest.mark.parametrize(("key", "repo"), [("llama3.1", "ann/small"), ("llama3.2", "ann/small"), ("llama3", "ann/Llama-6B")])
def test_the_licence_that_a_card_names_counts(model, line, key, repo):
    (model / "README.md").write_text(f"---\nlicense: {key}\n---\n# A\n")
    assert "asks for a name that begins with" in line(plan_push, model, repo)
    plan_push(model, "ann/Llama-3-small")


def test_notes(tmp_path, make, model):
    folder = llama(tmp_path / "child2", tmp_path, make)
    notes = " | ".join(plan_push(folder, "ann/Llama-3-x").notes)
    assert f"no README.md; `downcycle card {folder}` writes one" in notes
    assert "asks that a copy of it goes along; there is no LICENSE file" in notes
    assert "asks for a NOTICE file; there is none" in notes
    assert f"downcycle.json, which says what the model was made from, names places of this machine, such as {tmp_path / 'meta'}" in notes
    (folder / "LICENSE").write_text("META LLAMA 3 COMMUNITY LICENSE AGREEMENT")
    (folder / "NOTICE").write_text("Meta Llama 3")
    (folder / "README.md").write_text("# A\n")
    notes = " | ".join(plan_push(folder, "ann/Llama-3-x").notes)
    assert "README.md does not" in notes and "LICENSE" not in notes and "NOTICE" not in notes
    (folder / "README.md").write_text("# A\nBuilt with Meta Llama 3\n")
    assert all(note.startswith("downcycle.json") for note in plan_push(folder, "ann/Llama-3-x").notes)


OTHER_WEIGHTS = ["foreign.gguf", "sub/model.onnx", "a.npz", "b.h5", "opt-125m.npz"]


def test_weights_in_other_formats_go_with_a_note(model):
    for path in OTHER_WEIGHTS:
        (model / path).parent.mkdir(exist_ok=True)
        (model / path).write_bytes(b"1")
    plan = plan_push(model, REPO)
    assert set(OTHER_WEIGHTS) <= set(plan.files)
    note = "nothing proves where the weights in a.npz, b.h5, foreign.gguf and 2 more come from; they go as they are"
    assert [said for said in plan.notes if "proves" in said] == [note]


OF_ROOT = "/".join(("", "root", "x"))
PLACES = {
    "home": ("README.md", "# A\nsee /home/bob/y, and more", "/home/bob/y"),
    "macOS": ("notes/a.txt", "(/Users/bob/x)", "/Users/bob/x"),
    "Windows": ("a.json", '{"a": "C:\\\\Users\\\\bob\\\\x"}', "C:\\\\Users\\\\bob\\\\x"),
    "root": ("a.py", f"x = '{OF_ROOT}'", OF_ROOT),
}


@pytest.mark.parametrize(("path", "text", "place"), PLACES.values(), ids=PLACES)
def test_places_of_this_machine_are_noted(model, path, text, place):
    (model / path).parent.mkdir(exist_ok=True)
    (model / path).write_text(text)
    assert f"{path} names a place of this machine, {place}" in plan_push(model, REPO).notes


def test_where_a_model_was_loaded_from_is_noted(parent):
    config = json.loads((parent / "config.json").read_text())
    for place, is_noted in (("/data/bob/llama", True), ("../llama", True), ("meta-llama/x", False), ("", False)):
        (parent / "config.json").write_text(json.dumps(config | {"_name_or_path": place}))
        (parent / "README.md").write_text("# A\nhttps://host/home/bob and ./home/x/y\n")
        notes = [note for note in plan_push(parent, REPO).notes if "names a place" in note]
        assert notes == [f"config.json names a place of this machine, {place}"] * is_noted


CARDS = {
    "a path": ("base_model: /home/ann/parent", "its base_model is /home/ann/parent, which is no name on the Hub"),
    "a list with a path": ("base_model:\n- ann/parent\n- ../parent", "its base_model is ../parent"),
    "three parts": ("base_model: outputs/ann/parent", "its base_model is outputs/ann/parent"),
    "no yaml": ("base_model: [", "metadata are no YAML"),
    "no map": ("- a", "no mapping"),
}


@pytest.mark.parametrize(("text", "expected"), CARDS.values(), ids=CARDS)
def test_cards_that_the_hub_refuses(model, line, text, expected):
    (model / "README.md").write_text(f"---\n{text}\n---\n# A\n")
    refusal = line(plan_push, model, REPO)
    assert refusal.startswith(f"{model}/README.md: ") and expected in refusal


def test_the_plan_of_json(model):
    plan = plan_push(model, REPO)
    assert json.loads(json.dumps({"files": plan.files, "left_out": plan.left_out, "notes": plan.notes, "proof": plan.proof}))["files"]
