"""Load a model with stock transformers and let it go on with a line of text: `python write_line.py FOLDER TEXT`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def write_line(folder: str, text: str, new_tokens: int = 24) -> str:
    """Return the text and its most probable continuation, as one line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2, pad_token_id=0)
    return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())


if __name__ == "__main__":
    disable_progress_bar()
    print(write_line(sys.argv[1], sys.argv[2]))
