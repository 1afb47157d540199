"""SASRec: causal, blind to padding, each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.cascade.sasrec import SasRec

ITEMS, WIDTH, LENGTH = 30, 16, 12


@pytest.fixture
def network() -> SasRec:
    torch.manual_seed(0)
    network = SasRec(ITEMS, WIDTH, blocks=2, heads=2, length=LENGTH, dropout=0.3)
    for parameter in network.parameters():  # away from an initialisation at which positions and biases hardly matter
        parameter.data.normal_(0, 0.5)
    network.item.weight.data[0].zero_()
    return network.eval()


def sequence(*items: int, columns: int = LENGTH) -> Tensor:
    return torch.tensor([[0] * (columns - len(items)) + list(items)])


def test_shapes_and_zero_states_at_padding(network: SasRec) -> None:
    states = network(sequence(3, 1, 4))
    assert states.shape == (1, LENGTH, WIDTH)
    assert bool((states[0, :-3] == 0).all()) and bool((states[0, -3:] != 0).any(1).all())


def test_a_state_reads_its_past_and_never_its_future(network: SasRec) -> None:
    items = torch.randint(1, ITEMS, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    states = network(items)
    for changed in range(LENGTH):
        other = items.clone()
        other[0, changed] = items[0, changed] % (ITEMS - 1) + 1
        difference = (network(other) - states).abs().amax(-1)[0]
        assert bool((difference[:changed] == 0).all()), changed
        assert bool((difference[changed:] > 1e-6).all()), changed


def test_padding_in_front_changes_nothing(network: SasRec) -> None:
    short = network(sequence(5, 9, 2, columns=3))
    for columns in range(4, LENGTH + 1):
        torch.testing.assert_close(network(sequence(5, 9, 2, columns=columns))[:, -3:], short, rtol=1e-5, atol=1e-6)


def test_what_masked_tokens_hold_changes_nothing(network: SasRec) -> None:
    x, mask = torch.randn(2, 6, WIDTH), torch.tensor([[False, False, True, True, True, True], [True] * 6])
    expected = network.encode_tokens(x, mask)
    for rubbish in (1e6, float("nan"), float("inf")):
        other = x.clone()
        other[0, :2] = rubbish
        assert torch.equal(network.encode_tokens(other, mask), expected)


def test_a_sequence_gets_the_same_states_alone_and_in_company(network: SasRec) -> None:
    batch = torch.cat([sequence(1, 2, 3), sequence(7), sequence(*range(1, LENGTH + 1)), sequence()])
    states = network(batch)
    assert bool(torch.isfinite(states).all())
    for row in range(len(batch)):
        torch.testing.assert_close(network(batch[row : row + 1]), states[row : row + 1], rtol=1e-5, atol=1e-6)


def test_order_matters(network: SasRec) -> None:
    assert not torch.allclose(network(sequence(1, 2, 3))[:, -1], network(sequence(2, 1, 3))[:, -1], atol=1e-4)


def test_scores_are_dot_products_with_the_item_table(network: SasRec) -> None:
    state, items = torch.randn(2, WIDTH), torch.tensor([[4, 8], [1, 29]])
    expected = torch.tensor([[float(state[b] @ network.item.weight[i]) for i in items[b]] for b in range(2)])
    torch.testing.assert_close(network.scores(state, items), expected)
    torch.testing.assert_close(network.scores(state).gather(1, items), expected)


def test_gradients_are_finite_where_a_sequence_is_empty(network: SasRec) -> None:
    network.train()
    network(torch.cat([sequence(), sequence(3, 4)]))[:, -1].square().sum().backward()
    assert all(parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())
    assert bool((network.item.weight.grad[0] == 0).all())


def test_a_sequence_longer_than_the_positions_is_refused(network: SasRec) -> None:
    with pytest.raises(ValueError, match="keep the newest 12"):
        network(torch.ones(1, LENGTH + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of heads"):
        SasRec(ITEMS, 15, 1, 2, LENGTH)


def test_the_newest_state_alone_is_that_of_the_whole_sequence(network: SasRec) -> None:
    items = torch.cat([sequence(5, 9, 2), sequence(*range(1, LENGTH + 1)), sequence()])
    gradients = []
    for state in (network(items)[:, -1], network.newest(items)):
        network.zero_grad()
        state.square().sum().backward()
        gradients.append((state.detach(), [parameter.grad.clone() for parameter in network.parameters()]))
    (whole, wanted), (newest, found) = gradients
    torch.testing.assert_close(newest, whole, rtol=1e-5, atol=1e-6)
    assert bool((newest[:2] != 0).any(1).all()) and bool((newest[2] == 0).all())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
