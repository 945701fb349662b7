"""The model card of what a run makes: README.md in its checkpoints and in RUN/model.

It names data and base by the last name of their paths: the folder may be given away, and its way there is nobody's
business.
"""

import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..choices import ExportFormat, LossOn
from ..config import LoraConfig, TrainableModelConfig
from ..data.byte_tokenizer import byte_tokenizer_files
from ..data.holdout import PARTS
from ..data.tokenizer import TOKENIZER_FILE
from ..errors import counted, on_one_line
from ..formats.checkpoint_names import is_checkpoint_name
from ..formats.companions import Companions
from .directory import ADAPTER, CONFIG, MODEL

if TYPE_CHECKING:
    from ..data.chat_dataset import ChatDataset
    from ..training.finding import Origin
    from ..training.report import TrainingReport
    from .findings import Findings
    from .opening import RunData
    from .settings import RunConfig

__all__ = ["Described", "card_of_another_form", "model_card"]


SECTIONS = ("Use", "Training", "Results", "Limits")
_LIBRARY = "library_name: "


class Described(Protocol):
    """What of a run its card tells: `run.Run`, which is a floor above."""

    @property
    def config(self) -> "RunConfig": ...
    @property
    def train(self) -> "RunData": ...
    @property
    def valid(self) -> "RunData | None": ...
    @property
    def directory(self) -> Path: ...
    @property
    def num_kept(self) -> int: ...
    @property
    def parts(self) -> "Mapping[str, ChatDataset]": ...


def model_card(
    run: Described,
    companions: Companions,
    form: ExportFormat,
    report: "TrainingReport | None" = None,
    origin: "Origin | None" = None,
    found: "Findings | None" = None,
) -> str:
    """Return the text of README.md: what the model is, what it was trained on and how well, and how to use it.

    companions  what is in the folder beside the weights
    form        of that folder
    report      of the run; None: it is a checkpoint's, and the run may still go on
    origin      which step of the run it is
    found       what is kept for validation shows at these weights: rows of the table
    """
    name, shape = _quiet(run.directory.resolve().name), run.config.model
    tags = ["abi_py", shape.family.value, *(["conversational"] if run.train.conversations else [])]
    kind = "conversational model" if run.train.conversations else "language model"
    sections = {
        "Use": _use(name, bool(run.train.conversations), companions, form),
        "Training": _wrapped(_training(run)),
        "Results": _results(run, report, origin, found),
        "Limits": _wrapped(_limits(run)),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())
    head = f"A {kind} of {shape.num_params():,} weights, trained on a CPU with abi_py.\n\n{_table(_facts(shape))}"
    return f"""---
{_LIBRARY}{_library(form)}
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---

# {name}

{head}

{body}"""


def card_of_another_form(card: str, companions: Companions, form: ExportFormat, origin: "Origin | None") -> str:
    """Return the card of a model that is written into another folder: how it is used there, and which step it is.

    A card that `model_card` did not make is returned as it is.
    """
    head, *sections = re.split(r"(?m)^## ", card)
    name = re.search(r"(?m)^# (.+)$", head)
    by_title = dict(section.split("\n\n", 1) for section in sections if "\n\n" in section)
    if name is None or list(by_title) != list(SECTIONS):
        return card
    head = re.sub(rf"(?m)^{_LIBRARY}.*$", _LIBRARY + _library(form), head)
    talks = re.search(r"(?m)^tags: .*\bconversational\b", head) is not None
    by_title["Use"] = _use(name[1], talks, companions, form) + "\n\n"
    if origin is not None and by_title["Results"].strip() == _wrapped(_MAY_GO_ON):
        by_title["Results"] = f"{_taken(origin)}\n\n"
    return head + "".join(f"## {title}\n\n{text}" for title, text in by_title.items())


def _library(form: ExportFormat) -> str:
    return "abi_py" if form is ExportFormat.ZIG else "transformers"


