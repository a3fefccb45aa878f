"""The repository keeps its own promises: documents agree with files, and what ships is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "specs"
BIN = Path(sys.executable).parent
PACKAGES = {"kenaz_engine": "engine", "kenaz_drivers": "drivers", "kenaz_specs": "specs"}
MADE_HERE = {".git", ".venv", "build", "dist", "__pycache__"}


def sources(*patterns: str) -> list[Path]:
    """The files that git tracks; in a copy without its history, all that nothing of ours has made."""
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--", *patterns]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, check=False, text=True)
    if listed.returncode == 0:
        paths = {ROOT / name for name in listed.stdout.split("\0") if name}
    else:
        paths = {path for pattern in patterns or ["*"] for path in ROOT.rglob(pattern)}
    return sorted(
        path for path in paths if path.is_file() and not MADE_HERE & {*path.relative_to(ROOT).parts}
    )


def documents() -> list[Path]:
    return sources("*.md")


def targets_of_make() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_imports_go_one_way() -> None:
    command = [str(BIN / "lint-imports"), "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_targets_that_exist(path: Path) -> None:
    named = set(re.findall(r"(?:`|^\s*\$?\s*)make ([a-z][a-z0-9-]*)", path.read_text(), re.MULTILINE))
    assert named <= targets_of_make()


def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert set(re.findall(r"^  (\S+) ", listed, re.MULTILINE)) == targets_of_make()


def headings(document: str) -> set[str]:
    """The anchors that the usual renderers give to the headings."""
    titles = re.findall(r"^#+ +(.+?) *#*$", re.sub(r"```.*?```", "", document, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> Iterator[str]:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        destination = (path.parent / file).resolve() if file else path
        if not destination.exists():
            yield target
            continue
        if anchor and destination.suffix == ".md" and anchor not in headings(destination.read_text()):
            yield target


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_resolve(path: Path) -> None:
    assert not list(broken_links(path))


def test_sources_name_documents_that_exist() -> None:
    named = {
        document
        for path in sources("*.py", "*.yaml", "*.json", "*.toml", "Makefile")
        for document in re.findall(r"docs/[a-z0-9/_-]+\.md", path.read_text())
    }
    assert [document for document in sorted(named) if not (ROOT / document).is_file()] == []


@pytest.mark.parametrize("name", ["nothing-left-behind", "security"])
def test_what_a_document_claims_is_tested_somewhere(name: str) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", (ROOT / f"docs/explanation/{name}.md").read_text(), re.MULTILINE)
    [table] = [table for table in tables if re.match(r".*(?:test|tested) \|\n", table)]
    rows = [re.findall(r"`(tests/[^`]+)`", row) for row in table.splitlines()[2:]]
    assert len(rows) >= 12
    assert all(rows)
    assert [path for row in rows for path in row if not list(ROOT.glob(path.rstrip("/")))] == []


def test_the_index_of_the_documents_is_complete() -> None:
    index = ROOT / "docs/README.md"
    listed = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert [
        str(path.relative_to(ROOT)) for path in sources("docs/*.md") if path not in {index, *listed}
    ] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A title, it is\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#a-title-it-is) [b](there.md#no) [c](gone.md) `[d](code.md)` [e](https://kenaz.dev)\n"
    )
    assert list(broken_links(page)) == ["there.md#no", "gone.md"]


def test_nothing_of_one_machine_is_in_the_files() -> None:
    # Put together here, so that this file does not hold what it looks for.
    machine = r"(?<![\w.$}-])/(?:work|home/\w+|root/\w+|Users/\w+)/"
    registry = "|".join(
        ["pypi" + r"\.org", "pythonhosted" + r"\.org", "registry" + r"\.npmjs", "crates" + r"\.io"]
    )
    pattern = re.compile(f"{machine}|{registry}")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def shipped(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((SPECS / folder).rglob("*.yaml"))]


@pytest.mark.parametrize(
    "path", shipped("sessions", "kenaz_specs/lifecycles"), ids=lambda path: str(path.relative_to(SPECS))
)
def test_shipped_files_are_valid(path: Path) -> None:
    command = [str(BIN / "kenaz-launcher"), "validate", str(path)]
    checked = subprocess.run(command, capture_output=True, check=False, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    "path", sorted((SPECS / "kenaz_specs/schemas").glob("*.json")), ids=lambda path: path.name
)
def test_schemas_are_schemas(path: Path) -> None:
    schema = json.loads(path.read_text())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_dependencies_have_their_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    wanted = {
        re.split(r"[<>=!~ ]", entry)[0]
        for entry in (*project["project"]["dependencies"], *groups["test"], *groups["lint"])
    }
    rows = re.findall(
        r"^\| ([^|]+) \|", (ROOT / "docs/decisions/0003-dependencies.md").read_text(), re.MULTILINE
    )
    explained = {name.strip() for row in rows for name in row.split(",")} - {"package", "---"}
    assert explained == wanted


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", directory],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    [file] = directory.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    others = [top for top in tops - PACKAGES.keys() if not re.fullmatch(r"kenaz_launcher-.*\.dist-info", top)]
    assert tops >= PACKAGES.keys()
    assert others == []


@pytest.mark.parametrize(("package", "root"), PACKAGES.items())
def test_the_wheel_holds_every_file_of_a_package(wheel: zipfile.ZipFile, package: str, root: str) -> None:
    expected = {path.relative_to(ROOT / root).as_posix() for path in sources(f"{root}/{package}/*")}
    assert f"{package}/py.typed" in expected
    assert expected <= set(wheel.namelist())


def test_the_table_of_platforms_claims_what_it_may() -> None:
    """Each driver has its rows, each row one of three claims, and one of hardware its date and versions."""
    import tomllib

    text = (ROOT / "README.md").read_text()
    table = text.partition("## Platforms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| `([a-z]+)` \| ([^|]+) \|$", table, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| (?!---)(?!host \|)", table, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {driver for _, driver, _ in rows} == set(project["entry-points"]["kenaz.drivers"])
    claim = re.compile(
        r"run in CI\b|checked by \S|run on hardware \(\d{4}-\d\d-\d\d, [^)]*\d+\.\d+[^)]*\)", re.ASCII
    )
    assert [row for row in rows if not claim.match(row[2])] == []
    # Where no machine of ours runs, nobody can have seen one run.
    elsewhere = [state for host, _, state in rows if re.search(r"macOS|Windows|KVM", host)]
    assert not any(state.startswith("run in CI") for state in elsewhere)
