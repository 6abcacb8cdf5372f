"""Two-stage batched inference: route -> fetch -> fuse -> generate (paper section 3.1).

What questions share is computed once: an image is read, hashed and decoded once for the base encoder and all experts; its
base tokens serve both passes and every question on it; one routing pass serves equal questions on equal images. Experts run only where the router asked for them, and their features are fetched in
a thread from the moment a question's routing reply is complete, while the LLM still routes the other questions. The LLM
reads a later turn, or a second question on an image, only from the first difference to what it read before.

Legend: B questions, L tokens of a prompt, N base tokens of an image, n visual tokens of an image, C base channels, D LLM
width, E experts, T text width.
"""

import os
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from mova_core.answering.callbacks import FirstTokenTimer, RoutingReplyCallback
from mova_core.answering.feature_prefetch import FeaturePrefetcher, LruFeatureCache
from mova_core.answering.prefix_cache import PrefixCache, keys_depend_on_length
from mova_core.assemble import stack_features
from mova_core.data import IMAGE_MARK
from mova_core.experts import BASE, Features
from mova_core.features import FeatureSource
from mova_core.images import DecodedImage, ImageRef, PreprocessingMode
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.routing.prompt import build_routing_prompt, parse_routing, read_reply

PLAIN = "without experts"  # name in the feature cache of an image's visual tokens that no expert contributed to
READ_THREADS = 8  # images that one batch reads at a time
ROUTER_TOKENS = 16  # most tokens of a routing reply, as in the published code
# Options of `generate` under which one reply is read token by token, so that its keys and values can be reused.
SINGLE_REPLY_OPTIONS = {"do_sample", "temperature", "top_k", "top_p", "min_p", "streamer"}
STEPS = ("preprocess", "base encoder", "routing", "experts", "fusion", "first token", "answer")

