"""Perplexity is what a straightforward computation gives: each token alone, from exactly the tokens that its window shows it."""

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from downcycle import DowncycleError, keep_layers, open_checkpoint, write  # noqa: E402
from downcycle.eval.measure.loading import load  # noqa: E402
from downcycle.eval.measure.perplexity import UNSCORED, clustered_error, perplexity, token_losses  # noqa: E402
from downcycle.eval.measure.text import Documents, read_documents  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402

PHRASE = "the model reads a piece, moves on, and reads the next. "
LONG = (f"One long document, of which no window sees the whole: {PHRASE}{PHRASE}Ünïcode: 猫 🐈.",)
SHORT = ("A tale.", "Two words", "", "x", "The last document is the longest one of all of these, and needs a few windows.")
MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "tokenizer": "bos"},
    "gpt2": {"config": "GPT2Config", "tokenizer": "eos", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {"config": "MistralConfig", "sliding_window": 5},
    "nothing before": {"tokenizer": "none"},
    "ends of text": {"tokenizer": "both", "tie_word_embeddings": True},
    "mixtral": {"config": "MixtralConfig", "num_local_experts": 4, "tokenizer": "eos"},
}


def documents(texts) -> Documents:
    return Documents("given", "digest", tuple(texts))


def alone(folder, texts, length: int, stride: int) -> list[list[float]]:
    """The oracle: the loss of each token of each document, one forward pass for each, softmax in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        ids = ids[:-1] if ids[-1:] == [4081] else ids  # an end is no text
        if not ids or ids[0] != 4080:  # no BOS
            ids = [*([] if tokenizer.eos_token is None else [tokenizer.eos_token_id]), *ids]
        own = []
        for place in range(1, len(ids)):
            moves = max(0, math.ceil((place - length) / stride))
            with torch.no_grad():
                logits = model(torch.tensor([ids[moves * stride : place]])).logits[0, -1]
            own.append(-torch.log_softmax(logits.double(), -1)[ids[place]].item())
        losses.append(own)
    return losses


WINDOWS = [(16, 8), (12, 12), (7, 3), (64, 50), (5, 1)]
CASES = [(kind, "long" if place % 2 else "short", *WINDOWS[place % 5]) for place, kind in enumerate(MODELS)]
CASES += [(kind, "short" if place % 2 else "long", 16, 8) for place, kind in enumerate(MODELS)]
CASES += [("llama", texts, *window) for texts in ("long", "short") for window in WINDOWS]


@pytest.mark.parametrize(("kind", "texts", "length", "stride"), sorted(set(CASES)))
def test_equals_each_token_alone(tiny, kind, texts, length, stride):
    folder, texts = tiny(**MODELS[kind]), {"long": LONG, "short": SHORT}[texts]
    each = [loss for own in alone(folder, texts, length, stride) for loss in own]
    size, loaded = sum(len(text.encode()) for text in texts), load(open_checkpoint(folder), device="cpu")
    for batch in (1, 3, 64):
        found = perplexity(loaded, documents(texts), length=length, stride=stride, batch=batch)
        assert found.loss == pytest.approx(np.mean(each), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(np.mean(each)), rel=1e-4)
        assert found.tokens == len(each)
        assert found.bits_per_byte == pytest.approx(sum(each) / math.log(2) / found.bytes, rel=1e-5)
        assert found.bytes == size - (0 if kind != "nothing before" else unpredicted(folder, texts))
        assert (found.length, found.stride, found.text, found.digest) == (length, stride, "given", "digest")


def unpredicted(folder, texts) -> int:
    """Bytes of the first token of each text, which nothing stands before."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spans = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:1] for text in texts]
    return sum(len(text[: end[0][1]].encode()) for text, end in zip(texts, spans, strict=True) if end)


