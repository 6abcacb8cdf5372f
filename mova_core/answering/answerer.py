"""Two-stage batched inference: route -> fetch -> fuse -> generate (paper section 3.1).

A picture's base tokens are computed once and serve both passes and every question on it; one routing pass serves equal
questions on equal pictures; experts run only where the router asked, and their features are fetched in a thread from the
moment a row of the routing pass is done, while the other rows are still being routed. A conversation that goes on, or a
second question on a picture, is read by the LLM only from where it differs from what the LLM read before.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from mova_core.assemble import stack_features
from mova_core.data import IMAGE_MARK
from mova_core.experts import BASE, Features
from mova_core.features import FeatureSource
from mova_core.images import ImageRef, PreprocessingMode
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.routing.prompt import build_routing_prompt, parse_routing, read_reply

PLAIN = "without experts"  # what a picture's visual tokens without any expert are kept as
ROUTER_TOKENS = 16  # most tokens a router may say (published: 16)
CONVERSATIONS = 32  # most that the LLM's keys and values are kept of, however small they are
# Sampling in which one reply is read, token by token: its keys and values can be kept.
ONE_PATH = {"do_sample", "temperature", "top_k", "top_p", "min_p", "streamer"}

Router = Literal["llm", "light"]
ROUTERS: tuple[Router, ...] = ("llm", "light")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, with the pictures it is about and what was said before.

    The router and the gate read all that the user asked in the conversation, as in training.
    """

    text: str
    image: ImageRef | Sequence[ImageRef] | None = None  # several in the order of their <image> marks, or none marked
    history: Sequence[tuple[str, str]] = ()  # earlier turns (role, text), oldest first
    experts: Sequence[str] | None = None  # forced routing; None asks the router
    forbid: Sequence[str] = ()  # experts that may not be used, whatever the router says
    max_experts: int | None = None  # default the model's own for routed ones, no limit for forced ones
    budget: float | None = None  # most that the experts may cost together, in the unit of the Answerer's `costs`


@dataclass(kw_only=True)
class Answer:
    """What was said, and why."""

    text: str = ""
    experts: list[str] = field(default_factory=list)  # used, in the order the router named them
    router: str | None = None  # the router's own words; None where it was not asked
    readable: bool = True  # False: the router's words named nothing, so no expert was used
    gates: list[dict[str, float]] = field(default_factory=list)  # per adapter block: weight of each expert used
    seconds: dict[str, float] = field(default_factory=dict)  # per step, of the whole batch
    reused_tokens: int = 0  # of the prompt, visual ones included, whose keys and values the LLM still had


@dataclass(frozen=True)
class _View:
    """One picture as one question sees it; equal views have equal visual tokens."""

    key: str  # of the picture
    experts: frozenset[str] = frozenset()
    asked: str = ""  # what the gate reads; empty without experts, as then it weighs nothing


@dataclass(kw_only=True)
class _Row:
    """A question on its way to its answer."""

    question: Question
    images: list[ImageRef]
    asked: str  # all that the user asked, without image marks
    answer: Answer = field(default_factory=Answer)

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [*self.question.history, ("user", self.question.text)]

    @property
    def views(self) -> list[_View]:
        experts = frozenset(self.answer.experts)
        return [_View(image.key, experts, self.asked if experts else "") for image in self.images]


