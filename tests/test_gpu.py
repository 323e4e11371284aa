"""What only a GPU can show: that it computes what a CPU does, in every precision, and is not kept waiting."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import pipeline

from transformers_cat import CATFeatureExtractor, CATForAudioClassification

from .conftest import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"
RATE = 32_000


@pytest.fixture(scope="module")
def clips() -> list:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator).numpy() for length in (2 * RATE, RATE, RATE // 3)]


@pytest.fixture(scope="module", params=[True, False], ids=["spectrograms", "waveforms"])
def batch(request, clips):
    """Three clips of different lengths, with a mask."""
    return CATFeatureExtractor(do_mrmf=request.param)(clips, sampling_rate=RATE, return_tensors="pt")


def outputs(model, batch, device, **kwargs):
    with torch.no_grad():
        output = model.to(device)(**batch.to(device), output_pns=True, output_frame_logits=True, **kwargs)
    return {name: output[name].float().cpu() for name in ("logits", "pooler_output", "frame_logits", "pns")}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_computes_what_a_cpu_does(small_model, batch, attention):
    small_model.set_attn_implementation(attention)
    expected = outputs(small_model, batch, "cpu")
    torch.testing.assert_close(outputs(small_model, batch, DEVICE), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_fused(small_model, batch, dtype):
    """The kernel that keeps no weights takes the bias of positions and padding, in inference and in training."""
    expected = outputs(small_model, batch, DEVICE)["logits"]
    small_model.to(dtype)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # an error if it refuses
        fused = outputs(small_model, batch, DEVICE)["logits"]
        small_model.train()(**batch, labels=torch.tensor([0, 1, 2], device=DEVICE)).loss.backward()
    assert (fused - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_half_precision_is_near_float32(small_model, batch, dtype, autocast):
    expected = outputs(small_model, batch, DEVICE)
    if not autocast:
        small_model.to(dtype)
    with torch.autocast(DEVICE, dtype, enabled=autocast):
        half = outputs(small_model, batch, DEVICE)
    error = (half["logits"] - expected["logits"]).norm() / expected["logits"].norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_front_end_is_float32_under_autocast(small_model, clips):
    batch = CATFeatureExtractor(do_mrmf=False)(clips, sampling_rate=RATE, return_tensors="pt")
    waveforms, mask = batch["input_values"], batch["attention_mask"]
    expected, _ = small_model.cat.mrmf(waveforms, mask)
    with torch.autocast(DEVICE, torch.bfloat16):
        features, _ = small_model.to(DEVICE).cat.mrmf(waveforms.to(DEVICE), mask.to(DEVICE))
    torch.testing.assert_close(features.cpu(), expected, atol=1e-3, rtol=1e-4)


def test_extractor_leaves_features_where_the_model_is(small_model, clips):
    batch = CATFeatureExtractor()(clips, sampling_rate=RATE, return_tensors="pt", device=DEVICE)
    assert {value.device.type for value in batch.values()} == {DEVICE}
    assert small_model.to(DEVICE)(**batch).logits.isfinite().all()


def test_gradients_are_those_of_a_cpu(batch):
    gradients = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = CATForAudioClassification(small_config(reconstruction_loss_weight=1.0)).to(device).train()
        model.double()  # a GPU's convolutions of float32 are in TF32
        model(**batch.to(device), labels=torch.tensor([0, 1, 2], device=device)).loss.backward()
        gradients[device] = {name: value.grad.cpu() for name, value in model.named_parameters()}
    errors = {
        name: float((gradients[DEVICE][name] - expected).norm() / expected.norm().clamp(min=1e-3))
        for name, expected in gradients["cpu"].items()
    }
    assert max(errors.values()) < 1e-2, errors


def test_training_step_does_not_keep_the_gpu_waiting():
    """A step of clips of one length has no look at a value, which would hold up the kernels that follow."""
    model = CATForAudioClassification(small_config(problem_type="single_label_classification")).to(DEVICE).train()
    features = torch.randn(4, 100, 384, device=DEVICE)
    labels = torch.tensor([0, 1, 2, 3], device=DEVICE)
    model(features, labels=labels).loss.backward()  # what is made once, is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(features, labels=labels).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradient_checkpointing_takes_less_memory():
    peaks = {}
    for checkpointing in (False, True):
        model = CATForAudioClassification(small_config(embed_dim=64)).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        features = torch.randn(8, 500, 384, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        model(features, labels=torch.zeros(8, dtype=torch.long, device=DEVICE)).loss.backward()
        peaks[checkpointing] = torch.cuda.max_memory_allocated()
        del model
        torch.cuda.empty_cache()
    assert peaks[True] < 0.8 * peaks[False]


def test_compiled_is_one_graph_and_the_same(small_model):
    model = small_model.to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    features = torch.randn(2, 200, 384, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(features).logits, model(features).logits, atol=1e-3, rtol=1e-3)


def test_pipeline_on_a_gpu(checkpoint, clips):
    there, here = (
        pipeline("audio-classification", model=str(checkpoint), device=device)(clips[0], top_k=5)
        for device in (DEVICE, "cpu")
    )
    assert [item["label"] for item in there] == [item["label"] for item in here]
    assert [item["score"] for item in there] == pytest.approx([item["score"] for item in here], abs=1e-3)


def test_device_map(checkpoint, batch):
    model = CATForAudioClassification.from_pretrained(checkpoint, device_map="auto").eval()
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    assert model(**batch.to(DEVICE)).logits.shape == (3, 5)
