"""Which query each pixel of a picture goes to, band by band."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mask2former.modeling.bands import MaskGeometry
from mask2former.ops.pixels import areas_of, largest


def competition(
    scores: Tensor, mask_logits: Tensor, geometry: MaskGeometry
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Winner of each pixel: the query with the largest score times mask probability.

    Args:
        scores: (Q,) class probability, Q at least 1.
        mask_logits: (Q, h, w).
        geometry: how to get to the output.

    Returns:
        places: (H, W) int32, 1 + the winner where its mask probability is at least 0.5, otherwise 0.
        areas: (Q,) int64 each, the pixels of each query: won; with mask probability at least 0.5; both.
    """
    queries = len(scores)
    places = torch.empty(geometry.output_size, dtype=torch.int32, device=mask_logits.device)
    won, own, sure = torch.zeros(3, queries, dtype=torch.int64, device=mask_logits.device)
    resizer = geometry.bands(mask_logits)
    for rows in resizer.bands(queries):
        winner, is_sure, own_area = _band_competition(scores, resizer.chunks(mask_logits, rows))
        won += _pixels_of(winner, queries)
        own += own_area
        place = torch.where(is_sure, winner + 1, 0)  # (R, W)
        sure += _pixels_of(place, queries + 1)[1:]
        places[rows] = place
    return places, (won, own, sure)


def _band_competition(
    scores: Tensor, chunks: Iterator[tuple[slice, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Winner (R, W) int64, whether its probability is at least 0.5 (R, W) bool, and all queries' own area (Q,)."""
    best = winner = winner_is_sure = None
    own_areas = []
    for chunk, logits in chunks:
        probability = logits.sigmoid_()  # (n, R, W)
        is_sure = probability >= 0.5
        own_areas.append(areas_of(is_sure))
        value, index = largest(probability.mul_(scores[chunk, None, None]))
        index_is_sure = is_sure.gather(0, index[None])[0]  # (R, W)
        index += chunk.start
        if best is None or winner is None or winner_is_sure is None:
            best, winner, winner_is_sure = value, index, index_is_sure
            continue
        better = value > best  # strictly: of equal values the first query wins, as in one arg-max
        best = torch.where(better, value, best)
        winner = torch.where(better, index, winner)
        winner_is_sure = torch.where(better, index_is_sure, winner_is_sure)
    assert winner is not None  # there are queries
    assert winner_is_sure is not None
    return winner, winner_is_sure, torch.cat(own_areas)


def _pixels_of(numbers: Tensor, count: int) -> Tensor:
    """(R, W) int64 from 0 to count - 1 -> (count,) int64, how many pixels have each number."""
    if numbers.device.type == "cpu":
        return torch.bincount(numbers.flatten(), minlength=count)
    # on a GPU bincount makes the host wait for the smallest and the largest number
    return areas_of(numbers == torch.arange(count, device=numbers.device).view(-1, 1, 1))
