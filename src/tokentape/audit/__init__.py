"""Before a run: where can a recorded turn be extended under this tokenizer and chat template, and where not?

`audit` asks the template itself. Nothing is printed here; `audit.show` makes tables of a report.
"""

from tokentape.audit.report import Report
from tokentape.audit.run import audit

__all__ = ["Report", "audit"]
