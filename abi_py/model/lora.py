"""LoraModel: a frozen model with low-rank adapters on its linear layers, of which only the adapters are trained.

    y = x Wᵀ + s D(x) Aᵀ Bᵀ        A (R, in)   B (out, R)   s = alpha / R   D: dropout, in training only

`linear.py` has the two passes of such a layer.  A begins as Kaiming-uniform noise, B as zeros, so a fresh LoraModel
computes what its model computes.

    merge, unmerge   W + s B A in the model's own weights and back; unmerge puts back a copy that merge has kept, so
                     every bit is as it was
    merged           a copy of the model with W + s B A
    save, load       a folder of PEFT's kind (`formats/peft.py`)

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the initial A is PEFT's.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..config import Config, LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, listed
from ..formats.peft import read_adapter, write_adapter
from ..formats.zig import save_abic
from ..kernels.matmul import product
from ..parameters import Buffers, Tensor, tensor_table
from ..shape import PROJECTIONS
from .activations import AdapterWidths
from .block import BlockGradients, BlockWeights
from .linear import Adapter, Group, Part
from .transformer import Gradients, TrainableModel, Transformer

__all__ = ["LoraConfig", "LoraModel"]

# The linear layers of a block, and the projections that each of them joins: Hugging Face's names and ours.
LAYERS = {
    "qkv": {"q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v"},
    "o": {"o_proj": "w_o"},
    "gate_up": {"gate_proj": "w_gate", "up_proj": "w_up"},
    "down": {"down_proj": "w_down"},
}


class LoraModel(Transformer):
    """Adapters on a TrainableModel, whose weights stay as they are; trained, evaluated and saved like a model.

    `weights`, `gradients` and `parameters` are the adapters'; the names are those of the model's weights with .a or .b
    after it, as in `layers.0.w_q.a`.
    """

    def __init__(
        self, model: TrainableModel, config: LoraConfig | None = None, base_model: str | Path | None = None
    ) -> None:
        """Put fresh adapters on `model`; TypeError if it is no TrainableModel.

        `base_model` says where its weights are, or their name: what is saved repeats it.
        """
        if not isinstance(model, TrainableModel):
            raise TypeError(f"model is a {type(model).__name__}; adapters are put on a TrainableModel")
        self.model, self.lora = model, config if config is not None else LoraConfig()
        self.parameters = Buffers(_adapter_table(model.config, self.lora))
        _initialize(self.parameters, self.lora)
        self.base_model = str(base_model) if base_model is not None else None
        layers = range(model.config.num_layers)
        adapters = _adapters(self.parameters, model.config, self.lora)
        blocks = [BlockWeights(model.parameters, i, adapters[i]) for i in layers]
        super().__init__(model.config, model.parameters, blocks, _widths(model.config, self.lora))
        self.draws = 0
        self._adapted = blocks
        unread = np.zeros(model.config.hidden_dim, np.float32)
        self._frozen = unread, [BlockGradients.frozen(unread) for _ in layers]
        self._kept: dict[str, np.ndarray] = {}  # the weights before a merge
        self._digest = ""

    def __repr__(self) -> str:
        return f"LoraModel: {self.report()}"

    def report(self) -> str:
        """Return how much is trained, in one line."""
        trained, whole = self.num_params(), self.model.num_params()
        targets = ", ".join(self.lora.target_modules)
        share = f"{100 * trained / whole:.2f} % of {whole:,}"
        return f"{trained:,} trained parameters, {share} (rank {self.lora.rank}: {targets})"

    def sections(self) -> dict[str, Config]:
        """Return the sections of a run's config.yaml that describe this model."""
        return {**super().sections(), "lora": self.lora}

    def base_digest(self) -> str:
        """Return the SHA-256 of the model's weights, worked out once: they are frozen."""
        if not self._digest:
            if self.is_merged:
                raise RuntimeError("the model's weights hold merged adapters; call unmerge() first")
            self._digest = hashlib.sha256(self.base.weights_flat.data).hexdigest()
        return self._digest

    # -- the passes ------------------------------------------------------------------------------

    def _gradients_to_write(self) -> Gradients:
        if self.is_merged:
            raise RuntimeError("the adapters are merged into the weights, which are frozen; call unmerge() to train on")
        _, accumulate = self.parameters.gradients_to_write()
        unread, blocks = self._frozen
        unread.fill(0)
        return Gradients(head=None, token_embedding=None, final_norm=unread, blocks=blocks, accumulate=accumulate)

    def _next_draw(self) -> int | None:
        self.draws += 1
        return self.draws - 1 if self.lora.dropout > 0 else None

    # -- merging ---------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Say whether the adapters are inside the model's weights."""
        return bool(self._kept)

    def merge(self) -> TrainableModel:
        """Add s B A to the model's own weights and return the model; until `unmerge` there is no training."""
        if not self.is_merged:
            kept = {name: self.model.weights[name].copy() for name in self._targets()}
            _add_adapters(self.model, self)
            self._kept, self.blocks = kept, self.model.blocks
        return self.model

    def unmerge(self) -> None:
        """Put the model's weights back as they were before `merge`, to the last bit."""
        for name, weights in self._kept.items():
            self.model.weights[name] = weights
        self._kept, self.blocks = {}, self._adapted

    def merged(self) -> TrainableModel:
        """Return a copy of the model with s B A in its weights; this one stays as it is."""
        copy = TrainableModel(self.config, self.base.weights_flat)
        if not self.is_merged:
            _add_adapters(copy, self)
        return copy

    def _targets(self) -> list[str]:
        return [name.removesuffix(".b") for name in self.weights if name.endswith(".b")]

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the adapters as a PEFT folder; `base_model` beats the constructor's."""
        tensors = {tensor.hf_name: self.weights[tensor.name] for tensor in self.parameters.table}
        write_adapter(Path(folder), tensors, self.lora, base_model or self.base_model)

    @classmethod
    def load(cls, model: TrainableModel, folder: str | Path, *, allow_nonfinite: bool = False) -> "LoraModel":
        """Put the adapters of a PEFT folder on `model`.

        FileNotFoundError if there is none, CheckpointError if it is damaged, of a kind that is not computed here, of
        another model, or holds NaN or infinity and not `allow_nonfinite`.
        """
        config, tensors, base_model = read_adapter(Path(folder), allow_nonfinite=allow_nonfinite)
        table = _adapter_table(model.config, config)
        _check_tensors(tensors, table, config, str(folder))  # before anything of the adapters' size is made
        made = cls(model, config, base_model)
        for entry in table:
            made.weights[entry.name] = tensors[entry.hf_name]
        return made

    def save_checkpoint(self, path: str | Path, step: int = 0) -> None:
        """Write the merged weights as a Zig `ABIC` file, which knows no adapters."""
        save_abic(path, self.merged().parameters.weights_flat, step)

    # -- what it costs ---------------------------------------------------------------------------

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of forward and backward for one token of a row of seq_len; a multiply-add counts two.

        Four for each weight of a frozen matrix (y and dx) with the head among them, six for each weight of an adapter,
        and attention.  Below the adapters of the first block nothing is trained, so q, k and v have no dx there.
        """
        c = self.config
        full = self.model.flops_per_token(seq_len)
        matrices = c.num_layers * c.hidden_dim * (2 * c.q_dim + 2 * c.kv_dim + 3 * c.intermediate_dim)
        joined = c.hidden_dim * (c.q_dim + 2 * c.kv_dim)
        first = sum(tensor.shape[0] for tensor in _first_inputs(self.parameters)) * c.hidden_dim
        frozen = 2.0 * (matrices + c.vocab_size * c.hidden_dim) + 2.0 * joined
        return full - frozen + 6.0 * self.num_params() - 2.0 * first


def _first_inputs(parameters: Buffers) -> list[Tensor]:
    """Return the As of the first block's q, k and v: what their products would add to a dx that nobody wants."""
    names = {f"layers.0.{ours}.a" for ours in LAYERS["qkv"].values()}
    return [tensor for tensor in parameters.table if tensor.name in names]


