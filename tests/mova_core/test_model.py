from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from mova_core.assemble import assemble, stack_features
from mova_core.experts import EXPERTS, Features
from mova_core.images import ImageRef
from mova_core.model import ROUTING_LORA, MoVAForConditionalGeneration
from mova_core.processing import IGNORE, MoVAProcessor

ASK = [("user", "what is in the picture?")]


def test_saved_model_is_the_same_model(mini, mini_folder, tmp_path):
    mini.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, MoVAForConditionalGeneration)
    state = mini.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path).experts == EXPERTS
    assert again.config.image_tokens == 36 and again.config.routing_tokens == 9


def test_processor_places_picture_and_labels(processor, pictures):
    answered = [*ASK, ("assistant", "left"), ("user", "right?"), ("assistant", "none")]
    batch = processor([answered, ASK[:1]], [ImageRef(path=str(pictures[0])), None], labels=True, padding_side="right")
    row, labels = batch["input_ids"][0], batch["labels"][0]
    assert int((row == processor.image_token_id).sum()) == processor.image_tokens
    assert batch["pixel_values"].shape == (1, 3, 168, 168) and len(batch["text_input_ids"]) == 1
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "left</s>none</s>"
    assert torch.equal(row[labels != IGNORE], labels[labels != IGNORE])
    prompt = processor([ASK], [ImageRef(path=str(pictures[0]))])["input_ids"][0]
    assert torch.equal(row[: len(prompt)], prompt), "training and generation cut a prompt alike"
    routing = processor([ASK], [ImageRef(path=str(pictures[0]))], routing=True)["input_ids"]
    assert int((routing == processor.image_token_id).sum()) == processor.routing_tokens
    with pytest.raises(ValueError, match="max_length 20 cuts the picture"):
        processor([ASK], [ImageRef(path=str(pictures[0]))], max_length=20)


def test_saving_keeps_warnings_of_deepspeed_from_stdout(mini_folder, capfd):
    logging = pytest.importorskip("deepspeed.utils.logging")
    logger = logging.LoggerFactory.create_logger("DeepSpeed")  # as DeepSpeed does when accelerate imports it
    logger.warning("Setting accelerator to CPU.")  # its last words on a machine without a GPU
    logger.error("something is wrong")
    found = capfd.readouterr().out
    assert "something is wrong" in found and "Setting" not in found, "`mini_folder` was saved before"


def test_processor_survives_saving(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MoVAProcessor.from_pretrained(tmp_path)
    before, after = (p([ASK], [ImageRef(path=str(pictures[0]))]) for p in (processor, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def forward(mini, processor, pictures, features, routing, **more):
    batch = processor(
        [[*ASK, ("assistant", "left")]] * 3,
        [ImageRef(path=str(p)) for p in pictures],
        labels=True,
        padding_side="right",
    )
    return mini(**batch, experts=stack_features(features, EXPERTS, mini.device, mini.dtype), routing=routing, **more)


def test_experts_change_only_the_answers_of_their_rows(mini, processor, pictures, local_experts):
    images = [ImageRef(path=str(path)) for path in pictures]
    none = torch.zeros(3, 7, dtype=torch.bool)
    one_routed = none.clone()
    one_routed[1, EXPERTS.index("sam")] = True
    plain = forward(mini, processor, pictures, [{}, {}, {}], none)
    routed = forward(mini, processor, pictures, local_experts.fetch(images, [[], ["sam"], []]), one_routed)
    moved = (plain.logits - routed.logits).abs().amax((1, 2))
    assert moved[1] > 1e-3 and moved[0] < 1e-5 and moved[2] < 1e-5


def test_image_tokens_must_match_pictures(mini):
    ids = torch.full((1, 4), mini.config.image_token_id)
    with pytest.raises(ValueError, match="4 image tokens but the pictures give 0"):
        mini.embed(ids, None)


def test_expert_routing_lora_is_on_only_for_routing(mini, processor, pictures, tmp_path):
    none = torch.zeros(3, 7, dtype=torch.bool)
    before = forward(mini, processor, pictures, [{}] * 3, none).logits
    mini.add_routing_lora(rank=4)
    for name, parameter in mini.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(before, forward(mini, processor, pictures, [{}] * 3, none).logits)
    with mini.expert_routing():
        routed = forward(mini, processor, pictures, [{}] * 3, none).logits
    assert (routed - before).abs().max() > 1e-3
    assert torch.equal(before, forward(mini, processor, pictures, [{}] * 3, none).logits)

    mini.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / ROUTING_LORA).iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = MoVAForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.has_routing_lora
    torch.testing.assert_close(before, forward(again, processor, pictures, [{}] * 3, none).logits)
    with again.expert_routing():
        torch.testing.assert_close(routed, forward(again, processor, pictures, [{}] * 3, none).logits)


def tiny_llm(kind):
    sizes: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=64),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, head_dim=8),
        "gemma": lambda: transformers.GemmaConfig(**sizes, head_dim=8),
        "gemma2": lambda: transformers.Gemma2Config(**sizes, head_dim=8, sliding_window=64),
        "gemma3": lambda: transformers.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=64),
        # Yi-34B is a Llama with a long rope, few key heads and its own epsilon
        "yi": lambda: transformers.LlamaConfig(
            **(sizes | {"num_attention_heads": 8, "num_key_value_heads": 1}),
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0},
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]())


