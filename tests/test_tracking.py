"""Ids that persist over the frames of made-up videos whose truth is known."""

import math
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from mask2former.tracking import Region, Tracker, regions_of

SIZE = (96, 128)
CHANNELS = 32
IS_THING = (True, True, False, False)
Place = Callable[[int], tuple[float, float] | None]


def appearance(seed: int) -> np.ndarray:
    """A random direction: two of them are hardly similar."""
    vector = np.random.default_rng(1000 + seed).normal(size=CHANNELS)
    return vector / np.linalg.norm(vector)


@dataclass
class Thing:
    """A shape that moves; ``place`` gives the middle (y, x) in a frame, or None while it is not there."""

    truth: int
    place: Place
    radius: float = 9
    square: bool = False
    label: int = 0
    look: np.ndarray | None = None

    @property
    def embedding(self) -> np.ndarray:
        return appearance(self.truth) if self.look is None else self.look


class Shown(NamedTuple):
    """One frame as a network gives it, and which object each segment truly is."""

    truths: list[int]
    regions: list[Region]
    labels: list[int]
    embeddings: np.ndarray


def bounce(y: float, x: float, dy: float, dx: float, margin: float = 10) -> Place:
    """Straight lines between the walls."""

    def fold(value: float, limit: float) -> float:
        span = limit - 2 * margin
        turned = (value - margin) % (2 * span)
        return margin + (turned if turned <= span else 2 * span - turned)

    return lambda frame: (fold(y + dy * frame, SIZE[0]), fold(x + dx * frame, SIZE[1]))


def show(things: Sequence[Thing], frame: int, rng: np.random.Generator, noise: float = 0.2) -> Shown:
    """Paint the things, later ones on top, and find those of which a part is seen.

    Features of one object have a similarity of about 0.96 from frame to frame, as real ones have (docs/video.md); those
    of a segment of which much is hidden are noisier, up to three times.
    """
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    canvas = np.zeros(SIZE, np.int32)
    full = {}
    for number, thing in enumerate(things, start=1):
        place = thing.place(frame)
        if place is None:
            continue
        y, x = abs(rows - place[0]), abs(columns - place[1])
        mask = np.maximum(y, x) < thing.radius if thing.square else np.hypot(y, x) < thing.radius
        full[number] = np.count_nonzero(mask)
        canvas[mask] = number
    seen = [n for n in full if np.count_nonzero(canvas == n) >= 0.2 * max(full[n], 1)]
    embeddings = np.zeros((len(seen), CHANNELS))
    for row, number in enumerate(seen):
        hidden = 1 - np.count_nonzero(canvas == number) / full[number]
        disturbance = rng.normal(size=CHANNELS) * noise * (1 + 2 * hidden) / math.sqrt(CHANNELS)
        embeddings[row] = 7 * (things[number - 1].embedding + disturbance)
    chosen = [things[n - 1] for n in seen]
    return Shown([t.truth for t in chosen], regions_of(canvas, seen), [t.label for t in chosen], embeddings)


class Score(NamedTuple):
    """How well ids follow the truth over a video.

    Attributes:
        switches: times that an object has another id than when it was last seen.
        strangers: ids that were given to more than one object.
        ids: distinct ids in all.
    """

    switches: int
    strangers: int
    ids: int


