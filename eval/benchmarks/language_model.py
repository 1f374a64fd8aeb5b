"""A loaded model as lm-eval asks it: answers are kept as they come and not asked for twice, and one that is no number is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ..measure.faults import locate_fault
from .responses import Responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..measure.loading import Loaded

Told = Callable[[int, int], None]  # requests answered, of how many


class LanguageModel(HFLM):
    """lm-eval's own model of transformers, around one that is loaded already."""

    def __init__(self, loaded: Loaded, batch: int | str, responses: Responses, told: Told):
        tokenizer, prefix = fit_tokenizer(loaded.tokenizer, loaded.model.config)
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch, prefix_token_id=prefix)
        self._device = loaded.device  # a model's own says where its first weight lies, which can be nowhere yet
        self.checkpoint, self.responses, self.told = loaded.checkpoint, responses, told
        self.done = self.total = 0
        self.checked, self.longest = False, self.max_length
        self.set_cache_hook(self)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of each continuation after its context."""
        return self._answer("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats, in windows that do not overlap."""
        return self._answer("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to a stop."""
        lengths = (
            len(self.tok_encode(text)) + int(given.get("max_gen_toks", self.max_gen_toks)) for text, given in (r.args for r in requests)
        )
        self.longest = min(self.max_length, max(lengths, default=self.max_length))
        return self._answer("generate_until", requests, super().generate_until)

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        """Keep one answer: lm-eval's hook, called as soon as there is one."""
        if not _is_drawn(kind, arguments):  # another draw is asked for on purpose
            self.responses.add(hash_args(kind, arguments), answer)
        self.done += 1
        self.told(self.done, self.total)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Return the text of tokens; of the end of text, where a tokenizer has none, nothing that could be met."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def _answer(self, kind: str, requests: list[Instance], ask: Callable[..., list[Any]]) -> list[Any]:
        keys = [hash_args(kind, request.args) for request in requests]
        known = [key in self.responses.known for key in keys]
        left = [request for request, is_known in zip(requests, known, strict=True) if not is_known]
        self.done, self.total = len(requests) - len(left), len(requests)
        self.told(self.done, self.total)
        fresh = iter(ask(left, disable_tqdm=True) if left else [])
        return [self.responses.known[key] if is_known else next(fresh) for key, is_known in zip(keys, known, strict=True)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Try no longer texts than there are: lm-eval would try the model's whole window, and of a long one find that one text fits."""
        if requests:
            return int(super()._detect_batch_size(requests, pos))
        self._max_length, window = self.longest, self._max_length
        try:
            return int(super()._detect_batch_size())
        finally:
            self._max_length = window

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return logits [batch, tokens, vocabulary]; a sum finds any that is NaN in one pass."""
        logits = super()._model_call(inps, attn_mask, labels)
        if logits.sum(dtype=torch.float32).isnan():
            raise locate_fault(self.model, self.checkpoint, inps)
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if not self.checked:
            self._model_call(context)  # greedy decoding takes NaN for a token like any other
            self.checked = True
        return super()._model_generate(context, max_length, stop, **options)


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Return a tokenizer with a padding token that the model has, and what begins a text where the tokenizer has no token for that.

    lm-eval would add a padding token, which lies beyond the model's embeddings; padding is masked, so that any known one does.
    """
    tokenizer = deepcopy(tokenizer)
    if tokenizer.pad_token is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return tokenizer, None
    text = config.get_text_config()
    given = (getattr(text, "bos_token_id", None), getattr(text, "eos_token_id", None))
    newline = tokenizer.encode("\n", add_special_tokens=False) or [0]
    return tokenizer, next((token for token in given if isinstance(token, int)), newline[-1])


def _is_drawn(kind: str, arguments: Iterable[Any]) -> bool:
    """Whether an answer is drawn at random."""
    return kind == "generate_until" and bool(list(arguments)[1].get("do_sample"))
