"""The feed-forward branch of a mixture of experts: out = x + Σ_j g_j expert_j(n), n = norm(x), over the chosen experts.

    router      logits = n w_routerᵀ, the K largest of E chosen, gates g (`kernels/router.py`)
    expert e    (silu(n experts_gate[e]ᵀ) * (n experts_up[e]ᵀ)) experts_down[e]ᵀ (`expert_products.py`)
    adapters    of each expert, on gate and up together and on down (`expert_adapter.py`); of the router (`adapter.py`)

Every token is computed by its K experts, however many choose one of them.  Inside, arrays have S = N K rows, those of
an expert one after the other.  The router's products are in float32 in any number format: what they round would be a
choice.

What the router of each layer did is `Routed`, and `Routing` has those of all layers: the penalties are means over them
together.  Forward overwrites it, so a block that is computed again does not count twice.  Tokens whose attention mask
is 0 are computed like any, and do not count, as in transformers; labels play no part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...kernels.engine.number_formats import FLOAT32
from ...kernels.engine.scratch import aligned_empty
from ...kernels.router import load_balancing, z_loss
from ...kernels.unchecked import (
    expert_gradients,
    route_backward,
    route_forward,
    weighted_swiglu_backward,
    weighted_swiglu_forward,
    weighted_swiglu_forward_rounded,
)
from ...parameters import TensorSpec, Weight
from .. import reference_experts
from .expert_adapter import ExpertAdapter
from .expert_products import ExpertProducts, Rows, products_of
from .layer import Branch
from .linear import Linear, Projection
from .norm import Norm
from .run import Chunk, Entry, Form, KeysAndValues, Penalties, Run

__all__ = ["DOWN", "GATE_UP", "Experts", "Routed", "Routing"]

MATRICES = "experts_gate", "experts_up", "experts_down"
GATE_UP, DOWN = ("experts_gate", "experts_up"), ("experts_down",)  # what has one adapter


def _nothing() -> np.ndarray:
    return np.empty(0, np.float32)


class Routed:
    """What one router did with the tokens of a pass."""

    def __init__(self, experts: int) -> None:
        """Make room for it."""
        self.offsets = np.zeros(experts + 1, np.int32)  # where the rows of each expert begin
        self.load = np.zeros(experts)  # tokens that count and have chosen it
        self.share = np.zeros(experts)  # sum of their probabilities
        self.squares = np.zeros(1)  # sum of their squared log-sum-exp


class Routing:
    """The routers of all layers of a model, and their penalties; `balance` and `z` are the coefficients."""

    def __init__(self, experts: int, balance: float, z: float) -> None:
        """Begin without a layer."""
        self.experts, self.balance, self.z = experts, balance, z
        self.layers: dict[int, Routed] = {}  # by number of the block

    def join(self, block: int) -> Routed:
        """Return what the router of a block is to write to."""
        self.layers[block] = Routed(self.experts)
        return self.layers[block]

    def loads(self) -> np.ndarray:
        """Return how many tokens that are not masked chose each expert in the last forward, int64 (layers, E)."""
        return np.array([self.layers[block].load for block in sorted(self.layers)], np.int64)

    def add_penalties(self, routed: Routed, tokens: int, penalties: Penalties | None) -> tuple[np.ndarray, float]:
        """Count a layer's share of the penalties; return b (E,) float32 and z of their gradient."""
        if penalties is None or tokens == 0:
            return np.zeros(self.experts, np.float32), 0.0
        pairs, load = tokens * len(self.layers), np.sum([each.load for each in self.layers.values()], axis=0)
        value, b = load_balancing(load, routed.share, pairs)
        penalties.add("load_balancing", self.balance * value)
        squared, z = z_loss(float(routed.squares[0]), pairs)
        if self.z:
            penalties.add("router_z", self.z * squared)
        return (penalties.weight * self.balance * b).astype(np.float32), penalties.weight * self.z * z


