"""What training, labelling and evaluation read: one shape of arguments for the three. Imports neither torch nor Ray."""

from dataclasses import dataclass
from typing import Literal

from mova_core.io.uris import absolute

BadRows = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """A model, its data file and the feature store. Paths become absolute, so that every process reads the same files.

    Attributes:
        model: local folder of a MoVA model.
        data: LLaVA JSON or JSONL file, or its URL (docs/data_format.md).
        store: feature store, a folder or a URL; "" where a command may do without one.
        images: folder or URL that the records' `image` is relative to; default the data file's folder.
        bad_rows: "raise" ends at the first invalid record, "skip" leaves invalid records out and lists them.
    """

    model: str
    data: str
    store: str
    images: str | None = None
    bad_rows: BadRows = "raise"

    def __post_init__(self) -> None:
        for name in ("model", "data", "store", "images"):
            if path := getattr(self, name):
                object.__setattr__(self, name, absolute(path))
