"""The endpoints, on runs written by hand."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_run import CONFIG, make_run, sample, write_metrics, write_samples

from grpo.types import UserError
from grpo.view import api
from grpo.view.files import NotFoundError


def get(run: Path | list[Path], path: str, /, **query: str) -> Any:
    """The answer of an endpoint, as a reader of its JSON sees it."""
    opened = api.open_paths(run if isinstance(run, list) else [run])
    return json.loads(b"".join(api.parts_of(api.answer(opened, path, query))))


def lines_of(run: Path, **query: str) -> list[Any]:
    opened = api.open_paths([run])
    return [json.loads(line) for line in api.parts_of(api.answer(opened, "/api/export", query))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a run")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_in_the_list(run: Path) -> None:
    (run / "recipe.txt").write_text("recipes/sums.yaml\n")
    summary = {
        "exit_reason": "done", "accuracy_before": 0.25, "accuracy_before_interval": [0.2, 0.3],
        "accuracy_after": 0.5, "accuracy_after_interval": [0.4, math.nan], "accuracy_after_step": 2,
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    [entry] = get(run, "/api/runs")["runs"]
    changed = entry.pop("changed")
    assert entry == {
        "run": 0, "name": "a run", "folder": str(run), "recipe": "recipes/sums.yaml", "state": "done", **summary,
        "accuracy_after_interval": [0.4, None], "steps": 2, "steps_planned": 4, "alarm_titles": [], "problem": None,
    }  # fmt: skip
    assert get(run, "/api/runs")["runs"][0]["changed"] == changed
    write_samples(run, "step-000003", [sample()])
    assert get(run, "/api/runs")["runs"][0]["changed"] != changed


@pytest.mark.parametrize(
    ("reason", "state"),
    [("done", "done"), ("failed: no memory", "failed"), ("stopped by SIGTERM", "stopped"), (None, "running")],
)
def test_states(run: Path, reason: str | None, state: str) -> None:
    if reason:
        (run / "summary.json").write_text(json.dumps({"exit_reason": reason}))
    assert get(run, "/api/runs")["runs"][0]["state"] == state


def test_a_run_that_was_killed_is_unknown_and_one_that_is_locked_is_running(run: Path) -> None:
    import fcntl

    for file in ("metrics.jsonl", "samples"):
        os.utime(run / file, (1e9, 1e9))
    assert get(run, "/api/runs")["runs"][0]["state"] == "unknown"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert get(run, "/api/runs")["runs"][0]["state"] == "running"
    assert get(run, "/api/runs")["runs"][0]["state"] == "unknown"


def test_the_accuracies_of_a_run_that_trains_are_those_of_its_metrics(run: Path) -> None:
    write_metrics(run, [{"step": 0, "eval/accuracy": 0.1}, {"step": 1}, {"step": 2, "eval/accuracy": 0.4}])
    [entry] = get(run, "/api/runs")["runs"]
    assert [entry[f"accuracy_{name}"] for name in ("before", "after", "after_step")] == [0.1, 0.4, 2]
    assert entry["accuracy_after_interval"] is None


def test_one_run(run: Path) -> None:
    (run / "trace").mkdir()
    (run / "trace" / "step-000002.json").write_text("{}")
    (run / "sessions.json").write_text('[{"began": 1.0, "seconds": null}]')
    write_samples(run, "eval-000002", [sample()])
    answer = get(run, "/api/runs/0")
    assert answer["files"] == [
        {"file": "step-000001", "kind": "step", "step": 1, "rows": 4},
        {"file": "step-000002", "kind": "step", "step": 2, "rows": 4},
        {"file": "eval-000002", "kind": "eval", "step": 2, "rows": 1},
    ]
    assert answer["trace_steps"] == [2]
    assert answer["sessions"] == [{"began": 1.0, "seconds": None}]
    options = {one["name"]: one for one in answer["options"]}
    assert options["run.steps"]["value"] == 4
    assert (options["run.steps"]["default"], options["run.steps"]["required"]) == (None, True)
    assert (options["data.eval.sets"]["value"], options["data.eval.sets"]["is_default"]) == ([], True)
    assert options["sampling.temperature"] == {
        "name": "sampling.temperature", "value": 1.0, "default": 1.0, "required": False, "is_default": True,
        "doc": options["sampling.temperature"]["doc"],
    }  # fmt: skip
    assert options["rewards[0].file"]["value"] == "judge.py"
    assert answer["weights"] == {"judge": 1.0}
    assert options["rewards[0].weight"]["is_default"] is True
    assert {"name": "policy/entropy", "section": "Policy and optimizer",
            "doc": "entropy in nats per token, of the full distribution at the sampling temperature",
            } in answer["metrics"]  # fmt: skip
    assert [one["name"] for one in answer["waterfall"]] == [
        f"gradient/{name}" for name in ("failed", "truncated", "no_spread", "stale", "zero_advantage", "stopped",
                                        "mismatch_masked", "clipped", "contributing")
    ]  # fmt: skip


def test_curves(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "eval/accuracy": 0.5}\n'
        '{"step": 1, "reward/mean": 0.25, "time": "x"}\n'
        '{"step": 2, "reward/mean": NaN}\n'
        '{"step": 2, "eval/accuracy": 0.75}\n'
        '{"step": 3, "reward/mean": 1}\n'
    )
    assert get(run, "/api/runs/0/series") == {
        "steps": [0, 1, 2, 3],
        "series": {"eval/accuracy": [0.5, None, 0.75, None], "reward/mean": [None, 0.25, None, 1.0]},
    }
    assert get(run, "/api/runs/0/series", names="reward/mean,other")["series"] == {"reward/mean": [None, 0.25, None, 1]}


def test_timeline(run: Path) -> None:
    (run / "trace").mkdir()
    events = [
        {
            "name": "update",
            "ph": "X",
            "pid": "grpo",
            "tid": "learner",
            "args": {"n": 1},
            "ts": 3_500_000,
            "dur": 500_000,
        },
        {"name": "sample", "ph": "X", "pid": "grpo", "tid": "sampler-0", "args": {}, "ts": 1_500_000, "dur": 2_000_000},
    ]
    (run / "trace" / "step-000002.json").write_text(json.dumps({"traceEvents": events}))
    assert get(run, "/api/runs/0/timeline/2")["spans"] == [
        {"role": "learner", "name": "update", "start_s": 2.0, "seconds": 0.5, "details": {"n": 1}},
        {"role": "sampler-0", "name": "sample", "start_s": 0.0, "seconds": 2.0, "details": {}},
    ]
    with pytest.raises(NotFoundError, match=r"a run has no timeline of step 1; it has those of steps 2 to 2"):
        get(run, "/api/runs/0/timeline/1")
    (run / "trace" / "step-000002.json").unlink()
    with pytest.raises(NotFoundError, match=r"it has no timelines: they are written with run.trace=true"):
        get(run, "/api/runs/0/timeline/1")


# --- samples ----------------------------------------------------------------------------------------------------------


def step_rows() -> list[dict[str, Any]]:
    """Three groups: rewards 1 0 0 0, one reward for all, and failures."""
    return [
        *(sample(0, i, reward=float(i == 0), completion_token_ids=[1] * (i + 1), sampler_logprobs=[0.0] * (i + 1))
          for i in range(4)),
        *(sample(1, i, reward=0.5, dataset="others", completion_token_ids=[1] * 10, sampler_logprobs=[0.0] * 10)
          for i in range(2)),
        sample(2, 0, reward=None, failed="timeout", failed_detail="judge: 30 s", finish_reason="length"),
        sample(2, 1, reward=0.25),
    ]  # fmt: skip


def test_the_groups_of_a_step(run: Path) -> None:
    write_samples(run, "step-000007", step_rows())
    answer = get(run, "/api/runs/0/samples/step-000007")
    assert {name: answer[name] for name in ("total_groups", "matching_groups", "total_rows", "matching_rows")} == {
        "total_groups": 3, "matching_groups": 3, "total_rows": 8, "matching_rows": 8,
    }  # fmt: skip
    assert answer["reward_range"] == [0.0, 1.0]
    first, second, third = answer["groups"]
    cells = first.pop("cells")
    assert first == {
        "group": 0, "prompt_id": "sums:0:h", "dataset": "sums", "prompt": "What is 0+1?", "gold": "1", "mean": 0.25,
        "spread": 1.0, "length_mean": 2.5, "failed": 0,
    }  # fmt: skip
    assert cells[0] == {"index": 0, "reward": 1.0, "failed": None, "finish_reason": "stop", "length": 1,
                        "advantage": 1.0, "matches": True}  # fmt: skip
    assert (second["mean"], second["spread"], second["length_mean"]) == (0.5, 0.0, 10.0)
    assert (third["mean"], third["spread"], third["failed"]) == (0.25, 0.0, 1)
    assert third["cells"][0]["failed"] == "timeout"
    columns = {one["name"]: one for one in answer["columns"]}
    assert columns["length"] == {"name": "length", "type": "number", "virtual": True,
                                 "doc": "number of tokens of the completion"}  # fmt: skip
    assert columns["reward_part/judge"]["doc"] == "value of the reward judge, without its weight"


@pytest.mark.parametrize(
    ("query", "order"),
    [
        ({"sort": "spread", "order": "desc"}, [0, 1, 2]),
        ({"sort": "spread"}, [1, 2, 0]),
        ({"sort": "mean"}, [0, 2, 1]),
        ({"sort": "mean", "order": "desc"}, [1, 0, 2]),
        ({"sort": "length", "order": "desc"}, [1, 2, 0]),
        ({"sort": "failed", "order": "desc"}, [2, 0, 1]),
        ({"sort": "dataset"}, [1, 0, 2]),
        ({"order": "desc"}, [2, 1, 0]),
        ({"offset": "1", "limit": "1"}, [1]),
        ({"filter": "spread > 0.5"}, [0]),
        ({"filter": "group_mean == 0.5 or group == 2"}, [1, 2]),
        ({"filter": "length == 4"}, [0]),
        ({"filter": "failed is not null"}, [2]),
        ({"filter": 'dataset == "others"'}, [1]),
        ({"filter": 'prompt contains "2+1" and `reward_part/judge` == 1'}, [2]),
        ({"filter": "reward > 5"}, []),
    ],
)
def test_groups_are_sorted_and_filtered(run: Path, query: dict[str, str], order: list[int]) -> None:
    write_samples(run, "step-000007", step_rows())
    answer = get(run, "/api/runs/0/samples/step-000007", **query)
    assert [group["group"] for group in answer["groups"]] == order


def test_cells_say_whether_they_match(run: Path) -> None:
    write_samples(run, "step-000007", step_rows())
    answer = get(run, "/api/runs/0/samples/step-000007", filter="reward == 0 and length > 2")
    assert [cell["matches"] for cell in answer["groups"][0]["cells"]] == [False, False, True, True]
    assert (answer["matching_rows"], answer["matching_groups"]) == (2, 1)


def test_a_group_without_a_reward_comes_last(run: Path) -> None:
    rows = [sample(0, 0, reward=None), sample(1, 0, reward=1.0), sample(2, 0, reward=0.0)]
    write_samples(run, "step-000007", rows)
    for order, expected in (("asc", [2, 1, 0]), ("desc", [1, 2, 0])):
        found = get(run, "/api/runs/0/samples/step-000007", sort="mean", order=order)["groups"]
        assert [group["group"] for group in found] == expected


def test_the_same_prompt_twice_in_a_row_is_two_groups(run: Path) -> None:
    write_samples(run, "step-000007", [sample(0, 0), sample(0, 1), sample(0, 0), sample(0, 1), sample(1, 1)])
    answer = get(run, "/api/runs/0/samples/step-000007")
    assert [len(group["cells"]) for group in answer["groups"]] == [2, 2, 1]


def test_a_group(run: Path) -> None:
    rows = [
        sample(0, 0, completion="So it is 5.", row='{"question": "q", "bad": NaN}'),
        sample(0, 1, completion="So it was 6.", reward=None, failed="timeout", failed_detail="judge: 30 s"),
    ]
    more = {"judge/extracted": pa.array(["5", None]), "judge/why": pa.array([None, "it is late"]),
            "judge/score": pa.array([0.5, math.nan]), "judge/ok": pa.array([True, None])}  # fmt: skip
    write_samples(run, "step-000007", [sample(3, 0), sample(3, 1)], **more)
    write_samples(run, "step-000008", rows, **more)
    answer = get(run, "/api/runs/0/samples/step-000008/groups/0")
    first, second = answer.pop("completions")
    assert answer == {
        "file": "step-000008", "step": 8, "group": 0, "prompt": "What is 0+1?", "prompt_id": "sums:0:h",
        "dataset": "sums", "gold": "1", "row": {"question": "q", "bad": None}, "common_prefix": len("So it "),
        "previous": None, "next": None,
    }  # fmt: skip
    assert first == {
        "index": 0, "text": "So it is 5.", "truncated_text": False, "extracted": "5", "final_answer": "0",
        "why": None, "reward": 1.0,
        "parts": {"judge": 1.0}, "logged": {"judge/extracted": "5", "judge/why": None, "judge/score": 0.5,
        "judge/ok": True}, "advantage": 1.0, "failed": None, "failed_detail": None, "finish_reason": "stop",
        "policy_version": 0, "seed": str(2**60), "length": 3, "sampler_logprob_sum": -0.875,
        "learner_logprob_sum": -1.0,
    }  # fmt: skip
    # the second failed: the answer that it ends with stands in for what the grader read
    assert (second["extracted"], second["why"], second["failed_detail"]) == ("1", "it is late", "judge: 30 s")
    assert second["logged"]["judge/score"] is None
    answer = get(run, "/api/runs/0/samples/step-000001/groups/0")
    assert (answer["previous"], answer["next"]) == (None, 1)
    answer = get(run, "/api/runs/0/samples/step-000001/groups/1")
    assert (answer["previous"], answer["next"]) == (0, None)


def test_what_the_grader_read_is_not_what_the_completion_ends_with(run: Path) -> None:
    """The first completion gave the grader nothing; `other` does not score the second, and `judge` does."""
    rows = [sample(0, 0, extracted="99"), sample(0, 1, extracted="7"), sample(0, 2, extracted="7")]
    more = {"judge/extracted": pa.array([None, "8", None]), "other/extracted": pa.array(["1", None, "2"]),
            "reward_part/other": pa.array([None, None, 0.5])}  # fmt: skip
    write_samples(run, "step-000007", rows, **more)
    found = get(run, "/api/runs/0/samples/step-000007/groups/0")["completions"]
    assert [(one["extracted"], one["final_answer"]) for one in found] == [(None, "99"), ("8", "7"), ("2", "7")]


def write_tokens(run: Path, name: str, rows: dict[int, list[list[float]]]) -> None:
    """A file of a learner rank: position -> logprobs, advantages, entropies, importance weights."""
    import pyarrow.parquet as pq

    names = ("learner_logprobs", "advantages", "entropies", "importance_weights")
    columns = {
        name: pa.array([row[i] for row in rows.values()], pa.list_(pa.float32())) for i, name in enumerate(names)
    }
    (run / "tokens").mkdir(exist_ok=True)
    pq.write_table(pa.table({"position": pa.array([*rows], pa.int64()), **columns}), run / "tokens" / f"{name}.parquet")


def test_a_completion_with_its_tokens(run: Path) -> None:
    """The values of completion 1 of group 1, row 3 of the file, are in the file of the second rank."""
    rows = [sample(p, i, policy_version=6) for p in (0, 1) for i in (0, 1)]
    write_samples(run, "step-000007", rows)
    write_tokens(run, "step-000007-rank-0", {0: [[0.0] * 3] * 4, 2: [[9.0] * 3] * 4})
    write_tokens(run, "step-000007-rank-1",
                 {3: [[-0.75, -0.25, 0.0], [1.5, 1.5, -0.5], [0.5, 0.25, 0.125], [1.0, 0.0, 2.0]]})  # fmt: skip
    write_tokens(run, "step-000070-rank-0", {3: [[5.0] * 3] * 4})  # of another step
    answer = get(run, "/api/runs/0/samples/step-000007/groups/1/1", offset="1")
    assert answer["tokens"] == [
        {"index": 1, "id": 11, "text": None, "special": False, "sampler_logprob": -0.25, "learner_logprob": -0.25,
         "entropy": 0.25, "advantage": 1.5, "importance_weight": 0.0, "version": 6, "difference": 0.0},
        {"index": 2, "id": 12, "text": None, "special": False, "sampler_logprob": -0.125, "learner_logprob": 0.0,
         "entropy": 0.125, "advantage": -0.5, "importance_weight": 2.0, "version": 6, "difference": 0.125},
    ]  # fmt: skip
    assert answer["total_tokens"] == 3
    assert [one["id"] for one in answer["prompt_tokens"]] == [1, 2, 3]
    assert [one["column"] for one in answer["absent"]] == ["text"]
    assert answer["group_size"] == 2
    left_out = get(run, "/api/runs/0/samples/step-000007/groups/0/1")
    assert left_out["tokens"][0]["learner_logprob"] is None
    assert left_out["tokens"][0]["sampler_logprob"] == -0.5
    assert left_out["absent"][:4] == [
        {"column": name, "why": "this completion was left out of the batch, or its update was skipped"}
        for name in ("learner_logprob", "advantage", "entropy", "importance_weight")
    ]
    absent = get(run, "/api/runs/0/samples/step-000001/groups/0/1")["absent"]
    assert absent[0]["why"] == "run.token_columns=true stores the learner's values of each token"
    with pytest.raises(NotFoundError, match=r"group 0 of step-000007 has no completion 2; its completions are 0 to 1"):
        get(run, "/api/runs/0/samples/step-000007/groups/0/2")


def test_damaged_values_of_tokens(run: Path, tmp_path: Path) -> None:
    path = "/api/runs/0/samples/step-000001/groups/0/0"
    write_tokens(run, "step-000001-rank-0", {0: [[0.0] * 3, [0.0] * 3, [0.0] * 2, [0.0] * 3]})
    with pytest.raises(
        UserError, match=r"step-000001-rank-0.parquet is damaged: entropies does not have one value per"
    ):
        get(run, path)
    file = run / "tokens" / "step-000001-rank-0.parquet"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"step-000001-rank-0.parquet cannot be read"):
        get(run, path)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(UserError, match="does not follow it"):
        get(run, path)
    file.unlink()
    write_samples(run, "step-000001", [sample(sampler_logprobs=[0.0])])
    with pytest.raises(UserError, match=r"is damaged: sampler_logprobs does not have one value per token"):
        get(run, path)


def test_tokens_are_decoded_one_by_one(run: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = {"Ġis": 0, "5": 1, "Ã": 2, "©": 3, "<end>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="5"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    (run / "model").mkdir()
    tokenizer.save(str(run / "model" / "tokenizer.json"))
    ids = [0, 1, 2, 3, 4, 99]
    write_samples(run, "step-000007", [sample(completion_token_ids=ids, sampler_logprobs=[0.0] * 6)])
    answer = get(run, "/api/runs/0/samples/step-000007/groups/0/0")
    assert [(one["text"], one["special"]) for one in answer["tokens"]] == [
        (" is", False), ("5", False), ("Ã", False), ("©", False), ("<end>", True), (None, False),
    ]  # fmt: skip
    assert answer["tokenizer"] == str(run / "model")


# --- prompts, comparison, search, export ------------------------------------------------------------------------------


def test_prompts_over_the_steps(run: Path) -> None:
    write_samples(run, "step-000001", [sample(0, 0, reward=0.0), sample(1, 0, reward=1.0), sample(2, 0, reward=None)])
    write_samples(run, "step-000002", [sample(0, 0, reward=1.0), sample(1, 0, reward=0.5)])
    answer = get(run, "/api/runs/0/prompts", sort="change", order="desc")
    assert answer["total"] == 3
    assert [(one["prompt_id"], one["groups"], one["first_mean"], one["last_mean"], one["change"])
            for one in answer["prompts"]] == [
        ("sums:0:h", 2, 0.0, 1.0, 1.0), ("sums:1:h", 2, 1.0, 0.5, -0.5), ("sums:2:h", 1, None, None, None),
    ]  # fmt: skip
    assert answer["prompts"][0]["prompt"] == "What is 0+1?"
    found = get(run, "/api/runs/0/prompts", search="IS 1+")
    assert [one["prompt_id"] for one in found["prompts"]] == ["sums:1:h"]
    assert get(run, "/api/runs/0/prompts", search="2:h")["total"] == 1


def test_one_prompt(run: Path) -> None:
    answers = [sample(0, i, extracted=text, reward=reward)
               for i, (text, reward) in enumerate([("1", 1.0), ("2", 0.0), ("1", 0.5), ("", None)])]  # fmt: skip
    write_samples(run, "step-000002", [sample(1, 0), *answers])
    answer = get(run, "/api/runs/0/prompts/one", id="sums:0:h")
    assert (answer["prompt"], answer["gold"], answer["total"]) == ("What is 0+1?", "1", 2)
    first, second = answer["occurrences"]
    assert (first["file"], first["group"], first["n"], first["mean"]) == ("step-000001", 0, 2, 0.5)
    assert (second["file"], second["group"], second["n"], second["mean"], second["failed"]) == (
        "step-000002", 1, 4, 0.5, 0,
    )  # fmt: skip
    assert second["answers"] == [
        {"answer": "1", "count": 2, "mean_reward": 0.75}, {"answer": "2", "count": 1, "mean_reward": 0.0},
        {"answer": "", "count": 1, "mean_reward": None},
    ]  # fmt: skip
    with pytest.raises(NotFoundError, match=r"a run has no prompt 'x'"):
        get(run, "/api/runs/0/prompts/one", id="x")
    with pytest.raises(UserError, match=r"id= is missing"):
        get(run, "/api/runs/0/prompts/one")


def test_two_files_compared(run: Path, tmp_path: Path) -> None:
    """Of 30 prompts in both, b is better on 15, equal on 10 and worse on 5: a gain of 10 / 30."""
    gains = [1.0] * 15 + [0.0] * 10 + [-1.0] * 5
    other = make_run(tmp_path / "b")
    a = [sample(p, 0, reward=1.0 if gain < 0 else 0.0) for p, gain in enumerate(gains)]
    b = [sample(p, 0, reward=1.0 if gain > 0 else 0.0) for p, gain in enumerate(gains)]
    write_samples(run, "eval-000002", [*a, sample(100, 0)])
    write_samples(other, "eval-000002", [*b, sample(200, 0), sample(201, 0), sample(202, 0, reward=None)])
    answer = get([run, other], "/api/compare", a="0", b="1")
    assert {name: answer[name] for name in ("file_a", "file_b", "won", "lost", "unchanged", "only_a", "only_b")} == {
        "file_a": "eval-000002", "file_b": "eval-000002", "won": 15, "lost": 5, "unchanged": 10, "only_a": 1,
        "only_b": 2,
    }  # fmt: skip
    assert answer["difference"] == pytest.approx(1 / 3)
    low, high = answer["interval"]
    # 0.745 is the standard deviation of the gains
    assert low == pytest.approx(1 / 3 - 2.05 * 0.745 / 30**0.5, abs=0.05)
    assert high == pytest.approx(1 / 3 + 2.05 * 0.745 / 30**0.5, abs=0.05)
    assert [one["verdict"] for one in answer["prompts"]] == ["lost"] * 5 + ["unchanged"] * 10 + ["won"] * 15
    lost = get([run, other], "/api/compare", a="0", b="1", verdict="lost", limit="2")
    assert (lost["total"], len(lost["prompts"])) == (5, 2)
    assert lost["prompts"][0]["mean_a"] == 1.0
    steps = get(run, "/api/compare", a="0", b="0", file_a="step-000001", file_b="step-000002")
    assert (steps["won"], steps["unchanged"]) == (0, 2)
    alone = get(run, "/api/compare", a="0", b="0", file_a="eval-000002", file_b="step-000001")
    assert alone["interval"] is not None


@pytest.mark.parametrize(("count", "loss"), [(5, 1.0), (6, 1.0), (5, 10.0), (6, 10.0)])
def test_few_prompts_compared(run: Path, count: int, loss: float) -> None:
    """b loses every prompt by the largest possible gain. If half of all prompts were won by as much, 5 losses of 5
    would occur with the probability 1/32, above the 2.5 % beyond the upper bound, and 6 of 6 with 1/64. So 5 prompts
    cannot show a difference. The upper bound is (1 - 2 * 0.025 ** (1 / N)) times the loss by the formula of Clopper and
    Pearson for N losses: 0.0436 and -0.0815."""
    write_samples(run, "eval-000001", [sample(p, 0, reward=loss) for p in range(count)])
    write_samples(run, "eval-000002", [sample(p, 0, reward=0.0) for p in range(count)])
    answer = get(run, "/api/compare", a="0", b="0", file_a="eval-000001", file_b="eval-000002")
    assert (answer["lost"], answer["difference"], answer["too_few"]) == (count, -loss, count == 5)
    assert answer["interval"] == pytest.approx([-loss, loss * {5: 0.0436, 6: -0.0815}[count]], abs=0.001 * loss)


def test_few_prompts_of_two_data_sets_compared(run: Path) -> None:
    """The upper bound is above 0 if two weights, Beta(1, N) and Beta(1, M), have a sum above 1 with a probability above
    2.5 %: N! M! / (N + M)!, which is 2.9 % for 3 and 4 prompts, and 1.4 % for 4 and 4."""
    rows = [sample(p, 0, dataset="b" if p > 3 else "a", reward=1.0) for p in range(8)]
    for last, few in ((7, True), (8, False)):
        write_samples(run, "eval-000001", rows[:last])
        write_samples(run, "eval-000002", [row | {"reward": 0.0} for row in rows[:last]])
        answer = get(run, "/api/compare", a="0", b="0", file_a="eval-000001", file_b="eval-000002")
        assert (answer["too_few"], answer["interval"][1] > 0) == (few, few)


def test_search(run: Path) -> None:
    write_samples(run, "step-000003", [
        sample(0, 0, completion="x" * 100 + "needle" + "y" * 100, step=3), sample(0, 1, completion="Needle"),
        sample(1, 0, prompt="a needle?", completion="none"),
    ])  # fmt: skip
    found = get(run, "/api/search", run="0", q="needle")
    assert [(hit["file"], hit["step"], hit["group"], hit["index"], hit["where"]) for hit in found["hits"]] == [
        ("step-000003", 3, 0, 0, "completion"), ("step-000003", 3, 1, 0, "prompt"),
    ]  # fmt: skip
    assert found["hits"][0]["before"] == "x" * 60
    assert found["hits"][0]["match"] == "needle"
    assert found["hits"][0]["after"] == "y" * 60
    assert [(hit["cut_before"], hit["cut_after"]) for hit in found["hits"]] == [(True, True), (False, False)]
    assert (found["complete"], found["rows_searched"]) == (True, 11)
    limited = get(run, "/api/search", q="It is", limit="1")
    assert (len(limited["hits"]), limited["complete"]) == (1, False)
    # the last step comes first
    assert limited["hits"][0]["file"] == "step-000002"
    assert get(run, "/api/search", q="nowhere")["hits"] == []
    with pytest.raises(UserError, match=r"q= \(a text\), ids= \(token ids\) or filter= is missing"):
        get(run, "/api/search", run="0")


def test_search_by_token_ids(run: Path) -> None:
    """Sequences are found inside one completion, not across two."""
    ids = [[1, 2, 3], [3, 1], [2, 3], [], [3, 1, 2, 3]]
    rows = [sample(0, i, completion_token_ids=some, sampler_logprobs=[0.0] * len(some)) for i, some in enumerate(ids)]
    write_samples(run, "step-000003", rows)

    def found(text: str) -> list[int]:
        return [hit["index"] for hit in get(run, "/api/search", ids=text)["hits"] if hit["file"] == "step-000003"]

    assert found("1,2") == [0, 4]
    assert found("3, 1") == [1, 4]
    assert found("2 3") == [0, 2, 4]
    assert found("3,2") == []
    assert found("3,1,2,3") == [4]
    with pytest.raises(UserError, match=r"ids=1,x: it must be at most 100 token ids, separated by commas"):
        found("1,x")


def test_search_with_a_filter(run: Path) -> None:
    found = get(run, "/api/search", q="It is", filter="reward == 0 and step == 1")
    assert [(hit["step"], hit["group"], hit["index"]) for hit in found["hits"]] == [(1, 0, 1), (1, 1, 1)]
    only = get(run, "/api/search", filter="step == 2 and reward == 1")["hits"]
    assert [(hit["where"], hit["group"], hit["index"]) for hit in only] == [("filter", 0, 0), ("filter", 1, 0)]
    with pytest.raises(UserError, match=r"there is no column 'rewrd'; did you mean reward"):
        get(run, "/api/search", q="x", filter="rewrd < 1")


def test_a_damaged_file_is_named_by_the_search(run: Path) -> None:
    file = run / "samples" / "step-000001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    found = get(run, "/api/search", q="It is")
    assert {hit["file"] for hit in found["hits"]} == {"step-000002"}
    assert found["complete"] is False
    assert f"{file} cannot be read" in found["problem"]


def test_export(run: Path) -> None:
    lines = lines_of(run, file="step-000001", filter="reward == 0")
    assert [(line["question"], line["completion"]) for line in lines] == [
        ("What is 0+1?", "It is 1."), ("What is 1+1?", "It is 2."),
    ]  # fmt: skip
    assert lines[0]["level"] == 0
    assert (lines[0]["gold"], lines[0]["reward"], lines[0]["length"], lines[0]["parts"]) == (
        "1",
        0.0,
        3,
        {"judge": 0.0},
    )
    assert len(lines_of(run)) == 8
    # fields of the data row keep their names
    write_samples(run, "step-000003", [sample(row='{"prompt": "mine", "reward": "x"}')])
    [line] = lines_of(run, file="step-000003")
    assert (line["prompt"], line["sample_prompt"]) == ("mine", "What is 0+1?")
    assert (line["reward"], line["sample_reward"]) == ("x", 1.0)


def test_describe_lists_every_endpoint(run: Path) -> None:
    paths = [one["path"] for one in get(run, "/api/describe")["endpoints"]]
    assert len(paths) == len({*paths}) == 13
    assert "/api/runs/{run}/samples/{file}/groups/{group}/{index}" in paths


# --- mistakes, damage, live runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "query", "sentence"),
    [
        ("/api/runs/7", {}, "there is no run 7; the runs are 0 to 0"),
        ("/api/runs/x", {}, "run=x: it must be a whole number from 0 to 2147483648"),
        ("/api/run", {}, "there is no endpoint /api/run; did you mean /api/runs?"),
        ("/api/runs/0/samples/step-1", {}, "a run has no samples file 'step-1'; did you mean step-000001?"),
        ("/api/runs/0/samples/step-000001", {"sort": "sprad"},
         "sort=sprad: it must be group, spread, mean, length, failed, dataset; did you mean spread?"),
        ("/api/runs/0/samples/step-000001", {"limit": "-1"}, "limit=-1: it must be a whole number from 0 to 1000"),
        ("/api/runs/0/samples/step-000001", {"limit": "1001"}, "limit=1001: it must be a whole number from 0 to 1000"),
        ("/api/runs/0/samples/step-000001", {"filtr": "x"}, "there is no parameter 'filtr'; did you mean filter?"),
        ("/api/runs/0/samples/step-000001/groups/2", {}, "step-000001 has no group 2; its groups are 0 to 1"),
        ("/api/compare", {"a": "0"}, "b= is missing"),
        ("/api/runs/0/samples/step-000001", {"filter": "x" * 2001}, "filter: it has 2001 characters"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(run: Path, path: str, query: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        get(run, path, **query)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    "name", ["..", "../../other", "/etc/passwd", "step-000001/../../config", "%2e%2e", "step-000001.parquet", "\0"]
)
def test_no_name_leaves_the_samples(run: Path, name: str) -> None:
    with pytest.raises(NotFoundError):
        get(run, f"/api/runs/0/samples/{name}")


def test_links_out_of_the_run_are_not_followed(run: Path, tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside")
    secret = write_samples(outside, "step-000009", [sample(completion="secret")])
    (run / "samples" / "step-000009.parquet").symlink_to(secret)
    with pytest.raises(UserError, match=r"is a link to a file outside the run folder; the viewer does not follow it"):
        get(run, "/api/runs/0/samples/step-000009")
    assert "link to a file outside" in get(run, "/api/search", q="secret")["problem"]
    assert get(run, "/api/search", q="secret")["hits"] == []
    (run / "trace").mkdir()
    (tmp_path / "t.json").write_text('{"traceEvents": []}')
    (run / "trace" / "step-000001.json").symlink_to(tmp_path / "t.json")
    with pytest.raises(UserError, match="does not follow it"):
        get(run, "/api/runs/0/timeline/1")
    (tmp_path / "summary").write_text('{"exit_reason": "done"}')
    (run / "summary.json").symlink_to(tmp_path / "summary")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    [entry] = get(run, "/api/runs")["runs"]
    assert entry["steps"] == 0
    assert entry["exit_reason"] is None
    assert "summary.json is a link" in entry["problem"]
    assert "metrics.jsonl is a link" in entry["problem"]
    # a link that stays inside is followed
    (run / "samples" / "step-000009.parquet").unlink()
    (run / "samples" / "step-000009.parquet").symlink_to(run / "samples" / "step-000001.parquet")
    assert get(run, "/api/runs/0/samples/step-000009")["total_rows"] == 4


def test_damage_is_one_sentence(run: Path) -> None:
    file = run / "samples" / "step-000001.parquet"
    whole = file.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-30], whole[: len(whole) // 2], b"x" * 500):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            get(run, "/api/runs/0/samples/step-000001")
        assert str(caught.value).startswith(f"{file} cannot be read: ")
        assert "\n" not in str(caught.value)
        assert get(run, "/api/runs/0")["files"][0]["rows"] is None
        assert len(get(run, "/api/runs/0/prompts")["prompts"]) == 2
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(UserError, match=r"step-000001.parquet cannot be read: it has no column prompt_id"):
        get(run, "/api/runs/0/samples/step-000001")
    (run / "config.yaml").write_text("model: [")
    (run / "summary.json").write_text("{")
    answer = get(run, "/api/runs/0")
    assert f"{run}/config.yaml cannot be read" in answer["problem"]
    assert f"{run}/summary.json is damaged" in answer["problem"]
    assert answer["options"] == []
    assert len(answer["files"]) == 2


def test_invalid_utf8_is_one_sentence(run: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(write_samples(run, "step-000003", [sample()]))
    raw = pa.array([b"\xff\xfe\x00bad"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    pq.write_table(table.set_column(table.column_names.index("completion"), "completion", text),
                   run / "samples" / "step-000003.parquet")  # fmt: skip
    assert get(run, "/api/runs/0/samples/step-000003")["total_rows"] == 1  # its list does not read the text
    with pytest.raises(UserError, match=r"step-000003.parquet cannot be read: .*[Uu][Tt][Ff]-?8"):
        get(run, "/api/runs/0/samples/step-000003/groups/0")
    assert "step-000003.parquet cannot be read" in get(run, "/api/search", q="x")["problem"]


def test_a_run_that_trains(run: Path) -> None:
    """Samples appear, a line of metrics is half written, and a resume takes steps back."""
    opened = api.open_paths([run])

    def series() -> Any:
        found = api.answer(opened, "/api/runs/0/series", {})
        return found["series"]["reward/mean"]  # type: ignore[index]

    def files() -> Any:
        found = api.answer(opened, "/api/runs/0", {})
        return [one["file"] for one in found["files"]]  # type: ignore[index]

    assert series() == [0.5, 0.5]
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "reward/me')
        out.flush()
        assert series() == [0.5, 0.5]
        out.write('an": 0.75}\n')
        out.flush()
        assert series() == [0.5, 0.5, 0.75]
    write_samples(run, "step-000003", [sample(5, 0, reward=0.0)])
    assert files() == ["step-000001", "step-000002", "step-000003"]
    one = api.answer(opened, "/api/runs/0/prompts", {"search": "5:h"})
    assert one["total"] == 1  # type: ignore[index]
    # a resume after step 1: the file is replaced, and later samples are removed
    kept = (run / "metrics.jsonl").read_text().splitlines()[0]
    again = f'{{"step": 2, "reward/mean": 0.125, "time": "{"x" * 200}"}}\n{{"step": 3, "reward/mean": 0.25}}\n'
    (run / "aside").write_text(f"{kept}\n{again}")  # longer than the file that it replaces
    assert (run / "aside").stat().st_size > (run / "metrics.jsonl").stat().st_size
    (run / "aside").replace(run / "metrics.jsonl")
    for step in (2, 3):
        (run / "samples" / f"step-00000{step}.parquet").unlink()
    assert series() == [0.5, 0.125, 0.25]
    assert files() == ["step-000001"]
    write_samples(run, "step-000002", [sample(6, 0)])
    assert api.answer(opened, "/api/runs/0/prompts", {"search": "5:h"})["total"] == 0  # type: ignore[index]
    assert api.answer(opened, "/api/runs/0/prompts", {"search": "6:h"})["total"] == 1  # type: ignore[index]
    # a file of the same name with other rows is read anew
    write_samples(run, "step-000002", [sample(7, 0), sample(7, 1)])
    assert api.answer(opened, "/api/runs/0/prompts", {"search": "7:h"})["total"] == 1  # type: ignore[index]


def test_metrics_are_read_once_by_several_threads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from grpo.view.files import Metrics, RunFiles

    plain = Metrics.add

    def slow(self: Metrics, line: dict[str, Any]) -> None:
        time.sleep(0.001)
        plain(self, line)

    monkeypatch.setattr(Metrics, "add", slow)
    write_metrics(run, [{"step": step, "a": step} for step in range(1, 51)])
    files = RunFiles(run)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: files.metrics(), range(8)))
    assert [[*one.steps] for one in found] == [[*range(1, 51)]] * 8
    # what a reader holds does not change when a line is added
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 51, "b": 1}\n')
    assert [*files.metrics().steps] == [*range(1, 52)]
    assert [*found[0].steps] == [*range(1, 51)]
    assert "b" not in found[0].columns


def test_a_damaged_line_is_left_out_and_named(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": "x"}\nnot json\n[1]\n{"step": 3}\n')
    [entry] = get(run, "/api/runs")["runs"]
    assert entry["steps"] == 3
    assert entry["problem"].startswith(f"{run}/metrics.jsonl:2 is damaged and left out: b'")


def test_what_is_a_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "only metrics").mkdir()
    write_metrics(tmp_path / "only metrics", [{"step": 1}])
    (tmp_path / "notes").mkdir()
    names = [entry["name"] for entry in get(tmp_path, "/api/runs")["runs"]]
    assert names == ["a run", "only metrics"]  # a folder of runs stands for its runs
    assert [entry["name"] for entry in get([run, tmp_path], "/api/runs")["runs"]] == ["a run", "only metrics"]
    with pytest.raises(UserError, match=r"notes is not a run folder: it has neither config.yaml nor metrics.jsonl"):
        api.open_paths([tmp_path / "notes"])
    with pytest.raises(UserError, match=r"a rum does not exist; did you mean .*a run\?"):
        api.open_paths([tmp_path / "a rum"])
    with pytest.raises(UserError, match=r"config.yaml is no folder"):
        api.open_paths([run / "config.yaml"])


def test_an_evaluation_by_grpo_eval(tmp_path: Path) -> None:
    folder = tmp_path / "base-1234"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    write_samples(folder, "000001", [sample(0, 0), sample(0, 1)])
    write_samples(folder, "000002", [sample(1, 0)])
    assert get(folder, "/api/runs/0")["files"] == [
        {"file": "000001", "kind": "eval", "step": None, "rows": 2},
        {"file": "000002", "kind": "eval", "step": None, "rows": 1},
    ]
    assert get(folder, "/api/runs/0/prompts")["total"] == 2
    assert len(get(folder, "/api/search", q="It is")["hits"]) == 3


def test_numbers_that_are_not_finite_are_null() -> None:
    value = {"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}, "d": True}
    assert json.loads(api.to_json(value)) == {"a": [None, None, 1.5], "b": {"c": None}, "d": True}
