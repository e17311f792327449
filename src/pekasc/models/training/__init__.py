"""Training of adapters: PEFT methods, targets, losses, training plan and Lightning trainer."""

from __future__ import annotations

from pekasc.models.training._blocks import MOST, choose_blocks
from pekasc.models.training._callbacks import check_history
from pekasc.models.training._kept import kept_content, kept_from
from pekasc.models.training._lightning import Engine, check_starts, check_trainer
from pekasc.models.training._losses import losses
from pekasc.models.training._methods import (
    Method,
    attached,
    check_method,
    config_from,
    config_values,
    known_methods,
    last_block,
    make_config,
    method_name,
    target_layers,
    tuned_model,
)
from pekasc.models.training._network import cluster_head, projector
from pekasc.models.training._targets import n_clusters_for, prepare_targets, structure_labels, train_cluster_head
from pekasc.models.training._trainer import Trained, train_student

__all__ = [
    "Engine",
    "check_history",
    "MOST",
    "Method",
    "Trained",
    "attached",
    "check_method",
    "check_starts",
    "check_trainer",
    "choose_blocks",
    "cluster_head",
    "config_from",
    "config_values",
    "kept_content",
    "kept_from",
    "known_methods",
    "last_block",
    "losses",
    "make_config",
    "method_name",
    "n_clusters_for",
    "prepare_targets",
    "projector",
    "structure_labels",
    "target_layers",
    "train_cluster_head",
    "train_student",
    "tuned_model",
]
