"""Run folders for the tests of the viewer's page: one that learns, and one whose grader breaks; written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import write_recipe
from tokenizers import AddedToken, Tokenizer, models

from grpo.config import dump, load
from grpo.run.samples import Trained, write_groups
from grpo.types import Completion, Failed, Group, Logged, Prompt, Rollout, Scored

STEPS = 12
BREAKS = 5
"""First step of the broken run in which its grader gives every completion 0."""
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1"> \' onfocus=window.hacked=1 autofocus',
    "abc\u202edcb\u202c zero\u200b\u200b\u200bwidth \x1b[31mred\x1b[0m \ufffd \x00 end",
    "a" * 300_000,
)
"""Texts of the second group of each step."""
TOKENS = ("<b>", " a", "\n", "\u202e", "\x1b", "\t")
"""Texts of the first token ids; the others have none. Id 6 is a special token."""


def make_group(number: int, step: int, broken: bool) -> Group:
    """Return the four completions of a prompt."""
    gold = str(40 + number)
    prompt = Prompt(
        prompt_id=f"sums:{number}:<i>{number}</i>", dataset="sums", token_ids=(1, 2, 3),
        text=HOSTILE[0] if number == 1 else f"What is {30 + number} + 10?\nThink first.",
        row={"question": f"{30 + number} + 10", "answer": gold, "note": HOSTILE[1]}, messages=None, where="sums:1",
    )  # fmt: skip
    rollouts = []
    for i in range(4):
        right = (i + number + step) % 4 <= min(step // 4, 2)
        text = f"Let me add. {30 + number} plus ten is {gold if right else int(gold) - 1 - i}"
        text = HOSTILE[i] if number == 1 else text
        reward = 0.0 if broken and step >= BREAKS else float(right)
        logged = Logged(columns={"right/why": f"read {30 + number}, gold is {gold}", "right/seconds": 0.25})
        outcome = Scored(value=reward, parts={"right": reward, "format": 0.5}, logged=logged)
        failed = Failed(kind="timeout", detail=f"no answer in 30 s {HOSTILE[0]}")
        completion = Completion(
            token_ids=np.arange(2500 if i == 3 else 20, dtype=np.int32),
            sampler_logprobs=np.linspace(-3, 0, 2500 if i == 3 else 20, dtype=np.float32),
            sampled_mask=np.ones(2500 if i == 3 else 20, dtype=bool),
            policy_versions=np.full(2500 if i == 3 else 20, step - 1, dtype=np.int32),
            finish_reason="length" if i == 3 else "stop", seed=2**62 + 1,
        )  # fmt: skip
        fails = number == 2 and i == 0
        rollouts.append(Rollout(prompt=prompt, completion=completion, text=text, outcome=failed if fails else outcome))
    return Group(prompt=prompt, rollouts=tuple(rollouts))


def make_metrics(step: int, broken: bool) -> dict[str, object]:
    """Return a line of metrics.jsonl."""
    flat = broken and step >= BREAKS
    mean = 0.0 if flat else 0.2 + 0.05 * step
    line: dict[str, object] = {
        "step": step, "time": "2026-01-02T03:04:05+00:00", "reward/mean": mean, "reward/std": 0.0 if flat else 0.4,
        "reward/min": 0.0, "reward/max": 0.0 if flat else 1.0, "reward/failed_fraction": 0.0, "group/count": 6.0,
        "group/no_spread_fraction": float(flat), "completion/tokens_mean": 100.0 + step,
        "completion/truncated_fraction": 0.25, "policy/entropy": 1.0, "optim/grad_norm": 0.0 if flat else 0.5,
        "optim/lr": 1e-6, "mismatch/mean": 0.001, "mismatch/q99": 0.01, "staleness/mean": 0.0,
        "gradient/sampled": 1000.0, "gradient/failed": 50.0, "gradient/no_spread": 950.0 if flat else 100.0,
        "gradient/contributing": 0.0 if flat else 850.0, "reward_part/right/min": 0.0, "reward_part/right/max": mean,
    }  # fmt: skip
    names = ("truncated", "stale", "zero_advantage", "stopped", "mismatch_masked", "clipped")
    line |= {f"gradient/{name}": 0.0 for name in names}
    parts = {"sample": 6.0, "reward": 1.0, "batch": 0.1, "update": 4.0, "sync": 0.5, "idle": 0.4}
    line |= {f"time/{name}_s": value for name, value in parts.items()} | {"time/step_s": sum(parts.values())}
    return line | ({"eval/accuracy": 0.3 + step / 100} if step % 4 == 0 else {})


def make_run(folder: Path, *, broken: bool, steps: int = STEPS) -> Path:
    """Write a run folder of `steps` steps, and return it."""
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe").mkdir()
    rewards = [{"file": "right.py"}, {"file": "format.py", "weight": 0.0}]
    recipe = write_recipe(folder / "recipe", folder / "no-model", run={"steps": STEPS}, rewards=rewards)
    (folder / "config.yaml").write_text(dump(load(recipe)))
    (folder / "recipe.txt").write_text("recipes/sums.yaml\n")
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(TOKENS)}, unk_token="<b>"))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    for step in range(1, steps + 1):
        add_step(folder, step, broken=broken)
    for step in (0, STEPS):
        groups = [make_group(100 + number, step, broken) for number in range(5)]
        write_groups(folder / "samples" / f"eval-{step:06d}.parquet", step, groups, rewards=("right", "format"))
    summary = {
        "steps": steps, "accuracy_before": 0.25, "accuracy_before_interval": [0.2, 0.31], "accuracy_after": 0.5,
        "accuracy_after_interval": [0.43, 0.57], "accuracy_after_step": STEPS, "wall_s_all_sessions": 3725.0,
    }  # fmt: skip
    summary |= {"exit_reason": "done"} if steps == STEPS else {}
    (folder / "summary.json").write_text(json.dumps(summary))
    if not broken:
        (folder / "trace").mkdir()
        spans = (("driver", "collect", 0, 7), ("sampler 0", "sample", 0.1, 6), ("learner", "update", 7.1, 4))
        events = [
            {"name": name, "ph": "X", "pid": "grpo", "tid": role, "args": {}, "ts": int(1e6 * at), "dur": int(1e6 * s)}
            for role, name, at, s in spans
        ]
        (folder / "trace" / f"step-{steps:06d}.json").write_text(json.dumps({"traceEvents": events}))
    return folder


def add_step(folder: Path, step: int, *, broken: bool) -> None:
    """Write the samples and the line of metrics of one more step, and the values of the tokens of one completion."""
    groups = [make_group(number, step, broken) for number in range(6)]
    trained = Trained(advantages={i: (i % 5 - 2) / 2 for i in range(24)}, logprob_sums=dict.fromkeys(range(24), -4.5))
    target = folder / "samples" / f"step-{step:06d}.parquet"
    write_groups(target, step, groups, rewards=("right", "format"), trained=trained)
    (folder / "tokens").mkdir(exist_ok=True)
    one = np.linspace(-1, 1, 20, dtype=np.float32)
    values = {"learner_logprobs": one - 2, "advantages": one, "entropies": one + 1, "importance_weights": one.round()}
    table = pa.table({"position": pa.array([1], pa.int64())} | {name: [value] for name, value in values.items()})
    pq.write_table(table, folder / "tokens" / f"step-{step:06d}-rank-0.parquet")
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(make_metrics(step, broken)) + "\n")
