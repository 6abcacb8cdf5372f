"""Label: which experts help which sample, by the paper's criterion (section 3.3), as a Ray Data pipeline.

An expert is useful for a sample when the LM loss of the answer with it is below the loss without any. The paper trains one
model per expert; here one model that was trained on every expert alone and in company is asked with each of them in turn.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F

from mova_core.assemble import stack_features
from mova_core.config import MoVAConfig
from mova_core.data import Sample, read_records, usable_samples, write_records
from mova_core.features import Features, FeatureStore
from mova_core.images import ImageRef
from mova_core.io.uris import absolute
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import IGNORE, MoVAProcessor
from mova_core.routing import label_experts
from pipelines.invalid_records import BadRows, read_rows, report_skipped
from pipelines.ray_data import map_with_actors

WITHOUT = "none"  # column of the loss without any expert


class ExpertLoss:
    """LM losses of samples with no expert and with each expert of the pool alone. Runs in a Ray Data actor pool."""

    def __init__(self, model: str, store: str, device: str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = MoVAForConditionalGeneration.from_pretrained(model).eval()
        self.model.to(self.device)
        self.processor = MoVAProcessor.from_pretrained(model)
        self.store = FeatureStore(store, fingerprints=self.model.config.fingerprints)
        self.pool = self.model.config.experts

    @torch.inference_mode()
    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows with id, image (path) and turns (JSON) to rows with id and one loss (nats per token) per column."""
        asked = rows.to_pylist()
        images = [ImageRef(path=row["image"]) for row in asked]
        turns = [[tuple(turn) for turn in json.loads(row["turns"])] for row in asked]
        batch = self.processor(turns, images, labels=True, padding_side="right").to(self.device)
        base = self.model.encode_base(batch["pixel_values"])
        text = self.model.adapter.encode_text(batch["text_input_ids"], batch["text_attention_mask"])
        features = self.store.fetch(images, [self.pool] * len(images))
        losses = {WITHOUT: self._loss(batch, base, text, None, features)}
        for name in self.pool:
            losses[name] = self._loss(batch, base, text, name, features)
        columns: dict[str, Any] = {"id": [row["id"] for row in asked]}
        return pa.table(columns | {name: pa.array(loss.tolist(), pa.float64()) for name, loss in losses.items()})

    def _loss(
        self,
        batch: Any,
        base: torch.Tensor,
        text: torch.Tensor,
        expert: str | None,
        features: list[dict[str, Features]],
    ) -> torch.Tensor:
        """Mean cross entropy of each row's answer tokens (B,) with one expert, or none."""
        routing = torch.tensor([[name == expert for name in self.pool]] * len(base), device=self.device)
        experts = stack_features(features, [expert] if expert else [], self.device, base.dtype)
        visual, _ = self.model.encode_image(base, text, experts, routing)
        embeds = self.model.embed(batch["input_ids"], visual)
        logits = self.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return each.view_as(targets).sum(1) / (targets != IGNORE).sum(1)


@dataclass(kw_only=True)
class LabelSummary:
    """How often each expert was found useful."""

    samples: int
    unlabelled: int  # records that stay as they are
    experts: dict[str, int]
    per_sample: float  # mean number of experts
    output: str
    skipped: list[str]  # what was wrong with each bad row; the output lacks them


def label(
    model: str,
    data: str,
    store: str,
    output: str,
    *,
    images: str | None = None,
    bad_rows: BadRows = "raise",
    actors: int = 1,
    gpu: float = 0.0,
    batch_size: int = 32,
    max_experts: int = 3,
    progress: bool = True,
) -> LabelSummary:
    """Writes the data file again with `routing` (expert names, lowest loss first) and `routing_losses` per record.

    Needs an open Ray session. Records without an answer, without a picture or with one in quarantine stay as they are; bad
    rows end it, or with `bad_rows` "skip" are left out.

    Raises:
        DataError, StoreError: bad data; features missing from the store.
    """
    config = MoVAConfig.from_pretrained(model)
    opened = FeatureStore(store, fingerprints=config.fingerprints)  # refuses other weights before any actor starts
    pool = config.experts
    read, skipped = read_rows(data, images, bad_rows, check=lambda sample: sample.image)
    report_skipped(skipped)
    usable = [sample for sample in usable_samples(read, opened.quarantined()) if sample.answer]
    rows = [{"id": sample.where, "image": _path(sample), "turns": json.dumps(sample.turns)} for sample in usable]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    measured = map_with_actors(
        ExpertLoss,
        rows,
        arguments={"model": model, "store": str(Path(store).resolve()), "device": "cuda" if gpu else "cpu"},
        total=len(rows),
        what="label",
        unit="samples",
        progress=progress,
        batch_size=batch_size,
        actors=actors,
        gpus=gpu,
    )
    losses = {row.pop("id"): row for row in measured}
    good, records = {sample.where for sample in read}, []
    counts = dict.fromkeys(pool, 0)
    for line, record in read_records(data, on_invalid=lambda _: None):  # reported above
        if (where := f"{data}, line {line}") not in good:
            continue
        if (by_expert := losses.get(where)) is not None:
            chosen = label_experts(by_expert[WITHOUT], {name: by_expert[name] for name in pool}, max_experts)
            record |= {"routing": chosen, "routing_losses": {name: round(loss, 5) for name, loss in by_expert.items()}}
            for name in chosen:
                counts[name] += 1
        records.append(record)
    write_records(output, records)
    return LabelSummary(
        samples=len(usable),
        unlabelled=len(records) - len(usable),
        experts=counts,
        per_sample=sum(counts.values()) / max(1, len(usable)),
        output=output,
        skipped=skipped,
    )


def _path(sample: Sample) -> str:
    assert sample.image is not None and sample.image.path is not None
    return absolute(sample.image.path)
