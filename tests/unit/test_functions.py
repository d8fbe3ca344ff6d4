"""Reward functions that are given as Python objects, loaded and called by real reward workers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import linecache
import os
import site
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import write_recipe
from test_rewards import items, values

from grpo import config
from grpo.checks.check import reward_fingerprints
from grpo.cluster import upload
from grpo.config import RewardConfig
from grpo.rewards import functions, pickling
from grpo.rewards.imports import locate
from grpo.rewards.pool import RewardPool
from grpo.rewards.preflight import check_loads
from grpo.types import UserError

ROOT = Path(__file__).resolve().parents[2]
BONUS = {"long enough", "also"}


def halved(text: str) -> float:
    return len(text) / 2


def by_globals(completion: str, row: Mapping[str, Any]) -> float:
    return halved(completion) + (10 if completion in BONUS else 0)


def by_columns(completions: list[str], answer: list[str], **columns: list[Any]) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def compute_score(solution_str: str, ground_truth: str) -> dict[str, float]:
    return {"score": 2.0 if solution_str == ground_truth else 0.5}


def above(limit: int) -> Callable[..., float]:
    def reward(completion: str, row: Mapping[str, Any]) -> float:
        return float(len(completion) > limit)

    return reward


@dataclass
class Scaled:
    factor: float

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        return self.factor * len(completion)

    def by_method(self, completions: list[str], **columns: list[Any]) -> list[float]:
        return [self.factor + len(text) for text in completions]


def with_factor(completion: str, row: Mapping[str, Any], *, factor: float) -> float:
    return factor * len(completion)


def failing(completion: str, row: Mapping[str, Any]) -> float:
    return float(json.loads(completion))


def section(function: Callable[..., Any], folder: Path) -> RewardConfig:
    return RewardConfig(**functions.write(function, 0, folder))


def score(function: Callable[..., Any], folder: Path, *texts: str) -> list[Any]:
    """Outcomes of the function in a worker that starts in another folder."""
    reward = section(function, folder)
    files = locate([reward], Path("recipe.yaml"), folder)
    with RewardPool([reward], files=files, workers=1, log_dir=folder / "logs") as pool:
        return pool.submit(items(texts)).result(timeout=60)


@pytest.mark.parametrize(
    ("function", "style", "name", "expected"),
    [
        (by_globals, "grpo", "by_globals", [0.5, 15.5]),
        (by_columns, "trl", "by_columns", [1.0, 0.0]),
        (compute_score, "verl", "compute_score", [2.0, 0.5]),
        (above(3), "grpo", "reward", [0.0, 1.0]),
        (lambda completion, row: 3.0 * len(completion), "grpo", "reward", [3.0, 33.0]),
        (Scaled(0.5), "grpo", "Scaled", [0.5, 5.5]),
        (Scaled(0.5).by_method, "trl", "by_method", [1.5, 11.5]),
        (functools.partial(with_factor, factor=2.0), "grpo", "with_factor", [2.0, 22.0]),
    ],
)
def test_a_function_is_called_by_its_parameters(
    function: Callable[..., Any], style: str, name: str, expected: list[float], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir("/")  # this module cannot be imported there
    assert values(score(function, tmp_path, "2", "long enough")) == expected
    reward = RewardConfig(**functions.write(function, 0, tmp_path / "again"))
    assert (reward.style, reward.name, reward.file) == (style, name, f"python_rewards/{name}.py")


def test_an_error_names_the_line_of_the_function(tmp_path: Path) -> None:
    line = failing.__code__.co_firstlineno + 1
    [outcome] = score(failing, tmp_path, "{")
    assert outcome.kind == "exception"
    assert outcome.detail.startswith("failing: JSONDecodeError: Expecting property name")
    assert outcome.detail.endswith(f" at {__file__}:{line}")


def test_a_function_that_fits_no_style_is_refused_with_its_line(tmp_path: Path) -> None:
    reward = section(halved, tmp_path)
    with pytest.raises(UserError) as caught:
        check_loads([reward], locate([reward], Path("r.yaml"), tmp_path))
    line = halved.__code__.co_firstlineno
    assert str(caught.value).startswith(f"rewards[0]: {__file__}:{line}: halved(text: 'str') -> 'float' does not fit")


def test_an_installed_function_is_imported_by_the_worker(tmp_path: Path) -> None:
    reward = section(json.dumps, tmp_path)
    [file] = locate([reward], Path("r.yaml"), tmp_path)
    assert "# def dumps(obj, *, skipkeys=False," in file.read_text()
    with pytest.raises(UserError, match=r"^rewards\[0\]: .*json/__init__.py:\d+: dumps\(.* does not fit style grpo"):
        check_loads([reward], [file])


def test_functions_of_the_same_name_have_files_of_their_own(tmp_path: Path) -> None:
    written = [functions.write(above(n), n, tmp_path)["file"] for n in range(3)]
    assert written == ["python_rewards/reward.py", "python_rewards/reward_2.py", "python_rewards/reward_3.py"]


def test_resuming_compares_a_function_not_the_name_of_its_file(tmp_path: Path) -> None:
    rewards = [RewardConfig(**functions.write(above(n), 0, tmp_path)) for n in (1, 1, 2)]
    first, other_file, other_function = (
        reward_fingerprints(locate([reward], Path("r.yaml"), tmp_path)) for reward in rewards
    )
    assert rewards[0].file != rewards[1].file
    assert first == other_file != other_function


# --- what cannot be sent ---------------------------------------------------------------------------------------------


def refused(function: Callable[..., Any], folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        functions.write(function, 2, folder)
    return str(caught.value)


def test_what_cannot_be_sent_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()

    def with_lock(completion: str, row: Mapping[str, Any]) -> float:
        return float(lock.locked())

    assert refused(with_lock, tmp_path) == (
        "rewards[2]: with_lock cannot be sent to the reward workers: cannot pickle '_thread.lock' object; create it "
        "inside the function, or put the function into a file and give its path"
    )
    space: dict[str, Any] = {}
    exec("def typed(completion, row): return 1.0", space)
    assert refused(space["typed"], tmp_path) == (
        "rewards[2]: typed: its source cannot be read, and a run keeps the source of its rewards; define it in a file "
        "or in a notebook cell"
    )
    assert "rewards[2]: builtin_function_or_method: its source cannot be read" in refused(len, tmp_path)
    monkeypatch.setattr(pickling, "MAX_BYTES", 1 << 20)
    data = bytes((1 << 20) + 1)

    def with_data(completion: str, row: Mapping[str, Any]) -> float:
        return float(len(data))

    assert refused(with_data, tmp_path).startswith("rewards[2]: with_data uses 1 MiB of data, and at most 1 MiB")
    monkeypatch.setenv("JUDGE_API_KEY", "judge-31415926")
    key = "judge-31415926"

    def with_secret(completion: str, row: Mapping[str, Any]) -> float:
        return float(key in completion)

    assert refused(with_secret, tmp_path) == (
        "rewards[2]: with_secret uses the value of the environment variable JUDGE_API_KEY, which would be saved with "
        "it; read os.environ in the function instead, with rewards[2].env: [JUDGE_API_KEY]"
    )
    assert not (tmp_path / functions.FOLDER).exists()


# --- the digest ------------------------------------------------------------------------------------------------------

NOTEBOOK = """
    import re
    import helper
    WORDS = {"alpha", "beta", "gamma", "delta"}
    LIMIT = 3
    def inner(text):
        return sum(word in text for word in WORDS)
    class Kind:
        factor = 2
        def scaled(self, value):
            return self.factor * value
    def mine(completion, row):
        if not completion:
            return mine("x", row)
        return Kind().scaled(inner(completion) + helper.extra(completion)) if len(completion) < LIMIT else 0.0
