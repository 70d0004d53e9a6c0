"""A hook of MkDocs: the site has the paths of the repository, so that a link works in both and needs no rewriting."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff", "examples/README.md")
"""Pages outside docs/ that stand on the site, and files that they link to; the README is its first page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Gives the files of docs/ their paths in the repository, and adds those beside it."""
    docs = Path(config.docs_dir)
    root = docs.parent
    moved = [file for file in files if file.src_dir == config.docs_dir]
    names = [f"{docs.name}/{file.src_uri}" for file in moved if file.inclusion.is_included()]
    names += [*BESIDE, *(path.relative_to(root).as_posix() for path in root.glob("examples/*.py"))]
    for file in moved:
        files.remove(file)
    for name in names:
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files
