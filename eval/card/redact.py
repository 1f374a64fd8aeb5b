"""Keep secrets and paths of this machine out of what is published. Knows text only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...surgery.naming import folder_name
from ..secrets import take_out

SECRET = "REDACTED"
NOTE = "# Written for publication: paths are shortened to their names, secrets and accounts are taken out."

# Keys of Axolotl, peft, wandb and the like whose values are nobody's business.
_KEYS = re.compile(
    r"(.*[_-])?(api[_-]?key|secret\w*|password|passwd|credentials?|private[_-]key|(auth|access|hf|hub|bearer)[_-]token)|token|use_auth_token"
    r"|wandb_(?!mode$|watch$|log_model$|project$)\w+|comet_(?!mode$|online$)\w+|hub_model_id|mlflow_tracking_uri",
    re.IGNORECASE,
)
_PLAIN = ("null", "~", "true", "false", "none", "|", ">", "|-", ">-", "{}", "[]", "")
# After a bracket, `<`, `>` or `|` a path has two parts at least: `[/INST]` and `</s>` are tags.
_PATH = re.compile(
    r"(?:(?<![\w/.~$<>)}\]\[{|\\-])|(?<=[$<>\[{|])(?=~?[\w.-]*/[^\s/]+/\S|[A-Za-z]:)|(?<=\s-[A-Za-z])|(?<=^-[A-Za-z]))"
    r"(?:(?:file://)?(?:~[\w.-]*)?/(?!/)|[A-Za-z]:(?:\\|/(?!/))|\\\\(?=[\w.-]+\\[\w$]))[^\s'\"`,;|*?<>(){}\[\]]+",
    re.MULTILINE,
)
_BLOCK = re.compile(
    r"^(?P<indent>[ \t#]*)(?P<dash>- )?['\"]?(?P<key>[\w.-]+)['\"]?\s*:\s*[|>][-+\d]*[ \t]*(?:#.*)?\n"
    r"(?P<body>(?:(?P=indent)(?(dash)[ \t]{3,}|[ \t]+)\S.*(?:\n|$))+)",
    re.MULTILINE,
)
_PAIR = re.compile(r"([\w.-]+)['\"]?\s*[:=]\s*(?=(\"[^\"]*\"|'[^']*'|[^\s,;}\])#|>\"'][^\s,;}\])]*))")


def name_of(path: str) -> str:
    """Return the last part of a path; a single folder's own name where it is `.`, and nothing of the rest."""
    return folder_name(path.replace("\\", "/"))


def is_path(text: str) -> bool:
    """Whether a value names a place on this machine from its root, from home, or upwards."""
    return bool(re.match(r"(?:file://)?(?:~|/(?!/)|\.\.(?:/|$)|[A-Za-z]:[\\/]|\\\\\w)", text))


def scrub(text: str) -> str:
    """Take out every secret that a push would find, and shorten absolute paths."""
    text = take_out(text, SECRET)
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
    changed = _BLOCK.sub(_redact_block, changed)
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
    if isinstance(value, str) and len(value) > 3 and secret and "\n" not in value:
        secrets.add(value)
    elif isinstance(value, str) and is_path(value) and "\n" not in value:
        paths.add(value)
    return secrets, paths


def _redact_block(found: re.Match[str]) -> str:
    """Take out the lines below a secret key, also in comments."""
    if not _KEYS.fullmatch(found["key"]):
        return found[0]
    indent, end = re.match(r"[ \t#]*", found["body"]), "\n" * found["body"].endswith("\n")
    return found[0].removesuffix(found["body"]) + (indent[0] if indent else "") + SECRET + end


def _redact_line(line: str) -> str:
    """Take the value out of a line whose key is secret, also in a comment, whatever kind of value it is; and of such keys within it."""
    found = re.match(r"(\s*(?:#\s*)?(?:- )?['\"]?)([\w.-]+)(['\"]?\s*[:=]\s*)([^\s#].*?)(\s+#.*)?$", line)
    if found and _KEYS.fullmatch(found[2]) and not found[3].endswith("="):
        plain = found[4] in _PLAIN or found[4].startswith(SECRET)
        return line if plain else f"{found[1]}{found[2]}{found[3]}{SECRET}{found[5] or ''}"
    return _redact_pairs(line)


def _redact_pairs(line: str) -> str:
    text, done = "", 0
    for found in _PAIR.finditer(line):
        if found.start() >= done and _KEYS.fullmatch(found[1]) and found[2].lower() not in _PLAIN:
            text, done = text + line[done : found.end()] + SECRET, found.end(2)
    return text + line[done:]
