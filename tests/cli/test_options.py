"""Option objects from the command line and from a configuration file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import pekasc as pk
from pekasc.cli import _arguments as arguments
from pekasc.cli import _options


def _app(seen: list[Any]) -> typer.Typer:
    """Return a command with subcommands that keep what they were given."""
    app = typer.Typer(rich_markup_mode=None)

    def fit(
        context: typer.Context,
        encoder: str = "tiny",
        train: list[str] | None = None,
        tile_px: arguments.TilePx = None,
        recipe: arguments.RecipeFields = None,
        readout: arguments.ReadoutFields = None,
        compute: arguments.ComputeFields = None,
        config: arguments.Config = None,
    ) -> None:
        given = {"recipe": recipe, "readout": readout, "compute": compute}
        objects = [_options.option_object(context, name, value) for name, value in given.items()]
        seen[:] = [encoder, train, tile_px, *objects]

    def tile(tile_px: arguments.TilePx = None, mpp: arguments.Mpp = None, config: arguments.Config = None) -> None:
        seen[:] = [tile_px, mpp]

    app.command()(fit)
    app.command()(tile)
    return app


@pytest.fixture
def call() -> Any:
    def run(*arguments: str | Path) -> Any:
        seen: list[Any] = []
        result = CliRunner().invoke(_app(seen), [str(argument) for argument in arguments], env={"COLUMNS": "400"})
        return seen if result.exit_code == 0 else (result.exit_code, " ".join(result.stderr.split()))

    return run


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("recipe", "epochs=3", {"epochs": 3}),
        ("recipe", "kd-weight=0.25", {"kd_weight": 0.25}),
        ("recipe", "blocks=all", {"blocks": "all"}),
        ("recipe", "blocks=2", {"blocks": 2}),
        ("recipe", "patience=none", {"patience": None}),
        ("recipe", "choose_epochs=false", {"choose_epochs": False}),
        ("recipe", "paper", "paper"),
        ("readout", "context_um=300", {"context_um": 300.0}),
        ("readout", "depth=best", {"depth": "best"}),
        ("readout", "depth=2,4", {"depth": (2, 4)}),
        ("readout", "depth=2", {"depth": 2}),
        ("readout", "depth=all", {"depth": "all"}),
        ("readout", "fields_um=224,448", {"fields_um": (224.0, 448.0)}),
        ("readout", "fields_um=448", {"fields_um": (448.0,)}),
        ("readout", "fields_um=auto", {"fields_um": "auto"}),
        ("readout", "fields_um=none", {"fields_um": None}),
        ("readout", "stain=macenko", {"stain": "macenko"}),
        ("readout", "context_um=auto", {"context_um": "auto"}),
        ("readout", "head_rank=8", {"head_rank": 8}),
        ("readout", "smooth_um=150", {"smooth_um": 150.0}),
        ("readout", "selection=best", {"selection": "best"}),
        ("readout", "members=frozen:ridge, adapted:low-rank", {"members": ("frozen:ridge", "adapted:low-rank")}),
        ("readout", "ridge", "ridge"),
        ("recipe", "quick", "quick"),
        ("compute", "device=cpu", {"device": "cpu"}),
        ("compute", "max_memory=1000", {"max_memory": 1000}),
        ("compute", "cached_activations=none", {"cached_activations": None}),
        ("compute", "cache=a folder", {"cache": "a folder"}),
        ("compute", 'trainer={devices = 2, strategy = "ddp"}', {"trainer": {"devices": 2, "strategy": "ddp"}}),
    ],
)
def test_values_have_the_types_of_the_fields(call: Any, name: str, text: str, expected: Any) -> None:
    found = dict(zip(("recipe", "readout", "compute"), call("fit", f"--{name}", text)[3:], strict=True))
    assert found[name] == expected and repr(found[name]) == repr(expected)
    assert all(value is None for other, value in found.items() if other != name)
    cls = {"recipe": pk.Recipe, "readout": pk.Readout, "compute": pk.Compute}[name]
    cls.preset(expected) if isinstance(expected, str) else cls(**expected)  # the call takes it


def test_a_preset_and_fields(call: Any) -> None:
    assert call("fit", "--recipe", "epochs=3", "--recipe", "paper")[3] == pk.Recipe.preset("paper").replace(epochs=3)
    # fields that only go together with the preset
    ridge = pk.Readout.preset("ridge").replace(n_depths=2)
    assert call("fit", "--readout", "ridge", "--readout", "n_depths=2")[4] == ridge
    assert call("fit", "--readout", "n_depths=2")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "epoch=3"], "Recipe has no field 'epoch'. Did you mean 'epochs'? Fields: rank, blocks, "),
        (["--recipe", "epochs=many"], "`epochs='many'` must be a whole number"),
        (["--recipe", "papr"], "`recipe='papr'` is no preset. Did you mean 'paper'?"),
        (["--readout", "context_um=-1"], "context_um"),
        (["--readout", "fields_um=wide"], "`fields_um='wide'` must be widths in um"),
        (["--readout", "members=frozen:rigde,adapted:ridge"], "Did you mean 'frozen:ridge'?"),
        (["--compute", "client=tcp://here"], "`client` must be a distributed.Client"),
    ],
)
def test_wrong_fields(call: Any, arguments: list[str], message: str) -> None:
    code, error = call("fit", *arguments)
    assert code == 2
    assert f"Invalid value for {arguments[0]}: `{arguments[0][2:]}" in error and message in error


CONFIG = """
readout = "paper"

