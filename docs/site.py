"""Hooks of mkdocs: pages and pictures that lie outside ``docs`` are part of the site too.

The README is the start page. Files at the top of the repository keep their names; links of one
place to another are rewritten, so that the same Markdown works on a code host and on the site.
"""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
PICTURES = sorted((ROOT / "benchmarks" / "results").glob("*.png"))


def on_files(files: Files, config) -> Files:
    """Add the pages and pictures from outside."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_at_the_top(text)))
    for picture in PICTURES:
        name = f"benchmarks/results/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Point pictures of the benchmarks to where the site has them; name linked code as code."""
    return markdown.replace("](../../benchmarks/results/", "](results/").replace(
        "](../CONTRIBUTING.md", "](CONTRIBUTING.md"
    )


def _at_the_top(text: str) -> str:
    """A page of the repository's top as one of the site's: ``docs/`` is the root there."""
    return text.replace("](docs/", "](").replace("](README.md)", "](index.md)")
