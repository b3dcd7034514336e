"""The review of data that models of the run have made: what a person is shown before it is used, and the answer.

The record lies at `runs/<run id>/review/review.json`; that of an earlier question of the same run, which was asked
again, at `review-<n>.json` next to it.
"""

from pydantic import Field

from stages.config.base import Config
from stages.config.closing import LONGEST_WAIT_HOURS, Approval, Verdict
from stages.config.request import ArtifactRef

REVIEW_TASK = "review"
"""Name of the task, and of its folder under the run's."""
REVIEW_RECORD = "review.json"


class ReviewConfig(Config):
    """What a person is shown with `review_made_data`, and for how long."""

    timeout_hours: float = Field(default=168.0, gt=0, le=LONGEST_WAIT_HOURS)
    """Hours that the task waits for a person; after them the data counts as rejected and the run fails."""
    num_samples: int = Field(default=8, ge=1, le=50)
    """Accepted examples of each stage that are drawn and shown."""


class ReviewRecord(Config):
    """A person's answer about the data of a run."""

    artifacts: dict[str, ArtifactRef]
    """What was shown, by stage."""
    answer: Approval

    @property
    def is_approved(self) -> bool:
        return self.answer.verdict is Verdict.APPROVED

    def summary(self) -> str:
        """Say it in one line."""
        if self.answer.verdict is Verdict.TIMED_OUT:
            return "rejected, because no answer came in time"
        comment = f": {self.answer.comment}" if self.answer.comment else ""
        return f"{self.answer.verdict.value} by {self.answer.by or 'an unnamed user'}{comment}"


def review_key(run_id: str, name: str = REVIEW_RECORD) -> str:
    """Key of the record in a run's folder."""
    return f"runs/{run_id}/{REVIEW_TASK}/{name}"
