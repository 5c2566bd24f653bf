"""structlog as this package uses it: without rich, which it imports for tracebacks that are never printed here.

Where rich is installed, and for `status --watch` it is, that is a sixth of a start's time and a tenth of its memory.
"""

from __future__ import annotations

import sys

_RICH = "rich"
_hidden = _RICH not in sys.modules
if _hidden:
    # What is None here cannot be imported; structlog then does without.
    sys.modules[_RICH] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    if _hidden:
        del sys.modules[_RICH]

__all__ = ["structlog"]
