"""Pictures, read back: a rectangle per action, where and as long as it ran, in a colour of its own sort."""

import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from parallel.pipeline import draw as drawing
from parallel.pipeline.action import Action, Schedule
from parallel.pipeline.draw import COLOURS, DOTS_PER_INCH, draw
from parallel.pipeline.schedules import FORMS, make
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    width: float
    height: float
    colour: str

    @property
    def right(self) -> float:
        return self.left + self.width


def timeline(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    costs = costs or Costs()
    return simulate(schedule, costs.price(schedule))


def boxes(path: Path, group: str) -> list[Box]:
    """The rectangles of one group of an SVG, in the order in which they were drawn."""
    found = [node for node in ET.parse(path).iter(f"{SVG}g") if node.get("id") == group]
    assert len(found) == 1
    shapes = []
    for node in found[0].iter(f"{SVG}path"):
        corners = [tuple(map(float, xy)) for xy in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", node.get("d", ""))]
        xs, ys = zip(*corners, strict=True)
        colour = re.search(r"fill: (#\w+)", node.get("style", ""))
        assert len(corners) == 4 and colour
        shapes.append(Box(min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys), colour[1]))
    return shapes


def by_action(path: Path, mine: Timeline, index: int = 0) -> dict[Action, Box]:
    """Each action's rectangle: they are drawn rank by rank, in a pair the forward first."""
    actions = [
        action
        for spans in mine.spans
        for span in spans
        for action in sorted(span.slot, key=lambda action: action.kind, reverse=True)
    ]
    return dict(zip(actions, boxes(path, f"timeline-{index}"), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_every_action_is_where_and_as_long_as_it_ran(name: str, tmp_path: Path) -> None:
    mine = timeline(make(name, 4, 8), Costs(f=1, b=2.5, w=0.9, a2a=0.5))
    draw([mine], [name], tmp_path / "a.svg")
    found = by_action(tmp_path / "a.svg", mine)
    assert len(found) == sum(len(slot) for slots in mine.schedule.slots for slot in slots)
    origin = min(box.left for box in found.values())
    unit = (max(box.right for box in found.values()) - origin) / mine.makespan
    rows = defaultdict(set)
    for rank, spans in enumerate(mine.spans):
        for span in spans:
            for action in span.slot:
                assert (found[action].left - origin) / unit == pytest.approx(span.begin, abs=1e-3)
                assert found[action].width / unit == pytest.approx(span.end - span.begin, abs=1e-3)
            rows[rank].add(round(min(found[action].top for action in span.slot), 3))
    assert all(len(tops) == 1 for tops in rows.values())
    tops = [tops.pop() for tops in rows.values()]
    assert tops == sorted(tops) and len(set(tops)) == 4


def test_the_two_of_a_pair_lie_one_above_the_other(tmp_path: Path) -> None:
    mine = timeline(make("dualpipe", 4, 8))
    draw([mine], ["a"], tmp_path / "a.svg")
    found = by_action(tmp_path / "a.svg", mine)
    single = found[mine.schedule.slots[0][0][0]]
    pairs = [slot for slots in mine.schedule.slots for slot in slots if len(slot) > 1]
    assert pairs
    for slot in pairs:
        forward, backward = (found[action] for action in sorted(slot, reverse=True))
        assert (forward.left, forward.width) == (backward.left, backward.width)
        assert forward.height == pytest.approx(backward.height) == pytest.approx(single.height / 2)
        assert forward.top + forward.height == pytest.approx(backward.top)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "interleaved"])
def test_hue_is_the_kind_and_shade_the_stage(name: str, tmp_path: Path) -> None:
    mine = timeline(make(name, 4, 8))
    draw([mine], ["a"], tmp_path / "a.svg")
    found = by_action(tmp_path / "a.svg", mine)
    for rank, held in enumerate(mine.schedule.stages):
        for action in mine.schedule.actions(rank):
            assert found[action].colour == COLOURS[action.kind][held.index(action.stage)]


def test_a_third_stage_has_a_shade_of_its_own(tmp_path: Path) -> None:
    mine = timeline(make("interleaved", 2, 2, stages_per_rank=3))
    draw([mine], ["a"], tmp_path / "a.svg")
    found = by_action(tmp_path / "a.svg", mine)
    assert len({found[action].colour for action in found if action.kind == "F"}) == 3


def svg(mine: Timeline, folder: Path, title: str = "a") -> str:
    draw([mine], [title], folder / "a.svg")
    return (folder / "a.svg").read_text()


def test_every_microbatch_is_numbered_where_it_fits(tmp_path: Path) -> None:
    mine = timeline(make("dualpipe", 8, 20))
    written = Counter(re.findall(r"<!-- (\d+) -->", svg(mine, tmp_path)))
    due = Counter(str(action.microbatch) for rank in range(8) for action in mine.schedule.actions(rank))
    for microbatch in set(due) - {"0", "10"}:  # which are times, too
        assert written[microbatch] == due[microbatch]
    crowded = timeline(make("gpipe", 2, 2000))
    assert len(re.findall(r"<!-- \d+ -->", svg(crowded, tmp_path))) < 20


def test_exposed_communication_is_hatched(tmp_path: Path) -> None:
    schedule = make("1f1b", 2, 2)
    assert "<pattern" not in svg(timeline(schedule), tmp_path)
    hatched = svg(timeline(schedule, Costs(a2a=0.5)), tmp_path)
    assert "<pattern" in hatched and "only the wire is busy" in hatched


def test_the_legend_names_what_is_there(tmp_path: Path) -> None:
    sorts = {"weight gradients", "input gradients alone", "stepped in turn", "a rank's later stage"}
    expected = {"gpipe": set(), "zb-h1": {"weight gradients", "input gradients alone"}, "dualpipe": sorts}
    expected["1f1b-overlap"], expected["interleaved"] = {"stepped in turn"}, {"a rank's later stage"}
    for name, words in expected.items():
        picture = svg(timeline(make(name, 4, 8)), tmp_path)
        assert {sort for sort in sorts if f"<!-- {sort} -->" in picture} == words
        assert "<!-- forward -->" in picture
        assert ("<!-- backward -->" in picture) == (name != "zb-h1")  # there every W is apart


def test_titles_and_numbers(tmp_path: Path) -> None:
    picture = svg(timeline(make("dualpipe", 4, 8)), tmp_path, "DualPipe")
    assert "<!-- DualPipe -->" in picture
    assert (
        "<!-- makespan 26, bubble 2 (7.7%), peak activations 5 microbatches, weights held 2x -->" in picture
    )


def test_timelines_share_the_time_axis(tmp_path: Path) -> None:
    """A measured one lies below, begins at the left as well, and is to the same scale."""
    schedule = make("gpipe", 2, 3)
    simulated = timeline(schedule)
    later = [[Span(s.slot, 5 + 2 * s.begin, 5 + 2 * s.end) for s in mine] for mine in simulated.spans]
    measured = Timeline(schedule, tuple(map(tuple, later)))
    draw([simulated, measured], ["simulated", "measured"], tmp_path / "a.svg")
    above, below = (by_action(tmp_path / "a.svg", t, i) for i, t in enumerate((simulated, measured)))
    first = Action("F", 0, 0)
    assert above[first].left == below[first].left
    assert all(below[action].width == pytest.approx(2 * above[action].width, rel=1e-4) for action in above)
    assert max(box.top for box in above.values()) < min(box.top for box in below.values())


@pytest.mark.parametrize(("ranks", "microbatches"), [(8, 20), (16, 40)])
def test_png(ranks: int, microbatches: int, tmp_path: Path) -> None:
    draw([timeline(make("dualpipe", ranks, microbatches))], ["a"], tmp_path / "a.png")
    height, width, _ = imread(tmp_path / "a.png").shape
    assert 1500 < width <= 23 * DOTS_PER_INCH
    assert ranks * 0.25 * DOTS_PER_INCH < height < width / 1.5


def test_no_picture_is_too_tall_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "TALLEST", 4.0)
    draw([timeline(make("gpipe", 40, 1))], ["a"], tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[0] < 6 * DOTS_PER_INCH


def test_a_picture_replaces_its_file_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine, path = timeline(make("gpipe", 2, 2)), tmp_path / "a.png"
    draw([mine], ["a"], path)
    first = path.read_bytes()

    def fail(self: Figure, file, **options) -> None:
        file.write(b"half")
        raise OSError("no room")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no room"):
        draw([mine], ["a"], path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == first


def test_nothing_happened(tmp_path: Path) -> None:
    draw([timeline(make("gpipe", 2, 0))], ["a"], tmp_path / "a.svg")
    assert boxes(tmp_path / "a.svg", "timeline-0") == []
