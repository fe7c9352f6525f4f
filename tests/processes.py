"""Real processes with torch.distributed among them: a test file that runs itself, once a rank."""

import os
import subprocess
import sys
import time
from pathlib import Path


def leave():
    """End this process here: torch's gloo (2.13) may abort it while the interpreter ends.

    Its threads drop their last references to tensors of the interpreter, which is not there then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(script, world, *arguments, timeout=120, torchrun=False):
    """Run `python script RANK WORLD *arguments` for each rank: (exit status, output) of each.

    With torchrun, which sets the environment itself: `python script *arguments`, and one pair for
    all. No process outlives the call.
    """
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # One thread each leaves the machine its cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    commands = [
        [sys.executable, str(script), str(rank), str(world), *map(str, arguments)]
        for rank in range(world)
    ]
    if torchrun:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        commands = [[sys.executable, *run, str(script), *map(str, arguments)]]
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    ends_at = time.monotonic() + timeout
    try:
        outputs = [p.communicate(timeout=ends_at - time.monotonic())[0] for p in processes]
        return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()
