"""For mkdocs: some files of the repository that lie outside docs/ become pages of the site too.

A link such as `../../experiments/LOG.md` works in the repository as it is. In the site these files
lie inside, so that the link loses its step out of docs/.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "experiments/LOG.md")


def on_files(files, config):
    for name in OUTSIDE:
        files.append(
            File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8"))
        )
    return files


def on_page_markdown(markdown, page, **_):
    """Mend links out of docs/, and links of the files outside into it."""
    if page.file.src_uri == "reference/modules.md":
        # pdoc writes beside mkdocs, which cannot check such a link: as HTML it is left alone.
        markdown += '\n<a href="../../api/">Every function and class, from its docstring</a>\n'
    depth = page.file.src_uri.count("/")
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"\]\((?:\.\./)*docs/", "](" + "../" * depth, markdown)
    return markdown.replace("](" + "../" * (depth + 1), "](" + "../" * depth)
