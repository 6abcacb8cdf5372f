"""One computation per key at a time, however many threads ask for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """The computations under way, so that a thread that asks for the same key waits for the result and computes nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[K, Future[V | None]] = {}

    def run(
        self,
        keys: Collection[K],
        compute: Callable[[list[K]], Mapping[K, V]],
        on_join: Callable[[list[K]], object] | None = None,
    ) -> dict[K, V]:
        """The values of all keys.

        Keys that another thread computes are waited for, after the others are computed here. If that thread fails, they are
        computed here.

        Args:
            keys: distinct keys.
            compute: called with the keys no other thread is computing; its exception is raised to this caller only, waiters
                retry.
            on_join: called with the keys another thread is computing.
        """
        values: dict[K, V] = {}
        while len(values) < len(keys):
            with self._lock:
                missing = [key for key in keys if key not in values]
                joined = {key: self._under_way[key] for key in missing if key in self._under_way}
                own: dict[K, Future[V | None]] = {key: Future() for key in missing if key not in joined}
                self._under_way.update(own)
            if joined and on_join:
                on_join(list(joined))
            computed: Mapping[K, V] = {}
            try:
                if own:
                    computed = compute(list(own))
            finally:
                with self._lock:
                    for key in own:
                        del self._under_way[key]
                for key, future in own.items():
                    future.set_result(computed.get(key))  # None: the computation failed
            values.update({key: computed[key] for key in own})
            values.update({key: value for key, future in joined.items() if (value := future.result()) is not None})
        return values
