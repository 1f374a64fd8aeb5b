"""The divergence from a teacher is that of the formula, in value and gradient; a teacher that does not fit is refused."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("axolotl")
from torch.nn.functional import kl_div, log_softmax  # noqa: E402

from downcycle import DowncycleError  # noqa: E402
from downcycle.recipes.plugins import distill  # noqa: E402
from downcycle.recipes.plugins.distill import divergence, load_teacher  # noqa: E402
from downcycle.recipes.plugins.settings import Distillation  # noqa: E402

from tiny_models import tiny_config, tiny_model  # noqa: E402

VOCAB = 37


def logits(seed, dtype=torch.float32):
    return (3 * torch.randn(3, 11, VOCAB, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels(every=False):
    found = torch.arange(33).reshape(3, 11) % VOCAB
    if not every:
        found[0, 4:7] = found[1, 0] = found[2, 9:] = -100
    return found


def by_hand(student, teacher, labels, temperature):
    """Token by token, in float64: torch's own divergence."""
    found = [
        temperature**2 * kl_div(log_softmax(s / temperature, -1), log_softmax(t / temperature, -1), reduction="sum", log_target=True)
        for ours, theirs, row in zip(student, teacher, labels, strict=True)
        for s, t, label in zip(ours[:-1], theirs[:-1], row[1:], strict=True)
        if label != -100
    ]
    return torch.stack(found).mean()


@pytest.mark.parametrize("piece", [1, 7 * VOCAB, 1 << 22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("every", [True, False])
def test_value_and_gradient_are_those_of_the_formula(every, temperature, piece, monkeypatch):
    monkeypatch.setattr(distill, "PIECE", piece)
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    plain = student.detach().double().requires_grad_()
    found, wanted = (
        divergence(student, teacher, labels(every), temperature),
        by_hand(plain, teacher.detach().double(), labels(every), temperature),
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-5) and float(found) > 0.1
    (0.3 * found).backward()
    (0.3 * wanted).backward()
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-4, atol=1e-7)
    assert float(student.grad.norm()) > 0 and teacher.grad is None


def test_tokens_that_do_not_count_get_no_gradient():
    student = logits(0).requires_grad_()
    divergence(student, logits(1), labels(), 2.0).backward()
    told = torch.cat([labels()[:, 1:] != -100, torch.zeros(3, 1, dtype=torch.bool)], 1)
    assert torch.equal(student.grad.abs().sum(-1) > 0, told)


def test_16_bits_are_computed_in_32():
    student = logits(0, torch.bfloat16).requires_grad_()
    plain = student.detach().double().requires_grad_()
    found = divergence(student, logits(1, torch.bfloat16), labels(), 2.0)
    wanted = by_hand(plain, logits(1, torch.bfloat16).double(), labels(), 2.0)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(wanted), rel=1e-5)
    found.backward()
    wanted.backward()
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-2, atol=1e-6)


def test_a_text_of_which_nothing_counts_is_worth_nothing():
    student = logits(0).requires_grad_()
    found = divergence(student, logits(1), torch.full((3, 11), -100), 1.0)
    found.backward()
    assert float(found) == 0 and not student.grad.any()


def test_two_models_that_agree_are_not_apart():
    student = logits(0).requires_grad_()
    found = divergence(student, logits(0), labels(), 2.0)
    found.backward()
    assert abs(float(found)) < 1e-6 and float(student.grad.abs().max()) < 1e-6


# Teachers.


def vocabulary(folder, words):
    """Write a tokenizer that knows some words, in this order; return it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known)
    tokenizer.save_pretrained(folder)
    return tokenizer


def trainer(tokenizer, bf16=False):
    """What of a trainer a teacher is fitted to."""
    model = tiny_model("llama")
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    args = SimpleNamespace(bf16=bf16, device=torch.device("cpu"))
    return SimpleNamespace(model=model, accelerator=accelerator, args=args, processing_class=tokenizer)


WORDS = ["?", "a", "b", "c"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float16), (True, torch.bfloat16)])
def test_a_teacher_is_frozen_and_has_its_own_dtype_or_that_of_the_training(tmp_path, bf16, dtype):
    tiny_model("llama").to(torch.float16).save_pretrained(tmp_path)
    tokenizer = vocabulary(tmp_path, WORDS)
    cfg = SimpleNamespace(base_model=str(tmp_path), revision_of_model=None, trust_remote_code=None, attn_implementation="eager")
    teacher = load_teacher(cfg, Distillation(), trainer(tokenizer, bf16))
    assert teacher.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert not teacher.training and {(one.dtype, one.requires_grad) for one in teacher.parameters()} == {(dtype, False)}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("vocab", "words", "says"),
    [
        (104, WORDS, r"the teacher .* has 104 tokens, and the model 96; give one of its own family"),
        (96, ["?", "b", "a", "c"], r"token '[ab]' is [12] to the teacher .*, and [12] to the model"),
        (96, [*WORDS, "d"], r"token 'd' is 4 to the teacher .*, and None to the model"),
    ],
)
def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, vocab, words, says):
    from transformers import LlamaForCausalLM

    config = tiny_config("llama")
    config.vocab_size = vocab
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    vocabulary(tmp_path / "teacher", words)
    cfg = SimpleNamespace(base_model="m", revision_of_model=None, trust_remote_code=None, attn_implementation="eager")
    with pytest.raises(DowncycleError, match=says) as refused:
        load_teacher(cfg, Distillation(teacher=str(tmp_path / "teacher")), trainer(vocabulary(tmp_path / "mine", WORDS)))
    assert "\n" not in str(refused.value)