def _name_of(place: Path) -> str:
    """Return what a model is called: as its run, if it is in the directory of one."""
    place = place.absolute()
    while is_checkpoint_name(place) or place.name == "checkpoints" or (
        place.name in (MODEL, ADAPTER) and (place.parent / CONFIG).is_file()
    ):
        place = place.parent
    return _quiet(place.name)


def _facts(shape: TrainableModelConfig) -> dict[str, str]:
    facts = {
        "family": shape.family.value,
        "layers": str(shape.num_layers),
        "width": f"{shape.hidden_dim:,}",
        "heads": f"{shape.num_heads} ({shape.num_kv_heads} for keys)",
        "feed-forward width": f"{shape.intermediate_dim:,}",
        "embedding and head": "one matrix" if shape.tie_embeddings else "two matrices",
        "vocabulary": f"{shape.vocab_size:,}",
        "context": counted(shape.max_seq_len, "token"),
    }
    if shape.num_experts:
        facts["experts"] = f"{shape.num_experts}, of which a token takes {shape.experts_per_token}"
    return facts


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


# -- use ---------------------------------------------------------------------------------------------


def _use(name: str, talks: bool, companions: Companions, form: ExportFormat) -> str:
    tokenizer = companions.files.get(TOKENIZER_FILE)
    if tokenizer is None:
        return _wrapped(
            "The folder has no tokenizer: the model was trained on token ids whose text is not known. It reads and "
            "writes ids: `abi-train generate FOLDER --ids '1 2 3'`."
        )
    if form is ExportFormat.ZIG:
        return f"{_ours(name, talks)}\n\n{_wrapped(_ZIG)}"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")  # the path of this folder',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        *(_ASK if talks else _CONTINUE),
        "print(tokenizer.decode(out[0], skip_special_tokens=True))",
    ]
    code = "\n".join(lines)
    ends = "An answer" if talks else "A text"
    note = f"{ends} ends with one of the `eos_token_id` in `generation_config.json`."
    if tokenizer == byte_tokenizer_files()[TOKENIZER_FILE]:
        note += " Each byte of a text is a token; 256 ends a text."
    return f"```python\n{code}\n```\n\n{_ours(name, talks)}\n\n{_wrapped(note)}"


def _ours(name: str, talks: bool) -> str:
    verb = f'chat {name} --once "Hello"' if talks else f'generate {name} --prompt "Hello"'
    return f"```bash\nabi-train {verb}\n```"


_ASK = (
    'messages = [{"role": "user", "content": "Hello"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ")",
    "out = model.generate(**inputs)",
)
_CONTINUE = ('inputs = tokenizer("Hello", return_tensors="pt")', "out = model.generate(**inputs)")
_ZIG = (
    "`config.json` and the tensor names are those of a Llama model, with `lm_head.weight` written out, so Hugging "
    "Face's `LlamaForCausalLM` reads the folder when `model_type` in `config.json` is changed to `llama`."
)


# -- training and results ----------------------------------------------------------------------------


def _training(run: Described) -> str:
    config = run.config
    training, data, train = config.training, config.data, run.train
    paths = (*data.path, *(config.chat.mix if config.chat else ()))
    names = ", ".join(f"`{_quiet(Path(path).name)}`" for path in paths)
    amount = counted(len(train), "conversation" if train.conversations else "token")
    kept = f"; {run.num_kept:,} more were kept for validation" if run.num_kept else ""
    text = f"{amount} of {names or 'the help pages of Python'}{kept}. "
    if config.base is not None and config.base.path is not None:
        text += f"Training went on from `{_name_of(Path(config.base.path))}`. "
    else:
        text += "Training began with random weights. "
    if config.lora is not None:
        text += (
            f"Only {_adapters(config.lora)} were trained (LoRA); in a folder with `model.safetensors` they are merged "
            "into the weights. "
        )
    rows = training.batch_size * training.grad_accum_steps
    size = counted(rows, "conversation") if train.conversations else counted(rows * training.max_seq_len, "token")
    parts = [
        f"At most {counted(training.epochs, 'epoch')}",
        f"steps of {size}",
        f"optimizer {training.optimizer.value}",
        f"learning rate {training.learning_rate:g} ({training.lr_schedule.value})",
        f"{training.mixed_precision.value} arithmetic",
        f"seed {training.seed}",
    ]
    if config.chat is not None and train.conversations:
        parts.append("loss on the answers" if config.chat.loss_on is LossOn.ASSISTANT else "loss on all tokens")
    return text + ", ".join(parts) + "."