Router = Literal["llm", "light"]
ROUTERS: tuple[Router, ...] = ("llm", "light")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, with its images and the conversation before it.

    The router and the gate read everything that the user asked in the conversation, as in training.
    """

    text: str
    image: ImageRef | Sequence[ImageRef] | None = (
        None  # several: in the order of their <image> marks, or no marks at all
    )
    history: Sequence[tuple[str, str]] = ()  # earlier turns (role, text), oldest first
    experts: Sequence[str] | None = None  # forced routing; None asks the router
    forbid: Sequence[str] = ()  # experts that must not be used, whatever the router replies
    max_experts: int | None = None  # None: the model's own limit if routed, no limit if forced
    budget: float | None = None  # upper limit of the experts' total cost, in the unit of the Answerer's `costs`


@dataclass(kw_only=True)
class Answer:
    """A reply, and how it came about."""

    text: str = ""
    experts: list[str] = field(default_factory=list)  # used, in the order in which the router named them
    over_budget: dict[str, float] = field(default_factory=dict)  # expert that the budget did not pay for -> its cost
    router: str | None = None  # the router's reply; None where the router was not asked
    readable: bool = True  # False: the router's reply named no expert and not "none", so no expert was used
    gates: list[dict[str, float]] = field(default_factory=list)  # per adapter block: weight of each expert used
    # Seconds per step of `STEPS`, of the whole batch, not of this question. Steps overlap: "experts" is the time that the
    # call waited for features after routing, not the time that fetching them took.
    seconds: dict[str, float] = field(default_factory=dict)
    reused_tokens: int = 0  # positions of the prompt, visual tokens included, whose keys and values came from the cache


@dataclass(frozen=True)
class ImageView:
    """One image as one question sees it; equal views have equal visual tokens."""

    image_key: str
    experts: frozenset[str] = frozenset()
    gate_text: str = ""  # empty without experts, because the gate then has nothing to weigh


@dataclass(kw_only=True)
class _Request:
    """A question on its way to its answer."""

    question: Question
    images: list[DecodedImage]
    gate_text: str  # everything that the user asked, without image marks
    answer: Answer = field(default_factory=Answer)

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [*self.question.history, ("user", self.question.text)]

    @property
    def views(self) -> list[ImageView]:
        experts = frozenset(self.answer.experts)
        return [ImageView(image.key, experts, self.gate_text if experts else "") for image in self.images]


@dataclass
class _Pass:
    """One call of `answer`: its requests, and what they share."""

    requests: list[_Request]
    prefetcher: FeaturePrefetcher
    base: dict[str, Tensor] = field(default_factory=dict)  # image key -> base tokens (N, C)
    # View -> its visual tokens (n, D), and per adapter block its gate weights (E,).
    fused: dict[ImageView, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))


class Answerer:
    """Answers batches of questions with one model and one source of features.

    Any number of threads may call `answer`; the calls run one after the other, because the routing pass switches the
    model's LoRA for the whole process.

    Args:
        model, processor: as saved together.
        source: where experts' features come from.
        router: "llm" asks the LLM, with its expert-routing LoRA if it has one; "light" the model's light router.
        costs: expert -> cost per image, in FLOP, milliseconds or any other unit; a question's `budget` needs it.
        compat: "published" reads images and routing replies as the published code does, flaws included.
        keep_bytes: bytes of memory for later turns and questions: half of them for base tokens and features, half for keys
            and values of what the LLM read. Keys and values are reused by batches of one question, if every layer of the
            LLM attends to the whole prompt (no sliding window) and positions do not depend on the prompt's length.

    Raises:
        ValueError: an unknown router, or router "light" of a model without one.
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
            raise ValueError(
                "this model has no light router: `mova train light-router` trains one; or use router='llm'"
            )
        self.model = model.eval()
        self.processor = processor
        self.source = source
        self.router = router
        self.costs = dict(costs or {})
        self.compat = compat
        self.pool = model.config.experts
        self._feature_cache = LruFeatureCache(keep_bytes // 2)
        self._prefix_cache = PrefixCache(0 if keys_depend_on_length(model.config.text_config) else keep_bytes // 2)
        self._lock = threading.Lock()

    @property
    def cached_bytes(self) -> dict[str, int]:
        """Bytes in memory for later turns and questions: "features" and "prefixes"."""
        return {"features": self._feature_cache.nbytes, "prefixes": self._prefix_cache.nbytes}

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], max_new_tokens: int = 32, **sampling: Any) -> list[Answer]:
        """Answers in the order of `questions`, greedily unless `sampling` says otherwise.

        Experts are chosen in this order: forced or routed; without the forbidden ones; at most `max_experts`, first named
        first; then, within the budget, each in turn that the rest of the budget pays for.

        Args:
            questions: one batch, of any mix of images and turns. All run together, so the device's memory bounds their
                number.
            max_new_tokens: longest answer, in tokens.
            sampling: for transformers' `generate`: `do_sample`, `temperature`, `streamer` (of one question).

        Raises:
            ValueError: a question that is empty or too long for the LLM, images that do not match its image marks, an
                expert that the pool does not have, or features that do not fit. The message names the question or expert.
            ImageError: an image that cannot be read.
            MissingFeatures: the source has no features for a routed expert and cannot compute them.
        """
        requests = [self._validate(number, question) for number, question in enumerate(questions, 1)]
        if not requests:
            return []
        self._share_images(requests)
        with self._lock:
            with FeaturePrefetcher(self.source, self._feature_cache) as prefetcher:
                run = _Pass(requests, prefetcher)
                for request in requests:
                    if request.question.experts is not None:
                        self._choose(run, request, list(request.question.experts))
                self._encode_base(run)
                self._route(run)
                input_ids_BL, attention_mask_BL, embeds_BLD = self._embed(run, max_new_tokens)
            self._generate_answers(run, input_ids_BL, attention_mask_BL, embeds_BLD, max_new_tokens, sampling)
        for request in requests:
            request.answer.seconds = run.seconds
            request.answer.gates = self._gates(run, request)
        return [request.answer for request in requests]

    def _validate(self, number: int, question: Question) -> _Request:
        """The request of the question with this number, counted from 1; raises ValueError for an unusable question."""
        image = question.image
        images = [] if image is None else [image] if isinstance(image, ImageRef) else list(image)
        user_turns = [text for role, text in (*question.history, ("user", question.text)) if role == "user"]
        marks = sum(text.count(IMAGE_MARK) for text in user_turns)
        texts = [text.replace(IMAGE_MARK, "").strip() for text in user_turns]
        if not texts[-1]:
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
        decoded = [DecodedImage.of(image) for image in images]
        return _Request(question=question, images=decoded, gate_text="\n".join(texts))

    @staticmethod
    def _share_images(requests: Sequence[_Request]) -> None:
        """Reads every image, and lets requests on equal images share one object, which decodes the image once."""
        images = [image for request in requests for image in request.images]
        with ThreadPoolExecutor(READ_THREADS) as threads:
            list(threads.map(DecodedImage.read, images))
        by_key = {image.key: image for image in images}
        for request in requests:
            request.images = [by_key[image.key] for image in request.images]

    # Stage 1: route

    def _choose(self, run: _Pass, request: _Request, named: list[str]) -> None:
        """Settles a request's experts from those named, most important first, and starts to fetch their features."""
        question = request.question
        limit = question.max_experts
        if limit is None and question.experts is None and self.compat == "fixed":
            limit = self.model.config.max_experts
        allowed = [name for name in dict.fromkeys(named) if name not in question.forbid][:limit]
        budget = float("inf") if question.budget is None else question.budget
        for name in allowed:
            cost = len(request.images) * self.costs.get(name, 0.0)
            if cost <= budget:
                budget -= cost
                request.answer.experts.append(name)
            else:
                request.answer.over_budget[name] = cost
        run.prefetcher.request(request.images, request.answer.experts)

    def _encode_base(self, run: _Pass) -> None:
        """Computes each image's base tokens once."""
        encoder = self.model.base_encoder
        images = {image.key: image for request in run.requests for image in request.images}
        for key in images:
            if (features := self._feature_cache.get((key, BASE))) is not None:
                run.base[key] = features.tokens
        new = [image for key, image in images.items() if key not in run.base]
        if not new:
            return

        def pixels(image: DecodedImage) -> Tensor:
            return encoder.preprocess([image.decode(self.compat)], self.compat)["pixel_values"]

        with self._timed(run, "preprocess"), ThreadPoolExecutor(os.cpu_count()) as threads:
            pixels_M3SS = torch.cat(list(threads.map(pixels, new))).to(self.model.device)
        with self._timed(run, "base encoder"):
            for image, tokens_NC in zip(new, self.model.encode_base(pixels_M3SS), strict=True):
                run.base[image.key] = tokens_NC
                # Cloned, because a view of the batch would hold the memory of all its images.
                self._feature_cache.put((image.key, BASE), Features(tokens_NC.clone(), encoder.grid))

    def _route(self, run: _Pass) -> None:
        """Asks the router for the experts of all requests with images whose experts are not forced."""
        routed = [request for request in run.requests if request.question.experts is None and request.images]
        with self._timed(run, "routing"):
            if routed and self.router == "llm":
                self._route_by_llm(run, routed)
            elif routed:
                self._route_by_light_router(run, routed)

    def _route_by_llm(self, run: _Pass, requests: Sequence[_Request]) -> None:
        """One routing pass over the different questions; features are fetched as soon as a reply is complete."""
        equal: dict[tuple[str, ...], list[_Request]] = {}
        for request in requests:
            equal.setdefault((request.gate_text, *(image.key for image in request.images)), []).append(request)
        groups = list(equal.values())
        firsts = [group[0] for group in groups]
        descriptions = self.model.config.descriptions
        prompts = [[("user", build_routing_prompt(request.gate_text, descriptions))] for request in firsts]
        input_ids_BL, attention_mask_BL = self._tokenize(prompts, firsts, ROUTER_TOKENS, routing=True)
        views = [ImageView(image.key) for request in firsts for image in request.images]
        self._fuse(run, views)
        distinct = list(dict.fromkeys(views))
        coarse = self.model.coarsen(torch.stack([run.fused[view][0] for view in distinct]))
        visual = dict(zip(distinct, coarse, strict=True))
        embeds_BLD = self.model.embed(input_ids_BL, [visual[view] for view in views])

        def on_reply(index: int, reply: str) -> None:
            named = self._named_experts(reply)
            for request in groups[index]:
                request.answer.router = reply
                request.answer.readable = named is not None
                self._choose(run, request, [self.pool[position] for position in named or ()])

        callback = RoutingReplyCallback(self.processor, on_reply)
        with self.model.expert_routing():
            self._generate(embeds_BLD, attention_mask_BL, ROUTER_TOKENS, [callback])
        callback.finish()

    def _named_experts(self, reply: str) -> list[int] | None:
        """Positions in the pool of the experts that a routing reply names; None for an unreadable reply."""
        if self.compat == "published":
            mask = parse_routing(reply, len(self.pool), compat="published")
            return [position for position, chosen in enumerate(mask) if chosen]
        return read_reply(reply, len(self.pool), len(self.pool))

    def _route_by_light_router(self, run: _Pass, requests: Sequence[_Request]) -> None:
        """Classifies each question from its text and the mean of its images' base tokens."""
        router = self.model.light_router
        assert router is not None
        texts = self._encode_texts([request.gate_text for request in requests])
        text_BT = torch.stack([texts[request.gate_text] for request in requests])
        image_BC = torch.stack(
            [torch.stack([run.base[image.key].mean(0) for image in request.images]).mean(0) for request in requests]
        )
        for request, logits_E in zip(requests, router(text_BT, image_BC), strict=True):
            chosen = router.choose(logits_E, len(self.pool))
            request.answer.router = ", ".join(f"{self.pool[index]} {chance:.2f}" for index, chance in chosen) or "none"
            self._choose(run, request, [self.pool[index] for index, _ in chosen])

    # Stage 2: fuse and generate

    def _embed(self, run: _Pass, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (B, L), attention mask (B, L) and embeddings (B, L, D) of the answer pass."""
        requests = run.requests
        with self._timed(run, "preprocess"):  # while features are being fetched
            turns = [request.turns for request in requests]
            input_ids_BL, attention_mask_BL = self._tokenize(turns, requests, max_new_tokens)
            texts = self._encode_texts([request.gate_text for request in requests if request.answer.experts])
        with self._timed(run, "experts"):
            features = run.prefetcher.result()
        with self._timed(run, "fusion"):
            views = [view for request in requests for view in request.views]
            self._fuse(run, views, texts, features)
            embeds_BLD = self.model.embed(input_ids_BL, [run.fused[view][0] for view in views])
        return input_ids_BL, attention_mask_BL, embeds_BLD

    def _tokenize(
        self, conversations: Sequence[Any], requests: Sequence[_Request], new_tokens: int, routing: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Left-padded token ids and attention mask (B, L) of one pass; raises ValueError where a reply has no room."""
        images = [
            request.images if len(request.images) > 1 else next(iter(request.images), None) for request in requests
        ]
        batch = self.processor(conversations, images, routing=routing, pixels=False)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        for request, length in zip(requests, batch["attention_mask"].sum(1).tolist(), strict=True):
            if limit is not None and length + new_tokens > limit:
                what = "routing prompt" if routing else "conversation"
                raise ValueError(
                    f"question {request.question.text[:40]!r}: its {what} has {length} tokens and the reply up to "
                    f"{new_tokens}, but the LLM reads {limit}: shorten it"
                )
        device = self.model.device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Gate features (T,) of each different text."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        tokens = {name: value.to(self.model.device) for name, value in self.processor.gate_text(distinct).items()}
        encoded_BT = self.model.adapter.encode_text(tokens["text_input_ids"], tokens["text_attention_mask"])
        return dict(zip(distinct, encoded_BT, strict=True))

    def _fuse(
        self,
        run: _Pass,
        views: Sequence[ImageView],
        texts: Mapping[str, Tensor] | None = None,
        features: Mapping[tuple[str, str], Features] | None = None,
    ) -> None:
        """Adds the views to `run.fused` that are not there yet.

        A view without experts is equal for every question, so it is cached for later ones, as base tokens are.

        Args:
            texts: gate text -> its features (T,); not needed without experts.
            features: (image key, expert) -> features; not needed without experts.
        """
        for view in dict.fromkeys(views):
            if view.experts or view in run.fused:
                continue
            if (plain := self._feature_cache.get((view.image_key, PLAIN))) is not None:
                run.fused[view] = plain.tokens, []
        new = [view for view in dict.fromkeys(views) if view not in run.fused]
        if not new:
            return
        base_BNC = torch.stack([run.base[view.image_key] for view in new])
        routing_BE = torch.tensor([[name in view.experts for name in self.pool] for view in new])
        rows = [{name: (features or {})[view.image_key, name] for name in view.experts} for view in new]
        experts = stack_features(rows, self.pool, base_BNC.device, base_BNC.dtype)
        text_BT = None
        if texts:
            no_text = torch.zeros_like(next(iter(texts.values())))
            text_BT = torch.stack([texts.get(view.gate_text, no_text) for view in new])
        visual_BnD, gates = self.model.encode_image(base_BNC, text_BT, experts, routing_BE.to(base_BNC.device))
        side = self.model.config.adapter["grid"] // 2
        for index, view in enumerate(new):
            run.fused[view] = visual_BnD[index], [gate_BE[index] for gate_BE in gates]
            if not view.experts:
                plain = Features(visual_BnD[index].clone(), (side, side))
                self._feature_cache.put((view.image_key, PLAIN), plain)

    def _gates(self, run: _Pass, request: _Request) -> list[dict[str, float]]:
        """Per adapter block the weights of the request's experts, averaged over its images."""
        if not request.answer.experts:
            return [{} for _ in range(self.model.adapter.config.blocks if request.images else 0)]
        blocks = zip(*(run.fused[view][1] for view in request.views), strict=True)
        means = [torch.stack(block).mean(0).tolist() for block in blocks]
        return [{name: mean[self.pool.index(name)] for name in request.answer.experts} for mean in means]

    def _generate_answers(
        self,
        run: _Pass,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        embeds_BLD: Tensor,
        max_new_tokens: int,
        sampling: Mapping[str, Any],
    ) -> None:
        """Fills in the answers' texts. A single reply reuses and stores keys and values."""
        timer = FirstTokenTimer()
        # transformers refuses `past_key_values` beside a cache implementation that the model names itself.
        own_cache = self.model.language_model.generation_config.cache_implementation
        reusable = len(run.requests) == 1 and sampling.keys() <= SINGLE_REPLY_OPTIONS and own_cache is None
        past = None
        if reusable:
            prompt = self._prompt_content(input_ids_BL[0], run.requests[0].views)
            past = self._prefix_cache.find(prompt)
            run.requests[0].answer.reused_tokens = past.get_seq_length() if past else 0
        out = self._generate(embeds_BLD, attention_mask_BL, max_new_tokens, [timer], past_key_values=past, **sampling)
        if reusable:
            self._prefix_cache.put(prompt, out.sequences[0].tolist(), out.past_key_values)
        run.seconds["first token"] = timer.first_token
        run.seconds["answer"] = time.perf_counter() - timer.started - timer.first_token
        for request, reply_ids in zip(run.requests, out.sequences, strict=True):
            request.answer.text = self.processor.decode(reply_ids)

    def _prompt_content(self, input_ids_L: Tensor, views: Sequence[ImageView]) -> list[Hashable]:
        """What stands at each position of a prompt: the token, or the view that its visual token belongs to."""
        visual = (view for view in views for _ in range(self.model.config.image_tokens))
        image_token = self.model.config.image_token_id
        return [next(visual) if token == image_token else token for token in input_ids_L.tolist()]

    def _generate(
        self,
        embeds_BLD: Tensor,
        attention_mask_BL: Tensor,
        max_new_tokens: int,
        callbacks: Sequence[StoppingCriteria],
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
            inputs_embeds=embeds_BLD,
            attention_mask=attention_mask_BL,
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList(callbacks),
            return_dict_in_generate=True,
            **(defaults | options),
        )

    @contextmanager
    def _timed(self, run: _Pass, step: str) -> Iterator[None]:
        """Adds the time of its body, the device's work included, to a step of `run.seconds`."""
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        run.seconds[step] += time.perf_counter() - started
