"""What an adapter says of itself when it is printed: what it was trained on, and how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pekasc._text import names, number
from pekasc.models.runtime import profile_text

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter
    from pekasc.models.heads import Member

_MOST = 6  # groups by name


def summary(adapter: Adapter) -> str:
    """Return the text that printing an adapter shows."""
    info, scores = adapter.info, adapter.gene_scores["pearson"].dropna().sort_values(ascending=False)
    at = "its own output" if adapter.depth is None else f"block {' + '.join(str(d) for d in adapter.depth)}"
    what = adapter.method if adapter.config is None else f"{adapter.method}, {info['epochs']} epochs"
    if adapter.others:
        what += f", mean of {adapter.n_adapters} adapters"
    genes = adapter.target_key is None
    lines = [
        f"Adapter ({what}) on encoder {adapter.encoder.short!r}, features of {at}",
        f"  tiles       {adapter.spec.tile_px} px at {adapter.spec.mpp:g} um/px ({adapter.spec.side_um:g} um)",
        f"  trained on  {info['n_spots']} spots, groups: {names(info['groups'], _MOST)}",
        *([] if info.get("teacher") is None else [f"  teacher     {info['teacher']}"]),
        f"  predicts    {_count(adapter)} {info['target']}",
        *_some_groups(adapter),
        *_reading(adapter),
    ]
    if len(scores):
        best = ", ".join(f"{gene} {score:.2f}" for gene, score in scores.head(3).items())
        lines.append(
            f"  trust       {held_out_parts(adapter)}: Pearson median {scores.median():.2f}, "
            f"{(scores > 0.2).mean():.0%} of {'genes' if genes else 'columns'} above 0.2; best {best}"
        )
    else:
        lines.append("  trust       unknown: no group was held out (see `groups=` of fit_adapter)")
    if adapter.calibration is not None:
        lines.append(f"  intervals   {adapter.calibration.text}")
    elif adapter.held_out is not None:
        lines.append("  intervals   none yet: `pekasc.tl.calibrate(adapter)`")
    if "profile" in info:  # missing in adapters saved by an earlier version
        lines.append(f"  profile     {profile_text(info['profile'])}")
    unknown = "not stated, see its source"
    lines.append(f"  licence     encoder: {adapter.encoder.licence or unknown}")
    if info.get("teacher") is not None:
        lines.append(f"              teacher: {info.get('teacher_licence') or unknown}")
    return "\n".join(lines)


def held_out_parts(adapter: Adapter) -> str:
    """Return what was held out in the training, in words."""
    if len(adapter.info["groups"]) == 1:
        return "held-out blocks of the one training group"
    return "held-out groups of the training data"


def _count(adapter: Adapter) -> str:
    n = len(adapter.genes)
    return f"{number(n, 'gene')}," if adapter.target_key is None else f"{number(n, 'column')} of"


def _some_groups(adapter: Adapter) -> list[str]:
    """Return a line about genes that only some training groups measured, if there are any."""
    n_groups = adapter.gene_scores.get("n_groups")  # missing in adapters saved by an earlier version
    if n_groups is None or (n_groups == len(adapter.info["groups"])).all():
        return []
    some = n_groups[n_groups < len(adapter.info["groups"])]
    return [f"              {len(some)} of them learned from {some.min()} to {some.max()} of the groups only"]


def _reading(adapter: Adapter) -> list[str]:
    """Return the lines about heads, with what each says alone on held-out groups, context and fields of view."""
    used, info = adapter.reading.use().members, adapter.info
    radii = [f"{radius:g}" for radius in adapter.reading.use().radii_um]
    context = f", with the neighbours within {' / '.join(radii)} um" if radii else ""
    out = [f"  head        {info['head']}{context}"]
    names = list(dict.fromkeys(member.name for member in used))
    for name in names if len(names) > 1 else ():
        own = [member for member in used if member.name == name]
        score = info.get("members", {}).get(name, {}).get("pearson")
        alone = "" if score is None or score != score else f", alone {score:.2f} (held-out Pearson, median)"
        out.append(f"              {sum(m.weight for m in own):.0%} {_described(name, own)}{alone}")
    if adapter.fields_um:
        widths = ", ".join(f"{width:g}" for width in adapter.fields_um)
        out.append(f"  fields      {widths} um around the tile, frozen features")
    if adapter.orientations > 1:
        out.append(f"  features    averaged over {adapter.orientations} orientations (test-time augmentation)")
    if adapter.stain is not None:
        out.append(f"  stain       {adapter.stain.method}, brought to the mean colours of the training sections")
    return out


def _described(name: str, members: Sequence[Member]) -> str:
    network, _, head = name.partition(":")
    depths = {source.depth for member in members for source in member.head.sources}
    if len(depths) > 1:
        return f"{network} encoder, {head}, mean over {len(depths)} depths"
    depth = next(iter(depths))
    return f"{network} encoder, {head}, {'own output' if depth is None else 'block ' + '+'.join(map(str, depth))}"
