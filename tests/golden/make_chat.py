"""Make chat.json: conversations rendered by Hugging Face's transformers with the models' own chat templates.

    python tests/golden/make_chat.py DIRECTORY        with qwen.jinja (Qwen2.5-Instruct), llama2.jinja, llama3.jinja

The templates belong to the models and are not part of this project; only what they render is kept, and their SHA-256.
"""

import hashlib
import json
import sys
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = {
    "qwen": {},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, <now> & 'here'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Die Uhrzeit — é", "parameters": {}}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TALK = [
    turn("user", "Hello"),
    turn("assistant", "  Hi there.\n"),
    turn("user", "\n2 + 2? "),
    turn("assistant", "4"),
    turn("user", "And 'é' \"quoted\" <b>?"),
    turn("assistant", "Yes\n\n* one\n* two"),
]
SYSTEM = turn("system", "Be brief.\nAlways.")
TOOLS = [
    turn("user", "Weather in Rome and Oslo?"),
    turn("assistant", "", tool_calls=[call("weather", city="Rome"), call("weather", city="Oslo & <co>")]),
    turn("tool", '{"sky": "clear"}', name="weather"),
    turn("tool", "rain", name="weather"),
    turn("assistant", "Clear in Rome, rain in Oslo."),
    turn("user", "And the time?"),
    turn("assistant", "I look.", tool_calls=[call("clock")]),
    turn("tool", "10:00"),
    turn("assistant", "Ten."),
]


def cases():
    """Yield (template, messages, tools, add_generation_prompt)."""
    for name in TOKENS:
        for turns in range(1, 7):
            for head in ([], [SYSTEM]):
                if name == "llama2" or turns % 2:
                    yield name, head + TALK[:turns], None, False
                if turns % 2 == 1:
                    yield name, head + TALK[:turns], None, True
                elif name != "llama2":
                    yield name, head + TALK[:turns], None, False
    for count in range(1, len(TOOLS) + 1):
        for head in ([], [SYSTEM]):
            for tools in (None, [WEATHER], [WEATHER, CLOCK]):
                prompt = TOOLS[count - 1]["role"] != "assistant"
                yield "qwen", head + TOOLS[:count], tools, prompt
    yield "qwen", [TALK[0], TALK[1], SYSTEM, TALK[2]], None, True
    yield "qwen", [turn("system", ""), TALK[0]], [CLOCK], True


def main():
    folder = Path(sys.argv[1])
    sources = {name: (folder / f"{name}.jinja").read_text(encoding="utf-8") for name in TOKENS}
    rows = []
    for name, messages, tools, prompt in cases():
        (text,), _ = render_jinja_template(
            [messages], tools=tools, chat_template=sources[name], add_generation_prompt=prompt, **TOKENS[name]
        )
        rows.append({"template": name, "messages": messages, "tools": tools, "prompt": prompt, "text": text})
    facts = {
        "command": "python tests/golden/make_chat.py DIRECTORY",
        "transformers": transformers.__version__,
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
        "rows": rows,
    }
    path = Path(__file__).with_name("chat.json")
    path.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
