"""Make the built-in model `demo`: a small Llama-3-shaped model pretrained on docstrings.

Its text is what any Python installation already has: the docstrings of the standard
library, `pydoc_data`, and the docstrings and long descriptions of the installed
distributions. Modules are parsed and never imported, nothing is downloaded, and whole
modules are held out. Which distributions are installed decides the corpus, so another
environment gives another, similar model.

    python make_demo.py --work WORK                    # every stage, in this order
    python make_demo.py --work WORK collect tokenizer  # or some of them
    python make_demo.py evaluate                       # scores the model that lies in --out

Stages: collect, texts, tokenizer, train, export, evaluate. WORK keeps the corpus, the tokenizer
and a checkpoint; a `train` that was interrupted continues from the last one. Finished
files go to --out, by default this script's own folder. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
import re
import shutil
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent

# Corpus. Sizes are characters.
HELD_OUT_PERCENT = 3
DISTRIBUTION_CAP = 2_000_000  # one distribution must not become the corpus
HELD_OUT_SIZE, HELD_OUT_UNIT_CAP = 380_000, 30_000
HEALING_SIZE, HEALING_UNIT_CAP = 1_300_000, 30_000
SHORTEST_SHIPPED = 2_000  # a source quoted for one sentence would still cost its whole notice
LONGEST_NOTICE = 16_000  # a longer one lists bundled software: whose words a docstring holds is then unclear

# Tokenizer: Llama-3's split and its names, in Llama-3's order, on a small vocabulary.
VOCABULARY = 4096
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = [
    BOS, EOS, *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", EOT,
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 11)),
]  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 2048,
}

# Training. Windows grow, because short ones are cheap: (share of the time, tokens).
CONTEXTS = [(0.6, 256), (0.8, 512), (0.9, 1024), (1.0, 2048)]
BATCH_TOKENS = 2048
ADAMW_RATE, MUON_RATE = 4e-3, 8e-3
SAVE_EVERY = 240  # seconds
SEED = 8

EVALUATION_CONTEXTS = (512, 2048)


# ---------------------------------------------------------------- collect


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


# ---------------------------------------------------------------- texts to ship


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


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(work: Path) -> None:
    """Byte-level BPE on the training split, saved the way Llama-3 lays its files out."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in read_documents(work, "train")), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bos = (BOS, tokenizer.token_to_id(BOS))
    template = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    folder = work / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


# ---------------------------------------------------------------- train


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """Token ids [n] of the documents in a row, each between begin and end of text."""
    import torch

    ids: list[int] = []
    for start in range(0, len(documents), 256):
        for row in tokenizer(documents[start : start + 256], verbose=False)["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
    return torch.tensor(ids)


def shuffled(documents: list[str]) -> list[str]:
    """The documents in a random order that is always the same."""
    import torch

    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED))
    return [documents[i] for i in order.tolist()]


