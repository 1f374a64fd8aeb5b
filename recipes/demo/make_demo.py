"""Make the built-in model `demo`: a small Llama-3-shaped model pretrained on docstrings.

Its text is what any Python installation already has: the docstrings of the standard
library, `pydoc_data`, and the docstrings and long descriptions of the installed
distributions. Modules are parsed and never imported, nothing is downloaded, and whole
modules are held out. Which distributions are installed decides the corpus, so another
environment gives another, similar model.

    python -m downcycle.recipes.demo.make_demo --work WORK                    # every stage, in this order
    python -m downcycle.recipes.demo.make_demo --work WORK collect tokenizer  # or some of them
    python -m downcycle.recipes.demo.make_demo evaluate                       # scores the model that lies in --out

Stages: collect, texts, tokenizer, train, export, evaluate. WORK keeps the corpus, the tokenizer
and a checkpoint; a `train` that was interrupted continues from the last one. Finished
files go to --out, by default this script's own folder. Needs downcycle[score]. Trains the
tokenizer, exports and evaluates; how text is chosen (corpus.py) and how the model is trained
(pretrain.py) it refuses to know.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import keep_layers, load_model, open_checkpoint
from .corpus import collect, read_documents, read_text, texts
from .pretrain import Progress, load_checkpoint, mean_loss, new_model, token_stream, train, windows_of

HERE = Path(__file__).resolve().parent

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

EVALUATION_CONTEXTS = (512, 2048)


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


def export(work: Path, out: Path) -> None:
    """Write the checkpoint as a bf16 transformers model with its tokenizer, and the record of the training."""
    from transformers import AutoTokenizer, GenerationConfig

    model = new_model(AutoTokenizer.from_pretrained(work / "tokenizer"))
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
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    log = json.loads((out / "training.json").read_text(encoding="utf-8"))
    print("training text: {documents} documents, {bytes} bytes, {tokens} tokens".format(**log), f"of {len(log['sources'])} sources")
    print("training: {tokens_seen} tokens in {steps} steps, {minutes} minutes, {threads} thread(s)".format(**log))
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    documents = read_text(out / "held_out.txt")
    stream, size = token_stream(tokenizer, documents), sum(len(d.encode()) for d in documents)
    print(f"held-out text: {len(documents)} documents, {size} bytes, {len(stream)} tokens")
    cuts: dict[str, list[int]] = {"whole": [], "last 3 layers dropped": [9, 10, 11], "layers 4-6 dropped": [4, 5, 6]}
    whole = open_checkpoint(out / "model")
    for context in EVALUATION_CONTEXTS:
        for name, dropped in cuts.items():
            kept = [layer for layer in range(whole.num_layers) if layer not in dropped]
            model = load_model(keep_layers(whole, kept), dtype=torch.bfloat16)
            loss = mean_loss(model, windows_of(stream, context))
            bits = loss * len(stream) / math.log(2) / size
            print(f"windows of {context}, {name}: {loss:.4f} nats per token, {bits:.4f} bits per byte")
    for opening in ("Return a list of the", "The following example shows how to"):
        print(f"sample: {continuation(out / 'model', opening)!r}")


def continuation(folder: Path, opening: str) -> str:
    """What the model says greedily after an opening."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = tokenizer(opening, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)  # type: ignore[misc]
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def main() -> None:
    """Run the named stages in order, or all of them."""
    parser = argparse.ArgumentParser(
        "python -m downcycle.recipes.demo.make_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
