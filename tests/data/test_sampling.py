import pytest
import torch

from epsd.data.sampling import SameClass, Sampler, TooFewImages, cut, naming, partner_positions
from epsd.types import BatchNeeds


@pytest.mark.parametrize(
    ("size", "batch", "drop", "count"), [(10, 3, False, 4), (10, 3, True, 3), (9, 3, False, 3), (2, 3, False, 1)]
)
def test_batches_of_an_epoch(size: int, batch: int, drop: bool, count: int) -> None:
    sampler = Sampler(size, batch, 0, True, drop)
    parts = cut(sampler.order(0), batch)
    assert len(sampler) == len(parts) == count
    assert sum(map(len, parts)) == (count * batch if drop else size)
    assert len(set(torch.cat(parts).tolist())) == sum(map(len, parts))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(0)
    one = Sampler(50, 7, 3, True, False).order(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(Sampler(50, 7, 3, True, False).order(2), one)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(Sampler(50, 7, 3, True, False).order(3), one)
    assert not torch.equal(Sampler(50, 7, 4, True, False).order(2), one)
    assert torch.equal(Sampler(50, 7, 3, False, False).order(2), torch.arange(50))


def test_too_few_images_for_a_batch_is_said() -> None:
    with pytest.raises(TooFewImages, match="the split has 5, the batch size is 8"):
        Sampler(5, 8, 0, True, True)
    with pytest.raises(TooFewImages, match="the split has 0"):
        Sampler(0, 8, 0, True, False)
    with pytest.raises(TooFewImages, match=r"^train\.batch_size: too few images"), naming("train.batch_size"):
        Sampler(5, 8, 0, True, True)
    with pytest.raises(TooFewImages, match="at least 1"):
        Sampler(5, 0, 0, True, False)


def test_partners_are_of_the_class_and_uniform() -> None:
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    pairs = SameClass(labels, 0)
    order = torch.arange(7).repeat(4000)
    partners = pairs.partners(order, 0)
    assert torch.equal(labels[partners], labels[order])
    share = torch.bincount(partners[order == 0], minlength=7) / 4000
    assert torch.allclose(share[labels == 2], torch.full((4,), 0.25), atol=0.03)  # itself among them
    assert torch.equal(pairs.partners(order, 0), partners)
    assert not torch.equal(pairs.partners(order, 1), partners)


def test_partner_positions_follow_the_needs() -> None:
    order, pairs = torch.tensor([1, 0]), SameClass(torch.tensor([0, 1]), 0)
    assert partner_positions(BatchNeeds(), order, 0, pairs) is None
    assert partner_positions(BatchNeeds("view"), order, 0, pairs) is order
    found = partner_positions(BatchNeeds("same_class"), order, 0, pairs)
    assert found is not None and found.tolist() == [1, 0]
