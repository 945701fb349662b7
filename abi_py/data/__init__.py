"""Data: from files on the disk to batches of token ids.

    tokens.py        token files (u32), Batch, BatchIterator, DataLoader        order.py   the order of an epoch
    tokenizer.py     any tokenizer.json: text to ids and back                   token_stream.py  the same, id by id
    corpus.py        text as byte-level ids; the text that is on every machine
    packing.py       many short sequences in few rows
    instructions.py  Alpaca and ShareGPT rows
"""

from .corpus import (
    BYTE_VOCAB_SIZE,
    END_OF_DOCUMENT,
    TokenizeReport,
    byte_tokens,
    decode_bytes,
    load_text_corpus,
    open_corpus,
    standard_library_corpus,
    tokenize_to_file,
)
from .instructions import InstructionList, InstructionSample, parse_instruction_dataset
from .packing import PackedBatches, PackingStats, SequencePacker
from .tokenizer import Tokenizer
from .tokens import IGNORE_INDEX, IGNORE_LABEL, Batch, BatchIterator, DataLoader, TokenizedDataset

__all__ = [
    "BYTE_VOCAB_SIZE",
    "END_OF_DOCUMENT",
    "IGNORE_INDEX",
    "IGNORE_LABEL",
    "Batch",
    "BatchIterator",
    "DataLoader",
    "InstructionList",
    "InstructionSample",
    "PackedBatches",
    "PackingStats",
    "SequencePacker",
    "TokenizeReport",
    "TokenizedDataset",
    "Tokenizer",
    "byte_tokens",
    "decode_bytes",
    "load_text_corpus",
    "open_corpus",
    "parse_instruction_dataset",
    "standard_library_corpus",
    "tokenize_to_file",
]
