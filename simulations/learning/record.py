"""The batched step as a plain list of operations, recorded once for given shapes and made cheap to run.

Many operations of a small model cost less than the call of them. So operations that repeat what is there already are
taken out, results that follow from the shapes alone are kept, and the others are called by torch's own functions and
methods: a recorded operator goes through Python before it comes to the same code.

Invariants: a record gives the numbers that the step gives; operations that draw random numbers stay as they were
recorded; so does all of a step that changes a tensor in place.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node

# parameters (P, D), rows (P, B, C) -> gradients (P, D) or columns of them, losses (P,)
Step = Callable[[Tensor, Tensor], tuple[Tensor | Sequence[Tensor], Tensor]]

_aten = torch.ops.aten
_RESHAPING = (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default)
_OF_SHAPES = (  # results that do not depend on the tensor that they are given
    _aten.ones_like.default,
    _aten.zeros_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
)
_SMALL_BYTES = 1 << 20  # a larger result is not kept, nor does the call of its operation matter beside the operation
_OTHER_NAMES = {"_to_copy": "to"}  # of operations that Python's functions and methods call otherwise


def record_step(step: Step, parameters: Tensor, rows: Tensor) -> GraphModule | None:
    """The step for tensors of these shapes; None where it cannot be recorded. Draws random numbers.

    Its gradients are columns that are to be put together, and not to be written to.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    logger = logging.getLogger("torch.fx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what cannot be recorded is no error here
    try:
        record = make_fx(step)(parameters, rows)
    except Exception:  # torch raises whatever the model's operations do
        return None
    finally:
        logger.setLevel(level)
    output = next(node for node in record.graph.nodes if node.op == "output")
    gradients, losses = output.args[0]
    parts = gradients.args[0] if gradients.target is _aten.cat.default else [gradients]
    output.args = ((parts, losses),)
    if not any(node.target._schema.is_mutable for node in _operations(record)):  # type: ignore[union-attr]
        _take_out_repeats(record)
        _speed_up(record, parameters, rows)
    record.graph.eliminate_dead_code()
    record.recompile()
    return record


def draws_numbers(record: GraphModule) -> bool:
    """Whether the recorded step draws random numbers."""
    return any(_is_random(node) for node in _operations(record))


def _operations(record: GraphModule) -> list[Node]:
    """Those whose target is an OpOverload."""
    return [node for node in record.graph.nodes if isinstance(node.target, OpOverload)]


def _take_out_repeats(record: GraphModule) -> None:
    """Take out the operations that give what is there already; vmap leaves many."""
    known: dict[tuple[object, str], Node] = {}
    for node in _operations(record):
        same = _known_already(node)
        if same is None and not _is_random(node):
            same = known.setdefault((node.target, f"{node.args} {node.kwargs}"), node)
        if same not in (None, node):
            node.replace_all_uses_with(same)
    record.graph.eliminate_dead_code()


def _known_already(node: Node) -> Node | None:
    """The node whose result this one only repeats."""
    given = node.args[0] if node.args else None
    if not isinstance(given, Node):
        return None
    before, after = given.meta.get("tensor_meta"), node.meta.get("tensor_meta")
    if before is None or after is None:
        return None
    if node.target is _aten.mul.Scalar and node.args[1] == 1 and before.dtype == after.dtype:
        return given
    if node.target in _RESHAPING and before.shape == after.shape:
        return given
    origin = given.args[0] if given.args else None
    if node.target is _aten.transpose.int and given.target is node.target and given.args[1:] == node.args[1:]:
        return origin if isinstance(origin, Node) else None  # transposed and back
    return None


def _speed_up(record: GraphModule, parameters: Tensor, rows: Tensor) -> None:
    """Keep what is constant, and call the rest directly, as far as a trial with these tensors allows."""
    trial = _Trial(record)
    trial.run(parameters, rows)
    used = [node for node in trial.constants if any(user not in trial.constants for user in node.users)]
    for number, node in enumerate(used):
        record.register_buffer(f"_constant_{number}", trial.constants[node])
        with record.graph.inserting_before(node):
            node.replace_all_uses_with(record.graph.get_attr(f"_constant_{number}"))
    for node, target in trial.direct.items():
        node.op, node.target = "call_method" if isinstance(target, str) else "call_function", target
        if target == "view":
            node.args = (node.args[0], *node.args[1])  # type: ignore[misc]  # a list takes it a microsecond longer


class _Trial(Interpreter):
    """Runs a record and finds which results follow from shapes alone, and which operations can be called directly."""

    def __init__(self, record: GraphModule) -> None:
        super().__init__(record)
        self.constants: dict[Node, Tensor] = {}
        self.direct: dict[Node, str | Callable[..., Any]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        is_large = isinstance(result, Tensor) and result.nbytes > _SMALL_BYTES
        if not isinstance(n.target, OpOverload) or _is_random(n) or is_large:
            return result
        follows = n.target in _OF_SHAPES or all(source in self.constants for source in n.all_input_nodes)
        if follows and isinstance(result, Tensor):
            self.constants[n] = result
            return result
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        name = n.target._schema.name.removeprefix("aten::")
        name = _OTHER_NAMES.get(name, name)
        target: str | Callable[..., Any] = getattr(torch, name, name)
        try:
            again = getattr(args[0], name)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
        except Exception:  # there is none of that name, or it takes other arguments
            again = None
        if _are_equal(again, result):
            self.direct[n] = target
        return result


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]  # an OpOverload


def _are_equal(one: Any, other: Any) -> bool:
    """Tensors, or sequences of them, of the same numbers, laid out alike."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        layouts = [(tensor.dtype, tensor.device, tensor.stride()) for tensor in (one, other)]
        return layouts[0] == layouts[1] and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return False
