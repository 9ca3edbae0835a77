"""A grid: every point once, without what a point has no use for."""

from epsd.engine.grid import points


def test_the_last_axis_is_the_fastest() -> None:
    found = list(points({"a": [1, 2], "b": ["x", {"y": 1}]}))
    assert found == [{"a": 1, "b": "x"}, {"a": 1, "b": {"y": 1}}, {"a": 2, "b": "x"}, {"a": 2, "b": {"y": 1}}]
    assert list(points({})) == [{}]


def test_a_point_has_no_value_where_an_axis_does_not_exist_and_is_there_once() -> None:
    found = list(points({"a": [1, 2, 1], "b": [3, 4]}, lambda axis, point: axis == "a" or point["a"] == 2))
    assert found == [{"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