"""
HELPER = "def extra(text):\n    return 0.25\n"
DIGEST = """
    import linecache, sys
    from pathlib import Path
    from grpo.rewards import functions
    place, source = Path(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, str(place))
    name = f"<cell {sys.argv[3]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), globals())
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        written = functions.write(mine, 0, Path(folder))
        print(functions.digest_of(Path(folder, written["file"])))
"""


def digest(folder: Path, notebook: str = NOTEBOOK, helper: str = HELPER, cell: str = "1") -> str:
    """Digest of the function `mine`, in a process of its own with another order of sets."""
    folder.mkdir()
    (folder / "helper.py").write_text(helper)
    command = [sys.executable, "-c", textwrap.dedent(DIGEST), str(folder), textwrap.dedent(notebook), cell]
    environment = os.environ | {"PYTHONHASHSEED": cell}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_digest_is_that_of_the_source_and_of_what_it_uses(tmp_path: Path) -> None:
    first = digest(tmp_path / "a")
    assert len(first) == 64
    moved = "\n\n    UNUSED = 1\n" + NOTEBOOK + "    def other(text):\n        return LIMIT\n"
    assert digest(tmp_path / "moved", moved, cell="2") == first  # other lines, path, process and unused names
    changes = {
        "body": ("else 0.0", "else 0.5"), "constant": ("LIMIT = 3", "LIMIT = 4"), "set": ('"beta"', '"Beta"'),
        "function": ("word in text for", "word == text for"), "method": ("self.factor * value", "self.factor + value"),
        "attribute": ("factor = 2", "factor = 3"),
    }  # fmt: skip
    for name, (old, new) in changes.items():
        assert NOTEBOOK.count(old) == 1
        assert digest(tmp_path / name, NOTEBOOK.replace(old, new)) != first, name
    assert digest(tmp_path / "module", helper=HELPER.replace("0.25", "0.5")) != first


def test_the_fingerprint_of_a_function_is_its_digest_and_travels_with_its_file(tmp_path: Path) -> None:
    rewards = [section(by_globals, tmp_path), RewardConfig(file=str(ROOT / "reward_fns" / "arithmetic.py"))]
    files = locate(rewards, Path("recipe.yaml"), tmp_path)
    run = tmp_path / "run"
    kept = functions.keep(rewards, files, run)
    assert kept == (run / "python_rewards" / "by_globals.py", files[1])
    assert functions.keep(rewards, kept, run) == kept
    before = reward_fingerprints(files)
    assert before["rewards[0].file"] == functions.digest_of(files[0])
    assert functions.digest_of(files[1]) is None
    assert reward_fingerprints(kept) == before
    # the config of the run is a recipe of its own
    assert locate(rewards[:1], run / "config.yaml") == [run / "python_rewards" / "by_globals.py"]
    # nor does a submitted job need anything else
    recipe = write_recipe(run, Path("hub/model"), run={"dir": "/shared/runs"}, rewards=[dataclasses.asdict(rewards[0])])
    options, files_of_job = upload.rewards(config.load(recipe), run / "config.yaml", {})
    assert options.rewards[0].file == "python_rewards/by_globals.py"
    assert files_of_job == {Path("python_rewards/by_globals.py"): kept[0]}
    source = kept[0].read_text()
    assert "# def by_globals(completion: str, row: Mapping[str, Any]) -> float:" in source
    assert "# def halved(text: str) -> float:" in source


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / section(halved, tmp_path).file
    written = file.read_text()
    first, second, rest = written.split("\n", 2)
    assert functions.digest_of(file) == first.removeprefix(functions.FIRST_LINE)
    for edited in (
        written.replace("# def halved", "# def doubled"),
        written[:-1],
        written + "halved = len\n",
        first[:-1] + "z\n" + second + "\n" + rest,
        first + "\n" + rest,
    ):
        assert edited != written
        file.write_text(edited)
        with pytest.raises(UserError) as caught:
            reward_fingerprints([file])
        assert str(caught.value) == f"{file} has a pickled function and was edited; write a reward file instead"


def test_the_file_of_a_function_needs_the_same_python(tmp_path: Path) -> None:
    file = tmp_path / section(halved, tmp_path).file
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert file.read_text().count(f"Python {here}") == 2
    code = f"import sys; sys.version_info = (3, 9, 1); exec(open({str(file)!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"RuntimeError: halved was saved by Python {here} and cannot be loaded by Python 3.9; use Python {here}, or "
        "write a reward file"
    )


def test_a_path_above_the_run_folder_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = section(halved, tmp_path / "runs" / "old").file
    file, run = tmp_path / "runs" / "old" / name, tmp_path / "runs" / "deep" / "new"
    for given in (f"../old/{name}", f"x/../../old/{name}", f"~/runs/old/{name}"):
        assert functions.keep([RewardConfig(file=given)], [file], run) == (file,)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["old"]


# --- the digests of lambdas, of what refers to itself, and of caches --------------------------------------------------


def test_the_digest_of_a_lambda_is_that_of_its_own_text(tmp_path: Path) -> None:
    """A statement has other parts, which differ between a call and the call that resumes."""
    cells = """
        mine = id and (lambda completion, row: 1.0 if row else LIMIT)
        mine, resume = (lambda completion, row: 1.0 if row else LIMIT), (lambda completion, row: 2.0)
        mine = (lambda: (lambda completion, row: 1.0 if row else LIMIT))()
        mine = dict(resume=len, rewards=[lambda: 2.0, lambda completion, row: 1.0 if row else LIMIT])["rewards"][1]
        mine = lambda completion, row: 1.0 if row else LIMIT + 1
        mine = lambda completion, row=None: 1.0 if row else LIMIT
    """
    lines = textwrap.dedent(cells).strip().splitlines()
    first, *same, changed, parameters = [
        digest(tmp_path / str(i), "LIMIT = 1\n" + line + "\n") for i, line in enumerate(lines)
    ]
    assert same == [first] * 3
    assert len({first, changed, parameters, digest(tmp_path / "constant", "LIMIT = 2\n" + lines[0])}) == 4


def test_the_file_of_a_lambda_has_its_source_alone(tmp_path: Path) -> None:
    _, reward = None, lambda completion, row: [float(len(completion))][0]
    source = (tmp_path / section(reward, tmp_path).file).read_text().splitlines()[3]
    assert source == "# lambda completion, row: [float(len(completion))][0]"


def test_a_lambda_without_positions_is_described_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "lambda_source", lambda code: None)
    some = [lambda c, row: [x + 1 for x in c], lambda c, row: [x + 2 for x in c], lambda c, row: [x + 1 for x in c]]
    first, other, same = (functions.digest_of(tmp_path / section(one, tmp_path).file) for one in some)
    assert first == same != other


@dataclass(eq=False)
class Node:
    label: str
    parent: Node | None = None
    children: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        return float(len(completion) + len(self.children))


def tree(label: str) -> Node:
    root = Node("root")
    root.children = [Node("leaf", root), Node(label, root), root.children]
    root.children.append(root.children)
    return root


def test_values_may_refer_to_themselves(tmp_path: Path) -> None:
    digests = [functions.digest_of(tmp_path / section(tree(label), tmp_path).file) for label in "aab"]
    assert digests[0] == digests[1] != digests[2]
    loop: dict[str, Any] = {}
    loop["loop"] = [loop]

    def with_loop(completion: str, row: Mapping[str, Any]) -> float:
        return float(len(completion) + len(loop["loop"][0]) + unset())

    assert values(score(tree("a"), tmp_path / "tree", "abc")) == [7.0]
    unassigned = functions.Description("x").of(with_loop)

    def unset() -> int:
        return 2

    assert functions.Description("x").of(with_loop) != unassigned
    assert values(score(with_loop, tmp_path / "loop", "abc")) == [6.0]


def test_a_module_that_was_edited_after_its_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "def extra():\n    return 0.5\ndef rule(completion, row):\n    return extra() + len([c for c in completion])\n"
    )
    file = tmp_path / "edited_rules.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    rules: ModuleType = importlib.import_module("edited_rules")
    first = functions.digest_of(tmp_path / section(rules.rule, tmp_path).file)
    for changed in (
        source.replace("0.5", "0.125"),
        source.replace("c for c", "c+c for c"),
        "# moved\n" + source,
        source.replace("return 0.5", "return (0.5"),
    ):
        file.write_text(changed)
        assert refused(rules.rule, tmp_path).endswith(
            f"{file} was edited after {'extra' if '0.125' in changed else 'rule'} was imported from it; reload the "
            "module edited_rules, or restart Python"
        )
    file.write_text(source.replace("0.5", "0.125"))
    importlib.reload(rules)
    assert functions.digest_of(tmp_path / section(rules.rule, tmp_path).file) != first
    linecache.clearcache()


def test_packages_of_the_python_below_a_virtual_environment_are_installed() -> None:
    """The workers of a virtual environment with system packages import them there."""
    assert set(site.getsitepackages([sys.base_prefix])) <= set(pickling.INSTALLED)
    assert set(site.getsitepackages()) <= set(pickling.INSTALLED)


SHARED = """
    def common(text):
        return len(text)
    def first(text):
        return common(text)
    def second(text):
        return common(text)
    def third(text):
        return common(text)
    def mine(completion, row):
        return first(completion) + second(completion) + third(completion)
