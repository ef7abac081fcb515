"""Optional dependencies: the distribution's name, and the command that installs an extra.

The import and the command are `fastgen`; that name on the package index is somebody else's program,
so every text that tells people what to install takes the name from here.
"""

from __future__ import annotations

DISTRIBUTION = "fastgen-onnx"


def install(extra: str) -> str:
    """The command that installs an extra: "pip install 'fastgen-onnx[chat]'"."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
