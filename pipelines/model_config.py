"""The config.json of a MoVA model, read without torch and transformers; importing this module imports nothing heavy."""

import json
import os
from pathlib import Path
from typing import Any

from mova_core.io.uris import joined, local_path

MODEL_TYPE = "mova"  # `model_type` in the config.json of a MoVA model


def read_model_config(model: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a MoVA model.

    Args:
        model: its folder, or the folder's URL.

    Raises:
        ValueError: the folder holds no MoVA model.
    """
    try:
        config = json.loads(_read(joined(os.fspath(model), "config.json")))
        reason = "" if config["model_type"] == MODEL_TYPE else f"a model of type {config['model_type']!r}"
    except FileNotFoundError:
        reason = "no config.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} in config.json"
    if reason:
        raise ValueError(f"{model} is no MoVA model ({reason}): make one with `mova init` or `mova convert`")
    return config


def _read(location: str) -> bytes:
    if (path := local_path(location)) is not None:
        return Path(path).read_bytes()
    from mova_core.io.filesystem import read_file

    return read_file(location)