"""


def test_the_digest_does_not_depend_on_the_order_of_names(tmp_path: Path) -> None:
    """Names are in a set, whose order follows the hash seed. What they share is described with the first."""
    assert len({digest(tmp_path / cell, SHARED, cell=cell) for cell in "12345"}) == 1


class Backwards(frozenset[Any]):
    """A set whose members have other addresses, and so another order."""

    def __iter__(self) -> Iterator[Any]:
        return reversed([*super().__iter__()])


def shared(text: str) -> float:
    return len(text) / 3


def one_rule(text: str) -> float:
    return shared(text) + len(RULES)


def other_rule(text: str) -> float:
    return shared(text) * 2


RULES = frozenset({one_rule, other_rule, (shared, 1)})


def test_the_digest_does_not_depend_on_the_order_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the members share is described with the first of them; one of them uses the set."""
    texts, sources = [], []
    for kind in (frozenset, Backwards):
        monkeypatch.setitem(globals(), "RULES", kind([one_rule, other_rule, (shared, 1)]))
        description = functions.Description("x")
        texts.append(description.of([RULES, {"b", "a", 3}]))
        sources.append(description.sources)
    assert texts[0] == texts[1]
    assert sources[0] == sources[1]
    assert "{'a', 'b', 3}" in texts[0]
    monkeypatch.setitem(globals(), "RULES", frozenset([one_rule, shared]))
    assert functions.Description("x").of([RULES, {"b", "a", 3}]) != texts[0]


