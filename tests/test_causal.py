"""The causal module: each exact property of its estimators, and its behaviour inside a model and a training run."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ASTConfig, ASTForAudioClassification, Trainer, TrainingArguments

from transformers_cat import CATForAudioClassification
from transformers_cat.causal import (
    CausalModule,
    ReconstructionHead,
    causal_loss,
    class_targets,
    closed_form_pns,
    conditional_pns,
    linear_head,
    reconstruction_loss,
    roll_donors,
)

from .conftest import small_config

BATCH, WIDTH, CLASSES = 6, 7, 5

both_heads = pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoid"])
both_estimators = pytest.mark.parametrize("estimator", ["interventional", "closed_form"])


def random_problem(multi_label=False, seed=0, dtype=torch.float64):
    """latents, weight, bias, targets; softmax targets are soft, as after mixup; sigmoid ones are multi-hot and soft."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    targets = torch.rand(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    targets = targets * (targets > 0.5) if multi_label else targets.square() / targets.square().sum(-1, keepdim=True)
    if multi_label:
        targets[:, 0] = 1.0
    return tuple(tensor.to(dtype) for tensor in (latents, weight, bias, targets))


def label_probability(logits, targets, multi_label):
    """pi_i, as the definition has it."""
    if multi_label:
        return (targets * logits.sigmoid()).sum(-1) / targets.sum(-1)
    return (targets * logits.softmax(-1)).sum(-1)


def replace_feature(latents, values, feature):
    edited = latents.clone()
    edited[:, feature] = values[:, feature]
    return edited


def brute_force_pns(latents, weight, bias, targets, donors, multi_label):
    """One edited latent at a time through the head."""
    kept = label_probability(latents @ weight.T + bias, targets, multi_label)
    bound = torch.zeros_like(latents)
    for feature in range(latents.shape[1]):
        for donor in donors:
            edited = replace_feature(latents, donor, feature)
            replaced = label_probability(edited @ weight.T + bias, targets, multi_label)
            bound[:, feature] += (kept - replaced) / len(donors)
    return bound


def assert_same(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Donors


def test_donors_are_distinct_other_clips():
    latents = random_problem()[0]
    donors = roll_donors(latents, num_donors=3)
    assert donors.shape == (3, BATCH, WIDTH)
    for clip in range(BATCH):
        drawn = [(latents == donor[clip]).all(-1).nonzero().item() for donor in donors]
        assert len(set(drawn)) == 3 and clip not in drawn
    for donor in donors:  # each roll uses every clip once
        assert_same(donor.sort(0).values, latents.sort(0).values, 0)


def test_donors_are_at_most_the_other_clips():
    latents = random_problem()[0]
    assert roll_donors(latents, num_donors=100).shape[0] == BATCH - 1
    assert roll_donors(latents, num_donors=None).shape[0] == BATCH - 1
    assert roll_donors(latents[:1]).shape == (0, 1, WIDTH)
    with pytest.raises(ValueError, match="num_donors"):
        roll_donors(latents, num_donors=0)


def test_donors_carry_no_gradient():
    assert not roll_donors(random_problem()[0].requires_grad_()).requires_grad


# The interventional estimator


@both_heads
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
def test_rank_one_update_equals_brute_force(multi_label, chunk_size):
    problem = random_problem(multi_label)
    donors = roll_donors(problem[0], num_donors=3)
    actual = conditional_pns(*problem, donors=donors, multi_label=multi_label, chunk_size=chunk_size)
    assert_same(actual, brute_force_pns(*problem, donors, multi_label))


def test_default_chunks_hold_a_bounded_number_of_logits(monkeypatch):
    problem = random_problem()
    expected = conditional_pns(*problem, num_donors=2)
    monkeypatch.setattr("transformers_cat.causal.CHUNK_ELEMENTS", 2 * 2 * BATCH * CLASSES)
    sizes = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: sizes.append(self.numel()) or softmax(self, dim))
    assert_same(conditional_pns(*problem, num_donors=2), expected)
    assert max(sizes) == 2 * 2 * BATCH * CLASSES


@both_heads
def test_a_feature_that_the_head_ignores_has_no_effect(multi_label):
    latents, weight, bias, targets = random_problem(multi_label)
    weight[:, 2] = 0
    bound = conditional_pns(latents, weight, bias, targets, multi_label=multi_label)
    assert_same(bound[:, 2], torch.zeros_like(bound[:, 2]), 1e-15)
    assert bound[:, 3].abs().min() > 1e-6


@both_heads
def test_replacing_a_feature_by_itself_has_no_effect(multi_label):
    problem = random_problem(multi_label)
    bound = conditional_pns(*problem, donors=problem[0].expand(3, -1, -1), multi_label=multi_label)
    assert_same(bound, torch.zeros_like(bound), 1e-15)


