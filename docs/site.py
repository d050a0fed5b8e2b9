"""Hooks of mkdocs: pages and pictures that lie outside ``docs`` are part of the site too.

The README is the start page. Files at the top of the repository keep their names; links from one
place to another are rewritten, so that the same Markdown works on a code host and on the site.
"""

from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
PICTURES = sorted((ROOT / "benchmarks" / "results").glob("*.png"))
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())


def on_files(files: Files, config) -> Files:
    """Add the pages and pictures from outside."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    for example in EXAMPLES:
        name = f"examples/{example.name}"
        files.append(File.generated(config, name, abs_src_path=str(example)))
    for picture in PICTURES:
        name = f"benchmarks/results/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Make links that leave ``docs`` stay on the site."""
    if page.file.src_uri in PAGES:
        return markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
    up = "../" * len(PurePosixPath(page.file.src_uri).parts)  # the repository's top from this page
    inside = up.removeprefix("../")  # the top of the site
    for name in (
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "benchmarks/results/",
        "examples/",
    ):
        markdown = markdown.replace(f"]({up}{name}", f"]({inside}{name}")
    return markdown
