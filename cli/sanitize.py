"""Text made safe for a terminal: the last step before anything a model or a file said is shown.

A pure function of each character, so text cut anywhere between two tokens gives the same result. That is also why
floods of combining marks stay: counting needs a memory, they move no cursor, and some scripts rightly have many."""

from __future__ import annotations

ESCAPE_PICTURES = 0x2400  # U+2400 + c is the visible symbol of control character c, for example U+241B for ESC
REPLACEMENT = "\ufffd"


def _visible_symbols() -> dict[int, str]:
    # C0 and DEL: escape sequences, BEL, CR and BS that overwrite what was shown.
    symbols = {code: chr(ESCAPE_PICTURES + code) for code in range(0x20) if chr(code) not in "\n\t"}
    symbols[0x7F] = "\u2421"
    # C1: single-byte forms of CSI, OSC and DCS, obeyed by some terminals.
    symbols |= {code: f"<U+{code:04X}>" for code in range(0x80, 0xA0)}
    # Bidi embeddings, overrides and isolates reorder what is read; the rest is invisible and can carry hidden text.
    hidden = [*range(0x202A, 0x202F), *range(0x2066, 0x2070), *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080)]
    symbols |= {code: f"<U+{code:04X}>" for code in hidden}
    # Half of a surrogate pair cannot be written as UTF-8.
    return symbols | dict.fromkeys(range(0xD800, 0xE000), REPLACEMENT)


VISIBLE = _visible_symbols()
VISIBLE_ON_ONE_LINE = VISIBLE | {ord("\n"): "\u240a", ord("\t"): "\u2409", 0x2028: "<U+2028>", 0x2029: "<U+2029>"}


def sanitize(text: str) -> str:
    """Replace control, reordering and invisible characters by visible symbols; newline, tab and all others stay."""
    return text.translate(VISIBLE)


def sanitize_line(text: str) -> str:
    """The same for text that must stay on one line, such as an error message: newlines and tabs become visible too."""
    return text.translate(VISIBLE_ON_ONE_LINE)