@pytest.mark.parametrize("estimate", [conditional_pns, closed_form_pns])
def test_softmax_ignores_what_is_common_to_all_classes(estimate):
    latents, weight, bias, targets = random_problem()
    expected = estimate(latents, weight, bias, targets)
    assert_same(estimate(latents, weight, bias + 3.0, targets), expected)
    common = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    assert_same(estimate(latents, weight + common, bias, targets), expected)


@both_heads
@pytest.mark.parametrize("estimate", [conditional_pns, closed_form_pns])
def test_shift_and_scale_of_a_feature_change_nothing(estimate, multi_label):
    latents, weight, bias, targets = random_problem(multi_label)
    expected = estimate(latents, weight, bias, targets, multi_label=multi_label)

    shifted = latents.clone()
    shifted[:, 1] += 2.0
    assert_same(estimate(shifted, weight, bias - 2.0 * weight[:, 1], targets, multi_label=multi_label), expected)

    scaled, scaled_weight = latents.clone(), weight.clone()
    scaled[:, 1] *= 4.0
    scaled_weight[:, 1] /= 4.0
    assert_same(estimate(scaled, scaled_weight, bias, targets, multi_label=multi_label), expected)


def test_uniform_softmax_targets_give_zero():
    latents, weight, bias, targets = random_problem()
    bound = conditional_pns(latents, weight, bias, torch.full_like(targets, 1 / CLASSES))
    assert_same(bound, torch.zeros_like(bound))


def test_softmax_bounds_of_all_classes_sum_to_zero():
    latents, weight, bias, _ = random_problem()
    classes = torch.eye(CLASSES, dtype=torch.float64)
    bounds = [conditional_pns(latents, weight, bias, one_hot.expand(BATCH, -1)) for one_hot in classes]
    assert_same(sum(bounds), torch.zeros_like(latents))
    assert bounds[0].abs().max() > 0.1


def test_softmax_bound_is_linear_in_the_targets():
    latents, weight, bias, targets = random_problem()
    other = targets.roll(1, dims=-1)
    mixed = conditional_pns(latents, weight, bias, 0.3 * targets + 0.7 * other)
    parts = [conditional_pns(latents, weight, bias, part) for part in (targets, other)]
    assert_same(mixed, 0.3 * parts[0] + 0.7 * parts[1])


@both_heads
def test_bound_is_inside_minus_one_and_one(multi_label):
    latents, weight, bias, _ = random_problem(multi_label)
    options = {"num_donors": 1, "multi_label": multi_label}
    rows = [one_hot.expand(BATCH, -1) for one_hot in torch.eye(CLASSES, dtype=torch.float64)]
    bounds = torch.stack([conditional_pns(2 * latents, weight, bias, targets, **options) for targets in rows])
    assert bounds.abs().max() < 1
    assert bounds.min() < -0.8 and bounds.max() > 0.8  # these problems come near to both ends
    assert all(causal_loss(2 * latents, weight, bias, targets, **options) > -math.log(2) for targets in rows)


@both_heads
def test_permuting_the_features_permutes_the_bound(multi_label):
    latents, weight, bias, targets = random_problem(multi_label)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    bound = conditional_pns(latents, weight, bias, targets, multi_label=multi_label)
    permuted = conditional_pns(latents[:, order], weight[:, order], bias, targets, multi_label=multi_label)
    assert_same(permuted, bound[:, order])


@both_heads
def test_all_rolls_are_the_leave_one_out_expectation(multi_label):
    latents, weight, bias, targets = random_problem(multi_label)
    kept = label_probability(latents @ weight.T + bias, targets, multi_label)
    expected = torch.zeros_like(latents)
    for clip in range(BATCH):
        others = [other for other in range(BATCH) if other != clip]
        for feature in range(WIDTH):
            edited = latents[clip].repeat(BATCH - 1, 1)
            edited[:, feature] = latents[others, feature]
            row = targets[clip].expand(BATCH - 1, -1)
            replaced = label_probability(edited @ weight.T + bias, row, multi_label)
            expected[clip, feature] = kept[clip] - replaced.mean()
    actual = conditional_pns(latents, weight, bias, targets, num_donors=None, multi_label=multi_label)
    assert_same(actual, expected)


@both_heads
def test_head_without_bias(multi_label):
    latents, weight, _, targets = random_problem(multi_label)
    for estimate in (conditional_pns, closed_form_pns):
        expected = estimate(latents, weight, torch.zeros(CLASSES), targets, multi_label=multi_label)
        assert_same(estimate(latents, weight, None, targets, multi_label=multi_label), expected, 0)


# Binary tables: z1 ~ Bern(.4), z2 = z1 xor Bern(.2), y1 = z1 xor Bern(.2), y2 = (z1 and z2) xor Bern(.2).
# sigmoid(log 4) = .8, so a sigmoid head holds each of these conditional tables exactly.

LOG_4 = math.log(4)