def with_llm(kind, **options):
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = assemble(tiny_llm(kind), bert, image_token_id=2, size="mini", blocks=1, **options)
    for parameter in model.adapter.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def mixed_batch(model):
    """Left-padded: no picture; one; one of a routing pass; two. Four pictures, the first and the last two routed."""
    rng = torch.Generator().manual_seed(0)
    fine, coarse = model.config.image_tokens, model.config.routing_tokens
    rows = [[5, 6, 7], [8, *[2] * fine, 9], [10, *[2] * coarse, 11, 12], [*[2] * fine, 13, *[2] * fine, 14]]
    longest = max(map(len, rows))
    channels = model.adapter.config.expert_channels
    experts = {
        "sam": Features(torch.randn(2, 25, channels["sam"], generator=rng), (5, 5)),
        "vary": Features(torch.randn(1, 16, channels["vary"], generator=rng), (4, 4)),
    }
    routing = torch.zeros(4, 7, dtype=torch.bool)
    routing[[0, 3], EXPERTS.index("sam")] = True
    routing[2, EXPERTS.index("vary")] = True
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(4, 3, 168, 168, generator=rng),
        "text_input_ids": torch.randint(3, 60, (4, 5), generator=rng),
        "text_attention_mask": torch.ones(4, 5, dtype=torch.long),
        "experts": experts,
        "routing": routing,
        "coarse": [False, True, False, False],
    }


def row_of(batch, row):
    """One row of `mixed_batch` by itself."""
    pictures = [[], [0], [1], [2, 3]][row]
    kept = batch["attention_mask"][row].bool()
    alone = {
        "input_ids": batch["input_ids"][row][kept][None],
        "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.long),
    }
    if not pictures:
        return alone
    routing = batch["routing"][pictures]
    experts = {}
    for name, features in batch["experts"].items():
        index = EXPERTS.index(name)
        order = batch["routing"][:, index].nonzero().flatten().tolist()
        mine = [order.index(picture) for picture in pictures if picture in order]
        if mine:
            experts[name] = Features(features.tokens[mine], features.grid)
    names = ("pixel_values", "text_input_ids", "text_attention_mask")
    coarse = [batch["coarse"][picture] for picture in pictures]
    return (
        alone
        | {name: batch[name][pictures] for name in names}
        | {"experts": experts, "routing": routing, "coarse": coarse}
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "yi"])
def test_any_causal_lm(kind, tmp_path):
    """Forward, generate, saving and loading, with rows of every kind in one batch: each as if it were alone."""
    model = with_llm(kind)
    weights = tiny_llm(kind).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.language_model.state_dict().items())
    batch = mixed_batch(model)
    with torch.no_grad():
        logits = model(**batch).logits
    said = model.generate(**batch, max_new_tokens=5, do_sample=False)
    for row in range(4):
        alone = row_of(batch, row)
        with torch.no_grad():
            torch.testing.assert_close(model(**alone).logits[0, -1], logits[row, -1], atol=5e-5, rtol=0)
        words = model.generate(**alone, max_new_tokens=5, do_sample=False)[0]
        assert torch.equal(words, said[row, : len(words)])
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again.language_model) is type(model.language_model)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, logits, atol=5e-5, rtol=0)


