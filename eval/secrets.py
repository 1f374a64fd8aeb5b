"""What a secret looks like: one table, by which a push searches files and a card is rid of what must never leave the machine.

Says where a secret stands and of what kind it is, never what it is. Text is read whole, of a safetensors file the header, of any other
binary file the first MiB; archives are not opened.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import AnyStr

from ..surgery.header import LENGTH_BYTES, MAX_HEADER_BYTES

NAMES = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ppk"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*_rsa", "*_ed25519", ".netrc", "_netrc", "netrc", ".git-credentials", ".pypirc"),
    *("credentials", "credentials.*", "client_secret*", "stored_tokens", "kaggle.json", "service-account*.json", ".htpasswd", ".npmrc"),
)
# "hf_token.txt" and "my_passwords.yaml"; neither "tokenizer.json" nor "password_policy.md".
NAMED = re.compile(
    r"(.*[^a-z])?(token|secrets?|secret[-_.]?key|passwords?|passwd)(\.(txt|json|ya?ml|toml|ini|cfg|conf|env|py|csv|key|bak|old))?"
)
VARIABLES = re.compile(
    r".*(TOKEN|API_?KEY|SECRET|(SECRET|ACCESS|ACCOUNT|PRIVATE)_KEY(_ID)?|PASSW(OR)?D|PASSPHRASE|_PAT|WEBHOOK(_URL)?)", re.IGNORECASE
)
SHORTEST = 8  # characters of a value of the environment that is searched for
SAMPLE = 1 << 20  # bytes of a binary file that are searched
WIDE = 1 << 26  # bytes of a text in UTF-16 that are searched

_GIVEN = r"""(?:\\?["'])?[ \t]*(?::=|=>|[:=])[ \t]*(?:[|>][-+]?[ \t]*\r?\n[ \t#]*)?(?:\\?["'])?"""  # between a key and its value
_BODY = r"(?P<secret>[\w+/~=%-]{16,4096})(?![\w(\[{]|\.\w)"
_KEY = (
    r"(?:(?i:api[_-]?key|secret[_-]?key|account[_-]?key|secret[_-]access[_-]key|client[_-]secret|passwo?r?d|"
    r"(?:access|auth|hub|hf|api|bearer)[_-]?token)|[A-Z]_(?:TOKEN|SECRET))"
)
# A pattern that begins with plain letters is searched for fast. What of it is the secret is named so, where that is not all.
KINDS = (
    ("a Hugging Face token", r"hf_[A-Za-z0-9]{30,}"),
    ("a Hugging Face token", r"hf_oauth_[\w.-]{30,}"),
    ("a Hugging Face token", r"api_org_[A-Za-z0-9]{30,}"),
    ("an API key (sk-...)", r"sk-(?<![A-Za-z0-9_-]sk-)[\w-]{20,}"),
    ("a GitHub token", r"gh[pousr]_[A-Za-z0-9]{36}"),
    ("a GitHub token", r"github_pat_\w{40,}"),
    ("an AWS key", r"AKIA(?<![A-Za-z0-9+/]AKIA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("an AWS key", r"ASIA(?<![A-Za-z0-9+/]ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("a Google key", r"AIza[\w-]{35}"),
    ("a Slack token", r"xox[abeprs]-[A-Za-z0-9-]{20,}"),
    ("a webhook", r"hooks\.slack\.com/services/(?P<secret>T\w+/B\w+/\w{16,})"),
    ("a webhook", r"discord(?:app)?\.com/api/webhooks/(?P<secret>\d+/[\w-]{30,})"),
    ("a private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?:-----[^-]{1,20000}-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----)?"),
    ("a login token (JWT)", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ("an authorization", r"(?i:bearer)[ \t]+(?P<secret>[\w+/=.~%-]{16,})"),
    ("an authorization", r"(?i:authorization)" + _GIVEN + r"(?i:basic|token)[ \t]+(?P<secret>[\w+/=.~%-]{16,})"),
    ("a Weights & Biases key", r"wandb_v1_\w{30,}"),
    ("a Weights & Biases key", r"(?i:wandb)[^\r\n]{0,60}?(?i:key|login)[^\w\r\n]{1,12}(?P<secret>[0-9a-f]{40})(?![0-9a-z])"),
    ("a password of netrc", r"machine\s{1,20}\S{1,200}\s{1,20}login\s{1,20}\S{1,200}\s{1,20}password\s{1,20}(?P<secret>\S{3,200})"),
    (
        "a password in an address",
        r"://(?<=(?:tp|ps|es|ql|is|db|rv|qp)://)(?P<secret>[^\s/:@\"'<>{}$]{0,80}:[^\s/:@\"'<>{}$*]{3,200})@[\w.-]",
    ),
    ("a secret setting", _KEY + _GIVEN + _BODY),
    ("a password", r"(?i:passwo?r?d)" + _GIVEN + r"(?P<secret>[^\s\"'<>{}$()\[\],;*\\]{6,80})(?=[\s\"'\\;&]|\Z)"),
)
MIXED = {"an API key (sk-...)", "an authorization", "a secret setting"}  # told by nothing but their letters and digits
LITERAL = {"a private key", "a password in an address", "a password of netrc"}
PATTERNS = [(kind, re.compile(pattern, re.ASCII), re.compile(pattern.encode())) for kind, pattern in KINDS]


def is_secret_name(name: str) -> bool:
    """Whether a file of this name (without its folder) is there to keep a secret."""
    name = name.lower()
    if name.endswith((".pub", ".safetensors")):
        return False
    return any(fnmatch(name, pattern) for pattern in NAMES) or bool(NAMED.fullmatch(name))


def own_secrets() -> dict[str, str]:
    """Return this user's own secrets by what they are called: the token for the Hub, and those in the environment."""
    from huggingface_hub import get_token

    token = get_token()
    return _in_environment() | ({"your token for the Hub": token} if token else {})


def _in_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name) and len(value) >= SHORTEST}


def take_out(text: str, by: str) -> str:
    """Put a word for every secret that a search of this text would find, and for those in the environment."""
    for value in sorted(_in_environment().values(), key=len, reverse=True):
        text = text.replace(value, by)
    for kind, pattern, _ in PATTERNS:
        text = pattern.sub(partial(_replace, kind, by), text)
    return text


def find_secrets(place: Path | bytes, own: Mapping[str, str] | None = None) -> list[str]:
    """Say what a file, or a text, holds that nobody else may see, each as "KIND in line N"; in binary files no lines are counted.

    Args:
        own: values that are searched for as they are, by what they are called.
    """
    if isinstance(place, bytes):
        return _find(place, len(place), True, own or {})
    with open(place, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end, is_text = _searched(place, content)
            found = _find(content, end, is_text, own or {})
            if found or place.suffix == ".safetensors" or content.find(b"\0", 0, end) < 0:
                return found
            return _find(_narrow(content), WIDE, content[:2] in (b"\xff\xfe", b"\xfe\xff"), own or {})


def _searched(path: Path, content: mmap.mmap) -> tuple[int, bool]:
    """Return how many bytes of a file are searched, and whether it is text."""
    if path.suffix == ".safetensors":
        return min(len(content), LENGTH_BYTES + min(int.from_bytes(content[:LENGTH_BYTES], "little"), MAX_HEADER_BYTES)), False
    if content.find(b"\0", 0, 8192) >= 0:
        return min(len(content), SAMPLE), False
    return len(content), True


def _narrow(content: mmap.mmap) -> bytes:
    """Return text in UTF-16 without its zero bytes, in either order of bytes; of what does not begin as such, the first MiB."""
    return content[: WIDE if content[:2] in (b"\xff\xfe", b"\xfe\xff") else SAMPLE].replace(b"\0", b"")


def _find(content: bytes | mmap.mmap, end: int, is_text: bool, own: Mapping[str, str]) -> list[str]:
    found: dict[str, int] = {}
    for kind, _, pattern in PATTERNS:
        if kind not in found and (at := next(_places(kind, pattern, content, end), None)) is not None:
            found[kind] = at
    for name, value in own.items():
        if (at := content.find(os.fsencode(value), 0, end)) >= 0:
            found[name] = at
    lines = {kind: 1 + content[:at].count(b"\n") for kind, at in found.items()} if is_text else {}
    return [f"{kind} in line {lines[kind]}" if is_text else kind for kind in found]


def _places(kind: str, pattern: re.Pattern[bytes], content: bytes | mmap.mmap, end: int) -> Iterator[int]:
    for match in pattern.finditer(content, 0, end):
        if _is_one(kind, _body(match).decode(errors="replace")):
            yield match.start()


def _body(match: re.Match[AnyStr]) -> AnyStr:
    return match["secret"] if "secret" in match.re.groupindex else match[0]


def _replace(kind: str, by: str, match: re.Match[str]) -> str:
    if not _is_one(kind, _body(match)):
        return match[0]
    start, end = (place - match.start() for place in match.span("secret" if "secret" in match.re.groupindex else 0))
    return match[0][:start] + by + match[0][end:]


def _is_one(kind: str, body: str) -> bool:
    """Whether what looks like a secret is one, and no name, nor an example of few different characters."""
    if kind in LITERAL:
        return not re.fullmatch("[A-Z]+", body)
    if kind == "a password":
        return _mixes(body) and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", body)
    if len(set(body.partition("_")[2] or body)) < 6:
        return False
    return kind not in MIXED or any(len(run) >= 8 and _mixes(run) for run in re.split("[_-]", body))


def _mixes(text: str) -> bool:
    return bool(re.search("[0-9]", text) and re.search("[A-Za-z]", text))
