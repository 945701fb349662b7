"""The built-in chat templates, as Jinja text: the same text that is beside an exported model.

    deepzig   <s><system>...</system><user>...</user><assistant>...</assistant></s>       no line breaks; with tools
    chatml    <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n      with tools
    qwen      chatml with the system line that Qwen2.5 puts where there is none
    alpaca    ### Instruction:\\n...\\n\\n### Response:\\n...                                 and the tokenizer's EOS
    llama2    <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\n... [/INST] ... </s>
    llama3    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>

{% generation %} ... {% endgeneration %} is around what the model has to write, the end of its turn included.  A
user's `context` (Alpaca's input) has a place of its own in deepzig (a <system> turn after the question) and alpaca;
elsewhere it follows the question.

Tools in deepzig: the first <system> turn ends with their signatures, each written as a call is, its name and a line of
JSON; a result is a turn of its own, <tool>...</tool> after the </assistant> of the call.  `toolcalls.py` reads both.
"""

from dataclasses import dataclass

__all__ = ["BUILT_IN", "BuiltIn"]


@dataclass(frozen=True)
class BuiltIn:
    """A template's text, the special tokens it needs, and those that an answer's own text may hold.

    `earlier` has the SHA-256 of texts that earlier versions put beside a model: what they render, this one renders so.
    """

    source: str
    tokens: tuple[str, ...] = ()
    answer_tokens: tuple[str, ...] = ()
    tool_form: str | None = None
    earlier: tuple[str, ...] = ()


def _refuse_tools(name: str) -> str:
    return (
        "{%- if tools -%}{{ raise_exception('the template "
        + name
        + " has no place for the signatures of tools; describe them in the system message, or use chatml') }}"
        + "{%- endif -%}"
    )


def _refuse_role(name: str) -> str:
    return "{{ raise_exception('the template " + name + " has no turn for the role ' ~ message.role) }}"


_DEEPZIG = (
    """
{{- '<s>' -}}
{%- if tools -%}
    {%- set given = messages and messages[0].role == 'system' and messages[0].content -%}
    {{- '<system>' + (messages[0].content if given else '') -}}
    {%- for tool in tools -%}
        {%- set function = tool.function or tool -%}
        {{- '\\n\\n' if given or not loop.first else '' -}}
        {{- '<tool>' + function.name + '</tool>\\n' + (function | tojson) -}}
    {%- endfor -%}
    {{- '</system>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set last = loop.last -%}
    {%- if message.role == 'system' -%}
        {{- '' if tools and loop.first else '<system>' + message.content + '</system>' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<tool>' + message.content + '</tool>' -}}
    {%- elif message.role == 'user' -%}
        {{- '<user>' + (message.instruction or message.content) + '</user>' -}}
        {%- if message.context -%}
            {{- '<system>' + message.context + '</system>' -}}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<assistant>' -}}
        {%- generation -%}
            {{- message.content or '' -}}
            {%- for call in message.tool_calls or [] -%}
                {%- set function = call.function or call -%}
                {{- '\\n\\n' if message.content or not loop.first else '' -}}
                {{- '<tool>' + function.name + '</tool>\\n' + (function.arguments | tojson) -}}
            {%- endfor -%}
            {{- '</assistant>' -}}
            {{- '</s>' if last and not add_generation_prompt else '' -}}
        {%- endgeneration -%}
    {%- else -%}
        """
    + _refuse_role("deepzig")
    + """
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- elif not messages or messages[-1].role != 'assistant' -%}
    {{- '</s>' -}}
{%- endif -%}
"""
)

# The wording of the section on tools is that of Qwen2.5: a model that knows it knows it in these words.
_CHATML = (
    """
{%- set given = messages and messages[0].role == 'system' -%}
{%- set opening = messages[0].content if given else default_system -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' + opening + ('\\n\\n' if given or default_system else '') + '# Tools\\n\\n' -}}
    {{- 'You may call one or more functions to assist with the user query.\\n\\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- elif given or default_system -%}
    {{- '<|im_start|>system\\n' + opening + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
            {{- message.content or '' -}}
            {%- for call in message.tool_calls or [] -%}
                {%- set function = call.function or call -%}
                {{- '\\n' if message.content or not loop.first else '' -}}
                {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
                {{- (function.arguments | tojson) + '}\\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' -}}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' -}}
    {%- elif message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- elif message.role != 'system' -%}
        """
    + _refuse_role("chatml")
    + """
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# The wording is that of Stanford Alpaca, with a line break after "### Response:" as in the data set's column `text`.
_ALPACA = (
    _refuse_tools("alpaca")
    + """
{{- bos_token or '' -}}
{%- if messages and messages[0].role == 'system' -%}
    {{- messages[0].content + '\\n\\n' -}}
{%- elif messages and messages[0].context -%}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
    {{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '### Instruction:\\n' + (message.instruction or message.content) -}}
        {%- if message.context -%}
            {{- '\\n\\n### Input:\\n' + message.context -}}
        {%- endif -%}
        {{- '\\n\\n### Response:\\n' -}}
    {%- elif message.role == 'assistant' and not message.tool_calls -%}
        {%- generation -%}
            {{- message.content + (eos_token or '') -}}
        {%- endgeneration -%}
        {{- '' if loop.last else '\\n\\n' -}}
    {%- elif message.role != 'system' or not loop.first -%}
        """
    + _refuse_role("alpaca")
    + """
    {%- endif -%}
{%- endfor -%}
"""
)

_LLAMA2 = (
    _refuse_tools("llama2")
    + """
{%- set given = messages and messages[0].role == 'system' -%}
{%- for message in (messages[1:] if given else messages) -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ['user', 'assistant'] -%}
        {{ raise_exception('the template llama2 needs user and assistant in turn, after one system message') }}
    {%- elif message.role == 'user' -%}
        {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if given and loop.first else '' -%}
        {{- '<s>[INST] ' + (system + message.content) | trim + ' [/INST]' -}}
    {%- elif message.tool_calls -%}
        {{- raise_exception('the template llama2 has no form for the calls of tools; use chatml') -}}
    {%- else -%}
        {%- generation -%}
            {{- ' ' + message.content | trim + ' </s>' -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)

_LLAMA3 = (
    _refuse_tools("llama3")
    + """
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] or message.tool_calls -%}
        {{- raise_exception('the template llama3 has no form for tools; use chatml') -}}
    {%- endif -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content | trim + '<|eot_id|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
)

_TURNS = ("user", "assistant", "system", "tool")
_TAGS = ("<s>", "</s>", *(f"<{slash}{turn}>" for turn in _TURNS for slash in ("", "/")))
_IM = ("<|im_start|>", "<|im_end|>")


def _chatml(system: str) -> BuiltIn:
    return BuiltIn(f"{{%- set default_system = '{system}' -%}}{_CHATML}", _IM, tool_form="qwen")


# Of deepzig, before it had places for the signatures and the results of tools.
_EARLIER = ("cc9a0a702b52602f5c5e8fd79460130703a2513247c53fc5af2d08508fdc931d",)

BUILT_IN = {
    "deepzig": BuiltIn(_DEEPZIG, _TAGS, ("<tool>", "</tool>"), "deepzig", _EARLIER),
    "chatml": _chatml(""),
    "qwen": _chatml(_QWEN_SYSTEM),
    "alpaca": BuiltIn(_ALPACA),
    "llama2": BuiltIn(_LLAMA2, ("<s>", "</s>")),
    "llama3": BuiltIn(_LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
}
