import re

import pytest
import torch
from transformers import ASTConfig, ASTModel, ClapAudioConfig, ClapAudioModel, SwinConfig, SwinModel

from transformers_cat import CATConfig, CATForAudioClassification, CATModel
from transformers_cat.convert import load_trunk

from .conftest import awaken


def swin(**overrides) -> SwinModel:
    arguments = {"image_size": 64, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4}
    torch.manual_seed(0)
    return awaken(SwinModel(SwinConfig(**{**arguments, **overrides}, drop_path_rate=0.0))).eval()


def clap() -> ClapAudioModel:
    torch.manual_seed(0)
    config = ClapAudioConfig(
        spec_size=64,
        num_mel_bins=16,
        patch_embeds_hidden_size=16,
        hidden_size=64,
        depths=[2, 2, 2],
        num_attention_heads=[2, 4, 8],
        window_size=4,
        enable_fusion=False,
    )
    return awaken(ClapAudioModel(config)).eval()


def cat_config(**overrides) -> CATConfig:
    arguments = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": 4, "drop_path_rate": 0.0}
    return CATConfig(**{**arguments, **overrides})


def test_swin_is_exact_on_square_input():
    source, model = swin(), CATModel(cat_config(filters=("mel",), layer_norm_eps=1e-5)).eval()
    report = load_trunk(model, source)
    assert not report.adapted and not report.unused
    assert all(name.startswith(("embeddings.position", "embeddings.exchange")) for name in report.new)
    image = torch.randn(2, 3, 64, 64)
    model.feature_norm.eps = 0.0
    ours = model(image.permute(0, 2, 1, 3).flatten(2)).last_hidden_state.flatten(1, 2)
    torch.testing.assert_close(ours, source(image).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_two_equal_filters_give_the_source_too():
    source, model = swin(), CATForAudioClassification(cat_config()).eval()
    load_trunk(model, source)
    model.cat.feature_norm.eps = 0.0
    image = torch.randn(1, 3, 64, 64)
    features = image.permute(0, 2, 1, 3)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(2)
    ours = model.cat(features).last_hidden_state.flatten(1, 2)
    torch.testing.assert_close(ours, source(image).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_what_the_source_does_not_have_starts_as_the_identity():
    source = swin()
    plain, model = (
        CATModel(cat_config(stem_channels=channels, depthwise_kernel_size=kernel)).eval()
        for channels, kernel in (((), 0), ((4, 4), 3))
    )
    features = torch.randn(1, 32, 384)
    assert not torch.allclose(model(features).pooler_output, plain(features).pooler_output, atol=1e-2)
    plain.embeddings.exchange = model.embeddings.exchange
    for each in (plain, model):
        load_trunk(each, source)
    torch.testing.assert_close(model(features).pooler_output, plain(features).pooler_output, atol=1e-5, rtol=1e-5)


def test_htsat_is_exact_up_to_its_transposition():
    source = clap()
    config = cat_config(filters=("mel",), window_lengths=(800,), hop_lengths=(320,), exchange_dim=0)
    model = CATModel(config).eval()
    report = load_trunk(model, source)
    assert not report.adapted
    assert all("batch_norm" in name for name in report.unused)
    model.feature_norm.eps = 0.0
    encoder = source.audio_encoder
    image = torch.randn(1, 1, 64, 64)  # (height = frequency, width = time)
    tokens = encoder.patch_embed(image)
    for stage, layer in enumerate(encoder.layers):
        tokens = layer(tokens, (16 >> stage, 16 >> stage))[0]
    expected = encoder.norm(tokens).unflatten(1, (4, 4)).transpose(1, 2)
    ours = model(image[:, 0].transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_what_differs_is_adapted_and_said():
    source = swin(num_heads=[1, 2, 4], window_size=8, patch_size=2, image_size=64)
    model = CATModel(cat_config(window_lengths=(400, 800), hop_lengths=(160, 320)))
    report = load_trunk(model, source)
    said = str(report)
    assert "3 channels to 2 resolutions" in said and "patch (2, 2) to (4, 4)" in said
    assert "offsets (15, 15) to (7, 7)" in said and "1 heads to 2" in said
    assert model.embeddings.position.gate == 0
    # A constant patch keeps its projection.
    kernel = source.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(
        model.embeddings.projection.weight.sum((1, 2, 3)), kernel.sum((1, 2, 3)), atol=0.35, rtol=0.2
    )


def test_a_folder_is_loaded(tmp_path):
    source = swin()
    source.save_pretrained(tmp_path)
    of_folder, of_model = CATModel(cat_config()), CATModel(cat_config())
    load_trunk(of_folder, str(tmp_path))
    load_trunk(of_model, source)
    name = "stages.2.blocks.1.attention.qkv.1.weight"
    assert (of_folder.state_dict()[name] == of_model.state_dict()[name]).all()


def test_another_width_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\(16, 3, 4, 4\).*\(32, 3, 4, 4\)"):
        load_trunk(CATModel(cat_config()), swin(embed_dim=32))


@pytest.mark.parametrize("depths", [(2, 2, 4), (2, 2, 1), (2, 2)])
def test_other_depths_are_refused_by_name(depths):
    """A deeper source would lose its last blocks, a shallower one leave some as they are."""
    heads = (2, 4, 8)[: len(depths)]
    source = SwinModel(SwinConfig(embed_dim=16, depths=list(depths), num_heads=list(heads)))
    with pytest.raises(ValueError, match=rf"`depths`.*{re.escape(str(list(depths)))}"):
        load_trunk(CATModel(cat_config()), source)


def test_what_is_no_swin_is_refused():
    ast = ASTModel(ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16))
    with pytest.raises(ValueError, match="audio-spectrogram-transformer"):
        load_trunk(CATModel(cat_config()), ast)


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_get_the_table_of_the_heads_whose_channels_they_have(heads):
    source, model = swin(num_heads=[heads, 4, 8]), CATModel(cat_config())
    load_trunk(model, source)
    old = dict(source.named_parameters())
    (table,) = (v for n, v in old.items() if "layers.0.blocks.1." in n and n.endswith("relative_position_bias_table"))
    expected = table.expand(-1, 2) if heads == 1 else table.unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(model.stages[0].blocks[1].attention.position_bias.table, expected)
