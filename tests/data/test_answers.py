"""Answers are found in the rendering of any template: those that it marks, and those that it does not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py.data import ChatTemplate, Conversation, Message, read_conversation
from abi_py.data.answers import AnswerFinder
from abi_py.data.batch import trained_of
from abi_py.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/masks.json").read_text(encoding="utf-8"))
TEMPLATES = Path(__file__).parent / "templates"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
THOUGHTS = ("reasoning_content", "thinking")
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture(scope="module")
def styles(make_tokenizer):
    """Return the tokenizers of the styles by name."""
    return {name: make_tokenizer(names, **GOLDEN["roles"][name]) for name, names in GOLDEN["specials"].items()}


@pytest.fixture(scope="module")
def im(make_tokenizer):
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")


def learned(tokenizer, template, messages, loss_on="assistant"):
    """Return the text of each run of learned tokens, and the text of all."""
    ids, labels = template.encode(tokenizer, read_conversation({"messages": messages}), loss_on)
    trained = trained_of(labels)
    borders = np.flatnonzero(np.diff(np.concatenate([[0], trained.view(np.int8), [0]])))
    runs = [tokenizer.decode(ids[start:stop].tolist()) for start, stop in borders.reshape(-1, 2)]
    return runs, tokenizer.decode(ids.tolist())


def source_of(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "found"])
@pytest.mark.parametrize("number", range(len(GOLDEN["rows"])))
def test_same_mask_as_transformers(styles, number, marked):
    row = GOLDEN["rows"][number]
    template = ChatTemplate(source_of(row["template"]), row["template"])
    if not marked:
        template = ChatTemplate(template.portable_source, row["template"])
        assert not template.marks_answers
    assert learned(styles[row["template"]], template, row["messages"]) == (row["learned"], row["text"])


TEXT = st.lists(
    st.sampled_from(
        ["one", "!", "<b>", "\n", " ", "日本", "👍", "<|im_end|>", "[INST]", "1", "ß", "{{", "é", "]", "<", "</s>"]
    ),
    min_size=1,
    max_size=5,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(GOLDEN["specials"])),
    texts=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
    thoughts=st.lists(st.none() | TEXT, min_size=3, max_size=3),
)
def test_what_is_found_is_what_is_marked(styles, name, texts, thoughts):
    template = ChatTemplate(source_of(name), name)
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    for i, thought in enumerate(thoughts[: len(turns) // 2]):
        if thought is not None:
            turns[2 * i + 1] = Message("assistant", texts[2 * i + 1], extra=dict.fromkeys(THOUGHTS, thought))
    want = template.encode(styles[name], Conversation(tuple(turns)))
    found = ChatTemplate(template.portable_source, name).encode(styles[name], Conversation(tuple(turns)))
    assert [row.tolist() for row in found] == [row.tolist() for row in want]


def test_the_token_of_the_next_role_ends_an_answer(make_tokenizer):
    names = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]
    tokenizer, template = make_tokenizer(names, eos_token="<|endoftext|>"), ChatTemplate(source_of("glm"), "glm")
    talk = [dict(turn, reasoning_content="hm") if turn["role"] == "assistant" else turn for turn in TALK]
    assert learned(tokenizer, template, talk)[0] == [
        "\n<think></think>\none<|user|>",
        "\n<think>hm</think>\ntwo<|endoftext|>",
    ]
    stops = template.encoder(tokenizer).stop_ids(TALK[:1])
    assert set(map(tokenizer.token_of, stops)) == {"<|user|>", "<|endoftext|>"}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3", {"<|im_end|>"}),
        ("deepseek_r1", {"<｜end▁of▁sentence｜>"}),
        ("gpt_oss", {"<|return|>"}),  # <|end|> also stands between a thought and its answer
        ("gemma", {"<end_of_turn>"}),
        ("mistral", {"</s>"}),
    ],
)
@pytest.mark.parametrize("marked", [True, False])
def test_what_ends_an_answer(styles, name, ends, marked):
    template = ChatTemplate(source_of(name))
    encoder = (template if marked else ChatTemplate(template.portable_source)).encoder(styles[name])
    assert set(map(styles[name].token_of, encoder.stop_ids(TALK[:1]))) == ends


def test_an_end_that_depends_on_the_place(make_tokenizer):
    tokenizer = make_tokenizer(["<|start|>", "<|message|>", "<|end|>", "<|return|>"], eos_token="<|return|>")
    template = ChatTemplate(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
    )
    assert learned(tokenizer, template, TALK)[0] == ["one<|end|>", "two<|return|>"]
    stops = template.encoder(tokenizer).stop_ids(TALK[:1])
    assert [tokenizer.token_of(i) for i in stops] == ["<|return|>", "<|end|>"]


@pytest.mark.parametrize(
    ("source", "want"),
    [
        # the prompt opens a thought that no turn has
        ("{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT.replace("{% endif", "<think>\n{% endif"), None),
        # the text is changed
        ("{% for m in messages %}" + TURN.replace(".content", ".content|upper") + "{% endfor %}" + PROMPT, "upper"),
        ("{% for m in messages %}" + TURN.replace(".content", ".content[::-1]") + "{% endfor %}" + PROMPT, "reversed"),
        # what is written first tells how many turns there are
        ("{{ messages|length }}{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT, None),
        # a header without a generation prompt is for the model to write
        ("{{ messages|length }}{% for m in messages %}" + TURN + "{% endfor %}", "header"),
    ],
)
def test_templates_that_write_turns_in_their_own_way(im, source, want):
    ends = {"upper": ["ONE<|im_end|>", "TWO<|im_end|>"], "reversed": ["eno<|im_end|>", "owt<|im_end|>"]}
    ends["header"] = ["<|im_start|>assistant\none<|im_end|>", "<|im_start|>assistant\ntwo<|im_end|>"]
    runs, _ = learned(im, ChatTemplate(source), TALK)
    assert [run.lstrip("\n") for run in runs] == ends.get(want, ["one<|im_end|>", "two<|im_end|>"])


def test_a_template_that_wants_a_system_turn(im):
    first = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
    template = ChatTemplate(first + "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT)
    talk = [{"role": "system", "content": "s"}, *TALK]
    assert learned(im, template, talk)[0] == ["one<|im_end|>", "two<|im_end|>"]
    assert template.encoder(im).stop_ids(talk[:2]) == (im.eos_id,)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "!",
        "a",
        "<b>",
        "one</think>two",
        "x" * 300,
        "\n one \n",
        "日本",
        "ß ŉ",
        "1",
        "a<think></think>",
        "<think>a</think>",
    ],
)
def test_answers_of_any_text(im, styles, answer):
    """A template in which nothing but the end of the first answer changes: what is learned is what it writes."""
    source = source_of("qwen3").replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    talk = [TALK[0], {"role": "assistant", "content": answer, "tool_calls": []}, *TALK[2:]]
    if not answer:
        talk[1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    template = ChatTemplate(source)
    text = template.render(read_conversation({"messages": talk}))
    want = text.split("assistant\n")[1].partition("<|im_end|>")[0] + "<|im_end|>"
    assert learned(styles["qwen3"], template, talk)[0][0] == want


def test_a_thought_whose_tags_are_special_tokens(make_tokenizer):
    """What the template looks for in an answer is its own; the same name in a question is text."""
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], eos_token="<|im_end|>")
    talk = [
        {"role": "user", "content": "</think>?"},
        {"role": "assistant", "content": "<think>\nhm<|im_end|>\n</think>\n\nYes."},
    ]
    for source in (source_of("qwen3"), ChatTemplate(source_of("qwen3")).portable_source):
        ids, _ = ChatTemplate(source).encode(tokenizer, read_conversation({"messages": talk}))
        assert learned(tokenizer, ChatTemplate(source), talk)[0] == [
            "<think>\nhm<|im_end|>\n</think>\n\nYes.<|im_end|>"
        ]
        counted = {name: ids.tolist().count(tokenizer.id_of(name)) for name in ("<think>", "</think>", "<|im_end|>")}
        assert counted == {"<think>": 1, "</think>": 1, "<|im_end|>": 2}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for m in messages %}\n{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}\n"
            "{% if add_generation_prompt %}bot: {% endif %}",
            r"mine:2: '\{\{ m.role \}\}: \{\{ m.content \}\}<\|im_end\|>': answer 0 cannot be found: the prompt that "
            r"asks for an answer is not written like the answer's turn; put \{% generation %\}.*loss_on='all'",
        ),
        ("{% for m in messages|reverse %}\n" + TURN + "{% endfor %}" + PROMPT, "mine:1: .*answer 0 cannot be found"),
        (
            "{% for m in messages %}{{ m.content }}"
            "{{ '|' if m.role == 'user' else ' and' if not loop.last else ' end' }}{% endfor %}",
            "by no token",
        ),
        (
            "{{ messages|length }}{% for m in messages %}{{ 'x' if m.content == 'one' }}" + TURN + "{% endfor %}",
            "the words of the answer decide",
        ),
    ],
)
def test_an_answer_that_cannot_be_found_is_an_error_with_a_remedy(im, source, message):
    template = ChatTemplate(source, "mine")
    with pytest.raises(DataError, match=message):
        learned(im, template, TALK)
    runs, text = learned(im, template, TALK, loss_on="all")  # the remedy
    assert runs == [text[len(im.decode(im.encode(text)[:1])) :]]


def test_without_an_end_in_template_and_tokenizer_the_tokenizer_is_named(make_tokenizer):
    tokenizer = make_tokenizer(["<s>"], eos_token=None)
    with pytest.raises(Exception, match="nothing ends an answer"):
        ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").encoder(tokenizer).stop_ids(TALK[:1])


def test_anchors_tell_all_messages_apart():
    talk = [{"role": "user", "content": f"{i} x"} for i in range(20)]

    def render(turns, prompt):
        return "".join(turn["content"].upper() + "|" for turn in turns)

    anchors = AnswerFinder(render, talk, re.compile("(?!)"))._anchors
    at = 0
    for i, turn in enumerate(talk):
        assert anchors[i].tolist() == [at, at + len(turn["content"]) - 1]
        at += len(turn["content"]) + 1
