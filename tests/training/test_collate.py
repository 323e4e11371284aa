"""The collator: what each augmentation does to waveforms, features and labels, exactly."""

import pickle

import numpy as np
import pytest
import torch

from transformers_cat import CATFeatureExtractor
from transformers_cat.mrmf import filter_edges
from transformers_cat.training import decode_audio, load_audio_dataset
from transformers_cat.training.collate import MAX_MASKED_SHARE, AudioCollator

OFF = {"mixup_probability": 0.0, "time_roll": 0.0, "gain_db": 0.0, "time_mask": 0, "freq_mask": 0, "speed": 1.0}
WAVEFORMS = CATFeatureExtractor(do_mrmf=False)
FEATURES = CATFeatureExtractor()
RATE = FEATURES.sampling_rate


def collator(extractor=WAVEFORMS, training=True, num_labels=4, **augmentation):
    """A collator with nothing but the given augmentation."""
    return AudioCollator(extractor, training=training, num_labels=num_labels, **{**OFF, **augmentation})


def separate_clips(size=4, block=8):
    """Clip i, of class i, is 1 in its own block and 0 elsewhere: a mixture shows the share of each clip."""
    return [{"audio": row, "label": i} for i, row in enumerate(np.eye(size, dtype="float32").repeat(block, axis=1))]


def noise_clips(*seconds):
    generator = np.random.default_rng(0)
    return [
        {"audio": generator.normal(0, 0.1, int(s * RATE)).astype("float32"), "label": i} for i, s in enumerate(seconds)
    ]


def shares(batch, block=8):
    return batch["input_values"][:, ::block]


class TestEvaluation:
    def test_only_features(self):
        clips = noise_clips(0.5, 0.2)
        batch = AudioCollator(FEATURES, training=False, num_labels=4, max_length_seconds=0.1)(clips)
        expected = FEATURES([clip["audio"] for clip in clips], sampling_rate=RATE, padding=True, return_tensors="pt")
        assert set(batch) == {"input_values", "attention_mask", "labels"}
        assert torch.equal(batch["input_values"], expected["input_values"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert batch["labels"].tolist() == [0, 1] and batch["labels"].dtype == torch.int64

    def test_draws_no_random_number(self):
        state = torch.get_rng_state()
        AudioCollator(FEATURES, training=False, num_labels=4)(noise_clips(0.2, 0.2))
        assert torch.equal(torch.get_rng_state(), state)


class TestLabels:
    def test_ids_stay_ids_without_mixup(self):
        labels = collator()(separate_clips())["labels"]
        assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("training", [True, False])
    def test_several_labels(self, training):
        clips = separate_clips()
        for clip, label in zip(clips, ([1, 3], [], [0], [2, 1]), strict=True):
            clip["label"] = label
        labels = collator(training=training)(clips)["labels"]
        assert labels.dtype == torch.float32
        assert labels.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]

    def test_rows_of_targets(self):
        clips = separate_clips(2)
        clips[0]["label"], clips[1]["label"] = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 1.0, 0])
        assert collator()(clips)["labels"].tolist() == [[0.5, 0.5, 0, 0], [0, 0, 1, 0]]
        clips[1]["label"] = np.array([0.5, 0.5])
        with pytest.raises(ValueError, match=r"has shape \(2,\), not \(4,\)"):
            collator()(clips)

    def test_no_labels(self):
        batch = collator(mixup_probability=1.0)([{"audio": clip["audio"]} for clip in separate_clips()])
        assert "labels" not in batch
        assert torch.equal(shares(batch), torch.eye(4))  # what cannot be mixed with its label is not mixed

    @pytest.mark.parametrize("label", [4, -1, [4]])
    def test_out_of_range(self, label):
        clips = separate_clips()
        clips[0]["label"] = label
        if isinstance(label, list):
            clips = [{**clip, "label": label} for clip in clips]
        with pytest.raises(ValueError, match=r"do not all lie in \[0, 4\)"):
            collator()(clips)


