"""The house rules: who may import whom, where a file may stand, how long it may be, what is never loaded.

Each checker is a function from file contents to a list of faults, so that each is also seen to fail on a bad snippet.
"""

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_BYTES = 15 * 2**20
PACKAGES = {"medart_core", "diffusers_grad", "llava_next_captioner"}
SHARED = PACKAGES | {"models", "train_options"}
# These load TorchScript, of one known sha256 only.
HASHED_BEFORE = {"medart_core/evaluation/inception.py", "tests/test_evaluation_features.py"}
NOT_OURS = {".venv", "dataset", "medart", "results", "build", "__pycache__"}  # where there is no git to ask


def project_files(root: Path = ROOT) -> list[str]:
    """Files that git tracks or would track, relative to `root`; without git, all that no tool or run has left."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = []
    files = [name for name in listed if (root / name).is_file()]
    if files:
        return files
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_OURS and (name == ".ci" or name[0] != ".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    return found


FILES = project_files()
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".py")}
CODE = {name: source for name, source in SOURCES.items() if "/tests/" not in f"/{name}"}


def stems(folder: str) -> set[str]:
    """Names under which the Python files directly in `folder` can be imported."""
    return {PurePosixPath(name).stem for name in CODE if PurePosixPath(name).parent.as_posix() == folder}


ROOT_SCRIPTS = stems(".") - {"models"}


def room(path: str) -> str:
    """The part of the house that a file belongs to: a package, `models`, `train_options` or a folder of scripts."""
    parts = PurePosixPath(path).parts
    if parts[0] in ("diffusers", "LLaVA-NeXT"):
        return parts[1]
    if len(parts) == 1:
        return "models" if path == "models.py" else "root"
    return parts[0]


def imported(path: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a file imports, lazily or not; relative ones are resolved."""
    parents = PurePosixPath(path).parent.parts
    package = parents[1:] if parents[:1] in (("diffusers",), ("LLaVA-NeXT",)) else parents
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*outer, *([node.module] if node.module else [])])


def wrong_arrows(path: str, source: str) -> list[str]:
    """Imports of our own modules that the design does not allow from this room."""
    here = room(path)
    allowed = {
        "medart_core": {"medart_core", "diffusers_grad"},
        "diffusers_grad": {"diffusers_grad"},
        "llava_next_captioner": {"llava_next_captioner"},
        "models": set(),
        "train_options": SHARED | {"train"},
        "nano": SHARED | stems("nano"),  # the recipes share their captions and photographs as siblings
        "benchmarks": SHARED | stems("benchmarks"),
    }.get(here, SHARED)
    ours = SHARED | ROOT_SCRIPTS | {"nano", "benchmarks", "tests"}
    tops = {name.split(".")[0] for name in imported(path, ast.parse(source))}
    return [f"{path} imports {top}" for top in sorted(tops & ours - allowed)]


def misplaced_imports(path: str, source: str) -> list[str]:
    """Imports of argparse or accelerate outside their homes."""
    scripts = room(path) in ("root", "nano", "benchmarks")
    homes = {
        "argparse": scripts or path == "medart_core/options.py",
        "accelerate": scripts or path == "medart_core/checkpoint.py",
    }
    tops = {name.split(".")[0] for name in imported(path, ast.parse(source))}
    return [f"{path} imports {top}" for top, at_home in homes.items() if top in tops and not at_home]


def plain_parsers(path: str, source: str) -> list[str]:
    """Scripts that take shortened options, or answer a misspelt one with a traceback."""
    faults = [f"{path} has argparse's own parser, not medart_core.options'"] if "ArgumentParser(" in source else []
    if re.search(r"\bParser\(", source) and 'if __name__ == "__main__"' in source and "with exit_codes(" not in source:
        faults.append(f"{path} ends without exit_codes")
    return faults


