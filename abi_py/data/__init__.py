"""Data: from files on the disk to batches of token ids.  The file map in README.md has a line for each file.

    text     sources -> documents -> pieces -> encoders -> tokenizing -> X.bin and its sidecar -> tokens
    chat     rows -> conversation_rows -> selection -> chat (a template) -> chat_encoding -> chat_dataset
    batches  feed, what training asks of a data set: token_batches, chat_dataset padded, packing; each gives a Batch
"""

from .batch import IGNORE_INDEX as IGNORE_INDEX
from .batch import IGNORE_LABEL as IGNORE_LABEL
from .batch import Batch as Batch
from .chat import ChatTemplate as ChatTemplate
from .chat import load_template as load_template
from .chat import template_for as template_for
from .chat import template_names as template_names
from .chat_dataset import ChatDataset as ChatDataset
from .chat_dataset import EncodingStats as EncodingStats
from .chat_encoding import ChatEncoder as ChatEncoder
from .conversation import Conversation as Conversation
from .conversation import Message as Message
from .conversation_rows import RowReader as RowReader
from .conversation_rows import read_conversation as read_conversation
from .corpus import BYTE_VOCAB_SIZE as BYTE_VOCAB_SIZE
from .corpus import END_OF_DOCUMENT as END_OF_DOCUMENT
from .corpus import byte_tokens as byte_tokens
from .corpus import decode_bytes as decode_bytes
from .corpus import load_text_corpus as load_text_corpus
from .corpus import open_corpus as open_corpus
from .corpus import standard_library_corpus as standard_library_corpus
from .documents import Document as Document
from .documents import Documents as Documents
from .documents import TextFormat as TextFormat
from .feed import Batching as Batching
from .feed import Dataset as Dataset
from .feed import Feed as Feed
from .feed import Identity as Identity
from .instructions import InstructionList as InstructionList
from .instructions import InstructionSample as InstructionSample
from .instructions import parse_instruction_dataset as parse_instruction_dataset
from .packing import PackedBatches as PackedBatches
from .packing import PackingStats as PackingStats
from .packing import SequencePacker as SequencePacker
from .places import Place as Place
from .selection import Selection as Selection
from .selection import select_conversations as select_conversations
from .sidecar import TokensInfo as TokensInfo
from .sidecar import read_sidecar as read_sidecar
from .token_batches import BatchIterator as BatchIterator
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer_training import SPECIAL_TOKENS as SPECIAL_TOKENS
from .tokenizer_training import TokenizerStyle as TokenizerStyle
from .tokenizer_training import train_tokenizer as train_tokenizer
from .tokenizing import TokenizeConfig as TokenizeConfig
from .tokenizing import TokenizeReport as TokenizeReport
from .tokenizing import tokenize_if_needed as tokenize_if_needed
from .tokenizing import tokenize_to_file as tokenize_to_file
from .tokens import DataLoader as DataLoader
from .tokens import TokenizedDataset as TokenizedDataset
from .toolcalls import BadToolCall as BadToolCall
from .toolcalls import ParsedAnswer as ParsedAnswer
from .toolcalls import ToolCall as ToolCall
from .toolcalls import parse_tool_calls as parse_tool_calls
from .toolcalls import render_tool_calls as render_tool_calls
