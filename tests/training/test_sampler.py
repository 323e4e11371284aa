import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from transformers_cat.training.sampler import DrawnClips, EpochSampler, balanced_weights


def test_weights_are_the_sum_of_inverse_class_frequencies():
    weights = balanced_weights([[0], [0, 1], [0], []], num_labels=3)
    common, rare = 1000 / 3.01, 1000 / 1.01
    torch.testing.assert_close(weights, torch.tensor([common, common + rare, common, 0.0], dtype=torch.float64))


def test_weights_of_single_labels():
    assert torch.equal(balanced_weights([2, 0, 2], 3), balanced_weights([[2], [0], [2]], 3))


def test_no_labels_at_all():
    with pytest.raises(ValueError, match="no clip has one"):
        balanced_weights([[], []], 3)


def test_rare_classes_are_drawn_as_often_as_common_ones():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    sampler = EpochSampler(len(labels), seed=0, weights=balanced_weights(labels, 3))
    drawn = []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        drawn += [labels[clip] for clip, _ in sampler]
    shares = np.bincount(drawn) / len(drawn)
    expected = np.array([900 / 900.01, 90 / 90.01, 10 / 10.01])
    # 30,000 draws: a standard error of 0.0027
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.012)


def test_clips_without_weight_are_never_drawn():
    sampler = EpochSampler(4, seed=0, weights=torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert {clip for epoch in range(20) for clip, _ in _epoch(sampler, epoch)} == {1, 3}


def test_by_default_every_clip_is_drawn_once():
    assert sorted(clip for clip, _ in EpochSampler(50, seed=3)) == list(range(50))


def _epoch(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("weights", [None, torch.ones(20)])
def test_a_function_of_seed_and_epoch_alone(weights):
    torch.manual_seed(1)
    first = _epoch(EpochSampler(20, 7, weights), 3)
    state = torch.get_rng_state()
    assert _epoch(EpochSampler(20, 7, weights), 3) == first
    assert torch.equal(torch.get_rng_state(), state)
    # Neither the next epoch nor the next seed, nor the two exchanged, repeats it.
    for seed, epoch in ((7, 4), (8, 3), (3, 7), (8, 2)):
        assert _epoch(EpochSampler(20, seed, weights), epoch) != first


def test_seeds_differ_between_draws():
    seeds = [seed for epoch in range(3) for _, seed in _epoch(EpochSampler(100, 0), epoch)]
    assert len(set(seeds)) == 300


def test_two_processes_draw_one_sequence_interleaved():
    def batches(**shard):
        sampler = BatchSampler(EpochSampler(12, 0, torch.arange(12.0)), batch_size=3, drop_last=False)
        return list(BatchSamplerShard(sampler, **shard) if shard else sampler)

    alone = batches()
    first, second = (batches(num_processes=2, process_index=rank) for rank in (0, 1))
    assert [batch for pair in zip(first, second) for batch in pair] == alone


def test_resumption_goes_on_where_the_epoch_stopped():
    sampler = BatchSampler(EpochSampler(12, 0, torch.arange(12.0)), batch_size=3, drop_last=False)
    assert list(SkipBatchSampler(sampler, skip_batches=2)) == list(sampler)[2:]


def test_weights_for_other_clips():
    with pytest.raises(ValueError, match="3 sampling weights do not fit 4 clips"):
        EpochSampler(4, seed=0, weights=torch.ones(3))


def test_drawn_clips_carry_their_seed():
    clips = DrawnClips([{"audio": "a", "label": 0}, {"audio": "b", "label": 1}])
    assert len(clips) == 2
    assert clips[(1, 99)] == {"audio": "b", "label": 1, "seed": 99}
