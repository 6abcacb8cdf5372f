"""Two-stage batched inference: route -> fetch -> fuse -> generate (paper section 3.1).

The base encoder runs once per picture and its tokens serve both passes; experts run only where the router asked.
"""

import time
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mova_core.features import FeatureSource
from mova_core.images import ImageRef
from mova_core.model import MoVAForConditionalGeneration, stack_features
from mova_core.processing import MoVAProcessor
from mova_core.routing import build_routing_prompt, read_reply

ROUTER_TOKENS = 16  # most tokens a router may say (published: 16)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question on one picture."""

    image: ImageRef
    text: str
    experts: tuple[str, ...] | None = None  # forced routing; None asks the router


@dataclass(kw_only=True)
class Answer:
    """What was said, and why."""

    text: str
    experts: list[str]  # routed, in the order the router named them
    router: str | None  # the router's own words; None where routing was forced
    readable: bool = True  # False: the router's words named nothing, so no expert was used
    gates: list[dict[str, float]] = field(default_factory=list)  # per adapter block: weight of each routed expert
    seconds: dict[str, float] = field(default_factory=dict)  # per step, of the whole batch


class Answerer:
    """Answers batches of questions with one model and one source of features."""

    def __init__(self, model: MoVAForConditionalGeneration, processor: MoVAProcessor, source: FeatureSource):
        self.model = model.eval()
        self.processor = processor
        self.source = source
        self.pool = model.config.experts
        self.seconds: dict[str, float] = {}

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[Question],
        max_new_tokens: int = 32,
        forbid: Collection[str] = (),
        max_experts: int | None = None,
    ) -> list[Answer]:
        """Answers in the order of `questions`, greedily.

        Args:
            questions: one batch; it runs at once, so its size is bounded by the device's memory.
            max_new_tokens: longest answer, in tokens.
            forbid: experts that may not be used, whatever the router says.
            max_experts: most experts per question; default the model's own for routed ones, no limit for forced ones.

        Raises:
            ValueError: an expert name that the model's pool does not have, or an empty question.
            ImageError: a picture that cannot be read.
            MissingFeatures: the source has no features for a routed expert and cannot make them.
        """
        self.seconds = {}
        self._check(questions, forbid)
        with self._step("preprocess"):
            batch = self._tokens([question.text for question in questions], questions, routing=False)
        with self._step("base encoder"):
            base = self.model.encode_base(batch["pixel_values"])
            text = self.model.adapter.encode_text(batch["text_input_ids"], batch["text_attention_mask"])
        with self._step("routing"):
            answers = self._route(questions, base, text, forbid, max_experts)
        with self._step("experts"):
            rows = self.source.fetch([question.image for question in questions], [answer.experts for answer in answers])
        with self._step("fusion"):
            routing = torch.tensor([[name in answer.experts for name in self.pool] for answer in answers])
            routing = routing.to(base.device)
            experts = stack_features(rows, self.pool, base.device, base.dtype)
            visual, gates = self.model.encode_image(base, text, experts, routing)
        with self._step("answer"):
            said = self._generate(batch, visual, max_new_tokens)
        for index, answer in enumerate(answers):
            answer.text = said[index]
            answer.seconds = self.seconds
            answer.gates = [
                {name: float(block[index, self.pool.index(name)]) for name in answer.experts} for block in gates
            ]
        return answers

    def _check(self, questions: Sequence[Question], forbid: Collection[str]) -> None:
        named = {name for question in questions for name in question.experts or ()} | set(forbid)
        if unknown := sorted(named - set(self.pool)):
            raise ValueError(f"no expert {', '.join(unknown)} in this model's pool ({', '.join(self.pool)})")
        if any(not question.text.strip() for question in questions):
            raise ValueError("a question is empty: ask something")

    def _route(
        self,
        questions: Sequence[Question],
        base: torch.Tensor,
        text: torch.Tensor,
        forbid: Collection[str],
        max_experts: int | None,
    ) -> list[Answer]:
        """One answer per question with its experts chosen and its text still empty."""
        asked = [index for index, question in enumerate(questions) if question.experts is None]
        replies: dict[int, str] = {}
        if asked:
            prompts = [build_routing_prompt(questions[index].text, self.model.config.descriptions) for index in asked]
            batch = self._tokens(prompts, [questions[index] for index in asked], routing=True)
            visual, _ = self.model.encode_image(base[asked], text[asked], coarse=True)
            with self.model.expert_routing():
                replies = dict(zip(asked, self._generate(batch, visual, ROUTER_TOKENS), strict=True))
        answers = []
        for index, question in enumerate(questions):
            reply = replies.get(index)
            chosen = question.experts
            if chosen is None:
                named = read_reply(reply or "", len(self.pool), len(self.pool))
                chosen = tuple(self.pool[number] for number in named or ())
            cap = self.model.config.max_experts if max_experts is None and question.experts is None else max_experts
            experts = [name for name in chosen if name not in forbid][:cap]
            readable = reply is None or named is not None
            answers.append(Answer(text="", experts=experts, router=reply, readable=readable))
        return answers

    def _tokens(self, prompts: Sequence[str], questions: Sequence[Question], routing: bool) -> dict[str, torch.Tensor]:
        images = [question.image for question in questions]
        conversations = [[("user", prompt)] for prompt in prompts]
        gate = [question.text for question in questions]
        batch = self.processor(conversations, images, routing=routing, questions=gate, pixels=not routing)
        return dict(batch.to(self.model.device))

    def _generate(self, batch: dict[str, torch.Tensor], visual: torch.Tensor, max_new_tokens: int) -> list[str]:
        embeds = self.model.embed(batch["input_ids"], visual)
        tokenizer = self.processor.tokenizer
        ids = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return [self.processor.decode(row) for row in ids]

    @contextmanager
    def _step(self, name: str):
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.seconds[name] = time.perf_counter() - started
