import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from transformers_cat import CATConfig


def test_defaults_are_the_documented_shapes():
    config = CATConfig()
    assert (config.num_filters, config.num_resolutions, config.feature_size) == (2, 3, 384)
    assert (config.hidden_size, config.num_hidden_layers) == (768, 4)
    assert [config.stage_bins(stage) for stage in range(4)] == [16, 8, 4, 2]
    assert [config.window_shape(stage) for stage in range(4)] == [(8, 8), (8, 8), (16, 4), (32, 2)]


def test_config_from_and_save_pretrained(tmp_path):
    config = CATConfig(filters=("linear",), depths=(1, 2), num_heads=(3, 6), num_labels=7, f_max=12_000)
    config.save_pretrained(tmp_path)
    assert CATConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    by_auto = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(by_auto, CATConfig) and by_auto.to_diff_dict() == config.to_diff_dict()


def test_derived_values_follow_an_override(tmp_path):
    CATConfig().save_pretrained(tmp_path)
    assert "hidden_size" not in json.loads((tmp_path / "config.json").read_text())
    assert CATConfig.from_pretrained(tmp_path, embed_dim=48).hidden_size == 384


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"num_heads": (3, 6, 12, 24)}, r"3 heads of stage 0 .* 2 filters"),
        ({"window_lengths": (400, 800)}, r"\(400, 800\).*\(160, 320, 640\)"),
        ({"window_lengths": (), "hop_lengths": ()}, r"at least 1"),
        ({"f_max": 16_001.0}, r"16001.0 Hz.*16000.0 Hz, the Nyquist"),
        ({"f_min": 15_000}, r"15000"),
        ({"sampling_rate": 16_000}, r"14000.0 Hz.*8000.0 Hz"),
        ({"patch_size": (4, 65)}, r"64 must be a multiple of the patch's 65"),
        ({"stem_channels": (8, 8, 8)}, r"\(8, 8\), not \(4, 4\)"),
        ({"patch_size": (0, 4)}, r"\(0, 4\)"),
        ({"hop_lengths": (160, 320, 500)}, r"500 .* 320"),
        ({"hop_lengths": (160, 320, 3200)}, r"3200 .* 1600"),
        ({"depths": (2, 2)}, r"\(2, 2\).*\(4, 8, 16, 32\)"),
        ({"window_size": None}, r"`depths` \(2, 2, 6, 2\)"),
        ({"window_size": 7}, r"7x7 tokens do not tile the 16"),
        ({"window_size": 0}, r"not 0"),
        ({"embed_dim": 90}, r"90"),
        ({"depthwise_kernel_size": 4}, r"not 4"),
        ({"filters": ()}, r"filters"),
        ({"filters": ("bark",)}, r"bark"),
        ({"log_offset": 0.0}, r"0.0"),
        ({"normalize_volume": 1}, r"normalize_volume"),
        ({"whitening": 1.5}, r"`whitening` must be a share, from 0 to 1, not 1.5"),
        ({"embed_dim": 96.0}, r"96.0"),
        ({"num_labels": 0}, r"num_labels"),
    ],
)
def test_impossible_values_are_refused_by_name(arguments, named):
    with pytest.raises((StrictDataclassError, ValueError), match=f"(?s){named}"):
        CATConfig(**arguments)


@pytest.mark.parametrize("name, embed_dim, depths", [("nano", 64, 3), ("tiny", 96, 12), ("base", 128, 24)])
def test_named_sizes_are_configurations(request, name, embed_dim, depths):
    config = AutoConfig.from_pretrained(request.config.rootpath / "model_cards" / f"cat-{name}")
    assert isinstance(config, CATConfig)
    assert (config.embed_dim, sum(config.depths)) == (embed_dim, depths)