class Answerer:
    """Answers batches of questions with one model and one source of features.

    Args:
        model, processor: as saved together.
        source: where experts' features come from.
        router: "llm" asks the LLM, with its expert-routing LoRA if it has one; "light" the model's light router.
        costs: expert -> what it costs per picture, in FLOP, milliseconds or any one unit; a question's `budget` needs it.
        compat: "published" reads pictures and the router's reply as the published code does, flaws included.
        keep_bytes: how much to keep in memory for later turns and questions: half of it for base tokens and features,
            half for the LLM's keys and values of what it read. These serve batches of one, of an LLM whose every layer
            keeps all it reads (no sliding window) and whose positions do not depend on the length read.

    Raises:
        ValueError: router "light" of a model that has none.
    """

    def __init__(
        self,
        model: MoVAForConditionalGeneration,
        processor: MoVAProcessor,
        source: FeatureSource,
        *,
        router: Router = "llm",
        costs: Mapping[str, float] | None = None,
        compat: PreprocessingMode = "fixed",
        keep_bytes: int = 2**30,
    ):
        if router not in ROUTERS:
            raise ValueError(f"no router {router!r}: there are {', '.join(ROUTERS)}")
        if router == "light" and model.light_router is None:
            raise ValueError("this model has no light router: add_light_router() and train it, or use router='llm'")
        self.model = model.eval()
        self.processor = processor
        self.source = source
        self.router = router
        self.costs = dict(costs or {})
        self.compat = compat
        self.pool = model.config.experts
        self._kept = _Kept(keep_bytes // 2)
        self._said = _Said(0 if _rescales(model.config.text_config) else keep_bytes // 2)
        self._seconds: dict[str, float] = {}

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], max_new_tokens: int = 32, **sampling: Any) -> list[Answer]:
        """Answers in the order of `questions`, greedily unless `sampling` says otherwise.

        Experts are chosen in this order: forced or routed; without the forbidden; at most `max_experts`, first named
        first; then, within the budget, each in turn that what is left of it still pays for.

        Args:
            questions: one batch, of any mix of pictures and turns; it runs at once, so the device's memory bounds it.
            max_new_tokens: longest answer, in tokens.
            sampling: for the answer's `generate` of transformers: `do_sample`, `temperature`, `streamer` (of one question).

        Raises:
            ValueError: a question that is empty or too long for the LLM, pictures that do not match its image marks, an
                expert that the pool does not have, or features that do not fit; it names which.
            ImageError: a picture that cannot be read.
            MissingFeatures: the source has no features for a routed expert and cannot make them.
        """
        self._seconds = dict.fromkeys(
            ("preprocess", "base encoder", "routing", "experts", "fusion", "first token", "answer"), 0.0
        )
        rows = [self._read(number, question) for number, question in enumerate(questions, 1)]
        if not rows:
            return []
        fused: dict[_View, tuple[Tensor, list[Tensor]]] = {}
        with _Fetching(self.source, self._kept) as fetching:
            for row in rows:
                if row.question.experts is not None:
                    self._choose(row, list(row.question.experts), fetching)
            base = self._base(rows)
            with self._step("routing"):
                asking = [row for row in rows if row.question.experts is None and row.images]
                route = self._ask_llm if self.router == "llm" else self._ask_light_router
                if asking:
                    route(asking, base, fused, fetching)
            with self._step("preprocess"):  # in the time that the features take to come
                batch = self._tokens([row.turns for row in rows], rows, max_new_tokens)
                texts = self._gate_texts(rows)
            with self._step("experts"):
                features = fetching.done()
            with self._step("fusion"):
                self._fuse([view for row in rows for view in row.views], base, fused, texts, features)
                visual = [fused[view][0] for row in rows for view in row.views]
                embeds = self.model.embed(batch["input_ids"], visual)
        clock = _Clock()
        own_cache = self.model.language_model.generation_config.cache_implementation  # takes no other beside it
        past = None
        if alone := len(rows) == 1 and sampling.keys() <= ONE_PATH and own_cache is None:
            read = self._read_by_llm(batch["input_ids"][0], rows[0].views)
            past = self._said.begun(read)
            rows[0].answer.reused_tokens = past.get_seq_length() if past else 0
        out = self._generate(embeds, batch["attention_mask"], max_new_tokens, [clock], past_key_values=past, **sampling)
        if alone:
            self._said.put(read, out.sequences[0].tolist(), out.past_key_values)
        self._seconds["first token"] = clock.first_token
        self._seconds["answer"] = time.perf_counter() - clock.started - clock.first_token
        for row, ids in zip(rows, out.sequences, strict=True):
            row.answer.text = self.processor.decode(ids)
            row.answer.seconds = self._seconds
            row.answer.gates = self._gates(row, fused)
        return [row.answer for row in rows]

    def _read(self, number: int, question: Question) -> _Row:
        """The question with its pictures as a list, once it is known to be sound."""
        given = question.image
        images = [] if given is None else [given] if isinstance(given, ImageRef) else list(given)
        said = [text for role, text in (*question.history, ("user", question.text)) if role == "user"]
        marks = sum(text.count(IMAGE_MARK) for text in said)
        asked = [text.replace(IMAGE_MARK, "").strip() for text in said]
        if not asked[-1]:
            raise ValueError(f"question {number} is empty: ask something")
        if marks and marks != len(images):
            raise ValueError(
                f"question {number} has {marks} {IMAGE_MARK} marks but {len(images)} pictures: give one for each mark"
            )
        named = {*(question.experts or ()), *question.forbid}
        if unknown := sorted(named - set(self.pool)):
            raise ValueError(f"no expert {', '.join(unknown)} in this model's pool ({', '.join(self.pool)})")
        if question.experts and not images:
            raise ValueError(f"question {number} forces {', '.join(question.experts)} but has no picture for them")
        if question.budget is not None and (unpriced := [name for name in self.pool if name not in self.costs]):
            raise ValueError(
                f"question {number} has a budget, but {', '.join(unpriced)} no cost: give Answerer(costs=...)"
            )
        return _Row(question=question, images=images, asked="\n".join(asked))

    def _choose(self, row: _Row, named: list[str], fetching: "_Fetching") -> None:
        """Settles the experts of a row from those that were named, best first, and starts to fetch their features."""
        question = row.question
        cap = question.max_experts
        if cap is None and question.experts is None and self.compat == "fixed":
            cap = self.model.config.max_experts
        allowed = [name for name in dict.fromkeys(named) if name not in question.forbid][:cap]
        left = float("inf") if question.budget is None else question.budget
        for name in allowed:
            cost = len(row.images) * self.costs.get(name, 0.0)
            if cost <= left:
                left -= cost
                row.answer.experts.append(name)
        fetching.want(row.images, row.answer.experts)

    def _base(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Base tokens (N, C) by picture key, each computed once."""
        images = {image.key: image for row in rows for image in row.images}
        kept = {key: self._kept.get(key, BASE) for key in images}
        new = [key for key, features in kept.items() if features is None]
        base = {key: features.tokens for key, features in kept.items() if features is not None}
        if new:
            encoder = self.model.base_encoder
            with self._step("preprocess"), ThreadPoolExecutor(os.cpu_count()) as threads:
                one = lambda key: encoder.preprocess([images[key]], self.compat)["pixel_values"]  # noqa: E731
                pixels = torch.cat(list(threads.map(one, new))).to(self.model.device)
            with self._step("base encoder"):
                for key, tokens in zip(new, self.model.encode_base(pixels), strict=True):
                    base[key] = tokens
                    self._kept.put(key, BASE, Features(tokens.clone(), encoder.grid))
        return base

    def _ask_llm(
        self,
        rows: Sequence[_Row],
        base: Mapping[str, Tensor],
        fused: dict[_View, tuple[Tensor, list[Tensor]]],
        fetching: "_Fetching",
    ) -> None:
        """One routing pass per different question; a row's features are asked for when its reply is complete."""
        same: dict[tuple[str, ...], list[_Row]] = {}
        for row in rows:
            same.setdefault((row.asked, *(image.key for image in row.images)), []).append(row)
        groups = list(same.values())
        firsts = [group[0] for group in groups]
        prompts = [build_routing_prompt(row.asked, self.model.config.descriptions) for row in firsts]
        batch = self._tokens([[("user", prompt)] for prompt in prompts], firsts, ROUTER_TOKENS, routing=True)
        views = [_View(image.key) for row in firsts for image in row.images]
        self._fuse(views, base, fused)
        visual = self.model.coarsen(torch.stack([fused[view][0] for view in dict.fromkeys(views)]))
        shown = dict(zip(dict.fromkeys(views), visual, strict=True))
        embeds = self.model.embed(batch["input_ids"], [shown[view] for view in views])

        def heard(index: int, reply: str) -> None:
            for row in groups[index]:
                row.answer.router = reply
                named = self._named(reply)
                row.answer.readable = named is not None
                self._choose(row, [self.pool[number] for number in named or ()], fetching)

        listener = _Listener(self.processor, heard)
        with self.model.expert_routing():
            self._generate(embeds, batch["attention_mask"], ROUTER_TOKENS, [listener])
        listener.finish()

    def _named(self, reply: str) -> list[int] | None:
        if self.compat == "published":
            return [
                index for index, chosen in enumerate(parse_routing(reply, len(self.pool), compat="published")) if chosen
            ]
        return read_reply(reply, len(self.pool), len(self.pool))

    def _ask_light_router(
        self,
        rows: Sequence[_Row],
        base: Mapping[str, Tensor],
        fused: dict[_View, tuple[Tensor, list[Tensor]]],
        fetching: "_Fetching",
    ) -> None:
        assert self.model.light_router is not None
        text = self._encode_texts([row.asked for row in rows])
        seen = [torch.stack([base[image.key].mean(0) for image in row.images]).mean(0) for row in rows]
        logits = self.model.light_router(torch.stack([text[row.asked] for row in rows]), torch.stack(seen))
        for row, each in zip(rows, logits, strict=True):
            chosen = self.model.light_router.choose(each, len(self.pool))
            row.answer.router = ", ".join(f"{self.pool[index]} {chance:.2f}" for index, chance in chosen) or "none"
            self._choose(row, [self.pool[index] for index, _ in chosen], fetching)

    def _tokens(
        self, conversations: Sequence[Any], rows: Sequence[_Row], new_tokens: int, routing: bool = False
    ) -> dict[str, Tensor]:
        """Left-padded `input_ids` and `attention_mask` of one pass, in which every row leaves room for its reply."""
        images = [row.images if len(row.images) > 1 else next(iter(row.images), None) for row in rows]
        batch = self.processor(conversations, images, routing=routing, pixels=False)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        for row, length in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True):
            if limit is not None and length + new_tokens > limit:
                what = "routing prompt" if routing else "conversation"
                raise ValueError(
                    f"question {row.question.text[:40]!r}: its {what} has {length} tokens and the reply up to {new_tokens}, "
                    f"but the LLM reads {limit}: shorten it"
                )
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _read_by_llm(self, input_ids: Tensor, views: Sequence[_View]) -> list[int | _View]:
        """What stands at each position of a prompt (L,): the token, or the picture's view whose visual token it is."""
        visual = iter([view for view in views for _ in range(self.model.config.image_tokens)])
        return [next(visual) if token == self.model.config.image_token_id else token for token in input_ids.tolist()]

    def _gate_texts(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Gate features (T,) of what was asked where an expert was chosen."""
        return self._encode_texts([row.asked for row in rows if row.answer.experts])

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        ids = {name: value.to(self.model.device) for name, value in self.processor.gate_text(distinct).items()}
        return dict(
            zip(
                distinct, self.model.adapter.encode_text(ids["text_input_ids"], ids["text_attention_mask"]), strict=True
            )
        )

    def _fuse(
        self,
        views: Sequence[_View],
        base: Mapping[str, Tensor],
        fused: dict[_View, tuple[Tensor, list[Tensor]]],
        texts: Mapping[str, Tensor] | None = None,
        features: Mapping[tuple[str, str], Features] | None = None,
    ) -> None:
        """Adds the visual tokens (n, D) and gate weights (E,) per block of the views that are not there yet.

        A view without experts is the same for every question, so it is kept for later ones as base tokens are.
        """
        for view in dict.fromkeys(views):
            if not view.experts and view not in fused and (plain := self._kept.get(view.key, PLAIN)) is not None:
                fused[view] = plain.tokens, []
        new = [view for view in dict.fromkeys(views) if view not in fused]
        if not new:
            return
        tokens = torch.stack([base[view.key] for view in new])
        routing = torch.tensor([[name in view.experts for name in self.pool] for view in new])
        rows = [{name: (features or {})[view.key, name] for name in view.experts} for view in new]
        experts = stack_features(rows, self.pool, tokens.device, tokens.dtype)
        text = None
        if texts:
            silent = torch.zeros_like(next(iter(texts.values())))
            text = torch.stack([texts.get(view.asked, silent) for view in new])
        visual, gates = self.model.encode_image(tokens, text, experts, routing.to(tokens.device))
        side = self.model.config.adapter["grid"] // 2
        for at, view in enumerate(new):
            fused[view] = visual[at], [gate[at] for gate in gates]
            if not view.experts:
                self._kept.put(view.key, PLAIN, Features(visual[at].clone(), (side, side)))

    def _gates(self, row: _Row, fused: Mapping[_View, tuple[Tensor, list[Tensor]]]) -> list[dict[str, float]]:
        """Per block the weights of the row's experts, averaged over its pictures."""
        if not row.answer.experts:
            return [{} for _ in range(self.model.adapter.config.blocks if row.images else 0)]
        blocks = zip(*(fused[view][1] for view in row.views), strict=True)
        means = [torch.stack(block).mean(0).tolist() for block in blocks]
        return [{name: mean[self.pool.index(name)] for name in row.answer.experts} for mean in means]

    def _generate(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        listeners: Sequence[StoppingCriteria],
        **options: Any,
    ) -> Any:
        """What transformers' `generate` returns; greedy unless `options` say otherwise."""
        tokenizer = self.processor.tokenizer
        defaults = {
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        }
        return self.model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList(listeners),
            return_dict_in_generate=True,
            **(defaults | options),
        )

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self._seconds[name] += time.perf_counter() - started


