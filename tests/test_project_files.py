"""What people read before the code: links lead somewhere, and what is said in two places is the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lillama.version import __version__

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "tests").rglob("*.md"))
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def slug(heading: str) -> str:
    """The anchor that renderers of Markdown make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page}: {link}"


def test_the_changelog_speaks_of_this_version():
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert __version__ in headings[0]


def test_the_citation_is_that_of_the_paper():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert "2412.16719" in citation["preferred-citation"]["url"]
    assert citation["license"] == "Apache-2.0"


def test_hooks_before_a_commit_run_what_lint_runs():
    makefile = (REPOSITORY / "Makefile").read_text()
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        tool = " ".join(word for word in hook["entry"].split() if not word.startswith("--"))
        assert tool.replace(".venv/bin/", "$(BIN)/") in makefile


def test_the_workflow_runs_what_anybody_can_run():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["ci"]["steps"]]
    assert ".ci/run" in steps
    mode = subprocess.run(
        ["git", "ls-files", "--stage", ".ci/run"], capture_output=True, text=True, cwd=REPOSITORY, check=False
    ).stdout
    assert not mode or mode.startswith("100755")


def test_every_package_says_that_it_is_typed():
    packages = [REPOSITORY / "lillama", *(path.parent for path in (REPOSITORY / "plugins").glob("*/__init__.py"))]
    assert len(packages) > 5
    assert all((package / "py.typed").is_file() for package in packages)
