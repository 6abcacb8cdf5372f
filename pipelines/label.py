"""Label: which experts help which sample, by the paper's criterion (section 3.3), as a Ray Data pipeline.

An expert is useful for a sample when the LM loss of the answer with it is below the loss without any. The paper trains one
model per expert; here one model, trained with random sets of experts, is evaluated with each expert alone.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F

from mova_core.assemble import stack_features
from mova_core.data import read_records, write_records
from mova_core.features import Features, FeatureStore
from mova_core.images import ImageRef
from mova_core.io.uris import local_path
from mova_core.isolate import isolate_failures
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import IGNORE, MoVAProcessor
from mova_core.routing import label_experts
from pipelines.data_args import BadRows, DataArgs
from pipelines.invalid_records import report_failed
from pipelines.ray_data import map_with_actors
from pipelines.read_data import ReadData, check_label_data, check_unchanged, picture_paths

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
        context = getattr(self.model.config.text_config, "max_position_embeddings", None)
        self.max_length = min(self.processor.tokenizer.model_max_length, context or math.inf)

    @torch.inference_mode()
    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows with id, images (paths) and turns (JSON) to rows with id, one loss (nats per token) per column, and `error`.

        A sample without a loss has null in the columns of losses and its `error`.
        """
        measured = isolate_failures(self._measure, rows.to_pylist())
        names = [WITHOUT, *self.pool]
        table: list[dict[str, Any]] = []
        for key, losses in zip(rows["id"].to_pylist(), measured, strict=True):
            if isinstance(losses, ValueError):
                table.append({"id": key, "error": str(losses)})
            elif not all(map(math.isfinite, losses)):
                table.append({"id": key, "error": "the model's loss is no finite number"})
            else:
                table.append({"id": key, **dict(zip(names, losses, strict=True))})
        columns = [("id", pa.int64()), ("error", pa.string()), *((name, pa.float64()) for name in names)]
        return pa.Table.from_pylist(table, schema=pa.schema(columns))

    def _measure(self, samples: Sequence[dict[str, Any]]) -> list[list[float]]:
        """Losses of each sample: without an expert, then with each of the pool."""
        shown = [[ImageRef(path=path) for path in row["images"]] for row in samples]
        images = [image for of_sample in shown for image in of_sample]
        turns = [[tuple(turn) for turn in json.loads(row["turns"])] for row in samples]
        batch = self.processor(turns, shown, labels=True, padding_side="right", max_length=self.max_length)
        if (batch["labels"][:, 1:] == IGNORE).all(1).any():  # `isolate_failures` finds which
            raise ValueError(f"its answer lies beyond the {self.max_length} tokens that the model reads")
        batch = batch.to(self.device)
        base = self.model.encode_base(batch["pixel_values"])
        text = self.model.adapter.encode_text(batch["text_input_ids"], batch["text_attention_mask"])
        features = self.store.fetch(images, [self.pool] * len(images))
        losses = [self._loss(batch, base, text, name, features) for name in (None, *self.pool)]
        return torch.stack(losses, 1).tolist()

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
    """How many samples each expert helps."""

    samples: int
    unlabelled: int  # records that stay unchanged
    experts: dict[str, int]
    per_sample: float  # mean number of experts
    output: str
    skipped: list[str]  # error of each invalid record; the output lacks these records
    left_out: dict[str, int]  # reason -> number of the unlabelled records


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
    read: ReadData | None = None,
) -> LabelSummary:
    """Writes the data file again with `routing` (expert names, lowest loss first) and `routing_losses` per record.

    Needs an open Ray session. Records that cannot be labelled stay unchanged, and are counted by reason in `left_out`.

    Args:
        model: local folder of a MoVA model.
        data, store, images, bad_rows: as `DataArgs`; the output lacks invalid records.
        output: local JSON file.
        actors, gpu: actors that measure losses, and GPUs of each.
        batch_size: samples per forward pass.
        max_experts: most experts in a label.
        progress: show a progress bar.
        read: what `check_label_data` returned, if the caller has checked already.

    Raises:
        DataError, StoreError: bad data; features missing from the store.
    """
    args = DataArgs(model=model, data=data, store=store, images=images, bad_rows=bad_rows)
    read = read or check_label_data(args, output)
    read.report()
    pool, usable = read.pool, read.samples
    rows = [
        {"id": sample.number, "images": picture_paths(sample), "turns": json.dumps(sample.turns)} for sample in usable
    ]
    measured = map_with_actors(
        ExpertLoss,
        rows,
        arguments={"model": args.model, "store": args.store, "device": "cuda" if gpu else "cpu"},
        total=len(rows),
        what="label",
        unit="samples",
        progress=progress,
        batch_size=batch_size,
        actors=actors,
        gpus=gpu,
    )
    losses: dict[int, dict[str, float]] = {}
    errors: dict[int, str] = {}
    for row in measured:
        number, error = row.pop("id"), row.pop("error")
        if error is None:
            losses[number] = row
        else:
            errors[number] = error
    failed = [f"{sample.where}: {errors[sample.number]}" for sample in usable if sample.number in errors]
    report_failed("record", "cannot be labelled", failed)
    counts = dict.fromkeys(pool, 0)

    def labelled() -> Iterator[dict[str, Any]]:
        """Every valid record, with its label if it has one; the file is read again, so that no record stays in memory."""
        check_unchanged(args.data, read.version)
        valid = {sample.number for samples in (usable, *read.left_out.values()) for sample in samples}
        for position, record in read_records(args.data, on_invalid=lambda _: None):  # reported above
            if position.number not in valid:
                continue
            if (exact := losses.get(position.number)) is not None:
                # Rounded before the choice, so that the labels are those of the losses beside them.
                by_expert = {name: round(loss, 5) for name, loss in exact.items()}
                chosen = label_experts(by_expert[WITHOUT], {name: by_expert[name] for name in pool}, max_experts)
                record |= {"routing": chosen, "routing_losses": by_expert}
                for name in chosen:
                    counts[name] += 1
            yield record

    written = write_records(local_path(output) or output, labelled())
    return LabelSummary(
        samples=len(losses),
        unlabelled=written - len(losses),
        experts=counts,
        per_sample=sum(counts.values()) / max(1, len(losses)),
        output=output,
        skipped=read.skipped,
        left_out=read.counts() | ({"cannot be labelled": len(failed)} if failed else {}),
    )
