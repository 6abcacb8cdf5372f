"""Writes features to a store in the background, gathered into shards."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mova_core.features.partition import FeaturePartition

if TYPE_CHECKING:
    from mova_core.experts import Features
    from mova_core.telemetry import Telemetry

logger = logging.getLogger(__name__)

# A snapshot is due once this many receipts are in none, and an eighth as many as are in one. A server that writes a shard
# every 5 s then makes some 50 snapshots in its first day instead of leaving 17,280 receipts for each new process to open.
SNAPSHOT_RECEIPTS = 64


@dataclass(eq=False)
class _Batch:
    """Features of one partition that will be one shard."""

    partition: FeaturePartition
    features: dict[str, Features] = field(default_factory=dict)  # image key -> feature
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)  # of the first feature, seconds


class ShardWriter:
    """Gathers features into shards and writes them in a thread of its own, which lives while there are any to write.

    A shard and a receipt per request would be many small files; and so that these do not add up for readers, receipts are
    merged into a snapshot now and then. A shard that cannot be written, because the disk is full
    say, is dropped with a warning: the features were computed and answered with, and the next request computes them again.

    Args:
        shard_bytes: features gathered for a shard, about, bytes; while more than twice as many wait, `put` blocks.
        shard_seconds: longest time a feature waits for others to fill its shard.
        telemetry: takes the number of features dropped.
    """

    def __init__(self, shard_bytes: int, shard_seconds: float, telemetry: Telemetry | None = None):
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._telemetry = telemetry
        self._changed = threading.Condition()  # guards the fields below; notified when any of them changes
        self._gathering: dict[str, _Batch] = {}  # fingerprint -> shard that still grows
        self._ready: deque[_Batch] = deque()  # shards to write, in order; the first is being written
        self._bytes = 0  # of all features in either
        self._closed = False
        self._thread: threading.Thread | None = None
        _WRITERS.add(self)

    def waiting(self, partition: FeaturePartition, keys: Sequence[str]) -> dict[str, Features]:
        """The features of these keys that wait to be written: image key -> feature, as it was put."""
        with self._changed:
            batches = [*self._ready, *self._gathering.values()]
            features = [batch.features for batch in batches if batch.partition.fingerprint == partition.fingerprint]
        return {key: by_key[key] for by_key in features for key in keys if key in by_key}

    def put(self, partition: FeaturePartition, features: Mapping[str, Features]) -> None:
        """Takes features (image key -> feature) to be written. Blocks while too many wait. Does nothing once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes <= 2 * self._shard_bytes or self._closed)
            if self._closed:
                return
            batch = self._gathering.setdefault(partition.fingerprint, _Batch(partition))
            for key, feature in features.items():
                size = feature.tokens.numel() * feature.tokens.element_size()
                # A row of a larger tensor is copied: it would keep the whole tensor in memory.
                if feature.tokens.untyped_storage().nbytes() != size:
                    feature = feature._replace(tokens=feature.tokens.clone())
                batch.features[key] = feature
                batch.bytes += size
                self._bytes += size
            if batch.bytes >= self._shard_bytes:
                self._ready.append(self._gathering.pop(partition.fingerprint))
            if self._thread is None and self._bytes:
                self._thread = threading.Thread(target=self._run, name="mova-store-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when every feature put so far is stored, or was dropped."""
        with self._changed:
            self._ready.extend(self._gathering.values())
            self._gathering.clear()
            self._changed.notify_all()
            last = self._ready[-1] if self._ready else None
            self._changed.wait_for(lambda: last not in self._ready)

    def close(self) -> None:
        """As `flush`; later features are not stored."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.flush()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                batch.partition.write(batch.partition.shard_id(batch.features), batch.features)
                _snapshot_if_due(batch.partition)
            except Exception as error:  # a full disk must not stop a server
                logger.warning("%s (%d features are not stored)", error, len(batch.features))
                if self._telemetry is not None:
                    self._telemetry.observe(
                        "mova_tiered_dropped_total", len(batch.features), expert=batch.partition.expert
                    )
            with self._changed:
                self._ready.popleft()
                self._bytes -= batch.bytes
                self._changed.notify_all()

    def _next_batch(self) -> _Batch | None:
        """The next shard to write, waited for until it is full or old enough; None ends the thread: nothing is left."""
        with self._changed:
            while not self._ready:
                if not self._gathering:
                    self._thread = None
                    return None
                now = time.monotonic()
                fingerprint, oldest = min(self._gathering.items(), key=lambda item: item[1].since)
                if now - oldest.since >= self._shard_seconds:
                    self._ready.append(self._gathering.pop(fingerprint))
                else:
                    self._changed.wait(oldest.since + self._shard_seconds - now)
            return self._ready[0]


def _snapshot_if_due(partition: FeaturePartition) -> None:
    """Merges receipts into a snapshot where many are in none. A failure is logged: the features are stored all the same."""
    snapshot, recent = partition.catalog()
    if len(recent.shards) < max(SNAPSHOT_RECEIPTS, len(snapshot.shards) // 8):
        return
    try:
        partition.snapshot()
    except Exception as error:
        logger.warning("%s (%d receipts stay outside a snapshot)", error, len(recent.shards))


_WRITERS: weakref.WeakSet[ShardWriter] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    """Stores what still waits when the process ends; the writing threads are daemons and end with it."""
    for writer in list(_WRITERS):
        writer.flush()
