"""Find what must never leave the machine: files that are secrets by their name, and files that hold one.

Says where a secret stands and of what kind it is, never what it is. Text is read whole, of a safetensors file the header, of any other
binary file the first MiB; archives are not opened.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import get_token

from ...surgery.header import LENGTH_BYTES, MAX_HEADER_BYTES

NAMES = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ppk"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*_rsa", "*_ed25519", ".netrc", "_netrc", ".git-credentials", ".pypirc", ".npmrc"),
    *("credentials", "credentials.*", "*secret*", "*password*", "stored_tokens", "kaggle.json", "service-account*.json", ".htpasswd"),
)
TOKEN_NAME = re.compile(r"(.*[^a-z])?token(\.(txt|json|ya?ml|toml|ini|cfg|key|bak|old))?")  # "hf_token.txt", and not "tokenizer.json"
VARIABLES = re.compile(r".*(TOKEN|API_KEY|SECRET|PASSWORD)")
SHORTEST = 8  # characters of a value of the environment that is searched for
SAMPLE = 1 << 20  # bytes of a binary file that are searched

ALONE = rb"(?<![A-Za-z0-9_-]%s)"  # stands behind what it is about: a pattern that begins with plain letters is searched for fast
VALUE = rb"""["']?\s*[:=]\s*["']?(?=[\w+/.~-]*[0-9])(?=[\w+/.~-]*[A-Za-z])[\w+/.~-]{16,}"""
KINDS = (
    ("a Hugging Face token", rb"hf_[A-Za-z0-9]{30,}"),
    ("a Hugging Face token", rb"hf_oauth_[\w.-]{30,}"),
    ("a Hugging Face token", rb"api_org_[A-Za-z0-9]{30,}"),
    ("an API key (sk-...)", rb"sk-" + ALONE % rb"sk-" + rb"(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z])[\w-]{20,}"),
    ("a GitHub token", rb"gh[pousr]_[A-Za-z0-9]{36}"),
    ("a GitHub token", rb"github_pat_\w{40,}"),
    ("an AWS key", rb"AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("an AWS key", rb"ASIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("a Google key", rb"AIza[\w-]{35}"),
    ("a Slack token", rb"xox[abeprs]-[A-Za-z0-9-]{20,}"),
    ("a private key", rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"),
    ("a login token (JWT)", rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ("a Weights & Biases key", rb"wandb_v1_\w{30,}"),
    ("a Weights & Biases key", rb"(?i:wandb)[\w. -]{0,40}(?i:key|login)[^\w\r\n]{1,8}[0-9a-f]{40}(?![0-9a-f])"),
    ("a password in an address", rb"://(?<=(?:tp|ps|es|ql|is|db|rv|qp)://)[^\s/:@\"'<>{}$]{0,80}:[^\s/:@\"'<>{}$*]{3,200}@[\w.-]"),
    (
        "a secret setting",
        rb"(?i:api[_-]?key|secret_?key|secret_access_key|client_secret|passwo?r?d|(?:access|auth|hub|hf|api|bearer)[_-]?token)" + VALUE,
    ),
)
PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in KINDS]


def is_secret_name(name: str) -> bool:
    """Whether a file of this name (without its folder) is there to keep a secret."""
    name = name.lower()
    if name.endswith((".pub", ".safetensors")):
        return False
    return any(fnmatch(name, pattern) for pattern in NAMES) or bool(TOKEN_NAME.fullmatch(name))


def own_secrets() -> dict[str, str]:
    """Return this user's own secrets by what they are called: the token for the Hub, and those in the environment."""
    values = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name) and len(value) >= SHORTEST}
    token = get_token()
    return values | ({"your token for the Hub": token} if token else {})


def find_secrets(place: Path | bytes, own: Mapping[str, str] | None = None) -> list[str]:
    """Say what a file, or a text, holds that nobody else may see, each as "KIND in line N"; in binary files no lines are counted.

    Args:
        own: values that are searched for as they are, by what they are called.
    """
    if isinstance(place, bytes):
        return _find(place, 0, len(place), True, own or {})
    with open(place, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _find(content, 0, *_searched(place, content), own or {})


def _searched(path: Path, content: mmap.mmap) -> tuple[int, bool]:
    """Return how many bytes of a file are searched, and whether it is text."""
    if path.suffix == ".safetensors":
        return min(len(content), LENGTH_BYTES + min(int.from_bytes(content[:LENGTH_BYTES], "little"), MAX_HEADER_BYTES)), False
    if content.find(b"\0", 0, 8192) >= 0:
        return min(len(content), SAMPLE), False
    return len(content), True


def _find(content: bytes | mmap.mmap, start: int, end: int, is_text: bool, own: Mapping[str, str]) -> list[str]:
    found: dict[str, int] = {}
    for kind, pattern in PATTERNS:
        if kind not in found and (match := pattern.search(content, start, end)):
            found[kind] = match.start()
    for name, value in own.items():
        if (at := content.find(value.encode(), start, end)) >= 0:
            found[name] = at
    lines = {kind: 1 + content[:at].count(b"\n") for kind, at in found.items()} if is_text else {}
    return [f"{kind} in line {lines[kind]}" if is_text else kind for kind in found]
