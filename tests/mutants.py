"""Delete each line of the mathematics in turn: the tests must notice every one.

    python tests/mutants.py [FILE …]     files under src/batchnorm; default: all that compute

A line counts if the file without it still parses and means something else. The mutated package lies
in a scratch directory; the tests that concern the file run against it until one fails. Lines whose
loss no test saw are listed at the end, and the exit status is their number. `# mutant: reason` at
the end of a line exempts it: what it does cannot be seen in values.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "batchnorm"
PROCESSES = 2
TIMEOUT_S = 300
#: Not mathematics. Python finds a static method that does not say so; "*," only forbids calls by
#: position, and test_package.py holds the public ones to it.
SKIPPED = ("#", "@overload", "@staticmethod", "*,")

#: Several files of tests, of one theme.
GHOST = [
    "test_ghost.py", "test_ghost_masks.py", "test_ghost_faults.py", "test_ghost_layer.py",
    "test_ghost_packed.py", "test_ghost_derivatives.py",
]  # fmt: skip
RENORM = [
    "test_renorm.py", "test_renorm_schedule.py", "test_renorm_faults.py",
    "test_renorm_derivatives.py", "test_renorm_checkpointing.py",
]  # fmt: skip
SYNC = [
    "test_sync.py", "test_sync_group.py", "test_sync_networks.py", "test_sync_disagreement.py",
    "test_sync_absence.py",
]  # fmt: skip
TOGETHER = [
    "tools/test_together.py", "tools/test_together_faults.py", "tools/test_together_around.py",
]  # fmt: skip
DIAGNOSE = ["tools/test_diagnose.py", "tools/test_diagnose_restores.py"]

#: For each file, the tests that concern it, the quickest to notice first.
TESTS = {
    "moments.py": ["test_moments.py", "test_validation.py"],
    "kernels/reference.py": ["kernels/test_reference.py", "test_numerics.py", "test_autograd.py"],
    "kernels/aten.py": ["kernels/test_aten.py", "layers/test_compile.py", "test_numerics.py"],
    "kernels/blocked.py": ["kernels/test_blocked.py"],
    "kernels/select.py": [
        "kernels/test_select.py", "test_functional.py", "test_numerics.py", "test_autograd.py",
        "layers/test_compile.py", "layers/test_batch_norm.py",
    ],
    "autograd.py": [
        "test_numerics.py", "test_autograd.py", "layers/test_func.py", "layers/test_persistence.py",
        "layers/test_compile.py", "layers/test_batch_norm.py",
    ],
    "autograd_kernels.py": [
        "test_autograd_kernels.py", "test_functional.py", "test_numerics.py", "test_autograd.py",
        "test_validation.py", "test_combinations.py", *RENORM, *GHOST,
        "layers/test_persistence.py", "layers/test_batch_norm.py", "layers/test_layouts.py",
    ],
    "running.py": [
        "test_functional.py", "layers/test_func.py", "layers/test_batch_norm.py",
        "layers/test_compile.py",
    ],
    "ghost.py": ["test_combinations.py", *GHOST],
    "autograd_memory.py": ["test_autograd_memory.py", "tools/test_memory.py"],
    "recall.py": [
        "test_renorm_checkpointing.py", "tools/test_bank_checkpointing.py",
        "tools/test_memory_checkpointing.py",
    ],
    "renorm.py": [*RENORM, "test_combinations.py"],
    "layers/packed.py": ["test_ghost_packed.py"],
    "validation.py": ["test_validation.py", "test_functional.py", *GHOST],
    "functional.py": [
        "test_functional.py", "test_validation.py", "layers/test_func.py",
        "layers/test_batch_norm.py", "layers/test_compile.py",
    ],
    "sync.py": SYNC,
    "pooled.py": [*GHOST, *RENORM, *TOGETHER, *SYNC],
    "autograd_moments.py": TOGETHER,
    "layers/control.py": [
        "tools/test_bank.py", "tools/test_bank_checkpointing.py", "layers/test_persistence.py",
        *RENORM, *SYNC,
    ],
    "layers/statistics.py": ["tools/test_bank.py", "layers/test_persistence.py"],
    "tools/accumulate.py": ["tools/test_accumulate.py"],
    "tools/convert.py": [
        "tools/test_convert_refusals.py", "tools/test_convert.py", "tools/test_convert_objects.py",
    ],
    "tools/exchange.py": ["tools/test_exchange.py"],
    "tools/graph.py": [
        "tools/test_memory.py", "tools/test_memory_changed.py", "tools/test_memory_around.py",
    ],
    "tools/groups.py": ["tools/test_groups.py"],
    "tools/lazy.py": ["tools/test_lazy.py"],
    "tools/origin.py": [
        "tools/test_convert_refusals.py", "tools/test_convert.py", "tools/test_convert_objects.py",
        "tools/test_revert.py", "tools/test_lazy.py",
    ],
    "tools/revert.py": [
        "tools/test_revert.py", "tools/test_convert.py", "tools/test_convert_objects.py",
        "tools/test_lazy.py",
    ],
    "tools/same.py": [
        "tools/test_convert_refusals.py", "tools/test_convert.py", "tools/test_convert_objects.py",
        "tools/test_revert.py",
    ],
    "tools/bank.py": ["tools/test_bank.py"],
    "tools/diagnose.py": DIAGNOSE,
    "tools/diagnosis/configuration.py": ["tools/diagnosis/test_configuration.py", *DIAGNOSE],
    "tools/diagnosis/examination.py": [
        *DIAGNOSE, "tools/diagnosis/test_gap.py", "tools/diagnosis/test_configuration.py",
        "tools/diagnosis/test_inputs.py", "tools/diagnosis/test_trace.py",
        "tools/diagnosis/test_processes.py",
    ],
    "tools/diagnosis/gap.py": ["tools/diagnosis/test_gap.py", *DIAGNOSE],
    "tools/diagnosis/inputs.py": [
        "tools/diagnosis/test_inputs.py", "tools/diagnosis/test_watch.py", *DIAGNOSE,
        "tools/diagnosis/test_processes.py",
    ],
    "tools/diagnosis/modes.py": [
        "tools/diagnosis/test_modes.py", *DIAGNOSE, "tools/diagnosis/test_processes.py",
    ],
    "tools/diagnosis/padding.py": ["tools/diagnosis/test_padding.py"],
    "tools/diagnosis/processes.py": ["tools/diagnosis/test_processes.py"],
    "tools/diagnosis/statistics.py": ["tools/diagnosis/test_statistics.py", *DIAGNOSE],
    "tools/diagnosis/trace.py": ["tools/diagnosis/test_trace.py", *DIAGNOSE],
    "tools/diagnosis/rehearsal.py": ["tools/test_diagnose_hostile.py", *DIAGNOSE],
    "tools/diagnosis/watch.py": ["tools/diagnosis/test_watch.py", *DIAGNOSE],
    "tools/diagnosis/whole.py": ["tools/diagnosis/test_whole.py"],
    "tools/fold.py": [
        "tools/folding/test_plan.py", "tools/folding/test_verify.py", "tools/test_fold.py",
    ],
    "tools/folding/algebra.py": ["tools/folding/test_kinds.py", "tools/test_fold.py"],
    "tools/folding/capture.py": [
        "tools/folding/test_capture.py", "tools/folding/test_ways.py",
        "tools/folding/test_plan.py", "tools/test_fold.py",
    ],
    "tools/folding/example.py": ["tools/folding/test_verify.py", "tools/folding/test_capture.py"],
    "tools/folding/exported.py": ["tools/folding/test_ways.py", "tools/folding/test_capture.py"],
    "tools/folding/flow.py": [
        "tools/folding/test_plan.py", "tools/folding/test_capture.py",
        "tools/folding/test_ways.py", "tools/test_fold.py",
    ],
    "tools/folding/kinds.py": ["tools/folding/test_kinds.py", "tools/test_fold.py"],
    "tools/folding/plan.py": [
        "tools/folding/test_plan.py", "tools/folding/test_kinds.py",
        "tools/folding/test_capture.py", "tools/test_fold.py",
    ],
    "tools/folding/rewrite.py": [
        "tools/folding/test_ways.py", "tools/folding/test_plan.py", "tools/test_fold.py",
    ],
    "tools/folding/steps.py": ["tools/folding/test_plan.py", "tools/folding/test_verify.py"],
    "tools/feeding.py": [
        "tools/test_recalibrate_state.py", "tools/test_passes.py", "tools/test_compile.py",
        "tools/test_diagnose_restores.py", "tools/test_recalibrate_kinds.py",
    ],
    "tools/folding/verify.py": ["tools/folding/test_verify.py", "tools/folding/test_ways.py"],
    "tools/freeze.py": ["tools/test_freeze.py"],
    "tools/layers.py": ["tools/test_layers.py"],
    "tools/merge.py": ["tools/test_merge.py"],
    "tools/observe.py": ["tools/test_recalibrate_kinds.py"],
    "tools/passes.py": [
        "tools/test_passes.py", "tools/test_recalibrate.py", "tools/test_recalibrate_state.py",
        "tools/test_recalibrate_kinds.py", "tools/test_compile.py",
        "tools/test_recalibrate_processes.py",
    ],
    "tools/pause.py": ["tools/test_pause.py"],
    "tools/progress.py": ["tools/test_progress.py", "tools/test_recalibrate_state.py"],
    "tools/recalibrate.py": [
        "tools/test_recalibrate_state.py", "tools/test_recalibrate.py",
        "tools/test_recalibrate_kinds.py", "tools/test_recalibrate_processes.py",
    ],
    "tools/recalibration.py": [
        "tools/test_recalibrate.py", "tools/test_recalibrate_state.py",
        "tools/test_recalibrate_processes.py",
    ],
    "tools/together.py": TOGETHER,
    "layers/recurrent.py": ["layers/test_recurrent.py", "layers/test_recurrent_checks.py"],
    "layers/recurrent_checks.py": ["layers/test_recurrent_checks.py", "layers/test_recurrent.py"],
    "layers/steps.py": ["layers/test_steps.py", "layers/test_recurrent.py"],
    "layers/lstm_step.py": ["layers/test_lstm_step.py", "layers/test_recurrent.py"],
    "layers/batch_norm.py": [
        "layers/test_batch_norm.py", "test_validation.py", "test_outline.py", "layers/test_swap.py",
        "layers/test_persistence.py", "layers/test_layouts.py", "layers/test_compile.py",
    ],
}  # fmt: skip


def stripped(tree: ast.Module) -> str:
    """The tree without what does not run and without texts: what a deletion must change."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                statement for statement in body if not silent(statement)
            ]
    return ast.dump(Texts().visit(tree))


