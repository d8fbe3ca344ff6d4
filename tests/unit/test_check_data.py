"""What `grpo check` says and refuses of data sets, their mix and their rewards. Starts no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stand_in
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grpo import config as module
from grpo import data
from grpo.checks.check import CheckedRun, check, refuse_secrets
from grpo.checks.model_folder import check_critic, check_model
from grpo.commands.cli import make_parser
from grpo.lifecycle.train import open_folder
from grpo.run.progress import Progress
from grpo.run.resume import Origin, Resumed
from grpo.types import Prompt, UserError


@pytest.fixture
def planned(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., CheckedRun]:
    """planned(*overrides, a=[rows], ...) -> the plan of the small recipe with the data sets a.jsonl, ..."""
    model = make_model("qwen2")

    def plan(*overrides: str, **sets: list[dict[str, Any]]) -> CheckedRun:
        recipe = make_recipe(model)
        for name, rows in sets.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [text.replace("DIR", str(tmp_path)) for text in overrides]
        return check(module.load(recipe, ["cluster.reward_workers=2", *texts]), recipe, tmp_path / "logs")

    return plan


def sums(low: int, high: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"{n}+11", "answer": str(n + 11)[::-1], **more} for n in range(low, high)]


def line(plan: CheckedRun, *words: str) -> str:
    [found] = [text for text in plan.lines if all(word in text for word in words)]
    return found


@pytest.mark.parametrize(
    "override",
    ["run.name=a-SECRET", "rewards.0.name=SECRET", "data.train.0.columns.a=SECRET", "sampling.stop=[x,SECRET]",
     "sampler.engine.a={b: [1, xSECRETx]}"],
)  # fmt: skip
def test_a_secret_is_seen_wherever_a_config_holds_it(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-31415926")
    with pytest.raises(UserError, match="variable JUDGE_API_KEY, which would be saved with the run"):
        refuse_secrets(module.load("arithmetic_cpu", [override.replace("SECRET", "sk-31415926")]))
    refuse_secrets(module.load("arithmetic_cpu", [override.replace("SECRET", "sk-3141592")]))


MIX = ("data.train=[DIR/a.jsonl,DIR/b.jsonl]", "rewards.0.gold=false")


def test_a_mix_is_planned(planned: Callable[..., CheckedRun]) -> None:
    plan = planned(*MIX, "data.train.0.weight=3", "data.train.1.weight=1", a=sums(10, 40), b=sums(40, 50))
    assert [prompt.dataset for prompt in plan.prompts] == ["a"] * 30 + ["b"] * 10
    assert line(plan, "set        a") == "set        a: 30 prompts, 75.0% of those drawn: 0.40 epochs"  # 12 of 16 drawn
    assert line(plan, "set        b") == "set        b: 10 prompts, 25.0% of those drawn: 0.40 epochs"
    pool = planned(*MIX, a=sums(10, 40), b=sums(40, 50))
    assert line(pool, "set        b") == "set        b: 10 prompts, in one pool"
    assert pool.fingerprints["data.train"] == plan.fingerprints["data.train"]


def test_one_data_set_is_planned_as_ever(planned: Callable[..., CheckedRun]) -> None:
    plan = planned("data.train=DIR/a.jsonl", a=sums(10, 40))
    assert not [text for text in plan.lines if text.startswith("set ")]
    assert line(plan, "reward", "corrupted") == (
        "reward     arithmetic on data.train[0] (a): gold 1, corrupted 0 on 8 rows"
    )
    assert line(plan, "gold answers") == (
        "reward     arithmetic on data.train[0] (a): 30 of 30 gold answers score above 0"
    )


def test_a_step_that_could_need_more_of_a_set_than_it_has(planned: Callable[..., CheckedRun]) -> None:
    weights = ("data.train.0.weight=1", "data.train.1.weight=1")
    with pytest.raises(UserError) as caught:
        planned(*MIX, *weights, "algorithm.minibatches_per_step=2", a=sums(10, 40), b=sums(40, 43))
    assert str(caught.value) == (
        "algorithm.prompts_per_step=8 may need 4 prompts of data.train[1] (b) in one step because of its weight, but "
        "it has 3; nearest: 6"
    )
    planned(*MIX, *weights, "algorithm.prompts_per_step=6", a=sums(10, 40), b=sums(40, 43))
    with pytest.raises(UserError, match=r"may need 5 prompts .* but it has 4; nearest: 7"):
        planned(*MIX, *weights, "algorithm.max_refills=1", a=sums(10, 40), b=sums(40, 44))
    with pytest.raises(UserError, match=r"may need 2 prompts .* but it has 1; no smaller step fits either"):
        planned(*MIX, *weights, "algorithm.prompts_per_step=4", "algorithm.minibatches_per_step=4",
                a=sums(10, 40), b=sums(40, 41))  # fmt: skip


def test_names_of_data_sets(planned: Callable[..., CheckedRun]) -> None:
    twice = ("data.train=[DIR/a.jsonl,DIR/a.jsonl]", "rewards.0.gold=false")
    with pytest.raises(UserError, match=r"data\.train\[0\] and data\.train\[1\] are both called a; rename one of them"):
        planned(*twice, a=sums(10, 40))
    plan = planned(*twice, "data.train.1.name=other", a=sums(10, 40))
    assert {prompt.dataset for prompt in plan.prompts} == {"a", "other"}
    assert len({prompt.prompt_id for prompt in plan.prompts}) == 60


def test_rewards_name_data_sets_that_there_are(planned: Callable[..., CheckedRun]) -> None:
    with pytest.raises(UserError) as caught:
        planned(*MIX, "rewards.0.sets=[a,bb]", a=sums(10, 40), b=sums(40, 50))
    assert str(caught.value) == "rewards[0].sets: no data set is called bb; there are a, b; did you mean b?"
    with pytest.raises(UserError) as caught:
        planned(*MIX, "rewards.0.sets=[a]", a=sums(10, 40), b=sums(40, 50))
    assert str(caught.value) == "data.train[1]: no reward scores b; add it to rewards[i].sets of a reward"
    rewards = "rewards=[{file: reward_fns/arithmetic.py, sets: [a]}, {file: reward_fns/format.py, weight: WEIGHT}]"
    with pytest.raises(
        UserError, match=r"data\.train\[1\]: every reward for b has the weight 0, so nothing is learned"
    ):
        planned(MIX[0], rewards.replace("WEIGHT", "0"), a=sums(10, 40), b=sums(40, 50))
    with pytest.raises(UserError, match=r"data\.eval\.sets\[0\]: no reward scores b"):
        planned("data.train=DIR/a.jsonl", "data.eval.sets=DIR/b.jsonl", "rewards.0.sets=[a]", a=sums(10, 40),
                b=sums(40, 50))  # fmt: skip


def test_columns_to_evaluate_by(planned: Callable[..., CheckedRun]) -> None:
    rows = [*sums(10, 12, level=1), *sums(12, 14)]  # a column that some rows have will do
    planned("data.eval.sets=DIR/held.jsonl", "data.eval.by=[level]", held=rows)
    with pytest.raises(UserError, match=r"data.eval.by: no row of data.eval.sets has a column 'levl'.*mean level\?"):
        planned("data.eval.sets=DIR/held.jsonl", "data.eval.by=[level,levl]", held=rows)


def test_gold_answers_of_all_rows(planned: Callable[..., CheckedRun], tmp_path: Path) -> None:
    """The reward fails on an answer that is no number, scores 0 where it is 7, and the first eight rows say nothing."""
    reward = tmp_path / "number.py"
    reward.write_text(
        "def number(completion, row): return float(int(row['answer']) != 7 and completion == row['answer'])"
    )
    rows = sums(10, 40)
    one = ("data.train=DIR/a.jsonl", f"rewards.0.file={reward}")
    plan = planned(*one, a=[*rows, {"question": "1+1", "answer": "7"}])
    assert line(plan, "gold answers") == (
        "reward     number on data.train[0] (a): warning: 30 of 31 gold answers score above 0; not those of a.jsonl:31"
    )
    with pytest.raises(UserError, match=r"cannot read the gold answer of a\.jsonl:31: exception: .*ValueError"):
        planned(*one, a=[*rows, {"question": "1+1", "answer": "n"}])
    with pytest.raises(UserError, match=r"data\.eval\.sets\[0\] \(b\) cannot read the gold answer of b\.jsonl:9: "):
        planned(*one, "data.eval.sets=DIR/b.jsonl", a=rows, b=[*sums(40, 48), {"question": "1+1", "answer": "n"}])


def test_rewards_are_tried_on_the_ids_of_their_texts(planned: Callable[..., CheckedRun], tmp_path: Path) -> None:
    """One token a character, digit d is token d + 1 and the end token 0; no token for letters."""
    reward = tmp_path / "ids.py"
    reward.write_text(
        "def ids(completion_ids, trainer_state, answer, **kwargs):\n"
        "    assert kwargs['completions'] != ['', 'no answer'] or completion_ids == [[0], [0]]\n"
        "    assert (trainer_state.global_step, trainer_state.max_steps) == (0, 4)\n"
        "    return [float(ids == [*(int(c) + 1 for c in a), 0]) for ids, a in zip(completion_ids, answer)]\n"
    )
    options = ("run.steps=2", "algorithm.minibatches_per_step=2", f"rewards.0.file={reward}", "rewards.0.style=trl")
    plan = planned("data.train=DIR/a.jsonl", *options, a=sums(10, 40))
    assert line(plan, "reward     ids on", "corrupted") == (
        "reward     ids on data.train[0] (a): gold 1, corrupted 0 on 8 rows"
    )
    assert line(plan, "style trl")


def test_verls_files_and_its_rewards_need_no_more_than_a_question(
    planned: Callable[..., CheckedRun], tmp_path: Path
) -> None:
    rows = [
        {
            "data_source": "owner/sums", "prompt": [{"role": "user", "content": f"{n}+11"}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n + 11)[::-1]},
            "extra_info": {"split": "train", "index": n, "hints": ["a", "b"]},
        }
        for n in range(10, 40)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "verl.parquet")
    reward = tmp_path / "score.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert data_source == 'owner/sums'\n"
        "    assert extra_info == {'split': 'train', 'index': int(ground_truth[::-1]) - 11, 'hints': ['a', 'b']}\n"
        "    return {'score': float(solution_str == ground_truth), 'pred': solution_str}\n"
    )
    plan = planned(
        "data.train=[{path: DIR/verl.parquet, columns: {question: '{prompt[0][content]}'}}]",
        "rewards.0.gold=false", f"rewards.0.file={reward}", "rewards.0.name=compute_score", "rewards.0.style=verl",
    )  # fmt: skip
    assert [text for text in plan.lines if "compute_score" in text] == [
        "reward     compute_score: style verl: extra_info has no num_turns and rollout_reward_scores",
        "reward     compute_score on data.train[0] (verl): ran on 8 rows",
    ]


def test_the_file_decides_whether_gold_answers_are_tried(planned: Callable[..., CheckedRun], tmp_path: Path) -> None:
    """Where the recipe says nothing; what came of it is in the plan's config."""
    reward = tmp_path / "number.py"
    one = ("data.train=DIR/a.jsonl", f"rewards.0.file={reward}")
    rows = [*sums(10, 40), {"question": "1+1", "answer": "n"}]
    source = "def number(completion, row): return float(int(row['answer']) >= 0 and completion == row['answer'])\n"
    reward.write_text(source)
    plan = planned(*one, "rewards.0.gold=null", a=rows)
    assert plan.config.rewards[0].gold is False
    assert line(plan, "reward     number") == "reward     number on data.train[0] (a): ran on 8 rows"
    with pytest.raises(UserError, match=r"data\.gold_template=\[\{answer\}\] has no effect without a reward"):
        planned(*one, "rewards.0.gold=null", "data.gold_template=[{answer}]", a=rows)
    reward.write_text(f"GOLD = True\n{source}")
    with pytest.raises(UserError, match=r"cannot read the gold answer of a\.jsonl:31: .*; correct the data, or turn"):
        planned(*one, "rewards.0.gold=null", a=rows)
    plan = planned(*one, "rewards.0.gold=null", a=rows[:30])
    assert plan.config.rewards[0].gold is True
    resumed = Resumed(progress=Progress.start(plan.config, plan.prompts), folder=None, manifest=None, lines=())
    folder = open_folder(plan, resumed, Origin(), Path("recipe.yaml"))
    folder.close()
    kept = module.read_dump(folder.path / "config.yaml")
    assert kept.rewards[0].gold is None  # as the recipe has it
    assert kept == plan.given
    assert planned(*one, "rewards.0.gold=false", a=rows).config.rewards[0].gold is False


