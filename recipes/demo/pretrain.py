"""Pretrain the model from nothing until a given time has passed, with checkpoints to continue from.

Text and tokenizer are given as files: it refuses to know where the text is from, how the tokenizer was made, and what becomes of
the checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import read_documents, read_text

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

# Windows grow, because short ones are cheap: (share of the time, tokens).
CONTEXTS = [(0.6, 256), (0.8, 512), (0.9, 1024), (1.0, 2048)]
BATCH_TOKENS = 2048
ADAMW_RATE, MUON_RATE = 4e-3, 8e-3
SAVE_EVERY = 240  # seconds
SEED = 8


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


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The untrained model for this vocabulary: Llama-3's shape at 3.4M parameters, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
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
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
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


def loss_of(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Cross entropy in nats of windows [rows, context + 1] under bf16 autocast, or in the model's dtype if that is bf16."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
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
    model = new_model(tokenizer)
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


def windows_of(stream: Tensor, context: int) -> Tensor:
    """Windows [rows, context + 1] of a stream, each opening with the last token of the one before."""
    return stream.unfold(0, context + 1, context)


def mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean cross entropy in nats over windows [rows, context + 1]."""
    import torch

    with torch.no_grad():
        return sum(loss_of(model, rows).item() * len(rows) for rows in windows.split(8)) / len(windows)
