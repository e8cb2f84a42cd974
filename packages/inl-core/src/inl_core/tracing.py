"""What code may ask while it is compiled or transformed."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def settled_while_tracing(function: Callable[P, T]) -> Callable[P, T]:
    """Let the compiler call `function` while tracing and use the result as a constant.

    ``torch.compiler.assume_constant_result``, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@settled_while_tracing
def transformed() -> bool:
    """Whether a ``torch.func`` transform is active; the compiler has its own guards for those."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
