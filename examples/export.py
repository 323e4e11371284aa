#!/usr/bin/env python
r"""Write a trained model as one ONNX graph, from waveforms to probabilities, and check it against PyTorch.

    pip install -e '.[export]'
    python examples/export.py --model_name_or_path runs/esc10 --output_dir runs/esc10-onnx --audio dog.wav

The folder then runs with onnxruntime and numpy alone, on clips of any length:

    import json
    import numpy as np
    import onnxruntime
    import soundfile

    session = onnxruntime.InferenceSession("runs/esc10-onnx/model.onnx")
    labels = json.load(open("runs/esc10-onnx/config.json"))["id2label"]
    waveform, rate = soundfile.read("dog.wav", dtype="float32")  # mono, at the rate in preprocessor_config.json
    inputs = {"input_values": waveform[None], "attention_mask": np.ones((1, len(waveform)), np.int32)}
    (probabilities,) = session.run(["probabilities"], inputs)
    print(labels[str(probabilities[0].argmax())], probabilities[0].max())

Of clips padded to one length, the mask is 0 on the padding. Further outputs are `logits`, `embeddings`, and for each
time step `frame_logits`, with `token_mask`, False where a step is padding. `--input features` starts the graph at the
spectrograms that `CATFeatureExtractor` makes; `--format torch_export` writes a program for `torch.export.load`.
"""

import argparse

from transformers_cat import CATForAudioClassification, load_audio
from transformers_cat.export import FILES, INPUTS, export


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of a model")
    parser.add_argument("--output_dir", required=True, help="where the graph and its configuration are written")
    parser.add_argument("--input", choices=INPUTS, default="waveform", help="what the graph reads; default: waveform")
    parser.add_argument("--format", choices=FILES, default="onnx", help="default: onnx")
    parser.add_argument("--audio", nargs="*", default=[], help="recordings to check the graph on, besides noise")
    arguments = parser.parse_args(argv)

    model = CATForAudioClassification.from_pretrained(arguments.model_name_or_path)
    clips = [load_audio(path, model.config.sampling_rate) for path in arguments.audio]
    differences = export(model, arguments.output_dir, arguments.input, arguments.format, clips)
    print(f"{arguments.output_dir}: largest difference from the model, for each output")
    for name, difference in differences.items():
        print(f"  {name:13} {difference:.1e}")
    return differences


if __name__ == "__main__":
    main()
