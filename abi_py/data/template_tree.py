"""The syntax tree of a template, with steps where Python works without asking: loops, +, ~, comparisons, slices."""

from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.nodes as nodes
import jinja2.visitor

from .template_meter import CHARACTERS, METER, check_number

__all__ = ["HIDDEN_FILTERS", "Steps"]

# Names of filters that no template can write: a filter is the cheapest call that Jinja makes.
WEIGHED, SLICED, STEP, WRITTEN, SUM, WRITTEN_SUM = " weighed", " sliced", " step", " written", " sum", " written sum"


def _weighed(value: Any) -> Any:
    return METER.get().weigh(value)


def _sliced(value: Any) -> Any:
    METER.get().length(value)
    return value


_ONLY_TEXT = {str}


@jinja2.pass_context  # so that it is not computed once, when the template is compiled
def _step(context: Any, steps: int) -> None:
    METER.get().spend(steps)


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    return METER.get().weigh(value)


@jinja2.pass_context
def _sum(context: Any, *terms: Any) -> Any:
    """Return the terms of a chain of + added up: of texts, in one go."""
    meter = METER.get()
    if set(map(type, terms)) == _ONLY_TEXT:
        made = "".join(terms)
        meter.spend(1 + len(made) // CHARACTERS)
        return made
    total = terms[0]
    for term in terms[1:]:
        meter.length(total)
        meter.length(term)
        total = total + term
        if isinstance(total, int):
            check_number(total.bit_length())
    return total


@jinja2.pass_context
def _written_sum(context: Any, *terms: Any) -> Any:
    total = _sum(context, *terms)
    return total if type(total) is str else METER.get().weigh(total)


HIDDEN_FILTERS: dict[str, Callable[..., Any]] = {
    WEIGHED: _weighed,
    SLICED: _sliced,
    STEP: _step,
    WRITTEN: _written,
    SUM: _sum,
    WRITTEN_SUM: _written_sum,
}


class Steps(jinja2.visitor.NodeTransformer):
    """Puts a step into each loop and macro, and a weighing before what Python itself does without asking."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Let each pass, and each element that the loop's condition leaves out, cost what is written in it."""
        self._step_into(node)
        if node.test is not None:
            step = self._filter(nodes.Const(self._cost([node.test])), STEP, node.lineno)
            stepped = nodes.And(nodes.Not(step), node.test).set_lineno(node.lineno)  # a step is None
            node.test = stepped.set_environment(self.environment)  # type: ignore[assignment]
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        """Let each call cost what is written in the body."""
        self._step_into(node)
        return node

    visit_CallBlock = visit_Macro

    def _step_into(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        self.generic_visit(node)
        step = self._filter(nodes.Const(self._cost(node.body)), STEP, node.lineno)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno).set_environment(self.environment))

    @staticmethod
    def _cost(inside: list[nodes.Node]) -> int:
        parts = [part for each in inside for part in (each, *each.find_all(nodes.Node))]
        text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
        text += sum(len(part.value) for part in parts if isinstance(part, nodes.Const) and isinstance(part.value, str))
        return 1 + len(parts) // 4 + text // CHARACTERS

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """Weigh what is written; constant text is paid for by the loop around it."""
        self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            if isinstance(child, nodes.Const) and isinstance(child.value, str):
                data = nodes.TemplateData(child.value).set_lineno(child.lineno)
                node.nodes[i] = data.set_environment(self.environment)  # type: ignore[call-overload]
            elif isinstance(child, nodes.Filter) and child.name == SUM:
                child.name = WRITTEN_SUM
            elif not _constant(child):
                node.nodes[i] = self._filter(child, WRITTEN, child.lineno)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """Take the terms of a chain of + together."""
        terms: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):
            terms.insert(0, first.right)
            first = first.left
        return self._filter(self.visit(first), SUM, node.lineno, [self.visit(term) for term in terms])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Weigh what is compared with something that is not written in the template."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(map(_constant, sides[1:])) or (_constant(node.expr) and not any("in" in each.op for each in node.ops)):
            return node
        node.expr = self._weigh(node.expr)
        for operand in node.ops:
            operand.expr = self._weigh(operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Weigh what `~` makes a text of."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.nodes = list(map(self._weigh, node.nodes))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Pay for the copy that a slice makes."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filter(node.node, SLICED, node.lineno)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Weigh a key, which is hashed."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.key = self._weigh(node.key)
        return node

    def _weigh(self, node: nodes.Expr) -> nodes.Expr:
        return node if _constant(node) else self._filter(node, WEIGHED, node.lineno)

    def _filter(self, node: nodes.Expr, name: str, line: int, args: list[nodes.Expr] | None = None) -> nodes.Filter:
        made = nodes.Filter(node, name, args or [], [], None, None).set_lineno(line)
        return made.set_environment(self.environment)  # type: ignore[return-value]


def _constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_constant, node.items))
    if isinstance(node, nodes.CondExpr):
        return _constant(node.expr1) and (node.expr2 is None or _constant(node.expr2))
    return isinstance(node, nodes.Const | nodes.TemplateData)
