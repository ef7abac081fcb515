"""Makes the long description of the README: what an index shows leads nowhere into the repository.

All else that a build needs is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")
HERE = r"\((?!https?://)[^)]*\)"  # where a link leads that is none of the web's


def standing_alone(readme: str) -> str:
    """The text without pictures of the repository; of links into it the words stay."""
    pictures = rf"^!\[[^\]]*\]{HERE}.*?\n\n"
    text = re.sub(pictures, "", readme, flags=re.MULTILINE | re.DOTALL)
    return re.sub(rf"\[([^\]]*)\]{HERE}", r"\1", text)


setup(
    long_description=standing_alone(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
