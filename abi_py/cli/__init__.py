"""`abi-train`: one verb to a file, and what all of them share: help, suggestions, errors, exit codes.

    0    done
    1    the run failed: bad data, a damaged checkpoint, a full disk, too many non-finite steps
    2    a wrong call: unknown verb or flag, a value out of its range, a file that is not there
    130  stopped by Ctrl-C (143 by SIGTERM, 129 by SIGHUP: the terminal has gone, 141: the reader of a training's output
         has gone; that of another verb may go), everything saved

Errors are one line on stderr; `--debug` adds the traceback.
"""

import difflib
import errno
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import DISK_FULL, AbiError, ConfigError, of_the_system, shown
from .console import silence_stdout
from .options import Verbs

__all__ = ["VERBS", "Group", "cli", "main"]

HEADINGS = {
    "Train": ("run", "resume", "llm", "deepzig", "phases"),
    "Use": ("generate", "chat", "eval", "export", "quantize", "merge"),
    "Prepare": ("preview", "tokenizer", "tokenize"),
    "Look and check": ("runs", "compare", "inspect", "info", "trace", "verify", "warmup"),
}
VERBS = tuple(verb for verbs in HEADINGS.values() for verb in verbs)


class Group(Verbs):
    """The verbs; a verb's file is imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order in which a user meets them."""
        return list(VERBS)

    def headings(self, ctx: click.Context) -> Mapping[str, Collection[str]]:
        """Return the verbs under their headings."""
        return HEADINGS

    def verb_for(self, word: str) -> str:
        """Return what to say where a file or folder comes first: which verb was left out."""
        if not os.path.exists(word):
            return ""
        from ..runs.directory import is_run

        if is_run(Path(word)) or Path(word, "config.json").is_file() or word.endswith(".gguf"):
            return f"{word} is a run or a model: abi-train inspect {shlex.quote(word)} says what can be done with it"
        return f"to train on {word}: abi-train run {shlex.quote(word)}"

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb, or None."""
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f".{cmd_name}", __name__).command

    def make_context(self, *words: Any, **more: Any) -> click.Context:
        """Read the words; what --help and --version cannot write is one line too."""
        try:
            return super().make_context(*words, **more)
        except BrokenPipeError:
            raise
        except OSError as error:
            _complain(error)
            raise click.exceptions.Exit(1) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; turn errors into one line and an exit code."""
        try:
            _check_threads(os.environ.get("NUMBA_NUM_THREADS"))
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # the reader of our output has gone; that is no error of ours
            silence_stdout()
            ctx.exit(0)
        except (click.ClickException, AbiError, OSError, ValueError, MemoryError) as error:
            if ctx.meta.get("debug"):
                raise
            _complain(error)
            # A variable of the environment (ABI_SIMD, ABI_MATMUL) is part of the call too.
            wrong_call = isinstance(error, click.ClickException | ConfigError) or str(error).startswith("ABI_")
            ctx.exit(2 if wrong_call else 1)


def _check_threads(wanted: str | None) -> None:
    """Raise ConfigError for a number of threads that Numba, once loaded, would refuse in words of its own."""
    if wanted and not (wanted.isdecimal() and int(wanted) >= 1):
        raise ConfigError(f"NUMBA_NUM_THREADS ({shown(wanted)}) must be at least 1; unset it to use all cores")


def _complain(error: Exception) -> None:
    if isinstance(error, click.ClickException):
        text = error.format_message().removesuffix(".")
        if isinstance(error, click.NoSuchOption):
            close = difflib.get_close_matches(error.option_name, _flags(error.ctx), n=1, cutoff=0.6)
            text = f"unknown flag {error.option_name}" + (f"; did you mean {close[0]}?" if close else "")
        ctx = getattr(error, "ctx", None)
        if ctx is not None:
            text += f"; see {ctx.command_path} --help"
    elif isinstance(error, MemoryError):
        text = f"not enough memory ({error}); lower batch_size or max_seq_len, or set checkpointing to full"
    elif isinstance(error, OSError) and (error.filename is not None or error.errno in (*DISK_FULL, errno.EROFS)):
        text = of_the_system(error)
    else:
        text = str(error)
    _tell("error:", "red", text)


def _flags(ctx: click.Context | None) -> list[str]:
    """Return the flags that a help shows."""
    params = ctx.command.get_params(ctx) if ctx is not None else []
    shown = [param for param in params if isinstance(param, click.Option) and not param.hidden]
    return [flag for param in shown for flag in (*param.opts, *param.secondary_opts)]


def _tell(label: str, colour: str, text: str) -> None:
    color = False if os.environ.get("NO_COLOR") else None  # None: click looks whether stderr is a terminal
    click.echo(click.style(label, fg=colour, bold=True) + " " + " ".join(text.split()), err=True, color=color)


def _show_warning(message: Warning | str, *place: Any, **line: Any) -> None:
    """Show a warning as one line; where in the program it arose is no matter of the user's."""
    _tell("warning:", "yellow", str(message))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="abi-train", help="show the version")
@click.option("--debug", is_flag=True, help="show the traceback of an error")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train Llama, Mistral, Mixtral, Qwen, Gemma and GPT-2 language models on this machine's CPU.

    abi-train run needs no arguments: it trains a small model on text that every machine has. abi-train VERB --help
    shows what a verb takes.
    """
    ctx.meta["debug"] = debug


def _fill_closed_streams() -> bool:
    """Put the null device where a standard stream is closed; return whether the output was.

    Python sets such a stream to None, and the next file that is opened would get its number.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process lives)
    return closed


def main(
    arguments: Sequence[str] | None = None, defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Entry point of `abi-train` and of `python -m abi_py`, whose words and defaults it takes."""
    # OpenMP's threads wait for work in a busy loop.  Beside one other busy program, their usual long wait makes a step
    # five times slower; a short one costs 2% on an idle machine.  libgomp reads this when the first kernel runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.showwarning = _show_warning
    if _fill_closed_streams():
        _tell("error:", "red", "the standard output is closed; redirect it to a file, or to /dev/null")
        sys.exit(1)
    try:
        code = cli.main(arguments, prog_name="abi-train", standalone_mode=False, default_map=defaults)
    except click.UsageError as error:
        _complain(error)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        code = 130
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        _complain(error)
        silence_stdout()
        code = code or 1
    sys.exit(code if isinstance(code, int) else 0)
