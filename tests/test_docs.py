"""The documents: links lead somewhere, and the commands in them name scripts, flags and make targets that exist."""

import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_layout import CODE, FILES, ROOT

PAGES = sorted(name for name in FILES if name.endswith(".md") and not name.startswith("tests/"))
LAUNCHERS = {"accelerate", "torchrun"}
MISSPELT = {"--learning_rat"}  # on purpose, in the table of mistakes
OPTIONS = {  # scripts whose options are a dataclass, in either spelling
    "medart.py": ("medart_core/medart_options.py", "MedArtOptions"),
    "VSG.py": ("medart_core/vsg_options.py", "VSGOptions"),
    "train.py": ("medart_core/dit_options.py", "DiTOptions"),
}
OPTIONS |= {name: OPTIONS["train.py"] for name in FILES if re.fullmatch(r"train_options/train_\w+\.py", name)}


# --- Links ---


def without_code(page: str) -> str:
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: "x" * len(code[0]), re.sub(r"^ {4}.*$", "", page, flags=re.MULTILINE))


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def dead_links(name: str, page: str, root: Path = ROOT) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        file, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (root / name).parent / file if file else root / name
        if not path.exists() or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            dead.append(f"{name}: {target}")
    return dead


# --- Notices ---


@functools.cache
def printable() -> list[str]:
    """What our files can print: their strings, with a zero byte for each value that is filled in."""
    makefile = re.sub(r"\$\(\w+\)", "\0", (ROOT / "Makefile").read_text("utf-8"))
    found = [line.partition(" := ")[2] for line in makefile.splitlines()]
    for tree in map(ast.parse, CODE.values()):
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.strip() for text in found]


def notices(page: str) -> list[str]:
    """Those of our own files in the page's tables, as patterns: ... stands for anything."""
    rows = re.findall(r"^\| `([^`]+)`[^|]* \| `(\S+\.py|Makefile)` \| [^|]+ \|$", page, flags=re.MULTILINE)
    return [".*".join(map(re.escape, notice.split("..."))) for notice, _ in rows]


def never_printed(page: str) -> list[str]:
    texts = printable()
    return [
        notice for notice in notices(page)
        if len(re.findall("[a-z]", notice)) < 5 or not any(re.fullmatch(notice, text, re.DOTALL) for text in texts)
    ]  # fmt: skip


def test_notices_are_those_that_the_source_has() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    assert len(notices(page)) == 48 and never_printed(page) == []
    warnings = [text for text in printable() if text.startswith("warning: ")]
    unknown = [text for text in warnings if not any(re.fullmatch(notice, text) for notice in notices(page))]
    assert len(warnings) > 2 and unknown == []


# --- Help ---


@pytest.mark.parametrize("script", [name for name in CODE if '__name__ == "__main__"' in CODE[name]])
def test_help_has_an_example_and_a_word_for_each_option(script: str) -> None:
    tree = ast.parse(CODE[script])
    assert Path(script).name in (ast.get_docstring(tree) or "")
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]  # fmt: skip
    assert [ast.unparse(call) for call in calls if "help" not in [keyword.arg for keyword in call.keywords]] == []


# --- Commands ---


def flags_of(script: str) -> set[str]:
    """The flags of a script, read off its source: importing them all would take a minute."""
    tree = ast.parse((ROOT / script).read_text("utf-8"))
    words = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    flags = {word for word in words if re.fullmatch(r"--[a-zA-Z][\w-]*", word)} | {"--help"}
    if script in OPTIONS:
        file, of_class = OPTIONS[script]
        [options] = [
            node for node in ast.parse((ROOT / file).read_text("utf-8")).body
            if isinstance(node, ast.ClassDef) and node.name == of_class
        ]  # fmt: skip
        names = {
            item.target.id
            for item in options.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        names |= {name.removeprefix("no_") if name.startswith("no_") else f"no_{name}" for name in names}
        names |= {"config", "seed", "feature_path"}
        flags |= {f"--{name}" for name in names} | {f"--{name.replace('_', '-')}" for name in names}
    return {"--tf32", "--no-tf32", *flags} if "--tf32" in flags else flags


def commands(page: str) -> list[str]:
    """Lines of code, and code within sentences; a line that ends in a backslash goes on."""
    page = re.sub(r"\\\n\s*", " ", page)
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", page, flags=re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))
    return [line.strip() for block in (*fenced, *indented, *spans) for line in block.splitlines()]


def wrong_words(line: str) -> list[str]:
    """Scripts, flags and targets of a command that do not exist."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a sentence with an apostrophe, no command
        return []
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word) and word not in targets]
    starts = [place for place, word in enumerate(words) if word.endswith(".py")]
    if not starts or not (starts[0] == 0 or words[0] in LAUNCHERS or words[0].endswith(("python", "python3"))):
        return []
    script, given = words[starts[0]], words[starts[0] + 1 :]
    if not (ROOT / script).is_file():
        return [script] if starts[0] else []  # by itself it is a name in a sentence
    flags = {word.partition("=")[0] for word in given if word.startswith("--")}
    return sorted(flags - flags_of(script) - MISSPELT)


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str) -> None:
    page = (ROOT / name).read_text("utf-8")
    assert dead_links(name, page) == []
    assert {line: wrong for line in commands(page) if (wrong := wrong_words(line))} == {}


@pytest.mark.parametrize("table", ["captions", "table2", "table3"])
@pytest.mark.parametrize("data", ["kvasir", "skin"])
def test_the_full_size_tables_are_made_of_commands_that_exist(data: str, table: str) -> None:
    command = ["bash", str(ROOT / "docs" / "full-size.sh"), data, table]
    done = subprocess.run(command, env=os.environ | {"DRY": "1", "SEEDS": "1 2"}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == {"captions": 1, "table2": 20, "table3": 37}[table], done.stderr
    assert [wrong for line in lines for wrong in wrong_words(line)] == []


def test_the_job_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "docs" / "slurm" / "medart.sbatch")], check=True)


def test_faults_are_seen(tmp_path: Path) -> None:
    rows = ["`left out: ...` | `VSG.py`", "`left in: ...` | `VSG.py`", "`...e...` | `VSG.py`", "`left in` | torch"]
    assert never_printed("\n".join(f"| {row} | x |" for row in rows)) == [r"left\ in:\ .*", ".*e.*"]
    page = "# One: `two`\n[a](#one-two) [b](#three) [c](gone.md) `[d](code)`\n\n    [e](code)\n"
    (tmp_path / "page.md").write_text(page)
    assert dead_links("page.md", page, tmp_path) == ["page.md: #three", "page.md: gone.md"]
    lines = commands(
        "`make demoo`\n\n    A=1 python sample.py --promt x  # --no\n\n```bash\npython gone.py \\\n  --x\n```\n"
    )
    assert sorted(wrong for line in lines for wrong in wrong_words(line)) == ["--promt", "demoo", "gone.py"]
    assert (
        wrong_words("accelerate launch --multi_gpu medart.py --M_times=2 --hldf --no_compile --max-train-steps 3")
        == []
    )


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")  # what it answers to the question whether it is 3.11 or newer
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-C", tmp_path, ".venv/.created", f"PYTHON={old}"],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath},
    )
    assert done.returncode == 2 and f"'{old}' is not Python 3.11 or newer: name one" in done.stderr
    assert not (tmp_path / ".venv").exists()
