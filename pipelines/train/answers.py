"""Whether the samples of a run teach anything: a template that does not fit the model leaves no token to learn.

LLaVA's trainer goes on with a loss of 0 then (https://github.com/haotian-liu/LLaVA/issues/1166).
"""

import random
import sys
from collections.abc import Sequence

from mova_core.data import DataError
from mova_core.images import ImageRef
from mova_core.processing import IGNORE, MoVAProcessor, Turns
from mova_core.routing.augmentation import routing_turns
from pipelines.read_data import read_pool
from pipelines.train.config import TrainConfig
from pipelines.train.data import TrainingData

PROBED = 256  # samples
SHARE = 0.01  # of them that may have no answer token


def check_answers(data: TrainingData) -> None:
    """Tokenises `PROBED` random samples as the stage will, before any worker starts. Needs the model's tokenizer.

    Raises:
        DataError: over `SHARE` of them have no token to learn; names the first one, the reason and the fix.
    """
    config, samples = data.config, data.samples
    if config.stage == "light-router":  # learns labels, no text
        return
    processor = MoVAProcessor.from_pretrained(config.model)
    pool = read_pool(config.model)
    probed = random.Random(config.seed).sample(range(len(samples)), min(PROBED, len(samples)))
    wrong: list[tuple[int, str]] = []
    for position in sorted(probed):
        sample = samples[position]
        routing = config.stage == "router" or bool(data.rows["routing"][position])
        turns = routing_turns(sample.question, sample.routing or (), pool) if routing else sample.turns
        if reason := _reason(processor, config, turns, sample.images, routing):
            wrong.append((position, reason))
    if len(wrong) > SHARE * len(probed):
        position, reason = wrong[0]
        raise DataError(
            f"{len(wrong)} of {len(probed)} probed records have no answer token to learn "
            f"(the first: {samples.where(position)}): {reason}"
        )


def _reason(
    processor: MoVAProcessor, config: TrainConfig, turns: Turns, images: Sequence[ImageRef], routing: bool
) -> str | None:
    """Why a conversation has no token to learn, and the fix; None where it has one."""

    def learns(max_length: int) -> bool:
        row = processor([turns], [list(images)], routing, labels=True, max_length=max_length, pixels=False)
        return bool((row["labels"][:, 1:] != IGNORE).any())

    try:
        if learns(config.max_length):
            return None
        if learns(sys.maxsize):
            return f"--max-length {config.max_length} cuts off its whole answer: raise it"
    except ValueError as error:
        return str(error).removeprefix("conversation 0: ")
    template = f"the chat format {processor.chat_format}" if processor.chat_format else "the tokenizer's chat template"
    return f"{template} of {config.model} renders no word of its answer: make the model with another, `mova init --chat-format`"
