"""Run GGUF files in real llama.cpp, in a process of its own: native code that crashes fails a test and not the tests."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

LIMIT = 120  # seconds
LETTER = 37  # the token that is sampled, of the built-in vocabulary: a half character, or an end, would be answered without probabilities


def run(file: Path, prompts: list[list[int]] = (), vocab: int = 0, texts: list[str] = ()) -> dict[str, Any]:
    """Return, for each prompt, the logarithms of the next token's probabilities, [vocab]; for each text, its tokens."""
    job, answer = file.with_suffix(".job"), file.with_suffix(".answer")
    job.write_text(json.dumps({"file": str(file), "prompts": prompts, "vocab": vocab, "texts": texts}))
    ended = subprocess.run([sys.executable, __file__, job, answer], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(answer.read_text())


def main(job: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp as native

    params = native.CommonParams()
    params.model.path = job["file"]
    params.n_ctx, params.n_parallel, params.port, params.verbosity = 512, 1, 0, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = native.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = native.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = native.Server(params)
    return {
        "scores": [_scores(server, prompt, job["vocab"]) for prompt in job["prompts"]],
        "tokens": [_tokens(server, text) for text in job["texts"]],
    }


def _scores(server: Any, prompt: list[int], vocab: int) -> list[float]:
    asked = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": vocab,
        "temperature": 0.0,
        "cache_prompt": False,
        "logit_bias": [[LETTER, 1000.0]],
    }
    said = server.handle_completions(asked)
    said = json.loads(said) if isinstance(said, str | bytes) else said
    found = {one["id"]: one["logprob"] for one in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return [found[token] for token in range(vocab)]


def _tokens(server: Any, text: str) -> list[int]:
    asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())["tokens"]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