def test_gradient_checkpointing_of_llm_and_adapter_changes_no_gradient():
    model = with_llm("qwen2").train()
    batch = mixed_batch(model)
    labels = answers_of(batch)

    def gradients():
        model.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    calls = []
    hook = model.language_model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.adapter.gradient_checkpointing
    again = gradients()
    hook.remove()
    assert len(calls) == 2, "the LLM's layers are run once more"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    model.gradient_checkpointing_disable()
    assert not model.adapter.gradient_checkpointing


def answers_of(batch):
    return batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 2), IGNORE)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_loss_of_the_answers_is_that_of_all_logits(kind):
    """Gemma 2 caps its logits, so that its own head must be asked."""
    model = with_llm(kind).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = mixed_batch(model)
    labels = answers_of(batch)
    predicting, targets = labels[:, 1:] != IGNORE, labels[:, 1:]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits = model(**batch).logits[:, :-1][predicting]
    wanted = torch.nn.functional.cross_entropy(logits.float(), targets[predicting])
    expected = gradients(wanted)
    said = model(**batch, labels=labels)
    torch.testing.assert_close(said.loss, wanted)
    torch.testing.assert_close(said.logits, logits)
    for name, gradient in gradients(said.loss).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    with torch.no_grad():
        part = model(**batch, labels=labels, num_items_in_batch=5 * int(predicting.sum())).loss
        torch.testing.assert_close(part, wanted / 5)
        counts = predicting.sum(1)
        weighed = model(**batch, labels=labels, loss_weights=1 / counts, num_items_in_batch=len(counts))
        of_rows = torch.stack([rows.mean() for rows in (-torch.log_softmax(logits.float(), -1)).gather(
            1, targets[predicting][:, None])[:, 0].split(counts.tolist())])  # fmt: skip
        torch.testing.assert_close(weighed.loss, of_rows.mean())
        torch.testing.assert_close(weighed.row_losses, of_rows * counts)
        every = model.eval()(**batch, labels=labels)
        torch.testing.assert_close(
            model(**batch, labels=labels, answers_only=True).logits, every.logits[:, :-1][predicting]
        )
    torch.testing.assert_close(every.loss, wanted)
    assert every.logits.shape[:2] == labels.shape
    nothing = model.train()(**batch, labels=torch.full_like(labels, IGNORE)).loss
    assert nothing == 0 and not any(gradient.any() for gradient in gradients(nothing).values())


