"""A training step on a GPU; `make gpu` runs it."""

import pytest
import torch

from pipelines.train.batches import MicroBatch
from tests.pipelines.train.test_parallel import Case, batch_of, tensors, tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no GPU")
@pytest.mark.parametrize("routing", ["apart", "one_unrouted", "one_text_only"])
def test_a_pinned_batch_gives_the_gradients_of_the_cpu(routing):
    """Experts without a picture run on zero rows, which every attention kernel must take."""
    case = Case(routing=routing)
    model = tiny_model(frozen=False)
    inputs = tensors(batch_of(0, case), model)
    count = torch.ones(len(inputs["labels"]), dtype=torch.int64)
    batch = MicroBatch(inputs=inputs, answers=count, divisor=count.float(), positions=count, sources=count)

    def step(device: str) -> tuple[float, dict[str, torch.Tensor]]:
        torch.nn.Module.to(model, device).zero_grad()
        loss = model(**(batch.pin_memory() if device == "cuda" else batch).to(torch.device(device)).inputs).loss
        loss.backward()
        return loss.item(), {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}

    (loss, gradients), (loss_there, gradients_there) = step("cpu"), step("cuda")
    assert loss_there == pytest.approx(loss, abs=1e-3) and gradients.keys() == gradients_there.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_there[name], gradient, atol=2e-3, rtol=2e-2, msg=name)
