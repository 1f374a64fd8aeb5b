"""Collect the training text from what is installed, hold modules out of it, and choose the texts that are shipped.

Modules are parsed and never imported; nothing is downloaded. Deals in text and licences: it refuses to know of tokens and models.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, cast

# Sizes are characters.
HELD_OUT_PERCENT = 3
DISTRIBUTION_CAP = 2_000_000  # one distribution must not become the corpus
HELD_OUT_SIZE, HELD_OUT_UNIT_CAP = 380_000, 30_000
HEALING_SIZE, HEALING_UNIT_CAP = 1_300_000, 30_000
SHORTEST_SHIPPED = 2_000  # a source quoted for one sentence would still cost its whole notice
LONGEST_NOTICE = 16_000  # a longer one lists bundled software: whose words a docstring holds is then unclear


@dataclasses.dataclass(frozen=True)
class Source:
    """Something installed that holds Python modules: the standard library or a distribution."""

    name: str
    version: str
    licence: str
    files: list[tuple[str, Path]]  # (path inside the source, path on disk), sorted
    notices: list[Path]
    description: str = ""


@dataclasses.dataclass
class Document:
    """The prose of one module, paragraphs in source order."""

    source: str
    unit: str  # what is held out or trained on as a whole
    text: str


def standard_library() -> Source:
    """The running interpreter's library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [(str(path.relative_to(root)), path) for path in sorted(root.rglob("*.py"))]
    files = [(name, path) for name, path in files if not skipped & set(Path(name).parts)]
    return Source("Python", platform.python_version(), "PSF-2.0", files, [root / "LICENSE.txt"])


def distributions() -> Iterator[Source]:
    """Every installed distribution but this one, by name, tests and vendored copies left out."""
    skipped = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "third_party"}
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d for d in importlib.metadata.distributions()}
    for name, dist in sorted(found.items()):
        if name == "downcycle":
            continue
        paths = sorted(dist.files or [], key=str)
        modules = [p for p in paths if p.suffix == ".py" and not skipped & set(p.parts) and ".." not in p.parts]
        notices = [
            p for p in paths
            if ".dist-info" in str(p) and re.match(r"(?i)(licen[cs]e|copying|notice)", p.name) and p.suffix != ".py"
        ]  # fmt: skip
        metadata = cast("Message", dist.metadata)
        yield Source(
            name,
            dist.version,
            licence_of(metadata),
            [(str(p), Path(str(p.locate()))) for p in modules],
            [Path(str(p.locate())) for p in notices],
            str(metadata.get_payload() or ""),
        )


