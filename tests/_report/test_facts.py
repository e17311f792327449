from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pekasc._report import _facts as say
from pekasc._report._facts import About


def _with(adapter: Any, pearson: list[float] | float, **info: Any) -> About:
    n = len(adapter.genes)
    values = np.broadcast_to(np.asarray(pearson, dtype=float), n) if np.ndim(pearson) == 0 else np.asarray(pearson)
    frame = pd.DataFrame({"pearson": values, "lowest": values, "highest": values}, index=adapter.gene_scores.index)
    return About(replace(adapter, gene_scores=frame, info={**adapter.info, **info}))


def test_what_it_can_be_used_for_follows_from_its_scores(adapter: Any, page: Any) -> None:
    n = len(adapter.genes)
    good = page(say.uses(_with(adapter, [0.6] * 3 + [0.3] * 2 + [0.1] * (n - 5))).text).text
    assert "each of the 3 genes of high trust" in good and "the 2 genes of medium trust" in good
    assert "no gene reaches medium trust" in page(say.uses(_with(adapter, 0.1)).text).text
    assert "For nothing yet" in page(say.uses(_with(adapter, np.nan)).text).text
    short = page(say.short(_with(adapter, [0.6] * 3 + [0.3] * 2 + [0.1] * (n - 5))).text).text
    assert f"3 of {n} genes can be trusted highly, 2 somewhat, {n - 5} hardly" in short
    assert "unknown: nothing was held out" in page(say.short(_with(adapter, np.nan)).text).text


def test_what_it_must_not_be_used_for(adapter: Any, page: Any) -> None:
    text = page(say.limits(About(adapter)).text).text
    for words in ("with each other within a tile", "Tissue that it never saw", "low trust", "Decisions about patients"):
        assert words in text
    assert "Commercial" not in text and "other patients" not in text
    licensed = replace(adapter, encoder=replace(adapter.encoder, licence="CC-BY-NC-ND-4.0"))
    assert (
        "Commercial work: the licence of the encoder (CC-BY-NC-ND-4.0)" in page(say.limits(About(licensed)).text).text
    )
    unc = replace(adapter, encoder=replace(adapter.encoder, licence="UNC-2"))
    assert "Commercial" not in page(say.limits(About(unc)).text).text
    assert "all training tissue is of one group" in page(say.limits(_with(adapter, 0.1, groups=["A"])).text).text


def test_licences_are_said_where_they_are_known(adapter: Any, page: Any) -> None:
    text = page(say.training(About(adapter)).text).text
    assert "licence: BSD-3-Clause" in text and "Teacher" not in text
    taught = _with(adapter, 0.1, teacher="pca", teacher_licence="none needed: fitted on the training spots")
    assert "licence: none needed: fitted on the training spots" in page(say.training(taught).text).text
    bare = replace(adapter, encoder=replace(adapter.encoder, licence=None))
    assert "licence: not stated: see where its weights come from" in page(say.training(About(bare)).text).text


def test_folds_and_what_could_have_leaked(adapter: Any, page: Any) -> None:
    found = page(say.folds(About(adapter)).text)
    assert "Whole groups were held out in turn" in found.text and "No score is of randomly held out spots" in found.text
    assert found.counts["tr"] == 3
    both = page(say.folds(_with(adapter, 0.1, groups=["A", "B", "C"], held_out=["A+B", "C"])).text)
    assert [text for tag, text in both.texts if tag == "td"] == ["A, B", "C", "C", "A, B"]
    sections = page(say.folds(_with(adapter, 0.1, sections=adapter.info["groups"])).text).text
    assert "If some are of the same patient, the scores are too good" in sections
    one = page(say.folds(_with(adapter, 0.1, groups=["A"], held_out=["block1", "block2"])).text).text
    assert "2 contiguous blocks of its tissue" in one and "too good for another patient" in one
    assert "Nothing was held out" in page(say.folds(_with(adapter, np.nan)).text).text


def test_intervals_and_their_promise(adapter: Any, page: Any) -> None:
    found = page(say.intervals(About(adapter)).text)
    assert "no promise for a new one" in found.text and "2 groups say little" in found.text
    shares = [text for tag, text in found.texts if tag == "td"]
    assert len(shares) == 2 and all(share.endswith("%") for share in shares)
    made = adapter.calibration
    exact = replace(adapter, calibration=replace(made, guarantee="exact", groups=tuple("abcdefghij")))
    text = page(say.intervals(About(exact)).text).text
    assert "on average over new groups" in text and "say little" not in text
    assert "There are none" in page(say.intervals(About(replace(adapter, calibration=None))).text).text
    some = made.threshold.copy()
    some[:2] = np.nan
    text = page(
        say.intervals(About(replace(adapter, calibration=replace(made, threshold=some), held_out=None))).text
    ).text
    assert "2 of 14 genes have no interval" in text


def test_adapters_that_keep_nothing_of_their_tiles(adapter: Any, page: Any) -> None:
    assert "keeps nothing of its training tiles" in page(say.novelty(About(replace(adapter, novelty=None))).text).text
    n = sum(adapter.novelty.n_tiles)
    assert f"(of {n})" in page(say.novelty(About(adapter)).text).text


def test_versions(adapter: Any, page: Any) -> None:
    text = page(say.versions(About(adapter)).text).text
    assert adapter.info["versions"]["torch"] in text and adapter.encoder_digest in text


def test_shares() -> None:
    assert [say.percent(level) for level in (0.9, 0.995)] == ["90%", "99.5%"]
    assert [say.share(value) for value in (0.123, float("nan"))] == ["12%", "–"]
