"""Computes the few expressions that published configs contain, such as ``[int(x * 0.1 * 640) for x in range(5, 21)]``.

Only what is listed here exists: numbers, strings, lists, tuples, ``range``, ``int``, comprehensions over names of
their own, and + - * / // %. Nothing is ever passed to Python's own ``eval``.
"""

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

_MAX_LENGTH = 1000  # of the text
_MAX_STEPS = 100_000  # of all loops together
_NUMBERS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"range": range, "int": int}


class ExpressionError(ValueError):
    """An expression that is not computed."""


def evaluate(text: str) -> Any:
    """The value of an expression.

    Raises:
        ExpressionError: if it is too long, is no expression, or asks for anything that is not listed above.
    """
    if len(text) > _MAX_LENGTH:
        raise ExpressionError(f"expressions may have {_MAX_LENGTH} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        value = _Evaluation().value(tree.body, {})
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{text!r} cannot be computed: {error}") from error
    return _listed(value) if isinstance(value, range) else value


class _Evaluation:
    def __init__(self) -> None:
        self.steps = 0

    def value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
            return node.value
        if isinstance(node, ast.List):
            return [self.value(item, names) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item, names) for item in node.elts)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            operand = _number(self.value(node.operand, names))
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _NUMBERS:
            return self._binary(node, names)
        if isinstance(node, ast.Call):
            return self._call(node, names)
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return [self.value(node.elt, inner) for inner in self._loops(node.generators, names)]
        raise ExpressionError(f"{ast.unparse(node)!r} is not allowed in the expressions of a config")

    def _binary(self, node: ast.BinOp, names: dict[str, Any]) -> Any:
        left, right = self.value(node.left, names), self.value(node.right, names)
        if isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, list | tuple | str):
            return left + right
        return _NUMBERS[type(node.op)](_number(left), _number(right))

    def _call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in _FUNCTIONS or node.keywords:
            raise ExpressionError(f"only int(...) and range(...) may be called in a config, got {ast.unparse(node)!r}")
        return _FUNCTIONS[name](*(_number(self.value(argument, names)) for argument in node.args))

    def _loops(self, loops: list[ast.comprehension], names: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not loops:
            yield names
            return
        first, *others = loops
        if not isinstance(first.target, ast.Name) or first.ifs or first.is_async:
            raise ExpressionError("comprehensions in a config must have the form 'for name in values'")
        values = self.value(first.iter, names)
        if not isinstance(values, list | tuple | range):
            raise ExpressionError(f"comprehensions must go over a list, a tuple or a range, got {values!r}")
        for item in values:
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise ExpressionError(f"the loops of an expression may take {_MAX_STEPS} steps, not more")
            yield from self._loops(others, {**names, first.target.id: item})


def _listed(values: range) -> list[int]:
    if len(values) > _MAX_STEPS:
        raise ExpressionError(f"a range may have {_MAX_STEPS} numbers, got {values!r}")
    return list(values)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ExpressionError(f"a number must stand here, got {value!r}")
    return value
