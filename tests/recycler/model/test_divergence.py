"""The divergence of one distribution of the next token from another."""

import torch

from recycler.model.divergence import kl_divergence


def test_it_is_that_of_torch() -> None:
    exact, other = torch.randn((2, 3, 50), generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, exact, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(exact, other), expected)


def test_what_is_impossible_counts_nothing_and_of_nan_it_is_nan() -> None:
    exact = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 1.0, 2.0]]).log_softmax(-1)
    other = torch.tensor([[0.0, 0.0, 5.0], [torch.nan, 1.0, 2.0]]).log_softmax(-1)
    assert kl_divergence(exact, exact).tolist() == [0, 0]
    assert kl_divergence(exact, other).isnan().tolist() == [False, True]
