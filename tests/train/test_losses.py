"""The losses against their equations written out by hand."""

from __future__ import annotations

import pytest
import torch

from ppcl_fx.train.core.losses import (
    Weights,
    edit_loss,
    normalized_error,
    output_loss,
    relative_error,
    squared_error,
    total_loss,
)


def _states(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_normalized_error_is_eq_6_summed_over_features_and_averaged_over_tokens() -> None:
    student, teacher = _states(0), _states(1)
    by_hand = sum(
        ((student[b, t] / student[b, t].norm() - teacher[b, t] / teacher[b, t].norm()) ** 2).sum()
        for b in range(2)
        for t in range(3)
    )
    torch.testing.assert_close(normalized_error(student, teacher), torch.as_tensor(by_hand) / 6)


def test_normalized_error_sees_directions_only() -> None:
    states = _states(0)
    assert normalized_error(states, 7.5 * states).item() == pytest.approx(0, abs=1e-12)
    assert normalized_error(states, -states).item() == pytest.approx(4)


def test_squared_error_is_eq_12() -> None:
    student, teacher = _states(0), _states(1)
    torch.testing.assert_close(squared_error(student, teacher), ((student - teacher) ** 2).sum() / 6)


def test_reductions_do_not_depend_on_batch_or_tokens() -> None:
    student, teacher = _states(0), _states(1)
    for error in (normalized_error, squared_error):
        torch.testing.assert_close(
            error(student.repeat(4, 5, 1), teacher.repeat(4, 5, 1)), error(student, teacher)
        )


def test_half_precision_is_compared_in_float32() -> None:
    student, teacher = _states(0).bfloat16(), _states(1).bfloat16()
    assert normalized_error(student, teacher).dtype == torch.float32
    torch.testing.assert_close(
        squared_error(student, teacher), squared_error(student.float(), teacher.float())
    )
    torch.testing.assert_close(output_loss(student, teacher), output_loss(student.float(), teacher.float()))


def test_an_edits_loss_weighs_its_terms() -> None:
    student, teacher = _states(0), _states(1)
    pairs = [(term, student, teacher) for term in ("image", "text", "z", "linear.text", "attention.image")]
    near, plain = normalized_error(student, teacher), squared_error(student, teacher)
    torch.testing.assert_close(edit_loss(pairs, Weights()), 2 * near + 2 * plain)
    weights = Weights(image=2.0, text=0.0, linear=0.5, attention=3.0)
    torch.testing.assert_close(edit_loss(pairs, weights), 5 * near + plain)


def test_the_relative_term_sees_lengths() -> None:
    student, teacher = _states(0), _states(1)
    by_hand = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    torch.testing.assert_close(relative_error(student, teacher), by_hand)
    assert relative_error(0 * teacher, teacher).item() == pytest.approx(1)
    pairs = [("image", 2 * teacher, teacher), ("z", teacher, teacher)]
    assert edit_loss(pairs, Weights()).item() == pytest.approx(0, abs=1e-9)
    assert edit_loss(pairs, Weights(relative=0.5)).item() == pytest.approx(0.5)


def test_the_total_is_the_sum_over_edits() -> None:
    assert total_loss([torch.tensor(1.0), torch.tensor(2.5)]).item() == 3.5


def test_output_loss_is_the_mean_squared_error() -> None:
    student, teacher = _states(0), _states(1)
    torch.testing.assert_close(output_loss(student, teacher), ((student - teacher) ** 2).mean())


def test_broken_graphs_are_loud() -> None:
    with pytest.raises(RuntimeError, match="unknown loss term 'imgae'"):
        edit_loss([("imgae", _states(0), _states(1))], Weights())
    with pytest.raises(RuntimeError, match="no loss term"):
        edit_loss([("text", _states(0), _states(1))], Weights(text=0.0))
    with pytest.raises(RuntimeError, match="differ in shape"):
        edit_loss([("image", _states(0), _states(1)[:1])], Weights())
