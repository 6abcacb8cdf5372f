"""A model, data with labels and a store, small enough to train on within a test."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from mova_core.experts import Features
from mova_core.features import FeatureStore
from mova_core.images import ImageRef

LABELS = [["sam"], [], ["vary", "sam"], ["vary"], [], ["sam"], ["vary"]]  # 7 samples: an epoch of pairs leaves one out


def write_places(
    folder: Path,
    mini_folder: Path,
    pictures: Sequence[Path],
    dropout: float = 0.0,
    planted: tuple[str, int] | None = None,
) -> dict[str, str]:
    """The arguments that name a model, data with labels, and a store of arbitrary features.

    Args:
        dropout: of the model's text encoder and of the LLM, whose losses would hardly show that of the text encoder alone.
        planted: expert and number of the picture whose feature is NaN.
    """
    shutil.copytree(mini_folder, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config["adapter"]["text_encoder"] |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config["text_config"]["attention_dropout"] = dropout
    (folder / "model" / "config.json").write_text(json.dumps(config))
    words = ["left", "right and left", "none", "what is right", "0 1 2 3", "A", "is in the picture"]
    # Of one picture each, but for a sample without one and a sample with two.
    shown = [[pictures[number % 3]] for number in range(5)] + [[], pictures[:2]]
    records = [
        {
            "image": list(map(str, shown[number])),
            "conversations": [{"from": "human", "value": f"what {number}?"}, {"from": "gpt", "value": words[number]}],
            "routing": routing,
        }
        for number, routing in enumerate(LABELS)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    store, generator = FeatureStore(folder / "store", create=True), torch.Generator().manual_seed(0)
    for expert in config["pool"]:
        channels = expert["channels"]
        description = {"expert": expert["name"], "dtype": "float32", "weights": "w", "grid": [4, 4]}
        partition = store.add_expert(description | {"channels": channels})
        rows = {
            ImageRef(path=str(path)).key: Features(torch.randn(16, channels, generator=generator), (4, 4))
            for path in pictures
        }
        if planted and planted[0] == expert["name"]:
            rows[ImageRef(path=str(pictures[planted[1]])).key].tokens.fill_(float("nan"))
        partition.write(partition.shard_id(rows), rows)
    return {"model": f"{folder}/model", "data": f"{folder}/data.jsonl", "store": f"{folder}/store"}
