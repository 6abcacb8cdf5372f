"""MoVAProcessor: turns conversations and images into the tensors that MoVA reads.

Shapes: B conversations, L tokens of a row, M images of the batch, T tokens of the gate's text, S the image size in pixels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, BertConfig, PreTrainedTokenizerBase, ProcessorMixin

from mova_core.chat_formats import CHAT_FORMATS, DEFAULT_TEMPLATE, END_MARKS, check_chat_format
from mova_core.config import MoVAConfig
from mova_core.data import IMAGE_MARK
from mova_core.experts import BASE, VisionExpert, expert_class
from mova_core.images import ImageSource

IGNORE = -100  # label of a position that carries no loss

Turns = Sequence[tuple[str, str]]  # (role, text), oldest first
Pictures = ImageSource | Sequence[ImageSource] | None  # of one conversation


class MoVAProcessor(ProcessorMixin):
    """Applies the chat template, tokenises for the LLM and for the gate, and preprocesses images, in one call.

    Args:
        tokenizer: of the LLM. Its chat template renders a conversation, in which `IMAGE_MARK` stands for an image.
        text_tokenizer: of the adapter's text encoder.
        base_arch: arch of the base encoder, which decides the preprocessing of images.
        image_tokens: visual tokens per image in the answer pass.
        routing_tokens: visual tokens per image in the routing pass.
        chat_template: replaces the tokenizer's own.
        chat_format: one of `CHAT_FORMATS`, for published weights; replaces the chat template.

    Raises:
        ValueError: `chat_format` is unknown, or the tokenizer has no `IMAGE_MARK` token.
    """

    tokenizer: Any  # ProcessorMixin sets every argument of its constructor as an attribute
    text_tokenizer: Any

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_tokenizer: PreTrainedTokenizerBase,
        base_arch: Mapping[str, Any] | None = None,
        image_tokens: int = 576,
        routing_tokens: int = 144,
        chat_template: str | None = None,
        chat_format: str | None = None,
    ):
        self.base_arch = dict(base_arch or {})
        self.image_tokens = image_tokens
        self.routing_tokens = routing_tokens
        self.chat_format = chat_format
        if chat_format is not None:
            check_chat_format(chat_format)
            chat_template = tokenizer.chat_template = CHAT_FORMATS[chat_format]
        super().__init__(tokenizer, text_tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.get_vocab().get(IMAGE_MARK, -1)
        if self.image_token_id < 0:
            raise ValueError(f"the tokenizer has no {IMAGE_MARK} token: add it as a special token")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "MoVAProcessor":
        """Loads a processor from a folder or the hub as transformers does, but never runs code of that folder.

        Without `trust_remote_code=False`, transformers asks on the terminal whether to run a class that
        tokenizer_config.json names.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            kwargs: as transformers' `from_pretrained` takes them; `trust_remote_code` is always False.

        Raises:
            OSError, ValueError: there is no such processor, or transformers does not have its tokenizer's class.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **(kwargs | {"trust_remote_code": False}))

    @classmethod
    def for_model(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        text_tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        chat_format: str | None = None,
    ) -> "MoVAProcessor":
        """Creates the processor of `model`, a `MoVAForConditionalGeneration` or its `MoVAConfig`.

        Args:
            tokenizer, text_tokenizer: of the LLM and of the adapter's text encoder.
            chat_template, chat_format: as the constructor takes them.

        Raises:
            ValueError: as the constructor and `check_fits`.
        """
        config = _config_of(model)
        counts = (config.base_arch, config.image_tokens, config.routing_tokens)
        processor = cls(tokenizer, text_tokenizer, *counts, chat_template=chat_template, chat_format=chat_format)
        processor.check_fits(config)
        return processor

    def check_fits(self, model: Any) -> None:
        """Compares this processor with `model`, a `MoVAForConditionalGeneration` or its `MoVAConfig`.

        Raises:
            ValueError: the model cannot take inputs of this processor; the message lists every difference.
        """
        config = _config_of(model)
        arch = {name: list(value) if isinstance(value, tuple) else value for name, value in self.base_arch.items()}
        vocabulary = BertConfig.from_dict(dict(config.adapter["text_encoder"])).vocab_size
        pairs = {
            "visual tokens per picture": (self.image_tokens, config.image_tokens),
            "visual tokens in the routing pass": (self.routing_tokens, config.routing_tokens),
            f"id of {IMAGE_MARK}": (self.image_token_id, config.image_token_id),
            "base_arch": (arch, config.base_arch),
            "gate's tokens": (min(len(self.text_tokenizer), vocabulary), len(self.text_tokenizer)),
        }
        differing = [f"{what} {own}, the model's {models}" for what, (own, models) in pairs.items() if own != models]
        if differing:
            raise ValueError(
                f"the processor does not fit the model: {'; '.join(differing)}. "
                "Fix: MoVAProcessor.for_model(model, tokenizer, text_tokenizer)"
            )

    @cached_property
    def base(self) -> VisionExpert:
        """The base encoder on the meta device, without weights, for its preprocessing."""
        with torch.device("meta"):
            return expert_class(BASE)(self.base_arch)

    def __call__(
        self,
        conversations: Sequence[Turns],
        images: Sequence[Pictures],
        routing: bool | Sequence[bool] = False,
        labels: bool = False,
        padding_side: str = "left",
        max_length: int | None = None,
        questions: Sequence[str | Sequence[str]] | None = None,
        pixels: bool = True,
    ) -> BatchFeature:
        """Builds the tensors of B conversations. Conversations with and without images may share a batch.

        Args:
            conversations: without `labels` each ends with the user's turn, to which the reply is generated. `IMAGE_MARK`
                in the text says where an image stands; without marks, all images stand before the first user turn.
            images: None, one image or several per conversation; M in all.
            routing: which conversations are a routing pass, with `routing_tokens` tokens per image.
            labels: also return `labels`: the ids of the assistant's turns and end marks, `IGNORE` elsewhere.
            padding_side: "left" or "right".
            max_length: most tokens of a row; default the tokenizer's `model_max_length`. With `labels` a longer row is
                cut at its end; without, it is refused.
            questions: text for the gate per conversation, or per image of the conversation; default the user's turns.
            pixels: also return `pixel_values` and the gate's text.

        Returns:
            input_ids and attention_mask (B, L) int64; pixel_values (M, 3, S, S) float32; text_input_ids and
            text_attention_mask (M, T) int64 for the gate; labels (B, L) int64 if `labels`. Images are in reading order,
            row by row.

        Raises:
            ValueError: images and marks differ in number, a question is empty, or a prompt or its images exceed
                `max_length`; the message names the conversation.
            ImageError: an image cannot be read.
        """
        as_routing = [routing] * len(conversations) if isinstance(routing, bool) else list(routing)
        shown = [_as_list(of_conversation) for of_conversation in images]
        if not len(conversations) == len(shown) == len(as_routing):
            counts = f"{len(conversations)} conversations, {len(shown)} images, {len(as_routing)} routing"
            raise ValueError(f"give one entry per conversation: got {counts}")
        rows = []
        for index, (turns, pictures, is_routing) in enumerate(zip(conversations, shown, as_routing, strict=True)):
            try:
                visual_tokens = self.routing_tokens if is_routing else self.image_tokens
                rows.append(self._tokens(turns, len(pictures), visual_tokens, labels, max_length))
            except ValueError as error:
                raise ValueError(f"conversation {index}: {error}") from None
        out = self._padded(rows, labels, padding_side)
        if pixels and any(shown):
            out["pixel_values"] = self.base.preprocess([image for row in shown for image in row])["pixel_values"]
            texts = questions if questions is not None else ["\n".join(gate_turns(turns)) for turns in conversations]
            out |= self.gate_text(_per_image(texts, [len(row) for row in shown]))
        return BatchFeature(out)

    def _padded(
        self, rows: Sequence[tuple[list[int], list[int]]], labels: bool, padding_side: str
    ) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and, if wanted, `labels` of rows of (ids, labels)."""
        pad = self.tokenizer.pad_token_id
        if pad is None and len(rows) > 1:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token to batch conversations")
        longest = max(len(ids) for ids, _ in rows)

        def fill(row: list[int], value: int) -> list[int]:
            padding = [value] * (longest - len(row))
            return padding + row if padding_side == "left" else row + padding

        out = {
            "input_ids": torch.tensor([fill(ids, pad) for ids, _ in rows]),
            "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows]),
        }
        if labels:
            out["labels"] = torch.tensor([fill(targets, IGNORE) for _, targets in rows])
        return out

    def gate_text(self, questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Input of the adapter's text encoder: `text_input_ids` and `text_attention_mask` (M, T) int64, T at most 512.

        A question has the published form: "question 0: <lower-case question>" and a blank line.
        """
        texts = [f"question 0: {question.lower()}\n\n" for question in questions]
        limit = min(512, self.text_tokenizer.model_max_length)
        encoded = self.text_tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"text_input_ids": encoded["input_ids"], "text_attention_mask": encoded["attention_mask"]}

    def decode(self, ids: torch.Tensor) -> str:
        """Decodes generated ids (L,) to text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _tokens(
        self, turns: Turns, pictures: int, visual_tokens: int, labels: bool, max_length: int | None
    ) -> tuple[list[int], list[int]]:
        """The ids and labels of one row. Training, generation and history split a prompt into the same tokens."""
        messages = _marked(turns, pictures, labels)
        text, replies = self._render(messages, labels)
        ids, places = self._encode(text, [place for span in replies for place in span])
        targets = [IGNORE] * len(ids)
        for begin, end in zip(places[::2], places[1::2], strict=True):
            targets[begin:end] = ids[begin:end]
        rows: tuple[list[int], list[int]] = ([], [])
        shown_until = 0
        for token, target in zip(ids, targets, strict=True):
            count = visual_tokens if token == self.image_token_id else 1
            rows[0].extend([token] * count)
            rows[1].extend([IGNORE if token == self.image_token_id else target] * count)
            shown_until = len(rows[0]) if token == self.image_token_id else shown_until
        limit = max_length if max_length is not None else self.tokenizer.model_max_length
        if shown_until > limit:
            raise ValueError(f"max_length {limit} cuts the picture's {visual_tokens} tokens: raise it")
        if not labels and len(rows[0]) > limit:
            raise ValueError(f"it has {len(rows[0])} tokens, over the context of {limit}: shorten the question")
        return rows[0][:limit], rows[1][:limit]

    def _render(self, messages: list[dict[str, str]], labels: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (begin, end) of each assistant turn in it, end mark included."""
        generate = messages[-1]["role"] != "assistant" and not labels
        text = self._template(messages, generate)
        replies = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:index], True) if index else ""
            after = self._template(messages[: index + 1], False)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "its chat template rewrites earlier turns, so no reply can be labelled: use another chat template"
                )
            end = after.find(self.tokenizer.eos_token or "\0", len(before) + len(message["content"]))
            end = end + len(self.tokenizer.eos_token) if end >= 0 else len(after)
            replies.append((len(before), end))
        return (text[: replies[-1][1]] if messages[-1]["role"] == "assistant" else text), replies

    def _template(self, messages: list[dict[str, str]], generate: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def _encode(self, text: str, places: list[int]) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the index of the token that begins at each of `places` (characters, ascending).

        Text between images is tokenised separately, as in the published code. Where a token would span a place, the text
        is tokenised in two parts, so that a prompt and its reply share no token: generation cannot share one either.
        """
        ids: list[int] = []
        indices: list[int] = []
        at = 0
        for number, chunk in enumerate(text.split(IMAGE_MARK)):
            if number:
                ids.append(self.image_token_id)
                at += len(IMAGE_MARK)
            end, special = at + len(chunk), number == 0 and self.chat_format is not None
            new = self.tokenizer.encode(text[at:end], add_special_tokens=special)
            while len(indices) < len(places) and places[len(indices)] <= end:
                place = places[len(indices)]
                head = self.tokenizer.encode(text[at:place], add_special_tokens=special)
                if new[: len(head)] == head:
                    indices.append(len(ids) + len(head))
                    continue
                ids += head
                at, special = place, False
                new = self.tokenizer.encode(text[at:end], add_special_tokens=False)
                indices.append(len(ids))
            ids += new
            at = end
        return ids, indices


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_format: str | None = None) -> None:
    """Adds to an LLM's tokenizer what `MoVAProcessor` needs: an image token, a pad token and a chat template.

    The id of the image token may exceed the LLM's vocabulary, because the model never looks up its embedding.

    Args:
        tokenizer: changed in place.
        chat_format: one of `CHAT_FORMATS`; its end mark becomes the end-of-sequence token, so that generation stops.

    Raises:
        ValueError: `chat_format` is unknown, or there is no end-of-sequence token, without which no reply ends.
    """
    end_mark = END_MARKS.get(check_chat_format(chat_format) or "")
    vocabulary = tokenizer.get_vocab()
    if IMAGE_MARK not in vocabulary:
        tokenizer.add_tokens([IMAGE_MARK], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if end_mark in vocabulary:
        tokenizer.eos_token = end_mark
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
    if tokenizer.chat_template is None and chat_format is None:
        begins = tokenizer("").input_ids[:1] == [
            tokenizer.bos_token_id
        ]  # the LLM was trained on texts that begin with this token
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE


def _config_of(model: Any) -> MoVAConfig:
    return model if isinstance(model, MoVAConfig) else model.config


def gate_turns(turns: Turns) -> list[str]:
    """The user's turns without image marks: the text for the gate's encoder."""
    return [text.replace(IMAGE_MARK, "").strip() for role, text in turns if role == "user"]


def _per_image(questions: Sequence[str | Sequence[str]], images: Sequence[int]) -> list[str]:
    """A question for each image of each conversation, where one question is that of all images of its conversation."""
    texts: list[str] = []
    for index, (question, count) in enumerate(zip(questions, images, strict=True)):
        of_images = [question] * count if isinstance(question, str) else question
        if len(of_images) != count:
            raise ValueError(f"conversation {index}: {len(of_images)} questions for {count} pictures")
        texts += of_images
    return texts


def _as_list(images: Pictures) -> list[ImageSource]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]


def _marked(turns: Turns, pictures: int, labels: bool) -> list[dict[str, str]]:
    """Chat messages with an `IMAGE_MARK` for every picture."""
    messages = [{"role": role, "content": text} for role, text in turns]
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    asks = [message for message in messages if message["role"] == "user"]
    if not messages or (not asks and (pictures or not labels)):
        raise ValueError("it asks nothing: give it a user turn")
    if not labels and not asks[-1]["content"].replace(IMAGE_MARK, "").strip():
        raise ValueError("its question is empty: ask something")
    if marks == 0 and pictures:
        asks[0]["content"] = f"{IMAGE_MARK}\n" * pictures + asks[0]["content"]
    elif marks > pictures:
        raise ValueError(f"{marks} {IMAGE_MARK} marks but {pictures} pictures: give the missing ones")
    elif marks < pictures:
        raise ValueError(f"{pictures} pictures but {marks} {IMAGE_MARK} marks: mark where each stands, or mark none")
    return messages


AutoProcessor.register(MoVAConfig, MoVAProcessor, exist_ok=True)