class Texts(ast.NodeTransformer):
    """Makes all texts for people the same; a name in quotes is not one."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Constant:
        return ast.Constant("a text")

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        text = isinstance(node.value, str) and " " in node.value
        return ast.Constant("a text") if text else node


def silent(statement: ast.AST) -> bool:
    """Whether a statement is for readers and type checkers only."""
    match statement:
        case ast.Expr(value=ast.Constant()) | ast.AnnAssign(value=None):
            return True
        case ast.FunctionDef(decorator_list=[ast.Name(id="overload")]):
            return True
    return False


def mutants(path: Path) -> list[tuple[int, str]]:
    """(line number, text without that line) of every deletion that matters."""
    lines = path.read_text().splitlines(keepends=True)
    tree = ast.parse("".join(lines))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {
        number for node in imports for number in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    original = stripped(tree)
    found = []
    for index, line in enumerate(lines):
        text = line.strip()
        if not text or text.startswith(SKIPPED) or "# mutant:" in text or index + 1 in imported:
            continue
        rest = "".join(lines[:index] + lines[index + 1 :])
        try:
            if stripped(ast.parse(rest)) != original:
                found.append((index + 1, rest))
        except SyntaxError:
            # Deleting the only statement of a block leaves no program; `pass` is the deletion.
            indent = line[: len(line) - len(line.lstrip())]
            rest = "".join([*lines[:index], f"{indent}pass\n", *lines[index + 1 :]])
            try:
                ast.parse(rest)
            except SyntaxError:
                continue
            found.append((index + 1, rest))
    return found


def survives(name: str, text: str) -> bool:
    """Whether the tests pass with this text in place of the file."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "batchnorm"
        shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / name).write_text(text)
        tests = [str(ROOT / "tests" / test) for test in TESTS[name]]
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": scratch, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode not in (0, 1, 2, 4):
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
    return done.returncode == 0


def main(names: list[str]) -> int:
    # pytest's status for a file that is not there is one of those that count as noticed.
    for test in {test for tests in TESTS.values() for test in tests}:
        (ROOT / "tests" / test).stat()
    jobs = [
        (name, number, text) for name in names or TESTS for number, text in mutants(SOURCE / name)
    ]
    print(f"{len(jobs)} lines to delete", flush=True)
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = pool.map(lambda job: survives(job[0], job[2]), jobs)
        alive = []
        for (name, number, _), lives in zip(jobs, results, strict=True):
            if lives:
                line = (SOURCE / name).read_text().splitlines()[number - 1]
                alive.append(f"{name}:{number}: {line.strip()}")
                print("survived", alive[-1], flush=True)
    print(f"{len(jobs) - len(alive)} of {len(jobs)} deletions noticed")
    return len(alive)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
