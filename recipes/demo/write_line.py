"""Load a model with stock transformers and let it go on with a line of text: `python write_line.py FOLDER TEXT`."""

import sys

from transformers import pipeline
from transformers.utils.logging import disable_progress_bar


def write_line(folder: str, text: str, new_tokens: int = 24) -> str:
    """Return the text and its most probable continuation, as one line."""
    generate = pipeline("text-generation", folder)
    (answer,) = generate(text, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2)
    return " ".join(answer["generated_text"].split())


if __name__ == "__main__":
    disable_progress_bar()
    print(write_line(sys.argv[1], sys.argv[2]))
