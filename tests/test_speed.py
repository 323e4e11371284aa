"""What a forward costs, without a clock: operations, kernels and memory of the default size."""

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from transformers_cat import CATConfig, CATModel, MRMFSpectrogram

FRAMES = 1000  # 10 s


class KernelCounter(TorchDispatchMode):
    """Counts the operators that compute or copy something, and the bytes that they allocate."""

    def __init__(self):
        super().__init__()
        self.kernels, self.allocated = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if not function.is_view:
            self.kernels += 1
            self.allocated += sum(item.nbytes for item in tree_iter(output) if isinstance(item, torch.Tensor))
        return output


@pytest.fixture(scope="module")
def tiny() -> CATModel:
    return CATModel(CATConfig()).eval()


@torch.no_grad()
def test_operations_of_a_forward(tiny):
    with FlopCounterMode(display=False) as counter:
        tiny(torch.randn(1, FRAMES, 384))
    assert 11e9 < counter.get_total_flops() < 12.1e9


@torch.no_grad()
def test_operations_are_linear_in_the_length(tiny):
    flops = []
    for windows in (1, 2, 4):
        with FlopCounterMode(display=False) as counter:
            tiny(torch.randn(1, windows * 1024, 384))
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(2, rel=1e-2) and flops[2] / flops[1] == pytest.approx(2, rel=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4])
def test_kernels_and_memory_of_a_forward(tiny, batch_size):
    features = torch.randn(batch_size, FRAMES, 384)
    with KernelCounter() as counter:
        tiny(features)
    # 400 kernels (614 for four clips) and 353 MB a clip when this was written, not all at once. Where the tokens of the
    # batch are too many for the caches, in the first stage and its patches, each clip has its own.
    assert counter.kernels <= (410 if batch_size == 1 else 630)
    assert counter.allocated / batch_size <= 360e6


@torch.no_grad()
def test_peak_memory_of_a_forward(tiny):
    features = torch.randn(4, FRAMES, 384)
    tracker = MemTracker()
    tracker.track_external(tiny, features)
    with tracker:
        tiny(features)
    peak = tracker.get_tracker_snapshot("peak")[features.device]
    before = sum(tensor.nbytes for tensor in (*tiny.parameters(), *tiny.buffers(), features))
    # Some 14 token maps of the first stage, of 6.1 MB each: 86 MB when this was written.
    assert peak["Total"] - before <= 90e6


@torch.no_grad()
def test_kernels_of_the_front_end():
    mrmf = MRMFSpectrogram()
    with KernelCounter() as counter:
        mrmf(torch.randn(2, 80_000))
    assert counter.kernels <= 58  # 53 for a slice when this was written, of which 24 are products with bands of filters
