from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pem_lightning.ablation.labels import Label, place_labels


def place(points, lines=()):
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    figure.draw_without_rendering()
    left_out = place_labels(axes, [Label(x, y, f"name {i}", "black") for i, (x, y) in enumerate(points)], lines)
    return axes, left_out


def boxes(axes):
    return [text.get_window_extent() for text in axes.texts]


def test_names_lie_across_neither_one_another_nor_points_nor_the_edge():
    points = [(5, 5), (5.1, 5), (5.2, 5.1), (5, 5.3), (9.9, 9.9), (0.1, 0.1)]
    axes, left_out = place(points)
    assert left_out == []
    assert len(axes.texts) == len(points)
    for one, other in combinations(boxes(axes), 2):
        assert not one.overlaps(other)
    frame = axes.get_window_extent()
    for box in boxes(axes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        for point in points:
            assert not box.contains(*axes.transData.transform(point))


def test_names_keep_off_error_bars():
    bars = [Bbox([[0, 5], [10, 5]]), Bbox([[5, 0], [5, 10]])]
    axes, _ = place([(5, 5)], bars)
    (box,) = boxes(axes)
    for bar in bars:
        assert not box.overlaps(axes.transData.transform_bbox(bar))


def test_where_there_is_no_room_a_name_is_left_out():
    _, left_out = place([(5, 5)] * 80)
    assert 0 < len(left_out) < 80
