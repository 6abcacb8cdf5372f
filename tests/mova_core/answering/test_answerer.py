import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM, TextIteratorStreamer

import mova_core.images
from mova_core.answering import Answerer, Question
from mova_core.answering.answerer import STEPS
from mova_core.data import IMAGE_MARK
from mova_core.experts import Features
from mova_core.features import FeatureStore, MissingFeatures, Tiered
from mova_core.images import ImageError, ImageRef
from mova_core.routing import build_routing_prompt


@pytest.fixture
def images(pictures):
    return [ImageRef(path=path) for path in pictures]


@pytest.fixture
def talkative(mini, processor):
    """The mini model with an LLM that heeds what it reads and likes letters: its random router names experts."""
    words = [processor.tokenizer.convert_tokens_to_ids(word) for word in [*"ABCDEFG,", processor.tokenizer.eos_token]]
    head = mini.language_model.lm_head.weight
    with torch.no_grad():
        for parameter in mini.language_model.model.layers.parameters():
            parameter *= 6 if parameter.ndim == 2 else 1
        head[words] = 0.05 * torch.randn(len(words), head.shape[1], generator=torch.Generator().manual_seed(10))
    return mini


class Counted:
    """A source that counts what it is asked for, and may take its time."""

    def __init__(self, source, delay=0.0):
        self.source, self.delay = source, delay
        self.asked: Counter[tuple[str, str]] = Counter()
        self.spans = []

    @property
    def fingerprints(self):
        return self.source.fingerprints

    def fetch(self, images, experts):
        started = time.perf_counter()
        time.sleep(self.delay)
        self.asked.update((image.key, name) for image, names in zip(images, experts, strict=True) for name in names)
        rows = self.source.fetch(images, experts)
        self.spans.append((started, time.perf_counter(), threading.current_thread()))
        return rows


def same(one, other):
    assert (one.text, one.experts, one.router, one.readable) == (
        other.text,
        other.experts,
        other.router,
        other.readable,
    )
    for block, again in zip(one.gates, other.gates, strict=True):
        assert block == pytest.approx(again, abs=5e-5)


def different_questions(images):
    """Every kind there is: routed, forced, forbidden, of one picture, several and none, first and later turns."""
    first, second, third = images
    said = (("user", "what is it?"), ("assistant", "left, none"))
    return [
        Question(text="what is in the picture?", image=first),
        Question(text="left or right, which of them is it then?", image=second),
        Question(text="what is in the picture?", image=third),
        Question(text="none?", image=second, experts=("sam", "dinov2")),
        Question(text="0123?", image=first, experts=()),
        Question(text="left?", image=third, experts=("pix2struct", "codetr", "vary", "biomedclip")),
        Question(text="what is left?", image=second, forbid=("codetr", "dinov2"), max_experts=1),
        Question(text="is there none?"),
        Question(text="and right?", history=said),
        Question(text="and right?", image=first, history=said),
        Question(
            text="and left of it?",
            image=third,
            history=(*said, ("user", "none"), ("assistant", "")),
            experts=("deplot",),
        ),
        Question(text="which of the two is left?", image=(first, second)),
        Question(text="the same?", image=(third, third), experts=("sam",)),
        Question(
            text=f"and in {IMAGE_MARK}, is it left?",
            image=(second, first),
            history=(("user", f"{IMAGE_MARK} what is it?"), ("assistant", "none")),
        ),
    ]


def test_batched_answers_equal_single_answers(talkative, processor, local_experts, images, tmp_path):
    questions = different_questions(images)
    source = Tiered(FeatureStore(tmp_path / "store", create=True), local_experts)
    alone = [Answerer(talkative, processor, source).answer([one], max_new_tokens=4)[0] for one in questions]
    assert len({tuple(answer.experts) for answer in alone}) > 5 and len({answer.text for answer in alone}) > 6
    assert any(answer.router and answer.experts for answer in alone), "the router picked some"
    rng = random.Random(0)
    remembering = Answerer(talkative, processor, source)
    forgetful = Answerer(talkative, processor, source, keep_bytes=0)
    for mix in range(64):
        chosen = rng.choices(range(len(questions)), k=rng.randint(2, 5))
        answerer = remembering if mix % 2 else forgetful
        for index, answer in zip(
            chosen, answerer.answer([questions[i] for i in chosen], max_new_tokens=4), strict=True
        ):
            same(answer, alone[index])


