"""Experts of this process that are loaded when first requested."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mova_core.features.codec import CODECS, as_stored
from mova_core.features.source import LocalExperts

if TYPE_CHECKING:
    from mova_core.experts import Features
    from mova_core.images import ImageRef


class LazyExperts(LocalExperts):
    """`LocalExperts` that are loaded when first requested, because a router picks at most three of seven.

    Args:
        names: the experts that may be requested.
        size, device: as `load_expert` takes them.
        weights: name -> weights as `load_expert` takes them; an expert not named here gets its default.
        fingerprints: name -> fingerprint of the features wanted, where known. The dtype to compute in is then searched for,
            and for a fingerprint of features stored in another dtype, say int8, the features are rounded as reading from
            the store would give them.
        dtypes: name -> name of the dtype to compute in, tried first; float32 for an expert not named here, or where the
            dtype is one that only a store keeps.
        batch_size: images per forward pass.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        size: str = "full",
        weights: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        device: str = "cpu",
        dtypes: Mapping[str, str] | None = None,
        batch_size: int = 8,
    ):
        super().__init__({}, batch_size)
        self.names = tuple(names)
        self.size, self.device, self.dtypes = size, device, dict(dtypes or {})
        self.weights = dict(weights or {})
        self._expected = dict(fingerprints or {})
        self._lock = threading.Lock()

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served, where it was given or the expert is loaded."""
        return {**self._expected, **super().fingerprints}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `LocalExperts.fetch`.

        Raises:
            ValueError: also an expert whose weights are not the ones expected.
        """
        self.load(name for names in experts for name in names if name in self.names)
        rows = super().fetch(images, experts)
        return [
            {name: as_stored(features, self._descriptions[name]["dtype"]) for name, features in row.items()}
            for row in rows
        ]

    def load(self, names: Iterable[str]) -> None:
        """Loads those of the experts that are not loaded yet.

        Raises:
            ValueError: an expert's weights are not the ones expected.
        """
        with self._lock:
            for name in dict.fromkeys(names):
                if name not in self.experts:
                    self._load(name)

    def _load(self, name: str) -> None:
        """Loads an expert in the dtype whose fingerprint is the one expected."""
        import torch

        from mova_core.experts import fingerprint, load_expert

        expected = self._expected.get(name)
        first = self.dtypes.get(name, "float32")
        dtypes = [dtype for dtype, codec in CODECS.items() if codec.peak is None]
        loaded_fingerprint = ""
        for dtype in sorted(dtypes, key=lambda dtype: (dtype != first, dtypes.index(dtype))):
            expert = load_expert(
                name, self.weights.get(name), size=self.size, device=self.device, dtype=getattr(torch, dtype)
            )
            description = expert.describe()
            loaded_fingerprint = loaded_fingerprint or fingerprint(description)
            candidates = (description, *({**description, "dtype": stored} for stored in CODECS))
            matching = (candidate for candidate in candidates if expected in (None, fingerprint(candidate)))
            if description := next(matching, {}):
                # New dictionaries, description first: other threads iterate over the old ones in `fingerprints`.
                self._descriptions = {**self._descriptions, name: description}
                self.experts = {**self.experts, name: expert}
                return
        raise ValueError(
            f"expert {name} has fingerprint {loaded_fingerprint}, wanted {expected}: "
            f"give the weights and size that its features were made with"
        )
