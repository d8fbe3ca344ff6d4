"""The names of all metrics with their meanings, and docs/metrics.md, which is generated from them:

python -m grpo.metrics.names > docs/metrics.md
"""

from __future__ import annotations

import functools
import re
import sys

HEAD = """\
<!-- python -m grpo.metrics.names > docs/metrics.md -->
# Metrics

`metrics.jsonl` in the run folder has one line per step, with `step`, `time` and these metrics. TensorBoard and W&B use
the same names; Prometheus uses `ray_grpo_<name>` ([look.md](look.md#curves)). A test compares this page with the names
in the code.

A metric without observations in a step is omitted. Means are sums divided by counts over all ranks. A rollout is
*right* if it has the highest reward of the step and this reward is above 0.
"""

SECTIONS: dict[str, dict[tuple[str, ...], str]] = {
    "Rewards and groups": {
        ("reward/mean", "reward/std", "reward/min", "reward/max"): "rewards of the scored rollouts",
        (
            "reward_part/<name>/mean",
            "reward_part/<name>/std",
            "reward_part/<name>/min",
            "reward_part/<name>/max",
        ): "values of each reward function, without its weight",
        (
            "reward/<reward>/metric/<name>",
            "eval/reward/<reward>/metric/<name>",
        ): "mean over all values that a reward logged by `log_metric` ([rewards.md](rewards.md))",
        ("reward/failed_fraction", "reward/failed_<kind>"): "rollouts without a reward: share of all; count by kind",
        (
            "group/count",
            "group/dropped",
        ): (
            "prompts of the step; groups with fewer scored members than the advantage needs (two; `pass_k`; one "
            "for `reinforce_pp` and `gae`)"
        ),
        ("group/no_spread_fraction",): "share of groups whose rewards are all exactly equal: no policy gradient",
        (
            "group/all_right_fraction",
            "group/all_wrong_fraction",
            "group/mixed_fraction",
        ): "shares of groups in which all, none or some of the rollouts are right",
        ("group/pass_at_group_size",): "share of groups with at least one right rollout",
        ("group/reward_std_mean",): "standard deviation of the reward within a group, mean over groups",
        ("advantage/mean", "advantage/std", "advantage/min", "advantage/max"): "advantages of all trained rollouts",
    },
    "Completions and prompts": {
        (
            "completion/tokens_mean",
            "completion/tokens_std",
            "completion/tokens_min",
            "completion/tokens_max",
        ): "sampled tokens per completion",
        (
            "completion/tokens_right_mean",
            "completion/tokens_wrong_mean",
        ): "mean number of tokens of right and of wrong rollouts",
        ("completion/truncated_fraction",): "share of completions that were ended by `max_tokens`",
        ("prompt/tokens_mean", "prompt/tokens_min", "prompt/tokens_max"): "tokens per prompt",
        (
            "refill/attempts",
            "refill/replaced_groups",
            "refill/missing_groups",
        ): "dynamic sampling: additional rounds, replaced groups, groups still missing at the end",
        (
            "staleness/mean",
            "staleness/max",
        ): "version of the weights in training minus the version that sampled the completion",
    },
    "Policy and optimizer": {
        ("policy/loss",): "policy term of the loss, mean over optimizer steps",
        (
            "policy/kl_ref",
            "policy/kl_ref_loss",
            "policy/kl_coef",
        ): (
            "k3 estimate of the KL to the reference per token; its sum with the token weights of the loss; its "
            "coefficient. Only with a reference"
        ),
        (
            "policy/total_loss",
        ): "the minimized loss: `policy/loss`, the KL to the reference with its clamp and gradient, the entropy bonus",
        ("policy/entropy_loss",): "`-entropy_coef` times the weighted entropy, if there is a bonus",
        (
            "optim/skipped_updates",
        ): "updates skipped because loss or gradient was not finite; their tokens count as `gradient/stopped`",
        ("value/skipped_updates",): "skipped updates of the critic, if there is one",
        (
            "policy/updates",
            "policy/stopped_minibatches",
        ): "optimizer steps in this step; minibatches skipped because of `max_kl_old`",
        ("policy/kl_old",): "k3 estimate of the KL from the old policy, per token",
        ("policy/ratio_mean", "policy/ratio_max"): "exp(logprobs - old_logprobs)",
        (
            "policy/clip_fraction",
            "policy/clip_fraction_low",
            "policy/clip_fraction_high",
        ): "share of tokens whose gradient the clip stopped",
        ("policy/entropy",): "entropy in nats per token, of the full distribution at the sampling temperature",
        (
            "optim/grad_norm",
            "optim/lr",
            "optim/optimizer_steps",
        ): "gradient norm before clipping; learning rate; optimizer steps so far",
        (
            "value/loss",
            "value/clip_fraction",
            "value/mean",
            "value/return_mean",
            "value/explained_variance",
            "value/grad_norm",
        ): "the critic, if there is one",
    },
    "Token accounting": {
        (
            "gradient/sampled",
            "gradient/failed",
            "gradient/truncated",
            "gradient/no_spread",
            "gradient/stale",
            "gradient/zero_advantage",
            "gradient/stopped",
            "gradient/mismatch_masked",
            "gradient/clipped",
            "gradient/contributing",
        ): (
            "uses of sampled tokens (a token used in two epochs counts twice), each counted in the first column "
            "that applies. The columns add up exactly, or the run stops"
        ),
    },
    "Sampler and learner": {
        (
            "mismatch/mean",
            "mismatch/rms",
            "mismatch/q99",
            "mismatch/max",
        ): (
            "|learner - sampler| logprob of the sampled tokens, under the weights that sampled them: mean, root "
            "mean square, 99 % quantile (accurate to 6 %), maximum"
        ),
        ("mismatch/equal_fraction",): "share of tokens whose two logprobs are equal to the last bit",
        ("mismatch/kl",): "k3 estimate of KL(sampler to learner) per token",
        (
            "mismatch/importance_weight_mean",
            "mismatch/importance_weight_min",
            "mismatch/importance_weight_max",
            "mismatch/effective_sample_fraction",
        ): "exp(old - sampler) before truncation; (sum w)² / (n sum w²)",
        ("mismatch/importance_weight_bounded_fraction",): (
            "share of tokens whose importance weight was outside the bounds `algorithm.importance_low` and "
            "`importance_high`"
        ),
        (
            "mismatch/masked_fraction",
            "mismatch/rejected_sequence_fraction",
        ): "share of tokens whose policy term was masked; share of rows rejected by their geometric mean",
        ("sync/seconds", "sync/bytes"): "duration and size of the verified weight sync",
        (
            "sync/probe_q90",
            "sync/probe_rms",
        ): (
            "difference between learner and sampler over the tokens of the probe: 90 % quantile, root mean square"
            " ([weight-check.md](weight-check.md))"
        ),
        (
            "sync/noise_q90",
            "sync/noise_rms",
        ): "the learner's own rounding noise on the probe, with which the two above are compared",
        ("sync/movement_error",): (
            "after a full check: distance between sampler and learner under perturbed weights, divided by the "
            "movement of the learner; the worst group of parameters"
        ),
    },
    "Evaluation": {
        (
            "eval/accuracy",
            "eval/pass_at_k",
            "eval/maj_at_k",
            "eval/tokens_mean",
            "eval/truncated_fraction",
            "eval/failed",
        ): (
            "held-out prompts ([evaluation.md](evaluation.md)); k is the number of completions. Means over data "
            "sets. With several data sets also `eval/<name>/<data set>`; with `data.eval.by: [level]` also "
            "`eval/<name>/<data set>/level/<value>`"
        ),
    },
    "Time, memory and progress": {
        (
            "time/sample_s",
            "time/reward_s",
            "time/batch_s",
            "time/update_s",
            "time/sync_s",
            "time/idle_s",
            "time/step_s",
        ): (
            "seconds of each part and of the step; `reward_s` is scoring time that did not overlap with sampling,"
            " `idle_s` the rest of the step"
        ),
        (
            "time/samplers_busy_fraction",
            "time/learner_busy_fraction",
        ): "share of the step in which samplers sampled or the learner was updated; the weight sync counts for both",
        ("time/full_check_s",): "the full check of the weight sync, part of `sync_s`; only in steps that have one",
        (
            "time/eval_s",
            "time/save_s",
        ): (
            "evaluation after the step; time spent waiting for checkpoints since the previous step. Both are not "
            "part of `time/step_s`"
        ),
        (
            "memory/residual_gib",
        ): "GiB of GPU memory in use while both sampler and learner are offloaded (`cluster.sleep`)",
        (
            "time/old_logprobs_s",
            "time/ref_logprobs_s",
            "time/values_s",
        ): (
            "part of `time/update_s`: forward passes without gradient (old logprobs, reference, values of the "
            "critic), on the slowest rank"
        ),
        (
            "tokens/sampled",
            "tokens/per_second",
            "tokens/per_second_per_gpu",
        ): "sampled tokens of the step; per second of wall time; per second and GPU that the run reserved",
        ("perf/learner_tflops_per_rank",): (
            "model flops of the update per second (6 per parameter and position, 2 in forward passes without "
            "gradient); divided by the device's peak, this is the MFU"
        ),
        (
            "progress/epoch",
            "progress/rollouts",
            "progress/tokens",
            "progress/retired_prompts",
        ): "totals since the start of the run; an epoch has as many draws as there are prompts",
    },
    "By data set": {
        (
            "reward/mean/<set>",
            "completion/tokens_mean/<set>",
            "completion/truncated_fraction/<set>",
            "group/no_spread_fraction/<set>",
            "group/count/<set>",
        ): "values for the prompts of one data set, if there are several; a set without prompts in a step is omitted",
        ("progress/epoch/<set>",): "epochs of each data set, if data sets have weights",
    },
}
"""Section -> names of its metrics, with `<...>` for a part that varies -> their meaning, in Markdown."""


