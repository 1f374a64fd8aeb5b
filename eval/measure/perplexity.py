"""How well a model predicts text: loss per token, perplexity and bits per byte, with a standard error.

Deals in tokens and losses: how a model is loaded and where a text is from it refuses to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
from ..results import Perplexity
from .faults import locate_fault
from .loading import LENGTH, Loaded, load, positions, vocabulary
from .memory import free_memory
from .text import Documents, read_documents
from .windows import Passage, Window, check_length, check_vocabulary, to_passages, to_windows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TOKENS = {"cpu": 4096, "cuda": 16384}  # in a batch; more at once is no faster
LOGITS = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes that a batch's logits may take
PIECE = {"cpu": 1 << 22, "cuda": 1 << 28}  # bytes of float32 logits whose loss is taken at once: small enough for a processor's cache
UNSCORED = -100  # what torch's cross entropy ignores
Progress = Callable[[str, int, int], None]


def perplexity(
    model: Checkpoint | Loaded,
    text: Documents | str | None = None,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    load: str = "stored",
    progress: Progress = lambda what, done, total: None,
) -> Perplexity:
    """Measure how well a model predicts a text, each token once, from a window that slides over each document.

    The loss is the mean of -ln p(token | the tokens before it in its window) over all scored tokens, in nats; the perplexity is its
    exponential (Jelinek, Mercer, Bahl and Baker 1977). Both depend on the tokenizer; bits per byte does not: the sum of the same, in bits,
    over the bytes of the text in UTF-8 (Gao et al. 2020, The Pile, arXiv 2101.00027, section 3.1). Windows of `length` tokens move by
    `stride` ("Perplexity of fixed-length models" in Hugging Face's documentation of transformers); each predicts what the one before did
    not reach, so that a token is predicted from at least length - stride + 1 tokens, once so many stand before it in its document.

    Documents are tokenized as in training (see `to_passages`): the first token of each is predicted from BOS, or from the end-of-text
    token where the tokenizer adds no BOS. They never see each other. Token losses are float32, from logits cast to float32; sums are
    float64.

    The standard error is clustered (Miller 2024, arXiv 2411.00640, section 2.2), as tokens of one text resemble each other: with S_c the
    sum of the losses of n_c tokens in cluster c of C, and n tokens in all, sqrt(C / (C - 1) * sum of (S_c - n_c * loss)^2) / n. Clusters
    are the documents; of one document, its windows; of one window, its tokens.

    Args:
        model: a checkpoint, written or not, which is loaded as `load` says; or a loaded one.
        text: what `read_documents` reads.
        length: of a window in tokens [default: 2048, or the model's positions]. stride: from 1 to length [default: half of it].
        batch: windows at a time; no result depends on it [default: as many as fit].
        progress: called with what is being done, how much is done (documents, then tokens), and of how many.
    Raises:
        DowncycleError: fewer than two tokens; windows that the model cannot take; a tokenizer that is not the model's; a loss that is not
            finite, with the layer where that began.
    """
    documents = text if isinstance(text, Documents) else read_documents(text)
    loaded = model if isinstance(model, Loaded) else _load(model, load, progress)
    length, stride = _windows_for(loaded, length, stride, batch)
    passages = _passages(loaded, documents, progress)
    windows = list(to_windows(passages, length, stride))
    losses = _losses(loaded, passages, windows, batch or default_batch(loaded, length), progress)
    return _result(documents, passages, windows, losses, length, stride)


def _load(checkpoint: Checkpoint, how: str, progress: Progress) -> Loaded:
    progress("loading the model", 0, 0)
    return load(checkpoint, how)


def check_windows(length: int | None, stride: int | None, batch: int | None) -> None:
    """Refuse windows that no model can take."""
    given = {"length": length, "stride": stride, "batch": batch}
    if wrong := [f"{name} {value}" for name, value in given.items() if value is not None and value < 1]:
        raise DowncycleError(f"{', '.join(wrong)}: give numbers from 1, or leave them out")
    if length is not None and stride is not None and stride > length:
        raise DowncycleError(f"stride {stride}: windows of {length} tokens would leave some out; give at most {length}")


def _windows_for(loaded: Loaded, length: int | None, stride: int | None, batch: int | None) -> tuple[int, int]:
    """Return length and stride for a model, or say why they cannot be."""
    check_windows(length, stride, batch)
    limit = positions(loaded.model.config)
    length = min(LENGTH, limit or LENGTH) if length is None else length
    check_length(loaded.checkpoint.name, length, limit)
    stride = max(1, length // 2) if stride is None else stride
    check_windows(length, stride, batch)
    return length, stride


def _passages(loaded: Loaded, documents: Documents, progress: Progress) -> list[Passage]:
    """Tokenize the documents, and see that the model knows the tokens."""
    done, total = 0, len(documents.texts)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("reading the text", done, total)

    passages = to_passages(loaded.tokenizer, documents.texts, advance)
    scored = sum(passage.scored for passage in passages)
    if scored < 2:
        raise DowncycleError(f"{documents.name}: only {scored} of its tokens can be scored, and two are needed; give a longer text")
    check_vocabulary(loaded.checkpoint.name, loaded.tokenizer, passages, vocabulary(loaded.model))
    return passages


def default_batch(loaded: Loaded, length: int) -> int:
    """How many windows to take at a time, so that their logits fit."""
    device = loaded.device.type
    logits = min(LOGITS[device], free_memory(str(loaded.device)) // 4)
    return max(1, min(TOKENS[device], logits // (4 * vocabulary(loaded.model))) // length)


def _losses(loaded: Loaded, passages: Sequence[Passage], windows: Sequence[Window], batch: int, progress: Progress) -> list[np.ndarray]:
    """Return the token losses of each window, [scored] float32 in nats."""
    import numpy as np
    import torch

    losses: list[np.ndarray] = [np.empty(0, np.float32)] * len(windows)
    done, total = 0, sum(window.scored for window in windows)
    progress("measuring the loss", done, total)
    for numbers, ids, targets in batches(passages, windows, batch, loaded.device):
        try:
            with torch.inference_mode():
                found = token_losses(loaded.model, ids, targets).cpu()
        except torch.OutOfMemoryError as error:
            said = f"{loaded.checkpoint.name}: {ids.shape[0]} windows of {ids.shape[1]} tokens do not fit into {loaded.device}'s memory"
            raise DowncycleError(f"{said}; give a smaller batch or length, or a smaller --load") from error
        except (IndexError, RuntimeError, ValueError) as error:
            said = f"{loaded.checkpoint.name}: fails on {ids.shape[1]} tokens ({' '.join(str(error).split())[:120]})"
            raise DowncycleError(f"{said}; give a smaller --length, if it has fewer positions than its config says") from error
        if not bool(found.isfinite().all()):
            raise locate_fault(loaded.model, loaded.checkpoint, ids)
        for number, part in zip(numbers, found.split([windows[number].scored for number in numbers]), strict=True):
            losses[number] = part.numpy()
        done += len(found)
        progress("measuring the loss", done, total)
    return losses


def batches(
    passages: Sequence[Passage], windows: Sequence[Window], batch: int, device: Any
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Yield batches of windows of one length, the longest first: their numbers, ids and targets as `token_losses` takes them.

    Nothing is padded: what some models say of a text depends on it, as where rotary factors or sparse attention follow the length.
    """

    def shape(number: int) -> tuple[int, int]:
        return -windows[number].length, windows[number].first - windows[number].start

    order = sorted(range(len(windows)), key=shape)
    for _, group in groupby(order, lambda number: windows[number].length):
        while numbers := tuple(islice(group, batch)):
            yield numbers, *_tensors(passages, [windows[number] for number in numbers], device)


def _tensors(passages: Sequence[Passage], windows: Sequence[Window], device: Any) -> tuple[Tensor, Tensor]:
    """Return what windows of one length read and what they predict, both [windows, tokens]."""
    import numpy as np
    import torch

    shape = len(windows), windows[0].length
    ids, targets = np.empty(shape, np.int64), np.full(shape, UNSCORED, np.int64)
    for row, window in enumerate(windows):
        whole = passages[window.document].ids
        ids[row] = whole[window.start : window.stop]
        targets[row, window.first - window.start :] = whole[window.first + 1 : window.stop + 1]
    return torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device)


def token_losses(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Return -ln p of each target that is not UNSCORED, [scored] float32, row by row.

    Logits are asked for from the first scored column on, and cast to float32 a piece at a time.

    Args:
        ids, targets: [batch, tokens]; targets[b, t] follows ids[b, :t + 1].
    """
    import torch
    from torch.nn.functional import cross_entropy

    kept = targets.shape[1] - int((targets != UNSCORED).any(0).int().argmax())  # columns from the first scored one on
    logits = model(input_ids=ids, use_cache=False, **kept_only(model, kept)).logits[:, -kept:].flatten(0, 1)  # [batch * kept, vocab]
    wanted = targets[:, -kept:].flatten().to(logits.device)  # [batch * kept]
    losses = torch.empty(len(wanted), dtype=torch.float32, device=logits.device)
    rows = max(1, PIECE[logits.device.type] // (4 * logits.shape[-1]))
    for start in range(0, len(wanted), rows):
        piece = slice(start, start + rows)
        losses[piece] = cross_entropy(logits[piece].float(), wanted[piece], ignore_index=UNSCORED, reduction="none")
    return losses[wanted != UNSCORED]


def kept_only(model: Any, kept: int) -> dict[str, int]:
    """Ask for the logits of the last tokens only, where the model's `forward` knows how."""
    from inspect import signature

    return {"logits_to_keep": kept} if "logits_to_keep" in signature(model.forward).parameters else {}


def _result(
    documents: Documents, passages: Sequence[Passage], windows: Sequence[Window], losses: Sequence[np.ndarray], length: int, stride: int
) -> Perplexity:
    sums = [float(part.sum(dtype="float64")) for part in losses]
    counts = [len(part) for part in losses]
    tokens, nats, size = sum(counts), math.fsum(sums), sum(passage.bytes for passage in passages)
    loss = nats / tokens
    return Perplexity(
        text=documents.name,
        digest=documents.digest,
        loss=loss,
        stderr=clustered_error(loss, *_clusters(windows, sums, counts, losses)),
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / size,
        tokens=tokens,
        bytes=size,
        documents=sum(passage.scored > 0 for passage in passages),
        length=length,
        stride=stride,
    )


def _clusters(
    windows: Sequence[Window], sums: Sequence[float], counts: Sequence[int], losses: Sequence[np.ndarray]
) -> tuple[list[float], list[int]]:
    """Return the sum of the losses and the number of tokens in each cluster: documents, else windows, else tokens."""
    if len(windows) == 1:
        return losses[0].astype("float64").tolist(), [1] * counts[0]
    if len({window.document for window in windows}) == 1:
        return list(sums), list(counts)
    by_document: dict[int, tuple[float, int]] = {}
    for window, nats, count in zip(windows, sums, counts, strict=True):
        before = by_document.get(window.document, (0.0, 0))
        by_document[window.document] = before[0] + nats, before[1] + count
    return [nats for nats, _ in by_document.values()], [count for _, count in by_document.values()]


def clustered_error(mean: float, sums: Sequence[float], counts: Sequence[int]) -> float:
    """Return the standard error of a mean over things that come in clusters (Miller 2024, arXiv 2411.00640, section 2.2).

    Args:
        sums, counts: of each cluster, two or more.
    """
    squares = math.fsum((part - count * mean) ** 2 for part, count in zip(sums, counts, strict=True))
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / sum(counts)
