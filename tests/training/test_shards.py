import numpy as np
import soundfile
from datasets import Dataset

from transformers_cat.training.shards import ROWS_PER_WRITE, read_shards, shard_path, write_shard


def test_more_clips_than_are_written_at_once(tmp_path):
    labels = [i % 3 for i in range(2 * ROWS_PER_WRITE + 1)]
    soundfile.write(tmp_path / "clip.wav", np.full(320, 0.1), 32_000)
    dataset = Dataset.from_dict({"audio": [str(tmp_path / "clip.wav")] * len(labels), "label": labels})
    write_shard(dataset, shard_path(tmp_path, "train", 0, 1), 32_000)
    assert read_shards(tmp_path)["train"]["label"][:] == labels