def test_reply_tells_what_was_done(talkative, processor, local_experts, images):
    questions = [
        Question(image=images[0], text="what?", experts=("sam", "dinov2", "sam")),
        Question(image=images[1], text="what is it?"),
        Question(text="what?"),
    ]
    forced, routed, plain = Answerer(talkative, processor, local_experts).answer(questions, max_new_tokens=4)
    assert forced.experts == ["sam", "dinov2"] and forced.router is None
    assert len(forced.gates) == 2
    for block in forced.gates:
        assert set(block) == {"sam", "dinov2"} and abs(sum(block.values()) - 1) < 1e-4
    assert routed.router is not None and all(set(block) == set(routed.experts) for block in routed.gates)
    assert plain.router is None and plain.experts == [] and plain.gates == []
    assert tuple(forced.seconds) == STEPS and all(seconds >= 0 for seconds in forced.seconds.values())
    assert forced.seconds["routing"] > 0 and forced.seconds["first token"] > 0


def test_one_encoding_and_one_routing_pass_serve_several_questions(talkative, processor, local_experts, images):
    source = Counted(local_experts)
    answerer = Answerer(talkative, processor, source)
    encoded, routed, fused = [], [], []
    hooks = [
        talkative.base_encoder.register_forward_hook(
            lambda _m, inputs, _o: encoded.append(len(inputs[0]["pixel_values"]))
        ),
        talkative.adapter.register_forward_hook(lambda _m, inputs, _o: fused.append(len(inputs[0]))),
        talkative.language_model.lm_head.register_forward_hook(lambda _m, inputs, _o: routed.append(len(inputs[0]))),
    ]
    forced = Question(image=images[0], text="what?", experts=("sam", "vary"))
    asked = Question(image=images[0], text="what?")
    copy = ImageRef(data=images[0].read())  # the same picture from elsewhere
    answers = answerer.answer([forced, asked, asked, Question(image=copy, text="what?"), forced], max_new_tokens=2)
    for hook in hooks:
        hook.remove()
    assert encoded == [1], "one picture, one encoding"
    assert routed[0] == 1 and routed[-1] == 5, "three equal questions share a routing pass; all five are answered"
    same(answers[1], answers[2])
    same(answers[1], answers[3])
    same(answers[0], answers[4])
    assert sum(fused) <= 3, "as a coarse view, with the forced experts, with the routed ones"
    assert set(source.asked.values()) == {1}, "no features twice"


def test_an_image_is_read_and_decoded_once(mini, processor, local_experts, images, monkeypatch):
    """For the base encoder and every expert, also if two questions name the image by references of their own."""
    calls: Counter[str] = Counter()

    def count(name):
        function = getattr(mova_core.images, name)

        def counted(*arguments):
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(mova_core.images, name, counted)

    count("read_image")
    count("_decode")
    answerer = Answerer(mini, processor, local_experts)
    fresh = [ImageRef(path=images[0].path) for _ in range(3)]
    answerer.answer([Question(image=fresh[0], text="what?", experts=("sam", "vary", "pix2struct"))], 2)
    assert calls == {"read_image": 1, "_decode": 1}
    answerer = Answerer(mini, processor, local_experts)
    answerer.answer([Question(image=image, text="what?", experts=("sam",)) for image in fresh[1:]], 2)
    assert calls == {"read_image": 1 + 2, "_decode": 1 + 1}, "each reference is read, the picture is decoded once"


def test_later_turns_find_features_again(talkative, processor, local_experts, images):
    source = Counted(local_experts)
    answerer = Answerer(talkative, processor, source)
    encoded = []
    hook = talkative.base_encoder.register_forward_hook(lambda *_: encoded.append(1))
    first = Question(image=images[0], text="what?", experts=("sam", "vary"))
    [answer] = answerer.answer([first], max_new_tokens=4)
    history = (("user", "what?"), ("assistant", answer.text))
    later = Question(image=images[0], text="and left?", history=history, experts=("sam", "deplot"))
    [again] = answerer.answer([later], max_new_tokens=4)
    hook.remove()
    assert len(encoded) == 1 and source.asked == Counter(
        {(images[0].key, name): 1 for name in ("sam", "vary", "deplot")}
    )
    same(again, Answerer(talkative, processor, local_experts).answer([later], max_new_tokens=4)[0])
    small = Answerer(talkative, processor, source, keep_bytes=1000)
    small.answer([first], max_new_tokens=1)
    assert small.cached_bytes["features"] <= 500


