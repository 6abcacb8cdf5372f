"""ExpertServer: one vision expert on one slice of a device, as a plain class.

Ray Data runs it as the callable of an actor pool (`__call__`: features go into the store, references go on), `ExpertPool`
runs it under `ray.remote` (`features`: tensors go back to who asked). Neither needs a line of it changed.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import torch

from mova_core.experts import Features, fingerprint, load_expert
from mova_core.features import FeatureStore
from mova_core.images import ImageError, ImageRef

logger = logging.getLogger(__name__)

REFERENCE = pa.schema([("expert", pa.string()), ("key", pa.string()), ("image", pa.string()), ("error", pa.string())])


class ExpertServer:
    """Serves the features of one expert.

    Args:
        expert: name in the registry.
        weights, size: as `load_expert` takes them.
        device: torch device; default the GPU this process was given, else the CPU.
        dtype: name of the dtype the expert computes in and the store keeps, e.g. "bfloat16".
        batch_size: pictures per forward pass.
        store: folder of the feature store that `__call__` writes to.
    """

    def __init__(
        self,
        expert: str,
        *,
        weights: str | None = None,
        size: str = "full",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 8,
        store: str | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self.expert = load_expert(expert, weights=weights, size=size, device=str(self.device), dtype=self.dtype)
        self.description = self.expert.describe()
        self.fingerprint = fingerprint(self.description)
        self.store = FeatureStore(store) if store is not None else None
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix=f"{expert}-decode")

    def identity(self) -> dict[str, Any]:
        """The `fingerprint` of what is served and the `description` it covers."""
        return {"fingerprint": self.fingerprint, "description": self.description}

    def features(self, images: Sequence[ImageRef]) -> list[Features | ImageError]:
        """Features of each picture, tokens (H*W, C) on the CPU; a picture that cannot be read gives its error, the others their features."""
        return [result for _, results in self._compute(images) for result in results]

    def __call__(self, shards: pa.Table) -> pa.Table:
        """Computes and stores whole shards.

        Args:
            shards: one row per shard with its `shard` id and the `keys` (sha256) and `paths` of its pictures.

        Returns:
            One row per picture: a reference (expert, key, image) and the `error` that kept it out, or null.
        """
        if self.store is None:
            raise ValueError(f"ExpertServer({self.expert.card.name!r}) was given no store to write to")
        shelf = self.store.shelf(self.expert.card.name, self.fingerprint)
        references: list[dict[str, Any]] = []
        for shard in shards.to_pylist():
            images = [ImageRef(path=path, key=key) for path, key in zip(shard["paths"], shard["keys"], strict=True)]
            if shelf.committed(shard["shard"]):
                references += [self._reference(image) for image in images]
                continue
            computed: dict[str, Features] = {}
            failed: list[dict[str, Any]] = []
            for group, results in self._compute(images):
                for image, result in zip(group, results, strict=True):
                    if isinstance(result, ImageError):
                        failed.append(
                            {
                                "image": image.path,
                                "sha256": image.key,
                                "reason": str(result),
                                "expert": self.expert.card.name,
                            }
                        )
                    else:
                        computed[image.key] = result
                    references.append(self._reference(image, str(result) if isinstance(result, ImageError) else None))
            if computed:
                shelf.write(shard["shard"], computed)
            if failed:
                self.store.quarantine(failed)
        return pa.Table.from_pylist(references, schema=REFERENCE)

    def _compute(self, images: Sequence[ImageRef]) -> Iterator[tuple[Sequence[ImageRef], list[Features | ImageError]]]:
        """Groups of `batch_size` pictures with their results; the next group is decoded while this one is computed."""
        groups = [images[at : at + self.batch_size] for at in range(0, len(images), self.batch_size)]
        coming = self._decoder.submit(self._preprocess, groups[0]) if groups else None
        for number, group in enumerate(groups):
            assert coming is not None
            batch, errors = coming.result()
            coming = self._decoder.submit(self._preprocess, groups[number + 1]) if number + 1 < len(groups) else None
            results: list[Features | ImageError] = list(errors)  # type: ignore[arg-type]
            if batch is not None:
                for index, features in zip(
                    [index for index, error in enumerate(errors) if error is None], self._forward(batch), strict=True
                ):
                    results[index] = features
            yield group, results

    def _preprocess(self, images: Sequence[ImageRef]) -> tuple[dict[str, torch.Tensor] | None, list[ImageError | None]]:
        decoded = []
        errors: list[ImageError | None] = []
        for image in images:
            try:
                decoded.append(image.decode())
                errors.append(None)
            except ImageError as error:
                errors.append(error)
        return (self.expert.preprocess(decoded) if decoded else None), errors

    @torch.inference_mode()
    def _forward(self, batch: dict[str, torch.Tensor]) -> list[Features]:
        on_device = {name: tensor.to(self.device, self.dtype, non_blocking=True) for name, tensor in batch.items()}
        tokens, grid = self.expert(on_device)
        return [Features(row, grid) for row in tokens.cpu()]

    def _reference(self, image: ImageRef, error: str | None = None) -> dict[str, Any]:
        return {"expert": self.expert.card.name, "key": image.key, "image": image.path, "error": error}
