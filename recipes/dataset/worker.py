"""Run a pickled datatrove executor in a process of its own: `python -m downcycle.recipes.dataset.worker FILE`.

Answers on stdout with one JSON object; everything that libraries print goes to stderr. Ends, with all it started, when its stdin closes:
that is when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ...surgery.errors import DowncycleError
from ...surgery.staging import what_failed


def main() -> None:
    """Run the executor of the file named on the command line; say how it went and what job it became."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer.write(json.dumps(_run(Path(sys.argv[1]))))
    answer.close()


def _run(path: Path) -> dict[str, Any]:
    import dill

    try:
        executor = dill.loads(path.read_bytes())
        executor.run()
    except DowncycleError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": what_failed(error)}
    except subprocess.CalledProcessError as error:  # sbatch, which has said why on stderr
        sys.exit(error.returncode)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"job": str(getattr(executor, "job_id", None) or "")}


def _end_with_parent() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
