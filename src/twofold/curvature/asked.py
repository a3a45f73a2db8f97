"""What a running backward pass asks a function for."""

from typing import Any

import torch


def asked(ctx: Any, count: int) -> list[bool]:
    """Tell for each of a function's first `count` inputs, tensors all, whether its gradient will be used."""
    nodes = [node for node, _ in ctx.next_functions]
    nodes += [None] * (count - len(nodes))
    return [needed and _will_run(node) for needed, node in zip(ctx.needs_input_grad[:count], nodes, strict=False)]


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # So it answers for a leaf whose gradient was asked for.
        return True
