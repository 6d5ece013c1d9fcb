"""ik_llama.cpp as a peer, by its ``llama-batched-bench``; imports nothing of ours.

::

    python bench/peers/ik_llama.py run '{"program": "llama-batched-bench", "path": "m.gguf", ...}'

Each line ``batch STEPS SEQUENCES CONTEXT`` or ``prompt N`` of stdin is a run of that program with
the model repacked for its kernels, and its answer the seconds that the program printed: loading is
not counted. A sequence's context is computed before its steps are timed.
"""

import json
import subprocess
import sys


def run(program: str, path: str, threads: int, context: int) -> None:
    """Answers the lines of stdin until it ends."""
    print(json.dumps({"ready": program}), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "batch":
            steps, sequences, before = map(int, numbers)
            seconds = _measured(program, path, threads, context, before, steps, sequences)[1]
        elif what == "prompt":
            seconds = _measured(program, path, threads, context, int(numbers[0]), 1, 1)[0]
        else:
            seconds = 0.0  # "clear": each run begins anew
        print(json.dumps({"seconds": seconds}), flush=True)


def _measured(
    program: str, path: str, threads: int, context: int, prompt: int, steps: int, sequences: int
) -> tuple[float, float]:
    """Seconds of the prompts and of the steps."""
    command = [program, "-m", path, "-c", str(context), "-b", "2048", "-ub", "512", "-rtr"]
    command += ["-t", str(threads), "-tb", str(threads), "-npp", str(prompt), "-ntg", str(steps)]
    done = subprocess.run(
        [*command, "-npl", str(sequences)], capture_output=True, text=True, check=False
    )
    for line in (done.stdout + done.stderr).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 10 and cells[0] == str(prompt):  # PP TG B N_KV T_PP S_PP T_TG S_TG T S
            return float(cells[4]), float(cells[6])
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise SystemExit(f"{program} failed: {said[-1]}")


if __name__ == "__main__":
    {"run": run}[sys.argv[1]](**json.loads(sys.argv[2]))
