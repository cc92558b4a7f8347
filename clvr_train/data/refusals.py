"""What becomes of a record that cannot be used: it is left out, logged and counted, and too many end the reading."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)
_JUDGED_EVERY = 1000


class Refusals:
    """Counts refused records, logs each, and ends the reading once they are more than a share of all.

    With a share of 0 the first refusal ends it. Otherwise the share is that of the records that this process has read
    so far, judged after every 1,000 of them and at the end, so that one early record does not count for much. A share,
    not a number: a run that is resumed begins to count anew and is held to the same.

    Args:
        path: what is read, for messages.
    """

    def __init__(self, path: Path | str, max_refused: float = 0.0) -> None:
        if not 0 <= max_refused < 1:
            raise ValueError(f"max_refused={max_refused}: a share of records, from 0 to below 1")
        self.path, self.max_refused = path, max_refused
        self.records = self.refused = 0

    def accept(self) -> None:
        """Raises as `finish`."""
        self.records += 1
        if self.records % _JUDGED_EVERY == 0:
            self._judge()

    def refuse(self, error: ValueError) -> None:
        """Raises as `finish`, and `error` itself where none may be refused."""
        if self.max_refused == 0:
            raise error
        logger.warning("refused: %s", error)
        self.refused += 1
        self.accept()

    def finish(self) -> None:
        """Judge, and say how many were refused, at the end of the data.

        Raises:
            ValueError: more records were refused than may be.
        """
        self._judge()
        if self.refused:
            logger.warning("%s: %d of %d records refused", self.path, self.refused, self.records)

    def _judge(self) -> None:
        if self.refused > self.max_refused * self.records:
            raise ValueError(
                f"{self.path}: {self.refused} of {self.records} records refused, more than max_refused="
                f"{self.max_refused} allows; recipes/validate_data.py lists them all"
            )