def test_a_gold_answer_of_the_first_rows_that_cannot_be_read_is_named(planned: Callable[..., CheckedRun]) -> None:
    graded = ("data.train=DIR/a.jsonl", "rewards.0.file=reward_fns/math_answer.py", "rewards.0.gold=null")
    rows = [{"question": "1+1", "answer": answer} for answer in ("2", "1/2", "x", ")(", "3", "4", "5", "6")]
    with pytest.raises(UserError) as caught:
        planned(*graded, a=rows)
    said = str(caught.value)
    assert said.startswith(
        "rewards[0]: math_answer on data.train[0] (a) cannot read the gold answer of a.jsonl:4: exception: "
        "math_answer: ValueError: the gold answer ')(' cannot be parsed as mathematics at "
    )
    assert "turn the test off: rewards.0.gold=false (completions of such rows are then Failed and left out of" in said
    assert "ran on 7 of 8 rows tried; failed on a.jsonl:4: " in "".join(
        planned(*graded[:2], "rewards.0.gold=false", a=rows).lines
    )


def test_filters_are_in_the_plan_and_listed(planned: Callable[..., CheckedRun]) -> None:
    train = [*sums(10, 30, level=1), *sums(30, 40, level=2), *sums(40, 44, level=3), {**sums(44, 45)[0], "level": 9}]
    options = (
        "data.train=DIR/a.jsonl", "data.eval.sets=DIR/b.jsonl", "data.train[0].between.level=[1,3]",
        "data.train[0].limit=20", "data.eval.sets[0].limit=4",
    )  # fmt: skip
    plan = planned(*options, a=train, b=sums(38, 60))
    assert line(plan, "kept") == "kept       34 of 35 rows of data.train[0] by between level 1..3"
    assert line(plan, "overlap").startswith(  # 38, 39, 40 and 41 of the evaluation that the limit leaves
        "warning    4 of 34 prompts of data.train[0] overlap with data.eval.sets, 4 as the same text and 0 by 13 words"
    )
    assert line(plan, "limit", "train") == "limit      the first 20 of 34 prompts of data.train[0]"
    assert line(plan, "limit", "eval") == "limit      the first 4 of 22 prompts of data.eval.sets[0]"
    assert [text.split(" ", 1)[1] for text in plan.dropped] == ["(level 9)"]
    assert (len(plan.prompts), len(plan.eval_prompts)) == (20, 4)

    dropping = planned(*options, "data.contaminated=drop", "data.train[0].limit=null", a=train, b=sums(38, 60))
    assert line(dropping, "overlap").startswith("dropped    4 of 34 prompts of data.train[0] overlap")
    assert len(dropping.prompts) == 30
    assert [text.split(" ", 1)[1].split(":")[0] for text in dropping.dropped] == ["(level" + " 9)"] + [
        "(overlaps with b"
    ] * 4
    assert dropping.fingerprints["data.train"] != plan.fingerprints["data.train"]
    assert dropping.fingerprints["data.eval.sets"] == plan.fingerprints["data.eval.sets"]
    other = planned(*options, "data.eval.sets[0].limit=5", a=train, b=sums(38, 60))
    assert other.fingerprints["data.eval.sets"] != plan.fingerprints["data.eval.sets"]


