"""Hooks of MkDocs for the site over docs/ (mkdocs.yml); they need neither Paddle nor a build.

A link in docs/ is relative, as a git host wants it. On the site a link that leaves docs/ becomes:

- to README.md, CONTRIBUTING.md or CHANGELOG.md: a link to that page, which is read from the root;
- to a picture or a JSON with measured rows: a link to that file, which is served with the site;
- to any other file: a link into `repo_url` of mkdocs.yml. Where that is not set, only the text.

Pages under api/ are lists of names for mkdocstrings, which reads sources and imports nothing.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Pages outside docs/, and their names on the site.
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{f"examples/{path.name}": f"examples/{path.name}" for path in ROOT.glob("examples/*.md")},
}
SERVED = (".png", ".json")
#: Modules with an `__all__`, and modules whose public members are all shown.
LISTED = ("functional", "distributed", "backends", "reference")
WHOLE = ("compat.flash_attn", "compat.flashinfer", "compat.flash_mla", "compat.deep_gemm")
WHOLE += ("compat.paddle", "compat.fastdeploy")
_LINK = re.compile(r"(?<!`)(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def anchor(heading: str, separator: str = "-") -> str:
    """Anchor of a heading, as git hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    """Make anchors as git hosts do, and put the examples into the menu."""
    config.mdx_configs["toc"]["slugify"] = anchor
    examples = sorted(name for name in PAGES.values() if name.startswith("examples/"))
    if examples:
        next(part["Use"] for part in config.nav if "Use" in part).append({"Examples": examples})
    return config


def exported(module: str) -> list[str]:
    """Names in the `__all__` of a package of fastattn."""
    source = (ROOT / "fastattn" / module / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"fastattn.{module} has no __all__")


def api_pages() -> dict[str, str]:
    """Pages for mkdocstrings by path."""
    pages = {}
    for module in LISTED:
        entries = (f"::: fastattn.{module}.{name}\n" for name in exported(module))
        pages[f"api/{module}.md"] = f"# fastattn.{module}\n\n" + "\n".join(entries)
    for module in WHOLE:
        pages[f"api/{module}.md"] = f"# fastattn.{module}\n\n::: fastattn.{module}\n"
    return pages


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files outside docs/."""
    from mkdocs.structure.files import File

    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for name, text in api_pages().items():
        files.append(File.generated(config, name, content=text))
    for folder in ("benchmarks/results", "benchmarks/plots"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SERVED:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave docs/ to where the site has their targets."""
    return rewrite(markdown, page.file.src_uri, config.repo_url)


def rewrite(markdown: str, page: str, repo_url: str | None) -> str:
    """Markdown of a page of the site with its links changed as the module's text says."""
    source = {name: source for source, name in PAGES.items()}.get(page, f"docs/{page}")

    def changed(match: re.Match[str]) -> str:
        label, target = match.groups()
        file, hash_, fragment = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not file:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/") and not (ROOT / path).is_dir():
            path = path[len("docs/") :]
        elif not path.endswith(SERVED):
            where = f"{repo_url.rstrip('/')}/blob/main/{path}" if repo_url else ""
            return f"{label}({where}{hash_}{fragment})" if where else label[1:-1]
        return f"{label}({os.path.relpath(path, posixpath.dirname(page) or '.')}{hash_}{fragment})"

    # Blocks of code hold no links.
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else _LINK.sub(changed, p) for p in parts)


def on_page_content(html: str, **_: Any) -> str:
    """Make MathML of formulas, so that pages load no script from elsewhere."""
    from html import unescape

    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        return convert(unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return _MATH.sub(mathml, html)