def test_any_tokens_of_a_batch_can_be_scored(tiny):
    """Late ones of one row beside early ones of another, and none of a third."""
    model = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    ids = torch.randint(4000, (3, 20), generator=torch.Generator().manual_seed(1))
    targets = torch.full((3, 20), UNSCORED)
    targets[0, 12:] = torch.arange(100, 108)
    targets[1, 2:5] = torch.tensor([5, 6, 7])
    with torch.no_grad():
        every = -torch.log_softmax(model(ids).logits.double(), -1)
        found = token_losses(model, ids, targets)
    expected = [every[row, place, targets[row, place]].item() for row, place in (targets != UNSCORED).nonzero().tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_documents_do_not_see_each_other(tiny):
    """A document's loss is the same whatever stands beside it, and the sum of all is that of each."""
    loaded = load(open_checkpoint(tiny()), device="cpu")
    single = [perplexity(loaded, documents([text]), length=16) for text in SHORT if len(text) > 2]
    together = perplexity(loaded, documents([text for text in SHORT if len(text) > 2]), length=16, batch=2)
    assert together.tokens == sum(one.tokens for one in single)
    assert together.documents == len(single)
    assert together.loss * together.tokens == pytest.approx(sum(one.loss * one.tokens for one in single), rel=1e-6)


@pytest.mark.parametrize("texts", [SHORT, LONG, ("Few tokens here",)], ids=["documents", "windows", "tokens"])
def test_standard_error_is_clustered(tiny, texts):
    """Against Miller's formula written out with its double sum over pairs of tokens of one cluster, and the factor for few clusters."""
    folder, length, stride = tiny(), 16, 8
    losses = alone(folder, texts, length, stride)
    if len(texts) > 1:
        clusters = [own for own in losses if own]
    elif len(losses[0]) > length:
        own = losses[0]
        clusters = [own[:length], *(own[start : start + stride] for start in range(length, len(own), stride))]
    else:
        clusters = [[loss] for loss in losses[0]]
    mean, total = np.mean(np.concatenate(clusters)), sum(map(len, clusters))
    pairs = sum((one - mean) * (other - mean) for own in clusters for one in own for other in own)
    expected = math.sqrt(pairs / total**2 * len(clusters) / (len(clusters) - 1))
    found = perplexity(open_checkpoint(folder), documents(texts), length=length, stride=stride)
    assert found.stderr == pytest.approx(expected, rel=1e-4)


def test_standard_error_is_near_the_jackknife():
    """Leaving out a cluster at a time estimates the same error; of many alike clusters the two agree closely."""
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 70, 400)
    sums = np.array([rng.normal(3, 0.2) * count for count in counts])
    means = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = math.sqrt(399 / 400 * ((means - means.mean()) ** 2).sum())
    assert clustered_error(sums.sum() / counts.sum(), sums.tolist(), counts.tolist()) == pytest.approx(jackknife, rel=0.01)


def test_an_unwritten_cut_is_the_written_one(tiny, tmp_path):
    child = keep_layers(open_checkpoint(tiny()), [0, 2])
    written = perplexity(open_checkpoint(write(child, tmp_path / "child")), documents(LONG), length=16)
    assert perplexity(child, documents(LONG), length=16) == written
    assert written.loss != perplexity(open_checkpoint(tiny()), documents(LONG), length=16).loss


def test_defaults(tiny):
    """All positions of the model, half of them at a time; 2048 where it has more."""
    found = perplexity(open_checkpoint(tiny()), documents(LONG))
    assert (found.length, found.stride) == (64, 32)
    found = perplexity(open_checkpoint(tiny(max_position_embeddings=9999)), documents(SHORT))
    assert (found.length, found.stride) == (2048, 1024)


def test_built_in_model_on_its_held_out_text():
    """About what recipes/demo/README.md says of windows of another kind; the whole path, in bf16, on a part of the text."""
    told = []
    found = perplexity(open_checkpoint("demo"), read_documents(None, limit=5), length=512, progress=lambda *step: told.append(step))
    assert found.loss == pytest.approx(3.47, abs=0.35)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.documents == 5
    assert told[0] == ("loading the model", 0, 0)
    assert ("reading the text", 5, 5) in told
    assert told[-1] == ("measuring the loss", found.tokens, found.tokens)


