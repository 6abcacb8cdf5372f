"""Published MoVA checkpoints to this project's format and back."""

from mova_core.checkpoint.conversion import chosen_experts, convert, convert_back
from mova_core.checkpoint.names import from_published, to_published
from mova_core.checkpoint.tensors import stored_tensors, write_tensors

__all__ = [
    "chosen_experts",
    "convert",
    "convert_back",
    "from_published",
    "stored_tensors",
    "to_published",
    "write_tensors",
]
