"""What looks like a secret is found by its name and in every kind of file, and what merely resembles one is not."""

import random
import string

import pytest

from downcycle.eval.secrets import find_secrets, is_secret_name, own_secrets, take_out

SIGNS = string.ascii_letters + string.digits
RANDOM = random.Random(7)


def signs(count, of=SIGNS):
    """Random signs; a letter and a digit are among them."""
    return "".join(RANDOM.choice(of) for _ in range(count - 2)) + of[0] + of[-1]


SECRETS = {
    "hub": ("a Hugging Face token", f"hf_{signs(34)}"),
    "hub in quotes": ("a Hugging Face token", f'{{"token": "hf_{signs(34)}"}}'),
    "hub of an organisation": ("a Hugging Face token", f"api_org_{signs(34)}"),
    "openai": ("an API key (sk-...)", f"sk-{signs(48)}"),
    "openai, new": ("an API key (sk-...)", f"key: sk-proj-{signs(40)}"),
    "anthropic": ("an API key (sk-...)", f"sk-ant-api03-{signs(90)}"),
    "github": ("a GitHub token", f"ghp_{signs(36)}"),
    "github, fine": ("a GitHub token", f"github_pat_{signs(22)}_{signs(59)}"),
    "aws": ("an AWS key", f"AKIA{signs(16, string.ascii_uppercase + string.digits)}"),
    "aws, secret": ("a secret setting", f"aws_secret_access_key = {signs(40)}"),
    "google": ("a Google key", f"AIza{signs(35)}"),
    "slack": ("a Slack token", f"xoxb-{signs(12, string.digits)}-{signs(24)}"),
    "rsa": ("a private key", "-----BEGIN RSA PRIVATE KEY-----"),
    "openssh": ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    "pkcs8": ("a private key", "-----BEGIN PRIVATE KEY-----"),
    "jwt": ("a login token (JWT)", f"eyJ{signs(20)}.eyJ{signs(60)}.{signs(43)}"),
    "wandb": ("a Weights & Biases key", f"WANDB_API_KEY={signs(40, '0123456789abcdef')}"),
    "wandb in yaml": ("a Weights & Biases key", f"wandb_api_key: '{signs(40, '0123456789abcdef')}'"),
    "wandb, new": ("a Weights & Biases key", f"wandb_v1_{signs(60)}"),
    "wandb login": ("a Weights & Biases key", f"wandb login {signs(40, '0123456789abcdef')}"),
    "setting": ("a secret setting", f'"api_key": "{signs(24)}"'),
    "environment": ("a secret setting", f"export HF_TOKEN={signs(24)}"),
    "notebook": ("a Weights & Biases key", f'"wandb.login(key=\\"{signs(40, "0123456789abcdef")}\\")"'),
    "netrc": ("a password of netrc", f"machine api.wandb.ai login user password {signs(40)}"),
    "bearer": ("an authorization", f"curl -H 'Authorization: Bearer {signs(24)}'"),
    "basic": ("an authorization", f"Authorization: Basic {signs(24)}=="),
    "slack webhook": ("a webhook", f"https://hooks.slack.com/services/T0{signs(8)}/B0{signs(8)}/{signs(24)}"),
    "short password": ("a password", "passwd=hunter2"),
    "below its key": ("a secret setting", f"hub_token: |  {signs(24)}".replace("|  ", "|\n  ")),
    "within a line": ("a secret setting", f"# env: {{HF_TOKEN: {signs(24)}}}"),
    "other variables": ("a secret setting", f"export SLACK_TOKEN={signs(24)}"),
    "address": ("a password in an address", "https://ann:sesame99@example.org/models"),
    "proxy": ("a password in an address", "http_proxy: http://proxy:s3same@10.0.0.1:3128"),
}
INNOCENT = [
    "token: null",
    "hub_token:",
    "hf_token = os.environ['HF_TOKEN']",
    'api_key="YOUR_API_KEY"',
    "api_key: ${SOME_LONG_VARIABLE_NAME}",
    "password: <your password of 16 signs>",
    "pass your token with --token hf_xxx",
    "hf_model_name_of_more_than_thirty_signs_altogether",
    "eos_token: <|end_of_text|>, special_tokens: 128001",
    "task-oriented-dialogue-systems-2024-with-llms",
    "risk-" + "a1" * 20,
    "https://example.org:8080/a@b",
    "https://huggingface.co/ann/model@main",
    "-----BEGIN PUBLIC KEY-----",
    "-----BEGIN CERTIFICATE-----",
    "sha256: " + "0123456789abcdef" * 4,
    "export HF_TOKEN=hf_" + "x" * 34,
    "sk-learn-0-24-compatible-pipeline",
    "use_auth_token=kwargs.get_auth_token_v2",
    "hub_token: tokenizer_special_v1_pad",
    "password=self.password2, user=input_1",
    "connect(password=secret_of(name1))",
    '"password": 28921, "secret_key": 1',
    "bearer of 2024-instruction-tuned-models",
    "https://github.com/wandb/wandb/commit/" + "0123456789" * 4,
    "data:image/png;base64,iVBORw0KGgoAKIA1234567890ABCDEF",
    "https://hooks.slack.com/services/T0000/B000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "wandb_project: " + "healing-llama-3-6b-of-the-year-2026",
]


