"""Text of strangers (labels, ids, reasons) made fit to be shown: nothing in it can act on what shows it."""

import unicodedata

_MOST = 120
# Control, format (bidirectional marks among them), surrogate, private, unassigned; separators of lines.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def shown(text: str, most: int = _MOST) -> str:
    """The text on one line, at most so many characters of it; what cannot be seen stands as its code point.

    Escaping for HTML is the page's; this is about what a terminal or a reader would be misled by.
    """
    cut = text[:most]
    out = "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in _UNSEEN else c for c in cut)
    return out + ("…" if len(text) > most else "") if out.strip() else f"⟨{'blank' if text else 'empty'}⟩"