class Experts(Branch):
    """`experts` SwiGLU experts of the inner width F, of which each token is computed by `chosen`."""

    @dataclass
    class Saved:
        """What forward keeps, for N rows; those after lse hold K of each row, the integers as int32."""

        x: np.ndarray  # (N, C): input of the branch
        r: np.ndarray  # (N,): of the norm
        logits: np.ndarray  # (N, E): of the router
        lse: np.ndarray  # (N,): their log-sum-exp
        gate_up: np.ndarray  # (N, K 2F): (S, 2F)
        weights: np.ndarray  # (N, K): (S,), the gates in the order of the rows
        chosen: np.ndarray  # (N, K) int32: the experts
        slot: np.ndarray  # (N, K) int32: the rows
        token: np.ndarray  # (N, K): (S,) int32, of each row
        u_gate_up: np.ndarray = field(default_factory=_nothing)  # (N, K R): (S, R), of adapters
        u_down: np.ndarray = field(default_factory=_nothing)
        u_router: np.ndarray = field(default_factory=_nothing)  # (R, N)

    @dataclass
    class Scratch:
        """Arrays between two operations, for N rows."""

        n: np.ndarray  # (N, C): normed rows
        dn: np.ndarray  # (N, C)
        h: np.ndarray  # (N, K F): (S, F), gate times silu(gate) * up
        dh: np.ndarray  # in the memory of h
        gate_up: np.ndarray  # (N, K 2F): before it is rounded, in bfloat16
        dgate_up: np.ndarray
        dlogits: np.ndarray  # (N, E)
        dweights: np.ndarray  # (N, K)
        du: np.ndarray = field(default_factory=_nothing)  # flat, (S, R) of the wider adapter
        du_router: np.ndarray = field(default_factory=_nothing)  # flat, (R, N)

    @dataclass
    class Decoding:
        """Arrays of generation, for the rows of a chunk."""

        n: np.ndarray
        r: np.ndarray
        logits: np.ndarray
        lse: np.ndarray
        gate_up: np.ndarray
        h: np.ndarray
        weights: np.ndarray
        chosen: np.ndarray
        slot: np.ndarray
        token: np.ndarray

    reference = reference_experts.experts_forward, reference_experts.experts_backward

    def __init__(
        self,
        at: str,
        block: int,
        width: int,
        inner: int,
        norm: Norm,
        routing: Routing,
        chosen: int,
        *,
        renormalised: bool = True,
    ) -> None:
        """Describe it; `routing` is shared by the layers of a model; renormalised: the gates of a token add up to 1."""
        super().__init__(at, block)
        self.width, self.inner, self.norm, self.routing = width, inner, norm, routing
        self.experts, self.chosen, self.renormalised = routing.experts, chosen, renormalised
        self.router = Linear(width, Projection("w_router", self.experts))  # none of `linears`: always in float32
        self.matrices: tuple[Weight, ...] = ()  # bound: the experts' gate, up and down
        self.ranks = {GATE_UP: 0, DOWN: 0}  # of their adapters
        self.adapters: dict[tuple[str, ...], ExpertAdapter] = {}

    # -- description -----------------------------------------------------------------------------

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        E, F, C = self.experts, self.inner, self.width
        shapes = (E, F, C), (E, F, C), (E, C, F)
        matrices = (TensorSpec(name, shape, hidden=True) for name, shape in zip(MATRICES, shapes, strict=True))
        router = (replace(each, hidden=False) for each in self.router.tensors())  # a choice
        return (*router, *matrices, *self.norm.tensors())

    def kernels(self) -> set[str]:
        """Return those of its norm, router and experts."""
        swiglu = {f"weighted_swiglu_{each}" for each in ("forward", "forward_rounded", "backward")}
        routed = {"_route", "_route_backward", "_to_experts", "_from_experts", "_expert_gradients"}
        return super().kernels() | swiglu | routed

    def saved(self) -> dict[str, Entry]:
        """Return what forward keeps."""
        K = self.chosen
        return {
            "x": Entry(self.width),
            "r": Entry(1, Form.NUMBERS),
            "logits": Entry(self.experts),
            "lse": Entry(1, Form.NUMBERS),
            "gate_up": Entry(2 * K * self.inner, narrow=True),
            **{name: Entry(K) for name in ("weights", "chosen", "slot", "token")},
            **{name: Entry(K * rank) for name, rank in self._inner_widths().items()},
            **({"u_router": self.router.saved()} if self.router.rank else {}),
        }

    def _inner_widths(self) -> dict[str, int]:
        """Return the arrays that adapters save, and their ranks."""
        widths = {"u_gate_up": self.ranks[GATE_UP], "u_down": self.ranks[DOWN]}
        return {name: rank for name, rank in widths.items() if rank}

    def scratch(self) -> dict[str, Entry]:
        """Return the arrays between operations."""
        K = self.chosen
        return {
            "n": Entry(self.width),
            "dn": Entry(self.width, place="n"),
            "h": Entry(K * self.inner),
            "dh": Entry(K * self.inner, place="h"),
            "gate_up": Entry(2 * K * self.inner, place="dgate_up"),
            "dgate_up": Entry(2 * K * self.inner),
            "dlogits": Entry(self.experts),
            "dweights": Entry(K),
            **({"du": Entry(K * max(self.ranks.values()), place="du_experts")} if any(self.ranks.values()) else {}),
            **({"du_router": Entry(self.router.rank, Form.FLAT)} if self.router.rank else {}),
        }

    def decoding(self) -> dict[str, Entry]:
        """Return the arrays of generation."""
        K = self.chosen
        widths = {"n": self.width, "logits": self.experts, "gate_up": 2 * K * self.inner, "h": K * self.inner}
        widths |= dict.fromkeys(("weights", "chosen", "slot", "token"), K)
        numbers = {name: Entry(1, Form.NUMBERS, chunked=True) for name in ("r", "lse")}
        return {**{name: Entry(width, chunked=True) for name, width in widths.items()}, **numbers}

    def idle(self) -> int:
        """Return how many weights the experts have that are not chosen for a token."""
        return 3 * self.width * self.inner * (self.experts - self.chosen)

    def flops(self, seq_len: int, below: bool) -> float:
        """Return those of the products: of the router and of a token's experts."""
        experts = 3 * self.width * self.inner * self.chosen
        dw = any(weight.dw is not None for weight in self.matrices) or not self.matrices
        inner = {GATE_UP: self.width + 2 * self.inner, DOWN: self.inner + self.width}
        adapters = sum(rank * inner[matrices] for matrices, rank in self.ranks.items()) * self.chosen
        return self.router.flops(below) + 2.0 * (1 + below + dw) * experts + 6.0 * adapters

    def is_trained(self) -> bool:
        """Say whether it has adapters, or weights of its own are trained."""
        return bool(self.adapters) or self.router.adapter is not None or super().is_trained()

    # -- weights ---------------------------------------------------------------------------------

    def bind(self, weights: Callable[[str], Weight]) -> None:
        """Take its weights by their full names."""
        super().bind(weights)
        self.router.bind(self.at, weights)
        self.matrices = tuple(weights(self.at + name) for name in MATRICES)
        self.products: ExpertProducts = products_of(*self.matrices)
        self.weights = [*self.weights, *self.router.weights, *self.matrices]
        self.routed = self.routing.join(self.block)

    def overwritten(self) -> set[str]:
        """Return the tensors whose gradients backward overwrites."""
        return {self.at + name for name in (self.router.projections[0].name, *MATRICES)}

    # -- passes ----------------------------------------------------------------------------------

    def fill(self, a: Saved, s: Scratch, run: Run) -> None:
        """Do nothing: everything is kept."""

    def _route(self, a: "Experts.Saved | Experts.Decoding", routed: Routed, counted: np.ndarray | None) -> np.ndarray:
        """Choose experts by a.logits; return the number of each row's token, int32 (S,)."""
        token = _numbers(a.token).reshape(-1)
        outputs = _numbers(a.chosen), a.weights.reshape(-1), a.lse, token, _numbers(a.slot)
        found = routed.offsets, routed.load, routed.share, routed.squares
        route_forward(*outputs, *found, a.logits, counted, self.renormalised)
        return token

    def forward(self, out: np.ndarray, a: Saved, s: Scratch, run: Run) -> None:
        """Write out (N, C) from a.x (N, C), and fill the other arrays of a."""
        self.norm.forward(s.n, a.r, a.x)
        self.router.forward(a.logits, s.n, a.u_router, _RouterScratch(s.du_router), _exact(run))
        rows = Rows(self._route(a, self.routed, run.counted), self.routed.offsets)
        h, weights = _rows(s.h, self.inner), a.weights.reshape(-1)
        gate_up, saved = _rows(s.gate_up if run.narrow else a.gate_up, 2 * self.inner), _rows(a.gate_up, 2 * self.inner)
        self.products.gate_up(gate_up, s.n, rows, run)
        if adapter := self.adapters.get(GATE_UP):
            adapter.forward(gate_up, s.n, _rows(a.u_gate_up, adapter.rank), rows, run)
        if run.narrow:
            weighted_swiglu_forward_rounded(h, saved, gate_up, weights)
        else:
            weighted_swiglu_forward(h, gate_up, weights)
        self.products.down(out, h, rows, a.x, run)
        if adapter := self.adapters.get(DOWN):
            adapter.forward(out, h, _rows(a.u_down, adapter.rank), rows, run)

    def backward(self, dx: np.ndarray, a: Saved, s: Scratch, run: Run, below: bool) -> None:
        """Turn dx (N, C) from the gradient of out into that of a.x, in place; add to the penalties of the run."""
        gate, up, down = self.matrices
        rows = Rows(_numbers(a.token).reshape(-1), self.routed.offsets)
        options = {"accumulate": run.accumulate, "number_format": run.number_format}
        F, weights, dweights = self.inner, a.weights.reshape(-1), s.dweights.reshape(-1)
        dh, gate_up, dgate_up = _rows(s.dh, F), _rows(a.gate_up, 2 * F), _rows(s.dgate_up, 2 * F)
        # forward: out = x + Σ h experts_downᵀ, h = g swiglu(gate_up); weighted_swiglu_backward leaves h in dh
        self.products.down_backward(dh, dx, rows, run)
        if adapter := self.adapters.get(DOWN):
            du = _beginning(s.du, len(rows.token), adapter.rank)
            adapter.inner_gradient(du, dx, rows, run)
            adapter.input_gradient(dh, du, rows, run)
        weighted_swiglu_backward(dgate_up, dweights, dh, gate_up, weights)
        if down.dw is not None:
            expert_gradients(down.dw, dx, dh, *rows, gather_left=True, **options)
        if adapter:
            adapter.weight_gradients(dx, dh, _rows(a.u_down, adapter.rank), du, rows, run)
        # forward: g = gates(logits)
        counted = int(np.count_nonzero(run.counted)) if run.counted is not None else len(dx)
        balance, z = self.routing.add_penalties(self.routed, counted, run.penalties)
        saved = a.logits, a.lse, _numbers(a.chosen), _numbers(a.slot), weights
        route_backward(s.dlogits, dweights, *saved, balance, z, run.counted, self.renormalised)
        # forward: gate_up = n [experts_gate experts_up]ᵀ, logits = router(n), n = norm(x)
        self.norm.forward(s.n, a.r, a.x)
        if gate.dw is not None:
            expert_gradients(gate.dw, dgate_up, s.n, *rows, up.dw, **options)
        if adapter := self.adapters.get(GATE_UP):
            du = _beginning(s.du, len(rows.token), adapter.rank)
            adapter.inner_gradient(du, dgate_up, rows, run)
            adapter.weight_gradients(dgate_up, s.n, _rows(a.u_gate_up, adapter.rank), du, rows, run)
        router = a.u_router, _RouterScratch(s.du_router), _exact(run)
        self.router.inner_gradient(s.dlogits, *router)
        self.router.weight_gradients(s.dlogits, s.n, *router)
        if below:
            self.router.input_gradient(s.dn, s.dlogits, *router)
            self.products.gate_up_backward(s.dn, dgate_up, rows, run)
            if adapter:
                adapter.input_gradient(s.dn, du, rows, run)
            self.norm.backward(dx, s.dn, a.x, a.r, True)

    def decode(self, x: np.ndarray, s: Decoding, kept: KeysAndValues | None, run: Run, chunks: Sequence[Chunk]) -> None:
        """Turn x (rows, C) into out in place; of few rows, only the chosen experts' weights are read."""
        for span, few in chunks:
            a = Experts.Decoding(**{name: array[few] for name, array in vars(s).items()})
            out = x[span]
            self.norm.forward(a.n, a.r, out)
            self.router.decode(a.logits, a.n, run)
            routed = Routed(self.experts)  # others may decode at the same time
            rows = Rows(self._route(a, routed, None), routed.offsets)
            h, gate_up = _rows(a.h, self.inner), _rows(a.gate_up, 2 * self.inner)
            self.products.gate_up(gate_up, a.n, rows, run)
            if adapter := self.adapters.get(GATE_UP):
                adapter.forward(gate_up, a.n, aligned_empty((len(h), adapter.rank)), rows, run)
            weighted_swiglu_forward(h, gate_up, a.weights.reshape(-1))
            self.products.down(out, h, rows, out, run)
            if adapter := self.adapters.get(DOWN):
                adapter.forward(out, h, aligned_empty((len(h), adapter.rank)), rows, run)


@dataclass
class _RouterScratch:
    """That of the router's adapter."""

    du: np.ndarray
    dropped: np.ndarray = field(default_factory=_nothing)  # nothing is


def _rows(x: np.ndarray, width: int) -> np.ndarray:
    """Return an array of tokens' rows side by side (N, K width) as rows (S, width)."""
    return x.reshape(-1, width)


def _beginning(memory: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Return the beginning of memory as a matrix."""
    return memory.reshape(-1)[: rows * width].reshape(rows, width)


def _exact(run: Run) -> Run:
    """Return the same run with products of float32."""
    return run if run.number_format is FLOAT32 else replace(run, number_format=FLOAT32)


def _numbers(x: np.ndarray) -> np.ndarray:
    """Return memory of the arena as what is kept there: int32."""
    return x.view(np.int32)
