"""What attribution measures, of one set of batches."""

from __future__ import annotations

from collections.abc import Iterable

from seuf_core.attribution.gradient import Derivatives, derivatives_of_sets
from seuf_core.attribution.statistics import RoutingStatistics, statistics_of_sets
from seuf_core.data.batches import Batch
from seuf_core.moe.view import MoEView


def routing_statistics(view: MoEView, batches: Iterable[Batch]) -> RoutingStatistics:
    """`statistics_of_sets` of one set."""
    (only,) = statistics_of_sets(view, [list(batches)])
    return only


def expert_derivatives(view: MoEView, batches: Iterable[Batch]) -> Derivatives:
    """`derivatives_of_sets` of one set."""
    (only,) = derivatives_of_sets(view, [list(batches)])
    return only