# -- what the adapters are made of ------------------------------------------------------------------


def _targeted(config: LoraConfig) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each linear layer of a block and its projections with adapters, as (Hugging Face's name, ours)."""
    for layer, projections in LAYERS.items():
        yield layer, [(name, ours) for name, ours in projections.items() if name in config.target_modules]


def _adapter_table(model: TrainableModelConfig, config: LoraConfig) -> tuple[Tensor, ...]:
    """Return the adapters' tensors in flat order: in each linear layer of each block first the As, then the Bs."""
    of_model = {tensor.name: tensor for tensor in tensor_table(model)}
    table: list[Tensor] = []
    offset = 0
    for i in range(model.num_layers):
        for _, projections in _targeted(config):
            for half in "ab":
                for _, ours in projections:
                    base = of_model[f"layers.{i}.{ours}"]
                    outer, inner = base.shape
                    shape = (config.rank, inner) if half == "a" else (outer, config.rank)
                    stem = base.hf_name.removesuffix(".weight")
                    hf_name = f"base_model.model.{stem}.lora_{half.upper()}.weight"
                    gguf_name = f"{base.gguf_name}.lora_{half}"
                    table.append(Tensor(f"{base.name}.{half}", hf_name, gguf_name, shape, offset, decay=True))
                    offset += table[-1].size
    return tuple(table)


def _check_tensors(
    tensors: Mapping[str, np.ndarray], table: tuple[Tensor, ...], config: LoraConfig, place: str
) -> None:
    """Raise CheckpointError if what a folder holds is not what its configuration needs on this model."""
    for entry in table:
        found = tensors.get(entry.hf_name)
        if found is None or found.shape != entry.shape:
            what = "is missing" if found is None else f"has shape {found.shape}"
            rule = f"rank {config.rank} on this model takes {entry.shape}; load it on the model it is of"
            raise CheckpointError(f"{place}: {entry.hf_name} {what}; {rule}")
        if found.dtype.kind != "f":
            raise CheckpointError(f"{place}: {entry.hf_name} is {found.dtype}; adapters are floats")
    unknown = sorted(set(tensors) - {entry.hf_name for entry in table})
    if unknown:
        raise CheckpointError(
            f"{place}: {listed(unknown, 1)} has no place in this model; its adapter_config.json names other "
            "targets, or it was trained on a model with more layers"
        )


def _initialize(parameters: Buffers, config: LoraConfig) -> None:
    """Fill A from U(±1/√in), which is Kaiming's rule with a = √5 as PEFT uses it, and B with zeros."""
    random = np.random.default_rng(config.seed)
    for name, view in parameters.weights.items():
        view.fill(0)
        if name.endswith(".a"):
            random.random(out=view, dtype=np.float32)
            view *= np.float32(2)
            view -= np.float32(1)
            view *= np.float32(view.shape[1] ** -0.5)


def _adapters(parameters: Buffers, model: TrainableModelConfig, config: LoraConfig) -> list[dict[str, Adapter]]:
    """Return the adapters of each block by linear layer."""
    # Streams of masks are told apart by the seed's place in a range of 2^63, drawn from the configuration's seed.
    seed = int(np.random.SeedSequence([config.seed, len(PROJECTIONS)]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    streams = model.num_layers * len(PROJECTIONS)
    found: list[dict[str, Adapter]] = [{} for _ in range(model.num_layers)]
    for i in range(model.num_layers):
        for layer, projections in _targeted(config):
            if projections:
                groups = _groups(parameters, model, config, i, projections, joined=LAYERS[layer])
                found[i][layer] = Adapter(groups, config.scaling, config.dropout, seed, streams)
    return found


def _groups(
    parameters: Buffers,
    model: TrainableModelConfig,
    config: LoraConfig,
    i: int,
    projections: list[tuple[str, str]],
    joined: dict[str, str],
) -> tuple[Group, ...]:
    rank, first_columns, column = config.rank, dict[str, int](), 0
    height = {tensor.name: tensor.shape[0] for tensor in tensor_table(model) if len(tensor.shape) == 2}
    for name, ours in joined.items():
        first_columns[name] = column
        column += height[f"layers.{i}.{ours}"]
    parts = []
    for k, (name, ours) in enumerate(projections):
        b, db = (views[f"layers.{i}.{ours}.b"] for views in (parameters.weights, parameters.gradients))
        columns = slice(first_columns[name], first_columns[name] + len(b))
        parts.append(Part(columns, slice(k * rank, (k + 1) * rank), b, db))
    # With dropout each projection is a group of its own, because its mask is.
    cuts = [[each] for each in range(len(parts))] if config.dropout > 0 else [list(range(len(parts)))]
    groups = []
    for cut in cuts:
        names = [f"layers.{i}.{projections[each][1]}.a" for each in (cut[0], cut[-1])]
        a, da = parameters.joined_weights(*names), parameters.joined_gradients(*names)
        ranks = slice(cut[0] * rank, (cut[-1] + 1) * rank)
        stream = i * len(PROJECTIONS) + PROJECTIONS.index(projections[cut[0]][0])
        groups.append(Group(ranks, a, da, tuple(parts[each] for each in cut), stream))
    return tuple(groups)


def _widths(model: TrainableModelConfig, config: LoraConfig) -> AdapterWidths:
    ranks = {layer: config.rank * len(projections) for layer, projections in _targeted(config)}
    inputs = {"qkv": model.hidden_dim, "o": model.q_dim, "gate_up": model.hidden_dim, "down": model.intermediate_dim}
    widest = max(width for layer, width in inputs.items() if ranks[layer])
    return AdapterWidths(ranks, widest if config.dropout > 0 else 0)


def _add_adapters(model: TrainableModel, lora: LoraModel) -> None:
    """Add s B A to the weights of `model`."""
    for name in lora._targets():
        w, a, b = model.weights[name], lora.weights[f"{name}.a"], lora.weights[f"{name}.b"]
        product(w, b * np.float32(lora.lora.scaling), a, addend=w)
