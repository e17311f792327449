"""The losses in closed form."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax
from torch import nn

from pekasc.models.training._losses import losses


def test_losses_are_the_formulas_of_the_paper() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 5).double()
    teacher, student = torch.randn(8, 6).double(), torch.randn(8, 6).double()
    labels, temperature = torch.randint(5, (8,)), 2.0
    kd, sa = losses(head, teacher, student, labels, temperature)
    with torch.no_grad():
        t, s = head(teacher).numpy(), head(student).numpy()
    log_p, log_q = log_softmax(t / temperature, axis=1), log_softmax(s / temperature, axis=1)
    expected = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    np.testing.assert_allclose(kd.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(sa.item(), -log_softmax(s, axis=1)[np.arange(8), labels].mean(), rtol=1e-12)


def test_a_student_that_is_the_teacher_has_nothing_to_distil() -> None:
    head, teacher = nn.Linear(6, 5), torch.randn(8, 6)
    kd, _ = losses(head, teacher, teacher.clone(), torch.zeros(8, dtype=torch.long), 2.0)
    assert abs(kd.item()) < 1e-6


def test_gradients_reach_the_student_alone() -> None:
    head = nn.Linear(6, 5).requires_grad_(False)
    teacher, student = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    kd, sa = losses(head, teacher, student, torch.zeros(4, dtype=torch.long), 2.0)
    (kd + sa).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None
