"""A chat template's syntax tree, changed so that what Jinja computes without asking its environment asks it first.

Knows Jinja's nodes, and the names of the methods of template_sandbox.Sandbox that count."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.visitor import NodeTransformer

_FORBIDDEN = (
    nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.FilterBlock,
    nodes.EvalContextModifier,
)  # fmt: skip


class Counted(NodeTransformer):
    """Iterations, slices, `~`, comparisons, and lists as they are written. Files and blocks are refused."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _FORBIDDEN):
            raise TemplateSyntaxError(f"{type(node).__name__.lower()} is not for chat templates", node.lineno)
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.For:
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = nodes.ExprStmt(_asked("spend", [nodes.Const(constant)], node), lineno=node.lineno)
        node.body.insert(0, tick)
        if node.test is not None:
            # Where it fails, the body does not run.
            node.test = nodes.And(_asked("made", [nodes.Const(True)], node), node.test, lineno=node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = [end or nodes.Const(None) for end in (node.arg.start, node.arg.stop, node.arg.step)]
        return _asked("sliced", [node.node, *ends], node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _asked("joined", node.nodes, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        # Otherwise it is what a for or a set assigns to.
        return self._made(node) if node.ctx == "load" else node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _asked("made", [node], node)

    visit_List = visit_Dict = visit_Compare = visit_Test = _made


def _asked(method: str, arguments: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    attribute = nodes.EnvironmentAttribute(method, lineno=at.lineno)
    return nodes.Call(attribute, arguments, [], None, None, lineno=at.lineno)
