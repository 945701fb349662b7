"""`abi-train merge`: adapters and the model under them as one model."""

from pathlib import Path
from typing import Any

import click

from ..choices import MergeBase
from ..errors import ConfigError
from .export import DTYPES, FORMATS, QUANTIZE, FormatType, show_export
from .models import ModelPath, which_options
from .options import SHORT, OutputPath, Verb

WHOLE = tuple(form for form in FORMATS if form in ("hf", "gguf"))


@click.command(
    cls=Verb,
    example="abi-train merge my-base runs/20260122-101500/adapter -o my-model --dtype bfloat16",
    short_help="Put adapters into the weights that they are on.",
)
@click.argument("model", type=ModelPath(), metavar="[BASE]")
@click.argument("adapters", type=ModelPath(), required=False, metavar="ADAPTERS")
@click.option(
    *("-o", "--out", "output"), required=True, type=OutputPath(path_type=Path),
    help="where to write; a folder, for gguf a file",
)
@click.option(
    *SHORT["format"], "--format", "form", type=FormatType(WHOLE), help="form of what is written; hf or gguf  [hf]"
)
@click.option("--base", type=ModelPath(), help="start from this model; under the adapters  [the one that they name]")
@click.option("--dtype", type=click.Choice(DTYPES), help="type of the weights  [float32]")
@click.option("--quantize", help=f"{QUANTIZE}  [that of a GGUF base, else F32]")
@click.option("--max-shard-size", help="largest file of weights, as in 500MB; above it several and an index  [5GB]")
@click.option(
    "--merge-base",
    type=click.Choice([each.value for each in MergeBase]),
    help="of adapters trained with --base-storage: what they are merged into; the weights as the files of the base "
    "have them, or dequant, those that they were trained on  [original]",
)
@which_options
@click.option("--force", is_flag=True, help="replace what is there")
def command(
    model: Path,
    adapters: Path | None,
    output: Path,
    form: str | None,
    base: Path | None,
    dtype: str | None,
    quantize: str | None,
    max_shard_size: str | None,
    merge_base: str | None,
    which: str | None,
    force: bool,
) -> None:
    """Write ADAPTERS (a folder or file of PEFT, llama.cpp or mlx-lm, a checkpoint or a run of LoRA) and BASE, the model
    under them, as one folder or GGUF file. Without BASE it is the one that they name.

    W + s B A is the weight of each matrix that has an adapter. Tokenizer, chat template and settings of generation come
    along. What was written is read again, and its logits are compared with those of the adapters beside the model.
    """
    from ..runs.export_source import Source
    from ..runs.exporting import check_request

    if adapters is not None and base is not None:
        raise ConfigError(f"base ({base}) must not be given twice; {model} stands before the adapters already")
    if adapters is None:
        adapters = model
    else:
        base = model
    form = form or ("hf" if quantize is None else "gguf")
    settings: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "force": force}
    check_request(adapters, output, form, base=base, quantize=quantize, **settings)
    source = Source.open(adapters, which, base, adapters=True, merge_base=MergeBase(merge_base or "original"))
    if merge_base is not None and source.adapters.trained_in is None:
        raise ConfigError(
            f"--merge-base ({merge_base}) has no effect: {adapters} was trained on weights as they are; leave it out"
        )
    if merge_base == MergeBase.DEQUANT.value and source.adapters.model.storage is None:
        raise ConfigError(
            f"--merge-base ({merge_base}) has no effect: {source.loaded.base} is the model in another type than "
            f"{adapters} was trained on; give --base the one that it was, or leave --merge-base out"
        )
    if form == "gguf" and quantize is None:
        quantize = source.type_of_base
    show_export(source, output, form, quantize=quantize, **settings)
