"""`abi-train merge`: adapters and the model under them as one model."""

from pathlib import Path

import click

from ..choices import MergeBase
from ..errors import ConfigError
from .export import DTYPES, show_export
from .models import ModelPath, which_options
from .options import PathType, Verb


@click.command(
    cls=Verb,
    example="abi-train merge runs/20260122-101500/adapter -o my-model --dtype bfloat16",
    short_help="Put adapters into the weights that they are on.",
)
@click.argument("adapters", type=ModelPath())
@click.option("-o", "--out", "output", required=True, type=PathType(path_type=Path), help="where to write; a folder")
@click.option("--base", type=ModelPath(), help="start from this model; under the adapters  [the one that they name]")
@click.option("--dtype", type=click.Choice(DTYPES), help="type of the weights  [float32]")
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
    adapters: Path,
    output: Path,
    base: Path | None,
    dtype: str | None,
    max_shard_size: str | None,
    merge_base: str | None,
    which: str | None,
    force: bool,
) -> None:
    """Write ADAPTERS (a folder of PEFT's kind, a checkpoint or a run of LoRA) and the model under them as one folder.

    W + s B A is the weight of each matrix that has an adapter. Tokenizer, chat template and settings of generation come
    along. What was written is read again and compared before this verb says that it is done.
    """
    from ..runs.export_source import Source

    source = Source.open(adapters, which, base, adapters=True, merge_base=MergeBase(merge_base or "original"))
    if merge_base is not None and source.adapters.trained_in is None:
        raise ConfigError(
            f"--merge-base ({merge_base}) has no effect: {adapters} was trained on weights as they are; leave it out"
        )
    show_export(source, output, dtype=dtype, max_shard_size=max_shard_size, force=force)
