"""The report: one page from a folder of runs, which opens from disk, and the same numbers as files beside it.

    records -> summary (numbers) -> verdicts, view (words), figures -> page.html

The page needs nothing but itself: no network, no fonts, no other files; its figures are inside. Names that come from
the runs are escaped, and a policy inside the page lets no script run but its own.
"""

from .write import Written, report

__all__ = ["Written", "report"]