_MAY_GO_ON = (
    "This is a checkpoint of a run that may still go on: `state.json` says of which step, and what was measured by "
    "then."
)


def _taken(origin: "Origin") -> str:
    return f"These weights are those of {origin.said}."


def _untrained(report: "TrainingReport", origin: "Origin | None") -> str:
    """Return that training has made nothing better, where that is so, and "" where it is not or nobody has looked."""
    before = report.initial_val_loss
    if not report.total_steps or before is None or report.best_val_loss < before:
        return ""
    as_it_began = origin is not None and origin.step == 0
    left = ": these weights are as the run began" if as_it_began else ", by the loss on what was kept for validation"
    return f"No evaluation was better than before training{left}."


def _results(
    run: Described, report: "TrainingReport | None", origin: "Origin | None", found: "Findings | None"
) -> str:
    if report is None:
        return _wrapped(_MAY_GO_ON)
    rows = {"steps, tokens of training": f"{report.total_steps:,}, {report.total_tokens:,}"}
    if math.isfinite(report.final_loss):
        rows["training loss at the last step"] = f"{report.final_loss:.4f}"
    if math.isfinite(report.best_val_loss):
        parts_of = (f" ({PARTS[name]})" for name, part in run.parts.items() if part is run.valid)
        label = f"best validation loss, perplexity{next(parts_of, '')}"
        rows[label] = f"{report.best_val_loss:.4f}, {_perplexity(report.best_val_loss)}"
        if report.best_val_bits_per_byte is not None:
            rows["its bits per byte"] = f"{report.best_val_bits_per_byte:.4f}"
        rows["its accuracy"] = f"{100 * report.best_val_accuracy:.1f}% of the tokens"
    for name, result in (found.parts if found is not None else {}).items():
        rows[f"{PARTS[name]}: conversations"] = f"{len(run.parts[name]):,}"
        rows[f"{PARTS[name]}: loss, perplexity"] = f"{result.loss:.4f}, {_perplexity(result.loss)}"
        rows[f"{PARTS[name]}: accuracy"] = f"{100 * result.accuracy:.1f}% of the tokens"
    if found is not None and found.answers is not None:
        rows |= {name.strip(): value for name, value in found.answers.rows()}
    said = [_taken(origin)] if origin is not None else []
    said += [_wrapped(text)] if (text := _untrained(report, origin)) else []
    return "\n\n".join([*said, _table(rows)])


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 50 else "beyond 1e21"


def _limits(run: Described) -> str:
    if run.train.conversations:
        return (
            "The model knows what its conversations say, what its base knew, and little else. Of few conversations it "
            "learns the answers by heart; to a question that is far from all of them it writes something that only "
            "looks like an answer. It can be wrong about anything: check what it says. A tool that it calls is run by "
            "nobody unless your program does."
        )
    return (
        "The model goes on with a text in the manner of those it was trained on; it answers no questions, and what it "
        "writes may be false, or a passage of its training text. Beyond its context it was never trained."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _quiet(name: str) -> str:
    """Return a name that says nothing in Markdown or in Python's quotes."""
    return on_one_line("".join("_" if letter in '`|"\\<>' else letter for letter in name), 100)


def _adapters(lora: LoraConfig) -> str:
    """Return what is trained beside frozen weights."""
    ranks = f" ({', '.join(lora.rank_pattern)})" if lora.rank_pattern else ""
    whole = f" and all of {', '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    biases = {"none": "", "all": " and all biases", "lora_only": " and their biases"}[lora.bias]
    return f"adapters of rank {lora.rank}{ranks}{whole}{biases}"