[recipe]
epochs = 9
rank = 8
patience = "none"

[compute]
device = "cpu"

[tile]
tile_px = 56
mpp = 2.0

[fit]
encoder = "uni2-h"
train = ["P1S1_spots", "P2S1_spots"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "pekasc.toml"
    path.write_text(CONFIG)
    return path


def test_config_gives_defaults(call: Any, config: Path) -> None:
    encoder, train, tile_px, recipe, readout, compute = call("fit", "--config", config)
    assert (encoder, train, tile_px) == ("uni2-h", ["P1S1_spots", "P2S1_spots"], 56)
    # a file serves several commands: an instance, of which a call logs what does nothing in it
    assert recipe == pk.Recipe(epochs=9, rank=8) and isinstance(recipe, pk.Recipe)
    assert readout == "paper" and compute == pk.Compute(device="cpu")
    assert call("tile", "--config", config) == [56, 2.0]


def test_command_line_wins(call: Any, config: Path) -> None:
    given = ["--encoder", "tiny", "--tile-px", "112", "--recipe", "epochs=3", "--readout", "depth=2"]
    encoder, train, tile_px, recipe, readout, _ = call("fit", *given, "--config", config, "--train", "P3S1_spots")
    assert (encoder, train, tile_px) == ("tiny", ["P3S1_spots"], 112)
    assert recipe == pk.Recipe(epochs=3, rank=8)
    assert readout == pk.Readout.preset("paper").replace(depth=2)
    assert call("fit", "--recipe", "paper", "--config", config)[3] == "paper"  # in the place of the file's table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recipes]\nepochs = 3", "has a table [recipes], which is unknown. Did you mean 'recipe'? Known: fit, tile, "),
        ("[recipe]\nepoch = 3", "Recipe has no field 'epoch'. Did you mean 'epochs'?"),
        ("[fit]\nencodr = 'x'", "[fit] has no field 'encodr'. Did you mean 'encoder'? Known: encoder, train, "),
        ("[tile]\ntile_pixel = 3", "[tile] has no field 'tile_pixel'. Did you mean 'tile_px'? Known: tile_px, mpp."),
        ("[fit]\nrecipe = ['epochs=3']", "'recipe' has a table of its own: [recipe]"),
        ("[fit]\njson = true", "[fit] has no field 'json'"),
        ("[fit]\nencoder = ['a', 'b']", "'encoder' takes one value, got ['a', 'b']"),
        ("fit = 3", "'fit' must be a table, [fit], got 3"),
        ("[fit", "cannot be read"),
    ],
)
def test_wrong_config(call: Any, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    code, error = call("fit", "--config", tmp_path / "wrong.toml")
    assert code == 2 and message in error


def test_one_value_of_what_may_be_several(call: Any, tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("[fit]\ntrain = 'P1S1_spots'")
    assert call("fit", "--config", tmp_path / "one.toml")[1] == ["P1S1_spots"]


@pytest.mark.parametrize("nothing", ["none", "false", "False"])
def test_nothing_as_python_and_toml_say_it(nothing: str) -> None:
    grid = {"stride_um": None, "shape": None, "shapes": None, "min_sharpness": None}
    found = arguments.grid_arguments(tissue=nothing, min_tissue=nothing, max_pen="0.2", **grid)
    assert found == {"tissue": False, "min_tissue": None, "max_pen": 0.2}


def test_config_that_is_not_there(call: Any, tmp_path: Path) -> None:
    code, error = call("fit", "--config", tmp_path / "nothing.toml")
    assert code == 2 and "nothing.toml cannot be read" in error


def test_what_does_nothing_is_logged(call: Any, config: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pekasc"):
        call("tile", "--config", config)
    assert [r.message for r in caplog.records] == [
        f"{config}: [recipe], [readout], [compute] do nothing in `pekasc tile`."
    ]