def test_an_unseen_picture_changes_no_embedding_and_gives_every_part_a_gradient():
    model = with_llm("llama").train()
    side = model.config.base_arch["image_size"]
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    picture = {
        "pixel_values": torch.zeros(1, 3, side, side),
        "text_input_ids": torch.tensor([[1, 2]]),
        "text_attention_mask": torch.ones(1, 2, dtype=torch.long),
        "unseen": True,
    }
    assert torch.equal(model.fuse(inputs["input_ids"], picture), model.embed(inputs["input_ids"]))
    model(**inputs, **picture, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert not parameter.grad.any() or name.startswith("language_model."), name


def test_dtype_and_device_map(tmp_path):
    model = with_llm("llama")
    batch = mixed_batch(model)
    with torch.no_grad():
        logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    half = MoVAForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (half(**batch).logits.float() - logits)[real].abs().max() < 0.1
    places = {"base_encoder": "cpu", "adapter": "cpu", "language_model": "disk"}
    for device_map in ({"": "cpu"}, "auto", places):
        mapped = MoVAForConditionalGeneration.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        with torch.no_grad():
            torch.testing.assert_close(mapped(**batch).logits, logits)
    assert {"LlamaDecoderLayer", "MoVAdapter", "Clip"} <= set(model._no_split_modules)


def test_generate_streams():
    model = with_llm("llama")
    alone = row_of(mixed_batch(model), 1)
    tokens = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            tokens.extend(value.flatten().tolist())

        def end(self):
            tokens.append(None)

    said = model.generate(**alone, max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert tokens == [*said[0].tolist(), None]


def test_one_batch_holds_routing_and_answer_rows_with_the_lora_on_for_some():
    model = with_llm("llama")
    batch = mixed_batch(model)
    model.add_routing_lora(rank=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        off = model(**batch).logits, model.generate(**batch, max_new_tokens=5, do_sample=False)
        with model.expert_routing():
            on = model(**batch).logits, model.generate(**batch, max_new_tokens=5, do_sample=False)
        with model.expert_routing([False, False, True, False]):
            mixed = model(**batch).logits, model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert not torch.equal(on[0][2], off[0][2])
    for row, wanted in enumerate((off, off, on, off)):
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[0][row][real], wanted[0][row][real], atol=5e-5, rtol=0)
        assert torch.equal(mixed[1][row], wanted[1][row])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, off[0]), "and off again"


def test_wrong_pictures_are_named():
    model = with_llm("llama")
    batch = mixed_batch(model)

    def run(**changes):
        model(**{**batch, **changes})

    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        run(input_ids=None)
    with pytest.raises(ValueError, match="hold the pictures already: give no pixel_values"):
        run(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="117 image tokens but the pictures give 144"):
        run(coarse=False)
    with pytest.raises(ValueError, match="coarse tells of 3 pictures, there are 4"):
        run(coarse=[True] * 3)
    with pytest.raises(ValueError, match="117 image tokens but the pictures give 0"):
        run(pixel_values=None)
    with pytest.raises(ValueError, match=r"routing is torch.bool \(4, 6\).*\(4, 7\)"):
        run(routing=batch["routing"][:, :6])
    with pytest.raises(ValueError, match="needs the gate's text"):
        run(text_input_ids=None)
    with pytest.raises(ValueError, match="sam: tokens are"):
        run(experts={**batch["experts"], "sam": Features(batch["experts"]["sam"].tokens, (5, 6))})
    unrouted = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "coarse")}
    assert model(**unrouted).logits.shape[0] == 4, "no text is needed where nothing is routed"


def test_light_router_learns_and_is_saved(tmp_path):
    model = with_llm("llama")
    model.add_light_router(hidden=16)
    router = model.light_router
    torch.manual_seed(0)
    shared = torch.randn(32)  # as frozen features are: what tells them apart is small
    text, seen = shared + torch.randn(64, 32) / 100, torch.randn(64, 128)
    routing = torch.stack([text[:, 0] > shared[0], seen[:, 0] > 0, *[torch.zeros(64, dtype=torch.bool)] * 5], dim=1)
    assert router.loss(text, seen, routing).item() == pytest.approx(0.6931, abs=1e-3), "even odds at first"
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-2)
    for _ in range(80):
        loss = router.loss(text, seen, routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    router.eval()
    assert torch.equal(router(text, seen) > 0, routing)
    assert router.choose(torch.tensor([0.1, 3.0, -1, 2, 1, 0, 0.2]), 2) == [
        (1, pytest.approx(0.9526, abs=1e-4)),
        (3, pytest.approx(0.8808, abs=1e-4)),
    ]
    model.save_pretrained(tmp_path)
    again = MoVAForConditionalGeneration.from_pretrained(tmp_path)
    assert again.light_router is not None
    assert torch.equal(again.light_router(text, seen), router(text, seen))


def test_push_to_hub_takes_the_lora_along(monkeypatch, tmp_path):
    """What would be uploaded, without a hub: `push_to_hub` hands a folder over, and the LoRA must lie in it by then."""
    model = with_llm("llama")
    model.add_routing_lora(rank=2)
    uploaded = []

    def push(self, repo_id, **options):
        uploaded.append((repo_id, sorted(path.name for path in (tmp_path / "there").rglob("adapter_*"))))

    monkeypatch.setattr(MoVAForConditionalGeneration, "push_to_hub", push)
    model.save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="me/mova")
    assert uploaded == [("me/mova", ["adapter_config.json", "adapter_model.safetensors"])]
