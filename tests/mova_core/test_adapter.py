"""MoVAdapter against the paper's equations written out, and what it promises beyond them: routing, growth, errors."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mova_core.adapter import AdapterConfig, DynamicGatingNetwork, MoVAdapter, Rope2D, align
from mova_core.experts.base import Features

POOL = {"dinov2": 24, "vary": 16, "codetr": 8, "sam": 12}
GRIDS = {"dinov2": (5, 5), "vary": (3, 4), "codetr": (6, 6), "sam": (8, 8)}
BERT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CLOSE: dict[str, Any] = {"atol": 5e-6, "rtol": 5e-6}
CLOSE_GRADIENT: dict[str, Any] = {
    "atol": 5e-5,
    "rtol": 5e-5,
}  # the gate and the alignment are in float32 whatever goes in


def make_config(**changes) -> AdapterConfig:
    sizes: dict[str, Any] = {
        "width": 64,
        "out_width": 40,
        "grid": 6,
        "blocks": 2,
        "heads": 4,
        "text_encoder": BERT,
        "text_width": 32,
    }
    return AdapterConfig(**{"expert_channels": POOL, **sizes, **changes})


def shake(module: nn.Module) -> None:
    """Moves every parameter off its initial value, else zero-initialised branches would hide what is wrong in them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


@pytest.fixture
def adapter() -> Any:  # a MoVAdapter; mypy knows nothing of the modules inside a ModuleList
    torch.manual_seed(0)
    adapter = MoVAdapter(make_config())
    shake(adapter)
    return adapter.eval()


def make_batch(batch: int, seed: int = 0) -> tuple[Tensor, dict[str, Features], dict[str, Tensor]]:
    """Base tokens, features of every expert for every picture, and text."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, 36, 64, generator=generator)
    experts = {
        name: Features(torch.randn(batch, height * width, POOL[name], generator=generator), (height, width))
        for name, (height, width) in GRIDS.items()
    }
    ids = torch.randint(1, 50, (batch, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(2, 10, (batch, 1), generator=generator)).long()
    return base, experts, {"input_ids": ids, "attention_mask": mask}


def only_routed(experts: dict[str, Features], routing: Tensor) -> dict[str, Features]:
    """The same features with only the routed pictures' rows, and without the experts that nobody is routed to."""
    return {
        name: Features(features.tokens[rows], features.grid)
        for (name, features), rows in zip(experts.items(), routing.unbind(1), strict=True)
        if rows.any()
    }


ROUTINGS = [
    [[0, 0, 0, 0]] * 5,
    [[1, 0, 0, 0]] * 5,
    [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]],
    [[1, 1, 1, 1]] * 5,
    *torch.randint(0, 2, (4, 5, 4), generator=torch.Generator().manual_seed(3)).tolist(),
]


