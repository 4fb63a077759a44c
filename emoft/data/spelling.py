"""Tokens as they are shown to a reader."""

from transformers import GPT2Tokenizer

from emoft.data.tokens import token_bytes

BLANK, END = "·", "<eos>"


def spell(tokenizer: GPT2Tokenizer, ids: list[int]) -> list[str]:
    """Return each token as text: blanks as "·", end-of-text as "<eos>", bytes that make no character as \\xNN."""
    found = []
    for token in ids:
        if token == tokenizer.eos_token_id:
            found.append(END)
            continue
        text = token_bytes(tokenizer, [token]).decode("utf-8", errors="backslashreplace")
        found.append(text.replace(" ", BLANK).replace("\n", "\\n").replace("\t", "\\t"))
    return found