@pytest.mark.parametrize(("kind", "text"), SECRETS.values(), ids=SECRETS)
def test_kinds(tmp_path, kind, text):
    path = tmp_path / "notes.md"
    path.write_text(f"# Notes\n\nUse {text}\nand no other\n")
    assert f"{kind} in line 3" in find_secrets(path)
    assert find_secrets(path.read_bytes()) == find_secrets(path)
    assert all(text not in found for found in find_secrets(path))
    clean = take_out(path.read_text(), "REDACTED")
    assert find_secrets(clean.encode()) == [] and "REDACTED" in clean


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_none(tmp_path, text):
    path = tmp_path / "notes.md"
    path.write_text(f"# Notes\n\n{text}\n")
    assert find_secrets(path) == []
    assert take_out(path.read_text(), "REDACTED") == path.read_text()


PLACES = {
    "text": (lambda secret: b"x" * 70_000 + b"\n" + secret, "s.txt", True),
    "text, far behind": (lambda secret: b"line\n" * 2_000_000 + secret, "s.jsonl", True),
    "text, not utf-8": (lambda secret: b"\xff\xfe\n" + secret, "s.txt", True),
    "picture": (lambda secret: b"\x89PNG\r\n\x1a\n\0\0\0\x0dtEXt" + secret, "s.png", True),
    "gguf": (lambda secret: b"GGUF\3\0\0\0" + b"\0" * 5000 + secret, "s.gguf", True),
    "binary, far behind": (lambda secret: b"\0" * (2 << 20) + secret, "s.gguf", False),
    "utf-16": (lambda secret: secret.decode().encode("utf-16"), "s.txt", True),
    "utf-16, far behind": (lambda secret: ("line\n" * 400_000 + secret.decode()).encode("utf-16"), "s.txt", True),
    "utf-16, big-endian and without a mark": (lambda secret: secret.decode().encode("utf-16-be"), "s.txt", True),
    "empty": (lambda secret: b"", "s.txt", False),
}


@pytest.mark.parametrize(("content", "name", "seen"), PLACES.values(), ids=PLACES)
def test_places(tmp_path, content, name, seen):
    (tmp_path / name).write_bytes(content(f"hf_{signs(34)} \n".encode()))
    assert bool(find_secrets(tmp_path / name)) == seen


def test_of_weights_the_header_is_searched_and_not_the_data(tmp_path, pack_file, stored):
    secret = f"hf_{signs(34)}"
    data = secret.encode() + b" " * 27
    weights = pack_file({"a": stored("U8", (64,))._replace(data=data)})
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert find_secrets(tmp_path / "model.safetensors") == []
    (tmp_path / "model.safetensors").write_bytes(pack_file({"a": stored("U8", (64,))}, {"format": "pt", "by": secret}))
    assert find_secrets(tmp_path / "model.safetensors") == ["a Hugging Face token"]


def test_own_secrets_are_found_whatever_they_look_like(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo words of magic\n")
    assert find_secrets(path, {"MY_TOKEN": "words of magic", "OTHER": "else"}) == ["MY_TOKEN in line 2"]


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD", "GH_PAT", "hf_token", "AZURE_ACCOUNT_KEY"])
def test_secrets_of_the_environment_are_ones_own(monkeypatch, name):
    monkeypatch.setenv(name, "words of magic")
    assert own_secrets()[name] == "words of magic"
    assert take_out("two words of magic", "…") == "two …"
    monkeypatch.setenv(name, "short")
    assert name not in own_secrets()


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "PATH", "SSH_KEY_PATH", "GOOGLE_APPLICATION_CREDENTIALS"])
def test_other_variables_are_not(monkeypatch, name):
    monkeypatch.setenv(name, "words of magic")
    assert name not in own_secrets()


NAMES = [".env", ".env.local", "prod.env", "server.pem", "ID_RSA", "id_ed25519", ".netrc", "token", "hf_token", "hf-token.txt", "my.token"]
NAMES += ["access_token.json", "client_secret_1.json", "credentials.json", ".git-credentials", "stored_tokens", "passwords.txt", "a.key"]
OTHERS = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokens.txt"]
NAMES += ["netrc", "secrets.yaml", "my_secret.txt", "hub-passwords.json", "secret_key.txt"]
OTHERS += ["secretary.json", "password_policy.md", "secret-sharing-benchmark.json", "netrcs.md"]
OTHERS += [
    "token_counts.json",
    "id_rsa.pub",
    "environment.yml",
    "keys.md",
    "README.md",
    "model.safetensors",
    "tokenization_x.py",
    "mytoken",
]


def test_names():
    assert [name for name in NAMES if not is_secret_name(name)] == []
    assert [name for name in OTHERS if is_secret_name(name)] == []
