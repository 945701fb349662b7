"""`abi-train generate`: what a trained model makes of a prompt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, counted
from ..generation.settings import GenerationConfig
from ..runs.models import find_codec, generation_settings
from .console import note, read_stdin, utf8_output, write
from .models import (
    INTERRUPTED,
    TOKENIZER_HELP,
    ModelPath,
    adapter_option,
    compile_for_decoding,
    described,
    named_models,
    open_model,
    set_threads,
    threads_option,
    which_options,
)
from .options import PathType, Verb, config_options, given_values

if TYPE_CHECKING:
    from ..generation import Generation, Generator


@click.command(
    cls=Verb,
    example="abi-train generate runs/20260122-101500 --prompt Hello --max-new-tokens 100",
    short_help="Let a trained model write.",
)
@click.argument("model", type=ModelPath())
@adapter_option
@which_options
@click.option("-p", "--prompt", "prompts", multiple=True, help="text to go on from; may be repeated  [stdin]")
@click.option("--ids", "id_prompts", multiple=True, metavar="IDS", help='token ids instead of text, as in "5 17 3"')
@click.option("--tokenizer", type=PathType(path_type=Path, exists=True), help=TOKENIZER_HELP)
@click.option(
    "--config",
    type=PathType(path_type=Path, exists=True),
    help="file of settings; generation_config.json; flags beat it",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="machine-readable; a line of JSON for each prompt: text, ids, log-probabilities",
)
@threads_option
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    adapters: tuple[tuple[str | None, Path], ...],
    which: str | None,
    prompts: tuple[str, ...],
    id_prompts: tuple[str, ...],
    tokenizer: Path | None,
    config: Path | None,
    as_json: bool,
    threads: int | None,
    **_: Any,
) -> None:
    """Write what MODEL, a run, a checkpoint, or a folder of Hugging Face's kind, makes of each prompt.

    One prompt is shown as it grows; several are written together and shown one by one. Only the text goes to standard
    output; Ctrl-C keeps what is there. With several adapters each writes in turn, under its name.
    """
    from ..generation import Generator

    if "" in prompts:
        raise ConfigError("prompt () must not be empty; give at least one character")
    flags = given_values(ctx).get("generation", {})
    if "logprobs" in flags and not as_json:
        raise ConfigError(f"logprobs ({flags['logprobs']}) acts only with --json, which shows them; give it too")
    asked: list[Any] = [*prompts, *map(parse_ids, id_prompts)]
    set_threads(threads)
    loaded = open_model(model, which)
    settings = generation_settings(loaded, config, flags)
    if settings.stop_ids is None and loaded.eos_ids is not None:
        settings = settings.replace(stop_ids=loaded.eos_ids)
    codec = find_codec(loaded, tokenizer)
    if codec is None and (prompts or not asked):
        raise ConfigError(
            f"{loaded.directory} has no tokenizer, so its ids have no text; give --tokenizer, or --ids instead of text"
        )
    models = named_models(loaded, adapters)
    asked = asked or [read_stdin()]
    utf8_output()
    for name, each in models:
        more, title = described(loaded, name) if as_json else None, name if len(models) > 1 else None
        if run(Generator(each.model, codec), asked, settings, more, title):
            ctx.exit(INTERRUPTED)


config_options({"generation": GenerationConfig}, {})(command)


def parse_ids(text: str) -> list[int]:
    """Return the ids in a text like "5 17 3" or "5,17,3"; ConfigError if there is anything else."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"ids ({text!r}) must be whole numbers; write them as in --ids '5 17 3'") from None


def run(
    generator: "Generator",
    prompts: list[Any],
    settings: GenerationConfig,
    as_json: Mapping[str, Any] | None,
    title: str | None = None,
) -> bool:
    """Generate and show everything, under a title or as lines of JSON with what each repeats; return whether Ctrl-C
    ended it."""
    streaming = len(prompts) == 1 and as_json is None
    interrupted = False
    stream = generator.stream(prompts, settings)  # raises for settings and prompts that do not fit
    compile_for_decoding(generator.model, integer=settings.integer_products)
    if title is not None and as_json is None:
        write([f"== {title}\n"])
    try:
        for token in stream:
            if streaming:
                write([token.text] if generator.codec else [f"{token.id} "] if token.id is not None else [])
    except KeyboardInterrupt:
        interrupted = True
    results = generator.results()
    if streaming:
        write(["\n"])
    else:
        for prompt, result in zip(prompts, results):
            write([titled(prompt, result) if as_json is None else json_line(prompt, result, as_json), "\n"])
    for result in results:
        if result.dropped:
            note(f"note: the context is full: dropped {counted(result.dropped, 'token')} at the beginning")
        length = len(result.prompt_ids)
        if settings.max_new_tokens is None and not settings.limit(length, generator.model.config.max_seq_len):
            note(
                f"note: a prompt of {counted(length, 'token')} leaves no room for another one; "
                "--max-new-tokens writes on, without its beginning"
            )
    note(summary(generator, results, interrupted))
    return interrupted


def titled(prompt: Any, result: "Generation") -> str:
    """Return a prompt and what followed it."""
    body = " ".join(map(str, result.ids.tolist())) if result.text is None else result.text
    return f"== {prompt}\n{body}"


def json_line(prompt: Any, result: "Generation", more: Mapping[str, Any]) -> str:
    """Return everything that is known of a continuation as one line of JSON."""
    values = {
        "prompt": prompt,
        "text": result.text,
        "ids": result.ids.tolist(),
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "prompt_tokens": len(result.prompt_ids),
        "new_tokens": len(result.ids),
        "dropped": result.dropped,
        **more,
    }
    if result.logprobs is not None:
        values["logprobs"] = result.logprobs.tolist()
        values["top_logprobs"] = [[{"id": i, "logprob": value} for i, value in top] for top in result.top_logprobs]
    return json.dumps(values, ensure_ascii=False)


def summary(generator: "Generator", results: "list[Generation]", interrupted: bool) -> str:
    """Return one line about tokens and speed."""
    parts = [f"{counted(sum(len(result.prompt_ids) for result in results), 'token')} of prompt"]
    if generator.prefill_seconds:
        parts[0] += f" at {generator.prefill_tokens / generator.prefill_seconds:,.0f} tokens/s"
    made = sum(len(result.ids) for result in results)
    parts.append(f"{made:,} new")
    if generator.decode_seconds:
        parts[1] += f" at {generator.decode_tokens / generator.decode_seconds:,.0f} tokens/s"
    reasons = {result.finish_reason for result in results}
    if interrupted:
        parts.append("stopped by Ctrl-C")
    elif reasons == {"length"}:
        parts.append("ended by the limit of tokens")
    elif reasons == {"stop"}:
        parts.append("ended by a stop id or text")
    return ", ".join(parts)