def new_model() -> LlamaForCausalLM:
    """The untrained model: Llama-3's shape at 3.4M parameters, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXTS[-1][1],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=VOCABULARY - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(BOS),
        eos_token_id=VOCABULARY - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(EOS),
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            depth = 2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            std = 0.1 if "embed" in name else 0.02 if "lm_head" in name else (weight.shape[1] * depth) ** -0.5
            torch.nn.init.normal_(weight, std=std)
    return model


def optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Muon on the matrices of the layers, AdamW on embedding, head and norms."""
    import torch

    layers = [p for p in model.model.layers.parameters() if p.dim() == 2]
    ids = {id(p) for p in layers}
    rest = [p for p in model.parameters() if id(p) not in ids]
    embeddings, norms = [p for p in rest if p.dim() == 2], [p for p in rest if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": embeddings, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=ADAMW_RATE, betas=(0.9, 0.95), fused=True)
    muon = torch.optim.Muon(layers, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def rate(done: float) -> float:
    """Learning-rate factor: a short warm-up, a plateau, a straight line to zero."""
    return min(1.0, done / 0.01, max(0.0, 1 - done) / 0.6)


def context_at(done: float) -> int:
    """Length of the training windows, which grows in the course of the training."""
    return next(length for end, length in CONTEXTS if done < end or end == 1.0)


def batch_at(stream: Tensor, seen: int, context: int) -> Tensor:
    """Windows [rows, context + 1] that follow from the number of tokens seen, so a resumed run continues exactly."""
    import torch

    windows = (len(stream) - 1) // context
    rows = torch.arange(seen // context, (seen + BATCH_TOKENS) // context)
    orders = {
        epoch: torch.randperm(windows, generator=torch.Generator().manual_seed(SEED + 1000 * epoch + context))
        for epoch in set((rows // windows).tolist())
    }
    starts = [int(orders[int(row) // windows][int(row) % windows]) * context for row in rows]
    return torch.stack([stream[start : start + context + 1] for start in starts])


def loss_of(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Cross entropy in nats of windows [rows, context + 1] under bf16 autocast, or in the model's dtype if that is bf16."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=model.lm_head.weight.dtype == torch.float32):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits  # [rows, context, vocab]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@dataclasses.dataclass
class Progress:
    """How far a training has come; kept in the checkpoint."""

    seconds: float = 0.0
    seen: int = 0  # tokens
    steps: int = 0
    stream: int = 0  # tokens of the training text
    threads: int = 1
    losses: list[tuple[int, int, float]] = dataclasses.field(default_factory=list)  # (seconds, seen, held-out loss)


def train(work: Path, out: Path, minutes: float, threads: int) -> None:
    """Train for `minutes` of wall-clock time in all; the learning rate reaches zero exactly then."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    stream = token_stream(tokenizer, shuffled([d.text for d in read_documents(work, "train")]))
    held_out = windows_of(token_stream(tokenizer, read_text(out / "held_out.txt")), CONTEXTS[0][1])[::8]
    model = new_model()
    steppers = optimizers(model)
    progress = Progress(stream=len(stream), threads=threads)
    if (work / "checkpoint.pt").exists():
        progress = load_checkpoint(work, model, steppers)
    print(f"{len(stream)} tokens; starting at {progress.seen} seen, {progress.seconds:.0f} s", flush=True)

    budget, saved = minutes * 60, progress.seconds
    started = time.monotonic() - progress.seconds
    while (seconds := time.monotonic() - started) < budget:
        context = context_at(seconds / budget)
        loss = step(model, steppers, batch_at(stream, progress.seen, context), rate(seconds / budget))
        progress.seen += BATCH_TOKENS
        progress.steps += 1
        progress.seconds = seconds
        if progress.steps % 50 == 0:
            print(f"{seconds:6.0f} s  step {progress.steps}  context {context}  loss {loss:.3f}", flush=True)
        if seconds - saved > SAVE_EVERY:
            saved = seconds
            report_and_save(work, model, steppers, progress, held_out)
    report_and_save(work, model, steppers, progress, held_out)


def step(model: LlamaForCausalLM, steppers: Sequence[Optimizer], windows: Tensor, factor: float) -> float:
    """One update at `factor` times the peak learning rates."""
    import torch

    loss = loss_of(model, windows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * factor
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return loss.item()


def report_and_save(work: Path, model: LlamaForCausalLM, steppers: Sequence[Optimizer], progress: Progress, held_out: Tensor) -> None:
    """Log the held-out loss and write the checkpoint, atomically."""
    import torch

    loss = mean_loss(model, held_out)
    progress.losses.append((round(progress.seconds), progress.seen, round(loss, 4)))
    print(f"{progress.seconds:6.0f} s  held-out loss {loss:.4f}", flush=True)
    whole = {
        "state": dataclasses.asdict(progress),
        "model": model.state_dict(),
        "steppers": [stepper.state_dict() for stepper in steppers],
    }
    torch.save(whole, work / "checkpoint.tmp")
    (work / "checkpoint.tmp").replace(work / "checkpoint.pt")


def load_checkpoint(work: Path, model: LlamaForCausalLM, steppers: Sequence[Optimizer] = ()) -> Progress:
    """Fill the model, and the optimisers where given; return the counters."""
    import torch

    whole = torch.load(work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(whole["model"])
    for stepper, saved in zip(steppers, whole["steppers"], strict=bool(steppers)):
        stepper.load_state_dict(saved)
    return Progress(**whole["state"])


# ---------------------------------------------------------------- export and evaluate


def read_text(path: Path) -> list[str]:
    """The documents of a shipped text: two blank lines separate them."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n\n\n")


def windows_of(stream: Tensor, context: int) -> Tensor:
    """Windows [rows, context + 1] of a stream, each opening with the last token of the one before."""
    return stream.unfold(0, context + 1, context)


def export(work: Path, out: Path) -> None:
    """Write the checkpoint as a bf16 transformers model with its tokenizer, and the record of the training."""
    from transformers import GenerationConfig

    model = new_model()
    progress = load_checkpoint(work, model)
    model = model.bfloat16()
    config = model.config
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    model.save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)  # save_pretrained leaves it to its owner alone
    for file in (work / "tokenizer").iterdir():
        shutil.copyfile(file, out / "model" / file.name)
    (out / "training.json").write_text(json.dumps(record(work, progress), indent=1) + "\n", encoding="utf-8")


def record(work: Path, progress: Progress) -> dict[str, Any]:
    """What the model was trained on, for how long, and how its held-out loss fell."""
    documents = read_documents(work, "train")
    names = {d.source for d in documents}
    facts = json.loads((work / "sources.json").read_text(encoding="utf-8"))
    return {
        "documents": len(documents),
        "bytes": sum(len(d.text.encode()) for d in documents),
        "tokens": progress.stream,
        "tokens_seen": progress.seen,
        "steps": progress.steps,
        "minutes": round(progress.seconds / 60, 1),
        "threads": progress.threads,
        "held_out_loss": [f"{seconds} s, {seen} tokens: {loss}" for seconds, seen, loss in progress.losses],
        "sources": {name: fact["version"] for name, fact in facts.items() if name in names},
    }


def evaluate(out: Path, threads: int) -> None:
    """Print the record of the training, the held-out loss of the shipped model, whole and cut, and what it says."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(threads)
    log = json.loads((out / "training.json").read_text(encoding="utf-8"))
    print("training text: {documents} documents, {bytes} bytes, {tokens} tokens".format(**log), f"of {len(log['sources'])} sources")
    print("training: {tokens_seen} tokens in {steps} steps, {minutes} minutes, {threads} thread(s)".format(**log))
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    documents = read_text(out / "held_out.txt")
    stream, size = token_stream(tokenizer, documents), sum(len(d.encode()) for d in documents)
    print(f"held-out text: {len(documents)} documents, {size} bytes, {len(stream)} tokens")
    cuts: dict[str, list[int]] = {"whole": [], "last 3 layers dropped": [9, 10, 11], "layers 4-6 dropped": [4, 5, 6]}
    for context in EVALUATION_CONTEXTS:
        for name, dropped in cuts.items():
            model = LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
            loss = mean_loss(without_layers(model, dropped), windows_of(stream, context))
            bits = loss * len(stream) / math.log(2) / size
            print(f"windows of {context}, {name}: {loss:.4f} nats per token, {bits:.4f} bits per byte")
    for opening in ("Return a list of the", "The following example shows how to"):
        print(f"sample: {continuation(out / 'model', opening)!r}")


def without_layers(model: LlamaForCausalLM, dropped: list[int]) -> LlamaForCausalLM:
    """The same model with some decoder layers taken out, in place."""
    import torch

    kept = [layer for i, layer in enumerate(model.model.layers) if i not in dropped]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model.eval()


def mean_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean cross entropy in nats over windows [rows, context + 1]."""
    import torch

    with torch.no_grad():
        return sum(loss_of(model, rows).item() * len(rows) for rows in windows.split(8)) / len(windows)


def continuation(folder: Path, opening: str) -> str:
    """What the model says greedily after an opening."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = tokenizer(opening, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)  # type: ignore[misc]
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


# ---------------------------------------------------------------- command line


def main() -> None:
    """Run the named stages in order, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="collect texts tokenizer train export evaluate")
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="corpus, tokenizer and checkpoint")
    parser.add_argument("--out", type=Path, default=HERE, help="where the finished files go")
    parser.add_argument("--minutes", type=float, default=80, help="wall-clock time of the training")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training")
    args = parser.parse_args()
    stages: dict[str, Callable[[], None]] = {
        "collect": lambda: collect(args.work),
        "texts": lambda: texts(args.work, args.out),
        "tokenizer": lambda: train_tokenizer(args.work),
        "train": lambda: train(args.work, args.out, args.minutes, args.threads),
        "export": lambda: export(args.work, args.out),
        "evaluate": lambda: evaluate(args.out, args.threads),
    }
    if unknown := set(args.stages) - set(stages):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; the stages are {', '.join(stages)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for name in stages:
        if not args.stages or name in args.stages:
            stages[name]()


if __name__ == "__main__":
    main()
