"""Recipe, Readout and Compute: what they take, how they read in an error, and what each call makes of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk
from pekasc._options import Compute, Readout, Recipe, resolve, resolve_recipe, unused_in_embedding, whole
from pekasc._settings import HINT

CLASSES = [Recipe, Readout, Compute]
NAMES = {Recipe: "recipe", Readout: "readout", Compute: "compute"}
MANY = {
    Recipe: Recipe(rank=8, blocks=2, n_clusters=4, kd_weight=1, learning_rate=1e-5, patience=2, gradient_clip=3),
    Readout: Readout(
        members=["frozen:ridge", "adapted:ridge-per-gene"], head_rank=3, n_components=9, depth=(2, 4), selection="best",
        context_um=300, smooth_um=200, fields_um=[448, 224],
    ),
    Compute: Compute(
        device="cuda:1", precision="bf16", max_memory=10, cache=Path("some") / "folder", resume="there",
        trainer={"devices": 2}, cached_activations=None, compile=True,
    ),
}  # fmt: skip


@pytest.fixture
def hints(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Return what returns the lines that a notebook shows."""
    with caplog.at_level(HINT, logger="pekasc"):
        yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= HINT]


def test_defaults_are_public_and_documented() -> None:
    assert (pk.Recipe, pk.Readout, pk.Compute) == (Recipe, Readout, Compute)
    recipe, readout, compute = Recipe(), Readout(), Compute()
    assert (recipe.rank, recipe.blocks, recipe.epochs, recipe.choose_epochs, recipe.n_views) == (64, "auto", 6, True, 8)
    assert (readout.head, readout.depth, readout.selection) == ("blend", "all", "average")
    assert (readout.context_um, readout.smooth_um, readout.fields_um) == ("auto", None, "auto")
    assert (readout.head_rank, readout.members, readout.n_depths, readout.n_components) == (None, None, None, None)
    assert (compute.device, compute.precision, compute.embed_batch_size, compute.cache) == ("auto", "fp32", 64, None)
    for cls in CLASSES:
        # Python 3.13 takes the indentation out of docstrings
        parameters = inspect.cleandoc(cls.__doc__).split("Parameters")[1].split("Examples")[0]
        lines = [line for line in parameters.splitlines() if line and not line.startswith(" ")]
        documented = {name for line in lines for name in line.split(", ")}
        missing = {field.name for field in dataclasses.fields(cls)} - documented
        assert not missing, f"{cls.__name__}: {missing}"


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_with_a_repr_that_can_be_typed_back(cls: type[Any]) -> None:
    assert repr(cls()) == f"{cls.__name__}()"
    for value in (cls(), MANY[cls], *(cls.preset(name) for name in cls._presets)):
        assert eval(repr(value)) == value
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(cls)[0].name, 1)
    # what is at its default is left out
    assert set(MANY[cls].changed()) == set(cls(**MANY[cls].changed()).changed())
    assert all(f"{name}=" in repr(MANY[cls]) for name in MANY[cls].changed())
    assert not cls().changed()


def test_readouts_and_recipes_are_keys() -> None:
    assert len({Readout(), Readout(fields_um="auto"), Readout(context_um=300), Readout(context_um=300.0)}) == 2
    assert len({Readout(fields_um=448), Readout(fields_um=(448.0,)), Readout(fields_um=None), Readout()}) == 3
    assert len({Recipe(), Recipe(rank=64), Recipe(epochs=3)}) == 2


def test_numbers_of_any_type_become_plain_ones() -> None:
    recipe = Recipe(rank=np.int64(8), kd_weight=np.float32(0.5), learning_rate=1, n_views=np.int32(4))
    assert repr(recipe) == "Recipe(rank=8, learning_rate=1.0, n_views=4)"
    readout = Readout(depth=np.int64(2), context_um=np.float64(10), fields_um=[300, np.float32(448)], orientations=2.0)
    assert repr(readout) == "Readout(depth=2, context_um=10.0, fields_um=(300.0, 448.0), orientations=2)"
    assert repr(Readout(fields_um=np.int64(448), head_rank=np.int8(3))) == "Readout(head_rank=3, fields_um=(448.0,))"
    assert repr(Readout(depth=[1, np.int8(3)])) == "Readout(depth=(1, 3))"
    assert repr(Compute(checkpoint_minutes=1, cache=Path("a"))) == "Compute(cache='a', checkpoint_minutes=1.0)"


