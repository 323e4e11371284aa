"""A model as one graph that runs without this package: by an ONNX runtime, or as a `torch.export` program.

Graphs take any number of clips of any length. Their inputs are what [`CATFeatureExtractor`] returns, `input_values`
float32 and `attention_mask` int32; their outputs are

- `probabilities` (B, num_labels): softmax or sigmoid of the logits, by the problem type; a regression has none;
- `logits` (B, num_labels);
- `embeddings` (B, d): Z, the mean over the tokens that hold audio;
- `frame_logits` (B, t, num_labels): the scores of each time step;
- `token_mask` (B, t) bool: the steps that hold audio.

A graph never looks at values: where the model raises an error for audio that is not finite, its outputs are NaN.
"""

import copy
import operator
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from .configuration_cat import drop_local_code, implied_problem_type
from .feature_extraction_cat import CATFeatureExtractor
from .modeling_cat import CATForAudioClassification

FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
INPUTS = ("waveform", "features")
OPSET = 20  # the first whose Fourier transform takes its axis as an input, as PyTorch's exporter writes it
TOLERANCE = 1e-4  # for each output, relative to its largest value where that is above 1


class ExportedModel(nn.Module):
    """A copy of a model in float32 on the CPU, without what only training needs, whose forward can be traced."""

    def __init__(self, model: CATForAudioClassification, attn_implementation: str):
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval()
        self.model.drop_reconstruction()
        self.model.set_attn_implementation(attn_implementation)
        self.config = self.model.config
        self.config.problem_type = implied_problem_type(self.config) or "single_label_classification"
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_make_contiguous)

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.model(input_values, attention_mask, output_frame_logits=True, return_dict=True)
        token_mask = output.token_mask
        if token_mask is None:  # run as it is, the model drops a mask that masks nothing
            token_mask = torch.ones(output.frame_logits.shape[:2], dtype=torch.bool)
        outputs = {
            "logits": output.logits,
            "embeddings": output.pooler_output,
            "frame_logits": output.frame_logits,
            "token_mask": token_mask,
        }
        if self.config.problem_type == "regression":
            return outputs
        multi_label = self.config.problem_type == "multi_label_classification"
        return {"probabilities": output.logits.sigmoid() if multi_label else output.logits.softmax(-1), **outputs}


def _make_contiguous(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    # Which memory format a convolution takes its input to have depends on whether batch and length are 1.
    return (arguments[0].clone(memory_format=torch.contiguous_format),)


def export(
    model: CATForAudioClassification,
    output_dir: str | Path,
    inputs: str = "waveform",
    format: str = "onnx",
    clips: Iterable[np.ndarray] = (),
) -> dict[str, float]:
    """Writes a folder with the graph and checks what was written against the model.

    Beside `model.onnx` or `model.pt2` it holds `config.json`, with labels and problem type, and
    `preprocessor_config.json`, with the sampling rate, from which `CATFeatureExtractor.from_pretrained` makes the
    graph's inputs. ONNX weights beyond 2 GB go to a file of their own.

    Args:
        model: Any weights, on any device; it stays as it is.
        inputs: "waveform" (B, N): padded samples; or "features" (B, T, G * K * F): their MRMF spectrograms.
        format: "onnx" or "torch_export".
        clips: Waveforms (N,), at the model's sampling rate, to check the graph on besides noise of several lengths.

    Returns:
        For each output by name, the largest difference from the model's.

    Raises:
        ValueError: `inputs` or `format` has another value, or `output_dir` holds a model, whose configurations would be
            overwritten.
        ImportError: ONNX is asked for without the `export` extra.
        RuntimeError: The graph's outputs differ by more than `TOLERANCE`.
    """
    if inputs not in INPUTS or format not in FILES:
        raise ValueError(
            f"`inputs` must be one of {', '.join(INPUTS)}, not {inputs!r}, and `format` one of {', '.join(FILES)}, "
            f"not {format!r}."
        )
    folder = Path(output_dir)
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"The folder {folder} holds a model, whose configurations would be overwritten: name another.")
    if format == "onnx":
        _require_onnx()
    exported = ExportedModel(model, attn_implementation="eager" if format == "onnx" else "sdpa")
    extractor = CATFeatureExtractor.from_config(exported.config, do_mrmf=inputs == "features")
    second = extractor.sampling_rate
    program = trace(exported, _batch(extractor, [_noise(second + 1), _noise(second // 2)]))

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[format]
    if format == "onnx":
        write_onnx(program, path)
    else:
        torch.export.save(program, path)
    drop_local_code(exported.config)
    exported.config.save_pretrained(folder)
    extractor.save_pretrained(folder)

    batches = [[_noise(1)], [_noise(3 * second)], [_noise(second // 3), _noise(second), _noise(2 * second + 7)]]
    batches += [[clip, clip[: len(clip) // 3 + 1]] for clip in clips]
    return compare(exported, load_graph(path), [_batch(extractor, batch) for batch in batches])


def _noise(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).normal(0, 0.1, num_samples).astype(np.float32)


def _batch(extractor: CATFeatureExtractor, clips: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    return batch["input_values"], batch["attention_mask"]


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}. Export to ONNX needs: pip install -e '.[export]' in the checkout") from error


def trace(exported: ExportedModel, example: tuple[torch.Tensor, torch.Tensor]) -> ExportedProgram:
    """The graph for batches of any size and clips of any length from 1."""
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    # A size of 1 would otherwise be a case of its own, which the graph does not cover.
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        program = torch.export.export(exported, example, dynamic_shapes=(sizes, sizes))
    for graph in program.graph_module.modules():  # a region without autocast is a graph of its own
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # would be written to the file, with the paths of this machine
    return program


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Attention must be traced as "eager": the memory layout of other kernels does not survive the translation."""
    from onnxscript import opset20

    def floor_division(a, b):
        return opset20.Div(opset20.Sub(a, opset20.Mod(a, b)), b)

    torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=({0: "batch", 1: "length"}, {0: None, 1: None}),  # only names, and those of the mask follow
        input_names=["input_values", "attention_mask"],
        output_names=program.call_spec.out_spec.context,
        # PyTorch's own truncates, but lengths are rounded up by the floor of their negative.
        custom_translation_table={operator.floordiv: floor_division},
        opset_version=OPSET,
        verbose=False,
    ).save(path)


def load_graph(path: str | Path) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """A file that `export` wrote -> a function from `input_values` and `attention_mask` to outputs by name."""
    if Path(path).suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(input_values: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = session.run(names, {"input_values": input_values.numpy(), "attention_mask": attention_mask.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return run


@torch.no_grad()
def compare(exported: ExportedModel, graph: Callable, batches: list[tuple]) -> dict[str, float]:
    """The largest difference of each output over the batches; RuntimeError where it exceeds `TOLERANCE`."""
    differences: dict[str, float] = {}
    for batch in batches:
        outputs = graph(*batch)
        for name, expected in exported(*batch).items():
            shapes = tuple(outputs[name].shape), tuple(expected.shape)
            difference = float("inf")
            if shapes[0] == shapes[1]:
                difference = float((outputs[name].float() - expected.float()).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(expected.float().abs().max())):
                raise RuntimeError(
                    f"The exported graph does not compute what the model does: for inputs of shape "
                    f"{tuple(batch[0].shape)}, its `{name}` of shape {shapes[0]} differs from the model's, of shape "
                    f"{shapes[1]}, by up to {difference:.2g}. Do not use it; another version of torch may help."
                )
            differences[name] = max(differences.get(name, 0.0), difference)
    return differences


__all__ = ["export", "load_graph"]
