"""Computes each key at most once at a time, however many threads request it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Deduplicates concurrent computations: a thread that requests a key under computation waits for its result."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[K, Future[V | None]] = {}

    def run(
        self,
        keys: Collection[K],
        compute: Callable[[list[K]], Mapping[K, V]],
        on_join: Callable[[list[K]], object] | None = None,
    ) -> dict[K, V]:
        """Returns the values of all keys.

        Computes the keys that no other thread computes, then waits for the others. A key whose computation fails in another
        thread is computed here.

        Args:
            keys: distinct keys.
            compute: called with the keys that no other thread is computing. Its exception is raised to this caller only;
                waiting threads retry.
            on_join: called with the keys that another thread is computing.
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
