"""The causal module of CAT (Liu et al. 2023, Sec. III-B, eqs. 4-10), for any pooled latent and linear head.

What is estimated. Eq. 4 defines the probability that a feature is a necessary and sufficient cause of the label (PNS).
Tian and Pearl's bounds (2000), with u = P(y | do z) - P(y | do not z), are

    max(0, u) <= PNS <= min(P(y | do z), P(not y | do not z)).

Eq. 5 prints the second term of u as P(Y != y | ...); eq. 6 has it right, and u is what is computed here. The
conditional PNS of feature j (eqs. 8-9; Wang and Jordan, "Desiderata for Representation Learning: A Causal Perspective",
arXiv 2109.03795, eq. 25) replaces z_j alone and holds all the other features.

Why no second pass through the network is needed. The reconstruction loss (eq. 7) asks for Phi(f(X)) = X. An X "with z_j
replaced" is then mapped back to the edited z, so P(Y | do z_j') is the linear head applied to the edited z.

Layouts: latents Z (n, d), head weight W (C, d) and bias b (C), targets T (n, C) in [0, 1]: one-hot, multi-hot or soft
(mixup).
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

# Edited logits held at a time, when the caller sets no chunk size: 16 MiB in fp32.
CHUNK_ELEMENTS = 2**22


def roll_donors(latents: Tensor, num_donors: int | None = 4) -> Tensor:
    """Replacement values z_j' for every feature: other clips of the same batch, by M distinct non-zero rolls.

    latents (n, d) -> donors (M, n, d), with M = min(num_donors, n - 1) and donors[m, i] = latents[(i + m + 1) mod n].
    `num_donors=None` takes all n - 1 rolls, whose mean is the exact leave-one-out expectation.

    The gradient stops here: an intervention sets z_j' from outside, so the loss must not move the donors. The rolls are
    always the first M, since a training batch is shuffled already.
    """
    if num_donors is not None and num_donors < 1:
        raise ValueError(f"num_donors must be at least 1, or None for every other clip of the batch; got {num_donors}.")
    batch_size = latents.shape[0]
    rolls = batch_size - 1 if num_donors is None else min(num_donors, batch_size - 1)
    clip = torch.arange(batch_size, device=latents.device)
    shift = torch.arange(1, rolls + 1, device=latents.device)
    return latents.detach()[(clip + shift[:, None]) % batch_size]


def conditional_pns(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    donors: Tensor | None = None,
    num_donors: int | None = 4,
    multi_label: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Lower bound of the conditional PNS of every feature, by intervention (eq. 6, for each factor of eq. 9).

    latents (n, d), weight (C, d), bias (C), targets (n, C), donors (M, n, d) -> U (n, d) in (-1, 1). It is not clamped:
    report PNS as max(0, U). Without `donors` they are `roll_donors(latents, num_donors)`.

        softmax:  U_ij = pi_i(z_i) - mean_m pi_i(z_i with z_ij <- D_mij),  pi_i = sum_c T_ic softmax_c
        sigmoid:  the same with pi_i = sum_c T_ic sigmoid_c / sum_c T_ic   (`multi_label=True`)

    Editing one feature changes the logits by (D_mij - z_ij) W_:,j, so the head is not run again. Cost: O(n M d C) for
    softmax and O(positives M d) for sigmoid, in chunks of `chunk_size` features (by default as many as `CHUNK_ELEMENTS`
    allows, whatever the number of positives).

    U is 0 for a row without a positive class and where there is no donor (n = 1). Computed in fp32 at least, outside
    autocast.
    """
    latents, weight, bias, targets = _prepare(latents, weight, bias, targets)
    donors = roll_donors(latents, num_donors) if donors is None else donors.to(latents.dtype)
    num_rolls = donors.shape[0]
    if num_rolls == 0:
        return 0.0 * latents
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // (num_rolls * targets.numel()))
    with maybe_autocast(latents.device.type, enabled=False):
        logits = F.linear(latents, weight, bias)
        changes = (donors - latents).split(chunk_size, dim=-1)
        columns = weight.split(chunk_size, dim=-1)
        if multi_label:
            positives = targets.nonzero(as_tuple=True)
            share = _label_share(targets)[positives]
            effects = [_sigmoid_effect(logits, positives, share, *chunk) for chunk in zip(changes, columns)]
        else:
            effects = [_softmax_effect(logits, targets, *chunk) for chunk in zip(changes, columns)]
        return torch.cat(effects, dim=-1)


