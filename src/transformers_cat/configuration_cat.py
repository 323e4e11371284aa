"""Configuration of the Causal Audio Transformer (CAT).

The front end's defaults stand here as constants: the model and the feature extractor must agree on them.
"""

import math
from numbers import Integral
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

SAMPLING_RATE = 32_000  # samples per second
WINDOW_LENGTHS = (400, 800, 1600)  # samples: 12.5, 25 and 50 ms; the middle one is the paper's
HOP_LENGTHS = (160, 320, 640)  # samples: 0.4 of each window
FRAME_SHIFT = 320  # samples: the common 10 ms grid to which every resolution is brought
FILTERS = ("mel", "linear")
NUM_BINS = 64
F_MIN = 50.0  # Hz
F_MAX = 14_000.0  # Hz
LOG_OFFSET = 1e-5  # power added before the logarithm: silence is log(1e-5)
NORMALIZE_VOLUME = False
WHITENING = 0.0

MAX_SIZE = 10_000  # of any width, depth or number of filters: a slip is refused before it is out of memory
MAX_WINDOW_SIZE = 64  # attention is among its square, 4096 tokens
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# The arguments of the front end, by the names that CATConfig, CATFeatureExtractor and MRMFSpectrogram share.
MRMF_ARGUMENTS = (
    "sampling_rate",
    "window_lengths",
    "hop_lengths",
    "frame_shift",
    "filters",
    "num_bins",
    "f_min",
    "f_max",
    "log_offset",
    "normalize_volume",
    "whitening",
)


def mrmf_arguments(owner: Any) -> dict[str, Any]:
    """The arguments of the front end that a configuration, feature extractor or front end has, by name."""
    return {name: getattr(owner, name) for name in MRMF_ARGUMENTS}


def drop_local_code(owner: Any) -> None:
    """Removes from `owner.auto_map` what names code files beside a configuration: another folder would lack them.

    Entries of the form "user/repository--file.Class" name code of the Hub, and stay.
    """
    auto_map = vars(owner).pop("auto_map", None) or {}
    if remote := {name: code for name, code in auto_map.items() if "--" in code}:
        owner.auto_map = remote


def class_names(config: PreTrainedConfig) -> list[str]:
    """The names of the classes in the order of the logits, by `id2label`: nobody keeps `label2id` up to date.

    Its keys may be text, as the audio classification script of transformers leaves them.
    """
    names = {int(index): name for index, name in config.id2label.items()}
    return [names[index] for index in range(config.num_labels)]


def implied_problem_type(config: PreTrainedConfig) -> str | None:
    """The `problem_type`; where it is not stated, one label is a regression, as to the losses of transformers."""
    return config.problem_type or ("regression" if config.num_labels == 1 else None)


def validate_integers(low: int, high: int, **values: Any) -> None:
    """Integers, or lists of them, by name: all from `low` to `high`."""
    for name, value in values.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, Integral) or isinstance(item, bool) or not low <= item <= high:
                raise ValueError(f"`{name}` must be within {low} and {high}, in integers, not {value!r}.")