def test_features_come_while_others_are_routed(talkative, processor, local_experts, images):
    """What is forced is fetched during the routing pass; what a row's router named, while other rows still speak."""
    delay = 0.5
    source = Counted(local_experts, delay)
    questions = [
        Question(image=images[0], text="what?", experts=("biomedclip",)),
        Question(image=images[1], text="what is in the picture, left or right?"),
    ]
    answerer = Answerer(talkative, processor, source)
    generate, spans = talkative.generate, []

    def timed(**kwargs):
        started = time.perf_counter()
        time.sleep(delay)  # a larger model's time
        out = generate(**kwargs)
        spans.append((started, time.perf_counter()))
        return out

    talkative.generate = timed
    try:
        [answer, _] = answerer.answer(questions, max_new_tokens=2)
    finally:
        del talkative.generate
    fetched, (_, routed) = source.spans[0], spans[0]
    assert fetched[0] < routed - 0.8 * delay, "the fetch began with the routing pass"
    assert fetched[2] is not threading.main_thread()
    first_fetch = fetched[1] - fetched[0]
    if len(source.spans) == 1:
        assert answer.seconds["experts"] < first_fetch / 2, "and little of it was waited for"


def test_row_is_fetched_as_soon_as_its_reply_ends(mini, processor, local_experts, images):
    """Two rows are routed; one of them has said its two words while the other goes on speaking."""
    letter = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in "AB,"}
    end = processor.tokenizer.eos_token_id
    steps: list[float] = []

    def speak(_module, _inputs, logits):
        """What a trained router would say."""
        said = [[letter["A"], end], [letter["B" if len(steps) % 2 == 0 else ","]]]
        steps.append(time.perf_counter())
        time.sleep(0.05)
        out = torch.zeros_like(logits)
        for row, words in enumerate(said):
            out[row, -1, words[min(len(steps), len(words)) - 1]] = 1
        return out

    source = Counted(local_experts)
    hook = mini.language_model.lm_head.register_forward_hook(speak)
    try:
        questions = [Question(image=image, text="what?") for image in images[:2]]
        answers = Answerer(mini, processor, source).answer(questions, max_new_tokens=1)
    finally:
        hook.remove()
    assert [answer.experts for answer in answers] == [["dinov2"], ["vary"]]
    assert [answer.router for answer in answers] == ["A", "B," * 8]
    assert len(source.spans) == 2 and steps[1] < source.spans[0][0] < steps[5] < steps[15] < source.spans[1][0]


def test_caller_can_forbid_cap_and_set_a_budget(mini, processor, local_experts, images):
    costs = {
        "sam": 5.6,
        "dinov2": 3.5,
        "vary": 0.9,
        "codetr": 4.7,
        "pix2struct": 2.5,
        "deplot": 0.5,
        "biomedclip": 0.04,
    }
    answerer = Answerer(mini, processor, local_experts, costs=costs)

    def experts(**limits):
        image = limits.pop("image", images[0])
        asked = Question(image=image, text="what?", experts=("sam", "vary", "dinov2", "biomedclip"), **limits)
        return answerer.answer([asked], 1)[0].experts

    assert experts(forbid=["sam"], max_experts=1) == ["vary"]
    assert experts(max_experts=0) == []
    assert experts(budget=100) == ["sam", "vary", "dinov2", "biomedclip"]
    assert experts(budget=4.5) == ["vary", "dinov2", "biomedclip"], "sam alone is over it; those after it still fit"
    assert experts(budget=6) == ["sam", "biomedclip"], "in the order they were named"
    assert experts(budget=4.5, image=(images[0], images[0])) == ["vary", "biomedclip"], "each picture costs"
    assert experts(budget=0) == []
    asked = Question(image=images[0], text="what?", experts=("sam", "vary", "dinov2", "biomedclip"), budget=6)
    assert answerer.answer([asked], 1)[0].over_budget == {"vary": 0.9, "dinov2": 3.5}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text": "  "}, "question 1 is empty"),
        ({"text": f"{IMAGE_MARK} "}, "question 1 is empty"),
        ({"text": "what?", "forbid": ["clip2"]}, "no expert clip2 in this model's pool"),
        ({"text": "what?", "experts": ["clip2"]}, "no expert clip2 in this model's pool"),
        ({"text": "what?", "image": None, "experts": ["sam"]}, "forces sam but has no picture"),
        ({"text": f"what is {IMAGE_MARK}?", "image": None}, "1 <image> marks but 0 pictures"),
        ({"text": f"{IMAGE_MARK}{IMAGE_MARK} or?"}, "2 <image> marks but 1 pictures"),
        ({"text": "what?", "budget": 3.0}, "has a budget, but dinov2.* no cost"),
        ({"text": "0" * 3000, "experts": ()}, "question '000.*the LLM reads 2048"),
        ({"text": "0" * 3000}, "question '000.*routing prompt.*the LLM reads 2048"),
        ({"text": "what?", "image": ImageRef(path="nowhere.png")}, "nowhere"),
    ],
)
def test_bad_questions_are_named(mini, processor, local_experts, images, wrong, said):
    with pytest.raises(ValueError, match=said) as caught:
        Answerer(mini, processor, local_experts).answer([Question(**{"image": images[0], **wrong})], 8)
    assert len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, ImageError) == ("nowhere" in said)


