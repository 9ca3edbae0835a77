"""Names in any script are drawn without a warning: with a font that has their letters, else as a number."""

import warnings
from pathlib import Path

import pytest

from epsd.figures import fonts, style


@pytest.fixture
def no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "other", lambda lacked: None)


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which some font has the letters."""
    monkeypatch.setattr(fonts, "other", lambda lacked: (Path("Gothic.ttc"), "Gothic"))


def test_letters_of_dejavu_are_known() -> None:
    assert fonts.lacking("Straße Ωμέγα кот ✓ …\n") == ""
    assert fonts.lacking("日本 日") == "日本"
    assert fonts.letters(Path(__file__)) == frozenset(), "no font"


def test_a_box_is_no_letter() -> None:
    """matplotlib brings a font that has a box for every letter that there is."""
    found = fonts.other("日")
    assert found is None or fonts.BOXES_ONLY not in found[1]


@pytest.mark.usefixtures("no_other")
def test_names_without_a_font_become_numbers() -> None:
    names = ["cat", "日本", "Ωμέγα"]
    assert fonts.shown(names) == ["cat", "#1", "Ωμέγα"]
    assert fonts.remark(names).startswith("#: number of the class") and fonts.remark(["cat"]) == ""
    assert fonts.drawable("cat 日本 9") == "cat □□ 9"
    assert fonts.file_of("日") == fonts.own() and fonts.families(["日", "a"]) == [fonts.FAMILY]


@pytest.mark.usefixtures("another")
def test_names_with_a_font_stay() -> None:
    assert fonts.shown(["cat", "日本"]) == ["cat", "日本"] and fonts.remark(["日本"]) == ""
    assert fonts.families(["cat", "日本"]) == [fonts.FAMILY, "Gothic"]
    assert fonts.file_of("日本") == Path("Gothic.ttc") and fonts.file_of("cat") == fonts.own()


def test_long_names_are_cut_and_stay_different() -> None:
    names = [f"a class whose name never ends, number {number}" for number in range(3)]
    told = fonts.shown(names)
    assert len(set(told)) == 3 and {len(name) for name in told} == {fonts.LONGEST}
    assert told[2].startswith("a class") and told[2].endswith("number 2")


@pytest.mark.usefixtures("another")
def test_wide_letters_count_twice() -> None:
    assert fonts.shown(["日本語" * 4, "日本語" * 5]) == ["日本語" * 4, "日本語日本…日本語日本語"]


def test_a_font_that_came_after_matplotlibs_list_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept from when matplotlib was first used on a machine."""
    from fontTools.ttLib import TTFont
    from matplotlib import font_manager

    with TTFont(fonts.own()) as font:
        for table in font["cmap"].tables:
            table.cmap[ord("日")] = "A"
        for name in (1, 4, 16):
            font["name"].setName("Late", name, 3, 1, 0x409)
        font.save(tmp_path / "late.ttf")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "late.ttf")])
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    for cached in (fonts.installed, fonts.other):
        cached.cache_clear()
    try:
        assert fonts.other("日") == (tmp_path / "late.ttf", "Late")
    finally:
        for cached in (fonts.installed, fonts.other):
            cached.cache_clear()


@pytest.mark.usefixtures("no_other")
def test_a_figure_is_saved_without_a_warning(tmp_path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = style.confusion(torch.eye(3), ["日本", "a $x$ b $y$", "cat" * 20])
        figure.suptitle("写真")
        style.save(figure, tmp_path / "confusion.png")
    words = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert words == {"#0", r"a \$x\$ b \$y\$", "catcatcatca…catcatcatcat"}