def meaning_of(name: str) -> tuple[str, str]:
    """Return section and meaning of a metric, without Markdown; two empty texts for an unknown one."""
    for pattern, section, meaning in _patterns():
        if pattern.fullmatch(name):
            return section, meaning
    return "", ""


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str, str]]:
    """Return pattern, section and meaning of every name; names without a varying part first."""
    every = [(name, section, meaning) for section, rows in SECTIONS.items()
             for names, meaning in rows.items() for name in names]  # fmt: skip
    every.sort(key=lambda one: one[0].count("<"))
    return [
        (re.compile(re.sub(r"<[^>]+>", ".+", re.sub(r"[.()]", r"\\\g<0>", name))), section, plain(meaning))
        for name, section, meaning in every
    ]


def plain(meaning: str) -> str:
    """Return a meaning without the marks and links of Markdown."""
    return re.sub(r" ?\(?\[[\w.-]+\]\([^)]*\)\)?", "", meaning).replace("`", "").replace("\\", "")


def page() -> str:
    """Return the text of docs/metrics.md."""
    out = [HEAD]
    for section, rows in SECTIONS.items():
        out += [f"\n## {section}\n\n| name | meaning |\n|---|---|\n"]
        for names, meaning in rows.items():
            cell = meaning.replace("|", "\\|")
            out.append(f"| {', '.join(f'`{name}`' for name in names)} | {cell} |\n")
    return "".join(out)


if __name__ == "__main__":
    sys.stdout.write(page())
