"""The report's part on the judge: how its labels are shown and drawn, what is known of it, its marks."""

from bylaw.report.figures import Axis, Point, bars, scatter

TURN = "\u202egnp"


def test_a_hidden_character_does_not_reach_a_figure() -> None:
    x = Axis(TURN, 0.0, 1.0)
    for svg in (scatter(TURN, [Point(0.5, 0.5, TURN)], x, x), bars(TURN, [0.0, 1.0], [1], x, TURN)):
        assert "\u202e" not in svg and "⟨U+202E⟩gnp" in svg