def test_features_that_do_not_fit_are_named(mini, processor, local_experts, images):
    class Cut(Counted):
        """Loses the last token of some pictures."""

        cut: set[str] = set()  # noqa: RUF012

        def fetch(self, images, experts):
            rows = zip(images, super().fetch(images, experts), strict=True)
            return [
                {name: Features(f.tokens[: -1 if image.key in self.cut else None], f.grid) for name, f in row.items()}
                for image, row in rows
            ]

    asked = [Question(image=image, text="what?", experts=("sam",)) for image in images[:2]]
    source = Cut(local_experts)
    source.cut = {images[0].key}
    with pytest.raises(ValueError, match=r"sam: tokens are .* but a .* grid"):
        Answerer(mini, processor, source).answer(asked[:1], 1)
    with pytest.raises(ValueError, match="sam: features of one batch differ"):
        Answerer(mini, processor, source).answer(asked, 1)


def test_a_light_router_needs_no_llm_pass(mini, processor, local_experts, images):
    with pytest.raises(ValueError, match="no light router"):
        Answerer(mini, processor, local_experts, router="light")
    mini.add_light_router(hidden=8)
    with torch.no_grad():
        mini.light_router.out.bias[:] = torch.tensor([-1.0, 2.0, -1, 0.5, -1, 3, 1])
    answerer = Answerer(mini, processor, local_experts, router="light")
    steps = []
    hook = mini.language_model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    one, other = answerer.answer(
        [Question(image=images[0], text="what?"), Question(image=images[1], text="left?", max_experts=1)], 1
    )
    hook.remove()
    assert len(steps) == 1, "only the answer's token"
    assert one.experts == ["biomedclip", "vary", "sam"] and other.experts == ["biomedclip"]
    assert one.router == "biomedclip 0.95, vary 0.88, sam 0.73, pix2struct 0.62" and one.readable


def test_the_tuned_llm_routes_by_itself_or_with_a_lora(talkative, processor, local_experts, images):
    """v2 has no LoRA: the same LLM routes and answers. With one, only the routing pass changes."""
    questions = [Question(image=image, text="what is in the picture?") for image in images]
    plain = Answerer(talkative, processor, local_experts).answer(questions, 4)
    assert not talkative.has_routing_lora and any(answer.experts for answer in plain)
    talkative.add_routing_lora(rank=4)
    for name, parameter in talkative.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    routed = Answerer(talkative, processor, local_experts).answer(questions, 4)
    assert [answer.router for answer in routed] != [answer.router for answer in plain]
    forced = [
        Question(image=one.image, text=one.text, experts=answer.experts)
        for one, answer in zip(questions, plain, strict=True)
    ]
    for one, other in zip(Answerer(talkative, processor, local_experts).answer(forced, 4), plain, strict=True):
        assert (one.text, one.experts) == (other.text, other.experts), "the answer is the LLM's own"


def test_answer_can_be_streamed(talkative, processor, local_experts, images):
    answerer = Answerer(talkative, processor, local_experts)
    question = Question(image=images[0], text="what is in the picture?")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_special_tokens=True, timeout=60)
    found = []
    thread = threading.Thread(target=lambda: found.extend(answerer.answer([question], 8, streamer=streamer)))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == found[0].text != ""


