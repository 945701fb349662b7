"""What both ways between a tokenizer.json and the metadata of a GGUF file share: keys, kinds of tokens, roles.

tokenizer.ggml.model          gpt2 (byte-level BPE), llama (SentencePiece's BPE) or t5 (its unigram model)
tokenizer.ggml.pre            how words are divided before BPE: pretokenizers.py
tokenizer.ggml.tokens         the text of each id
tokenizer.ggml.token_type     its kind, a number of `Kind`
tokenizer.ggml.scores         of llama and t5: what is merged first, or the logarithm of a probability
tokenizer.ggml.merges         of gpt2: "a b", most important first
tokenizer.ggml.X_token_id     the id of a role
tokenizer.ggml.add_X_token    whether bos is put before a text, and eos after it
tokenizer.chat_template       Jinja; .NAME for others, whose names are in tokenizer.chat_templates
"""

from enum import IntEnum

__all__ = [
    "DEFAULT_IDS",
    "ENDS",
    "GGML",
    "ROLE_KEYS",
    "TEMPLATE",
    "TEMPLATES",
    "Kind",
    "byte_token",
    "padding",
]

GGML = "tokenizer.ggml."
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


class Kind(IntEnum):
    """The kinds of tokens, by their numbers in a file."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# The roles, as tokenizer_config.json calls them, and the key of each; llama.cpp's spelling of "separator" is the key's.
ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
# What also ends a text.  eot ends a turn and eom a message; for llama.cpp, generation ends at each of the three.
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# What a file that says nothing means, by its model.
DEFAULT_IDS: dict[str, dict[str, int]] = {
    "gpt2": {},
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "t5": {"eos_token": 1, "unk_token": 2, "pad_token": 0},
}


def byte_token(byte: int) -> str:
    """Return SentencePiece's name of a byte that is written where no token fits."""
    return f"<0x{byte:02X}>"


def padding(token_id: int) -> str:
    """Return what fills an id that no token has."""
    return f"[PAD{token_id}]"