def closed_form_pns(
    latents: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, multi_label: bool = False
) -> Tensor:
    """The contrast of eq. 6 on the log scale, to second order: G_ij = log P(y | z) - E log P(y | z_j', z_-j).

    latents (n, d), weight (C, d), bias (C), targets (n, C) -> G (n, d), real, 0 where a feature has no effect.

        softmax:  G = (T W - mu) * delta + 1/2 v * (s2 + delta^2),  mu = P W,  v = P (W * W) - mu * mu,  P = softmax
        sigmoid:  mean over the labels (weighted by T) of (T - P) W * delta + 1/2 P (1 - P) W * W * (s2 + delta^2)

    with delta = Z - mean(Z) and s2 the variance over the batch. Cost: three products of (n, C) by (C, d), no donors.
    For a Gaussian head its mean is Wang and Jordan's beta_j^2 Var(z_j) / sigma^2 (arXiv 2109.03795).

    Mean and variance stand for where z_j' is drawn from, so the gradient stops at them as it does at donors.
    """
    latents, weight, bias, targets = _prepare(latents, weight, bias, targets)
    with maybe_autocast(latents.device.type, enabled=False):
        logits = F.linear(latents, weight, bias)
        variance, mean = torch.var_mean(latents.detach(), dim=0, correction=0)
        delta = latents - mean
        if multi_label:
            share = _label_share(targets)
            probability = logits.sigmoid()
            slope = (share * (targets - probability)) @ weight
            curvature = (share * probability * (1 - probability)) @ weight.square()
        else:
            probability = logits.softmax(-1)
            expected_weight = probability @ weight
            slope = targets @ weight - expected_weight
            curvature = probability @ weight.square() - expected_weight.square()
        return slope * delta + 0.5 * curvature * (variance + delta.square())