class _Listener(StoppingCriteria):
    """Stops nothing; tells of each row's reply as soon as its end mark is there."""

    def __init__(self, processor: MoVAProcessor, heard: Callable[[int, str], None]):
        self.processor, self.heard = processor, heard
        self.ids: Tensor | None = None
        self.told: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.ids = input_ids
        ended = (input_ids[:, -1] == self.processor.tokenizer.eos_token_id).tolist()
        self._tell([index for index, end in enumerate(ended) if end])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Tells of the replies that came to no end."""
        assert self.ids is not None
        self._tell(range(len(self.ids)))

    def _tell(self, rows: Sequence[int]) -> None:
        for index in rows:
            if index not in self.told:
                self.told.add(index)
                assert self.ids is not None
                self.heard(index, self.processor.decode(self.ids[index]))


class _Clock(StoppingCriteria):
    """Stops nothing; knows when the first token was there, in seconds."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_token = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if not self.first_token:
            input_ids[:, -1].tolist()  # waits for the device
            self.first_token = time.perf_counter() - self.started
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Kept:
    """Features by (picture key, expert) in memory, the longest unused let go first."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[tuple[str, str], Features] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: str, expert: str) -> Features | None:
        with self.lock:
            if (key, expert) in self.entries:
                self.entries.move_to_end((key, expert))
            return self.entries.get((key, expert))

    def put(self, key: str, expert: str, features: Features) -> None:
        with self.lock:
            if (key, expert) not in self.entries:
                self.entries[key, expert] = features
                self.bytes += features.tokens.nbytes
            while self.bytes > self.limit:
                self.bytes -= self.entries.popitem(last=False)[1].tokens.nbytes


@dataclass(frozen=True)
class _Conversation:
    """What the LLM read and said, and the keys and values (1, H, L, d) per layer that came of it."""

    read: list[int | _View]  # per position; longer than L by what was said last
    prompt: int  # how many of them were read before the reply
    layers: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def common(self, read: Sequence[int | _View]) -> int:
        """How many positions from the first on hold the same, so have the same keys and values."""
        length = min(len(read), self.layers[0][0].shape[-2])
        return next((at for at in range(length) if self.read[at] != read[at]), length)


class _Said:
    """The last conversations with the LLM, for those that begin like one of them; the longest unused let go first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.conversations: list[_Conversation] = []
        self.lock = threading.Lock()

    def begun(self, read: Sequence[int | _View]) -> DynamicCache | None:
        """Keys and values of the longest beginning the LLM has read; the last token is left for it to go on from."""
        with self.lock:
            begun = [conversation.common(read[:-1]) for conversation in self.conversations]
            length = max(begun, default=0)
            if not length:
                return None
            last = self.conversations.pop(begun.index(length))
            self.conversations.append(last)
        return DynamicCache([(keys[..., :length, :], values[..., :length, :]) for keys, values in last.layers])

    def put(self, read: Sequence[int | _View], said: Sequence[int], cache: Any) -> None:
        """Keeps a reply's cache, in place of those of the turns before it, if it holds every position of one row."""
        layers = getattr(cache, "layers", [])
        if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
            return  # a sliding window or a state of its own: it cannot be cut back
        kept = [(layer.keys, layer.values) for layer in layers]
        new = _Conversation([*read, *said], len(read), kept)
        if len(new.layers[0][0]) > 1 or new.nbytes > self.limit:
            return
        with self.lock:
            others = [one for one in self.conversations if one.common(read) < one.prompt]
            self.conversations = [*others, new][-CONVERSATIONS:]
            while sum(one.nbytes for one in self.conversations) > self.limit:
                del self.conversations[0]


