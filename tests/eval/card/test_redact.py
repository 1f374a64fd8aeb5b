"""Nothing secret and no path of a machine gets through; what is neither stays."""

import pytest
import yaml

from downcycle.eval.card.redact import NOTE, SECRET, redact_recipe, scrub
from downcycle.eval.secrets import find_secrets

LOOKS = [
    "hf_abcdefghijklmnopqrstuvwxABCDEFGHIJ",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_abcdefghijklmnopqrstuv",
    "sk-proj-abcdefgh12ijklmnopqrst34",
    "AKIAABCDEFGHIJKLMNOP",
    "xoxb-1234567890-abcdefghij12",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.abc_defghijklm",
]
HEX = "0123456789abcdef0123456789abcdef01234567"
KEYS = ["hf_token", "wandb_api_key", "api_key", "aws_secret_access_key", "password", "hub_token", "token", "wandb_entity", "hub_model_id"]


@pytest.mark.parametrize("secret", LOOKS)
def test_a_token_is_known_by_its_look(secret):
    assert scrub(f"key={secret}, and more") == f"key={SECRET}, and more"
    assert secret not in redact_recipe(f"note: {secret}\n# {secret}\n")


def test_a_password_in_an_address_is_taken_out():
    assert scrub("https://jane:hunter22@host/x") == f"https://{SECRET}@host/x"


def test_the_secrets_of_this_process_are_taken_out_whatever_they_look_like(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "plain-words-nobody-knows")
    assert scrub("a plain-words-nobody-knows b") == f"a {SECRET} b"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "line", ["{key}: {value}", '{key}: "{value}"  # mine', "#  {key}={value}", "env:\n  {key}: '{value}'", "{{{key}: {value}}}"]
)
def test_the_value_of_a_secret_key_is_taken_out_and_the_yaml_stays_yaml(key, line):
    text = redact_recipe(line.format(key=key, value="0a1b2c3d4e5f"))
    assert "0a1b2c3d4e5f" not in text and text.startswith(NOTE)
    value = yaml.safe_load(text)
    assert value is None or SECRET in str(value)


WITHIN = {
    "# export WANDB_API_KEY={}": "# export WANDB_API_KEY=REDACTED",
    "# wandb login {}": "# wandb login REDACTED",
    "# Run: WANDB_API_KEY={} axolotl train x.yaml": "# Run: WANDB_API_KEY=REDACTED axolotl train x.yaml",
    "# Run: HF_TOKEN=short axolotl train x.yaml": "# Run: HF_TOKEN=REDACTED axolotl train x.yaml",
    "# env: {{WANDB_API_KEY: {}}}": "# env: {WANDB_API_KEY: REDACTED}",
    "x: 1  # api_key: 'a b', then": "x: 1  # api_key: REDACTED, then",
    "hub_token: |\n  short\nx: 1": "hub_token: |\n  REDACTED\nx: 1",
    "- hub_token: >-\n    two words\n    more\n  x: 1": "- hub_token: >-\n    REDACTED\n  x: 1",
    "# hub_token: |\n#   short\n# x: 1": "# hub_token: |\n#   REDACTED\n# x: 1",
    "# curl -H 'Authorization: Bearer {}'": "# curl -H 'Authorization: Bearer REDACTED'",
}


@pytest.mark.parametrize("before", WITHIN)
def test_a_secret_is_taken_out_wherever_it_stands(before):
    text = redact_recipe(before.format(HEX))
    assert text == f"{NOTE}\n{WITHIN[before]}\n"
    assert find_secrets(text.encode()) == [] and redact_recipe(text) == text


@pytest.mark.parametrize(
    "key", ["pad_token", "eos_token", "max_tokens", "tokens", "tokenizer_type", "wandb_project", "wandb_mode", "monkey"]
)
def test_what_only_sounds_secret_stays(key):
    assert redact_recipe(f"{key}: value-of-it\n") == f"{key}: value-of-it\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model: /data/jane/My Models/child", "base_model: child"),
        ("base_model: '/data/jane/x y'  # here", "base_model: 'x y'  # here"),
        ("datasets: [{path: /data/a.jsonl, type: x}]", "datasets: [{path: a.jsonl, type: x}]"),
        ("output_dir: ~/out/run", "output_dir: run"),
        ("output_dir: file:///data/out/run", "output_dir: run"),
        ("output_dir: /data/out/run/", "output_dir: run"),
        ("output_dir: ../../jane/run", "output_dir: run"),
        ("# axolotl train /data/jane/a.yaml --out=/data/jane/b", "# axolotl train a.yaml --out=b"),
        ("a: /data/m\n# /data/m-healed, then /data/m.", "a: m\n# m-healed, then m."),
        ("path: C:\\Users\\jane\\x", "path: x"),
        ("path: C:/Users/jane/x", "path: x"),
        ("# at C:/Users/jane/x", "# at x"),
        ("# \\\\host\\jane\\x", "# x"),
        ("# train a.yaml >/srv/jane/out.log 2>/srv/jane/err.log", "# train a.yaml >out.log 2>err.log"),
        ("# x: [/home/jane/a, /home/jane/b]", "# x: [a, b]"),
        ("# {/home/jane/a} |/home/jane/b|", "# {a} |b|"),
        ("# cc -I/home/jane/x", "# cc -Ix"),
        ("# in ~jane/data", "# in data"),
    ],
)
def test_paths_are_shortened_to_their_names(before, after):
    assert redact_recipe(before) == f"{NOTE}\n{after}\n"


@pytest.mark.parametrize(
    "text",
    [
        "base_model: meta-llama/Meta-Llama-3-8B",
        "output_dir: ./outputs/x",
        "output_dir: outputs/x",
        "url: https://host.org/a/b?c=d#e",
        "x: ${HOME}/jane/y",
        "x: $HOME/jane",
        "# split by \\\\d+ and C:// or c:/",
        'chat: "[/INST] </s> <|/im|> {/x}"',
        "lr: 1e-4  # and/or 3 tokens/s, 1/2, half / whole",
        "revision: 0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_is_no_path_stays(text):
    assert redact_recipe(text) == f"{text}\n"


def test_what_was_redacted_is_not_changed_again():
    once = redact_recipe("base_model: /data/jane/child\nhf_token: hf_abcdefghijklmnopqrstuvwx\napi_key: |\n  abc\n")
    assert redact_recipe(once) == once
    assert once.count(NOTE) == 1


def test_a_recipe_that_is_no_yaml_is_redacted_all_the_same():
    assert "/data" not in redact_recipe("a: [\n /data/jane/x")


def test_the_mark_of_an_untouched_recipe_is_left_out_as_the_copy_is_another_file():
    assert redact_recipe("a: 1\n\n# unchanged since it was written: 0123\n") == "a: 1\n"
