"""The matcher against brute force, one image at a time, and with costs that are not finite."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from mask2former.modeling.matcher import HungarianMatcher

Matches = list[list[tuple[Tensor, Tensor]]]


def _matcher(**changes: float) -> HungarianMatcher:
    return HungarianMatcher(**{"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0, **changes})  # type: ignore[arg-type]


def _inputs(
    counts: list[int], *, layers: int = 2, queries: int = 4, points: int = 20, classes: int = 3
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    class_logits = 2 * torch.randn(layers, len(counts), queries, classes + 1)
    mask_logits = 3 * torch.randn(layers, len(counts), queries, points)
    labels = [torch.randint(classes, (n,)) for n in counts]
    masks = [(torch.rand(n, points) > 0.5).float() for n in counts]
    return class_logits, mask_logits, labels, masks


def _as_lists(matches: Matches) -> list[list[tuple[list[int], list[int]]]]:
    return [[(q.tolist(), t.tolist()) for q, t in layer] for layer in matches]


def _best_total(cost: Tensor) -> float:
    """Smallest total cost over all ways to give as many targets as possible a query of their own."""
    Q, N = cost.shape
    if N <= Q:
        choices = (zip(p, range(N), strict=True) for p in itertools.permutations(range(Q), N))
    else:
        choices = (zip(range(Q), p, strict=True) for p in itertools.permutations(range(N), Q))
    return min(sum(cost[q, n].item() for q, n in choice) for choice in choices)


@pytest.mark.parametrize("counts", [[3], [4, 1], [0, 2], [5, 3], [6]])
def test_assignment_is_optimal(counts: list[int]) -> None:
    class_logits, mask_logits, labels, masks = _inputs(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matches = _matcher().match(class_logits, mask_logits, labels, masks)
    assert len(matches) == 2
    for layer, images in enumerate(matches):
        assert len(images) == len(counts)
        for b, (query, target) in enumerate(images):
            assert len(query) == len(target) == min(4, counts[b])
            assert query.dtype == target.dtype == torch.int64
            assert query.tolist() == sorted(set(query.tolist()))
            assert len(set(target.tolist())) == len(target)
            if counts[b]:
                image = slice(b, b + 1)
                cost = _matcher().cost(
                    class_logits[layer, image], mask_logits[layer, image], labels[b][None], masks[b][None]
                )[0]
                assert cost[query, target].sum().item() == pytest.approx(_best_total(cost), rel=1e-4)


def test_all_layers_and_images_at_once_equal_one_at_a_time() -> None:
    counts = [3, 0, 7, 1]
    class_logits, mask_logits, labels, masks = _inputs(counts, layers=3, queries=9)
    together = _as_lists(_matcher().match(class_logits, mask_logits, labels, masks))
    for layer in range(3):
        for b in range(4):
            alone = _matcher().match(
                class_logits[layer : layer + 1, b : b + 1],
                mask_logits[layer : layer + 1, b : b + 1],
                labels[b : b + 1],
                masks[b : b + 1],
            )
            assert _as_lists(alone)[0][0] == together[layer][b]


def test_cost_weights() -> None:
    class_logits, mask_logits, labels, masks = _inputs([3], layers=1)
    arguments = (class_logits[0], mask_logits[0], labels[0][None], masks[0][None])
    parts = [
        HungarianMatcher(class_weight=c, mask_weight=m, dice_weight=d).cost(*arguments)
        for c, m, d in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    expected = 2 * parts[0] + 5 * parts[1] + 5 * parts[2]
    torch.testing.assert_close(_matcher().cost(*arguments), expected)
    assert all(part.std() > 0.01 for part in parts)


def test_all_weights_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="class_weight, mask_weight and dice_weight must not all be 0"):
        HungarianMatcher(class_weight=0, mask_weight=0, dice_weight=0)


def test_cost_is_float32_under_autocast() -> None:
    class_logits, mask_logits, labels, masks = _inputs([3], layers=1)
    arguments = (class_logits[0].bfloat16(), mask_logits[0].bfloat16(), labels[0][None], masks[0][None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = _matcher().cost(*arguments)
    assert cost.dtype == torch.float32
    exact = _matcher().cost(arguments[0].float(), arguments[1].float(), *arguments[2:])
    torch.testing.assert_close(cost, exact, rtol=0, atol=0)


def test_no_targets_at_all() -> None:
    class_logits, mask_logits, labels, masks = _inputs([0, 0])
    matches = _matcher().match(class_logits, mask_logits, labels, masks)
    assert _as_lists(matches) == [[([], []), ([], [])]] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_logits_of_one_query_leave_a_valid_assignment(bad: float) -> None:
    class_logits, mask_logits, labels, masks = _inputs([3, 2])
    mask_logits[1, 0, 2] = bad
    matcher = _matcher()
    with pytest.warns(UserWarning, match=r"3 matching costs are not finite.*image 0 of the batch, decoder layer 1"):
        matches = matcher.match(class_logits, mask_logits, labels, masks)
    assert matcher.num_nonfinite == 3
    query, target = matches[1][0]
    assert 2 not in query.tolist()  # three good queries were left
    assert sorted(target.tolist()) == [0, 1, 2]
    clean = _matcher().match(class_logits[:, 1:], mask_logits[:, 1:], labels[1:], masks[1:])
    assert [layer[0] for layer in _as_lists(clean)] == [layer[1] for layer in _as_lists(matches)]


def test_nothing_but_nan_still_gives_each_target_a_query() -> None:
    class_logits, mask_logits, labels, masks = _inputs([3, 2])
    matcher = _matcher()
    with pytest.warns(UserWarning, match="40 matching costs|20 matching costs"):
        matches = matcher.match(class_logits * float("nan"), mask_logits, labels, masks)
    for images in matches:
        for (query, target), count in zip(images, (3, 2), strict=True):
            assert len(set(query.tolist())) == count
            assert sorted(target.tolist()) == list(range(count))
    assert matcher.num_nonfinite == 2 * 4 * (3 + 2)  # padding is not counted


def _call(matcher: HungarianMatcher, *, bad: bool, counts: list[int] | None = None) -> None:
    class_logits, mask_logits, labels, masks = _inputs([2, 2] if counts is None else counts)
    if bad:
        class_logits[1, 1] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matcher.match(class_logits, mask_logits, labels, masks)


def test_persistent_bad_costs_raise_with_the_place() -> None:
    matcher = _matcher(max_nonfinite_calls=3)
    _call(matcher, bad=False)
    _call(matcher, bad=True)
    _call(matcher, bad=True)
    message = r"not finite in 3 .* in a row.*image 1 of the batch, decoder layer 1, matcher call 4"
    with pytest.raises(FloatingPointError, match=message):
        _call(matcher, bad=True)
    assert matcher.num_calls == 4


def test_a_good_call_resets_the_count_of_bad_ones() -> None:
    matcher = _matcher(max_nonfinite_calls=3)
    for _ in range(4):
        _call(matcher, bad=True)
        _call(matcher, bad=True)
        _call(matcher, bad=False)
    assert matcher.num_nonfinite == 4 * 2 * 4 * 2


def test_the_published_setting_bears_nine_bad_calls() -> None:
    matcher = _matcher()
    for _ in range(9):
        _call(matcher, bad=True)
    with pytest.raises(FloatingPointError):
        _call(matcher, bad=True)


def test_bad_padding_does_not_count() -> None:
    """The image without targets is padded to the width of the other; its costs are nobody's."""
    class_logits, mask_logits, labels, masks = _inputs([3, 0])
    mask_logits[:, 1] = float("nan")
    matcher = _matcher()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matches = matcher.match(class_logits, mask_logits, labels, masks)
    assert matcher.num_nonfinite == 0
    assert _as_lists(matches)[0][1] == ([], [])


def test_more_targets_than_queries_warns_once() -> None:
    matcher = _matcher()
    inputs = _inputs([6, 1])
    with pytest.warns(UserWarning, match="6 targets but the model only 4 queries.*NUM_OBJECT_QUERIES"):
        matches = matcher.match(*inputs)
    assert [len(query) for query, _ in matches[0]] == [4, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matcher.match(*inputs)