def too_long(path: str, source: str) -> list[str]:
    """Files and functions above the line limits of the design."""
    script = room(path) == "root" or 'if __name__ == "__main__"' in source
    limit = 400 if path == "models.py" else 250 if script else 300
    lines = len(source.splitlines())
    faults = [f"{path} has {lines} lines, more than {limit}"] if lines > limit else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = 120 if node.name == "main" else 60
            if lines > limit:
                faults.append(f"{path}: {node.name} has {lines} lines, more than {limit}")
    return faults


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe_loading(path: str, source: str) -> list[str]:
    """Ways of reading a file that can run code from it."""
    tree = ast.parse(source)
    faults = [
        f"{path} imports {name}"
        for name in imported(path, tree)
        if name.split(".")[0] in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            faults.append(f"{path}:{node.lineno} imports torch.load by its bare name")
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load" and not is_constant(named.get("weights_only"), True):
            faults.append(f"{path}:{node.lineno} calls torch.load without weights_only=True")
        if ast.unparse(node.func) == "torch.jit.load" and path not in HASHED_BEFORE:
            faults.append(f"{path}:{node.lineno} calls torch.jit.load, which runs code from the file")
        faults += [
            f"{path}:{node.lineno} passes {name}"
            for name in ("trust_remote_code", "allow_pickle")
            if name in named and not is_constant(named[name], False)
        ]
    return faults


def badly_named(paths: list[str]) -> list[str]:
    """Paths that name a drawer for anything, or that would shadow the official diffusers."""
    drawers = re.compile(r"(^|/)_?(utils?|misc|common|helpers?)(\.py)?(/|$)")
    return [
        path for path in paths if drawers.search(path) or re.fullmatch(r"(diffusers/[^/]*|medart/__init__)\.py", path)
    ]


def missing_files(readme: str, root: Path) -> list[str]:
    """Files and folders that stand first in a table row of README and are not there."""
    rows = re.findall(r"^\| *\[?`([\w./-]+)`", readme, flags=re.MULTILINE)
    named = [name for name in rows if re.search(r"(/|\.(py|md|toml|txt|cff)|^Makefile)$", name)]
    return [name for name in named if not (root / name).exists()]


def too_big(paths: list[str], root: Path) -> list[str]:
    return [path for path in paths if (root / path).stat().st_size > MAX_FILE_BYTES]


@pytest.mark.parametrize("checker", [wrong_arrows, misplaced_imports, plain_parsers, too_long])
def test_code_keeps_the_rules(checker) -> None:
    assert CODE
    assert [fault for path, source in CODE.items() for fault in checker(path, source)] == []


def test_nothing_is_loaded_unsafely() -> None:
    assert [fault for path, source in SOURCES.items() for fault in unsafe_loading(path, source)] == []


def test_file_names() -> None:
    # An ignored file shadows as well as a tracked one, so the folder itself is asked too.
    on_disk = [path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusers").glob("*.py")]
    assert badly_named([*FILES, *on_disk]) == []


def test_readme_names_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| `medart.py`" in readme
    assert missing_files(readme, ROOT) == []


def test_no_file_is_too_big() -> None:
    assert too_big(FILES, ROOT) == []


def test_packages_come_from_where_they_should() -> None:
    origins = {name: Path(str(getattr(find_spec(name), "origin", None))) for name in ("diffusers", *PACKAGES)}
    assert not origins["diffusers"].is_relative_to(ROOT / "diffusers")
    assert origins["diffusers"].name == "__init__.py"
    assert origins["diffusers_grad"].is_relative_to(ROOT / "diffusers")
    assert origins["llava_next_captioner"].is_relative_to(ROOT / "LLaVA-NeXT")
    assert origins["medart_core"].is_relative_to(ROOT / "medart_core")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sample.py", "import medart"),
        ("sample.py", "def f():\n    from prepare import main"),
        ("nano/demo.py", "import sample"),
        ("medart_core/data.py", "from models import DiT"),
        ("medart_core/data.py", "import llava_next_captioner.prompts"),
        ("medart_core/evaluation/report.py", "import prepare"),
        ("diffusers/diffusers_grad/sampler.py", "from medart_core.errors import UserError"),
        ("LLaVA-NeXT/llava_next_captioner/engines.py", "import diffusers_grad"),
        ("models.py", "import medart_core"),
        ("train_options/amp.py", "import medart"),
    ],
)
def test_wrong_arrows_are_seen(path: str, source: str) -> None:
    assert wrong_arrows(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sample.py", "import diffusers\nimport models\nfrom medart_core import text"),
        ("nano/train_vae.py", "from photographs import flowers"),
        ("medart_core/evaluation/report.py", "from ..errors import UserError\nfrom . import features"),
        ("diffusers/diffusers_grad/__init__.py", "from .sampler import sample_latents\nimport diffusers"),
        ("train_options/amp.py", "from train import main"),
    ],
)
def test_right_arrows_are_let_through(path: str, source: str) -> None:
    assert wrong_arrows(path, source) == []


