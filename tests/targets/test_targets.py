from pathlib import Path

import pytest

from exitify.targets import FOLDER, TargetError, load_target, target_names


@pytest.mark.parametrize("name", target_names())
def test_every_board_that_comes_along_loads_and_is_called_by_its_file(name):
    assert load_target(name).name == name


def test_a_board_in_a_file_of_ones_own_is_read_by_its_path(tmp_path: Path):
    mine = tmp_path / "mine.toml"
    mine.write_text((FOLDER / "orin-nano-8gb.toml").read_text())
    assert load_target(str(mine)).gpu.architecture == "sm_87"


def test_an_unknown_board_is_refused_with_those_there_are():
    with pytest.raises(TargetError, match="there is no target 'orin-9000'") as caught:
        load_target("orin-9000")
    assert "agx-orin-64gb" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("cores = 6", "cores = 'six'"), r"mine.toml.cpu.cores is 'six', not an integer"),
        (("memory_gib = 8\n", "memory_gb = 8\n"), r"mine.toml has an unknown field 'memory_gb'"),
        (('gpu = "NVIDIA', 'cuda = "NVIDIA'), r"mine.toml gives no source for gpu"),
        (("[cpu]", "[cpu"), r"mine.toml is not TOML"),
    ],
)
def test_a_board_with_a_wrong_misspelt_or_unsourced_figure_is_refused(tmp_path: Path, change, problem):
    mine = tmp_path / "mine.toml"
    text = (FOLDER / "orin-nano-8gb.toml").read_text()
    assert change[0] in text
    mine.write_text(text.replace(*change, 1))
    with pytest.raises(TargetError, match=problem):
        load_target(str(mine))