def test_a_cached_function_is_sent_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import functools\n"
        "@functools.lru_cache(maxsize=7, typed=True)\n"
        "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
        "@functools.cache\n"
        "def compute_score(solution_str, ground_truth):\n    return fib(len(solution_str)) + len(str(ground_truth))\n"
        "def rule(completion, row):\n    return float(fib(len(completion)) + fib.cache_parameters()['maxsize'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for name, text in (("cached_rules", source), ("cached_other", source.replace("n < 2", "n < 3"))):
        (tmp_path / f"{name}.py").write_text(text)
        rules: ModuleType = importlib.import_module(name)
        digests.append(functions.digest_of(tmp_path / section(rules.rule, tmp_path).file))
    assert digests[0] != digests[1]
    rules = importlib.import_module("cached_rules")
    monkeypatch.chdir("/")
    assert values(score(rules.rule, tmp_path / "rule", "abcdef")) == [8.0 + 7]
    reward = section(rules.compute_score, tmp_path)
    assert (reward.name, reward.style) == ("compute_score", "verl")
    assert values(score(rules.compute_score, tmp_path / "cached", "abcdef")) == [8.0 + len("2")]


def test_a_module_that_is_not_installed_is_sent_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scoring_rules.py").write_text(
        "import json\nSCALE = 4\ndef rule(completion, row):\n    return SCALE * len(json.dumps(completion))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rules: ModuleType = importlib.import_module("scoring_rules")
    monkeypatch.chdir("/")
    rules.SCALE = 5

    def through_module(completion: str, row: Mapping[str, Any]) -> float:
        return float(rules.rule(completion, row))

    assert values(score(rules.rule, tmp_path, "abc")) == [25.0]
    assert values(score(through_module, tmp_path, "abc")) == [25.0]
    linecache.clearcache()
