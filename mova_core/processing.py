"""MoVAProcessor: conversations and pictures in, the tensors MoVA reads out.

Legend: B rows, L tokens, M pictures, T tokens of the gate's text.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from mova_core.data import IMAGE_MARK
from mova_core.experts import BASE, VisionExpert, expert_class
from mova_core.images import ImageSource

IGNORE = -100  # label of a position that carries no loss

Turns = Sequence[tuple[str, str]]  # (role, text), oldest first


class MoVAProcessor(ProcessorMixin):
    """Chat template, LLM tokens, the gate's text and the base encoder's pixels in one call.

    Args:
        tokenizer: the LLM's; its chat template renders a conversation and marks a picture with `IMAGE_MARK`.
        text_tokenizer: the adapter's text encoder's.
        base_arch: arch of the base encoder, which says how pictures become pixels.
        image_tokens: visual tokens per picture in the answer pass.
        routing_tokens: visual tokens per picture in the routing pass.
    """

    tokenizer: Any  # set by ProcessorMixin, as every argument that names one
    text_tokenizer: Any

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_tokenizer: PreTrainedTokenizerBase,
        base_arch: Mapping[str, Any] | None = None,
        image_tokens: int = 576,
        routing_tokens: int = 144,
        chat_template: str | None = None,
    ):
        self.base_arch = dict(base_arch or {})
        self.image_tokens = image_tokens
        self.routing_tokens = routing_tokens
        super().__init__(tokenizer, text_tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.get_vocab().get(IMAGE_MARK, -1)
        if self.image_token_id < 0:
            raise ValueError(f"the tokenizer has no {IMAGE_MARK} token: add it as a special token")

    @cached_property
    def base(self) -> VisionExpert:
        """The base encoder without weights: only its preprocessing is used."""
        with torch.device("meta"):
            return expert_class(BASE)(self.base_arch)

    def __call__(
        self,
        conversations: Sequence[Turns],
        images: Sequence[ImageSource | None],
        routing: bool | Sequence[bool] = False,
        labels: bool = False,
        padding_side: str = "left",
        max_length: int | None = None,
        questions: Sequence[str] | None = None,
        pixels: bool = True,
    ) -> BatchFeature:
        """Tensors of B conversations.

        Args:
            conversations: without `labels` each ends with the user's turn and the reply is to be generated.
            images: one picture or None per conversation; M of them are pictures.
            routing: which rows are a routing pass and show the picture in `routing_tokens` tokens.
            labels: also return `labels` (B, L): the assistant's words and the end mark; `IGNORE` elsewhere.
            max_length: longest row in tokens; a longer one loses its end.
            questions: what the gate reads per row; default the row's user turns.
            pixels: also prepare the pictures and the gate's text.

        Returns:
            input_ids and attention_mask (B, L) int64; pixel_values (M, 3, S, S) float32; text_input_ids and
            text_attention_mask (M, T) int64 for the gate; labels (B, L) int64 when asked for.

        Raises:
            ValueError: a row whose picture does not fit into `max_length`.
            ImageError: a picture that cannot be read.
        """
        as_routing = [routing] * len(conversations) if isinstance(routing, bool) else list(routing)
        rows = [
            self._tokens(
                turns, image is not None, self.routing_tokens if rout else self.image_tokens, labels, max_length
            )
            for turns, image, rout in zip(conversations, images, as_routing, strict=True)
        ]
        pad = self.tokenizer.pad_token_id
        longest = max(len(ids) for ids, _ in rows)

        def padded(row: list[int], value: int) -> list[int]:
            filling = [value] * (longest - len(row))
            return filling + row if padding_side == "left" else row + filling

        out = {
            "input_ids": torch.tensor([padded(ids, pad) for ids, _ in rows]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
        }
        if labels:
            out["labels"] = torch.tensor([padded(targets, IGNORE) for _, targets in rows])
        shown = [image for image in images if image is not None]
        if shown and pixels:
            out["pixel_values"] = self.base.preprocess(shown)["pixel_values"]
            asked = questions if questions is not None else ["\n".join(gate_turns(turns)) for turns in conversations]
            out |= self.gate_text([text for text, image in zip(asked, images, strict=True) if image is not None])
        return BatchFeature(out)

    def gate_text(self, questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the adapter's text encoder reads: `text_input_ids` and `text_attention_mask` (M, T), at most 512 tokens.

        The published form is "question 0: <lower-case question>" and a blank line.
        """
        texts = [f"question 0: {question.lower()}\n\n" for question in questions]
        limit = min(512, self.text_tokenizer.model_max_length)
        encoded = self.text_tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"text_input_ids": encoded["input_ids"], "text_attention_mask": encoded["attention_mask"]}

    def decode(self, ids: torch.Tensor) -> str:
        """Generated ids (L,) to text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _tokens(
        self, turns: Turns, pictured: bool, visual_tokens: int, labels: bool, max_length: int | None
    ) -> tuple[list[int], list[int]]:
        """One row's ids and labels. A reply is tokenised by itself, so training and generation cut it alike."""
        messages = [{"role": role, "content": text} for role, text in turns]
        if pictured:
            first = next(index for index, message in enumerate(messages) if message["role"] == "user")
            messages[first]["content"] = f"{IMAGE_MARK}\n{messages[first]['content']}"
        ids: list[int] = []
        targets: list[int] = []
        rendered = ""
        replies = [index for index, (role, _) in enumerate(turns) if role == "assistant"] if labels else [len(turns)]
        for index in replies:
            text = self.tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            new = self.tokenizer.encode(text.removeprefix(rendered), add_special_tokens=False)
            ids += new
            targets += [IGNORE] * len(new)
            if labels:
                reply = self.tokenizer.encode(messages[index]["content"], add_special_tokens=False)
                reply.append(self.tokenizer.eos_token_id)
                ids += reply
                targets += reply
                rendered = self.tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if pictured:
            at = ids.index(self.image_token_id)
            ids[at : at + 1] = [self.image_token_id] * visual_tokens
            targets[at : at + 1] = [IGNORE] * visual_tokens
            if max_length is not None and at + visual_tokens > max_length:
                raise ValueError(f"max_length {max_length} cuts the picture's {visual_tokens} tokens: raise it")
        return ids[:max_length], targets[:max_length]


def gate_turns(turns: Turns) -> list[str]:
    """The user's turns: what the gate's text encoder reads."""
    return [text for role, text in turns if role == "user"]
