"""Checkpoints as files: whole or not there, checked when read, and what may differ when a run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo import config as config_module
from grpo.config import Config
from grpo.run.checkpoints import (
    FORMAT,
    Manifest,
    begin,
    compare,
    differences,
    list_checkpoints,
    plain,
    publish,
    read,
    retire,
    seal,
)
from grpo.run.folder import drop_unfinished, is_disk_full
from grpo.types import UserError


def make(
    run: Path, step: int, *, data: bytes = b"tensors", metrics: dict[str, float] | None = None, **changes: Any
) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    partial = begin(run, step, need_bytes=len(data))
    file = partial / "learner" / "rank-0.safetensors"
    file.write_bytes(data)
    settings: dict[str, Any] = {
        "format": FORMAT, "step": step, "config": {}, "fingerprints": {}, "versions": {}, "driver": {"step": step},
        "learner": {"ranks": 1}, "metrics": metrics or {}, "files": {"learner/rank-0.safetensors": seal(file)},
    }  # fmt: skip
    return publish(partial, Manifest(**{**settings, **changes}))


def test_what_is_published_reads_back(tmp_path: Path) -> None:
    path = make(tmp_path, 10, metrics={"reward/mean": 0.1 + 0.2})
    assert path == tmp_path / "checkpoints" / "step-000010"
    manifest = read(path)
    assert (manifest.step, manifest.driver, manifest.metrics) == (10, {"step": 10}, {"reward/mean": 0.1 + 0.2})
    assert manifest.files["learner/rank-0.safetensors"].bytes == 7
    # sha256 of b"tensors", by sha256sum
    expected = subprocess.run(["sha256sum"], input=b"tensors", capture_output=True, check=True).stdout.split()[0]
    assert manifest.files["learner/rank-0.safetensors"].sha256 == expected.decode()
    assert list_checkpoints(tmp_path) == [path]


def damaged(path: Path, how: str) -> str:
    """Damage a checkpoint; returns the file that must be named."""
    tensors, manifest = path / "learner" / "rank-0.safetensors", path / "manifest.json"
    if how == "bit":
        data = bytearray(tensors.read_bytes())
        data[3] ^= 1
        tensors.write_bytes(data)
    elif how == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif how == "gone":
        tensors.unlink()
    elif how == "no manifest":
        manifest.unlink()
        return str(path)
    elif how == "manifest cut":
        manifest.write_text(manifest.read_text()[:-20])
    elif how == "manifest is a list":
        manifest.write_text("[]")
    elif how == "manifest without steps":
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "step"}))
    elif how == "other format":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    elif how == "outside":
        raw = json.loads(manifest.read_text())
        raw["files"] = {"../../../outside": raw["files"]["learner/rank-0.safetensors"]}
        manifest.write_text(json.dumps(raw))
    return str(manifest if "manifest" in how or how in ("other format", "outside") else tensors)


@pytest.mark.parametrize(
    "how",
    [
        "bit", "cut", "gone", "no manifest", "manifest cut", "manifest is a list", "manifest without steps",
        "other format", "outside",
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, how: str) -> None:
    path = make(tmp_path, 1)
    file = damaged(path, how)
    with pytest.raises(UserError) as caught:
        read(path)
    assert file in str(caught.value)


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path, 1, data=bytes(range(40)))
    tensors = path / "learner" / "rank-0.safetensors"
    whole = tensors.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        tensors.write_bytes(changed)
        with pytest.raises(UserError, match=r"rank-0\.safetensors has changed since it was written"):
            read(path)
    for size in range(len(whole)):
        tensors.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"rank-0\.safetensors has"):
            read(path)


def test_a_manifest_that_was_edited_is_not_read(tmp_path: Path) -> None:
    path = make(tmp_path, 4)
    manifest = path / "manifest.json"
    edited = manifest.read_text().replace('"step": 4', '"step": 6')
    manifest.write_text(edited)
    with pytest.raises(UserError, match=r"manifest.json is damaged: its SHA-256 differs from that in manifest.sha256"):
        read(path)
    digest = subprocess.run(["sha256sum", "manifest.json"], cwd=path, capture_output=True, check=True).stdout
    (path / "manifest.sha256").write_bytes(digest)  # by somebody who means it
    with pytest.raises(UserError, match=r"is of step 6, which is not the step of its folder"):
        read(path)
    (path / "manifest.sha256").unlink()
    with pytest.raises(UserError, match=r"manifest.json is damaged: .*manifest.sha256"):
        read(path)


@pytest.mark.parametrize("value", [None, [], "x", 3.5, True])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Manifest)])
def test_a_manifest_of_other_types_is_a_sentence(tmp_path: Path, field: str, value: Any) -> None:
    path = make(tmp_path, 4)
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {field: value}))
    (path / "manifest.sha256").write_text(seal(manifest).sha256)
    with pytest.raises(UserError, match=f"manifest.json is damaged: its {field} is"):
        read(path)


def test_a_metric_that_is_no_number_keeps_no_checkpoint(tmp_path: Path) -> None:
    for step, value in ((1, float("nan")), (2, 0.5), (3, float("inf")), (4, 0.1)):
        make(tmp_path, step, metrics={"reward/mean": value})
    (tmp_path / "checkpoints" / "step-000003" / "manifest.json").write_text("{")
    retire(tmp_path, keep_last=1, keep_every=0, best_by="reward/mean")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000004"]


def test_a_folder_with_other_files_than_its_manifest_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    partial = begin(tmp_path, 1, need_bytes=0)
    (partial / "learner" / "a").write_bytes(b"1")
    record = seal(partial / "learner" / "a")
    (partial / "stray").write_bytes(b"1")
    manifest = Manifest(
        format=FORMAT, step=1, config={}, fingerprints={}, versions={}, driver={}, learner={}, metrics={},
        files={"learner/a": record},
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="stray"):
        publish(partial, manifest)
    assert list_checkpoints(tmp_path) == []


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with pytest.raises(OSError, match=r"a checkpoint takes 953674316 MiB and .* MiB free"):
        begin(tmp_path, 2, need_bytes=10**15)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


KILLER = """
import itertools, os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoints import make
from grpo.run.checkpoints import retire