def test_rows_that_stand_there_twice_are_said_of_all_sets_together(planned: Callable[..., CheckedRun]) -> None:
    plan = planned(*MIX, a=sums(10, 40), b=sums(35, 50))
    assert line(plan, "more than once") == "warning    5 of 45 prompts of data.train occur more than once"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("recipes/tiny/reasoning/base", "; make it with: python recipes/reasoning.py"),
        ("recipes/tiny/arithmetic/base", "; make it with: python recipes/arithmetic.py"),
        ("runs/smollm2_word_problems/model", "; make it with: grpo train smollm2_word_problems"),
        ("runs/mine/model", "; its folder runs/mine does not exist either"),
        ("./qwne", "; did you mean qwen?"),
        ("./no/qwen", "; its folder no does not exist either"),
        ("./file", ""),
    ],
)
def test_a_model_that_is_not_there(
    path: str, hint: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = module.load(make_recipe(make_model("qwen2")), [f"model.path={path}"])
    monkeypatch.chdir(tmp_path)
    for script in ("reasoning", "arithmetic"):
        (tmp_path / "recipes").mkdir(exist_ok=True)
        (tmp_path / "recipes" / f"{script}.py").touch()
    (tmp_path / "qwen").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as raised:
        check_model(config)
    assert str(raised.value) == f"model.path={path} is not a folder{hint}"


@pytest.mark.parametrize(
    ("sizes", "split", "said"),
    [
        ({}, "cluster.pipeline_parallel=3", "is more than the model's 2 layers; nearest: 2"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "cluster.tensor_parallel=8", ""),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96},
            "cluster.tensor_parallel=6",
            "neither divides the model's 4 key-value heads nor is a multiple of them; nearest: 4",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 98},
            "cluster.tensor_parallel=4",
            "does not divide the model's feed-forward width of 98; nearest: 2",
        ),
    ],
)
def test_a_split_that_vllm_refuses(
    sizes: dict[str, int], split: str, said: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    config = module.load(make_recipe(make_model("qwen2", **sizes)), [split])
    if not said:
        check_model(config)
        return
    with pytest.raises(UserError) as raised:
        check_model(config)
    assert str(raised.value) == f"{split} {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("null", "argument of type 'NoneType' is not iterable"),
        ('{"model_type": "qwen2", "hidden_size": "256"}', "Validation error for field 'hidden_size': "),
    ],
)
def test_a_config_that_transformers_cannot_read(
    text: str, said: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    model = make_model("qwen2")
    (model / "config.json").write_text(text)
    with pytest.raises(UserError) as raised:
        check_model(module.load(make_recipe(model), []))
    assert str(raised.value).startswith(f"model.path={model}: its config.json is not that of a model: {said}")
    gae = ["algorithm.advantage=gae", f"critic.path={model}"]
    with pytest.raises(UserError) as raised:
        check_critic(module.load(make_recipe(make_model("qwen2", hidden_size=32)), gae))
    assert str(raised.value).startswith(f"critic.path={model}: its config.json is not that of a model: {said}")


def test_tokens_beyond_the_embedding_are_refused(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The tokenizer has 13 tokens: the end, ten digits, plus and equals. A model of 12 rows has none for `=`."""
    tokens = AutoTokenizer.from_pretrained(make_model("llama")).get_vocab()
    last = max(tokens, key=lambda token: tokens[token])
    short = make_model("llama", vocab_size=12)
    recipe = make_recipe(short, data={"template": "{question}"})

    def planned(*overrides: str) -> CheckedRun:
        return check(module.load(recipe, [*overrides]), recipe, tmp_path / "logs")

    assert len(tokens) == 13
    assert planned().prompts
    with pytest.raises(UserError, match=r"sampling\.stop_token_ids: 12 is beyond the 12 rows"):
        planned("sampling.stop_token_ids=[12]")
    rows = [{"question": "11+11", "answer": "22"}] * 8
    rows[5] = {"question": f"11{last}11", "answer": "22"}
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = rf"late\.jsonl:6: the prompt has the token '{last}', whose id 12 is beyond the 12 rows of the model's"
    with pytest.raises(UserError, match=where):
        planned(f"data.train={tmp_path / 'late.jsonl'}")
    with pytest.raises(UserError, match=rf"data\.eval\.sets\[0\]: .*{where}"):
        planned(f"data.eval.sets={tmp_path / 'late.jsonl'}")


@pytest.mark.parametrize("option", ["model.path", "critic.path"])
def test_a_run_s_folder_in_the_place_of_its_model(
    option: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model, run = make_model("qwen2"), tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    model.rename(run / "model")
    config = module.load(make_recipe(run / "model"), ["algorithm.advantage=gae", f"{option}={run}"])
    with pytest.raises(UserError) as raised:
        (check_model if option == "model.path" else check_critic)(config)
    assert str(raised.value).endswith(f"has no config.json, the model is in a folder inside it: {option}={run}/model")


def test_the_first_prompt_is_shown_whole() -> None:
    """From its ids, special tokens and all; white space that could not be seen is written."""
    tokenizer = AutoTokenizer.from_pretrained(stand_in.make() / "model")
    text = f"<|im_start|>user\n{'long ' * 30}\n\n\tx\x1b[0m [b]\u00fc<|im_end|>\n<|im_start|>assistant\n  "
    ids = tuple(tokenizer.encode(text))
    prompt = Prompt(prompt_id="a:0:0", token_ids=ids, text=text, row={}, messages=None, dataset="a", where="a:1")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert data.shown(prompt, tokenizer, ends, ids=False) == [
        f"first      a:0:0, {len(ids)} tokens; a completion ends on {ends[0]} '<|im_end|>', {ends[1]} '<|endoftext|>'",
        "           <|im_start|>user\\n",
        f"           {('long ' * 30).rstrip()}\\x20\\n",
        "           \\n",
        "           \\tx\\x1b[0m [b]\u00fc<|im_end|>\\n",
        "           <|im_start|>assistant\\n",
        "           \\x20\\x20",
    ]
    assert data.shown(prompt, tokenizer, ends, ids=True)[-1] == f"ids        {list(ids)}"


def test_the_ids_of_the_first_prompt_are_shown_when_asked_for(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("qwen2"))
    plan = check(module.load(recipe, ["cluster.reward_workers=2"]), recipe, tmp_path / "logs", ids=True)
    prompt, at = plan.prompts[0], next(i for i, text in enumerate(plan.lines) if text.startswith("first "))
    assert plan.lines[at : at + 3] == (
        f"first      {prompt.prompt_id}, {len(prompt.token_ids)} tokens; a completion ends on 0 '<eos>'",
        f"           {prompt.text}",
        f"ids        {list(prompt.token_ids)}",
    )
    assert make_parser().parse_args(["check", "recipe.yaml", "--ids"]).ids


def test_an_adapter_is_no_model(make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> None:
    """Beside weights, too: with peft, transformers loads the base that the adapter names, and vLLM does not."""
    folder = make_model("qwen2")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    config = module.load(make_recipe(folder))
    with pytest.raises(UserError, match=r"^model\.path=.* has an adapter of owner/base, which is not a complete"):
        check_model(config)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has an adapter of owner/base"):
        check_model(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized (gptq); only unquantized weights"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized (fp8)"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantized (by its quantization_config)"),
        ({"dtype": "auto"}, "its config.json is not that of a model"),
    ],
)
def test_a_config_that_cannot_be_trained(
    changes: dict[str, Any], words: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    folder = make_model("qwen2")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError) as caught:
        check_model(module.load(make_recipe(folder)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_form_are_named(make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> None:
    folder = make_model("qwen2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"safetensors only, and pytorch_model\.bin is none; transformers' save_pretrained"
    ):
        check_model(module.load(make_recipe(folder)))


def test_gold_answers_that_are_none(planned: Callable[..., CheckedRun], tmp_path: Path) -> None:
    """An empty answer equals an empty completion, so the gold answer scored 1; the first eight rows say nothing."""
    reward = tmp_path / "same.py"
    reward.write_text("def same(completion, row): return float(completion == str(row['answer']))")
    one = ("data.train=DIR/a.jsonl", f"rewards.0.file={reward}")
    for blank in ("", " \n"):
        with pytest.raises(
            UserError, match=r"cannot read the gold answer of a\.jsonl:31: it is empty; correct the data, or"
        ):
            planned(*one, a=[*sums(10, 40), {"question": "1+1", "answer": blank}])
    lists = [{**row, "answer": [row["answer"]]} for row in sums(10, 40)]
    with pytest.raises(
        UserError, match=r"the answer of a\.jsonl:1 is \['12'\], which .* would write as Python; name a part"
    ):
        planned(*one, a=lists)
    planned(*one, "rewards.0.gold=false", a=lists)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """It ended as a failed weight sync, after the engines had started."""
    file = make_model("qwen2") / "model.safetensors"
    weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(weights | {"empty": torch.zeros(0), "count": torch.zeros(1, dtype=torch.int64)}, file)
    check_model(module.load(make_recipe(file.parent)))
    weights["model.norm.weight"][3] = value
    save_file(weights, file)
    with pytest.raises(UserError, match=r"model\.safetensors: model\.norm\.weight has numbers that are not finite"):
        check_model(module.load(make_recipe(file.parent)))


def test_a_helper_of_a_reward_is_part_of_it(planned: Callable[..., CheckedRun], tmp_path: Path) -> None:
    """Changed between two starts of a run, it would change the reward in the middle of the run."""
    reward, helper = tmp_path / "reversal.py", tmp_path / "digit_helper.py"
    reward.write_text(
        "from digit_helper import digits\n\n\n"
        "def reversal(completion, row):\n    return float(len(digits(completion)))\n"
    )
    (tmp_path / "unused.py").write_text("")
    options = ("rewards=[{file: DIR/reversal.py}]",)

    def fingerprint() -> str:
        return planned(*options).fingerprints["rewards[0].file"]

    helper.write_text("def digits(text):\n    return [c for c in text if c.isdigit()]\n")
    before = fingerprint()
    (tmp_path / "unused.py").write_text("x = 1\n")
    assert fingerprint() == before
    helper.write_text("def digits(text):\n    return [c for c in text if c.isdigit() and c != '9']\n")
    changed = fingerprint()
    assert changed != before
    reward.write_text("\n" + reward.read_text())
    assert fingerprint() not in (before, changed)


def test_a_warmup_as_long_as_the_run_is_warned_of(planned: Callable[..., CheckedRun]) -> None:
    short = planned("optimizer.warmup_steps=2", "optimizer.lr=3e-4")
    assert line(short, "warmup_steps") == (
        "warning    optimizer.warmup_steps=2 of 2 optimizer steps: the learning rate never reaches 0.0003"
    )
    assert line(short, "optimizer  ") == "optimizer  adamw, learning rate 0.0003, constant after 2 steps of warmup"
    assert not any("warning    optimizer" in text for text in planned("optimizer.warmup_steps=1").lines)


def test_a_model_folder_with_a_typo_names_the_nearest(
    planned: Callable[..., CheckedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"model\.path=basee.*; did you mean base\?"):
        planned("model.path=basee")
    with pytest.raises(UserError, match=r"model\.path=nobody/base") as error:  # a hub id, of which no folder is known
        planned("model.path=nobody/base")
    assert "its folder" not in str(error.value)