def validate_numbers(low: float, limit: float, **values: Any) -> None:
    """Numbers by name: each at least `low` and below `limit`, which NaN is not."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not low <= value < limit:
            raise ValueError(f"`{name}` must be a number of at least {low} and below {limit}, not {value!r}.")


def validate_mrmf(
    sampling_rate: int,
    window_lengths: list[int] | tuple[int, ...],
    hop_lengths: list[int] | tuple[int, ...],
    frame_shift: int,
    filters: list[str] | tuple[str, ...],
    num_bins: int,
    f_min: float,
    f_max: float,
    log_offset: float,
    normalize_volume: bool,
    whitening: float,
) -> None:
    """Raises ValueError, with the values named, where the arguments are impossible or contradict each other."""
    for name, value in (("window_lengths", window_lengths), ("hop_lengths", hop_lengths), ("filters", filters)):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"`{name}` must be a list or tuple, not {value!r}.")
    for name, value in (("sampling_rate", sampling_rate), ("num_bins", num_bins), ("frame_shift", frame_shift)):
        if not isinstance(value, int):
            raise ValueError(f"`{name}` must be an integer, not {value!r}.")
    if len(window_lengths) != len(hop_lengths) or len(window_lengths) == 0:
        raise ValueError(
            f"`window_lengths` {tuple(window_lengths)} and `hop_lengths` {tuple(hop_lengths)} must have the same "
            "length, at least 1: one hop for each window."
        )
    validate_integers(1, 2**31, sampling_rate=sampling_rate)
    validate_integers(1, MAX_SIZE, num_bins=num_bins)
    # At most a second: a larger one is a slip, and would make a transform of that length.
    validate_integers(1, sampling_rate, window_lengths=window_lengths, hop_lengths=hop_lengths, frame_shift=frame_shift)
    validate_numbers(0, math.inf, f_min=f_min, f_max=f_max)
    validate_numbers(1e-37, 1e37, log_offset=log_offset)  # what float32 can hold
    if not isinstance(normalize_volume, bool):
        raise ValueError(f"`normalize_volume` must be True or False, not {normalize_volume!r}.")
    if not isinstance(whitening, (int, float)) or isinstance(whitening, bool) or not 0 <= whitening <= 1:
        raise ValueError(f"`whitening` must be a share, from 0 to 1, not {whitening!r}.")
    for window, hop in zip(window_lengths, hop_lengths):
        if hop > window:
            raise ValueError(f"A hop of {hop} samples skips audio between windows of {window}; it must not be longer.")
        if frame_shift % hop and hop % frame_shift:
            raise ValueError(
                f"A hop of {hop} samples cannot be aligned to frames of {frame_shift}: one must divide the other."
            )
    if not filters or not all(name in ("mel", "linear") for name in filters):
        raise ValueError(f"`filters` must be a non-empty choice of 'mel' and 'linear', not {tuple(filters)}.")
    if not f_min < f_max <= sampling_rate / 2:
        raise ValueError(
            f"`f_min` {f_min} Hz and `f_max` {f_max} Hz must satisfy 0 <= f_min < f_max <= {sampling_rate / 2} Hz, "
            f"the Nyquist frequency of {sampling_rate} Hz."
        )


@strict
class CATConfig(PreTrainedConfig):
    r"""
    Configuration of [`CATModel`] and [`CATForAudioClassification`]. The defaults are the "tiny" size: Swin-T's trunk
    with heads that divide between two filters.

    Front end (eqs. 1-2 of the paper), in samples and hertz; [`CATFeatureExtractor`] has the same arguments:

    Args:
        sampling_rate (`int`, defaults to 32000): Samples per second.
        window_lengths (`tuple[int, ...]`, defaults to `(400, 800, 1600)`): The K analysis windows, in samples.
        hop_lengths (`tuple[int, ...]`, defaults to `(160, 320, 640)`): One hop for each window, in samples.
        frame_shift (`int`, defaults to 320): The time grid of the aligned spectrograms, in samples (10 ms).
        filters (`tuple[str, ...]`, defaults to `("mel", "linear")`): The G filter banks.
        num_bins (`int`, defaults to 64): F, the bins of each filter bank.
        f_min (`float`, defaults to 50): Lowest frequency of the filter banks, in Hz.
        f_max (`float`, defaults to 14000): Highest frequency of the filter banks, in Hz.
        log_offset (`float`, defaults to 1e-5): Power added before the logarithm.
        normalize_volume (`bool`, defaults to `False`): Scale each clip to a root mean square of 0.1 first, so that how
            loud it is makes no difference.
        whitening (`float`, defaults to 0): The share of each clip's own average spectrum, in decibels, that is taken
            away, so that it matters less how bright microphone and room made it; see `whitening.py`.

    Patches and position (Sec. III-A, eq. 3):

        patch_size (`tuple[int, int]`, defaults to `(4, 4)`): Frames and bins of a patch. `(1, num_bins)` is the
            paper's window of one frame and all bins.
        embed_dim (`int`, defaults to 96): Width of the first stage; each later stage doubles it.
        exchange_dim (`int`, defaults to 16): Width of the attention between the resolutions at one time and
            frequency; 0 leaves it out.
        use_position_embedding (`bool`, defaults to `True`): The 3-D position embedding of eq. 3.
        stem_channels (`tuple[int, ...]`, defaults to `()`): Channels of the 3x3 convolutions of a residual stem beside
            the patch embedding. The maximum after each halves time and frequency, so n of them need a patch of
            `(2**n, 2**n)`; none leaves the stem out. Beside pre-trained weights it starts as zero.

    Trunk (Fig. 1):

        depths (`tuple[int, ...]`, defaults to `(2, 2, 6, 2)`): Blocks of each stage.
        num_heads (`tuple[int, ...]`, defaults to `(4, 8, 16, 32)`): Attention heads of each stage, divided evenly
            between the filters.
        window_size (`int` or `None`, defaults to 8): A window holds `window_size ** 2` tokens, at most
            `window_size` of them along frequency. `None` is global attention in a single stage, as in AST.
        mlp_ratio (`float`, defaults to 4): Hidden width of the MLPs, as a multiple of their input's.
        depthwise_kernel_size (`int`, defaults to 0): Odd kernel of a depthwise convolution, residual and starting
            as zero, before the attention of each block; 0 leaves it out.
        qkv_bias (`bool`, defaults to `True`): Biases in the query, key and value projections.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs.
        hidden_dropout_prob (`float`, defaults to 0): Dropout after attention and MLP.
        attention_probs_dropout_prob (`float`, defaults to 0): Dropout of the attention probabilities.
        drop_path_rate (`float`, defaults to 0.1): Stochastic depth of the last block; it rises linearly from 0.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of initial weights.

    Objective (eqs. 4-10), of training alone; see `causal.py`:

        causal_loss_weight (`float`, defaults to 1): Weight of the causal loss l_c; 0 leaves it out.
        causal_estimator (`str`, defaults to `"interventional"`): Or `"closed_form"`.
        causal_form (`str`, defaults to `"log1p"`): Of the interventional estimator; or `"literal"`, the logarithm as
            eq. 8 prints it.
        causal_reduction (`str`, defaults to `"mean"`): Over the features; or `"sum"`, as eq. 8 prints it.
        num_donors (`int` or `None`, defaults to 4): Clips of the batch from which the interventional estimator takes
            replacement values; `None` is all of them.
        reconstruction_loss_weight (`float`, defaults to 1): Weight of the reconstruction loss l_rs; 0 leaves it out,
            and with it the reconstruction block.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A value has the wrong type, or values contradict each other; the
            message names them.
    """

    model_type = "causal-audio-transformer"
    attribute_map = {"num_attention_heads": "num_heads"}
    keys_to_ignore_at_inference = [
        "classification_loss",
        "causal_loss",
        "reconstruction_loss",
        "frame_logits",
        "token_mask",
        "pooler_output",
        "pns",
        "reconstruction",
    ]

    sampling_rate: int = SAMPLING_RATE
    window_lengths: list[int] | tuple[int, ...] = WINDOW_LENGTHS
    hop_lengths: list[int] | tuple[int, ...] = HOP_LENGTHS
    frame_shift: int = FRAME_SHIFT
    filters: list[Literal["mel", "linear"]] | tuple[Literal["mel", "linear"], ...] = FILTERS
    num_bins: int = NUM_BINS
    f_min: float | int = F_MIN
    f_max: float | int = F_MAX
    log_offset: float = LOG_OFFSET
    normalize_volume: bool = NORMALIZE_VOLUME
    whitening: float | int = WHITENING

    patch_size: list[int] | tuple[int, ...] = (4, 4)
    embed_dim: int = 96
    exchange_dim: int = 16
    use_position_embedding: bool = True
    stem_channels: list[int] | tuple[int, ...] = ()

    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    window_size: int | None = 8
    mlp_ratio: float | int = 4.0
    depthwise_kernel_size: int = 0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    causal_loss_weight: float | int = 1.0
    causal_estimator: Literal["interventional", "closed_form"] = "interventional"
    causal_form: Literal["log1p", "literal"] = "log1p"
    causal_reduction: Literal["mean", "sum"] = "mean"
    num_donors: int | None = 4
    reconstruction_loss_weight: float | int = 1.0

    # Properties, not fields: a derived value in the JSON would go stale when its source is overridden.
    @property
    def num_filters(self) -> int:
        """G."""
        return len(self.filters)

    @property
    def num_resolutions(self) -> int:
        """K."""
        return len(self.window_lengths)

    @property
    def feature_size(self) -> int:
        """G * K * F, the width of `input_values`."""
        return self.num_filters * self.num_resolutions * self.num_bins

    @property
    def num_hidden_layers(self) -> int:
        """The number of stages; a model returns one hidden state more."""
        return len(self.depths)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        raise NotImplementedError(f"`num_hidden_layers` cannot be set, here to {value}: it is the length of `depths`.")

    @property
    def hidden_size(self) -> int:
        """d, the width of the last stage and of the latent Z."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        raise NotImplementedError(
            f"`hidden_size` cannot be set, here to {value}: it is `embed_dim` * 2 ** (number of stages - 1)."
        )

    def stage_width(self, stage: int) -> int:
        """Channels of a stage."""
        return self.embed_dim * 2**stage

    def stage_bins(self, stage: int) -> int:
        """Tokens along frequency in a stage."""
        return -(-self.num_bins // (self.patch_size[1] * 2**stage))

    def window_shape(self, stage: int) -> tuple[int, int] | None:
        """Tokens of a stage's window along (time, frequency); None is the window that covers everything."""
        if self.window_size is None:
            return None
        along_frequency = min(self.window_size, self.stage_bins(stage))
        return self.window_size**2 // along_frequency, along_frequency

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As in transformers, but without a file an OSError: the defaults would be another model's configuration."""
        dictionary, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not dictionary:
            raise OSError(f"There is no configuration, config.json, in {pretrained_model_name_or_path}.")
        return dictionary, kwargs

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: values that each have the right type but do not fit together."""
        validate_mrmf(**mrmf_arguments(self))
        self._validate_sizes()
        self._validate_patches()
        self._validate_stages()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, not {self.hidden_act!r}.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"`problem_type` must be one of {PROBLEM_TYPES} or None, not {self.problem_type!r}.")
        if self.num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, not {self.num_labels}.")
        # Numbers in strings, as in JSON, are what transformers' own script sets on a configuration.
        if {str(index) for index in self.id2label} != {str(index) for index in range(self.num_labels)}:
            raise ValueError(f"`id2label` must name the classes 0 to {self.num_labels - 1}, not {list(self.id2label)}.")

    def _validate_sizes(self) -> None:
        validate_integers(1, MAX_SIZE, embed_dim=self.embed_dim, depths=self.depths, num_heads=self.num_heads)
        validate_integers(
            0,
            MAX_SIZE,
            exchange_dim=self.exchange_dim,
            depthwise_kernel_size=self.depthwise_kernel_size,
        )
        if self.window_size is not None:
            validate_integers(1, MAX_WINDOW_SIZE, window_size=self.window_size)
        if self.num_donors is not None:
            validate_integers(1, 2**31, num_donors=self.num_donors)
        validate_numbers(1 / self.embed_dim, 100, mlp_ratio=self.mlp_ratio)
        validate_numbers(
            0,
            1,
            hidden_dropout_prob=self.hidden_dropout_prob,
            attention_probs_dropout_prob=self.attention_probs_dropout_prob,
            drop_path_rate=self.drop_path_rate,
            initializer_range=self.initializer_range,
        )
        validate_numbers(1e-37, 1, layer_norm_eps=self.layer_norm_eps)
        validate_numbers(
            0,
            1e6,
            causal_loss_weight=self.causal_loss_weight,
            reconstruction_loss_weight=self.reconstruction_loss_weight,
        )

    def _validate_patches(self) -> None:
        if len(self.patch_size) != 2:
            raise ValueError(f"`patch_size` must be two numbers, frames and bins, not {self.patch_size}.")
        validate_integers(1, MAX_SIZE, patch_size=self.patch_size)
        if self.num_bins % self.patch_size[1]:
            raise ValueError(
                f"`num_bins` {self.num_bins} must be a multiple of the patch's {self.patch_size[1]} bins "
                f"(`patch_size` {self.patch_size})."
            )
        if self.use_position_embedding and self.embed_dim % 2:
            raise ValueError(f"`embed_dim` {self.embed_dim} must be even: eq. 3 pairs a sine with each cosine.")

        if self.stem_channels:
            validate_integers(1, MAX_SIZE, stem_channels=self.stem_channels)
            side = 2 ** len(self.stem_channels)
            if tuple(self.patch_size) != (side, side):
                raise ValueError(
                    f"A stem of {len(self.stem_channels)} convolutions (`stem_channels` {self.stem_channels}) halves "
                    f"both axes as often: it needs a `patch_size` of ({side}, {side}), not {self.patch_size}."
                )

    def _validate_stages(self) -> None:
        if len(self.depths) != len(self.num_heads) or len(self.depths) == 0:
            raise ValueError(
                f"`depths` {self.depths} and `num_heads` {self.num_heads} must have one entry for each stage."
            )
        if self.hidden_size > MAX_SIZE:
            raise ValueError(
                f"`embed_dim` {self.embed_dim} and {len(self.depths)} stages, each twice as wide as the one before, "
                f"make a width of {self.hidden_size}, above {MAX_SIZE}."
            )
        if self.window_size is None and len(self.depths) != 1:
            raise ValueError(
                f"`window_size=None` is global attention in one stage, but `depths` {self.depths} has "
                f"{len(self.depths)}; give one depth and one number of heads."
            )
        for stage, heads in enumerate(self.num_heads):
            if heads % self.num_filters:
                raise ValueError(
                    f"The {heads} heads of stage {stage} (`num_heads` {self.num_heads}) cannot be divided evenly "
                    f"between {self.num_filters} filters {self.filters}."
                )
            if self.stage_width(stage) % heads:
                raise ValueError(
                    f"The width {self.stage_width(stage)} of stage {stage} (`embed_dim` {self.embed_dim}) must be a "
                    f"multiple of its {heads} heads."
                )
            window = self.window_shape(stage)
            if window and (self.stage_bins(stage) % window[1] or window[0] * window[1] != self.window_size**2):
                raise ValueError(
                    f"Windows of {self.window_size}x{self.window_size} tokens do not tile the {self.stage_bins(stage)} "
                    f"tokens along frequency of stage {stage}; choose a power of two for `window_size`, and "
                    "`num_bins` so that bins per patch and stage divide."
                )
        if self.depthwise_kernel_size and self.depthwise_kernel_size % 2 == 0:
            raise ValueError(f"`depthwise_kernel_size` must be odd, or 0 for none, not {self.depthwise_kernel_size}.")


__all__ = ["CATConfig"]
