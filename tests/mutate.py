"""Small wrong edits of the product, each of which a test must notice.

    python tests/mutate.py                 all of them; prints which tests killed which, and what survived
    python tests/mutate.py --only 7 --only 12

Each edit is made in a copy of the tree; the named tests are run there, and one must fail.  Not part of the usual tests,
which it would make an hour longer; `tests/test_mutate.py` checks that the edits still apply.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

from family_mutations import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """`old` in `file` becomes `new`; `tests` are what should notice."""

    file: str
    old: str
    new: str
    tests: str


PARTS = ("effects", "step", "loop", "saving", "feed", "trainer")
TRAINING = " ".join(f"tests/training/test_{part}.py" for part in PARTS)
RESUME = "tests/training/test_resume.py"
DEEPZIG = "tests/pipelines/test_deepzig_run.py"
SAMPLER = "tests/generation/test_sampler.py tests/generation/test_parity.py"

MUTATIONS: tuple[Mutation, ...] = (
    # -- the step
    Mutation(
        "abi_py/training/step.py",
        "label_smoothing=config.label_smoothing",
        "label_smoothing=0.0",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/step.py",
        "state.window_correct / tokens",
        "state.window_correct / state.epoch_tokens",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/step.py",
        "flops_per_token(self._seq_len)",
        "flops_per_token(session.config.max_seq_len)",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/step.py",
        "if 0 < config.max_grad_norm < norm",
        "if config.max_grad_norm < norm",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/guard.py",
        "state.bad_steps_in_row >= limit",
        "state.bad_steps_in_row > limit",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/step.py",
        "segment_ids=segment_ids,\n                label_smoothing",
        "segment_ids=None,\n                label_smoothing",
        "tests/training/test_chat_training.py",
    ),
    Mutation(
        "abi_py/training/step.py",
        "state.global_step % interval == 0 or",
        "(state.global_step - 1) % interval == 0 or",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/saving.py",
        "interval = config.checkpoint_interval",
        "interval = config.eval_interval",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/loop.py",
        "if updated and interval and state.global_step % interval == 0",
        "if updated and interval and state.epoch % interval == 0",
        TRAINING,
    ),
    # -- the optimizer
    Mutation(
        "abi_py/training/optimizer.py",
        "(config.beta1, config.beta2, config.epsilon)",
        "(config.beta2, config.beta1, config.epsilon)",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/optimizer.py",
        "(config.beta1, config.beta2, config.epsilon)",
        "(config.beta1, 0.999, config.epsilon)",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/optimizer.py",
        "(config.beta1, config.beta2, config.epsilon)",
        "(config.beta1, config.beta2, 1e-8)",
        TRAINING,
    ),
    Mutation("abi_py/training/optimizer.py", "config.nesterov", "False", TRAINING),
    Mutation(
        "abi_py/training/optimizer.py",
        "entry.decay or everything for",
        "everything for",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/schedule.py",
        "base * (1 - p) + least * p",
        "base * (1 - p)",
        "tests/training/test_schedule.py",
    ),
    Mutation(
        "abi_py/training/schedule.py",
        "(since + 1) / warmup",
        "since / warmup",
        "tests/training/test_schedule.py",
    ),
    Mutation(
        "abi_py/training/precision.py",
        "backoff_factor=config.loss_scale_backoff_factor",
        "backoff_factor=1 / config.loss_scale_growth_factor",
        TRAINING,
    ),
    # -- early stopping, checkpoints, resume
    Mutation(
        "abi_py/training/evaluation.py",
        "early is None or early.monitor_loss",
        "early is None or not early.monitor_loss",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/evaluation.py",
        "state.best_metric - least_fall",
        "state.best_metric + least_fall",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/loop.py",
        "state.patience_counter >= early.patience:",
        "state.patience_counter > early.patience:",
        TRAINING,
    ),
    Mutation(
        "abi_py/training/saving.py",
        "{saved.name, best}",
        "{saved.name}",
        "tests/training/test_checkpoint.py",
    ),
    Mutation(
        "abi_py/training/checkpoint.py",
        "there[: max(0, len(there) - keep)]",
        "there[: max(0, len(there) - keep - 1)]",
        "tests/training/test_checkpoint.py",
    ),
    Mutation(
        "abi_py/training/saving.py",
        "session.model.draws = state.draws",
        "session.model.draws, state.bad_steps_in_row = state.draws, 0",
        RESUME,
    ),
    Mutation(
        "abi_py/training/saving.py",
        "session.model.draws = state.draws",
        "session.model.draws, state.epoch_loss = state.draws, 0.0",
        RESUME,
    ),
    Mutation(
        "abi_py/training/saving.py",
        "session.model.draws = state.draws",
        "session.model.draws = state.optimizer_step",
        "tests/training/test_lora_training.py",
    ),
    Mutation(
        "abi_py/training/saving.py",
        'self._lock = DirectoryLock(root, "checkpoint_path")',
        "self._lock = None",
        "tests/training/test_checkpoint.py",
    ),
    # -- the order of data, and what is trained of them
    Mutation(
        "abi_py/data/chat_dataset.py",
        "if self._plan_epoch != self.epoch:",
        "if not self._plan:",
        "tests/training/test_chat_training.py tests/data/test_chat_dataset.py",
    ),
    Mutation(
        "abi_py/training/feed.py",
        "seed=config.seed,",
        "seed=model.seed,",
        TRAINING,
    ),
    Mutation(
        "abi_py/data/tokens.py",
        "*sizes, False, 0, drop_last=False)",
        "*sizes, False, 0, drop_last=self.drop_last)",
        TRAINING,
    ),
    Mutation(
        "abi_py/data/chat_encoding.py",
        "elif not all(message.trained for message in conversation.messages):",
        "elif not any(message.trained for message in conversation.messages):",
        "tests/data/test_conversation_rows.py tests/data/test_templates.py tests/data/test_answers.py",
    ),
    Mutation(
        "abi_py/data/batch.py",
        "np.where(trained[1:], ids[1:], IGNORE_LABEL)",
        "np.where(trained[:-1], ids[1:], IGNORE_LABEL)",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "abi_py/data/sidecar.py",
        "(self.before_document, self.after_document) == wanted",
        "self.after_document == wanted[1]",
        "tests/cli/test_eval.py",
    ),
    # -- LoRA and what is exported
    Mutation(
        "abi_py/lora_config.py",
        "math.sqrt(rank) if self.use_rslora else rank",
        "rank if self.use_rslora else rank",
        "tests/training/test_effects.py",
    ),
    Mutation(  # lengths that are measured once and never again
        "abi_py/model/lora.py",
        "        if mark != self._measured:\n",
        "        if not self._measured:\n",
        "tests/model/test_dora_model.py",
    ),
    Mutation(  # dx of a matrix whose output is scaled
        "abi_py/model/layers/dora_adapter.py",
        "return dy if self.drops(run) else self._dz(u, s)",
        "return dy",
        "tests/model/test_dora_model.py",
    ),
    Mutation(  # dx of a head whose rows have lengths, with dropout
        "kernels/cross_entropy.py",
        "np.subtract(dz, dy, out=dz)",
        "np.add(dz, dy, out=dz)",
        "tests/kernels/test_cross_entropy.py",
    ),
    Mutation(  # columns of a table measured as rows of what is looked up
        "abi_py/model/layers/end_adapters.py",
        "self.lengths.base.rows(z, ids)\n        z *= np.float32(factor)",
        "self.lengths.base.rows(z, ids)",
        "tests/model/test_dora_model.py",
    ),
    Mutation(
        "kernels/dora.py",
        "total += np.float64(b[r, k]) * scale * (2 * np.float64(wa[k, r]) + scale * inner)",
        "total += np.float64(b[r, k]) * scale * (2 * np.float64(wa[k, r]))",
        "tests/kernels/test_dora.py",
    ),
    Mutation(
        "abi_py/model/lora.py",
        "return self.draws - 1 if",
        "return 0 if",
        "tests/model/test_lora.py",
    ),
    Mutation(
        "abi_py/formats/peft.py",
        '"target_modules": _as_peft(config.target_modules) or []',
        '"target_modules": ["q_proj"]',
        "tests/formats/test_peft.py",
    ),
    Mutation(
        "abi_py/families/llama.py",
        '"tie_word_embeddings": shape.tie_embeddings',
        '"tie_word_embeddings": True',
        "tests/formats/test_huggingface.py",
    ),
    Mutation(
        "abi_py/formats/deepzig.py",
        "    check_written(folder / WEIGHTS, weights)\n",
        "",
        "tests/formats/test_finite.py",
    ),
    # -- DeepZig
    Mutation(
        "abi_py/model/presets.py",
        "_shape(8_000, 256, 768, 4, 4, 1_024)",
        "_shape(8_000, 256, 768, 4, 8, 1_024)",
        "tests/model/test_presets.py",
    ),
    Mutation("abi_py/pipelines/presets.py", "(5e-5, 8, 0.1,", "(5e-5, 4, 0.1,", DEEPZIG),
    Mutation(
        "abi_py/pipelines/presets.py",
        '"training.min_learning_rate": 0.0,',
        '"training.min_learning_rate": 0.0, "training.lr_schedule": "linear",',
        DEEPZIG,
    ),
    Mutation("abi_py/formats/deepzig.py", "0.2 if calm else 0.8", "0.8 if calm else 0.2", DEEPZIG),
    Mutation(
        "abi_py/training/trainer_state.py",
        "self.step / self.steps_per_epoch * self.input_tokens",
        "self.step * self.input_tokens",
        DEEPZIG,
    ),
    Mutation(
        "abi_py/data/holdout.py",
        "known.issuperset(_answers(rows[i]))",
        "known.intersection(_answers(rows[i]))",
        "tests/data/test_holdout.py",
    ),
    # -- generation and evaluation
    Mutation(
        "abi_py/generation/sampler.py",
        "best + temperature * math.log(min_p)",
        "best + math.log(min_p)",
        SAMPLER,
    ),
    Mutation(
        "abi_py/generation/sequence.py",
        "penalise_repetition(z, self.ids, ",
        "penalise_repetition(z, self.prompt, ",
        SAMPLER,
    ),
    Mutation(
        "abi_py/families/llama.py",
        'RmsNorm("final_norm", width, eps)',
        'RmsNorm("final_norm", width, 1e-2)',
        "tests/training/test_trajectory.py tests/generation/test_parity.py",
    ),
    Mutation(
        "abi_py/training/perplexity.py",
        "byte_counts[window.first : window.end]",
        "byte_counts[window.start : window.end]",
        "tests/training/test_perplexity.py",
    ),
    # -- what is read
    Mutation(
        "abi_py/untrusted.py",
        "    check(value, schema, str(path), error=error, remedy=remedy)\n    return value",
        "    return value",
        "tests/test_untrusted.py",
    ),
    Mutation(
        "kernels/engine/cache.py",
        "if _digest(name, raw[DIGEST:]) != raw[:DIGEST]:",
        "if len(raw) < DIGEST:",
        "tests/kernels/engine/test_cache.py",
    ),
    # -- more of what survived when it was first tried
    Mutation(
        "abi_py/training/loop.py",
        "session.config.mixed_precision,\n            session.count_bytes",
        "Precision.FP32,\n            self.count_bytes",
        TRAINING,
    ),
    Mutation(
        "abi_py/runs/opening.py",
        "replace(mix=(), max_samples=0)",
        "replace(mix=())",
        "tests/cli/test_conversations.py",
    ),
    Mutation(
        "abi_py/runs/defaults.py",
        "min(100, facts.steps // 20, ",
        "min(100, facts.steps // 10, ",
        "tests/runs/test_resolve.py",
    ),
    Mutation(
        "abi_py/runs/schedule.py",
        "planned = count_steps(self.before, data)[1]",
        "planned = total",
        "tests/cli/test_run.py",
    ),
    Mutation(
        "abi_py/cli/chat.py",
        "(*self.encoder.stop_ids(asked), *self.eos_ids)",
        "self.encoder.stop_ids(asked)",
        "tests/cli/test_chat.py",
    ),
    Mutation(
        "abi_py/cli/chat.py",
        "            del self.messages[first : first + forgotten]\n",
        "",
        "tests/cli/test_chat.py",
    ),
    Mutation(
        "abi_py/runs/trainer_files.py",
        '"adam_beta2": training.beta2',
        '"adam_beta2": training.beta1',
        DEEPZIG,
    ),
    Mutation(
        "abi_py/pipelines/presets.py",
        '{**ADAPTERS, "seed": seed} if',
        "{**ADAPTERS} if",
        DEEPZIG,
    ),
    *starmap(Mutation, FAMILIES),
    Mutation(
        "kernels/layer_norm.py",
        "dx[n, j] += rn * (dy[n, j] * w[j] - mean - normed[j] * along)",
        "dx[n, j] += rn * (dy[n, j] * w[j] - normed[j] * along)",
        "tests/kernels/test_layer_norm.py",
    ),
    Mutation(
        "kernels/gelu.py",
        "return below, below + u * e * _HALF_ROOT",
        "return below, below",
        "tests/kernels/test_gelu.py",
    ),
    Mutation(
        "abi_py/model/layers/embedding.py",
        "by_numpy(np.multiply, dx, np.float32(self.scale), out=dx)",
        "by_numpy(np.multiply, dx, np.float32(1), out=dx)",
        "tests/model/test_options.py",
    ),
    Mutation(
        "abi_py/model/layers/feed_forward.py",
        "self.after.backward(dz, dx, a.z, a.r_z, False)",
        "dz[...] = dx",
        "tests/model/test_options.py",
    ),
    Mutation(
        "abi_py/families/gpt2.py",
        "math.sqrt(2 * shape.num_layers)",
        "math.sqrt(shape.num_layers)",
        "tests/families/test_gpt2.py",
    ),
    Mutation(
        "abi_py/lora_config.py",
        'module.endswith(f".{name}")',
        "module.endswith(name)",
        "tests/formats/test_peft.py",
    ),
)


def copy_tree(folder: Path) -> None:
    """Copy what git tracks, and files it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def try_mutation(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Return whether a test failed, and the first that did."""
    file = folder / mutation.file
    original = file.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: {mutation.old!r} is there {original.count(mutation.old)} times, not once")
    file.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    finally:
        file.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        output = done.stdout[-2000:] + done.stderr[-500:]
        raise SystemExit(f"{mutation.file}: pytest ended with {done.returncode}\n{output}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 1, failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else ""


def main() -> None:
    """Try the mutations and print what became of each."""
    parser = argparse.ArgumentParser(description="make small wrong edits and see whether tests notice")
    parser.add_argument("--only", type=int, action="append", help="number of a mutation, from 1")
    numbers = parser.parse_args().only or range(1, len(MUTATIONS) + 1)
    # A shell's background job ignores these, and so would the processes that tests interrupt: they would seem to fail.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for number in numbers:
            mutation, began = MUTATIONS[number - 1], time.monotonic()
            noticed, test = try_mutation(mutation, Path(folder))
            killed += noticed
            verdict = f"killed by {test}" if noticed else "SURVIVED"
            change = f"{mutation.file}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}"
            print(f"{number:3} {time.monotonic() - began:5.0f} s  {change}: {verdict}", flush=True)
    print(f"{killed} of {len(numbers)} killed")
    sys.exit(killed < len(numbers))


if __name__ == "__main__":
    main()
