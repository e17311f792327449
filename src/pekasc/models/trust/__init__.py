"""How far a prediction can be trusted: noise around it, conformal quantiles over groups, novelty. Pure arrays."""

from pekasc.models.trust._calibration import (
    EXACT,
    FEW_GROUPS,
    GUARANTEES,
    INSIDE,
    UNSEEN,
    Calibration,
    check_groups,
    check_level,
    from_held_out,
    percent,
    usable,
)
from pekasc.models.trust._conformal import (
    EDGES,
    group_quantiles,
    groups_needed,
    quantiles_of_cumulative,
    reachable,
)
from pekasc.models.trust._corrupt import FAULTS, N_TOLERATED, corrupted
from pekasc.models.trust._faults import Examples, Faults, no_faults
from pekasc.models.trust._held_out import MOST_SPOTS, Block, HeldOut, held_out
from pekasc.models.trust._levels import LEVELS, RULES, trust_levels
from pekasc.models.trust._noise import COUNTS, RESIDUALS, Noise, counts_of
from pekasc.models.trust._novelty import Distance, Novelty, distance_to, novelty_of
from pekasc.models.trust._table import interval_record, intervals_of

__all__ = [
    "COUNTS",
    "EDGES",
    "EXACT",
    "FAULTS",
    "FEW_GROUPS",
    "GUARANTEES",
    "INSIDE",
    "LEVELS",
    "MOST_SPOTS",
    "N_TOLERATED",
    "RESIDUALS",
    "RULES",
    "UNSEEN",
    "Block",
    "Calibration",
    "Distance",
    "Examples",
    "Faults",
    "HeldOut",
    "Noise",
    "Novelty",
    "check_groups",
    "check_level",
    "corrupted",
    "counts_of",
    "distance_to",
    "from_held_out",
    "group_quantiles",
    "groups_needed",
    "held_out",
    "interval_record",
    "intervals_of",
    "no_faults",
    "novelty_of",
    "percent",
    "quantiles_of_cumulative",
    "reachable",
    "trust_levels",
    "usable",
]