def licence_of(metadata: Message) -> str:
    """The licence expression, or the best short name that the metadata gives."""
    classifiers = [c.rsplit("::", 1)[-1].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    free_text = (metadata.get("License") or "").strip().splitlines()
    return metadata.get("License-Expression") or " / ".join(classifiers) or (free_text[0] if free_text else "unknown")


def is_permissive(licence: str) -> bool:
    """Whether the text may be shipped with its notice and no other duty."""
    wanted = re.search(r"\b(MIT|BSD|Apache|PSF|ISC|Python Software Foundation|3-Clause)\b", licence)
    return bool(wanted) and not re.search(r"GPL|MPL|Mozilla|UPL|Universal Permissive|unknown", licence)


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module in source order, found without importing it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, nodes)]
    for node in sorted(found, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text:
            yield text


def topics(path: Path) -> Iterator[str]:
    """The reference texts of `pydoc_data.topics`, which is one large dict of strings."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


FUNCTION_WORDS = re.compile(r"the|of|to|an?|is|in|and|for|that|be|if|or|with|as|this|by|on|not|it|are|from|at|when|which|can|will|used|has")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English: no doctest, table, code or link list."""
    if len(paragraph) < 30 or len(paragraph) > 4000 or not paragraph.isascii() and ascii_share(paragraph) < 0.97:
        return False
    if re.search(r"^\s*(>>>|\.\.\.|\$|#!|```|\+--|\|)|[-=]{12,}|\bdef \w+\(|^import |[{};]$", paragraph, re.M):
        return False
    words = re.findall(r"[a-z]+", paragraph.lower())
    plain = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
    return plain > 0.78 * len(paragraph) and sum(bool(FUNCTION_WORDS.fullmatch(w)) for w in words) > 0.12 * len(words)


def ascii_share(text: str) -> float:
    """Part of the characters that are ASCII."""
    return sum(map(str.isascii, text)) / len(text)


def fingerprint(paragraph: str) -> str:
    """Equal for paragraphs that differ only in names, numbers and layout: template text repeats thousands of times."""
    words = [w for w in re.findall(r"\S+", paragraph) if re.fullmatch(r"[a-z]+[,.;:]?|[A-Z][a-z]+[,.]?", w)]
    kept = " ".join(w.lower().strip(",.;:") for w in words) if len(words) > 4 else paragraph
    return hashlib.blake2b(kept.encode(), digest_size=8).hexdigest()


def paragraphs(text: str) -> list[str]:
    """Prose paragraphs of a docstring or a description, trailing blanks removed."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\r\n", "\n").expandtabs(4)))
    parts = [re.sub(r"[ ]+$", "", part, flags=re.M).strip("\n") for part in parts]
    return [part for part in parts if is_prose(part)]


def unit_of(source: str, name: str) -> str:
    """The module held out or kept as a whole: top level of the library, second level of a distribution."""
    parts = Path(name).with_suffix("").parts
    return f"{source}:{'.'.join(parts[:1] if source == 'Python' else parts[:2])}"


def is_held_out(unit: str) -> bool:
    """A fixed hash of the module's name decides, so the choice does not depend on what else is installed."""
    return int(hashlib.blake2b(unit.encode(), digest_size=4).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def documents_of(source: Source) -> Iterator[Document]:
    """One document per module that has prose, one per reference topic, one for the long description."""
    for name, path in source.files:
        unit = unit_of(source.name, name)
        if name.endswith("pydoc_data/topics.py"):
            for text in topics(path):
                yield Document(source.name, unit, "\n\n".join(paragraphs(text)))
            continue
        prose = [part for text in docstrings(path) for part in paragraphs(text)]
        yield Document(source.name, unit, "\n\n".join(prose))
    yield Document(source.name, f"{source.name}:description", "\n\n".join(paragraphs(source.description)))


def without_repeats(documents: list[Document], seen: set[str]) -> list[Document]:
    """Drop each paragraph whose fingerprint came before, cap each source, drop what became too short."""
    kept: list[Document] = []
    used = Counter[str]()
    for document in documents:
        fresh = []
        for part in document.text.split("\n\n"):
            key = fingerprint(part)
            if part and key not in seen:
                seen.add(key)
                fresh.append(part)
        text = "\n\n".join(fresh)
        if len(text) >= 120 and used[document.source] < DISTRIBUTION_CAP:
            used[document.source] += len(text)
            kept.append(dataclasses.replace(document, text=text))
    return kept


def collect(work: Path) -> None:
    """Write the corpus: train.jsonl, held_out.jsonl and sources.json."""
    sources = [standard_library(), *distributions()]
    everything = [document for source in sources for document in documents_of(source)]
    seen: set[str] = set()  # held-out text is seen first, so training never meets a paragraph of it
    splits = {
        "held_out": without_repeats([d for d in everything if is_held_out(d.unit)], seen),
        "train": without_repeats([d for d in everything if not is_held_out(d.unit)], seen),
    }
    for name, documents in splits.items():
        lines = (json.dumps(dataclasses.asdict(d)) + "\n" for d in documents)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        size = sum(len(d.text.encode()) for d in documents) / 1e6
        print(f"{name}: {len(documents)} documents of {len({d.source for d in documents})} sources, {size:.2f} MB")
    facts = {s.name: {"version": s.version, "licence": s.licence, "notices": [str(p) for p in s.notices]} for s in sources}
    (work / "sources.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read_documents(work: Path, split: str) -> list[Document]:
    """The documents of one split, in their fixed order."""
    lines = (work / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Document(**json.loads(line)) for line in lines]


def select(documents: list[Document], allowed: set[str], size: int, unit_cap: int) -> list[Document]:
    """Documents of allowed sources in the order of a hash, until the text is full; no vendored ones."""
    chosen: list[Document] = []
    total, used = 0, Counter[str]()
    for document in sorted(documents, key=lambda d: hashlib.blake2b(d.text.encode()).digest()):
        length = len(document.text.encode())
        if document.source not in allowed or length < SHORTEST_SHIPPED or "externals" in document.unit:
            continue
        if used[document.unit] + length > unit_cap or total + length > size:
            continue
        used[document.unit] += length
        total += length
        chosen.append(document)
    return chosen


def texts(work: Path, out: Path) -> None:
    """Write held_out.txt, healing.txt and the NOTICE that both need. Two blank lines separate documents."""
    facts = json.loads((work / "sources.json").read_text(encoding="utf-8"))
    held_out, train = read_documents(work, "held_out"), read_documents(work, "train")
    allowed = {name for name, fact in facts.items() if is_permissive(fact["licence"])}
    allowed = {name for name in allowed if 0 < len(notice_text(facts[name])) < LONGEST_NOTICE}
    quoted = {
        "held_out.txt": select(held_out, allowed, HELD_OUT_SIZE, HELD_OUT_UNIT_CAP),
        "healing.txt": select(train, allowed, HEALING_SIZE, HEALING_UNIT_CAP),
    }
    for name, documents in quoted.items():
        (out / name).write_text("\n\n\n".join(d.text for d in documents) + "\n", encoding="utf-8")
        print(f"{name}: {len(documents)} documents, {(out / name).stat().st_size / 1e6:.2f} MB")
    names = sorted({d.source for documents in quoted.values() for d in documents}, key=str.lower)
    (out / "NOTICE").write_text(notice({name: facts[name] for name in names}), encoding="utf-8")


def read_text(path: Path) -> list[str]:
    """The documents of a shipped text: two blank lines separate them."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n\n\n")


def notice_text(fact: dict[str, Any]) -> str:
    """The licence file of one source as installed, or nothing."""
    found = [Path(p).read_text(encoding="utf-8", errors="replace") for p in fact["notices"] if Path(p).is_file()]
    return "\n".join(text.strip() for text in found)


def notice(facts: dict[str, dict[str, Any]]) -> str:
    """Who wrote the quoted text, under which licence: copyright lines by source, then each licence text once."""
    lines = [
        "held_out.txt and healing.txt quote the docstrings and long descriptions of the software below,",
        "each under its own licence. The licence texts follow, each once.",
    ]
    users: dict[str, list[str]] = defaultdict(list)
    bodies: dict[str, str] = {}
    for name, fact in facts.items():
        text = notice_text(fact)
        marks = re.findall(r"^\W*((?:portions )?copyright\s+(?:\(c\)|©|[12]\d\d\d).*)$", text, re.I | re.M)
        lines += ["", f"{name} {fact['version']} ({fact['licence']})", *(f"    {m.strip()}" for m in dict.fromkeys(marks))]
        body = licence_body(text)
        key = re.sub(r"all rights reserved|\W", "", body, flags=re.I).lower()  # the same text, set differently
        users[key].append(name)
        bodies.setdefault(key, body)
    for key, body in bodies.items():
        lines += ["", "-" * 80, f"Licence of {', '.join(users[key])}:", "", body]
    return "\n".join(lines) + "\n"


def licence_body(text: str) -> str:
    """A licence text without the lines that differ between its users, so that equal licences are equal strings."""
    text = re.sub(r"^\W*(?:portions )?copyright\s+(?:\(c\)|©|[12]\d\d\d).*$", "", text, flags=re.I | re.M)
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"^[ \t]+|[ \t]+$", "", text, flags=re.M)).strip()