def test_misplaced_imports_are_seen() -> None:
    assert misplaced_imports("medart_core/data.py", "import argparse\nfrom accelerate import Accelerator") == [
        "medart_core/data.py imports argparse",
        "medart_core/data.py imports accelerate",
    ]
    assert misplaced_imports("models.py", "def f():\n    import accelerate.utils")
    assert misplaced_imports("train.py", "import argparse, accelerate") == []
    assert misplaced_imports("medart_core/options.py", "import argparse") == []


def test_plain_parsers_are_seen() -> None:
    end = '\nif __name__ == "__main__":\n    '
    assert plain_parsers("nano/a.py", "parser = argparse.ArgumentParser()")
    assert plain_parsers("nano/a.py", f"parser = Parser(){end}main()")
    assert plain_parsers("nano/a.py", f"parser = Parser(){end}with exit_codes():\n        main()") == []
    assert plain_parsers("sample.py", "def f(parser: argparse.ArgumentParser): ...") == []


def test_long_code_is_seen() -> None:
    assert too_long("sample.py", "x = 1\n" * 251)
    assert too_long("medart_core/data.py", "x = 1\n" * 251) == []
    assert too_long("medart_core/data.py", "x = 1\n" * 301)
    assert too_long("models.py", "x = 1\n" * 301) == []
    assert too_long("models.py", "x = 1\n" * 401)
    assert too_long("nano/a.py", "x = 1\n" * 250 + 'if __name__ == "__main__":\n    x = 2\n')
    for name, allowed in (("f", 60), ("main", 120)):
        body = f"class A:\n    def {name}(self):\n" + "        x = 1\n" * (allowed - 1)
        assert too_long("medart_core/data.py", body) == []
        assert too_long("medart_core/data.py", body + "        x = 1\n")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "torch.load(\n    path,\n    map_location='cpu',\n)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "torch.jit.load(path)",
        "T5.from_pretrained(path, trust_remote_code=True)",
        "T5.from_pretrained(path, trust_remote_code=options.trust)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_loading_is_seen(source: str) -> None:
    assert len(unsafe_loading("sample.py", source)) == 1


def test_safe_loading_is_let_through() -> None:
    assert unsafe_loading("train.py", "torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)") == []


def test_bad_names_are_seen() -> None:
    bad = ["medart_core/utils.py", "nano/common/a.py", "helpers.py", "diffusers/__init__.py", "diffusers/setup.py"]
    assert badly_named([*bad, "medart/__init__.py"]) == [*bad, "medart/__init__.py"]
    assert badly_named(["diffusers/diffusers_grad/__init__.py", "nano/commons_photographs.py"]) == []


def test_missing_files_of_readme_are_seen(tmp_path: Path) -> None:
    (tmp_path / "here.py").touch()
    readme = "| `here.py` | is |\n| `gone.py` | is not |\n| `rooms/` | neither |\n| `--rank` | an option |\n"
    assert missing_files(readme, tmp_path) == ["gone.py", "rooms/"]


def test_big_files_are_seen(tmp_path: Path) -> None:
    for name, n_bytes in (("small", MAX_FILE_BYTES), ("big", MAX_FILE_BYTES + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(n_bytes)  # sparse: takes no space
    assert too_big(["small", "big"], tmp_path) == ["big"]


def test_files_are_listed_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".ci/run", "nano/demo.py", ".venv/lib/a.py", "dataset/x.jpeg", ".cache/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", "")
    assert sorted(project_files(tmp_path)) == [".ci/run", "nano/demo.py"]
