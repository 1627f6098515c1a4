"""Importance of elements and components: against a transcription of the papers,
and on every cut of a factor.
"""

import pytest
import torch

from distlora.maths.importance import ElementScores, component_of, component_sums, low_half_share

OUT, IN, RANK = 13, 17, 5
SHAPES = {"A": (RANK, IN), "B": (OUT, RANK)}
#: The axis that counts components.
AXES = {"A": 0, "B": 1}


def _steps(shape, count=6, seed=0):
    """Weights and gradients of some steps, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
        for _ in range(count)
    ]


def _published(steps, beta1, beta2):
    """AdaLoRA's Eq. 9–10, element by element: the score of each after these steps."""
    rows, columns = steps[0][0].shape
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            mean = uncertainty = 0.0
            for weight, gradient in steps:
                importance = abs(float(weight[i, j]) * float(gradient[i, j]))
                mean = beta1 * mean + (1 - beta1) * importance
                uncertainty = beta2 * uncertainty + (1 - beta2) * abs(importance - mean)
            result[i, j] = mean * uncertainty
    return result


def _followed(elements, steps, part=slice(None)):
    weights = [(w.float().flatten()[part], g.float().flatten()[part]) for w, g in steps]
    state = elements.start(weights[0][0])
    for weight, gradient in weights:
        elements.update(state, weight, gradient)
    return state


# ---------------------------------------------------------------------- elements


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.5, 0.9)], ids=str)
@pytest.mark.parametrize("count", [1, 6])
def test_scores_are_those_of_the_paper(betas, count):
    steps, elements = _steps((4, 7), count), ElementScores(*betas)
    scores = elements.scores(_followed(elements, steps))
    torch.testing.assert_close(scores.view(4, 7), _published(steps, *betas).float(), rtol=1e-5, atol=1e-9)


def test_the_paper_s_betas_are_the_default():
    assert ElementScores() == ElementScores(beta1=0.85, beta2=0.85)


def test_a_part_of_a_factor_is_followed_on_its_own():
    steps, elements = _steps((4, 7)), ElementScores()
    whole = elements.scores(_followed(elements, steps))
    for part in (slice(0, 5), slice(5, 19), slice(19, 28), slice(9, 9)):
        torch.testing.assert_close(
            elements.scores(_followed(elements, steps, part)), whole[part], rtol=1e-6, atol=0
        )


def test_the_state_starts_at_zero_in_float32_and_has_the_part_s_size():
    part = torch.randn(11, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = ElementScores().start(part)
    assert set(state) == {"mean", "uncertainty"}
    assert all(
        value.shape == (11,) and value.dtype == torch.float32 and not value.any() for value in state.values()
    )
    assert state["mean"].data_ptr() != state["uncertainty"].data_ptr()


def test_an_update_changes_neither_weight_nor_gradient_and_counts_in_float32():
    (weight, gradient), elements = _steps((4, 7))[0], ElementScores()
    weight, gradient = weight.bfloat16().flatten().requires_grad_(), gradient.bfloat16().flatten()
    before = weight.detach().clone(), gradient.clone()
    state = elements.start(weight)
    elements.update(state, weight, gradient)
    assert torch.equal(weight, before[0]) and torch.equal(gradient, before[1])
    assert not state["mean"].requires_grad
    exact = (1 - 0.85) * (before[0].float() * before[1].float()).abs()
    torch.testing.assert_close(state["mean"], exact, rtol=1e-5, atol=0)


def test_an_element_without_gradient_scores_nothing():
    elements = ElementScores()
    state = elements.start(torch.ones(3))
    for _ in range(5):
        elements.update(state, torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))
    scores = elements.scores(state)
    assert scores[0] == 0 < scores[1] < scores[2]


# ---------------------------------------------------------------------- components


def _scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {factor: torch.rand(*shape, generator=generator) for factor, shape in SHAPES.items()}


def _cuts(count):
    """Some ways to cut a flat tensor: whole, in halves inside a row, in three, in single elements, with empty
    pieces.
    """
    return [
        [0, count], [0, count // 2, count], [0, 3, 4, count - 1, count], list(range(count + 1)),
        [0, 0, RANK, RANK, count, count],
    ]  # fmt: skip


@pytest.mark.parametrize("cut_a", _cuts(RANK * IN), ids=len)
@pytest.mark.parametrize("cut_b", _cuts(OUT * RANK), ids=len)
def test_the_sum_over_all_parts_is_the_group_score(cut_a, cut_b):
    """S_k = mean_i s(B_ik) + mean_j s(A_kj), whatever the parts."""
    scores = _scores()
    expected = scores["B"].double().mean(0) + scores["A"].double().mean(1)
    total = torch.zeros(RANK, dtype=torch.float64)
    for factor, cut in (("A", cut_a), ("B", cut_b)):
        flat = scores[factor].flatten()
        for start, end in zip(cut, cut[1:]):
            part = component_sums(AXES[factor], flat[start:end], start, SHAPES[factor])
            assert part.shape == (RANK,) and part.dtype == torch.float64
            total += part
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_single_element_counts_for_its_own_component_alone(factor):
    shape = SHAPES[factor]
    for start in range(shape[0] * shape[1]):
        row, column = divmod(start, shape[1])
        expected = torch.zeros(RANK, dtype=torch.float64)
        expected[row if factor == "A" else column] = 3.0 / (IN if factor == "A" else OUT)
        found = component_sums(AXES[factor], torch.tensor([3.0]), start, shape)
        assert torch.equal(found, expected)


def test_component_sums_are_formed_in_float64():
    """Many small scores beside a large one: float32 would lose them."""
    scores = torch.full((1 << 16,), 1e-8)
    scores[0] = 1.0
    total = component_sums(0, scores, 0, (1, 1 << 16)) * (1 << 16)
    assert float(total) - 1 == pytest.approx(65535e-8, rel=1e-5)


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize(("start", "length"), [(0, 65), (3, 20), (64, 1), (7, 0)])
def test_component_of_is_the_row_of_a_and_the_column_of_b(factor, start, length):
    rows, columns = SHAPES[factor]
    number = torch.arange(RANK)
    whole = number[:, None].expand(rows, columns) if factor == "A" else number.expand(rows, columns)
    found = component_of(AXES[factor], start, length, SHAPES[factor])
    assert found.dtype == torch.int64
    assert torch.equal(found, whole.reshape(-1)[start : start + length])


def test_a_factor_that_belongs_to_all_components_has_the_number_of_one_that_is_replaced_with_the_others():
    assert component_of(None, 3, 4, (RANK, RANK)).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------------- the lower half


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ([1, 1, 1, 1], 0.5),
        ([8, 0, 1, 1], 0.1),
        ([5, 3, 2], 0.2),
        ([7], 0.0),
        ([0, 0, 0, 0], 0.5),
        ([0, 0, 0], 1 / 3),
    ],
    ids=str,
)
def test_low_half_share(scores, share):
    assert low_half_share(torch.tensor(scores, dtype=torch.float64)) == pytest.approx(share)
