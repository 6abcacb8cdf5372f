"""A shelf: the features of one expert with one fingerprint, as files. `store` tells the layout and the commit protocol.

Shapes: H x W the expert's native grid, N = H*W tokens, C channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mova_core.features.codec import CODECS, checksum
from mova_core.features.index import RECEIPT, Rows, binary_keys, sorting
from mova_core.features.publish import StoreError, finished, parquet, put_if_absent, sync_folder, writing

if TYPE_CHECKING:
    from torch import Tensor

    from mova_core.experts import Features

logger = logging.getLogger(__name__)

PAGE = 4096  # rows start at multiples of it, so that they can be mapped alone and read past the page cache
READERS = 4  # threads that read a batch
_SMALL = 1 << 20  # bytes under which a batch is read faster on the caller's own thread
_SETTLED = 2_000_000_000  # ns after which no clock tick of a file system is still running


class MissingFeatures(StoreError, LookupError):
    """Features that were asked for and are not stored.

    Attributes:
        missing: (image key, expert) pairs.
    """

    def __init__(self, message: str, missing: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.missing = list(missing)

    @classmethod
    def of(cls, store: Path, missing: Sequence[tuple[str, str]]) -> MissingFeatures:
        """The error for these (image key, expert) pairs."""
        counts = Counter(expert for _, expert in missing)
        return cls(
            f"store {store} lacks {len(missing)} of the features asked for "
            f"({', '.join(f'{expert}: {count}' for expert, count in counts.items())}): "
            f"run `mova precompute` on these images with --experts {','.join(counts)}",
            missing,
        )


class Shard(NamedTuple):
    """A piece of work; the same keys for the same fingerprint always have the same id."""

    id: str
    keys: list[str]


class ExpertShelf:
    """The features of one expert with one fingerprint. Picklable; reads from any number of threads.

    Attributes:
        folder, store: of the shelf, and of the store it is in.
        expert, fingerprint: its address.
        description: all that the fingerprint covers, as `VisionExpert.describe` told it.

    Raises:
        StoreError: its expert.json cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.store = self.folder.parents[1]
        self.expert = self.folder.parent.name
        self.fingerprint = self.folder.name
        try:
            self.description: dict[str, Any] = json.loads((self.folder / "expert.json").read_text())
            self._codec = CODECS[self.description["dtype"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(
                f"{self.folder / 'expert.json'} is damaged: delete it and run `mova precompute` "
                f"with --experts {self.expert}, which writes it anew"
            ) from None
        self._lock = threading.RLock()
        self._open = lru_cache(maxsize=64)(partial(_Descriptor, self.folder / "shards"))
        self._number = 0  # of the snapshot that _index is; 0 is none
        self._index = Rows.of([])
        self._newer = Rows.of([])  # from receipts newer than the snapshot
        self._unsorted: dict[str, pa.Table] = {}  # receipts to go there; a writer that never reads never sorts them
        self._listed = 0  # when receipts/ had last changed at the last look
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertShelf, (self.folder,)

    def __repr__(self) -> str:
        return f"ExpertShelf({str(self.folder)!r})"

    # What there is

    def __len__(self) -> int:
        index, newer = self._catalog()
        return len(index.distinct()) + int((index.find(newer.distinct()) < 0).sum())

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Which of the keys are stored, as of the last `refresh` or `write` here: bool, one per key."""
        binary = binary_keys(keys)
        index, newer = self._catalog()
        return (index.find(binary) >= 0) | (newer.find(binary) >= 0)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those keys that are not stored, in order. Refreshes before it says that any is not."""
        there = self.has(keys)
        if not there.all():
            self.refresh()
            there = self.has(keys)
        return [keys[at] for at in np.flatnonzero(~there).tolist()]

    def refresh(self) -> None:
        """Sees what was committed, withdrawn or merged into a snapshot since the last look."""
        with self._lock:
            changed = _changed(self.folder / "receipts")
            if changed == self._listed:
                return
            # A folder that changed just now may change again within the same tick of its clock: look again next time.
            self._listed = changed if time.time_ns() - changed > _SETTLED else 0
            receipts = {name.removesuffix(".parquet") for name in finished(self.folder / "receipts", ".parquet")}
            self._load_snapshot()
            self._index = self._index.only(receipts)
            indexed = self._index.shards()
            self._newer = self._newer.only(receipts - indexed)
            known = indexed | self._newer.shards()
            self._unsorted = {
                shard: table for shard, table in self._unsorted.items() if shard in receipts and shard not in known
            }
            for shard in sorted(receipts - known - self._unsorted.keys()):
                try:
                    self._unsorted[shard] = self._receipt(shard)
                except FileNotFoundError:  # withdrawn since the listing
                    continue
                except ValueError as error:
                    logger.warning("%s, its features are not seen: run `mova store verify`", error)

    def _catalog(self) -> tuple[Rows, Rows]:
        """The rows of the snapshot, and those newer than it."""
        with self._lock:
            if self._unsorted:
                self._newer = Rows.of(list(self._unsorted.values()), [self._newer])
                self._unsorted = {}
            return self._index, self._newer

    def _load_snapshot(self) -> None:
        """Maps the latest index that is whole; where there is none, every receipt will be read."""
        for number in reversed(_numbers(self.folder / "snapshots", ".json")):
            if number == self._number:
                return
            with suppress(OSError, ValueError, KeyError, pa.ArrowException):
                told = json.loads(self._path("snapshots", number, ".json").read_text())
                path = self.folder / "index" / told["index"]
                if path.stat().st_size == told["index_bytes"]:
                    self._index, self._number = Rows.mapped(path), number
                    return
        self._index, self._number = Rows.of([]), 0

    def stat(self) -> dict[str, Any]:
        """features, bytes, shards, bytes_per_feature, loss (mean relative L2 of storing), dtype, grid, channels."""
        catalog = self._catalog()
        rows = sum(len(part) for part in catalog)
        size, loss = (sum(pc.sum(part.table[name]).as_py() or 0 for part in catalog) for name in ("length", "loss"))
        return {
            "features": len(self),
            "bytes": size,
            "shards": sum(len(part.shards()) for part in catalog),
            "bytes_per_feature": size // rows if rows else 0,
            "loss": loss / rows if rows else 0.0,
            **{name: self.description.get(name) for name in ("dtype", "grid", "channels")},
        }

    # Writing

    def absent(self, keys: np.ndarray) -> np.ndarray:
        """Where a key stands that is not stored, the first of each: positions, ascending. Refreshes first.

        Args:
            keys: image keys as bytes, dtype S32. 10 million take seconds and 100 bytes each.
        """
        self.refresh()
        order = sorting(keys)
        ordered = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        index, newer = self._catalog()
        ordered, order = ordered[first], order[first]
        return np.sort(order[(index.find(ordered) < 0) & (newer.find(ordered) < 0)])

    def shard_id(self, keys: Iterable[str] | np.ndarray) -> str:
        """The name of the work of computing these keys, hex or bytes (dtype S32), in any order."""
        text = np.sort(keys).tobytes().hex("\n", 32) if isinstance(keys, np.ndarray) else "\n".join(sorted(keys))
        return hashlib.sha256(f"{self.fingerprint}\n{text}".encode()).hexdigest()[:32]

    def plan(self, keys: Sequence[str], rows_per_shard: int) -> list[Shard]:
        """The work still to do: the keys not yet stored, each once, in the order given."""
        todo = [keys[at] for at in self.absent(binary_keys(keys)).tolist()]
        chunks = (todo[at : at + rows_per_shard] for at in range(0, len(todo), rows_per_shard))
        return [Shard(self.shard_id(chunk), chunk) for chunk in chunks]

    def committed(self, shard_id: str) -> bool:
        """Whether that work is done."""
        return self._path("receipts", shard_id, ".parquet").exists()

    def write(self, shard_id: str, features: Mapping[str, Features]) -> list[dict[str, Any]]:
        """Stores features under a shard's id, exactly once however many writers try.

        Args:
            shard_id: of a planned shard.
            features: image key -> Features with tokens (H*W, C) on any device; cast to the dtype the fingerprint tells.
                May lack keys of the plan (images that cannot be read). An empty one commits nothing: a receipt of
                nothing would keep these images from being planned again once they can be read.

        Returns:
            The receipt rows committed under this id: key, file, offset, length, grid, dtype, channels, xxh3, loss. They
            are another writer's if it was faster.

        Raises:
            StoreError: the disk is full or refuses; nothing that was committed is lost.
            ValueError: tokens that do not fit their grid, or that the dtype cannot hold.
        """
        if not features:
            return []
        if not self.committed(shard_id):
            self._commit(shard_id, features)
        try:
            table = self._receipt(shard_id)
        except ValueError as error:
            raise StoreError(f"{error}: run `mova store verify`, then the same command again") from None
        with self._lock:
            self._unsorted[shard_id] = table
        return table.to_pylist()

    def make_folders(self) -> None:
        """Makes the shelf's folders, which tools that copy a store may have left out where they were empty."""
        for name in ("shards", "receipts", "index", "snapshots"):
            (self.folder / name).mkdir(exist_ok=True)

    def _commit(self, shard_id: str, features: Mapping[str, Features]) -> None:
        name = f"{shard_id}-{uuid.uuid4().hex[:12]}.safetensors"
        shard = self.folder / "shards" / name
        temporary = shard.with_name(f".{name}.tmp")
        receipt, pieces = self._lay_out(name, features)
        lost = False
        with writing(self.store):
            try:
                self.make_folders()
                with open(temporary, "xb") as file:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, shard)
                sync_folder(shard.parent)
                lost = not put_if_absent(self._path("receipts", shard_id, ".parquet"), receipt)
            finally:
                # Ask the disk who won: an interrupt, or a reply that NFS lost, can hide that the link was made.
                with suppress(OSError, ValueError):
                    temporary.unlink(missing_ok=True)
                    winner = self._receipt(shard_id)["file"][0].as_py() if self.committed(shard_id) else None
                    if winner != name and (winner or not lost):
                        shard.unlink(missing_ok=True)

    def _lay_out(self, name: str, features: Mapping[str, Features]) -> tuple[pa.Buffer, list[Any]]:
        """A shard's receipt, and its bytes piece by piece."""
        binary_keys(list(features))
        rows: list[dict[str, Any]] = []
        pieces: list[Any] = []
        for key, (tokens, grid) in features.items():
            if tokens.ndim != 2 or tokens.shape[0] != grid[0] * grid[1] or not tokens.numel():
                raise ValueError(
                    f"{self.expert} feature of image {key}: {tuple(tokens.shape)} is no (H*W, C), grid {grid}"
                )
            try:
                row, loss = self._codec.encode(tokens)
            except ValueError as error:
                raise ValueError(f"{self.expert} feature of image {key}: {error}") from None
            pieces += [row, bytes(_gap(len(row)))]
            rows.append(
                {
                    "key": key.lower(),
                    "file": name,
                    "length": len(row),
                    "grid": [int(side) for side in grid],
                    "dtype": self._codec.dtype,
                    "channels": tokens.shape[1],
                    "xxh3": checksum(row),
                    "loss": loss,
                }
            )
        offset = len(self._header(rows, 0))
        for row in rows:
            row["offset"] = offset
            offset += row["length"] + _gap(row["length"])
        receipt = parquet(pa.Table.from_pylist(rows, schema=RECEIPT))
        return receipt, [self._header(rows, checksum(receipt)), *pieces]

    def _header(self, rows: Sequence[Mapping[str, Any]], receipt: int) -> bytes:
        """A shard's first bytes: safetensors' header, padded to a page. It allows no holes, so gaps are tensors too.

        All of it follows from the receipt: its rows and the xxh3 of its file. So each vouches for the other.
        """
        told = {"expert": self.expert, "fingerprint": self.fingerprint, "receipt": f"{receipt:016x}"}
        entries: dict[str, Any] = {"__metadata__": told}
        at = 0
        for number, row in enumerate(rows):
            told[row["key"]] = f"{row['xxh3']:016x}"
            tensors = CODECS[row["dtype"]].tensors(row["key"], row["grid"], row["channels"])
            if gap := _gap(row["length"]):
                tensors[f"pad.{number}"] = ("U8", [gap], gap)
            for name, (dtype, shape, size) in tensors.items():
                entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                at += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * _gap(8 + len(text))
        return len(text).to_bytes(8, "little") + text

    def snapshot(self) -> int:
        """Merges receipts into the next index and publishes it; returns the latest snapshot's number, 0 for none."""
        with self._lock, writing(self.store):
            self.make_folders()
            self._listed = 0
            self.refresh()
            index, newer = self._catalog()
            if not len(newer) and not index.filtered:
                return self._number
            merged = Rows.of([], [index, newer])
            folders = (("snapshots", ".json"), ("index", ".arrow"))
            number = 1 + max([0, *(held for name, suffix in folders for held in _numbers(self.folder / name, suffix))])
            path = self._path("index", number, ".arrow")

            def write(file: BinaryIO) -> None:
                with pa.ipc.new_file(file, merged.table.schema) as writer:
                    writer.write_table(merged.table)

            if put_if_absent(path, write):  # else another process is publishing its own: newer receipts are read anyway
                with pa.memory_map(str(path)) as mapped:
                    content = mapped.read_buffer()
                    put_if_absent(self._path("snapshots", number, ".json"), _telling(path.name, content))
            self._listed = 0
            self.refresh()
            return self._number

    # Reading

    def read(self, keys: Sequence[str], out: Tensor | None = None, verify: bool = True) -> list[Features]:
        """The features of these keys, read in parallel into one buffer.

        Args:
            keys: image keys.
            out: uint8 tensor to read into: 1-D, contiguous, on the CPU, pinned if you copy to a GPU. The features are
                views of it, valid until it is read into again. By default a new one.
            verify: check the xxh3 of each row.

        Returns:
            Features with tokens (H*W, C) in the dtype stored; float32 where that has scales. Each starts at the next
            multiple of 64 bytes in the buffer.

        Raises:
            MissingFeatures: a key that is not stored.
            StoreError: a damaged row.
            ValueError: an `out` that cannot take them; says how much they are.
        """
        import torch

        from mova_core.experts import Features

        rows = self._find(keys)
        starts: list[int] = []
        end = 0
        for row in rows:
            starts.append(end)
            end += row["length"] + -row["length"] % 64
        buffer = torch.empty(end, dtype=torch.uint8) if out is None else out
        if buffer.dtype is not torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous() or buffer.numel() < end:
            raise ValueError(f"out must be a contiguous 1-D uint8 tensor of at least {end} bytes")
        view = buffer.numpy().data

        def load(part: Sequence[int]) -> None:
            for at in part:
                row = rows[at]
                if reason := self._damage(row, view[starts[at] : starts[at] + row["length"]], verify):
                    raise StoreError(
                        f"store {self.store}: the {self.expert} feature of image {keys[at]} in shards/{row['file']} is "
                        f"damaged ({reason}): run `mova store verify`, then `mova precompute`"
                    )

        order = sorted(range(len(rows)), key=lambda at: (rows[at]["file"], rows[at]["offset"]))
        if end < _SMALL or len(rows) == 1:
            load(order)
        else:
            share = -(-len(order) // READERS)
            list(_readers(os.getpid()).map(load, (order[at : at + share] for at in range(0, len(order), share))))
        return [
            Features(CODECS[row["dtype"]].decode(buffer[at : at + row["length"]], row["channels"]), tuple(row["grid"]))
            for row, at in zip(rows, starts, strict=True)
        ]

    def _find(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The receipt row of each key."""
        binary = binary_keys(keys)
        for attempt in range(2):
            found: dict[int, dict[str, Any]] = {}
            for rows in self._catalog():
                positions = rows.find(binary)
                there = np.flatnonzero(positions >= 0)
                if len(there):
                    found.update(zip(there.tolist(), rows.rows(positions[there]), strict=True))
            if len(found) == len(keys):
                return [found[at] for at in range(len(keys))]
            if attempt == 0:
                self.refresh()
        missing = dict.fromkeys(key for at, key in enumerate(keys) if at not in found)
        raise MissingFeatures.of(self.store, [(key, self.expert) for key in missing])

    def _damage(self, row: Mapping[str, Any], view: memoryview, verify: bool = True) -> str:
        """Reads a row into `view`; says what is wrong with it, "" for nothing."""
        done = 0
        try:
            descriptor = self._open(row["file"])
            while done < len(view):
                read = os.preadv(descriptor.number, [view[done:]], row["offset"] + done)
                if not read:
                    return "the file ends before it"
                done += read
        except FileNotFoundError:
            return "the file is gone"
        except OSError as error:
            return f"reading gives: {error.strerror}"
        return "its bytes have changed" if verify and checksum(view) != row["xxh3"] else ""

    # Keeping

    def verify(self, progress: Callable[[int], object] | None = None) -> Iterator[dict[str, str]]:
        """See `FeatureStore.verify`."""
        from mova_core.experts import fingerprint

        def damage(file: str, reason: str, key: str = "") -> dict[str, str]:
            return {"expert": self.expert, "fingerprint": self.fingerprint, "shard": file, "key": key, "reason": reason}

        text = (self.folder / "expert.json").read_bytes()
        if fingerprint(self.description) != self.fingerprint or text != describing(self.description):
            yield damage("expert.json", "it does not tell what the fingerprint covers")
        self._listed = 0
        self.refresh()
        named: set[str] = set()
        for name in finished(self.folder / "receipts", ".parquet"):
            try:
                receipt = checksum((self.folder / "receipts" / name).read_bytes())
                rows = self._receipt(name.removesuffix(".parquet")).sort_by("offset").to_pylist()
            except FileNotFoundError:  # withdrawn since the listing
                continue
            except ValueError as error:
                yield damage(f"receipts/{name}", str(error))
                continue
            named.add(rows[0]["file"])
            for key, reason in self._inspect(rows, receipt):
                yield damage(f"shards/{rows[0]['file']}", reason, key)
            if progress:
                progress(len(rows))
        for number in _numbers(self.folder / "snapshots", ".json"):
            whole = False
            with suppress(OSError):
                content = self._path("index", number, ".arrow").read_bytes()
                whole = self._path("snapshots", number, ".json").read_bytes() == _telling(f"{number}.arrow", content)
            if not whole:
                yield damage(f"index/{number}.arrow", "it is not what its snapshot tells")
        if self._index.files() - named:
            yield damage(f"index/{self._number}.arrow", "it names shards that no receipt names")

    def _inspect(self, rows: Sequence[Mapping[str, Any]], receipt: int) -> Iterator[tuple[str, str]]:
        """Yields (key, reason) of what is damaged in the shard file of a receipt: header, rows, gaps between them."""
        file = rows[0]["file"]
        with suppress(OSError):  # a cached page says nothing about the disk
            os.posix_fadvise(self._open(file).number, 0, 0, os.POSIX_FADV_DONTNEED)

        def differs(expected: bytes, offset: int) -> str:
            told = {"file": file, "offset": offset, "xxh3": checksum(expected)}
            return self._damage(told, memoryview(bytearray(len(expected))))

        if reason := differs(self._header(rows, receipt), 0):
            yield "", f"its header, or receipts/{file.partition('-')[0]}.parquet: {reason}"
        for row in rows:
            if reason := self._damage(row, memoryview(bytearray(row["length"]))):
                yield row["key"], reason
            elif reason := differs(bytes(_gap(row["length"])), row["offset"] + row["length"]):
                yield row["key"], f"padding after it: {reason}"

    def forget(self, damaged: Iterable[Mapping[str, str]]) -> int:
        """See `FeatureStore.forget`."""
        with self._lock, writing(self.store):
            before, indexed = len(self), self._number
            for number in _numbers(self.folder / "snapshots", ".json"):  # first: they merge the receipts
                self._path("snapshots", number, ".json").unlink(missing_ok=True)
            for damage in damaged:
                folder, _, name = damage["shard"].rpartition("/")
                if folder in ("shards", "receipts"):
                    shard_id = name.partition(".")[0].partition("-")[0]
                    self._path("receipts", shard_id, ".parquet").unlink(missing_ok=True)
                elif not folder:
                    (self.folder / name).unlink(missing_ok=True)
            self._listed = 0
            self.refresh()
            if indexed:
                self.snapshot()
            return before - len(self)

    def garbage(self) -> list[Path]:
        """Shards that no receipt names, unless they are a running writer's, and indexes that a newer one supersedes."""
        shards = finished(self.folder / "shards", ".safetensors")
        self._listed = 0
        self.refresh()  # after that listing: what was committed before it is known
        index, newer = self._catalog()
        named, covered = index.files() | newer.files(), index.shards() | newer.shards()
        dead = []
        for name in shards:
            shard_id = name.partition("-")[0]
            # A receipt that is there and not covered is damaged, and may name this file.
            if name not in named and (shard_id in covered or not self.committed(shard_id)):
                dead.append(self.folder / "shards" / name)
        for folder, suffix in (("snapshots", ".json"), ("index", ".arrow")):
            old = [number for number in _numbers(self.folder / folder, suffix) if number < self._number]
            dead += [self._path(folder, number, suffix) for number in old]
        return dead

    def _path(self, folder: str, name: str | int, suffix: str) -> Path:
        return self.folder / folder / f"{name}{suffix}"

    def _receipt(self, shard_id: str) -> pa.Table:
        """A receipt; FileNotFoundError where there is none, ValueError where it cannot be read."""
        path = self._path("receipts", shard_id, ".parquet")
        content = path.read_bytes()
        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            table = file.read(use_threads=False).select(RECEIPT.names).cast(RECEIPT)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"receipt {path} is damaged ({str(error).splitlines()[0]})") from None
        if not len(table):
            raise ValueError(f"receipt {path} is damaged (no rows)")
        return table


class _Descriptor:
    """An open file, closed when the last thread lets go of it."""

    def __init__(self, folder: Path, name: str):
        self.number = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@cache
def _readers(process: int) -> ThreadPoolExecutor:
    """The reading threads of a process: they do not survive a fork, so a DataLoader worker starts its own."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="mova-store")


def describing(description: Mapping[str, Any]) -> bytes:
    """The content of expert.json."""
    return json.dumps(description, sort_keys=True, indent=1).encode()


def _telling(index: str, content: Any) -> bytes:
    """The content of a snapshot: which index, and how to know that it is whole."""
    told = {"index": index, "index_bytes": len(content), "index_xxh3": f"{checksum(content):016x}"}
    return json.dumps(told).encode()


def _gap(size: int) -> int:
    """Bytes to the next page."""
    return -size % PAGE


def _changed(folder: Path) -> int:
    """When a folder last changed, in ns."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:  # copying tools drop empty folders
        return 0


def _numbers(folder: Path, suffix: str) -> list[int]:
    """The numbers of the published files <n><suffix>, ascending."""
    stems = (name.removesuffix(suffix) for name in finished(folder, suffix))
    return sorted(int(stem) for stem in stems if stem.isdigit())
