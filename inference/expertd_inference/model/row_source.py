"""Rows of a table by way of a session, which may end and be attached again meanwhile."""

from contextlib import suppress

from expertd_client.table_rows import RowBytes, Rows, TableRows
from expertd_inference.experts.recovery import SESSION_ENDED, Recovery
from expertstore.errors import ExpertdError


class SessionRows:
    """A :class:`~.tables.RowSource` that attaches again when the session ends under it."""

    def __init__(self, rows: TableRows, recovery: Recovery) -> None:
        self.rows = rows
        self._recovery = recovery

    def read(self, rows: Rows) -> RowBytes:
        """Rows as the pack has them ``[n, row_bytes]``. Raises as :meth:`Recovery.recover`."""
        while True:
            try:
                return self.rows.read(rows)
            except SESSION_ENDED as error:
                self._recovery.recover(error)

    def close(self) -> None:
        """Tells the daemon what it does not know yet, if it is there."""
        with suppress(ExpertdError):
            self.rows.tell()

    def expect(self, rows: Rows) -> None:
        """Hints at them. Whoever reads is told what is wrong."""
        with suppress(ExpertdError):
            self.rows.expect(rows)