def score(truths: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> Score:
    """Compare, frame by frame, which object a segment is and which id it got."""
    last: dict[int, int] = {}
    owners: dict[int, set[int]] = {}
    switches = 0
    for true, given in zip(truths, found, strict=True):
        for thing, number in zip(true, given, strict=True):
            switches += last.get(thing, number) != number
            last[thing] = number
            owners.setdefault(number, set()).add(thing)
    return Score(switches, sum(len(owner) > 1 for owner in owners.values()), len(owners))


def tracked(frames: Iterator[Shown], **gates: Any) -> tuple[list[list[int]], list[list[int]]]:
    """True and found ids of every frame."""
    tracker = Tracker(is_thing=IS_THING, **gates)
    truths, found = [], []
    for frame in frames:
        truths.append(frame.truths)
        found.append(tracker.update(frame.regions, frame.labels, frame.embeddings, SIZE))
    return truths, found


def film(things: Sequence[Thing], count: int, seed: int = 0, noise: float = 0.2) -> Iterator[Shown]:
    rng = np.random.default_rng(seed)
    return (show(things, frame, rng, noise) for frame in range(count))


def at(y: float, x: float) -> Place:
    return lambda frame: (y, x)


def absent(place: Place, first: int, count: int) -> Place:
    """Not there for ``count`` frames from ``first`` on."""
    return lambda frame: None if first <= frame < first + count else place(frame)


def test_300_frames_without_occlusion_have_no_switch() -> None:
    things = [
        Thing(i, bounce(8 + 16 * i, 20 + 10 * i, 0, (-1) ** i * (0.7 + 0.4 * i)), 6, i % 2 == 0, label=i % 2)
        for i in range(6)
    ]
    assert score(*tracked(film(things, 300))) == Score(switches=0, strangers=0, ids=6)


def crowd(count: int, seed: int, look: np.ndarray | None = None) -> list[Thing]:
    """Things of one class that cross and hide each other in all directions."""
    rng = np.random.default_rng(seed)
    things = []
    for i in range(count):
        y, x, dy, dx = rng.uniform((10, 10, -3, -3), (86, 118, 3, 3))
        things.append(Thing(i, bounce(y, x, dy, dx), rng.uniform(6, 12), bool(i % 2), look=look))
    return things


def test_300_frames_of_a_crowd_that_hides_itself_have_no_switch() -> None:
    frames = list(film(crowd(8, seed=1), 300))
    hidden = sum(len(frame.truths) < 8 for frame in frames)
    assert hidden > 30  # the video does test occlusions
    assert score(*tracked(iter(frames))) == Score(switches=0, strangers=0, ids=8)


def test_a_crowd_with_noisier_features_has_few_switches() -> None:
    """2 switches were seen: an id that does not return, since a sliver of the object comes into view first."""
    result = score(*tracked(film(crowd(8, seed=1), 300, noise=0.3)))
    assert result.switches <= 4
    assert result.strangers == 0


def test_a_crowd_of_twins_has_few_switches() -> None:
    """Where all look the same only the place is left: 2 switches were seen, two that exchanged their ids."""
    result = score(*tracked(film(crowd(8, seed=0, look=appearance(0)), 300)))
    assert result.switches <= 4
    assert result.ids <= 9


def test_noise_that_hides_the_looks_is_seen_by_the_metric() -> None:
    """The metric can fail: with features of pure noise nothing is known again."""
    result = score(*tracked(film(crowd(8, seed=1), 60, noise=30.0)))
    assert result.switches > 100


@pytest.mark.parametrize("square", [False, True])
def test_equal_shapes_that_cross_are_told_apart_by_their_looks(square: bool) -> None:
    things = [
        Thing(0, lambda frame: (48, 20 + 2 * frame), square=square),
        Thing(1, lambda frame: (50, 108 - 2 * frame), square=square),
    ]
    assert score(*tracked(film(things, 45))) == Score(switches=0, strangers=0, ids=2)


def test_ids_follow_the_looks_when_two_change_places() -> None:
    """From one frame to the next each stands where the other stood."""
    left, right = (48.0, 52.0), (48.0, 72.0)
    things = [
        Thing(0, lambda frame: left if frame < 5 else right),
        Thing(1, lambda frame: right if frame < 5 else left),
    ]
    assert score(*tracked(film(things, 10), max_step=0.2)) == Score(switches=0, strangers=0, ids=2)


def test_ids_follow_the_place_when_the_looks_are_equal() -> None:
    look = appearance(0)
    things = [Thing(0, at(48, 40), look=look), Thing(1, at(48, 62), look=look)]
    assert score(*tracked(film(things, 20))) == Score(switches=0, strangers=0, ids=2)


def test_another_object_at_the_same_place_is_new() -> None:
    things = [Thing(0, absent(at(48, 64), 5, 100)), Thing(1, absent(at(48, 64), 0, 5))]
    truths, found = tracked(film(things, 10))
    assert truths == [[0]] * 5 + [[1]] * 5
    assert found == [[1]] * 5 + [[2]] * 5


@pytest.mark.parametrize(("missed", "returns"), [(1, True), (4, True), (5, True), (6, False), (20, False)])
@pytest.mark.parametrize("step", [0.0, 1.5])
def test_an_id_returns_after_at_most_max_age_frames(missed: int, returns: bool, step: float) -> None:
    """Also if the object has moved away from its last mask behind what hid it."""
    thing = Thing(0, absent(lambda frame: (48, 20 + step * frame), 5, missed), radius=5)
    _, found = tracked(film([thing], 10 + missed), max_age=5)
    assert found == [[1]] * 5 + [[]] * missed + [[1 if returns else 2]] * 5


def test_max_age_0_forgets_at_once() -> None:
    _, found = tracked(film([Thing(0, absent(at(48, 64), 2, 1))], 4), max_age=0)
    assert found == [[1], [1], [], [2]]


def test_an_object_that_is_far_away_is_another_one() -> None:
    """Two frames, too few to get there: the distance is 60 of 160 pixels, and two steps of 0.05 are 16."""
    jump: Place = lambda frame: (48, 30) if frame < 3 else (48, 90)  # noqa: E731
    frames = list(film([Thing(0, absent(jump, 3, 1))], 6))
    assert tracked(iter(frames))[1] == [[1], [1], [1], [], [2], [2]]
    assert tracked(iter(frames), max_step=0.2)[1] == [[1], [1], [1], [], [1], [1]]


def test_segments_that_are_missed_now_and_then_keep_their_ids() -> None:
    rng = np.random.default_rng(5)
    frames = []
    for frame in film(crowd(5, seed=3), 100):
        keep = [i for i in range(len(frame.truths)) if rng.random() > 0.15]
        chosen = ([column[i] for i in keep] for column in frame[:3])
        frames.append(Shown(*chosen, frame.embeddings[keep]))
    assert sum(len(frame.truths) for frame in frames) < 450
    assert score(*tracked(iter(frames))) == Score(switches=0, strangers=0, ids=5)


def flipped(label: int) -> Iterator[Shown]:
    """A thing of class 0 that has another class in frame 3."""
    for number, frame in enumerate(film([Thing(0, lambda frame: (48, 40 + frame))], 6)):
        yield frame._replace(labels=[label]) if number == 3 else frame


def test_a_class_that_flips_for_one_frame_keeps_the_id() -> None:
    assert tracked(flipped(1))[1] == [[1]] * 6


def test_a_flip_can_be_forbidden_and_the_id_returns_after_it() -> None:
    assert tracked(flipped(1), min_overlap_other_class=2.0)[1] == [[1], [1], [1], [2], [1], [1]]


def test_a_flip_to_stuff_takes_the_id_of_the_stuff() -> None:
    assert tracked(flipped(2))[1] == [[1], [1], [1], [2], [1], [1]]


def test_a_segment_of_the_own_class_goes_before_one_of_another() -> None:
    """Both overlap the track and look like it."""
    tracker = Tracker(is_thing=IS_THING, min_overlap_other_class=0.3, memory=0.0)
    look = np.ones((1, 3))
    tracker.update([block(0, 0, 10, 10)], [0], look, SIZE)
    halves = [block(0, 0, 10, 6), block(0, 6, 10, 4)]
    assert tracker.update(halves, [1, 0], np.ones((2, 3)), SIZE) == [2, 1]


def block(top: int, left: int, height: int, width: int) -> Region:
    return Region(top, left, np.ones((height, width), bool), height * width)


def test_the_best_matches_together_are_chosen_and_not_the_best_one_first() -> None:
    """Similarities [[0.95, 0.9], [0.9, 0.1]]: taking 0.95 first would leave the second track without a segment."""
    angles = np.arccos([0.95, 0.9])
    tracks = np.array([[1.0, 0, 0], [math.cos(angles[0] + angles[1]), math.sin(angles[0] + angles[1]), 0]])
    first = np.array([math.cos(angles[0]), math.sin(angles[0]), 0])
    second = np.array([0.9, -math.sqrt(1 - 0.81) * 0.98, math.sqrt(1 - 0.81) * math.sqrt(1 - 0.98**2)])
    segments = np.stack([first, second])
    similarities = tracks @ segments.T
    np.testing.assert_allclose(similarities[:, 0], [0.95, 0.9], atol=1e-6)
    assert similarities[0, 1] == pytest.approx(0.9) and similarities[1, 1] < 0.5
    tracker = Tracker(is_thing=IS_THING, min_overlap_other_class=9.0)
    same = [block(10, 10, 5, 5), block(10, 10, 5, 5)]
    assert tracker.update(same, [0, 0], tracks, SIZE) == [1, 2]
    assert tracker.update(same, [0, 0], segments, SIZE) == [2, 1]


def test_two_tracks_cannot_take_one_segment() -> None:
    things = [Thing(0, at(48, 40)), Thing(1, absent(at(48, 60), 3, 100), look=appearance(0))]
    assert tracked(film(things, 6))[1] == [[1, 2]] * 3 + [[1]] * 3


def test_a_track_of_the_last_frame_goes_before_one_that_was_hidden() -> None:
    """A hidden twin has left a track beside it; the object moves a little towards that place."""
    look = appearance(0)
    things = [
        Thing(0, lambda frame: (48, 50 if frame < 6 else 54), look=look),
        Thing(1, absent(at(48, 69), 3, 100), look=look),
    ]
    assert tracked(film(things, 9))[1] == [[1, 2]] * 3 + [[1]] * 6


def test_empty_frames_and_an_empty_first_frame() -> None:
    thing = Thing(0, absent(at(48, 64), 0, 2))
    thing.place = absent(thing.place, 4, 3)
    assert tracked(film([thing], 9))[1] == [[], [], [1], [1], [], [], [], [1], [1]]


def test_stuff_has_one_id_a_class_however_long_it_was_away() -> None:
    things = [
        Thing(0, at(20, 20), label=2),
        Thing(1, absent(at(70, 100), 3, 40), label=3),
        Thing(2, absent(at(70, 20), 0, 2), label=2),  # a second segment of class 2
        Thing(3, at(20, 100), label=0),
    ]
    _, found = tracked(film(things, 50), max_age=5)
    assert found[0] == found[1] == [1, 2, 3]
    assert found[2] == [1, 2, 1, 3]
    assert found[10] == [1, 1, 3]
    assert found[49] == [1, 2, 1, 3]


def test_ids_are_never_given_twice() -> None:
    """Every few frames another object, and none of them lives longer than tracks are kept."""
    things = [Thing(i, lambda frame, i=i: (48, 64) if frame // 4 == i else None) for i in range(50)]  # type: ignore[misc]
    result = score(*tracked(film(things, 200), max_age=2))
    assert result == Score(switches=0, strangers=0, ids=50)


def test_reset_forgets_everything_and_goes_on_counting() -> None:
    tracker = Tracker(is_thing=IS_THING)
    regions, looks = [block(0, 0, 4, 4), block(20, 20, 4, 4)], np.eye(2, CHANNELS)
    assert tracker.update(regions, [0, 2], looks, SIZE) == [2, 1]
    tracker.reset()
    assert len(tracker) == 0
    assert tracker.update(regions, [0, 2], looks[:, :5], (50, 50)) == [4, 3]


def strangers(count: int, rng: np.random.Generator) -> Shown:
    """Segments that have nothing to do with those of any other frame."""
    regions = [block(*rng.integers(0, 60, 2).tolist(), 20, 20) for _ in range(count)]
    return Shown([0] * count, regions, [0] * count, rng.normal(size=(count, 256)))


def growth(max_age: int) -> tuple[float, int]:
    """How many times more memory a tracker holds after 300 frames than after 60, and its most tracks."""
    rng = np.random.default_rng(0)
    tracker = Tracker(is_thing=IS_THING, max_age=max_age)
    most, early, late = 0, 0, 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(1, 301):
            frame = strangers(4, rng)
            tracker.update(frame.regions, frame.labels, frame.embeddings, SIZE)
            most = max(most, len(tracker))
            del frame
            late = tracemalloc.get_traced_memory()[0] - before
            early = late if number == 60 else early
    finally:
        tracemalloc.stop()
    return late / early, most


def test_memory_is_flat_over_300_frames_of_ever_new_objects() -> None:
    ratio, most = growth(max_age=10)
    assert most <= 4 * 11
    assert ratio < 1.1


def test_memory_grows_if_nothing_is_forgotten() -> None:
    """The test above can fail."""
    ratio, most = growth(max_age=1000)
    assert most > 1000
    assert ratio > 4


def test_a_track_keeps_nothing_of_the_frame_but_its_own_pixels() -> None:
    mask = np.zeros((500, 500), bool)
    mask[100:110, 200:220] = True
    for region in (Region.of(mask), regions_of(mask.astype(np.int32), [1])[0]):
        assert region.mask.base is None
        assert region.mask.nbytes == 200
    embeddings = np.ones((100, 64), np.float32)
    tracker = Tracker(is_thing=IS_THING)
    tracker.update([Region.of(mask)], [0], embeddings[:1], SIZE)
    assert tracker._tracks[0].embedding.base is None


def test_regions_and_their_overlap_equal_those_of_whole_masks() -> None:
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 4, (9, 11)).astype(np.int32)
    ids[:, 8:] = 0
    for number, region in zip([3, 1, 2], regions_of(ids, [3, 1, 2]), strict=True):
        whole = np.zeros(ids.shape, bool)
        h, w = region.mask.shape
        whole[region.top : region.top + h, region.left : region.left + w] = region.mask
        np.testing.assert_array_equal(whole, ids == number)
        assert region.area == whole.sum()
        assert Region.of(ids == number).mask.shape == region.mask.shape
    for _ in range(50):
        masks = [np.zeros((12, 15), bool) for _ in range(2)]
        for mask in masks:
            y, x = rng.integers(0, 8, 2)
            mask[y : y + 5, x : x + 6] = rng.random((5, 6))[: 12 - y, : 15 - x] > 0.5
        expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert Region.of(masks[0]).overlap(Region.of(masks[1])) == pytest.approx(expected)


def test_middle_of_a_region() -> None:
    assert block(10, 20, 4, 6).center == (12, 23)


def test_empty_regions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must have a pixel, got an empty one of shape \(3, 4\)"):
        Region.of(np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="got none of 2"):
        regions_of(np.array([[0, 1, 3]], np.int32), [1, 2])
    with pytest.raises(ValueError, match="got none of 4"):
        regions_of(np.array([[0, 1, 3]], np.int32), [4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, r"equally many segments, got 1, 2 and shape \(1, 3\)"),
        ({"embeddings": np.ones((2, 3))}, r"equally many segments, got 1, 1 and shape \(2, 3\)"),
        ({"embeddings": np.ones(3)}, r"equally many segments, got 1, 1 and shape \(3,\)"),
        ({"labels": [4]}, r"labels must be in \[0, 4\), got 4"),
        ({"labels": [-1]}, r"labels must be in \[0, 4\), got -1"),
        ({"embeddings": np.full((1, 3), np.nan)}, "embeddings must be finite"),
        ({"size": (96, 127)}, r"size must stay \(96, 128\) within a video .*reset.*, got \(96, 127\)"),
        ({"embeddings": np.ones((1, 4))}, "embeddings must keep their 3 channels, got 4"),
    ],
)
def test_bad_frames_are_refused_and_change_nothing(change: dict[str, Any], message: str) -> None:
    frame = {"regions": [block(0, 0, 4, 4)], "labels": [0], "embeddings": np.ones((1, 3)), "size": SIZE}
    tracker = Tracker(is_thing=IS_THING, max_age=0)
    assert tracker.update(**frame) == [1]
    with pytest.raises(ValueError, match=message):
        tracker.update(**(frame | change))
    assert tracker.update(**frame) == [1]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"max_age": -1}, r"max_age must be in \[0, inf\], got -1"),
        ({"min_overlap": 0.0}, "min_overlap must be in"),
        ({"min_similarity": 1.5}, r"min_similarity must be in \[-1, 1\], got 1.5"),
        ({"min_similarity_apart": -2}, "min_similarity_apart must be in"),
        ({"min_overlap_other_class": -0.1}, "min_overlap_other_class must be in"),
        ({"max_step": float("nan")}, "max_step must be in .*, got nan"),
        ({"memory": 1.0}, "memory must be in"),
    ],
)
def test_gates_out_of_range_are_refused(gates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tracker(is_thing=IS_THING, **gates)
