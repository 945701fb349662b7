"""Data: from files on the disk to batches of token ids.

    batch.py         what goes into the model and what should come out          order.py   the order of an epoch
    tokens.py        token ids, in a file (u32) or in memory                    token_batches.py  batches of them
    feed.py          what training asks of a data set, and batches from any of them on
    sources.py       what a file is: name, first bytes, packed or not           token_types.py   files that are not u32
    documents.py     documents from files, directories, standard input
    tokenizer.py     any tokenizer.json: text to ids and back                   token_stream.py  the same, id by id
    tokenizer_training.py                a new tokenizer from texts
    tokenizing.py    documents to token files                                   pieces.py  where to cut a text
    pipeline.py      reads, encodes and writes at the same time
    encoders.py      the two ways from text to ids                              sidecar.py  what X.bin.json says
    corpus.py        text as byte-level ids; the text that is on every machine
    packing.py       many short sequences in few rows
    rows.py          rows of files, each with its line              conversation.py    conversations, from all formats
    json_rows.py     those of JSON, of every shape                  parquet.py         those of a table
    chat.py          chat templates                                 chat_templates.py  those built in
    chat_encoding.py ids of a conversation, and which are learned   toolcalls.py       calls of tools in an answer
    answers.py       where a template wrote the answers             template_sandbox.py  Jinja with an end
    selection.py     which conversations, in which order         chat_dataset.py    rows that are trained on, in batches
    instructions.py  the ABI's view of instruction data
"""

from .batch import IGNORE_INDEX, IGNORE_LABEL, Batch
from .chat import ChatTemplate, load_template, template_for, template_names
from .chat_dataset import ChatDataset, EncodingStats
from .chat_encoding import ChatEncoder
from .conversation import Conversation, Message, RowReader, read_conversation
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
