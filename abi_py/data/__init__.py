"""Data: from files on the disk to batches of token ids.  The file map in README.md has a line for each file.

    text     sources -> documents -> pieces -> encoders -> tokenizing -> X.bin and its sidecar -> tokens
    chat     rows -> conversation_rows -> selection -> chat (a template) -> chat_encoding -> chat_dataset
    batches  feed, what training asks of a data set: token_batches, chat_dataset padded, packing; each gives a Batch
"""

from .batch import IGNORE_INDEX, IGNORE_LABEL, Batch
from .chat import ChatTemplate, load_template, template_for, template_names
from .chat_dataset import ChatDataset, EncodingStats
from .chat_encoding import ChatEncoder
from .conversation import Conversation, Message
from .conversation_rows import RowReader, read_conversation
from .corpus import (
    BYTE_VOCAB_SIZE,
    END_OF_DOCUMENT,
    byte_tokens,
    decode_bytes,
    load_text_corpus,
    open_corpus,
    standard_library_corpus,
)
from .documents import Document, Documents, TextFormat
from .feed import Batching, Dataset, Feed, Identity
from .instructions import InstructionList, InstructionSample, parse_instruction_dataset
from .packing import PackedBatches, PackingStats, SequencePacker
from .places import Place
from .selection import Selection, select_conversations
from .sidecar import TokensInfo, read_sidecar
from .token_batches import BatchIterator
from .tokenizer import Tokenizer
from .tokenizer_training import SPECIAL_TOKENS, TokenizerStyle, train_tokenizer
from .tokenizing import TokenizeConfig, TokenizeReport, tokenize_if_needed, tokenize_to_file
from .tokens import DataLoader, TokenizedDataset
from .toolcalls import BadToolCall, ParsedAnswer, ToolCall, parse_tool_calls, render_tool_calls

__all__ = [
    "BYTE_VOCAB_SIZE",
    "END_OF_DOCUMENT",
    "IGNORE_INDEX",
    "IGNORE_LABEL",
    "SPECIAL_TOKENS",
    "BadToolCall",
    "Batch",
    "BatchIterator",
    "Batching",
    "ChatDataset",
    "ChatEncoder",
    "ChatTemplate",
    "Conversation",
    "DataLoader",
    "Dataset",
    "Document",
    "Documents",
    "EncodingStats",
    "Feed",
    "Identity",
    "InstructionList",
    "InstructionSample",
    "Message",
    "PackedBatches",
    "PackingStats",
    "ParsedAnswer",
    "Place",
    "RowReader",
    "Selection",
    "SequencePacker",
    "TextFormat",
    "TokenizeConfig",
    "TokenizeReport",
    "TokenizedDataset",
    "Tokenizer",
    "TokenizerStyle",
    "TokensInfo",
    "ToolCall",
    "byte_tokens",
    "decode_bytes",
    "load_template",
    "load_text_corpus",
    "open_corpus",
    "parse_instruction_dataset",
    "parse_tool_calls",
    "read_conversation",
    "read_sidecar",
    "render_tool_calls",
    "select_conversations",
    "standard_library_corpus",
    "template_for",
    "template_names",
    "tokenize_if_needed",
    "tokenize_to_file",
    "train_tokenizer",
]
