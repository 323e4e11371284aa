import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import SwinConfig, SwinModel
from transformers.integrations import sdpa_attention

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, CATModel
from transformers_cat.causal import causal_loss, class_targets, conditional_pns
from transformers_cat.linear import linear, linear_after
from transformers_cat.modeling_cat import (
    CATAttention,
    CATBatchNorm,
    CATDropPath,
    CATLinear,
    CATPositionEmbedding,
    CATStage,
    attention_mask_of_windows,
    slices,
    split_streams,
    window_partition,
    window_reverse,
)

from .conftest import awaken, small_config

RATE = 32_000


def merge_filters(model: CATModel) -> CATModel:
    """The single-stream model that reads one filter with all the heads of `model`."""
    config = CATConfig.from_dict({**model.config.to_dict(), "filters": ("mel",)})
    single = CATModel(config).eval()
    state = {name: value for name, value in model.state_dict().items() if ".qkv." not in name}
    for name, value in model.state_dict().items():
        if ".attention.qkv.0." in name:  # (q, k, v) of each filter -> (q, k, v) of all heads
            parts = [value, model.state_dict()[name.replace("qkv.0", "qkv.1")]]
            state[name] = torch.cat([part.unflatten(0, (3, -1)) for part in parts], dim=1).flatten(0, 1)
        if ".qkv." in name and ".exchange." in name:
            state[name] = value
    half = config.feature_size
    for name in ("feature_norm.running_mean", "feature_norm.running_var"):
        state[name] = state[name][:half]
    state["embeddings.position.filters"] = state["embeddings.position.filters"][:1]
    single.load_state_dict(state)
    return single


def test_equal_filters_give_the_plain_single_stream():
    torch.manual_seed(0)
    model = awaken(CATModel(small_config())).eval()
    with torch.no_grad():
        model.embeddings.position.filters[1] = model.embeddings.position.filters[0]
    features = torch.randn(2, 40, 1, 192)
    both = model(features.expand(-1, -1, 2, -1).flatten(2))
    single = merge_filters(model)(features.flatten(2))
    torch.testing.assert_close(both.last_hidden_state, single.last_hidden_state, atol=1e-5, rtol=1e-5)
    # and the filters do matter when they differ
    other = model(torch.cat([features, features.roll(1, 1)], dim=2).flatten(2))
    assert (other.last_hidden_state - both.last_hidden_state).abs().max() > 1e-2


def test_first_block_heads_do_not_see_the_other_filter():
    torch.manual_seed(0)
    model = awaken(CATModel(small_config(depthwise_kernel_size=0))).eval()
    heads = {}
    for g, projection in enumerate(model.stages[0].blocks[0].attention.qkv):
        projection.register_forward_hook(lambda module, args, output, g=g: heads.update({g: output}))
    features = torch.randn(1, 16, 384, requires_grad=True)
    model(features)
    for g in range(2):
        (gradient,) = torch.autograd.grad(heads[g].square().sum(), features, retain_graph=True)
        gradient = gradient.view(1, 16, 2, 192)
        assert (gradient[:, :, 1 - g] == 0).all()
        assert gradient[:, :, g].abs().max() > 0


def swin_of_cat(**arguments) -> tuple[SwinModel, CATModel]:
    """A random SwinModel and a CATModel with G = 1, K = 3 and its weights."""
    swin = SwinModel(SwinConfig(**arguments, hidden_dropout_prob=0.0, drop_path_rate=0.0)).eval()
    if not hasattr(swin.encoder.layers[0].blocks[0].attention, "q_proj"):
        pytest.skip("this release of transformers has other names for Swin's weights")
    awaken(swin)
    config = CATConfig(
        filters=("mel",),
        num_bins=arguments["image_size"],
        patch_size=(4, 4),
        embed_dim=arguments["embed_dim"],
        depths=tuple(arguments["depths"]),
        num_heads=tuple(arguments["num_heads"]),
        window_size=arguments["window_size"],
        drop_path_rate=0.0,
        layer_norm_eps=swin.config.layer_norm_eps,
    )
    cat = CATModel(config).eval()
    nn.init.zeros_(cat.embeddings.position.gate)
    cat.embeddings.projection.load_state_dict(swin.embeddings.patch_embeddings.projection.state_dict())
    cat.embeddings.norm.load_state_dict(swin.embeddings.norm.state_dict())
    cat.norm.load_state_dict(swin.layernorm.state_dict())
    for theirs, ours in zip(swin.encoder.layers, cat.stages):
        if ours.merging is not None:
            ours.merging.load_state_dict(theirs.downsample.state_dict())
        for their, our in zip(theirs.blocks, ours.blocks):
            attention = dict(their.attention.state_dict())
            for part in ("weight", "bias"):
                qkv = torch.cat([attention[f"{name}_proj.{part}"] for name in "qkv"])
                getattr(our.attention.qkv[0], part).data.copy_(qkv)
                getattr(our.attention.output, part).data.copy_(attention[f"o_proj.{part}"])
            our.attention.position_bias.table.data.copy_(
                attention["relative_position_bias.relative_position_bias_table"]
            )
            our.norm_attention.load_state_dict(their.layernorm_before.state_dict())
            our.norm_mlp.load_state_dict(their.layernorm_after.state_dict())
            our.mlp[0].load_state_dict(their.mlp.fc1.state_dict())
            our.mlp[2].load_state_dict(their.mlp.fc2.state_dict())
    return swin, cat