class Tokens(list):
    """A streamer that keeps the tokens of a reply."""

    def put(self, ids):
        self.extend(ids.flatten().tolist())

    def end(self):
        pass


def with_llm(mini, kind, config, **more):
    """The mini model with another random LLM, of the same width."""
    names = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id"),
    ]
    torch.manual_seed(5)
    mini.config.text_config = config(**{name: getattr(mini.config.text_config, name) for name in names}, **more)
    mini.language_model = kind(mini.config.text_config).eval()
    for parameter in mini.language_model.model.layers.parameters():
        parameter.data *= 6 if parameter.ndim == 2 else 1  # it heeds what it reads
    return mini


def converse(answerer, asked, **about):
    """Per turn the reply, its tokens and how many tokens went through the LLM for it."""
    history: list[tuple[str, str]] = []
    turns, read = [], []
    hook = answerer.model.language_model.model.layers[0].register_forward_pre_hook(
        lambda _layer, inputs: read.append(inputs[0].shape[1])
    )
    for text in asked:
        tokens, before = Tokens(), sum(read)
        [answer] = answerer.answer([Question(text=text, history=tuple(history), **about)], 6, streamer=tokens)
        turns.append((answer, list(tokens), sum(read) - before))
        history += [("user", text), ("assistant", answer.text)]
    hook.remove()
    return turns


@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_later_turns_are_read_from_where_they_differ(talkative, processor, local_experts, images, llm):
    """Keys and values of the earlier turns are used again, and every token is as without."""
    model = talkative if llm == "llama" else with_llm(talkative, Qwen2ForCausalLM, Qwen2Config)
    rng = random.Random(1)
    words = [*"0123456789", "what", "is", "in", "the", "picture", "left", "right", "which", "none"]
    remembering = Answerer(model, processor, local_experts)
    forgetful = Answerer(model, processor, local_experts, keep_bytes=0)
    different, further = set(), 0
    for number in range(24):
        asked = [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(3)]
        image = (rng.choice(images), rng.sample(images, 2))[number % 3 == 2]
        about = [{}, {"image": image, "experts": ()}, {"image": image, "experts": ("sam", "vary")}, {"image": image}]
        turns = converse(remembering, asked, **about[number % 4])
        fresh = converse(forgetful, asked, **about[number % 4])
        prompt = 0
        for turn, ((answer, tokens, read), (whole, all_tokens, all_read)) in enumerate(zip(turns, fresh, strict=True)):
            assert tokens == all_tokens
            same(answer, whole)
            assert whole.reused_tokens == 0 and read == all_read - answer.reused_tokens, "what is reused is not read"
            if turn:
                pictured = "image" in about[number % 4]
                if answer.experts and pictured:
                    assert 0 < answer.reused_tokens < 10, "the gate heard more, so the picture looks different"
                elif not turns[turn - 1][0].experts:
                    assert answer.reused_tokens >= prompt
                    further += answer.reused_tokens > prompt
            different.add(tuple(tokens))
            prompt = all_read - len(all_tokens) + 1 if answer.router is None else 0
    assert len(different) > 20 and further > 4, "some replies are reused too"
    assert remembering.cached_bytes["prefixes"] > 0 and forgetful.cached_bytes == {"features": 0, "prefixes": 0}


def test_questions_on_one_picture_share_its_keys_and_values(talkative, processor, local_experts, images):
    answerer = Answerer(talkative, processor, local_experts)

    def reused(text, history=(), image=images[0], answerer=answerer, **more):
        experts = more.pop("experts", ())
        question = Question(text=text, image=image, history=history, experts=experts)
        [answer] = answerer.answer([question], 4, **more)
        [whole] = Answerer(talkative, processor, local_experts, keep_bytes=0).answer([question], 4)
        assert more or answer.text == whole.text
        return answer.reused_tokens

    shown = talkative.config.image_tokens
    assert reused("what is it?") == 0
    assert shown < reused("left?") < shown + 10, "the picture and what stands before it"
    again = reused("left?")
    assert again > shown, "all but the last token"
    said = (("user", "left?"), ("assistant", "none"))
    assert reused("what?", said) >= again, "the reply is another one"
    assert shown < reused("what?", (("user", "right?"), said[1])) < again, "a turn was rewritten"
    assert 0 < reused("left?", image=images[1]) < 10, "another picture"
    assert 0 < reused("left?", experts=("sam",)) < 10, "another view of it"
    assert reused("left?", experts=("sam",)) > shown
    assert reused("left?", num_beams=2) == 0, "several replies at once"
    assert reused("left?", do_sample=True) == again
    assert reused("left?", answerer=Answerer(talkative, processor, local_experts)) == 0, "another model's"
    assert [one.reused_tokens for one in answerer.answer([Question(text="left?")] * 2, 4)] == [0, 0]