def causal_loss(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    estimator: str = "interventional",
    num_donors: int | None = 4,
    form: str = "log1p",
    reduction: str = "mean",
    multi_label: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The causal loss l_c of eq. 8: minus the log of the conditional PNS, over samples and features.

    latents (n, d), weight (C, d), bias (C), targets (n, C) -> scalar, differentiable in the latents only.

    `estimator="closed_form"`: softplus(-G) - log 2, G of `closed_form_pns`; 0 at G = 0. It uses neither `form` nor
    `num_donors`.
    `estimator="interventional"`: U of `conditional_pns`, in one of two forms.
        "log1p"    -log(1 + U): smooth where the bound is not positive, 0 at U = 0, above -log 2.
        "literal"  -log(max(U, 0) + eps), as printed: slope 1 / eps just above U = 0 and none below.

    `reduction="sum"` adds up the features, as printed: each one's effect on the logits falls as their number grows, so
    that a weight means about the same for any width. "mean" averages them, which divides by d once more. Eq. 9 is a
    product over samples; its log is averaged, so that a weight means the same for any batch size.

    The head is detached, otherwise the loss falls by inflating it. Rows without a positive class do not count. A batch
    of one, or one without any positive, gives 0 (and a gradient of 0, so that every process of a distributed run has
    one). Cost as `conditional_pns` or `closed_form_pns`.
    """
    _check_choice("estimator", estimator, ("interventional", "closed_form"))
    _check_choice("form", form, ("log1p", "literal"))
    _check_choice("reduction", reduction, ("mean", "sum"))
    latents, weight, bias, targets = _prepare(latents, weight, bias, targets)
    if latents.shape[0] == 1:
        return 0.0 * latents.sum()
    weight, bias = weight.detach(), None if bias is None else bias.detach()

    if estimator == "closed_form":
        loss = F.softplus(-closed_form_pns(latents, weight, bias, targets, multi_label)) - math.log(2)
    else:
        bound = conditional_pns(latents, weight, bias, targets, num_donors=num_donors, multi_label=multi_label)
        if form == "literal":
            loss = -torch.log(bound.clamp(min=0) + eps)
        else:
            # Rounding reaches U = -1 where a single feature turns an impossible label into a certain one.
            loss = -torch.log1p(bound.clamp(min=eps - 1))

    per_sample = loss.mean(-1) if reduction == "mean" else loss.sum(-1)
    counts = (targets > 0).any(-1).to(per_sample.dtype)
    return (per_sample * counts).sum() / counts.sum().clamp(min=1)


def class_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as targets T (n, C): class indices (n,) or (n, 1) become one-hot rows, soft or multi-hot (n, C) stay.

    A negative index (the -100 that cross-entropy ignores) becomes a row of zeros, which the causal loss ignores too.
    """
    if labels.ndim == 2 and labels.shape[1] == 1 < num_classes and not labels.is_floating_point():
        labels = labels[:, 0]
    if labels.ndim == 2:
        return labels if labels.is_floating_point() else labels.float()
    return F.one_hot(labels.clamp(min=0).long(), num_classes).float() * (labels >= 0)[:, None]


def linear_head(head: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight W (C, d) and bias b (C) of the linear map by which `head` makes logits of latents (n, d).

    A plain layer's are its own. What an adapter adds, a quantiser packs, or offloading fetches for the head's own
    forward alone, shows in what the head makes of zero and of the unit vectors; no gradient leads to it.

    Raises:
        ValueError: `head` is not linear.
    """
    if type(head) is nn.Linear and head.weight.is_meta == latents.is_meta:
        if head.weight.shape == (head.out_features, head.in_features):  # not of weights that are sharded
            return head.weight, head.bias
    training = head.training
    head.eval()  # without an adapter's dropout
    with torch.no_grad():
        bias = head(torch.zeros_like(latents[:1]))[0]
        weight = (head(torch.eye(latents.shape[1]).to(latents)) - bias).T
        logits = head(latents)
    head.train(training)
    if torch.compiler.is_compiling() or latents.is_meta:  # no values to look at
        return weight, bias
    if (F.linear(latents, weight, bias) - logits).abs().max() > 0.1 * logits.abs().max():  # eight bits round far less
        raise ValueError(
            f"The causal loss and the PNS need a linear head, which {type(head).__name__} is not: set "
            "`causal_loss_weight` to 0 with this one."
        )
    return weight, bias


class ReconstructionHead(nn.Module):
    """Phi of eq. 7: a 1x1 convolution and a pixel shuffle, from the last token map to what the network saw.

    Each token predicts its own patch of `patch` = (frames, bins), for every filter and resolution. The pooled vector
    alone cannot be in bijection with some 4e5 inputs. Cost: C G K multiplications per predicted frame and bin.

    The loss compares patches with patches: the target is cut up, which needs no gradient, and the pixel shuffle
    (`assemble`) is left to who wants to look at the spectrograms.
    """

    def __init__(self, hidden_size: int, num_filters: int, num_resolutions: int, patch: tuple[int, int] = (32, 32)):
        super().__init__()
        self.num_filters = num_filters
        self.num_resolutions = num_resolutions
        self.patch = tuple(patch)
        # On channels-last tokens a linear layer is the 1x1 convolution.
        self.projection = nn.Linear(hidden_size, num_filters * num_resolutions * patch[0] * patch[1])

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, t, f, C) -> patches (B, t, f, G, K, frames, bins)."""
        return self.projection(tokens).unflatten(-1, (self.num_filters, self.num_resolutions, *self.patch))

    def assemble(self, patches: Tensor, num_frames: int, num_bins: int) -> Tensor:
        """patches (B, t, f, G, K, frames, bins) -> (B, G, K, num_frames, num_bins); what lies beyond is cropped."""
        spectrograms = patches.permute(0, 3, 4, 1, 5, 2, 6)  # (B, G, K, t, frames, f, bins)
        return spectrograms.flatten(5, 6).flatten(3, 4)[..., :num_frames, :num_bins]

    def cut(self, spectrograms: Tensor, time: int, frequency: int) -> Tensor:
        """The inverse: (B, G, K, T, F), padded with zeros -> (B, time, frequency, G, K, frames, bins)."""
        (num_frames, num_bins), (frames, bins) = spectrograms.shape[-2:], self.patch
        missing = (time * frames - num_frames, frequency * bins - num_bins)
        if min(missing) < 0:
            raise ValueError(
                f"{time} x {frequency} patches of {self.patch} cover {time * frames} frames and {frequency * bins} "
                f"bins; the spectrograms have {num_frames} and {num_bins}."
            )
        if max(missing):
            spectrograms = F.pad(spectrograms, (0, missing[1], 0, missing[0]))
        return spectrograms.unflatten(-1, (frequency, bins)).unflatten(-3, (time, frames)).permute(0, 3, 5, 1, 2, 4, 6)

    def loss(self, patches: Tensor, spectrograms: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """l_rs between patches (B, t, f, G, K, frames, bins) and what they stand for, (B, G, K, T, F).

        frame_mask (B, T) is true where a frame is not padding.
        """
        time, frequency = patches.shape[1:3]
        num_frames, num_bins = spectrograms.shape[-2:]
        mask = None
        if frame_mask is not None or (num_frames, num_bins) != (time * self.patch[0], frequency * self.patch[1]):
            mask = spectrograms.new_ones(1, 1, 1, num_frames, num_bins, dtype=torch.bool)
            if frame_mask is not None:
                mask = mask & frame_mask.bool()[:, None, None, :, None]
            mask = self.cut(mask, time, frequency)
        return reconstruction_loss(patches, self.cut(spectrograms.detach(), time, frequency), mask)


def reconstruction_loss(reconstruction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The reconstruction loss l_rs of eq. 7, as the mean squared error per element.

    reconstruction and target of any one shape, mask of a shape that broadcasts to it, true where an element counts
    (not on padding) -> scalar, in fp32 at least; 0 where nothing counts. The gradient stops at the target. The printed
    norm is not an average: some 600 times larger, it would drown the cross-entropy.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(
            f"The reconstruction {tuple(reconstruction.shape)} and its target {tuple(target.shape)} differ in shape."
        )
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    reconstruction, target = reconstruction.to(dtype), target.detach().to(dtype)
    if mask is None:
        return F.mse_loss(reconstruction, target)
    # What does not count is compared with itself: no error and no gradient.
    target = torch.where(mask, target, reconstruction.detach())
    count = mask.expand_as(target).sum().clamp(min=1)
    return F.mse_loss(reconstruction, target, reduction="sum") / count


class CausalModule(nn.Module):
    """Adds l_c to the loss of any classifier that ends in a linear head on a pooled latent (eq. 10, without l_rs).

    The input of the head is the latent Z. It is captured while the model runs, so the model needs no change:

        model = CausalModule(ASTForAudioClassification.from_pretrained(...))
        output = model(input_values=..., labels=...)   # loss, logits, ..., classification_loss, causal_loss
        model.model.save_pretrained(...)               # the classifier, which at inference needs nothing of this

    Labels are class indices (n,), class probabilities (n, C), or multi-hot or soft (n, C) with `multi_label`. Without
    labels it is the model itself and returns the model's own output; in evaluation mode the loss is the model's own.
    With the Trainer set `remove_unused_columns=False`: the names of the model's inputs cannot be read from this
    module's signature.

    Args:
        model: returns a `ModelOutput` or a dict with `logits` (n, C), and a `loss` when it is given labels.
        head: name of the head among `model.named_modules()`, as in "classifier.dense". By default the only linear layer
            with `model.config.num_labels` outputs (or the only linear layer, where there is no config).
        loss_weight: the weight of l_c.
        multi_label: sigmoid per class rather than softmax; by default what `model.config.problem_type` says. Where that
            says nothing, labels must be class indices.
        estimator, num_donors, form, reduction: see `causal_loss`.
    """

    # The loss is a mean over the batch: the Trainer has to divide it by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        head: str | None = None,
        loss_weight: float = 1.0,
        multi_label: bool | None = None,
        estimator: str = "interventional",
        num_donors: int | None = 4,
        form: str = "log1p",
        reduction: str = "mean",
    ):
        super().__init__()
        self.model = model
        # A name, not a second reference: the state dict must hold the head's weights once.
        self.head = _find_head(model) if head is None else head
        if not isinstance(model.get_submodule(self.head), nn.Linear):
            raise ValueError(f"The head '{self.head}' is not a torch.nn.Linear.")
        config = getattr(model, "config", None)
        kind = getattr(config, "problem_type", None)
        if hasattr(config, "causal_loss_weight"):
            raise ValueError(
                f"{type(model).__name__} has a causal loss of its own: set `causal_loss_weight` in its configuration."
            )
        if kind == "regression" or (kind is None and getattr(config, "num_labels", None) == 1):
            raise ValueError(
                f"The causal loss is of classes, and the model is one of regression, by its `problem_type` {kind} and "
                f"`num_labels` {config.num_labels}."
            )
        self.loss_weight = loss_weight
        self.estimator = estimator
        self.num_donors = num_donors
        self.form = form
        self.reduction = reduction
        if multi_label is None:
            kinds = {"single_label_classification": False, "multi_label_classification": True}
            multi_label = kinds.get(kind)
        self.multi_label = multi_label
        if config is not None:
            # Here the Trainer reads which outputs are not predictions. A copy: the model is saved without the change.
            self.config = copy.copy(config)
            ignored = getattr(config, "keys_to_ignore_at_inference", None) or []
            self.config.keys_to_ignore_at_inference = [*ignored, "classification_loss", "causal_loss"]

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """The model's own, as the Trainer asks for it."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """The same, as newer releases of transformers call it."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def forward(self, *arguments, labels: Tensor | None = None, **inputs):
        if labels is None:
            return self.model(*arguments, **inputs)

        if labels.ndim == 2 and self.multi_label is None:
            raise ValueError("Labels (n, C) are class probabilities or several labels per clip: pass multi_label=.")
        head = self.model.get_submodule(self.head)
        targets = class_targets(labels, head.out_features)
        soft_classes = labels.ndim == 2 and not self.multi_label
        if not soft_classes:
            # The models of transformers compute a binary cross-entropy on floating-point labels only.
            inputs["labels"] = targets if self.multi_label else labels
        with _capture_input(head) as captured:
            output = self.model(*arguments, **inputs)
        if not captured:
            raise ValueError(f"The model did not run its head '{self.head}'.")
        if isinstance(output, tuple):
            raise ValueError("The model returned a tuple, which names no logits and no loss: drop `return_dict=False`.")

        targets = targets.to(captured[-1].device)
        # transformers' own loss takes class indices only; mixed-up classes need their probabilities.
        classification = F.cross_entropy(output["logits"].float(), targets) if soft_classes else output["loss"]
        losses = {"loss": classification, "classification_loss": classification}
        if self.training:
            losses["causal_loss"] = causal_loss(
                captured[-1],
                *linear_head(head, captured[-1]),
                targets,
                estimator=self.estimator,
                num_donors=self.num_donors,
                form=self.form,
                reduction=self.reduction,
                multi_label=bool(self.multi_label),
            )
            losses["loss"] = classification + self.loss_weight * losses["causal_loss"]
        return _with_losses(type(output))(**losses, **{name: output[name] for name in output if name != "loss"})


def _softmax_effect(logits: Tensor, targets: Tensor, changes: Tensor, columns: Tensor) -> Tensor:
    """logits and targets (n, C), changes (M, n, k), columns (C, k) -> U (n, k) for k features."""
    edited = logits[:, None] + changes[..., None] * columns.T  # (M, n, k, C)
    kept = (logits.softmax(-1) * targets).sum(-1)
    replaced = (edited.softmax(-1) @ targets[..., None]).squeeze(-1)  # (M, n, k)
    return kept[:, None] - replaced.mean(0)


def _sigmoid_effect(
    logits: Tensor, positives: tuple[Tensor, Tensor], share: Tensor, changes: Tensor, columns: Tensor
) -> Tensor:
    """logits (n, C), the P positives' (clip, label) and share, changes (M, n, k), columns (C, k) -> U (n, k)."""
    clip, label = positives
    logit = logits[clip, label][:, None]
    edited = logit + changes[:, clip] * columns[label]  # (M, P, k)
    effect = share[:, None] * (logit.sigmoid() - edited.sigmoid().mean(0))
    return effect.new_zeros(changes.shape[1:]).index_add(0, clip, effect)


def _label_share(targets: Tensor) -> Tensor:
    """Each label's share of its row, (n, C); a row without a positive stays 0."""
    total = targets.sum(-1, keepdim=True)
    return targets / total.masked_fill(total == 0, 1)


def _prepare(latents: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple:
    """Check the shapes and bring all to fp32 or better: half rounds away the differences of probabilities."""
    if latents.ndim != 2:
        raise ValueError(f"The head must read one pooled latent per clip, (batch, width); got {tuple(latents.shape)}.")
    expected = (latents.shape[0], weight.shape[0])
    if targets.shape != expected:
        raise ValueError(f"The targets must be (batch, classes), here {expected}; got {tuple(targets.shape)}.")
    dtype = torch.promote_types(latents.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    return latents.to(dtype), weight.to(dtype), bias, targets.to(dtype)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got '{value}'.")


def _find_head(model: nn.Module) -> str:
    """Name of the one linear layer that can be the classification head."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    candidates = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and num_labels in (None, module.out_features)
    ]
    if len(candidates) != 1:
        found = ", ".join(candidates) if candidates else "none"
        raise ValueError(f"Pass head=, the name of the linear classification head. Candidates found: {found}.")
    return candidates[0]


@contextmanager
def _capture_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the module's first argument at each call, as long as the context lasts."""
    captured = []
    hook = module.register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0]))
    try:
        yield captured
    finally:
        hook.remove()


@functools.cache
def _with_losses(output_class: type) -> type:
    """The model's output class with two more fields; declared, because DDP flattens outputs and rebuilds them."""
    if not dataclasses.is_dataclass(output_class):
        return output_class
    losses = [(name, Tensor | None, None) for name in ("classification_loss", "causal_loss")]
    pickled = {"__reduce__": lambda self: (_output, (output_class, dict(self)))}  # no module has the class by its name
    return dataclasses.make_dataclass(
        f"Causal{output_class.__name__}", losses, bases=(output_class,), namespace=pickled
    )


def _output(output_class: type, values: dict) -> object:
    """An output with these values, of the class that `_with_losses` makes."""
    return _with_losses(output_class)(**values)