def _rescales(llm: Any) -> bool:
    """Whether the LLM turns its keys by how long all it reads is, so that those of a beginning are not its own."""
    rope = str(getattr(llm, "rope_parameters", None))
    return "dynamic" in rope or "longrope" in rope


class _Fetching:
    """Fetches features in a thread of its own. What is wanted while a fetch runs goes into the next one, all together."""

    def __init__(self, source: FeatureSource, kept: _Kept):
        self.source, self.kept = source, kept
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self.wanted: dict[tuple[str, str], ImageRef] = {}
        self.found: dict[tuple[str, str], Features] = {}
        self.asked: set[tuple[str, str]] = set()
        self.lock = threading.Lock()
        self.fetches: list[Future[None]] = []

    def __enter__(self) -> "_Fetching":
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def want(self, images: Sequence[ImageRef], experts: Sequence[str]) -> None:
        """Starts to fetch what is not kept, wanted or found already."""
        new = {(image.key, name): image for image in images for name in experts if (image.key, name) not in self.asked}
        self.asked |= new.keys()
        for place in list(new):
            if (features := self.kept.get(*place)) is not None:
                self.found[place] = features
                del new[place]
        if new:
            with self.lock:
                self.wanted |= new
            self.fetches.append(self.thread.submit(self._fetch))

    def done(self) -> dict[tuple[str, str], Features]:
        """All that was wanted, by (picture key, expert); an error of the source comes out here."""
        for fetch in self.fetches:
            fetch.result()
        return self.found

    def _fetch(self) -> None:
        with self.lock:
            wanted, self.wanted = self.wanted, {}
        images = {key: image for (key, _), image in wanted.items()}
        names = {key: [name for other, name in wanted if other == key] for key in images}
        if images:
            rows = self.source.fetch(list(images.values()), list(names.values()))
            for key, row in zip(images, rows, strict=True):
                for name in names[key]:
                    self.found[key, name] = row[name]
                    self.kept.put(key, name, row[name])