def test_routing_leaves_no_keys_and_values(talkative, processor, local_experts, images):
    """The router reads with its LoRA: what it read may not serve the answer, nor a question in its own words."""
    talkative.add_routing_lora(rank=4)
    answerer = Answerer(talkative, processor, local_experts)
    [answer] = answerer.answer([Question(text="what is in the picture?", image=images[0])], 4)
    assert answer.router is not None and answer.reused_tokens == 0
    prompt = build_routing_prompt("what is in the picture?", talkative.config.descriptions)
    question = Question(text=prompt, image=images[0], experts=())
    [again] = answerer.answer([question], 4)
    assert again.reused_tokens < 10
    same(again, Answerer(talkative, processor, local_experts).answer([question], 4)[0])


def test_memory_for_keys_and_values_is_bounded(talkative, processor, local_experts):
    answerer = Answerer(talkative, processor, local_experts, keep_bytes=200_000)
    sizes = []
    for number in range(12):
        answerer.answer([Question(text=f"{number} what is in the picture? " * (number % 4 + 1))], 4)
        sizes.append(answerer.cached_bytes["prefixes"])
    assert 0 < max(sizes) <= 100_000 and sizes != sorted(sizes), "something was evicted"
    longer = Question(text="0123456789 " * 40)
    answerer.answer([longer], 4)
    assert answerer.answer([longer], 4)[0].reused_tokens < 10, "larger than the whole cache"
    assert answerer.cached_bytes["prefixes"] == sizes[-1], "and nothing was evicted for it"


@pytest.mark.parametrize(
    "more",
    [
        {"sliding_window": 16, "head_dim": 16},
        {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_keys_and_values_that_cannot_be_cut_back_are_not_kept(mini, processor, local_experts, more):
    kind = (Gemma3ForCausalLM, Gemma3TextConfig) if "sliding_window" in more else (Qwen2ForCausalLM, Qwen2Config)
    answerer = Answerer(with_llm(mini, *kind, **more), processor, local_experts)
    assert [answer.reused_tokens for answer, _, _ in converse(answerer, ["what?", "left?"])] == [0, 0]
    assert answerer.cached_bytes["prefixes"] == 0


def test_threads_may_share_an_answerer(talkative, processor, local_experts, images):
    """The routing pass switches the LoRA of the one model that all threads use."""
    talkative.add_routing_lora(rank=4)
    for name, parameter in talkative.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    answerer = Answerer(talkative, processor, local_experts)
    questions = [Question(text=text, image=image) for image in images for text in ("what?", "left?", "which?", "none?")]
    alone = [answerer.answer([question], 4)[0] for question in questions]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda question: answerer.answer([question], 4)[0], questions))
    for answer, expected in zip(together, alone, strict=True):
        same(answer, expected)
    assert len({id(answer.seconds) for answer in together}) == len(questions)


def test_sources_are_interchangeable(mini, processor, local_experts, images, tmp_path):
    """The answer is the same from experts run here, from a store in front of them, and from the store alone."""
    question = Question(image=images[0], text="what?", experts=("codetr", "deplot"))
    sources = [local_experts, Tiered(FeatureStore(tmp_path / "store", create=True), local_experts)]
    answers = [Answerer(mini, processor, source).answer([question], 8)[0] for source in sources]
    sources[1].close()
    answers += Answerer(mini, processor, FeatureStore(tmp_path / "store")).answer([question], 8)
    assert len({answer.text for answer in answers}) == 1
    assert len({str(answer.gates) for answer in answers}) == 1
    with pytest.raises(MissingFeatures, match="precompute"):
        Answerer(mini, processor, FeatureStore(tmp_path / "store")).answer(
            [Question(image=images[1], text="what?", experts=("codetr",))]
        )


def test_no_questions_no_answers(mini, processor, local_experts):
    assert Answerer(mini, processor, local_experts).answer([]) == []
