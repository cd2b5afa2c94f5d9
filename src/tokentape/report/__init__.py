"""What is in a Parquet file of samples: figures in two streaming passes, as data, a page, or a summary.

Nothing is printed here: `report.page` makes one self-contained HTML page, `report.show` a terminal's summary.
"""

from tokentape.report.figures import Report
from tokentape.report.run import report

__all__ = ["Report", "report"]
