"""Make deepzig_chat.json: conversations with tools rendered by transformers with the portable text of our own template.

python tests/golden/make_deepzig_chat.py
"""

import hashlib
import json
from pathlib import Path

import transformers
from make_chat import CLOCK, SYSTEM, TALK, TOOLS, WEATHER
from transformers.utils.chat_template_utils import render_jinja_template

from abi_py.data.chat import load_template


def main():
    source = load_template("deepzig").portable_source
    rows = []
    for turns in (TALK[:1], TALK[:2], TALK, *(TOOLS[:count] for count in range(1, len(TOOLS) + 1))):
        for head in ([], [SYSTEM]):
            for tools in (None, [WEATHER], [WEATHER, CLOCK]):
                prompt = turns[-1]["role"] != "assistant"
                made, _ = render_jinja_template(
                    [head + turns], tools=tools, chat_template=source, add_generation_prompt=prompt
                )
                rows.append({"messages": head + turns, "tools": tools, "prompt": prompt, "text": made[0]})
    facts = {
        "command": "python tests/golden/make_deepzig_chat.py",
        "transformers": transformers.__version__,
        "sha256": hashlib.sha256(source.encode()).hexdigest(),
        "rows": rows,
    }
    path = Path(__file__).with_name("deepzig_chat.json")
    path.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
