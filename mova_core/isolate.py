"""Batches in which an item that cannot be processed costs no other."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def isolate_failures(
    call: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> list[Result | ValueError]:
    """`call(items)`, with a ValueError in place of the result of each item that cannot be processed.

    Where `call` raises a ValueError for a batch, both halves are tried: one bad item of n costs 2 log2(n) further calls.

    Args:
        call: returns one result per item, or raises ValueError (`ImageError` is one); other errors are no item's fault.
    """
    try:
        return list(call(items))
    except ValueError as error:
        if len(items) <= 1:
            return [error] * len(items)
    middle = len(items) // 2
    return [*isolate_failures(call, items[:middle]), *isolate_failures(call, items[middle:])]
