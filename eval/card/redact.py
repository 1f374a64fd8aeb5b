"""Keep secrets and paths of this machine out of what is published. Knows text only."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...surgery.naming import folder_name

SECRET = "REDACTED"
NOTE = "# Written for publication: paths are shortened to their names, secrets and accounts are taken out."

# Keys of Axolotl, peft, wandb and the like whose values are nobody's business.
_KEYS = re.compile(
    r"(.*[_-])?(api[_-]?key|secret\w*|password|passwd|credentials?|private[_-]key|(auth|access|hf|hub|bearer)[_-]token)|token|use_auth_token"
    r"|wandb_(?!mode$|watch$|log_model$|project$)\w+|comet_(?!mode$|online$)\w+|hub_model_id|mlflow_tracking_uri",
    re.IGNORECASE,
)
# Tokens by their own look: of the Hub, GitHub, OpenAI, Anthropic, AWS, Slack, Google; a JSON web token; a password in an address.
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|"
    r"xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|wandb_v1_\w{10,})|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"
)
_VARIABLES = re.compile(r".*(TOKEN|API_KEY|SECRET|PASSWORD)")
_PATH = re.compile(r"(?<![\w/.~$<>)\[{|-])(?:file://)?(?:~?/(?!/)|[A-Za-z]:\\)[^\s'\"`,;|*?<>(){}\[\]]+")


def name_of(path: str) -> str:
    """Return the last part of a path; a single folder's own name where it is `.`, and nothing of the rest."""
    return folder_name(path.replace("\\", "/"))


def is_path(text: str) -> bool:
    """Whether a value names a place on this machine from its root, from home, or upwards."""
    return bool(re.match(r"(?:file://)?(?:~|/(?!/)|\.\.(?:/|$)|[A-Za-z]:[\\/])", text))


def scrub(text: str) -> str:
    """Take out what looks like a secret, the values of secrets in this process's environment, and shorten absolute paths."""
    for name, value in os.environ.items():
        if _VARIABLES.fullmatch(name) and len(value) >= 8:
            text = text.replace(value, SECRET)
    text = _TOKENS.sub(SECRET, text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?=[/\s'\"`]|$)", "~", text)
    return _PATH.sub(_shorten, text)


def _shorten(found: re.Match[str]) -> str:
    path, mark = found[0], re.search(r"[.:]+$", found[0])  # what ends a sentence is no part of a path
    end = mark[0] if mark else ""
    parts = [part for part in re.split(r"[\\/]", path.removesuffix(end)) if part not in ("", "~", "file:")]
    return (parts[-1] if parts else ".") + end


def redact_recipe(text: str) -> str:
    """Return a recipe as it may be published: still the same YAML, with its comments, without secrets, accounts and absolute paths."""
    import yaml

    lines = [line for line in text.splitlines() if line != NOTE and not line.startswith("# unchanged since it was written: ")]
    body = "\n".join(lines).strip("\n")
    try:
        secrets, paths = _private(yaml.safe_load(body))
    except yaml.YAMLError:
        secrets, paths = set(), set()
    changed = body
    for value in sorted(secrets, key=len, reverse=True):
        changed = _replace(changed, value, SECRET)
    for value in sorted(paths, key=len, reverse=True):
        changed = _replace(changed, value, name_of(value))
    changed = scrub("\n".join(map(_redact_line, changed.splitlines())))
    noted = NOTE in text.splitlines() or changed != body
    return (f"{NOTE}\n" if noted else "") + changed + "\n"


def _replace(text: str, value: str, by: str) -> str:
    """Replace a value where it stands whole, or as the beginning of a path."""
    return re.sub(rf"(?<![\w./~-]){re.escape(value.rstrip('/'))}(?:/(?=[\s'\"]|$))?(?![\w-]|\.\w)(?!/)", lambda _: by, text)


def _private(value: Any, secret: bool = False) -> tuple[set[str], set[str]]:
    """Return the values of a parsed recipe that are secrets, and those that are paths."""
    secrets: set[str] = set()
    paths: set[str] = set()
    pairs: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    pairs += [("", one) for one in value] if isinstance(value, list) else []
    for key, one in pairs:
        more = _private(one, secret or bool(_KEYS.fullmatch(str(key))))
        secrets, paths = secrets | more[0], paths | more[1]
    if isinstance(value, str) and len(value) > 3 and secret:
        secrets.add(value)
    elif isinstance(value, str) and is_path(value) and "\n" not in value:
        paths.add(value)
    return secrets, paths


def _redact_line(line: str) -> str:
    """Take the value out of a line whose key is secret, also in a comment, whatever kind of value it is."""
    found = re.match(r"(\s*(?:#\s*)?(?:- )?['\"]?)([\w.-]+)(['\"]?\s*[:=]\s*)([^\s#].*?)(\s+#.*)?$", line)
    if not found or not _KEYS.fullmatch(found[2]) or found[4] in ("null", "~", "true", "false", "|", ">", "{}", "[]"):
        return line
    return f"{found[1]}{found[2]}{found[3]}{SECRET}{found[5] or ''}"