def test_trunk_is_transformers_swin():
    torch.manual_seed(0)
    swin, cat = swin_of_cat(image_size=64, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4)
    image = torch.randn(2, 3, 64, 64)
    expected = swin(image)
    cat.feature_norm.eps = 0.0  # a fresh norm is then the identity
    ours = cat(image.permute(0, 2, 1, 3).flatten(2))
    torch.testing.assert_close(ours.last_hidden_state.flatten(1, 2), expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_global_kernel_is_a_plain_encoder_block(attn_implementation):
    torch.manual_seed(0)
    config = CATConfig(
        filters=("linear",),
        embed_dim=32,
        depths=(1,),
        num_heads=(4,),
        window_size=None,
        attn_implementation=attn_implementation,
    )
    block = awaken(CATModel(config)).eval().stages[0].blocks[0]
    plain = nn.TransformerEncoderLayer(
        32, 4, 128, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=config.layer_norm_eps
    ).eval()
    plain.self_attn.in_proj_weight.data.copy_(block.attention.qkv[0].weight)
    plain.self_attn.in_proj_bias.data.copy_(block.attention.qkv[0].bias)
    plain.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
    plain.norm1.load_state_dict(block.norm_attention.state_dict())
    plain.norm2.load_state_dict(block.norm_mlp.state_dict())
    plain.linear1.load_state_dict(block.mlp[0].state_dict())
    plain.linear2.load_state_dict(block.mlp[2].state_dict())
    tokens = torch.randn(2, 10, 4, 32)
    ours, _ = block(tokens, None, None, (10, 4), (0, 0), None)
    torch.testing.assert_close(ours.flatten(1, 2), plain(tokens.flatten(1, 2)), atol=1e-5, rtol=1e-5)


def test_gradients_of_unfused_attention_are_those_of_torch(monkeypatch):
    """On a CPU, where no fused kernel has one for the bias; of padded clips in shifted windows, in double precision."""
    torch.manual_seed(0)
    model = awaken(CATModel(small_config(depths=(2, 2), num_heads=(2, 4)))).double().eval()
    features, mask = torch.randn(2, 90, model.config.feature_size, dtype=torch.float64), torch.ones(2, 90)
    mask[1, 40:] = 0
    gradients = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(CATAttention, "kernel", lambda *_, **__: sdpa_attention.sdpa_attention_forward)
        output = model(features, mask).last_hidden_state
        gradients.append(torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gradients", [False, True])
def test_fused_attention_gives_no_weights(gradients, monkeypatch):
    """And transformers' warning says so, on a CPU also where gradients are needed and something stands in for it."""
    warned = []
    monkeypatch.setattr(sdpa_attention.logger, "warning_once", warned.append)
    model = CATModel(small_config())
    with torch.set_grad_enabled(gradients):
        assert model(torch.randn(2, 40, model.config.feature_size), output_attentions=True).attentions == ()
    assert "set your attention to `eager`" in warned[0]


def test_pns_of_several_labels_is_of_those_that_are_likelier_than_not(small_model):
    small_model.config.problem_type, small_model.config.num_donors = "multi_label_classification", 1
    head = small_model.classifier
    head.bias.data.copy_(torch.tensor([0.2, -0.2, 1.0, -1.0, 0.3]))
    output = small_model(torch.randn(4, 40, 384), output_pns=True)
    assert ((output.logits > 0) & (output.logits < 0.5)).any()
    predicted = (output.logits.sigmoid() > 0.5).float()
    options = {"num_donors": 1, "multi_label": True}
    expected = conditional_pns(output.pooler_output, head.weight, head.bias, predicted, **options).clamp(min=0)
    torch.testing.assert_close(output.pns, expected)
    assert output.pns.max() > 1e-4


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({"causal_estimator": "closed_form"}, {"estimator": "closed_form"}),
        ({"causal_form": "literal"}, {"form": "literal"}),
        ({"causal_reduction": "sum"}, {"reduction": "sum"}),
        ({"num_donors": 1}, {"num_donors": 1}),
    ],
    ids=str,
)
def test_causal_loss_is_the_one_that_the_configuration_asks_for(overrides, options):
    model = model_with(problem_type="single_label_classification", drop_path_rate=0.0, **overrides).train()
    labels = torch.tensor([0, 4, 2, 2])
    output = model(torch.randn(4, 40, 384), labels=labels)
    arguments = (output.pooler_output, model.classifier.weight, model.classifier.bias, class_targets(labels, 5))
    torch.testing.assert_close(output.causal_loss, causal_loss(*arguments, **options))
    assert not torch.isclose(output.causal_loss, causal_loss(*arguments), rtol=1e-3)


def test_stochastic_depth_rises_linearly_over_all_blocks():
    model = CATModel(small_config(drop_path_rate=0.4))
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_sizes_and_switches_reach_the_layers():
    model = CATModel(small_config(mlp_ratio=1.5, qkv_bias=False, hidden_act="relu", use_position_embedding=False))
    block = model.stages[1].blocks[0]
    assert block.mlp[0].out_features == 48 and isinstance(block.mlp[1], nn.ReLU)
    assert all(projection.bias is None for projection in block.attention.qkv)
    assert model.embeddings.position is None


