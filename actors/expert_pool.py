"""ExpertPool: live expert feature servers as a FeatureSource. Each expert has its own actors, started when first needed."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import ceil
from typing import Any

import ray

from actors.expert_server import ExpertServer, ServerBusy, ServerError
from mova_core.experts import Features, expert_module
from mova_core.images import ImageError, ImageRef

REQUEST = 32  # most pictures per request: what is refused is asked for again as a whole
REQUESTS = 16  # requests an actor holds at once, whose pictures share its batches


@dataclass(frozen=True, kw_only=True)
class Servers:
    """How one expert is served. CPUs and GPUs are per actor and may be fractions."""

    actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    batch_size: int | None = None  # most pictures per forward pass; None: the server measures it at its start
    server: Mapping[str, Any] = field(
        default_factory=dict
    )  # further arguments of ExpertServer: weights, size, dtype, device, wait_ms, queue, profiles, memory_share


class ExpertPool:
    """Features from `ExpertServer` actors. Needs an open Ray session; an actor that dies is started again and its work redone.

    Args:
        experts: name -> how it is served.
        patience: seconds that a request is asked again for while the queues of an expert's actors are full.
    """

    def __init__(self, experts: Mapping[str, Servers], patience: float = 60.0):
        self.experts = dict(experts)
        self.patience = patience
        self._actors: dict[str, list[Any]] = {}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Expert -> fingerprint of the features it serves; starts every expert."""
        asked = {name: self._of(name)[0].identity.remote() for name in self.experts}
        return {name: ray.get(ref)["fingerprint"] for name, ref in asked.items()}

    @property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Expert -> all that its fingerprint covers; starts every expert."""
        asked = {name: self._of(name)[0].identity.remote() for name in self.experts}
        return {name: ray.get(ref)["description"] for name, ref in asked.items()}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`. All experts work at once; the pictures of one are spread over its actors.

        Raises:
            ValueError: an expert that is not in this pool.
            ImageError: a picture that cannot be read.
            ServerBusy: an expert's queues stayed full.
            ServerError: an expert fails; its actor is started again.
        """
        rows: dict[str, list[int]] = {}
        for row, names in enumerate(experts):
            for name in names:
                rows.setdefault(name, []).append(row)
        asked = []
        for name, wanted in rows.items():
            turns = cycle(self._of(name))
            room = self.experts[name].server.get("queue", REQUEST)
            size = min(REQUEST, room, ceil(len(wanted) / len(self._of(name))))
            for at in range(0, len(wanted), size):
                group = wanted[at : at + size]
                actor = next(turns)
                asked.append((name, group, actor, actor.features.remote([images[row] for row in group])))
        until = time.monotonic() + self.patience
        out: list[dict[str, Features]] = [{} for _ in images]
        for name, group, actor, ref in asked:
            for row, result in zip(group, self._got(ref, actor, [images[row] for row in group], until), strict=True):
                if isinstance(result, ImageError):
                    raise result
                out[row][name] = result
        return out

    def _got(self, ref: Any, actor: Any, images: Sequence[ImageRef], until: float) -> list[Features | ImageError]:
        """What was asked for, asked again while the actor has no room."""
        pause = 0.02
        while True:
            try:
                return ray.get(ref)
            except ServerBusy:
                if time.monotonic() > until:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
                ref = actor.features.remote(images)
            except ServerError:
                self._replace(actor)
                raise

    def _replace(self, broken: Any) -> None:
        """Starts another actor in place of one that answers nothing any more. A restart would keep the handle, over
        which requests go to the old process until Ray has noticed its end."""
        for name, actors in self._actors.items():
            if broken in actors:
                actors[actors.index(broken)] = self._started(name)
        ray.kill(broken)

    def close(self) -> None:
        """Ends the actors."""
        for actors in self._actors.values():
            for actor in actors:
                ray.kill(actor)
        self._actors.clear()

    def _of(self, name: str) -> list[Any]:
        if name not in self.experts:
            raise ValueError(f"no expert {name!r} in this pool; it serves {', '.join(self.experts)}")
        if name not in self._actors:
            self._actors[name] = [self._started(name) for _ in range(self.experts[name].actors)]
        return self._actors[name]

    def _started(self, name: str) -> Any:
        how = self.experts[name]
        remote = ray.remote(ExpertServer).options(
            num_cpus=how.num_cpus,
            num_gpus=how.num_gpus,
            max_restarts=-1,
            max_task_retries=2,
            max_concurrency=REQUESTS,
        )
        arguments = {
            "batch_size": how.batch_size,
            "device": "cuda" if how.num_gpus else "cpu",
            "memory_share": min(1.0, how.num_gpus or 1.0),
            "module": expert_module(name),
            **how.server,
        }
        return remote.remote(name, **arguments)