def table_pns(features, donors, weight, bias):
    features, donors, weight = (
        torch.tensor(values, dtype=torch.float64) for values in ([features], [[donors]], [weight])
    )
    bias, positive = torch.tensor([bias], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    return conditional_pns(features, weight, bias, positive, donors=donors, multi_label=True)[0]


def test_binary_table_necessity_and_sufficiency_of_the_cause():
    pns = table_pns([1.0], [0.0], [2 * LOG_4], -LOG_4).item()  # P(y1 | do z1 = 1) - P(y1 | do z1 = 0)
    assert pns == pytest.approx(0.6, abs=1e-12)
    # y1 is monotonic in z1 and nothing confounds them, so the bound is the value, and PN and PS follow from it.
    assert pns / 0.8 == pytest.approx(0.75, abs=1e-12)  # PN = PNS / P(y1 = 1 | z1 = 1)
    assert pns / (1 - 0.2) == pytest.approx(0.75, abs=1e-12)  # PS = PNS / P(y1 = 0 | z1 = 0)


def test_binary_table_spurious_feature_has_a_marginal_but_no_conditional_pns():
    joint = {(z1, z2): (0.4 if z1 else 0.6) * (0.8 if z1 == z2 else 0.2) for z1 in (0, 1) for z2 in (0, 1)}
    y1_given_z2 = [
        sum(joint[z1, z2] * (0.8 if z1 else 0.2) for z1 in (0, 1)) / sum(joint[z1, z2] for z1 in (0, 1))
        for z2 in (0, 1)
    ]
    logits = [math.log(p / (1 - p)) for p in y1_given_z2]
    # A head that reads z2 alone has no z1 to hold, so its bound is the marginal one.
    marginal = table_pns([1.0], [0.0], [logits[1] - logits[0]], logits[0]).item()
    assert marginal == pytest.approx(y1_given_z2[1] - y1_given_z2[0], abs=1e-12)
    assert marginal == pytest.approx(0.3506, abs=5e-5)
    # Given z1, which the head reads instead, z2 does nothing.
    assert_same(
        table_pns([1.0, 1.0], [0.0, 0.0], [2 * LOG_4, 0.0], -LOG_4), torch.tensor([0.6, 0.0], dtype=torch.float64)
    )


def test_binary_table_conjunction_needs_both_features():
    bound = table_pns([1.0, 1.0], [0.0, 0.0], [2 * LOG_4, 2 * LOG_4], -3 * LOG_4)
    assert_same(bound, torch.tensor([0.6, 0.6], dtype=torch.float64))


# The closed form


def test_closed_form_of_a_gaussian_head_is_the_explained_variance():
    """A softmax over a fine grid of outcomes y_c, with logits y_c (z beta) / s^2 - y_c^2 / 2 s^2, is N(z beta, s^2)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    beta = torch.tensor([0.7, -0.4, 0.0], dtype=torch.float64)
    noise = 0.5
    step = 0.05
    grid = torch.arange(-10, 10 + step, step, dtype=torch.float64)
    weight, bias = grid[:, None] * beta / noise**2, -grid.square() / (2 * noise**2)

    centred = latents - latents.mean(0)
    residual = noise * torch.randn(64, generator=generator, dtype=torch.float64)
    residual -= centred @ torch.linalg.lstsq(centred, residual[:, None]).solution[:, 0]  # as least squares leaves it
    outcome = latents @ beta + residual
    # The estimate is linear in the targets: two neighbours on the grid stand for the outcome between them.
    below = ((outcome - grid[0]) / step).floor().long()
    fraction = (outcome - grid[below]) / step
    targets = F.one_hot(below, len(grid)) * (1 - fraction)[:, None]
    targets = targets + F.one_hot(below + 1, len(grid)) * fraction[:, None]

    actual = closed_form_pns(latents, weight, bias, targets)
    variance = latents.var(0, correction=0)
    slope, curvature = residual[:, None] * beta / noise**2, beta.square() / noise**2
    assert_same(actual, slope * centred + 0.5 * curvature * (variance + centred.square()), 1e-9)
    assert_same(actual.mean(0), beta.square() * variance / noise**2, 1e-9)


@both_heads
def test_closed_form_follows_the_exact_log_ratio(multi_label):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(24, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    reach = (latents.amax(0) - latents.amin(0)) * weight.abs()
    weight *= 0.5 / reach.max()  # |delta W| <= .5
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    targets = F.one_hot(torch.arange(24) % CLASSES, CLASSES).double()
    if multi_label:
        targets[:, 1] = 1

    def log_probability(values):
        logits = values @ weight.T + bias
        log_likelihood = F.logsigmoid(logits) if multi_label else logits.log_softmax(-1)
        return (targets * log_likelihood).sum(-1) / targets.sum(-1)

    replaced = torch.stack(
        [
            torch.stack([log_probability(replace_feature(latents, latents.roll(k, 0), j)) for k in range(24)]).mean(0)
            for j in range(WIDTH)
        ],
        dim=-1,
    )
    exact = log_probability(latents)[:, None] - replaced
    actual = closed_form_pns(latents, weight, bias, targets, multi_label=multi_label)
    assert torch.corrcoef(torch.stack([exact.flatten(), actual.flatten()]))[0, 1] > 0.99
    assert (exact - actual).abs().max() < 0.1 * exact.abs().max()


# The loss


@both_heads
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_log_of_the_bound(multi_label, reduction):
    problem = random_problem(multi_label)
    over_features = torch.Tensor.mean if reduction == "mean" else torch.Tensor.sum
    options = {"reduction": reduction, "multi_label": multi_label, "num_donors": 2}
    bound = conditional_pns(*problem, multi_label=multi_label, num_donors=2)
    closed = closed_form_pns(*problem, multi_label=multi_label)
    expected = {
        ("interventional", "log1p"): -(1 + bound).log(),
        ("interventional", "literal"): -(bound.clamp(min=0) + 1e-3).log(),
        ("closed_form", "log1p"): (1 + (-closed).exp()).log() - math.log(2),
    }
    for (estimator, form), loss in expected.items():
        actual = causal_loss(*problem, estimator=estimator, form=form, eps=1e-3, **options)
        assert_same(actual, over_features(loss, -1).mean())


def test_loss_is_finite_where_rounding_reaches_the_ends():
    latents, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1e4], [-1e4]])
    for labels in ([0, 1], [1, 0]):
        latents.requires_grad_().grad = None
        loss = causal_loss(latents, weight, None, class_targets(torch.tensor(labels), 2))
        loss.backward()
        assert loss.isfinite() and latents.grad.isfinite().all()
    assert conditional_pns(latents, weight, None, torch.eye(2).flip(0)).min() == -1


@both_heads
def test_bound_passes_gradcheck(multi_label):
    latents, weight, bias, targets = random_problem(multi_label)
    donors = roll_donors(latents, 2)
    inputs = [latents.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def bound(*inputs):
        return conditional_pns(*inputs, targets, donors=donors, multi_label=multi_label, chunk_size=3)

    assert torch.autograd.gradcheck(bound, inputs)


@both_heads
def test_closed_form_and_its_gradient_are_those_of_the_formula_in_a_fixed_population(multi_label):
    latents, weight, bias, targets = random_problem(multi_label)
    mean, variance = latents.mean(0), latents.var(0, correction=0)
    latents.requires_grad_()
    delta, logits = latents - mean, latents @ weight.T + bias
    if multi_label:
        p = logits.sigmoid()[..., None]
        per_class = (targets[..., None] - p) * weight * delta[:, None]
        per_class = per_class + 0.5 * p * (1 - p) * weight**2 * (variance + delta**2)[:, None]
        expected = (targets[..., None] * per_class).sum(1) / targets.sum(1)[:, None]
    else:
        p = logits.softmax(-1)[..., None]
        mu = (p * weight).sum(1)
        v = (p * (weight - mu[:, None]) ** 2).sum(1)
        expected = ((targets[..., None] * weight).sum(1) - mu) * delta + 0.5 * v * (variance + delta**2)
    actual = closed_form_pns(latents, weight, bias, targets, multi_label=multi_label)
    assert_same(actual, expected)
    gradients = [
        torch.autograd.grad(value.square().sum(), latents, retain_graph=True)[0] for value in (actual, expected)
    ]
    assert_same(*gradients, 1e-10)


@both_heads
@both_estimators
def test_loss_trains_the_encoder_and_not_the_head(multi_label, estimator):
    latents, weight, bias, targets = random_problem(multi_label)
    for tensor in (latents, weight, bias):
        tensor.requires_grad_()
    causal_loss(latents, weight, bias, targets, estimator=estimator, multi_label=multi_label).backward()
    assert weight.grad is None and bias.grad is None
    assert latents.grad.abs().max() > 0


@both_heads
@both_estimators
@pytest.mark.parametrize("form", ["log1p", "literal"])
def test_batch_of_one_gives_zero_and_stays_in_the_graph(multi_label, estimator, form):
    latents, weight, bias, targets = random_problem(multi_label)
    latents = latents[:1].requires_grad_()
    options = {"multi_label": multi_label}
    loss = causal_loss(latents, weight, bias, targets[:1], estimator=estimator, form=form, **options)
    loss.backward()
    assert loss == 0 and latents.grad.abs().max() == 0
    bound = conditional_pns(latents, weight, bias, targets[:1], **options)
    assert bound.requires_grad and bound.abs().max() == 0


@both_heads
@both_estimators
@pytest.mark.parametrize("form", ["log1p", "literal"])
def test_rows_without_a_positive_do_not_count(multi_label, estimator, form):
    latents, weight, bias, targets = random_problem(multi_label)
    options = {"estimator": estimator, "multi_label": multi_label, "form": form, "num_donors": None}
    targets[[0, 3]] = 0
    if multi_label:
        assert conditional_pns(latents, weight, bias, targets, multi_label=True)[[0, 3]].abs().max() == 0

    # Rows without a label still serve the others as donors, so the expected mean is taken over the same batch.
    alone = []
    for row in (1, 2, 4, 5):
        only = torch.zeros_like(targets)
        only[row] = targets[row]
        alone.append(causal_loss(latents, weight, bias, only, **options))
    assert_same(causal_loss(latents, weight, bias, targets, **options), torch.stack(alone).mean())


@both_heads
@both_estimators
@pytest.mark.parametrize("form", ["log1p", "literal"])
def test_batch_without_positives_gives_zero_and_stays_in_the_graph(multi_label, estimator, form):
    latents, weight, bias, targets = random_problem(multi_label)
    latents.requires_grad_()
    targets = torch.zeros_like(targets)
    loss = causal_loss(latents, weight, bias, targets, estimator=estimator, form=form, multi_label=multi_label)
    loss.backward()
    assert loss == 0 and latents.grad.abs().max() == 0


@both_heads
@both_estimators
def test_bf16_inputs_are_computed_in_fp32(multi_label, estimator):
    problem = random_problem(multi_label, dtype=torch.bfloat16)
    options = {"estimator": estimator, "multi_label": multi_label}
    rounded = causal_loss(*problem, **options)
    assert rounded.dtype == torch.float32
    assert_same(rounded, causal_loss(*(tensor.float() for tensor in problem), **options), 1e-6)
    assert_same(rounded, causal_loss(*random_problem(multi_label, dtype=torch.float32), **options), 1e-2)


@both_heads
@both_estimators
def test_autocast_changes_nothing(multi_label, estimator):
    problem = random_problem(multi_label, dtype=torch.float32)
    options = {"estimator": estimator, "multi_label": multi_label}
    expected = causal_loss(*problem, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = causal_loss(*problem, **options)
    assert actual.dtype == torch.float32
    assert_same(actual, expected, 0)


def test_float64_stays_float64():
    assert causal_loss(*random_problem()).dtype == torch.float64


@both_heads
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_and_gradient_are_the_same(multi_label, backend):
    latents, weight, bias, targets = random_problem(multi_label)
    torch.compiler.reset()
    compiled = torch.compile(causal_loss, backend=backend)
    for rows in (BATCH, BATCH - 1):  # a last batch of another size
        results = []
        for function in (causal_loss, compiled):
            leaf = latents[:rows].clone().requires_grad_()
            loss = function(leaf, weight, bias, targets[:rows], multi_label=multi_label)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for eager, actual in zip(*results):
            assert_same(actual, eager)


@pytest.mark.parametrize("option", ["estimator", "form", "reduction"])
def test_unknown_option_names_the_choices(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, .*; got 'other'"):
        causal_loss(*random_problem(), **{option: "other"})


def test_wrong_shapes_are_refused():
    latents, weight, bias, targets = random_problem()
    with pytest.raises(ValueError, match="one pooled latent"):
        causal_loss(latents[:, None], weight, bias, targets)
    with pytest.raises(ValueError, match="targets"):
        causal_loss(latents, weight, bias, targets[:, :-1])


def test_class_targets():
    for integer in (torch.int32, torch.int64):
        assert class_targets(torch.tensor([2, -100], dtype=integer), 3).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert class_targets(torch.tensor([[2], [-100]]), 3).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert class_targets(torch.tensor([[1], [0]]), 1).tolist() == [[1], [0]]  # multi-hot
    assert class_targets(torch.tensor([[1, 0, 1]]), 3).tolist() == [[1, 0, 1]]
    assert class_targets(torch.tensor([[1, 0, 1]]), 3).is_floating_point()
    soft = torch.tensor([[0.25, 0.75, 0.0]])
    assert class_targets(soft, 3) is soft


# Reconstruction


def test_reconstruction_places_every_cell_where_a_direct_loop_does():
    torch.manual_seed(0)
    filters, resolutions, patch = 2, 3, (4, 2)
    head = ReconstructionHead(5, filters, resolutions, patch)
    tokens = torch.randn(2, 3, 2, 5)
    actual = head.assemble(head(tokens), num_frames=12, num_bins=4)
    assert actual.shape == (2, filters, resolutions, 12, 4)
    cells = head.projection(tokens)
    for filter_ in range(filters):
        for resolution in range(resolutions):
            for frame in range(12):
                for bin_ in range(4):
                    channel = filter_ * resolutions + resolution
                    channel = (channel * patch[0] + frame % patch[0]) * patch[1] + bin_ % patch[1]
                    expected = cells[:, frame // patch[0], bin_ // patch[1], channel]
                    assert_same(actual[:, filter_, resolution, frame, bin_], expected, 0)


def test_reconstruction_of_square_patches_is_convolution_and_pixel_shuffle():
    torch.manual_seed(0)
    head = ReconstructionHead(5, 2, 3, patch=(4, 4))
    tokens = torch.randn(2, 3, 2, 5)
    kernel = head.projection.weight[:, :, None, None]
    convolved = F.conv2d(tokens.permute(0, 3, 1, 2), kernel, head.projection.bias)
    expected = F.pixel_shuffle(convolved, 4).unflatten(1, (2, 3))
    assert_same(head.assemble(head(tokens), 12, 8), expected, 1e-6)


def test_reconstruction_crops_to_the_size_asked_for():
    head = ReconstructionHead(5, 2, 3, patch=(4, 2))
    patches = head(torch.randn(2, 3, 2, 5))
    cropped = head.assemble(patches, num_frames=10, num_bins=3)
    assert cropped.shape == (2, 2, 3, 10, 3)
    assert_same(cropped, head.assemble(patches, 12, 4)[..., :10, :3], 0)


def test_cut_is_the_inverse_of_assemble():
    head = ReconstructionHead(5, 2, 3, patch=(4, 2))
    patches = torch.randn(2, 3, 2, 2, 3, 4, 2)
    assert_same(head.cut(head.assemble(patches, 12, 4), 3, 2), patches, 0)
    padded = head.cut(head.assemble(patches, 10, 3), 3, 2)
    assert_same(padded[:, :2, :1], patches[:, :2, :1], 0)
    assert padded[:, 2, ..., 2:, :].abs().max() == 0 and padded[:, :, 1, ..., 1].abs().max() == 0
    with pytest.raises(ValueError, match="12 frames and 4 bins; the spectrograms have 13"):
        head.cut(torch.zeros(1, 2, 3, 13, 4), 3, 2)


@pytest.mark.parametrize("num_frames, num_bins", [(12, 4), (10, 4), (12, 3), (9, 3)])
def test_loss_of_patches_is_that_of_the_assembled_spectrograms(num_frames, num_bins):
    torch.manual_seed(0)
    head = ReconstructionHead(5, 2, 3, patch=(4, 2)).double()
    patches = head(torch.randn(2, 3, 2, 5, dtype=torch.float64))
    target = torch.randn(2, 2, 3, num_frames, num_bins, dtype=torch.float64)
    assembled = head.assemble(patches, num_frames, num_bins)
    assert_same(head.loss(patches, target), F.mse_loss(assembled, target))
    mask = torch.arange(num_frames) < torch.tensor([num_frames, 5])[:, None]
    expected = reconstruction_loss(assembled, target, mask[:, None, None, :, None])
    assert_same(head.loss(patches, target, mask), expected)


def test_masked_reconstruction_loss_is_that_of_the_unpadded_clip():
    torch.manual_seed(0)
    reconstruction, target = torch.randn(2, 1, 2, 3, 6, 4, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    mask[:, 4:] = False
    target[..., 4:, :] = float("nan")  # whatever padding holds
    reconstruction.requires_grad_()
    loss = reconstruction_loss(reconstruction, target, mask[:, None, None, :, None])
    assert_same(loss, F.mse_loss(reconstruction[..., :4, :], target[..., :4, :]))
    loss.backward()
    assert reconstruction.grad.isfinite().all() and reconstruction.grad[..., 4:, :].abs().max() == 0


def test_masked_reconstruction_loss_is_the_mean_over_all_valid_elements():
    torch.manual_seed(0)
    reconstruction, target = torch.randn(2, 2, 2, 3, 6, 4, dtype=torch.float64)
    lengths = [6, 2]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    errors = [(reconstruction[i, ..., :t, :] - target[i, ..., :t, :]).square().flatten() for i, t in enumerate(lengths)]
    assert_same(reconstruction_loss(reconstruction, target, mask[:, None, None, :, None]), torch.cat(errors).mean())
    assert_same(reconstruction_loss(reconstruction, target), F.mse_loss(reconstruction, target))


def test_reconstruction_loss_of_padding_only_is_zero():
    reconstruction = torch.randn(1, 2, 3, 6, 4, requires_grad=True)
    loss = reconstruction_loss(reconstruction, torch.randn(1, 2, 3, 6, 4), torch.zeros(1, 1, 1, 6, 1, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and reconstruction.grad.abs().max() == 0


def test_reconstruction_loss_is_fp32_and_does_not_train_its_target():
    reconstruction = torch.randn(1, 2, 3, 6, 4, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randn(1, 2, 3, 6, 4, requires_grad=True)
    loss = reconstruction_loss(reconstruction, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert target.grad is None and reconstruction.grad.abs().max() > 0
    with pytest.raises(ValueError, match="shape"):
        reconstruction_loss(reconstruction, target[:, :, :1])


# The wrapper, on a model that knows nothing of it


def tiny_ast(**config):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    spectrogram = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
    return ASTForAudioClassification(ASTConfig(**{"num_labels": CLASSES, **size, **spectrogram, **config}))


def clips(count=4):
    return torch.randn(count, 16, 8, generator=torch.Generator().manual_seed(0))


INDEX_LABELS = torch.tensor([0, 3, 1, 4])
SOFT_LABELS = 0.7 * F.one_hot(INDEX_LABELS, CLASSES) + 0.3 * F.one_hot(INDEX_LABELS.flip(0), CLASSES)
MULTI_HOT_LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1]])


@pytest.mark.parametrize("soft", [False, True])
def test_module_takes_labels_from_another_device(soft):
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            module = CausalModule(tiny_ast(problem_type="single_label_classification"), multi_label=False)
            inputs = torch.zeros(4, 16, 8)
        shape = {"size": (4, CLASSES)} if soft else {"size": (4,), "dtype": torch.long}
        output = module(input_values=inputs, labels=torch.zeros(**shape, device="cpu"))
        assert output.loss.device.type == output.causal_loss.device.type == "cuda"


@pytest.mark.parametrize(
    "labels, multi_label",
    [(INDEX_LABELS, False), (SOFT_LABELS, False), (MULTI_HOT_LABELS, True), (MULTI_HOT_LABELS.float(), True)],
    ids=["index", "soft", "multi_hot_integers", "multi_hot"],
)
def test_module_adds_the_weighted_causal_loss(labels, multi_label):
    model = tiny_ast(problem_type="multi_label_classification" if multi_label else "single_label_classification")
    output = CausalModule(model, loss_weight=0.5)(input_values=clips(), labels=labels)
    logits = model(clips()).logits
    if multi_label:
        classification = F.binary_cross_entropy_with_logits(logits, labels.float())
    else:
        classification = F.cross_entropy(logits, labels)
    head = model.classifier.dense
    pooled = model.classifier.layernorm(model.audio_spectrogram_transformer(clips()).pooler_output)
    targets = labels.float() if labels.ndim == 2 else F.one_hot(labels, CLASSES).float()
    causal = causal_loss(pooled, head.weight, head.bias, targets, multi_label=multi_label)
    assert_same(output.classification_loss, classification, 1e-6)
    assert_same(output.causal_loss, causal, 1e-6)
    assert causal.abs() > 1e-6
    assert_same(output.loss, classification + 0.5 * causal, 1e-6)
    assert_same(output.logits, logits, 1e-6)
    assert list(output)[0] == "loss" and output[0] is output.loss


@pytest.mark.parametrize(
    "options", [{"num_donors": 1, "form": "literal", "reduction": "sum"}, {"estimator": "closed_form"}], ids=str
)
def test_module_passes_its_options_to_the_loss(options):
    model = tiny_ast()
    output = CausalModule(model, **options)(input_values=clips(), labels=INDEX_LABELS)
    pooled = model.classifier.layernorm(model.audio_spectrogram_transformer(clips()).pooler_output)
    head = model.classifier.dense
    expected = causal_loss(pooled, head.weight, head.bias, F.one_hot(INDEX_LABELS, CLASSES), **options)
    assert_same(output.causal_loss, expected, 1e-4)


def test_module_trains_the_encoder_and_not_the_head_by_the_causal_loss():
    model = tiny_ast()
    CausalModule(model)(input_values=clips(), labels=INDEX_LABELS).causal_loss.backward()
    assert model.classifier.dense.weight.grad is None and model.classifier.dense.bias.grad is None
    encoder = [parameter.grad for parameter in model.audio_spectrogram_transformer.parameters()]
    assert all(gradient is not None for gradient in encoder)
    assert max(gradient.abs().max() for gradient in encoder) > 0


def test_module_in_evaluation_has_the_models_own_loss():
    model = tiny_ast().eval()
    output = CausalModule(model).eval()(input_values=clips(), labels=INDEX_LABELS)
    assert "causal_loss" not in output
    assert_same(output.loss, model(clips(), labels=INDEX_LABELS).loss, 0)


def test_module_without_labels_is_the_model(monkeypatch):
    model = tiny_ast().eval()
    module = CausalModule(model).eval()
    monkeypatch.setattr("transformers_cat.causal.causal_loss", pytest.fail)
    monkeypatch.setattr(nn.Linear, "register_forward_pre_hook", pytest.fail)
    output = module(input_values=clips())
    assert type(output) is type(model(clips()))
    assert_same(output.logits, model(clips()).logits, 0)
    assert_same(module(clips()).logits, output.logits, 0)


def test_module_leaves_no_hook_behind():
    model = tiny_ast()
    module = CausalModule(model)
    module(input_values=clips(), labels=INDEX_LABELS)
    with pytest.raises(ValueError):
        module(input_values=clips(), labels=INDEX_LABELS[:2])
    assert not model.classifier.dense._forward_pre_hooks


def test_module_output_can_be_pickled():
    output = CausalModule(tiny_ast())(input_values=clips(), labels=INDEX_LABELS, output_hidden_states=True)
    detached = {name: value.detach() for name, value in output.items() if isinstance(value, torch.Tensor)}
    again = pickle.loads(pickle.dumps(type(output)(**detached)))
    assert type(again) is type(output) and list(again) == list(detached)
    assert_same(again.causal_loss, output.causal_loss, 0)
    assert_same(copy.deepcopy(again).loss, output.loss, 0)


def test_module_state_dict_is_the_model_under_a_prefix():
    model = tiny_ast()
    assert list(CausalModule(model).state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_module_finds_the_head_or_names_the_candidates():
    assert CausalModule(tiny_ast()).head == "classifier.dense"
    with pytest.raises(ValueError, match="first, second"):
        CausalModule(nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match="none"):
        CausalModule(nn.Identity())
    with pytest.raises(ValueError, match="not a torch.nn.Linear"):
        CausalModule(tiny_ast(), head="classifier")


def test_module_asks_what_a_row_of_labels_means():
    module = CausalModule(tiny_ast())
    with pytest.raises(ValueError, match="multi_label="):
        module(input_values=clips(), labels=SOFT_LABELS)


class DictModel(nn.Module):
    """Not of transformers: returns a plain dict, and applies its head to whatever it is given."""

    def __init__(self, used=True):
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.used = used

    def forward(self, values, labels=None):
        logits = self.head(values) if self.used else values[..., :CLASSES]
        return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


def test_module_accepts_a_model_that_returns_a_dict():
    labels = torch.arange(BATCH) % CLASSES
    output = CausalModule(DictModel())(values=torch.randn(BATCH, WIDTH), labels=labels)
    assert list(output) == ["loss", "classification_loss", "causal_loss", "logits"]


def test_module_refuses_what_has_no_classes_or_no_names():
    for config in ({"problem_type": "regression"}, {"num_labels": 1}):  # which transformers takes for the same
        with pytest.raises(ValueError, match="the model is one of regression"):
            CausalModule(tiny_ast(**config))
    with pytest.raises(ValueError, match="CATForAudioClassification has a causal loss of its own"):
        CausalModule(CATForAudioClassification(small_config()))
    with pytest.raises(ValueError, match="drop `return_dict=False`"):
        CausalModule(tiny_ast())(input_values=clips(), labels=INDEX_LABELS, return_dict=False)


class Adapted(nn.Module):
    """As adapters wrap a layer: it and, with dropout, a map of low rank."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.added, self.dropout = nn.Linear(layer.in_features, layer.out_features, bias=False), nn.Dropout(0.5)

    def forward(self, latents):
        return self.layer(latents) + self.added(self.dropout(latents))


def test_linear_head_is_what_makes_the_logits():
    plain = nn.Linear(WIDTH, CLASSES)
    latents = torch.randn(BATCH, WIDTH)
    assert linear_head(plain, latents)[0] is plain.weight
    adapted = Adapted(plain).train()
    weight, bias = linear_head(adapted, latents)
    assert adapted.dropout.training and not weight.requires_grad
    assert_same(latents @ weight.T + bias, adapted.eval()(latents), 1e-5)


def test_linear_head_whose_weights_are_elsewhere_until_it_runs():
    """As sharded ones are: an empty tensor stands for them."""
    head, latents = nn.Linear(WIDTH, CLASSES), torch.randn(BATCH, WIDTH)
    whole = head.weight.data
    head.weight.data = torch.empty(0)
    head.register_forward_pre_hook(lambda *_: setattr(head.weight, "data", whole))
    head.register_forward_hook(lambda *_: setattr(head.weight, "data", torch.empty(0)))
    weight, bias = linear_head(head, latents)
    assert_same(weight, whole, 1e-5)
    assert_same(bias, head.bias.detach(), 1e-5)


def test_module_refuses_latents_that_are_not_pooled():
    with pytest.raises(ValueError, match=r"\(6, 2, 7\)"):
        CausalModule(DictModel())(values=torch.randn(BATCH, 2, WIDTH), labels=torch.zeros(BATCH * 2).long())
    with pytest.raises(ValueError, match="did not run"):
        CausalModule(DictModel(used=False))(values=torch.randn(BATCH, WIDTH), labels=torch.zeros(BATCH).long())


def test_module_output_survives_being_flattened_and_rebuilt():
    output = CausalModule(tiny_ast())(input_values=clips(), labels=INDEX_LABELS)
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    rebuilt = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert rebuilt.causal_loss is output.causal_loss and rebuilt.loss is output.loss


def test_module_in_the_trainer(tmp_path):
    module = CausalModule(tiny_ast())
    head = module.model.classifier.dense.weight.detach().clone()
    dataset = [{"input_values": clip, "labels": label} for clip, label in zip(clips(), INDEX_LABELS)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(module, arguments, train_dataset=dataset, eval_dataset=dataset)
    assert not trainer.model_accepts_loss_kwargs  # else accumulated steps would add up
    trainer.train()
    assert (module.model.classifier.dense.weight - head).abs().max() > 0
    assert module.model.is_gradient_checkpointing
    prediction = trainer.predict(dataset)
    assert prediction.predictions.shape == (4, CLASSES)  # the logits alone
    assert math.isfinite(prediction.metrics["test_loss"])
    assert not hasattr(module.model.config, "keys_to_ignore_at_inference")  # nor is the model's own config changed