class Equations:
    """The paper's equations and the published details, with every attention map written out and every expert run."""

    def __init__(self, adapter: Any):
        self.adapter, self.config = adapter, adapter.config

    def rotate(self, x: Tensor) -> Tensor:
        """Each pair of channels turns in its plane: half of a head by the row, half by the column."""
        side, speeds = torch.arange(self.config.grid, device=x.device), x.shape[-1] // 4
        speed = 10000.0 ** (-torch.arange(speeds, device=x.device) / speeds)
        angle = torch.cat([place.reshape(-1, 1) * speed for place in torch.meshgrid(side, side, indexing="ij")], dim=1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def attention(self, layer: Any, x: Tensor, source: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

        q = self.rotate(split(F.linear(x, layer.q_proj.weight)))
        k = self.rotate(split(F.linear(source, layer.k_proj.weight)))
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, H, N, N)
        y = (weights @ split(F.linear(source, layer.v_proj.weight))).transpose(1, 2).flatten(2)
        return layer.proj(layer.inner_attn_ln(y))

    def gate(self, layer: Any, x: Tensor, text: Tensor, routing: Tensor) -> Tensor:
        logits = layer[2](F.gelu(layer[0](torch.cat([text, x.mean(1)], dim=-1))))
        weights = (logits - 1e6 * (~routing).float()).softmax(-1)
        smallest_kept = weights.sort(descending=True).values[:, self.config.topk - 1 : self.config.topk]
        weights = torch.where(weights >= smallest_kept, weights, 0)
        return weights / weights.sum(-1, keepdim=True) * routing.any(1, keepdim=True)

    def tail(self, x: Tensor) -> Tensor:
        def norm(t: Tensor, layer: Any) -> Tensor:
            return F.layer_norm(t.movedim(1, -1), t.shape[1:2], layer.weight, layer.bias).movedim(-1, 1)

        def residual_block(t: Tensor, block: Any) -> Tensor:
            y = F.silu(norm(F.conv2d(t, block.conv1.conv.weight), block.conv1.bn))
            y = F.silu(norm(F.conv2d(y, block.conv2.conv.weight, padding=1, groups=y.shape[1]), block.conv2.bn))
            squeezed = F.silu(block.se.fc1(y.mean((2, 3), keepdim=True)))
            y = y * block.se.fc2(squeezed).sigmoid()
            return t + norm(F.conv2d(y, block.conv3.conv.weight), block.conv3.bn)

        grid = self.config.grid
        plane = x.transpose(1, 2).unflatten(2, (grid, grid))
        plane = F.avg_pool2d(residual_block(plane, self.adapter.downsample[0].b1), 2)
        plane = residual_block(plane, self.adapter.downsample[2].b1)
        return self.adapter.mlp(plane.flatten(2).transpose(1, 2))

    def __call__(self, base: Tensor, experts: dict[str, Features], routing: Tensor, text: Tensor) -> Tensor:
        grid = self.config.grid
        aligned = []
        for features in experts.values():  # Eq. 1
            plane = features.tokens.transpose(1, 2).unflatten(2, features.grid)
            plane = F.interpolate(plane.float(), size=(grid, grid), mode="bilinear", align_corners=False)
            aligned.append(plane.flatten(2).transpose(1, 2).to(base.dtype))
        x = base + self.adapter.pos_embed
        for block in self.adapter.blocks:
            gate = self.gate(block.gate, x, text, routing)
            learned = [
                self.attention(layer, block.norm1[e](x), block.norm2[e](aligned[e]))
                for e, layer in enumerate(block.cross_attn)
            ]
            x = x + sum(gate[:, e, None, None] * y for e, y in enumerate(learned))
            normed = block.norm3(x)
            x = x + self.attention(block.self_attn, normed, normed)
            mlp, normed = block.mlp, block.norm4(x)
            x = x + mlp.w3(mlp.ffn_ln(F.silu(mlp.w1(normed)) * mlp.w2(normed)))
        return self.tail((x + base) / 2)


def gradients(adapter: MoVAdapter, out: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Of a fixed random probe of the output; zero where there is none."""
    named = dict(adapter.named_parameters()) | {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((out * probe).sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routed_equals_the_dense_equations(adapter, routing):
    """Same output and same gradients, of every parameter and input, as running every expert on every picture."""
    adapter.double()  # so that what differs is a mistake and not rounding
    base, experts, text = make_batch(5)
    routing = torch.tensor(routing, dtype=torch.bool)
    inputs = [base.double().requires_grad_(), *(f.tokens.double().requires_grad_() for f in experts.values())]
    experts = {name: Features(t, f.grid) for (name, f), t in zip(experts.items(), inputs[1:], strict=True)}
    dense = Equations(adapter)(inputs[0], experts, routing, adapter.encode_text(**text))
    wanted = gradients(adapter, dense, *inputs)
    for features in (experts, only_routed(experts, routing)):
        out = adapter(inputs[0], features, routing, text)
        assert out.shape == (5, 9, 40)
        torch.testing.assert_close(out, dense, **CLOSE)
        found = gradients(adapter, out, *inputs)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, **CLOSE_GRADIENT), name


@pytest.mark.parametrize("routing", ROUTINGS[2:5])
def test_a_batch_equals_its_pictures_one_by_one(adapter, routing):
    adapter.double()
    base, experts, text = make_batch(5)
    base, routing = base.double(), torch.tensor(routing, dtype=torch.bool)
    out, gates = adapter(base, experts, routing, text, return_gates=True)
    for i in range(5):
        row = slice(i, i + 1)
        alone = {name: Features(features.tokens[row], features.grid) for name, features in experts.items()}
        single, gate = adapter(base[row], alone, routing[row], {k: v[row] for k, v in text.items()}, return_gates=True)
        torch.testing.assert_close(out[row], single, **CLOSE)
        for whole, single in zip(gates, gate, strict=True):
            torch.testing.assert_close(whole[row], single, **CLOSE)


def test_an_extractor_runs_only_on_routed_pictures(adapter):
    base, experts, text = make_batch(5)
    routing = torch.tensor(ROUTINGS[2], dtype=torch.bool)
    rows: dict[int, list[int]] = {}
    for block in adapter.blocks:
        for index, extractor in enumerate(block.cross_attn):
            extractor.register_forward_hook(lambda _m, args, _o, i=index: rows.setdefault(i, []).append(len(args[0])))
    adapter.train()(base, experts, routing, text)
    assert rows == {0: [3, 3], 1: [2, 2], 2: [2, 2], 3: [2, 2]}
    rows.clear()
    adapter.eval()(base, experts, torch.zeros_like(routing), text)
    assert rows == {}


@pytest.mark.parametrize("names", [[], ["sam"], ["dinov2", "vary", "sam"]], ids=["none", "one", "three"])
def test_in_training_every_parameter_has_a_gradient_whoever_is_routed(adapter, names):
    base, experts, text = make_batch(2)
    routing = torch.tensor([[name in names for name in POOL]] * 2)
    said = adapter(base, experts, routing, text)
    learnt = adapter.train()(base, {name: experts[name] for name in names}, routing, text)
    assert torch.equal(learnt, said), "zero rows change no bit"
    learnt.sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if ".cross_attn." in name:
            expert = list(POOL)[int(name.split(".cross_attn.")[1].split(".")[0])]
            assert bool(parameter.grad.any()) == (expert in names), name


def test_gates_explain(adapter):
    """Weights of the routed experts add up to one, of at most three; none routed, none weighted."""
    base, experts, text = make_batch(5)
    routing = torch.tensor(ROUTINGS[2], dtype=torch.bool)
    _, gates = adapter(base, experts, routing, text, return_gates=True)
    assert len(gates) == 2
    for gate in gates:
        assert gate.shape == (5, 4) and gate.dtype == torch.float32 and not gate.requires_grad
        assert not gate[~routing].any()
        torch.testing.assert_close(gate.sum(1), torch.tensor([0.0, 1, 1, 1, 1]))
        assert (gate > 0).sum(1).tolist() == [0, 2, 1, 3, 2]


def test_text_as_tokens_or_features_or_one_for_all(adapter):
    base, experts, text = make_batch(3)
    routing = torch.ones(3, 4, dtype=torch.bool)
    feature = adapter.encode_text(**text)
    assert feature.shape == (3, 32)
    assert torch.equal(adapter(base, experts, routing, text), adapter(base, experts, routing, feature))
    first = {name: tensor[:1] for name, tensor in text.items()}
    shared = adapter(base, experts, routing, first)
    torch.testing.assert_close(shared, adapter(base, experts, routing, feature[:1].repeat(3, 1)), **CLOSE)


def test_features_of_another_dtype_and_storage(adapter):
    """The store's bf16 rows go in as they come."""
    base, experts, text = make_batch(3)
    routing = torch.tensor([[1, 0, 1, 0], [0] * 4, [1] * 4], dtype=torch.bool)
    stored = {name: Features(features.tokens.bfloat16(), features.grid) for name, features in experts.items()}
    widened = {name: Features(features.tokens.float(), features.grid) for name, features in stored.items()}
    assert torch.equal(adapter(base, stored, routing, text), adapter(base, widened, routing, text))


def test_low_precision(adapter):
    base, experts, text = make_batch(3)
    routing = torch.tensor([[1, 0, 1, 0], [0] * 4, [1] * 4], dtype=torch.bool)
    with torch.no_grad():
        exact = adapter(base, experts, routing, text)
    scale = exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adapter.train()(base, experts, routing, text)
    mixed.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)
    half = adapter.to(torch.bfloat16)(base, experts, routing, text)
    assert half.dtype == torch.bfloat16
    assert (mixed - exact).abs().max() < 0.05 * scale and (half - exact).abs().max() < 0.05 * scale


def test_a_fresh_adapter_starts_as_published():
    """Experts, self-attention and MLP start at zero output, the gate uniform, the residual blocks as the identity."""
    torch.manual_seed(0)
    adapter = MoVAdapter(make_config())
    base, experts, text = make_batch(3)
    routing = torch.tensor([[1, 0, 1, 0], [0] * 4, [1, 0, 0, 1]], dtype=torch.bool)
    out, gates = adapter(base, experts, routing, text, return_gates=True)
    plane = F.avg_pool2d(base.transpose(1, 2).unflatten(2, (6, 6)), 2)
    torch.testing.assert_close(out, adapter.mlp(plane.flatten(2).transpose(1, 2)), **CLOSE)
    assert gates[0].tolist() == [[0.5, 0, 0.5, 0], [0] * 4, [0.5, 0, 0, 0.5]]


def test_inside_a_pretrained_model(tmp_path):
    """transformers neither overwrites the initialisation nor what it loaded, and fills what a checkpoint lacks."""
    from safetensors.torch import load_file, save_file
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "adapter_holder"

        def __init__(self, adapter=None, **kwargs):
            self.adapter = adapter
            super().__init__(**kwargs)

    class Holder(PreTrainedModel):
        config_class = Config
        supports_gradient_checkpointing = True

        def __init__(self, config):
            super().__init__(config)
            self.adapter = MoVAdapter(AdapterConfig(**config.adapter))
            self.post_init()

        def _init_weights(self, module):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    plain = make_config(expert_channels={"zoo": 24, "ape": 16}).to_dict()
    model: Any = Holder(Config(adapter=json.loads(json.dumps(plain, sort_keys=True))))
    assert list(model.adapter.config.expert_channels) == ["zoo", "ape"]
    assert not model.adapter.blocks[0].self_attn.proj.weight.any() and model.adapter.blocks[0].norm3.weight.eq(1).all()
    model.gradient_checkpointing_enable()
    assert model.adapter.gradient_checkpointing

    shake(model)
    model.save_pretrained(tmp_path)
    again = Holder.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

    weights = load_file(tmp_path / "model.safetensors")
    lacking = [n for n in weights if "blocks.1.gate" in n or "blocks.1.self_attn" in n]
    save_file({n: t for n, t in weights.items() if n not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    partial: Any = Holder.from_pretrained(tmp_path)
    for name, tensor in partial.state_dict().items():
        if name in lacking:
            assert tensor.isfinite().all()
        else:
            assert torch.equal(tensor, weights[name]), name
    assert not partial.adapter.blocks[1].gate[2].weight.any()
    rope = Rope2D(16, 6)
    assert torch.equal(partial.adapter.blocks[1].self_attn.rope.freqs_cos, rope.freqs_cos)


def test_freezing_the_text_encoder():
    dropping = {**BERT, "hidden_dropout_prob": 0.5}
    adapter = MoVAdapter(make_config(text_encoder=dropping, freeze_text_encoder=True)).train()
    shake(adapter)
    base, experts, text = make_batch(2)
    assert torch.equal(adapter.encode_text(**text), adapter.encode_text(**text))
    adapter(base, experts, torch.ones(2, 4, dtype=torch.bool), text).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in adapter.text_encoder.parameters())
    trained: Any = MoVAdapter(make_config())
    shake(trained)
    trained(base, experts, torch.ones(2, 4, dtype=torch.bool), text).sum().backward()
    assert trained.text_encoder.bert.embeddings.word_embeddings.weight.grad.any()


@pytest.mark.parametrize("with_new", [False, True], ids=["not_routed", "routed"])
def test_adding_an_expert_changes_nothing_until_trained(adapter, with_new):
    base, experts, text = make_batch(5)
    routing = torch.tensor(ROUTINGS[2], dtype=torch.bool)
    before, gates_before = adapter(base, experts, routing, text, return_gates=True)
    weights = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.add_expert("radar", 20)

    assert list(adapter.config.expert_channels) == [*POOL, "radar"]
    for name, tensor in adapter.state_dict().items():
        if name in weights:
            assert torch.equal(tensor[: len(weights[name])], weights[name]), name
        else:
            assert any(part in name for part in ("cross_attn.4.", "norm1.4.", "norm2.4.")), name
    wider = torch.cat([routing, torch.full((5, 1), with_new)], dim=1)
    radar = Features(torch.randn(5, 49, 20), (7, 7))
    after, gates = adapter(base, {**experts, "radar": radar}, wider, text, return_gates=True)
    torch.testing.assert_close(after, before, **CLOSE)
    for gate, gate_before in zip(gates, gates_before, strict=True):
        torch.testing.assert_close(gate[:, :4], gate_before, **CLOSE)


def test_an_added_expert_learns_and_survives_saving(adapter):
    base, experts, text = make_batch(5)
    adapter.add_expert("radar", 20)
    experts["radar"] = Features(torch.randn(5, 49, 20), (7, 7))
    routing = torch.tensor([[1, 0, 1, 0, 1]] * 5, dtype=torch.bool)
    before = adapter(base, experts, routing, text)
    before.square().sum().backward()
    for block in adapter.blocks:
        assert block.cross_attn[4].proj.weight.grad.any()
        assert block.gate[2].weight.grad[:4].any()
    new = [p for block in adapter.blocks for p in (*block.cross_attn[4].parameters(), block.gate[2].weight)]
    torch.optim.SGD(new, lr=0.1).step()
    out = adapter(base, experts, routing, text)
    assert (out - before).abs().max() > 1e-3

    copy = MoVAdapter(AdapterConfig(**json.loads(json.dumps(adapter.config.to_dict()))))
    copy.load_state_dict(adapter.state_dict())
    assert torch.equal(copy.eval()(base, experts, routing, text), out)
    with pytest.raises(ValueError, match="radar"):
        adapter.add_expert("radar", 20)


BROKEN = (
    *("base width", "base grid", "routing width", "routing rows", "routing dtype", "missing", "unknown", "rows"),
    *("rows of an unused expert", "channels", "grid", "one picture's features", "text rows", "text width"),
    "text length",
)


def broken(field: str):
    """A good batch with one thing wrong, and what the error must say."""
    base, experts, text = make_batch(3)
    routing = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    dino = experts["dinov2"].tokens
    match field:
        case "base width":
            return base[..., :-1], experts, routing, text, r"base is \(3, 36, 63\).*36, 64"
        case "base grid":
            return base[:, :-1], experts, routing, text, r"base is \(3, 35, 64\)"
        case "routing width":
            return base, experts, routing[:, :3], text, r"routing is torch.bool \(3, 3\).*\(3, 4\).*dinov2"
        case "routing rows":
            return base, experts, routing[:2], text, r"routing is torch.bool \(2, 4\)"
        case "routing dtype":
            return base, experts, routing.float(), text, "routing is torch.float32"
        case "missing":
            del experts["vary"]
            return base, experts, routing, text, r"pictures \[1\] are routed to vary"
        case "unknown":
            return base, {**experts, "radar": experts["vary"]}, routing, text, "radar"
        case "rows":
            short = Features(dino[:1], (5, 5))
            return base, {**experts, "dinov2": short}, routing, text, r"dinov2: 1 rows.*2 of 3 pictures"
        case "rows of an unused expert":
            return base, {**experts, "sam": Features(experts["sam"].tokens[:1], (8, 8))}, routing, text, "sam: 1 rows"
        case "channels":
            return base, {**experts, "dinov2": Features(dino[..., :-1], (5, 5))}, routing, text, "dinov2.*24 channels"
        case "grid":
            return base, {**experts, "dinov2": Features(dino, (5, 4))}, routing, text, "dinov2.*5x4 grid"
        case "one picture's features":
            return base, {**experts, "dinov2": Features(dino[0], (5, 5))}, routing, text, "dinov2"
        case "text rows":
            return base, experts, routing, torch.zeros(2, 32), r"text is \(2, 32\)"
        case "text width":
            return base, experts, routing, torch.zeros(3, 31), r"text is \(3, 31\)"
        case "text length":
            ids = torch.ones(3, 513, dtype=torch.long)
            return base, experts, routing, {"input_ids": ids, "attention_mask": ids}, "513 tokens"


@pytest.mark.parametrize("field", BROKEN)
def test_errors_name_what_is_wrong(adapter, field):
    *inputs, message = broken(field)
    with pytest.raises(ValueError, match=message):
        adapter(*inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 60, "heads": 7}, "7 heads"),
        ({"width": 60, "heads": 0}, "0 heads"),
        ({"text_width": 31}, "text_width is 31"),
        ({"expert_channels": {}}, "pool"),
        ({"blocks": 0}, "blocks"),
        ({"topk": 0}, "topk"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**change)


def test_config_keeps_the_pools_order():
    config = make_config(expert_channels={"zoo": 3, "ape": 2, "bee": 1})
    text = json.dumps(config.to_dict(), sort_keys=True)
    assert AdapterConfig(**json.loads(text)) == config
    assert list(AdapterConfig(**json.loads(text)).expert_channels) == ["zoo", "ape", "bee"]
    assert AdapterConfig(expert_channels=POOL, out_width=8).heads == 16


def test_align_keeps_a_plane():
    """A linear ramp stays one away from the border, row-major, on a grid that is not square."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    tokens = torch.stack([rows, columns], dim=-1).flatten(0, 1)[None]
    out = align(tokens, (4, 8), 16).unflatten(1, (16, 16))[0]
    expected_row = (torch.arange(16) + 0.5) / 4 - 0.5
    torch.testing.assert_close(out[2:-2, 0, 0], expected_row[2:-2])
    torch.testing.assert_close(out[0, 1:-1, 1], (torch.arange(16)[1:-1] + 0.5) / 2 - 0.5)


def test_no_attention_map_is_stored(adapter):
    """What is kept for the backward pass grows with N, not with its square."""

    def kept(grid: int) -> int:
        torch.manual_seed(0)
        model = MoVAdapter(make_config(grid=grid, blocks=1))
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        experts = {"sam": Features(torch.randn(1, 64, 12), (8, 8))}
        routing = torch.tensor([[0, 0, 0, 1]], dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.randn(1, grid * grid, 64), experts, routing, torch.zeros(1, 32))
        del out
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        return sum(size for pointer, size in seen.items() if pointer not in own)

    assert kept(24) < 4.4 * kept(12)


def test_the_gate_of_added_experts_is_their_own_sigmoid_and_zero_where_not_routed():
    """Two experts added one after the other to a gate in bfloat16, beside two first experts."""
    torch.manual_seed(0)
    gate = DynamicGatingNetwork(width=8, text_width=4, experts=2, topk=1).to(torch.bfloat16)
    gate.add_expert()
    gate.add_expert()
    shake(gate)
    tokens, text = torch.randn(3, 5, 8, dtype=torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    routing = torch.tensor([[True, True, True, False], [False, True, False, True], [False] * 4])
    logits = nn.Sequential(*gate)(torch.cat((text, tokens.mean(1)), dim=1)).float()
    weights = gate(tokens, text, routing)
    assert weights.dtype == torch.float32 and {parameter.dtype for parameter in gate.parameters()} == {torch.bfloat16}
    assert torch.equal(weights[:, 2:], torch.where(routing[:, 2:], logits[:, 2:].sigmoid(), 0.0))
    best = int(logits[0, :2].argmax())
    assert weights[:, :2].tolist() == [[float(best == 0), float(best == 1)], [0.0, 1.0], [0.0, 0.0]]


def test_the_feature_of_a_question_is_its_first_token_whatever_is_padded(adapter):
    ids = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 11, 12, 13, 14, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    features = adapter.encode_text(ids, mask)
    bert = adapter.text_encoder.bert
    for row, length in ((0, 4), (1, 6)):
        alone = bert(ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(features[row], alone[0], **CLOSE)
        assert (features[row] - alone[1]).abs().max() > 1e-3
    assert features.requires_grad and not adapter.encode_text(ids[:, :4], None).isnan().any()
    with torch.no_grad():
        assert not adapter.encode_text(ids, mask).requires_grad


def test_the_gate_reads_as_many_tokens_as_its_encoder_has_positions():
    adapter = MoVAdapter(make_config(text_encoder={**BERT, "max_position_embeddings": 6}))
    assert adapter.encode_text(torch.ones(1, 6, dtype=torch.long)).shape == (1, 32)
    with pytest.raises(ValueError, match="the gate's text has 7 tokens, its encoder reads 6: truncate it"):
        adapter.encode_text(torch.ones(1, 7, dtype=torch.long))


def test_each_added_expert_counts_in_the_config(adapter):
    for count, name in enumerate(("radar", "sonar"), start=1):
        adapter.add_expert(name, 20)
        assert adapter.config.added == count and list(adapter.config.expert_channels)[-1] == name
        assert all(block.gate.added == count for block in adapter.blocks)
