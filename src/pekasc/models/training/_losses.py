"""The losses of PEKA: knowledge distillation through the frozen cluster head, and structure alignment.

Method: Pan, Chen, Secrier, "Teaching pathology foundation models to accurately predict gene expression with
parameter efficient knowledge transfer", arXiv:2504.07061.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def losses(
    head: nn.Module, teacher: Tensor, student: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the distillation loss ``T**2 * KL(softmax(f(t)/T) || softmax(f(s)/T))`` and the structure alignment loss.

    Structure alignment is the cross-entropy of ``f(s)`` with the structure labels.

    Parameters
    ----------
    head
        The frozen cluster head f.
    teacher, student
        Embeddings t and s, (batch, D).
    labels
        Structure labels, (batch,).
    temperature
        T.
    """
    with torch.no_grad():
        target = functional.log_softmax(head(teacher) / temperature, dim=1)
    logits = head(student)
    soft = functional.log_softmax(logits / temperature, dim=1)
    kd = functional.kl_div(soft, target, reduction="batchmean", log_target=True) * temperature**2
    return kd, functional.cross_entropy(logits, labels)
