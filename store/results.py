"""What a job found and measured: attribution, selected experts, metrics. Written by store.fenced."""

from collections.abc import Sequence

from store.repository import Repository
from store.tables import Attribution, Metric, SelectedExpert


class Results(Repository):
    """Reads the results of one tenant's jobs. Empty for an unknown job (ask Jobs.get first)."""

    def attribution(self, job_id: str) -> Attribution | None:
        """The score matrix, or None before the attribution phase has ended."""
        return self.session.scalars(
            self._select(Attribution).where(Attribution.job_id == job_id)
        ).one_or_none()

    def selection(self, job_id: str) -> Sequence[SelectedExpert]:
        """The experts the job trains, best first."""
        query = self._select(SelectedExpert).where(SelectedExpert.job_id == job_id)
        return self.session.scalars(query.order_by(SelectedExpert.rank)).all()

    def metrics(self, job_id: str) -> Sequence[Metric]:
        """Every figure measured so far, in the order stage, set, domain, name."""
        query = self._select(Metric).where(Metric.job_id == job_id)
        return self.session.scalars(
            query.order_by(Metric.stage, Metric.set, Metric.domain, Metric.name)
        ).all()