class TestMixup:
    def test_labels_are_mixed_as_the_waveforms(self):
        torch.manual_seed(0)
        batch = collator(mixup_probability=1.0)(separate_clips())
        labels = batch["labels"]
        assert torch.equal(labels, shares(batch))
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
        # With itself a clip would have one share of 1.
        assert ((labels > 0).sum(dim=1) == 2).all()

    def test_several_labels_are_mixed(self):
        torch.manual_seed(0)
        clips = [{**clip, "label": [i, (i + 1) % 4]} for i, clip in enumerate(separate_clips())]
        batch = collator(mixup_probability=1.0)(clips)
        multi_hot = torch.eye(4) + torch.eye(4).roll(1, dims=1)
        torch.testing.assert_close(batch["labels"], shares(batch) @ multi_hot)

    def test_probability(self):
        torch.manual_seed(0)
        batches = [collator(mixup_probability=0.3, num_labels=16)(separate_clips(16, 1)) for _ in range(40)]
        mixed = torch.cat([batch["labels"].amax(dim=1) < 1 for batch in batches])
        deviation = (0.3 * 0.7 / len(mixed)) ** 0.5
        assert abs(float(mixed.float().mean()) - 0.3) < 4 * deviation

    @pytest.mark.parametrize("alpha", [1.0, 10.0])
    def test_shares_follow_the_beta_distribution(self, alpha):
        torch.manual_seed(0)
        collate = collator(mixup_probability=1.0, mixup_alpha=alpha, num_labels=64)
        own = torch.cat([collate(separate_clips(64, 1))["labels"].diagonal() for _ in range(20)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(float(own.mean()) - 0.5) < 4 * (variance / len(own)) ** 0.5
        assert float(own.var()) == pytest.approx(variance, rel=0.15)

    def test_a_mixture_is_as_long_as_its_longer_clip(self):
        torch.manual_seed(0)
        clips = noise_clips(0.1, 0.02)
        batch = collator(mixup_probability=1.0)(clips)
        assert batch["input_values"].shape == (2, 3200) and "attention_mask" not in batch  # as nothing is padding
        lone = collator(mixup_probability=1e-9)(clips)
        assert lone["attention_mask"].sum(dim=1).tolist() == [3200, 640]

    def test_one_clip_alone(self):
        batch = collator(mixup_probability=1.0)(separate_clips()[1:2])
        assert batch["labels"].tolist() == [[0, 1, 0, 0]]
        assert shares(batch).tolist() == [[0, 1, 0, 0]]


class TestWaveforms:
    def shifts(self, **augmentation):
        """The cyclic shift of a ramp, for batches of two clips of different lengths."""
        ramps = [np.arange(1, n + 1, dtype="float32") / 100 for n in (50, 20)]
        found = []
        for _ in range(50):
            batch = collator(**augmentation)([{"audio": ramp, "label": 0} for ramp in ramps])
            assert batch["attention_mask"].sum(dim=1).tolist() == [50, 20]
            for ramp, row in zip(ramps, batch["input_values"].numpy(), strict=True):
                shift = int(np.argmin(row[: len(ramp)]))
                # All of the clip's samples, in cyclic order, and nothing of the padding.
                np.testing.assert_array_equal(row[: len(ramp)], np.roll(ramp, shift))
                assert not row[len(ramp) :].any()
                found.append((len(ramp), shift))
        return found

    def test_roll_is_cyclic_within_the_clip(self):
        torch.manual_seed(0)
        found = self.shifts(time_roll=1.0)
        assert len({shift for length, shift in found if length == 50}) > 20
        assert max(shift for length, shift in found if length == 20) > 15

    def test_roll_is_bounded(self):
        torch.manual_seed(0)
        found = self.shifts(time_roll=0.2)
        assert 5 < max(shift for length, shift in found if length == 50) < 10
        assert max(shift for length, shift in found if length == 20) < 4

    def test_no_roll(self):
        assert {shift for _, shift in self.shifts()} == {0}

    def test_gain(self):
        torch.manual_seed(0)
        clips = [{"audio": np.linspace(0.1, 0.2, 50, dtype="float32"), "label": 0} for _ in range(64)]
        ratio = collator(gain_db=6.0)(clips)["input_values"] / torch.from_numpy(clips[0]["audio"])
        decibels = 20 * ratio.log10()
        assert float(decibels.std(dim=1).max()) < 1e-4  # one gain for all of a clip
        assert -6 <= float(decibels.min()) < -4 and 4 < float(decibels.max()) <= 6
        assert torch.equal(collator()(clips)["input_values"][0], torch.from_numpy(clips[0]["audio"]))

    def test_a_crop_gives_up_no_sound_for_silence(self):
        ramp = np.arange(1, 101, dtype="float32") / 1000
        clip = np.pad(ramp, (1000, 2000), constant_values=1e-5)  # as a lossy codec leaves zeros
        starts = []
        for _ in range(50):
            cropped = collator(max_length_seconds=400 / RATE)([{"audio": clip, "label": 0}])["input_values"][0].numpy()
            starts.append(int(np.argmax(cropped > 5e-4)))
            np.testing.assert_array_equal(cropped[starts[-1] : starts[-1] + 100], ramp)
            assert len(cropped) == 400 and np.count_nonzero(cropped) == 100
        assert min(starts) < 60 and max(starts) > 240
        for _ in range(50):
            batch = collator(max_length_seconds=60 / RATE)([{"audio": clip, "label": 0}])
            assert (batch["input_values"] > 5e-4).all()
        silent = [{"audio": np.zeros(1000, "float32"), "label": 0}]
        assert not collator(max_length_seconds=400 / RATE)(silent)["input_values"].any()

    def test_speed_changes_length_and_pitch_alike(self):
        tone = np.sin(2 * np.pi * np.arange(8000) / 40).astype("float32")
        lengths = []
        for _ in range(50):
            row = collator(speed=1.25)([{"audio": tone, "label": 0}])["input_values"][0].numpy()
            lengths.append(len(row))
            periods = np.count_nonzero(np.diff(np.signbit(row))) / 2
            assert periods == pytest.approx(200, abs=1)
        factors = np.log(8000 / np.array(lengths)) / np.log(1.25)
        assert -1 <= factors.min() < -0.8 and 0.8 < factors.max() <= 1
        assert abs(factors.mean()) < 4 * (1 / 3 / 50) ** 0.5
        # A crop has its length whatever the speed.
        batch = collator(speed=1.25, max_length_seconds=1000 / RATE)([{"audio": tone, "label": 0}])
        assert batch["input_values"].shape == (1, 1000)

    def test_crop(self):
        torch.manual_seed(0)
        ramp = np.arange(1, 1001, dtype="float32") / 1000
        collate = collator(max_length_seconds=400 / RATE)
        starts = []
        for _ in range(60):
            batch = collate([{"audio": ramp, "label": 0}, {"audio": ramp[:300], "label": 0}])
            assert batch["attention_mask"].sum(dim=1).tolist() == [400, 300]
            cropped = batch["input_values"][0].numpy()
            starts.append(round(float(cropped[0]) * 1000) - 1)
            np.testing.assert_array_equal(cropped, ramp[starts[-1] : starts[-1] + 400])
            np.testing.assert_array_equal(batch["input_values"][1, :300].numpy(), ramp[:300])
        assert min(starts) < 100 and max(starts) > 500


class TestNormalisation:
    def test_a_recording_is_whitened_whole_and_once(self):
        extractor = CATFeatureExtractor(whitening=0.5, do_mrmf=False)
        (clip,) = noise_clips(1.0)
        clip["audio"] = np.cumsum(clip["audio"]) / 30  # the spectrum of noise is white as it is
        whole = extractor.mrmf.whitened(torch.from_numpy(clip["audio"])[None])[0]
        assert not torch.allclose(whole, torch.from_numpy(clip["audio"]), atol=0.1)
        crop = collator(extractor, max_length_seconds=0.25)([clip])["input_values"][0]
        windows = whole.unfold(0, len(crop), 1)
        assert (windows - crop).abs().amax(1).min() < 1e-6

    def test_without_augmentation_training_hears_what_evaluation_hears(self):
        extractor = CATFeatureExtractor(whitening=0.5, normalize_volume=True)
        clips = noise_clips(0.5, 0.2)
        features, expected = (collator(extractor, training)(clips)["input_values"] for training in (True, False))
        torch.testing.assert_close(features, expected, atol=5e-3, rtol=1e-3)
        assert not torch.allclose(expected, collator(FEATURES)(clips)["input_values"], atol=0.1)

    @pytest.mark.parametrize("normalize_volume", [True, False])
    def test_where_volume_makes_no_difference_clips_are_as_loud_as_each_other(self, normalize_volume):
        extractor = CATFeatureExtractor(whitening=0.5, normalize_volume=normalize_volume, do_mrmf=False)
        clips = noise_clips(0.5, 0.5)
        clips[1]["audio"] *= 0.01
        peaks = collator(extractor)(clips)["input_values"].abs().amax(1)
        ratio = 1 if normalize_volume else 0.01
        assert peaks[1] / peaks[0] == pytest.approx(ratio, rel=0.2)


@pytest.mark.parametrize(("normalize_volume", "gain"), [(False, 12.0), (True, 0.0)])
def test_volume_varies_by_default_unless_it_makes_no_difference(normalize_volume, gain):
    extractor = CATFeatureExtractor(normalize_volume=normalize_volume)
    assert AudioCollator(extractor, training=True, num_labels=4).gain_db == gain


def test_augmentations_are_on_by_default():
    collate = AudioCollator(FEATURES, training=True, num_labels=4)
    assert (collate.time_mask, collate.freq_mask, collate.time_roll, collate.speed) == (48, 12, 1.0, 1.25)
    assert (collate.mixup_probability, collate.mixup_alpha) == (0.5, 1.0)


class TestSpecAugment:
    def masked(self, clips, **augmentation):
        """Features without and with masks as (B, T, G*K, F), and where they differ."""
        plain = collator(FEATURES)(clips)
        batch = collator(FEATURES, **augmentation)(clips)
        mask = plain.get("attention_mask", torch.ones(plain["input_values"].shape[:2]))
        assert torch.equal(batch.get("attention_mask", torch.ones_like(mask)), mask)
        shape = (*plain["input_values"].shape[:2], -1, FEATURES.num_bins)
        before, after = plain["input_values"].view(shape), batch["input_values"].view(shape)
        return before, after, before != after, mask.bool()

    @staticmethod
    def band(hit):
        """First position and width of the one run of True."""
        positions = hit.nonzero().flatten()
        assert len(positions) == 0 or int(positions[-1] - positions[0]) + 1 == len(positions)
        return (int(positions[0]) if len(positions) else 0), len(positions)

    def test_one_time_and_one_frequency_band_for_all_resolutions(self):
        torch.manual_seed(1)
        widths = []
        for _ in range(10):
            before, after, changed, valid = self.masked(noise_clips(0.6, 0.6), time_mask=20, freq_mask=10)
            mel, linear = changed[:, :, :3], changed[:, :, 3:]
            assert (mel == mel[:, :, :1]).all() and (linear == linear[:, :, :1]).all()
            for clip in linear[:, :, 0]:
                assert torch.equal(clip, clip.all(dim=1)[:, None] | clip.all(dim=0)[None])
            assert torch.equal(linear[:, :, 0].all(dim=2), mel[:, :, 0].all(dim=2))
            for clip in mel[:, :, 0]:
                time, frequency = clip.all(dim=1), clip.all(dim=0)
                # Exactly the two bands, nothing else.
                assert torch.equal(clip, time[:, None] | frequency[None])
                widths.append((self.band(time)[1], self.band(frequency)[1]))
        assert len(set(widths)) > 10  # every clip has its own
        assert 10 < max(width for width, _ in widths) <= 20
        assert 5 < max(width for _, width in widths) <= 10

    def test_the_band_has_the_same_frequencies_in_each_filter_bank(self):
        torch.manual_seed(1)
        mel, linear = (filter_edges(name, 64, 50.0, 14_000.0) for name in ("mel", "linear"))
        masks = []
        for _ in range(20):
            changed = self.masked(noise_clips(0.2), freq_mask=12)[2][0, 0]  # (G*K, F)
            start, width = self.band(changed[0])
            if width == 0:
                assert not changed.any()
                continue
            # Of the linear bins, those whose centre is nearer to a masked mel bin's than to that of one left.
            low, high = (mel[start] + mel[start + 1]) / 2, (mel[start + width] + mel[start + width + 1]) / 2
            low, high = (0 if start == 0 else low), (1e9 if start + width == 64 else high)
            inside = (linear[1:-1] > low) & (linear[1:-1] < high)
            assert changed[3].tolist() == inside.tolist()
            masks.append((width, int(inside.sum())))
        assert len(masks) > 10 and max(count for _, count in masks) > 12  # high bins of mel are wide
        assert min(count / width for width, count in masks) < 0.5  # low ones narrow

    def test_banks_alone_and_in_any_order(self):
        """One draw masks the same bins of the first bank, whichever that is."""
        drawn = []
        for filters in (["linear"], ["linear", "mel"], ["mel"]):
            torch.manual_seed(1)
            extractor = CATFeatureExtractor(filters=filters, window_lengths=[800], hop_lengths=[320])
            clips = noise_clips(0.4, 0.4, 0.4)
            masked = collator(extractor, freq_mask=12)(clips)["input_values"]
            changed = masked != collator(extractor)(clips)["input_values"]
            drawn.append([self.band(band) for band in changed.unflatten(2, (-1, 64)).all(dim=1)[:, 0]])
        assert drawn[0] == drawn[1] == drawn[2] and drawn[0][0][1] > 0

    def test_value_is_the_mean_of_the_valid_features(self):
        torch.manual_seed(1)
        before, after, changed, valid = self.masked(noise_clips(0.6, 0.2), time_mask=30, freq_mask=12)
        mean = before[valid].mean(dim=0)
        assert changed[0].any() and changed[1].any()
        assert not changed[~valid].any()
        torch.testing.assert_close(after, torch.where(changed, mean, before))

    def test_bands_lie_on_a_clip_s_own_frames(self):
        torch.manual_seed(0)
        positions, widths = [], []
        for _ in range(30):
            before, after, changed, valid = self.masked(noise_clips(1.0, 0.2), time_mask=96)
            assert not changed[~valid].any()
            start, width = self.band(changed[1, :, 0, 0])
            positions.append(start)
            widths.append(width)
        frames = int(valid[1].sum())
        assert max(widths) <= MAX_MASKED_SHARE * frames
        # Drawn within the short clip, not within the padded length: hardly any draw misses it.
        assert sum(width > 0 for width in widths) >= 24
        assert len(set(positions)) > 5

    def test_each_can_be_off(self):
        torch.manual_seed(0)
        _, _, changed, _ = self.masked(noise_clips(0.4), freq_mask=12)
        assert changed.any() and not changed.all(dim=3).any() and (changed == changed[:, :1]).all()
        _, _, changed, _ = self.masked(noise_clips(0.4), time_mask=12)
        assert (changed == changed[..., :1]).all()

    def test_without_a_mask_all_frames_are_valid(self):
        torch.manual_seed(1)
        extractor = CATFeatureExtractor(return_attention_mask=False)
        batch = collator(extractor, time_mask=20, freq_mask=10)(noise_clips(0.4, 0.4))
        assert set(batch) == {"input_values", "labels"}
        assert not torch.equal(batch["input_values"], collator(extractor)(noise_clips(0.4, 0.4))["input_values"])


class TestWhole:
    def test_reproducible_by_torch_s_seed(self):
        collate = AudioCollator(FEATURES, training=True, num_labels=4, max_length_seconds=0.3)
        clips = noise_clips(0.4, 0.2, 0.5, 0.3)
        batches = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            np.random.seed(len(batches))
            batches.append(collate(clips))
        for name in batches[0]:
            assert torch.equal(batches[0][name], batches[1][name])
        assert not torch.equal(batches[0]["labels"], batches[2]["labels"])

    def test_extractor_is_called_once(self):
        calls = []

        class Counting(CATFeatureExtractor):
            def __call__(self, clips, **kwargs):
                calls.append(len(clips))
                return super().__call__(clips, **kwargs)

        AudioCollator(Counting(), training=True, num_labels=4)(noise_clips(0.1, 0.1, 0.1))
        assert calls == [3]

    def test_the_examples_are_left_as_they_were(self):
        clips = noise_clips(0.2, 0.2)
        copies = [clip["audio"].copy() for clip in clips]
        AudioCollator(FEATURES, training=True, num_labels=4)(clips)
        for clip, copy in zip(clips, copies, strict=True):
            np.testing.assert_array_equal(clip["audio"], copy)

    def test_workers_that_are_spawned_can_receive_it(self):
        collate = pickle.loads(pickle.dumps(AudioCollator(FEATURES, training=False, num_labels=4)))
        assert collate(noise_clips(0.1))["labels"].tolist() == [0]

    def test_real_clips(self, data_dir):
        torch.manual_seed(0)
        rows = decode_audio(load_audio_dataset(data_dir / "esc10"), RATE).select(range(4))
        batch = AudioCollator(FEATURES, training=True, num_labels=10)([rows[i] for i in range(4)])
        assert batch["input_values"].shape[2] == FEATURES.feature_size
        assert batch["input_values"].isfinite().all()
        torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixup_probability": 1.5}, "mixup_probability is a probability, not 1.5"),
        ({"mixup_probability": 0.5, "mixup_alpha": 0.0}, "mixup_alpha must be positive"),
        ({"time_roll": 2.0}, "time_roll is a share"),
        ({"gain_db": -1.0}, "gain_db must not be negative"),
        ({"extractor": FEATURES, "time_mask": -1}, "time_mask must not be negative"),
        ({"speed": 0.8}, "speed is a factor of at least 1, not 0.8"),
        ({"max_length_seconds": 0.0}, "max_length_seconds must be positive or None"),
        ({"extractor": FEATURES, "freq_mask": 65}, "freq_mask=65 is wider than 64 bins"),
        ({"time_mask": 10}, "SpecAugment needs .* do_mrmf=True, or .* time_mask=0 and freq_mask=0"),
        ({"freq_mask": 10}, "SpecAugment needs"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        collator(**arguments)


def test_masks_do_not_matter_in_evaluation():
    assert collator(training=False, time_mask=10)(separate_clips())["labels"].tolist() == [0, 1, 2, 3]
