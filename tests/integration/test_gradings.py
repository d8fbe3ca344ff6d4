"""Ten thousand gradings by the real grader in real workers, some of which never end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.rewards.child.calls import Info
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.types import Failed, Scored

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "math_train.jsonl"
HANGS = r"\boxed{\int_0^{1} \sin(x^3) e^{x^2} \cos(x) dx}"
"""sympy works on this one for minutes."""


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="../shared/data/math_train.jsonl is not there: it is not in the project")
@pytest.mark.timeout(1800)
def test_ten_thousand_gradings_with_one_in_a_hundred_hanging(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    items = []
    for n in range(10_000):
        row = rows[n % len(rows)]
        right = n % 2 == 0
        if n % 100 == 50:
            row = {"answer": "64"}  # a gold answer of another kind is told apart from the integral at once
        text = HANGS if n % 100 == 50 else rf"The answer is \boxed{{{row['answer'] if right else 'no such thing'}}}."
        info: Info = {"token_count": 1, "finish_reason": "stop", "prompt": "", "step": 1}
        items.append(RewardItem(completion=text, row=row, messages=None, info=info, dataset="math"))
    reward = RewardConfig(file=str(ROOT / "reward_fns" / "math_answer.py"), timeout_s=4.0)
    with RewardPool([reward], files=[Path(reward.file)], workers=2, log_dir=tmp_path) as pool:
        futures = [pool.submit([item]) for item in items]
        outcomes = [future.result(timeout=1500)[0] for future in futures]
    hanging = {n for n in range(10_000) if n % 100 == 50}
    timed_out = {n for n, o in enumerate(outcomes) if isinstance(o, Failed) and o.kind == "timeout"}
    assert timed_out == hanging
    verdicts = {n: o.value for n, o in enumerate(outcomes) if isinstance(o, Scored)}
    assert verdicts == {n: float(n % 2 == 0) for n in range(10_000) if n not in hanging}
