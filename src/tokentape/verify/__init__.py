"""`tokentape verify`: is a file of samples what an engine would say of it, token by token?

run       reads a file, checks what must hold of it, has an engine score every trained token
rules     what must hold of the samples alone
turns     which of their turns a prefill can judge
figures   differences → counts, means, a histogram
report    what was found, as data; the verdict
show      the same for a terminal, and the histogram as a picture
"""

from tokentape.verify.report import Report
from tokentape.verify.run import verify

__all__ = ["Report", "verify"]