def test_no_batch_changes_what_the_length_of_a_window_decides(tiny):
    """Long windows get other rotary factors than short ones: a short one must not be filled up to a long one's length."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    window = {"original_max_position_embeddings": 16}
    loaded = load(open_checkpoint(tiny("Phi3Config", rope_parameters=rope | window, pad_token_id=0, **window)), device="cpu")
    texts = documents([LONG[0][:40], LONG[0][:300], LONG[0][5:45]])
    one, many = (perplexity(loaded, texts, length=48, batch=batch).loss for batch in (1, 64))
    assert many == pytest.approx(one, rel=1e-6)
    ids = torch.arange(2, 30)[None]
    whole, part = loaded.model(ids).logits[0, :10], loaded.model(ids[:, :10]).logits[0]
    assert (whole - part).abs().max() > 1e-3  # else this would not be such a model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 65}, "length 65: .* has 64 positions"),
        ({"length": 0}, "length 0: give numbers from 1"),
        ({"length": 8, "stride": 9}, "stride 9: windows of 8 tokens would leave some out"),
        ({"stride": 0}, "stride 0: give numbers from 1"),
        ({"batch": 0}, "batch 0: give"),
        ({"text": documents(["x"])}, "given: only 1 of its tokens can be scored, and two are needed"),
        ({"text": documents([""])}, "given: only 0 of its tokens can be scored"),
        ({"load": "fp4"}, "--load fp4: choose one of stored, bf16"),
    ],
)
def test_refuses(tiny, change, words):
    with pytest.raises(DowncycleError, match=words) as refused:
        perplexity(open_checkpoint(tiny()), **{"text": documents(LONG), **change})
    assert "\n" not in str(refused.value)


def test_tokenizer_of_another_model(tiny):
    """Ids beyond the model's embeddings are told before anything is computed."""
    folder = tiny(vocab_size=300, bos_token_id=1, eos_token_id=2)
    ids = AutoTokenizer.from_pretrained(DEMO_FOLDER)(SHORT[0])["input_ids"]
    with pytest.raises(DowncycleError, match=rf"gives token {max(ids)} .* has embeddings for 0-299; put the tokenizer"):
        perplexity(open_checkpoint(folder), documents(SHORT[:1]))


def with_weight(checkpoint, name: str, value: float):
    """The checkpoint with one number of a tensor replaced."""
    tensor = checkpoint.tensors[name]
    numbers = np.frombuffer(b"".join(tensor.chunks()), np.float32).copy()
    numbers[7] = value
    return replace(checkpoint, tensors={**checkpoint.tensors, name: replace(tensor, data=lambda: [numbers.tobytes()])})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"the output of layer 1 is not finite, as its weight mlp.up_proj.weight holds NaN"),
        ("model.embed_tokens.weight", r"the output of the embeddings is not finite, as its weight weight holds NaN"),
        ("model.norm.weight", r"the output of the final norm or the head is not finite, as its weight model.norm.weight holds NaN"),
        ("lm_head.weight", r"the output of the final norm or the head is not finite, as its weight lm_head.weight holds NaN"),
    ],
)
def test_says_where_numbers_stop_being_finite(tiny, name, words):
    folder = tiny()
    token = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(0)
    with pytest.raises(DowncycleError, match=words):
        perplexity(with_weight(open_checkpoint(folder), name, math.nan), documents([token * 30, SHORT[0]]), batch=1)


def test_says_which_layer_of_the_parent_it_was(tiny):
    child = keep_layers(with_weight(open_checkpoint(tiny()), "model.layers.2.self_attn.o_proj.weight", math.inf), [0, 2])
    with pytest.raises(DowncycleError, match=rf"the output of layer 1 \(layer 2 of {tiny()}\) is not finite"):
        perplexity(child, documents(LONG))


def test_overflow_in_half_precision(tiny, copy):
    """Finite weights whose products are beyond float16."""
    folder = copy(tiny(dtype="float16"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 60000 / tensors["model.layers.1.mlp.down_proj.weight"].abs().max().float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DowncycleError, match="layer 1 is not finite: numbers grow beyond what float16 holds; try --load bf16 or fp32"):
        perplexity(open_checkpoint(folder), documents(LONG))
    assert math.isfinite(perplexity(open_checkpoint(folder), documents(LONG), load="fp32").loss)
