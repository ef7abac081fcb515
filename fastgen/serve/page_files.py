"""The files of the page at `/`, and what a browser may do with them.

They are in the folder `page`, as they are sent: `page.html`, its style, modules of JavaScript, and
in `page/vendor` what others wrote (see NOTICE).
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

FIRST = "page.html"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Scripts and styles are the page's own files; no text becomes elements but through DOMPurify.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # all of them are of one version
}


def _files(folder: Traversable, prefix: str = "") -> dict[str, tuple[Traversable, str]]:
    found: dict[str, tuple[Traversable, str]] = {}
    for one in folder.iterdir():
        name = prefix + one.name
        if one.is_dir():
            found |= _files(one, f"{name}/")
        for ending, kind in KINDS.items():
            if name.endswith(ending):
                found[name] = one, f"{kind}; charset=utf-8"
    return found


# By their name under /page/: the file and its type.
FILES = _files(resources.files("fastgen.serve").joinpath("page"))
