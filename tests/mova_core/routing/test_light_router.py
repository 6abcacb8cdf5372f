"""The light router by itself: what its normalisation remembers, and whom it chooses."""

import torch
from torch.testing import assert_close

from mova_core.routing.light_router import FrozenFeatureNorm, LightRouter


def test_features_are_normalised_by_the_plain_mean_over_all_batches():
    torch.manual_seed(0)
    norm = FrozenFeatureNorm(3)
    batches = [torch.randn(size, 3) * scale + 5 for size, scale in ((4, 1.0), (8, 2.0), (4, 3.0))]
    for batch in batches:
        trained = norm(batch)
        assert_close(trained, norm.eval()(batch))  # training sees what inference will see
        norm.train()
    mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    variance = torch.stack([batch.var(0) for batch in batches]).mean(0)
    features = torch.randn(2, 3)
    assert_close(norm.eval()(features), (features - mean) / (variance + norm.eps).sqrt())
    assert set(norm.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}, "nothing of it learns"


def test_a_fresh_router_chooses_nobody():
    """Every probability is 0.5, and an expert is useful over that."""
    router = LightRouter(text_width=4, base_width=6, experts=3, hidden=8).eval()
    logits = router(torch.randn(2, 4), torch.randn(2, 6))
    assert logits.tolist() == [[0.0] * 3] * 2
    assert LightRouter.choose(logits[0]) == []
    assert [expert for expert, _ in LightRouter.choose(torch.tensor([0.1, -1.0, 2.0, 0.2, 0.3]))] == [2, 4, 3]


def test_features_of_another_dtype_are_read_in_the_router_s():
    router = LightRouter(text_width=4, base_width=6, experts=3, hidden=8).to(torch.bfloat16).eval()
    logits = router(torch.randn(2, 4), torch.randn(2, 6, dtype=torch.float16))
    assert logits.dtype == torch.float32 and logits.shape == (2, 3)
