"""The trained model as users load it: a folder that appears whole or not at all."""

from mova_core.io.atomic import atomic_path
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.train.parallel import Parallel

MODEL = "model"  # in a run's folder, once all steps are done


def write_model(folder: str, model: MoVAForConditionalGeneration, start: str, parallel: Parallel) -> None:
    """Writes the model, gathered on rank 0, and the processor of the model that training started from.

    Every rank must call it, because the ranks may hold a part of the model each.
    """
    weights = parallel.full_weights(model)
    if parallel.rank == 0:
        if model.has_llm_lora:
            weights = model.merge_llm_lora(weights)
        with atomic_path(folder) as draft:
            model.save_pretrained(draft, state_dict=weights)
            MoVAProcessor.from_pretrained(start).save_pretrained(draft)