@torch.no_grad()
@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_is_for_training_alone(dropout, implementation):
    features, models = torch.randn(2, 40, 384), []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        config = small_config(drop_path_rate=0.0, attn_implementation=implementation, **{dropout: rate})
        models.append(awaken(CATModel(config)).eval())
    plain, model = models
    torch.testing.assert_close(model(features).pooler_output, plain(features).pooler_output)
    for module in model.train().modules():
        if isinstance(module, CATBatchNorm):
            module.eval()
    one, other = (model(features).pooler_output for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
def test_tokens_start_with_unit_variance():
    """Of each part, for features of unit variance."""
    torch.manual_seed(0)
    embeddings = CATModel(small_config(embed_dim=96, exchange_dim=16)).embeddings
    patches = embeddings.projection.cut(torch.randn(4, 80, 2, 3, 64))
    assert embeddings.projection(patches).std() == pytest.approx(1, rel=0.15)
    assert torch.einsum("gbtfkp,kpd->gbtfkd", patches, embeddings.exchange.qkv).std() == pytest.approx(1, rel=0.15)


def test_position_embedding_is_equation_3():
    torch.manual_seed(0)
    config = small_config()
    position = awaken(CATPositionEmbedding(config))
    grid, levels = position(7, 5)
    assert grid.shape == (7, 5, 16) and levels.shape == (2, 3, 16)

    def sinusoid(index):
        waves = [(math.sin, math.cos)[i % 2](index / 10_000 ** (2 * (i // 2) / 16)) for i in range(16)]
        return torch.tensor(waves)

    for k in range(3):
        for g in range(2):
            for t in (0, 3, 6):
                for f in (0, 4):
                    onehot = nn.functional.one_hot(torch.tensor(k), 3).float()
                    projected = position.projection(torch.cat([sinusoid(t), onehot]))
                    expected = position.gate * (projected + sinusoid(f) + position.filters[g])
                    torch.testing.assert_close(grid[t, f] + levels[g, k], expected, atol=1e-5, rtol=1e-5)


def test_patches_are_projected_as_by_a_convolution():
    torch.manual_seed(0)
    projection = awaken(CATModel(small_config())).embeddings.projection
    features = torch.randn(3, 44, 2, 3, 64)  # (B, T, G, K, F)
    tokens = projection(projection.cut(features))
    images = features.permute(2, 0, 3, 1, 4).flatten(0, 1)
    expected = nn.functional.conv2d(images, projection.weight, projection.bias, projection.stride)
    torch.testing.assert_close(tokens, expected.permute(0, 2, 3, 1).unflatten(0, (2, 3)), atol=1e-5, rtol=1e-5)


def test_embedding_is_the_sum_over_the_resolutions():
    """Patch, position and exchange of each resolution by itself, and then their sum."""
    torch.manual_seed(0)
    embeddings = awaken(CATModel(small_config(stem_channels=()))).embeddings.eval()
    features = torch.randn(2, 40, 384)
    images = features.unflatten(2, (2, 3, 64)).permute(2, 3, 0, 1, 4)  # (G, K, B, T, F)
    grid, levels = embeddings.position(10, 16)
    exchange = embeddings.exchange
    for g in range(2):
        tokens, qkv = 0, []
        for k in range(3):
            position = grid + levels[g, k]
            kernel = embeddings.projection.weight[:, k : k + 1]
            patches = nn.functional.conv2d(images[g, k][:, None], kernel, stride=4).permute(0, 2, 3, 1)
            tokens = tokens + patches + position
            kernel = exchange.qkv[k].T.reshape(-1, 1, 4, 4)
            patches = nn.functional.conv2d(images[g, k][:, None], kernel, exchange.bias, stride=4).permute(0, 2, 3, 1)
            qkv.append(patches + exchange.position(position))
        query, key, value = torch.stack(qkv, dim=-2).chunk(3, -1)  # (B, t, f, K, D)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        # The projection of each resolution's output, summed, has the bias only once.
        received = (attended @ exchange.output.weight.T).sum(-2) + exchange.output.bias
        expected = embeddings.norm(tokens + embeddings.projection.bias + received)
        torch.testing.assert_close(embeddings(features, None)[g], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_matrix_products(bias):
    torch.manual_seed(0)
    layer = CATLinear(16, 24, bias=bias)
    plain = nn.Linear(16, 24, bias=bias)
    plain.load_state_dict(layer.state_dict())
    tokens = torch.randn(2, 3, 5, 7, 16)[:, :, 1:].transpose(1, 2).requires_grad_()
    gradient = torch.randn(2, 4, 3, 7, 24)
    results = []
    for module in (layer, plain):
        output = module(tokens)
        gradients = torch.autograd.grad(output, [tokens, *module.parameters()], gradient)
        results.append([output, *gradients])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens), plain(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.bfloat16()(tokens.bfloat16()), plain.bfloat16()(tokens.bfloat16()))


@pytest.mark.parametrize("widths", [(6, 10), (10, 6)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 0), (3, 4)])
def test_gradients_of_a_linear_map(widths, shape):
    """Of a gradient that is one number in memory, with what is frozen, and of a gradient."""
    torch.manual_seed(0)
    tokens, weight, bias = (torch.randn(size) for size in ((*shape, widths[0]), widths[::-1], widths[1:]))
    for frozen in (None, 0, 1, 2):
        results = []
        for function in (linear, nn.functional.linear):
            inputs = [x.clone().requires_grad_(i != frozen) for i, x in enumerate((tokens, weight, bias))]
            learnt = [x for x in inputs if x.requires_grad]
            first = torch.autograd.grad(function(*inputs).sum(), learnt)
            gradients = torch.autograd.grad(function(*inputs).tanh().square().sum(), learnt, create_graph=True)
            second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), learnt)
            results.append([*first, *gradients, *second])
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


def test_what_a_linear_layer_returns_can_be_changed_in_place():
    """As some adapters and hooks do; alone, and behind a norm that is computed again in the backward pass."""
    torch.manual_seed(0)
    layer, tokens = CATLinear(16, 24), torch.randn(2, 3, 16, requires_grad=True)
    for output in (layer(tokens), linear_after(nn.LayerNorm(16), layer, tokens)):
        output += 1
        (gradient,) = torch.autograd.grad(output.square().sum(), tokens)
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_derivatives_of_a_linear_layer(grad):
    torch.manual_seed(0)
    layer, tokens, tangent = CATLinear(16, 24), torch.randn(5, 16), torch.randn(5, 16)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        output = forward_ad.unpack_dual(layer(forward_ad.make_dual(tokens, tangent)))
    torch.testing.assert_close(output.tangent, tangent @ layer.weight.T)


@torch.no_grad()
def test_linear_layers_leave_other_weights_to_pytorch():
    """Quantised weights are tensors that say themselves what `linear` does with them; autocast is for it, too."""

    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            output = super().__torch_function__(function, types, arguments, keywords)
            return 2 * output if function is nn.functional.linear else output

    tokens, layer = torch.randn(3, 16), CATLinear(16, 24, bias=False)
    expected = layer(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens).dtype == torch.bfloat16
    layer.weight = nn.Parameter(layer.weight.as_subclass(Doubled), requires_grad=False)
    torch.testing.assert_close(layer(tokens).as_subclass(torch.Tensor), 2 * expected)


def test_quantisers_find_plain_linear_layers():
    """Some look for the very class; and what they put in its place keeps its numbers in other types."""

    class Packed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight = layer, layer.weight.detach().to(torch.uint8)

        def forward(self, tokens):
            return self.layer(tokens)

    torch.manual_seed(0)
    config = small_config()
    plain, features = CATModel(config).eval(), torch.randn(1, 24, 384)
    config.quantization_config = SimpleNamespace(load_in_8bit=False, to_dict=dict)
    model = CATModel(config).eval()
    model.load_state_dict(plain.state_dict())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 20 and all(type(model.get_submodule(name)) is nn.Linear for name in linear)
    for name in linear:
        model.set_submodule(name, Packed(model.get_submodule(name)))
    with torch.no_grad():
        torch.testing.assert_close(model(features)[0], plain(features)[0], atol=1e-5, rtol=1e-5)
    config.quantization_config.load_in_8bit = True
    with pytest.raises(ValueError, match="load_in_8bit.*load_in_4bit"):
        CATModel(config)


@torch.no_grad()
def test_a_trace_is_the_model(small_model):
    features, mask = torch.randn(2, 50, 384), torch.ones(2, 50)
    mask[1, 20:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shapes become constants
        traced = torch.jit.trace(small_model, (features, mask), strict=False)
    torch.testing.assert_close(traced(features, mask)["logits"], small_model(features, mask).logits)


def test_weights_can_be_assigned_to_a_model_without_memory(small_model):
    """With its buffers, which are not saved."""
    with torch.device("meta"):
        empty = CATForAudioClassification(small_model.config).eval()
    empty.load_state_dict(small_model.state_dict(), assign=True)
    assert not any(buffer.is_meta for buffer in empty.buffers())
    waveform = 0.1 * torch.randn(1, 9_000)
    torch.testing.assert_close(empty(waveform).logits, small_model(waveform).logits)


def test_what_is_added_to_swin_starts_as_the_identity():
    torch.manual_seed(0)
    full = CATModel(small_config(stem_channels=()))
    plain = CATModel(small_config(depthwise_kernel_size=0, stem_channels=(), exchange_dim=0))
    plain.load_state_dict(full.state_dict(), strict=False)
    features = torch.randn(1, 24, 384)
    torch.testing.assert_close(full.eval()(features).pooler_output, plain.eval()(features).pooler_output)


@pytest.mark.parametrize("window", [(4, 4), (8, 2), (2, 8)])
def test_windows_partition_and_reverse(window):
    tokens = torch.arange(2 * 16 * 8 * 3.0).view(2, 16, 8, 3)
    windows = window_partition(tokens, window)
    assert windows.shape == (2, 128 // (window[0] * window[1]), window[0] * window[1], 3)
    assert (windows[0, 0].view(*window, 3) == tokens[0, : window[0], : window[1]]).all()
    assert (window_reverse(windows, window, 16, 8) == tokens).all()


def test_shifted_windows_keep_what_is_apart_apart():
    t, f, window, shift = 10, 8, (4, 4), (2, 2)
    rows = torch.arange(12)[None] < t
    mask = attention_mask_of_windows(rows, (12, f), window, shift, torch.zeros(()))
    position = torch.arange(12 * f).view(1, 12, f, 1)  # 10 rows and 2 of padding
    position = window_partition(position.roll((-2, -2), (1, 2)), window)[0, :, :, 0]
    for here, row in zip(position, mask[0]):
        for i, query in enumerate(here.tolist()):
            for j, key in enumerate(here.tolist()):
                near = abs(query // f - key // f) < 4 and abs(query % f - key % f) < 4
                both_padding = query // f >= t and key // f >= t
                same = near and (query // f < t) == (key // f < t)
                assert (row[i, j] == 0) == (same or both_padding)


def test_a_gpu_is_never_given_more_heads_than_it_takes():
    config, elsewhere = CATConfig(), torch.empty(0, device="meta")  # any device but the CPU
    stage = CATStage(config, 0, [0.0, 0.0]).eval()
    steps, bins, (length, width) = 4 * 3600 * 25, 16, stage.window  # four hours
    with torch.no_grad():
        parts = slices(stage, elsewhere, (1, steps, bins), length)
        assert len(slices(stage, elsewhere, (64, 256, bins), length)) == 1
    for _, part in parts:
        assert (part.stop - part.start) * bins // (length * width) * config.num_heads[0] <= 65_535
    assert parts[-1][1].stop >= steps


@pytest.mark.parametrize("masked", [False, True])
def test_bias_is_what_fused_kernels_take(masked):
    """Of unit stride, or a GPU falls back to products that are kept; and no copy for each clip."""
    attention = CATAttention(small_config(), stage=0)
    mask = torch.zeros(1, 6, 64, 64) if masked else None
    bias = attention.bias(mask, 6, 8)
    assert bias.shape == (1, 6 * attention.num_heads, 64, 64) and bias.stride(-1) == 1
    torch.testing.assert_close(bias[0, attention.num_heads :], bias[0, : -attention.num_heads])


def model_with(**overrides) -> CATForAudioClassification:
    torch.manual_seed(0)
    return awaken(CATForAudioClassification(small_config(**overrides))).eval()


VARIANTS = {
    "every part": {},
    "global kernel": {"depths": (2,), "num_heads": (2,), "window_size": None},
    "one filter": {"filters": ("linear",)},
    "one resolution": {"window_lengths": (800,), "hop_lengths": (320,)},
    "the paper's patches": {
        "patch_size": (1, 64),
        "stem_channels": (),
        "depths": (2, 1),
        "num_heads": (2, 4),
        "window_size": 4,
    },
    "no position": {"use_position_embedding": False, "exchange_dim": 0},
}


def assert_batch_mates_change_nothing(model: CATForAudioClassification, clips: list) -> None:
    names = ("filters", "window_lengths", "hop_lengths")
    extractor = CATFeatureExtractor(**{name: getattr(model.config, name) for name in names})
    with torch.no_grad():
        together = model(**extractor(clips, sampling_rate=RATE, return_tensors="pt"), output_frame_logits=True)
        for index, clip in enumerate(clips):
            alone = model(**extractor(clip, sampling_rate=RATE, return_tensors="pt"), output_frame_logits=True)
            torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=1e-4)
            frames = alone.frame_logits.shape[1]
            assert together.token_mask[index].sum() == frames
            torch.testing.assert_close(
                together.frame_logits[index, :frames], alone.frame_logits[0], atol=1e-4, rtol=1e-4
            )
            assert not together.frame_logits[index, frames:].any()
    spread = (together.logits[0] - together.logits[1]).abs().max()
    assert spread > 1e-3  # the clips are told apart at all


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_logits_do_not_depend_on_batch_mates(overrides):
    model = model_with(**overrides)
    lengths = (1_600, 48_001, 160_000, 100_000)
    clips = [torch.randn(length) * 0.3**index for index, length in enumerate(lengths)]
    assert_batch_mates_change_nothing(model, clips)


def test_logits_of_recordings_do_not_depend_on_batch_mates(small_model, real_clips):
    clips = [real_clips[0][:1_600], real_clips[1][:48_001], real_clips[2], real_clips[3][:100_000]]
    assert_batch_mates_change_nothing(small_model, clips)


def test_logits_do_not_depend_on_what_the_padding_holds(small_model):
    torch.manual_seed(0)
    batch = CATFeatureExtractor()(torch.randn(40_000) * 0.1, sampling_rate=RATE, return_tensors="pt")
    padded = nn.functional.pad(batch["input_values"], (0, 0, 0, 77), value=3.0)
    mask = nn.functional.pad(batch["attention_mask"], (0, 77))
    with torch.no_grad():
        expected = small_model(**batch).logits
        torch.testing.assert_close(small_model(padded, mask).logits, expected, atol=1e-5, rtol=1e-5)


def test_waveforms_and_features_give_the_same_logits(small_model, real_clips):
    clips = [clip[: 30_000 * (index + 1) + index] for index, clip in enumerate(real_clips)]
    with torch.no_grad():
        features = CATFeatureExtractor()(clips, sampling_rate=RATE, return_tensors="pt")
        waveforms = CATFeatureExtractor(do_mrmf=False)(clips, sampling_rate=RATE, return_tensors="pt")
        from_features, from_waveforms = small_model(**features).logits, small_model(**waveforms).logits
    torch.testing.assert_close(from_waveforms, from_features, atol=1e-5, rtol=1e-5)


def test_frame_logits_average_to_the_logits(small_model, real_clips):
    batch = CATFeatureExtractor()(real_clips[0], sampling_rate=RATE, return_tensors="pt")
    output = small_model(**batch, output_frame_logits=True)
    torch.testing.assert_close(output.frame_logits.mean(1), output.logits, atol=1e-5, rtol=1e-5)
    assert small_model(**batch).frame_logits is None


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_a_short_clip_in_odd_windows_does_not_depend_on_its_batch(tokens):
    """Of which the smaller half stays together when they are shifted."""
    torch.manual_seed(0)
    model = awaken(
        CATModel(small_config(window_size=3, num_bins=48, depths=(2, 1), num_heads=(2, 4), stem_channels=()))
    )
    features, mask = torch.randn(2, 40, 288), torch.ones(2, 40)
    frames = tokens * model.config.patch_size[0]
    mask[0, frames:] = 0
    together = model.eval()(features, mask).pooler_output[0]
    torch.testing.assert_close(model(features[:1, :frames]).pooler_output[0], together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 32, 40, 63, 64, 65, 130])
@pytest.mark.parametrize("depths", [(2, 2, 1), (1, 1, 2)])
def test_a_short_clip_needs_no_whole_window(monkeypatch, depths, frames):
    torch.manual_seed(0)
    model = awaken(CATModel(small_config(depths=depths, attn_implementation="eager"))).eval()
    features = torch.randn(2, frames, 384) * 3 - 5
    fitted = model(features, output_attentions=True)
    monkeypatch.setattr(CATStage, "windows", lambda self, length, bins: (self.window, self.shift))
    whole = model(features, output_attentions=True)
    torch.testing.assert_close(fitted.last_hidden_state, whole.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert all(weights.shape[-1] == 64 for weights in whole.attentions)
    # The stages have steps of 4, 8 and 16 frames and windows of 8, 8 and 16 steps; half of one where it shifts.
    for attentions, step, window, depth in zip(fitted.attentions, (4, 8, 16), (8, 8, 16), depths):
        limit = window // 2 if depth > 1 and step < 16 else window
        steps = -(-frames // step)
        assert attentions.shape[-1] == 64 * min(steps / window, 1) if steps <= limit else 64


@pytest.mark.parametrize("variant", ["every part", "global kernel", "one filter"])
@pytest.mark.parametrize("lengths", [(331, 331, 331), (331, 180, 7)])
@pytest.mark.parametrize("tokens", [1, 300, 3000])
@torch.no_grad()
def test_slices_change_nothing(monkeypatch, tokens, lengths, variant):
    """Parts of a clip, single clips, and several clips at once; shifted windows, padding and odd lengths among them."""
    model = model_with(**VARIANTS[variant], attn_implementation="eager")
    features = torch.randn(3, 331, model.config.feature_size) * 3 - 5
    mask = torch.arange(331) < torch.tensor(lengths)[:, None]
    outputs, calls = [], {}
    stem, block = model.cat.embeddings.stem, model.cat.stages[0].blocks[0].norm_mlp

    def note(part, inputs, _):
        calls.setdefault((part, size), []).append(inputs[0].numel())

    for size in (10**9, tokens):
        monkeypatch.setattr("transformers_cat.modeling_cat.CPU_SLICE", size)
        hooks = [part.register_forward_hook(note) for part in (stem, block)]
        outputs.append(model(features, attention_mask=mask, output_attentions=True, output_hidden_states=True))
        for hook in hooks:
            hook.remove()
    for part in (stem,) if variant == "global kernel" else (stem, block):
        (whole,) = calls[part, 10**9]
        assert max(calls[part, tokens]) < (whole if tokens == 3000 else whole / 3)  # some of the clips, or part of one
    torch.testing.assert_close(*(output.logits for output in outputs), atol=1e-5, rtol=1e-5)
    for name in ("hidden_states", "attentions"):
        for whole, sliced in zip(*(getattr(output, name) for output in outputs), strict=True):
            torch.testing.assert_close(whole, sliced, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 33, 1001])
def test_any_length(small_model, frames):
    with torch.no_grad():
        assert torch.isfinite(small_model(torch.randn(1, frames, 384)).logits).all()


def test_batch_norm_is_over_the_frames_that_hold_audio():
    torch.manual_seed(0)
    features = torch.randn(3, 20, 8) * 3 - 5
    mask = torch.arange(20) < torch.tensor([20, 11, 4])[:, None]
    norm, reference = CATBatchNorm(8, affine=False), nn.BatchNorm1d(8, affine=False)
    output = norm(features, mask)
    expected = reference(features[mask])
    torch.testing.assert_close(output[mask], expected, atol=1e-5, rtol=1e-5)
    assert (output[~mask] == 0).all()
    # The first batch is the average; later ones enter at the momentum.
    torch.testing.assert_close(norm.running_mean, features[mask].mean(0))
    torch.testing.assert_close(norm.running_var, features[mask].var(0))
    for _ in range(20):
        norm(features, mask)
    before = norm.running_mean.clone()
    norm(features + 1, mask)
    torch.testing.assert_close(norm.running_mean, before + 0.1)
    norm.eval(), reference.eval()
    reference.running_mean, reference.running_var = norm.running_mean, norm.running_var
    torch.testing.assert_close(norm(features, mask)[mask], reference(features[mask]), atol=1e-5, rtol=1e-5)


def test_batch_norm_without_momentum_averages_all_batches():
    """As `torch.optim.swa_utils.update_bn` asks of it."""
    norm, reference = CATBatchNorm(8, affine=False, momentum=None), nn.BatchNorm1d(8, affine=False, momentum=None)
    for batch in torch.randn(3, 5, 4, 8):
        norm(batch)
        reference(batch.flatten(0, 1))
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)


def test_batch_norm_of_token_maps_is_torchs_with_its_gradients():
    torch.manual_seed(0)
    norm, reference = awaken(CATBatchNorm(8)), nn.BatchNorm2d(8)
    reference.load_state_dict(norm.state_dict())
    features = (torch.randn(3, 10, 4, 8) * 3 - 5).requires_grad_()
    mask = torch.arange(12) < torch.tensor([10, 10, 10])[:, None]
    weight = torch.randn(3, 10, 4, 8)
    expected = reference(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    gradients = torch.autograd.grad((expected * weight).sum(), [features, *reference.parameters()])
    padded = nn.functional.pad(features, (0, 0, 0, 0, 0, 2), value=99.0)
    for output in (norm(features), norm(padded, mask)[:, :10]):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad((output * weight).sum(), [features, *norm.parameters()])
        torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_running_statistics_are_those_of_the_batch(padded):
    torch.manual_seed(0)
    features, norm = torch.randn(3, 10, 4, 8) * 3 - 5, CATBatchNorm(8)
    mask = torch.ones(3, 10, dtype=torch.bool) if padded else None
    norm(features, mask)
    torch.testing.assert_close(norm.running_mean, features.mean((0, 1, 2)))
    torch.testing.assert_close(norm.running_var, features.flatten(0, 2).var(0))
    for _ in range(20):
        norm(features, mask)
    before = norm.running_var.clone()
    norm(2 * features, mask)
    torch.testing.assert_close(norm.running_var, 0.9 * before + 0.1 * 4 * features.flatten(0, 2).var(0))


def test_stem_is_a_chain_of_convolutions_with_maximum_pooling_added_to_the_patches():
    torch.manual_seed(0)
    model = awaken(CATModel(small_config())).eval()
    stem = model.embeddings.stem
    images = torch.randn(2, 13, 64, 3)
    expected = images.permute(0, 3, 1, 2)
    for convolution, norm in zip(stem.convolutions, stem.norms):
        expected = nn.functional.pad(expected, (0, 0, 0, expected.shape[2] % 2))
        expected = nn.functional.conv2d(expected, convolution.weight, padding=1)
        expected = nn.functional.max_pool2d(expected, 2)
        arguments = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        expected = nn.functional.batch_norm(expected, *arguments).relu()
    expected = stem.output(expected.permute(0, 2, 3, 1))
    assert expected.shape[1:3] == (4, 16)
    torch.testing.assert_close(stem(images, None), expected, atol=1e-4, rtol=1e-4)
    features = torch.randn(1, 12, 384)
    with_stem = model.embeddings(features, None)
    model.embeddings.stem = None
    assert not torch.allclose(model.embeddings(features, None), with_stem, atol=1e-3)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path = CATDropPath(0.25)
    branch = torch.ones(4_000, 3, 2)
    dropped = drop_path(branch)
    per_clip = dropped.flatten(1)
    assert per_clip.unique().tolist() == pytest.approx([0, 4 / 3]) and (per_clip == per_clip[:, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert drop_path.eval()(branch) is branch


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_objective_is_the_weighted_sum_of_its_parts(problem_type):
    torch.manual_seed(0)
    weights = {"causal_loss_weight": 0.3, "reconstruction_loss_weight": 2.0}
    model = model_with(problem_type=problem_type, drop_path_rate=0.0, **weights).train()
    features = torch.randn(4, 40, 384)
    mask = torch.arange(40) < torch.tensor([40, 31, 20, 4])[:, None]
    labels = torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 0, 0, 1.0], [1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])
    output = model(features, mask, labels=labels, output_reconstruction=True)
    head = model.classifier
    multi_label = problem_type == "multi_label_classification"
    causal = causal_loss(output.pooler_output, head.weight, head.bias, labels, multi_label=multi_label)
    torch.testing.assert_close(output.causal_loss, causal)  # the labels as they are, not their argmax
    seen = model.spectrograms(model.cat(features, mask).normalized_features)
    squares = (output.reconstruction - seen).square() * mask[:, None, None, :, None]
    torch.testing.assert_close(output.reconstruction_loss, squares.sum() / (mask.sum() * 384))
    expected = output.classification_loss + 0.3 * output.causal_loss + 2.0 * output.reconstruction_loss
    torch.testing.assert_close(output.loss, expected)
    # What is evaluated can be compared with other models.
    evaluated = model.eval()(features, mask, labels=labels)
    assert evaluated.loss is evaluated.classification_loss and evaluated.causal_loss is None


def test_objective_without_its_causal_parts_is_classification():
    model = model_with(causal_loss_weight=0.0, reconstruction_loss_weight=0.0).train()
    output = model(torch.randn(2, 16, 384), labels=torch.tensor([0, 1]))
    assert output.loss is output.classification_loss
    assert output.causal_loss is None and output.reconstruction_loss is None and model.reconstruction is None


def test_inference_runs_nothing_of_the_objective(small_model, monkeypatch):
    monkeypatch.setattr("transformers_cat.modeling_cat.causal_loss", None)
    monkeypatch.setattr(small_model.reconstruction, "forward", None)
    output = small_model(torch.randn(2, 16, 384))
    assert set(output) == {"logits", "pooler_output"}


def test_pns_of_each_feature_on_request(small_model):
    features = torch.randn(4, 40, 384)
    output = small_model(features, output_pns=True)
    head = small_model.classifier
    predicted = nn.functional.one_hot(output.logits.argmax(-1), 5).float()
    expected = conditional_pns(output.pooler_output, head.weight, head.bias, predicted).clamp(min=0)
    torch.testing.assert_close(output.pns, expected)
    labels = torch.tensor([0, 1, 2, 3])
    of_labels = small_model(features, labels=labels, output_pns=True).pns
    assert (of_labels != output.pns).any() and (of_labels >= 0).all() and (of_labels < 1).all()


def test_reconstruction_block_comes_and_goes_without_a_warning(tmp_path, small_model):
    small_model.save_pretrained(tmp_path / "with")
    arguments = {"output_loading_info": True}
    without, report = CATForAudioClassification.from_pretrained(
        tmp_path / "with", reconstruction_loss_weight=0.0, **arguments
    )
    assert without.reconstruction is None
    assert not report["missing_keys"] and not report["unexpected_keys"]
    features = torch.randn(2, 16, 384)
    torch.testing.assert_close(without(features).logits, small_model(features).logits)
    with pytest.raises(ValueError, match="reconstruction_loss_weight"):
        without(features, output_reconstruction=True)
    without.save_pretrained(tmp_path / "without")
    again, report = CATForAudioClassification.from_pretrained(
        tmp_path / "without", reconstruction_loss_weight=1.0, **arguments
    )
    assert not report["missing_keys"] and torch.isfinite(again.reconstruction.projection.weight).all()
    small_model.drop_reconstruction()
    small_model.save_pretrained(tmp_path / "dropped")
    assert CATForAudioClassification.from_pretrained(tmp_path / "dropped").reconstruction is None


@pytest.mark.parametrize("case", ["features", "padded features", "waveforms", "training"])
def test_compiles_without_a_graph_break(small_model, case):
    torch.compiler.reset()
    inputs = {"input_values": torch.randn(2, 50, 384)}
    if case == "padded features":
        inputs["attention_mask"] = torch.arange(50) < torch.tensor([50, 31])[:, None]
    if case == "waveforms":
        inputs["input_values"] = torch.randn(2, 16_000)
    if case == "training":
        inputs["labels"] = torch.tensor([0, 1])
        small_model.config.problem_type = "single_label_classification"
        small_model.train()
    # The backend that runs the traced graph as it is: what can break is the tracing.
    compiled = torch.compile(small_model, backend="eager", fullgraph=True, dynamic=False)
    torch.manual_seed(1)
    output = compiled(**inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(output.logits, small_model(**inputs).logits, atol=1e-4, rtol=1e-4)
    if case == "training":
        output.loss.backward()
        assert all(value.grad is not None for value in small_model.parameters())


def test_attention_heads_of_a_filter_are_its_rows_of_the_dense_matrix():
    torch.manual_seed(0)
    config = small_config()
    attention = CATAttention(config, stage=0).eval()
    streams = torch.randn(2, 1, 8, 8, 16)
    attention.output = nn.Identity()
    output, _ = attention(streams, nn.Identity(), (8, 8), None)
    changed, _ = attention(torch.stack([streams[0], streams[0]]), nn.Identity(), (8, 8), None)
    assert (output[..., :8] == changed[..., :8]).all()  # the first filter's head
    assert (output[..., 8:] != changed[..., 8:]).any()


def test_split_streams_sum_to_nothing():
    streams = torch.randn(2, 1, 3, 4, 5)
    trunk, offsets = split_streams(streams)
    torch.testing.assert_close(trunk + offsets, streams)
    torch.testing.assert_close(offsets.sum(0), torch.zeros(1, 3, 4, 5), atol=1e-6, rtol=0)
    assert split_streams(streams[:1])[1] is None


@pytest.mark.parametrize("shape", [(2, 10, 383), (2, 10, 3, 384), (384,)])
def test_wrong_features_are_refused_by_shape(small_model, shape):
    with pytest.raises(ValueError, match=r"input_values.*\(clips, frames, 384\)"):
        small_model(torch.zeros(shape))


def test_missing_input_is_refused(small_model):
    with pytest.raises(ValueError, match="input_values"):
        small_model()


def test_freezing_the_feature_encoder(small_model):
    small_model.freeze_feature_encoder()
    trained = {name.split(".")[1] for name, value in small_model.named_parameters() if value.requires_grad}
    assert "embeddings" not in trained and "stages" in trained


@pytest.mark.parametrize("frozen", ["all", "embeddings", "nothing"])
def test_frozen_weights_keep_their_statistics(frozen):
    """As under an adapter or for a linear probe: nobody would save what moved."""
    torch.manual_seed(0)
    model = CATForAudioClassification(small_config(drop_path_rate=0.0)).train()
    if frozen == "embeddings":
        model.freeze_feature_encoder()
    elif frozen == "all":
        model.base_model.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features = torch.randn(2, 40, model.config.feature_size) * 3 - 5
    output = model(features, labels=torch.tensor([0, 1]))
    output.loss.backward()
    moved = {name.split(".")[1] for name, buffer in model.named_buffers() if not buffer.equal(before[name])}
    assert moved == ({"feature_norm", "embeddings"} if frozen == "nothing" else set())
    if frozen == "all":
        torch.testing.assert_close(output.logits, model.eval()(features).logits)


@pytest.mark.parametrize("saved", ["embeddings", "embeddings.projection", "feature_norm"])
def test_statistics_move_where_an_adapter_saves_them(saved, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = CATForAudioClassification(small_config())
    model.save_pretrained(tmp_path / "base")
    kept = ["classifier", "embeddings" if saved == "feature_norm" else saved, saved]
    lora = peft.LoraConfig(target_modules=r".*attention\.output", modules_to_save=list(dict.fromkeys(kept)))
    adapted = peft.get_peft_model(model, lora).train()
    features = torch.randn(2, 40, model.config.feature_size) * 3 - 5
    adapted(features, labels=torch.tensor([0, 1])).loss.backward()
    moved = {name.split(".")[1] for name, buffer in model.named_buffers() if name.endswith("tracked") and buffer > 0}
    assert ("feature_norm" in moved) == (saved == "feature_norm")
    adapted.save_pretrained(tmp_path / "adapter")
    base = CATForAudioClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(features).logits, adapted.eval()(features).logits)


def test_a_single_frame_can_be_trained_on():
    model = CATForAudioClassification(small_config()).train()
    loss = model(torch.randn(1, 1, model.config.feature_size), labels=torch.tensor([1])).loss
    loss.backward()
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers()) and loss.isfinite()


def test_the_default_sizes_stay_within_their_budget():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(**arguments):
        torch.manual_seed(0)
        model = CATModel(CATConfig(**arguments)).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1000, model.config.feature_size))
        return counter.get_total_flops()

    tiny = flops()
    assert tiny <= 13e9
    # the exchange between the resolutions: at most 5 % of the encoder
    assert tiny - flops(exchange_dim=0) <= 0.05 * tiny
    # two filters: within a few per cent of one stream
    assert tiny <= 1.10 * flops(filters=("mel",))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("waveforms", [True, False])
def test_function_transforms(implementation, waveforms):
    """Gradients by torch.func, of all clips together and of each alone, are those of backward."""
    model = CATForAudioClassification(small_config(attn_implementation=implementation)).eval()
    awaken(model)
    inputs, labels = torch.randn(3, 9600) * 0.1 if waveforms else torch.randn(3, 24, 384), torch.tensor([0, 1, 1])
    weights = dict(model.named_parameters())

    def loss(weights, inputs, labels):
        logits = torch.func.functional_call(model, weights, (inputs,)).logits
        return nn.functional.cross_entropy(logits, labels)

    def of_one_clip(weights, clip, label):
        return loss(weights, clip[None], label[None])

    together = torch.func.grad(loss)(weights, inputs, labels)
    alone = torch.func.vmap(torch.func.grad(of_one_clip), (None, 0, 0))(weights, inputs, labels)
    learnt = {name: weight for name, weight in weights.items() if not name.startswith("reconstruction")}
    expected = torch.autograd.grad(loss(weights, inputs, labels), learnt.values(), allow_unused=True)
    for name, gradient in zip(learnt, expected):
        if gradient is not None:
            torch.testing.assert_close(together[name], gradient, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone[name].mean(0), gradient, atol=1e-5, rtol=1e-4)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in expected) > 20