def test_presets() -> None:
    for cls in CLASSES:
        assert cls.preset("default") == cls()
    paper = Recipe.preset("paper")
    assert (paper.rank, paper.blocks, paper.n_clusters, paper.teacher_components) == (256, "all", 100, 256)
    assert (paper.learning_rate, paper.weight_decay, paper.step_epochs, paper.epochs) == (1e-4, 0.0, 10, 50)
    assert not paper.choose_epochs and not paper.standardise_teacher and paper.n_views == 1
    quick = Recipe.preset("quick")
    assert quick.epochs == 0 and not quick.choose_epochs
    published = {"head": "ridge", "selection": "best", "context_um": None, "fields_um": None}
    assert Readout.preset("paper") == Readout(**published, depth="own", n_components=256)
    assert Readout.preset("ridge") == Readout(**published, depth="best", n_depths=1)
    assert Readout.preset("quick") == Readout(fields_um=None)


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    [
        (
            Recipe,
            "papers",
            r"^Recipe has no preset 'papers'\. Did you mean 'paper'\? Presets: \['default', 'quick', 'paper'\]\.$",
        ),
        (
            Readout,
            "rigde",
            r"^Readout has no preset 'rigde'\. Did you mean 'ridge'\? Presets: \['default', 'quick', 'ridge', '",
        ),
        (Compute, "paper", r"^Compute has no preset 'paper'\. Presets: \['default'\]\.$"),
    ],
)
def test_a_preset_that_does_not_exist(cls: type[Any], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls.preset(name)
    with pytest.raises(
        ValueError, match=rf"^`{NAMES[cls]}='{name}'` is no preset\..* a pekasc\.{cls.__name__}, or a m"
    ):
        resolve(name, cls, NAMES[cls])


def test_replace() -> None:
    recipe = Recipe(epochs=3)
    assert recipe.replace(rank=8) == Recipe(epochs=3, rank=8) and recipe == Recipe(epochs=3)
    assert Recipe.preset("paper").replace(epochs=1).blocks == "all"
    with pytest.raises(
        ValueError, match=r"^Recipe has no field 'epoch'\. Did you mean 'epochs'\? Fields: rank, blocks,"
    ):
        recipe.replace(epoch=3)
    with pytest.raises(ValueError, match="^`epochs=-1` must be a whole number, at least 0"):
        recipe.replace(epochs=-1)


WRONG_TYPES: dict[type[Any], dict[str, list[Any]]] = {
    Recipe: {
        **dict.fromkeys(("rank", "batch_size", "epochs", "cluster_head_epochs"), ["8", 8.5, None, True]),
        **dict.fromkeys(
            ("n_clusters", "teacher_components", "step_epochs", "patience", "cluster_head_patience"), ["8", 2.5, True]
        ),
        **dict.fromkeys(
            (
                "kd_weight", "matching_weight", "temperature", "learning_rate", "weight_decay", "gradient_clip",
                "cluster_head_learning_rate",
            ),
            ["1e-4", None, True],
        ),
        **dict.fromkeys(("choose_epochs", "standardise_teacher"), [1, "yes", None]),
        "blocks": [None, 1.5, True],
        "refit": [None, True, 1],
        "n_views": ["8", None, True],
    },
    Readout: {
        "head": [None, 3],
        "members": [3, (1, 2), ("frozen:ridge", None)],
        "selection": [None, 1],
        **dict.fromkeys(("n_components", "head_rank"), ["8", 2.5, True]),
        "depth": [None, 2.5, True, (), (1, "2"), (1.5,)],
        "n_depths": ["2", 1.5, True],
        **dict.fromkeys(("context_um", "smooth_um"), ["300", True, (300,), "best"]),
        "fields_um": ["448", (), True, (448, "2"), (True, 448), "all", {448: 1}],
        "orientations": ["2", None, True],
        "stain": [1, True, ["reinhard"]],
    },
    Compute: {
        "device": [0, None],
        "precision": [16, None],
        "embed_batch_size": ["64", 64.5, None, True],
        "max_memory": ["1GB", 1.5, True],
        "cache": [3],
        "resume": [3],
        "checkpoint_minutes": ["5", None, True],
        "client": ["localhost"],
        "trainer": [[("devices", 2)], "ddp"],
        "accumulate": ["2", 1.5, None, True],
        "gradient_checkpointing": [1, None],
        "stored_precision": [16, None],
        "compile": ["inductor", None],
        "cached_activations": [16, True],
    },
}  # fmt: skip
OUT_OF_RANGE: dict[type[Any], dict[str, list[Any]]] = {
    Recipe: {
        **dict.fromkeys(("rank", "batch_size", "cluster_head_epochs", "teacher_components", "step_epochs"), [0, -1]),
        **dict.fromkeys(("patience", "cluster_head_patience"), [0]),
        "epochs": [-1],
        "n_clusters": [1],
        **dict.fromkeys(
            ("temperature", "learning_rate", "gradient_clip", "cluster_head_learning_rate"),
            [0, -1.0, float("nan"), float("inf")],
        ),
        **dict.fromkeys(("matching_weight", "weight_decay"), [-0.1, float("nan")]),
        "kd_weight": [-0.1, 1.1, float("nan")],
        "blocks": [0, "some"],
        "n_views": [3, 0],
        "refit": ["all", "Last"],
    },
    Readout: {
        **dict.fromkeys(("n_components", "head_rank"), [0, -1]),
        "members": [("frozen:ridge",), ("frozen:ridge", "frozen:ridge"), "frozen:ridge"],
        "selection": ["mean"],
        "depth": ["bset"],
        "n_depths": [0],
        **dict.fromkeys(("context_um", "smooth_um"), [0, -1, float("inf")]),
        "fields_um": [(0,), (-448.0,), (448.0, 448.0), (float("inf"),), (float("nan"),)],
        "orientations": [3, 0],
        "stain": ["", "vahadane", "Reinhard"],
    },
    Compute: {
        "precision": ["fp8"],
        "embed_batch_size": [0],
        "max_memory": [0],
        "cache": ["s3://bucket/cache", ""],
        "resume": ["https://host/state", ""],
        "checkpoint_minutes": [-1, float("nan")],
        "accumulate": [0],
        "cached_activations": ["fp8"],
        "stored_precision": ["float64"],
    },
}


def _cases(table: Mapping[type[Any], Mapping[str, list[Any]]]) -> list[Any]:
    return [
        pytest.param(cls, name, value, id=f"{cls.__name__}.{name}={value!r}")
        for cls, rows in table.items()
        for name, values in rows.items()
        for value in values
    ]


def test_every_field_is_checked() -> None:
    for cls in CLASSES:
        assert set(WRONG_TYPES[cls]) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(("cls", "name", "value"), _cases(WRONG_TYPES))
def test_a_wrong_type(cls: type[Any], name: str, value: Any) -> None:
    said = rf"`{name}.*`" if name in ("trainer", "client") else rf"`{name}={_escaped(value)}`"
    with pytest.raises(TypeError, match=f"^{said}"):
        cls(**{name: value})
    with pytest.raises(TypeError, match=f"^`{NAMES[cls]}`: {said}"):
        resolve({name: value}, cls, NAMES[cls])


@pytest.mark.parametrize(("cls", "name", "value"), _cases(OUT_OF_RANGE))
def test_a_value_out_of_range(cls: type[Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^`{name}={_escaped(value)}` (must|is an address|is no path)"):
        cls(**{name: value})
    with pytest.raises(ValueError, match=f"^`{NAMES[cls]}`: `{name}={_escaped(value)}`"):
        resolve({name: value}, cls, NAMES[cls])


def _escaped(value: Any) -> str:
    return re.escape(repr(value))


def test_a_value_that_may_have_been_meant_is_named() -> None:
    with pytest.raises(ValueError, match=r"`blocks='al'` must be one of \['auto', 'all'\]\. Did you mean 'all'\?"):
        Recipe(blocks="al")
    with pytest.raises(ValueError, match=r"`depth='bset'` must be one of \['all', 'best', 'own'\], .* mean 'best'\?"):
        Readout(depth="bset")
    with pytest.raises(ValueError, match=r"`selection='avrage'` must be one of .* Did you mean 'average'\?"):
        Readout(selection="avrage")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`members`: 'frozen:lowrank' is none of .* Did you mean 'frozen:low-rank'\?"):
        Readout(members=("frozen:lowrank", "adapted:ridge"))


def test_a_blend_of_one_is_told_its_head() -> None:
    with pytest.raises(
        ValueError, match=r"must be at least two, each once: a blend of one is that head, such as `head="
    ):
        Readout(members=("frozen:low-rank",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Readout(n_depths=2, depth=6), r'`n_depths=2` .* `depth="best"` .*`depth=6` .*: leave one of them out'),
        (lambda: Readout(n_depths=2, depth="own"), "`depth='own'` .*: leave one of them out"),
        (lambda: Readout(depth=(1, 2)).replace(n_depths=2), "leave one of them out"),
        (lambda: Readout(n_depths=2), r"`n_depths=2` .*`depth='all'` .*: leave one of them out"),
        (lambda: Readout(head="ridge", head_rank=3), '`head_rank=3` is of a low-rank head, and `head="ridge"` is none'),
        (
            lambda: Readout(head="low-rank", members=("frozen:ridge", "adapted:ridge")),
            '`members=.*` are those of a blend, and `head="low-rank"` is none: leave one of them out',
        ),
        (lambda: Readout(members=("frozen:ridge", "adapted:ridge")).replace(head="ridge"), "leave one of them out"),
        (
            lambda: Readout(members=("adapted:ridge", "adapted:low-rank"), fields_um=448),
            "`fields_um=.* are read by the frozen members of a blend, and `members=.* are all adapted",
        ),
        (
            lambda: Recipe(refit="ensemble", epochs=0),
            '`refit="ensemble"` keeps the adapters of the inner folds, and `epochs=0` trains none',
        ),
        (
            lambda: Recipe(patience=2, choose_epochs=False),
            "`patience=2` .*`choose_epochs=False` .*: leave one of them out",
        ),
        (lambda: Recipe.preset("paper").replace(patience=2), "`patience=2` .*`choose_epochs=False`"),
        (
            lambda: Compute(precision="bf16", trainer={"precision": "bf16-mixed"}),
            "`precision='bf16'` .*`trainer`.*: leave one of them out",
        ),
    ],
)
def test_fields_that_contradict_each_other(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_of_the_trainer_are_a_mapping() -> None:
    with pytest.raises(TypeError, match="`trainer` must map arguments of lightning.Trainer to values, .* got int"):
        Compute(trainer=3)


def test_fields_that_go_together() -> None:
    assert Readout(n_depths=2, depth="best").depths == "best"
    assert Readout(depth=6).depths == (6,) and Readout(depth=(1, 2)).depths == (1, 2)
    assert Readout(depth="own").depths is None and Readout().depths == "all"
    assert Readout(head="low-rank", head_rank=5).head_rank == Readout(head_rank=5).head_rank == 5
    assert Compute(trainer={"precision": "bf16-mixed"}).precision == "fp32"
    assert Compute().memory(7) == 7 and Compute(max_memory=5).memory(7) == 5


@pytest.mark.parametrize("cls", CLASSES)
def test_what_an_argument_may_be(cls: type[Any]) -> None:
    label = NAMES[cls]
    assert resolve(None, cls, label) == cls() == resolve({}, cls, label) == resolve("default", cls, label)
    assert resolve(MANY[cls], cls, label) is MANY[cls]
    assert resolve(MANY[cls].changed(), cls, label) == MANY[cls]
    other = Readout if cls is Recipe else Recipe
    for value in (3, ["default"], other()):
        with pytest.raises(
            TypeError, match=rf"^`{label}` must be None, a pekasc\.{cls.__name__}, .* got {type(value).__name__}\.$"
        ):
            resolve(value, cls, label)


def test_an_unknown_field_is_told_the_known_ones() -> None:
    known = ", ".join(field.name for field in dataclasses.fields(Readout))
    with pytest.raises(
        ValueError, match=f"^`readout`: Readout has no field 'context'. Did you mean 'context_um'. Fields: {known}.$"
    ):
        resolve({"context": 300}, Readout, "readout")
    with pytest.raises(ValueError, match="^`readout`: Readout has no field 'qqq'. Fields: head, "):
        resolve({"qqq": 300}, Readout, "readout")


def test_a_field_that_does_nothing(hints: Callable[[], list[str]]) -> None:
    unused = {"rank": "nothing is trained", "epochs": "nothing is trained", "n_clusters": "there are none"}
    # in a mapping, which is written for this call
    with pytest.raises(
        ValueError, match="^`recipe`: 'rank' does nothing in this call: nothing is trained. Leave it out.$"
    ):
        resolve({"rank": 8}, Recipe, "recipe", unused=unused)
    with pytest.raises(ValueError, match="'rank' does nothing"):
        resolve({"rank": Recipe().rank}, Recipe, "recipe", unused=unused)  # whatever its value is
    assert resolve({"kd_weight": 0.3}, Recipe, "recipe", unused=unused) == Recipe(kd_weight=0.3)
    assert hints() == []
    # in an object, which may serve several calls: one line for all
    given = Recipe(rank=8, epochs=3, kd_weight=0.3)
    assert resolve(given, Recipe, "recipe", unused=unused) is given
    assert hints() == ["recipe: rank, epochs do nothing in this call: nothing is trained."]
    resolve("paper", Recipe, "recipe", unused=unused)
    assert len(hints()) == 2 and "rank, n_clusters, epochs do nothing" in hints()[1]
    resolve(Recipe(kd_weight=0.3), Recipe, "recipe", unused=unused)  # at its default it says nothing
    resolve(None, Recipe, "recipe", unused=unused)
    assert len(hints()) == 2


def test_what_does_nothing_where_nothing_is_trained() -> None:
    assert {"cache", "resume", "trainer", "compile"} <= set(unused_in_embedding()) <= set(Compute.__dataclass_fields__)
    assert set(unused_in_embedding(arrays=True)) - set(unused_in_embedding()) == {"client", "max_memory"}


def test_the_published_recipe_brings_the_published_features(hints: Callable[[], list[str]]) -> None:
    paper = Recipe.preset("paper")
    same: list[Any] = ["paper", paper, paper.changed()]
    for given in same:
        assert resolve_recipe(given, None) == (paper, "paper")
    brings = f'recipe="paper" brings readout="paper" with it: {Readout.preset("paper")!r}.'
    assert hints() == [brings] * 3
    # unless another is given, or it is another recipe
    own = Readout(context_um=300)
    for given, readout in (
        ("paper", own),
        ("paper", "default"),
        ("paper", {}),
        (paper.replace(epochs=3), None),
        (None, None),
    ):
        assert resolve_recipe(given, readout)[1] is readout
    # which the log says where it may surprise
    kept = 'recipe="paper" with the readout that was given.'
    differs = "published one but for epochs; the readout is the default"
    lines = hints()[3:]
    assert lines[:3] == [kept] * 3 and differs in lines[3] and len(lines) == 4


def test_readouts_share_a_training_whose_depth_is_chosen_alike() -> None:
    """Their results are then the same beside others and alone."""
    from pekasc.tl._options import resolve_comparison

    readouts = [Readout(), Readout(n_components=10), Readout(head="ridge"), Readout(n_components=10, context_um=None)]
    found = resolve_comparison(["bone"], "tiny", "pca", "nested", [0], None, readouts, None)
    assert found.shared_readouts() == [readouts[::2], readouts[1::2]]


def test_calls_bring_the_published_features(hints: Callable[[], list[str]]) -> None:
    from pekasc.tl._options import resolve_comparison, resolve_fit

    fit = resolve_fit("tiny", "pca", "bone", "paper", None, None, 0, False)
    assert fit.options.recipe == Recipe.preset("paper") and fit.options.readout == Readout.preset("paper")
    found = resolve_comparison(["bone"], "tiny", "pca", "nested", [0], "paper", None, None)
    assert found.recipe == Recipe.preset("paper") and found.readouts == [Readout.preset("paper")]
    assert sum("brings" in line for line in hints()) == 2
    other = resolve_fit("tiny", "pca", "bone", "paper", Readout(depth=2), None, 0, False)
    assert other.options.readout == Readout(depth=2)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"recipe": {"epoch": 3}}, ValueError, "`recipe`: Recipe has no field 'epoch'. Did you mean 'epochs'"),
        ({"recipe": {"epochs": "3"}}, TypeError, "`recipe`: `epochs='3'` must be a whole number"),
        ({"recipe": "paperr"}, ValueError, "`recipe='paperr'` is no preset. Did you mean 'paper'"),
        ({"recipe": Readout()}, TypeError, "`recipe` must be None, a pekasc.Recipe, .* got Readout"),
        (
            {"method": None, "recipe": {"rank": 8}},
            ValueError,
            "`recipe`: 'rank' does nothing in this call: .*method=None",
        ),
        (
            {"readout": {"n_depths": 2}},
            ValueError,
            "'n_depths' does nothing in this call: an adapter is trained at one",
        ),
        ({"readout": {"fields_um": (-1,)}}, ValueError, r"`readout`: `fields_um=\(-1,\)` must be widths in um beyond"),
        ({"readout": {"head": "rigde"}}, ValueError, "`head='rigde'` is not known. Close names: ridge"),
        (
            {"method": None, "readout": {"members": ("adapted:ridge", "adapted:low-rank")}},
            ValueError,
            r"`members=\('adapted:ridge', 'adapted:low-rank'\)` are all adapted, and with `method=None` nothing",
        ),
        ({"compute": {"client": None}}, ValueError, "`compute`: 'client' does nothing in this call"),
        ({"compute": {"precision": "fp8"}}, ValueError, "`compute`: `precision='fp8'` must be one of"),
        ({"method": None, "compute": {"cache": "x"}}, ValueError, "'cache' does nothing in this call: .*method=None"),
    ],
)
def test_a_fit_checks_its_options_before_it_reads_anything(
    how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pk.tl.fit_adapter(SpatialData(tables={"table": _table()}), **how)


def _table() -> Any:
    from anndata import AnnData

    return AnnData(np.ones((3, 2), dtype=np.float32))


def test_an_object_that_serves_several_calls_is_taken_as_it_is(hints: Callable[[], list[str]]) -> None:
    from pekasc.tl._options import resolve_fit

    recipe, compute = Recipe(rank=8, epochs=2), Compute(device="cpu", accumulate=2)
    with_adapter = resolve_fit("tiny", "pca", "bone", recipe, None, compute, 0, False)
    assert with_adapter.options.recipe is recipe and not any("do nothing" in line for line in hints())
    frozen = resolve_fit("tiny", "pca", None, recipe, None, compute, 0, False)
    assert frozen.options.recipe is recipe
    idle = [line for line in hints() if "do nothing" in line]
    assert len(idle) == 2
    assert idle[0].startswith("recipe: rank, epochs do nothing") and idle[1].startswith("compute: accumulate do")


def test_whole_numbers() -> None:
    assert whole("n", np.int16(3)) == 3 and type(whole("n", np.int16(3))) is int
    for value in (3.0, "3", None, True):
        with pytest.raises(TypeError, match=f"^`n={value!r}` must be a whole number of spots.$"):
            whole("n", value, unit=" of spots")
    with pytest.raises(ValueError, match="^`n=1` must be a whole number, at least 2.$"):
        whole("n", 1, least=2)


def test_options_are_there_without_torch() -> None:
    code = (
        "import sys, pekasc._options as o; o.resolve({'rank': 8}, o.Recipe, 'recipe'); o.Readout(); o.Compute(); "
        "print([name for name in ('torch', 'anndata', 'spatialdata', 'peft', 'distributed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def _public() -> list[tuple[str, Callable[..., Any]]]:
    rooms: list[ModuleType] = [pk.pp, pk.tl, pk.pl, pk.get, pk.io, pk.datasets]
    return [(f"{room.__name__}.{name}", getattr(room, name)) for room in rooms for name in room.__all__]


# a user reads what a call takes: as many arguments as DESIGN allows
MOST = {"pekasc.tl.fit_adapter": 20, "pekasc.tl.cross_validate": 22, "pekasc.tl.leakage_audit": 22}


@pytest.mark.parametrize(("name", "call"), _public(), ids=lambda value: value if isinstance(value, str) else "")
def test_calls_have_few_arguments_and_all_by_name(name: str, call: Callable[..., Any]) -> None:
    parameters = inspect.signature(call).parameters
    assert len(parameters) <= MOST.get(name, 15)
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters.values()), "no *args, **options"
    for option in CLASSES:
        if NAMES[option] in parameters:
            assert parameters[NAMES[option]].default is None
    # what the option objects have is said there alone
    theirs = {f.name for option in CLASSES if NAMES[option] in parameters for f in dataclasses.fields(option)}
    assert not theirs & set(parameters)


def test_an_audit_takes_what_a_comparison_takes() -> None:
    audit = inspect.signature(pk.tl.leakage_audit).parameters
    comparison = inspect.signature(pk.tl.cross_validate).parameters
    assert set(comparison) - set(audit) == {"folds", "per_gene", "block_um", "n_bootstrap"}
    assert set(audit) - set(comparison) == {"random_state"}  # of the random folds
    for name in set(audit) & set(comparison) - {"methods"}:
        assert audit[name].default == comparison[name].default, name


def test_calls_that_fit_take_the_same_three() -> None:
    def taken(call: Callable[..., Any]) -> set[str]:
        return set(inspect.signature(call).parameters) & set(NAMES.values())

    assert all(taken(call) == set(NAMES.values()) for call in (pk.tl.fit_adapter, pk.tl.cross_validate))
    assert taken(pk.tl.embed_tiles) == {"readout", "compute"}
    assert all(taken(call) == {"compute"} for call in (pk.tl.embed_expression, pk.tl.predict_expression))
    assert all(taken(call) == {"compute"} for call in (pk.Adapter.embed, pk.Adapter.predict))