def strike(run, number):
    calls = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "open"),
                        (pathlib.Path, "write_text"), (pathlib.Path, "write_bytes"), (pathlib.Path, "open")):
        setattr(owner, name, counted(getattr(owner, name)))
    make(run, 3, data=b"third")
    retire(run, keep_last=1, keep_every=0, best_by=None)
    os._exit(0)

for number in itertools.count(1):
    run = pathlib.Path({folder!r}) / str(number)
    make(run, 2, data=b"second")
    child = os.fork()
    if child == 0:
        try:
            strike(run, number)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    if code != -signal.SIGKILL:
        break
"""


def test_killed_at_any_write_the_checkpoint_before_it_loads(tmp_path: Path) -> None:
    """SIGKILL before the n-th call that writes, for every n: what is found reads, and one of them is always found."""
    script = KILLER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.splitlines()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], done.stderr
    outcomes = set()
    for number in range(1, len(codes) + 1):
        run = tmp_path / str(number)
        steps = [read(path).step for path in list_checkpoints(run)]
        assert steps in ([2], [2, 3], [3])
        outcomes.add(tuple(steps))
        make(run, 4)  # and what was left behind is in nobody's way
        assert [path.name for path in (run / "checkpoints").glob("*.partial")] == []
    assert outcomes == {(2,), (2, 3), (3,)}
    assert len(codes) > 12


def test_on_a_disk_that_fills_at_any_point_the_checkpoint_before_loads(make_disk: Callable[[str], Path]) -> None:
    """Room for the second checkpoint ends after each page in turn."""
    small_disk = make_disk("512k")
    first = make(small_disk, 1, data=b"a" * 20_000)
    before, errors = read(first), list[OSError]()
    for pages in range(20):
        room = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes((room.f_bavail - pages) * room.f_bsize))
        try:
            make(small_disk, 2, data=b"b" * 40_000)
        except OSError as error:
            errors.append(error)
            assert list_checkpoints(small_disk) == [first]
        else:
            assert read(list_checkpoints(small_disk)[-1]).step == 2
            shutil.rmtree(list_checkpoints(small_disk)[-1])
        assert read(first) == before
        drop_unfinished(small_disk)
        assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == ["step-000001"]
        (small_disk / "filler").unlink()
    assert all(is_disk_full(error) for error in errors)
    assert 10 <= len(errors) <= 18  # 40 kB, a manifest and two folders are eleven pages and more


def test_what_is_kept(tmp_path: Path) -> None:
    for step, accuracy in ((5, 0.5), (10, 0.9), (15, 0.9), (20, 0.7), (25, None), (30, 0.6)):
        make(tmp_path, step, metrics={} if accuracy is None else {"eval/accuracy": accuracy})
    retire(tmp_path, keep_last=2, keep_every=20, best_by="eval/accuracy")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-000010",
        "step-000020",
        "step-000025",
        "step-000030",
    ]
    retire(tmp_path, keep_last=1, keep_every=0, best_by=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000030"]
    retire(tmp_path, keep_last=1, keep_every=0, best_by="no/such")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000030"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999999, 1000000, 7):
        make(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000007", "step-999999", "step-1000000"]


# --- going on with other settings ------------------------------------------------------------------------------------


def config_of(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {path: x, dtype: float32}\ndata: {train: x}\nalgorithm: {prompts_per_step: 4, group_size: 8}\n"
        "rewards: [{file: a.py}]\nrun: {steps: 25}\n"
    )
    return config_module.load(recipe, overrides)


def manifest_of(config: Config, fingerprints: dict[str, str] | None = None) -> Manifest:
    return Manifest(
        format=FORMAT, step=1, config=plain(config), fingerprints=fingerprints or {}, versions={}, driver={},
        learner={}, metrics={}, files={},
    )  # fmt: skip


def test_differences_are_found_at_any_depth() -> None:
    old = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "gone": 1}
    new = {"a": {"b": 1, "c": {"d": [1, 3]}}, "e": 0, "fresh": 2}
    assert differences(old, new) == {"a.c.d": ([1, 2], [1, 3]), "e": (None, 0), "gone": (1, None), "fresh": (None, 2)}
    old, new = [{"n": 1}, {"n": 2}], [{"n": 1}, {"n": 3}]
    assert differences({"a": old}, {"a": new}) == {"a[1].n": (2, 3)}
    assert differences({"a": [*old, 4]}, {"a": [*old, 5]}) == {"a": ([*old, 4], [*old, 5])}


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=50", "run.save_every=5", "run.name=other", "cluster.step_timeout_s=60", "cluster.samplers=2",
        "data.train=moved.jsonl", "data.train[0].split=other", "data.train[0].columns.q={a}", "data.train[0].limit=5",
        "data.train[0].between.level=[1,2]", "data.train[0].name=n",
        "model.path=moved", "sampler.max_num_seqs=8", "run.tensorboard=false", "rewards.0.gold=true",
        "rewards.0.gold=false", "data.gold_template=[{answer}]", "data.answer_column=sum",
    ],
)  # fmt: skip
def test_what_changes_no_number_may_differ(tmp_path: Path, override: str) -> None:
    assert compare(manifest_of(config_of(tmp_path)), config_of(tmp_path, override), {}, []) == []


@pytest.mark.parametrize(
    ("override", "option"),
    [
        ("optimizer.lr=0.1", "optimizer.lr"),
        ("algorithm.kl_coef=0.1", "algorithm.kl_coef"),
        ("sampling.temperature=0.7", "sampling.temperature"),
        ("run.seed=1", "run.seed"),
        ("data.seed=1", "data.seed"),
        ("data.max_prompt_tokens=7", "data.max_prompt_tokens"),
        ("rewards.0.weight=2", "rewards[0].weight"),
        ("rewards.0.sets=[x]", "rewards[0].sets"),
        ("model.dtype=bfloat16", "model.dtype"),
    ],
)
def test_what_makes_another_run_is_refused_until_it_is_named(tmp_path: Path, override: str, option: str) -> None:
    manifest, now = manifest_of(config_of(tmp_path)), config_of(tmp_path, override)
    with pytest.raises(UserError) as caught:
        compare(manifest, now, {}, [])
    assert f"allow={option}" in str(caught.value)
    [note] = compare(manifest, now, {}, [option])
    assert option in note


def test_data_sets_are_compared_one_by_one(tmp_path: Path) -> None:
    """Their content by fingerprint, their weights as options."""
    mixed = ["data.train=[a,b]", "data.train.0.weight=1", "data.train.1.weight=2", "data.eval.sets=[c,d]"]
    manifest = manifest_of(config_of(tmp_path, *mixed), {"data.train": "1"})
    now = config_of(tmp_path, *mixed, "data.train.1.weight=3", "data.eval.sets.1.samples_per_prompt=4")
    with pytest.raises(UserError, match=r"data\.train\[1\]\.weight=3\.0 was 2\.0 .*allow=data\.train\[1\]\.weight$"):
        compare(manifest, now, {"data.train": "1"}, [])
    with pytest.raises(UserError, match=r"allow=data\.eval\.sets\[1\]\.samples_per_prompt$"):
        compare(manifest, now, {"data.train": "1"}, ["data.train"])
    assert len(compare(manifest, now, {"data.train": "1"}, ["data.train", "data.eval.sets[1]"])) == 2
    now = config_of(tmp_path, *mixed, "data.train.1.columns.q={x}", "data.train.0.between.n=[1,2]")
    with pytest.raises(UserError) as caught:
        compare(manifest, now, {"data.train": "2"}, [])
    assert str(caught.value) == (
        "the content of data.train has changed since the checkpoint (by data.train[0].between.n, "
        "data.train[1].columns.q); to permit this: allow=data.train"
    )
    with pytest.raises(UserError, match=r"allow=data\.train$"):
        compare(manifest, config_of(tmp_path, "data.train=[a]", "data.eval.sets=[c,d]"), {"data.train": "1"}, [])


def test_an_option_that_is_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    manifest = manifest_of(config_of(tmp_path))
    for option, section in (("betas", "optimizer"), ("mask_truncated", "algorithm"), ("clip", "critic")):
        del manifest.config[section][option]
    del manifest.config["data"]["eval"]
    assert compare(manifest, config_of(tmp_path), {}, []) == []
    now = config_of(tmp_path, "algorithm.mask_truncated=true")
    with pytest.raises(UserError, match=r"algorithm\.mask_truncated=True was False .*allow=algorithm\.mask_truncated$"):
        compare(manifest, now, {}, [])
    gae = "algorithm.advantage=gae"
    manifest = manifest_of(config_of(tmp_path, gae, "critic.clip=null"))  # null is a value, not a missing option
    with pytest.raises(UserError, match=r"critic\.clip=0\.2 was None "):
        compare(manifest, config_of(tmp_path, gae), {}, [])


def test_learner_layouts_go_on_up_to_float_order(tmp_path: Path) -> None:
    now = config_of(tmp_path, "cluster.learner_ranks=2", "learner.zero_stage=3")
    notes = compare(manifest_of(config_of(tmp_path)), now, {}, [])
    assert len(notes) == 2
    assert all("not bit for bit" in note for note in notes)


def test_more_steps_under_a_schedule_are_another_schedule(tmp_path: Path) -> None:
    manifest = manifest_of(config_of(tmp_path, "optimizer.schedule=linear"))
    now = config_of(tmp_path, "optimizer.schedule=linear", "run.steps=50")
    with pytest.raises(UserError, match=r"run\.steps=50 was 25.*schedule would change.*allow=run\.steps"):
        compare(manifest, now, {}, [])
    assert len(compare(manifest, now, {}, ["run.steps"])) == 1


def test_changed_content_is_refused_until_it_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    manifest = manifest_of(config, {"data.train": "a", "model.path": "m", "rewards[0].file": "r"})
    same = {"data.train": "a", "model.path": "m", "rewards[0].file": "r"}
    assert compare(manifest, config, same, []) == []
    for name in same:
        with pytest.raises(UserError, match=r"the content of .* has changed since the checkpoint") as caught:
            compare(manifest, config, {**same, name: "other"}, [])
        assert f"allow={name}" in str(caught.value)
        assert len(compare(manifest, config, {**same, name: "other"}, [name])) == 1
    with pytest.raises(UserError, match=r"the content of data\.eval\.sets has changed"):
        compare(manifest, config, {**same, "data.eval.sets": "new"}, [])


def test_a_reward_file_may_be_named_by_another_path_if_its_content_is_the_same(tmp_path: Path) -> None:
    """As recipes do that name a built-in reward, which earlier versions of them named by its path."""
    file = "rewards[0].file"
    manifest = manifest_of(config_of(tmp_path, "rewards.0.file=reward_fns/countdown.py"), {file: "r"})
    now = config_of(tmp_path, "rewards.0.file=countdown")
    assert compare(manifest, now, {file: "r"}, []) == []
    with pytest.raises(UserError, match=r"the content of rewards\[0\]\.file has changed .* \(by rewards\[0\]\.file\)"):
        compare(manifest, now, {file: "other"}, [])


def test_what_is_allowed_need_not_differ(tmp_path: Path) -> None:
    """A scheduler starts, resumes and requeues a run with one command line."""
    config = config_of(tmp_path)
    assert compare(manifest_of(config), config, {}, ["optimizer.lr", "data.train"]) == []
