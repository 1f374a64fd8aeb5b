"""Ctrl-C ends a push at once, in a process of its own: nothing more is sent, nothing is committed, and the next push goes on from there."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from downcycle.eval.publish.files import plan_push
from downcycle.eval.publish.push import push

REPO = "ann/small"
SIZE = 24 << 20  # more than the buffers of a connection hold
HANG = 60  # seconds, for a test that fails
COMMAND = "from downcycle.cli import main; main()"
LIBRARY = """
import sys
from downcycle.eval.publish.files import plan_push
from downcycle.eval.publish.push import push
try:
    push(plan_push(sys.argv[2], sys.argv[3]))
except KeyboardInterrupt as stopped:
    sys.stderr.write(f"{stopped}\\n")
    sys.exit(130)
"""


@pytest.fixture
def folder(parent):
    """A model with a file that is large."""
    (parent / "notes.dat").write_bytes(b"\0" + bytes(range(256)) * (SIZE // 256))
    return parent


@pytest.fixture
def held(hub):
    """Storage that takes what is sent only when this is set."""
    hold = threading.Event()
    yield hold
    hold.set()


def start(hub, folder, program, tmp_path, token):
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program, "push", str(folder), REPO]
    return subprocess.Popen(command, env=settings, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(ran, is_time):
    """Send Ctrl-C when the time has come, and return what the process said until its end."""
    end = time.monotonic() + HANG
    while not is_time() and ran.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    ran.send_signal(signal.SIGINT)
    try:
        return ran.communicate(timeout=HANG)
    finally:
        ran.kill()


@pytest.mark.parametrize("program", [COMMAND, LIBRARY], ids=["command", "library"])
@pytest.mark.parametrize("route", ["/store/*", "*/batch", f"/api/models/{REPO}/commit/*", f"/api/models/{REPO}"])
def test_a_server_that_does_not_answer(hub, held, folder, tmp_path, token, files_of, program, route):
    hub.fail(route, hold=held)
    ran = start(hub, folder, program, tmp_path, token)
    out, err = interrupt(ran, lambda: hub.asked(route))
    assert ran.returncode == 130, err
    assert out == "" and err.splitlines()[-1].endswith("interrupted; what has arrived stays there, and the same command goes on from there")
    assert "Traceback" not in err and token not in err
    asked = len(hub.requests)
    assert REPO not in hub.pushed or hub.content(REPO) == {}
    held.set()
    assert len(hub.requests) == asked
    hub.faults.clear()
    push(plan_push(folder, REPO))
    assert hub.content(REPO) == files_of(folder)


def test_a_push_that_waits_to_try_again(hub, folder, tmp_path, token):
    hub.fail("/store/*", status=500)
    ran = start(hub, folder, COMMAND, tmp_path, token)
    out, err = interrupt(ran, lambda: len(hub.asked("/store/*")) > 3)
    assert ran.returncode == 130 and "interrupted; what has arrived stays there" in err.splitlines()[-1]
    assert hub.content(REPO) == {}


def test_what_is_being_sent_is_cut_off(hub, held, folder, monkeypatch):
    """In this process, whose threads live on: the connection ends before the file does, and nothing follows."""
    hub.fail("/store/*", hold=held)
    before = set(threading.enumerate())
    threading.Thread(target=stop_when, args=(lambda: hub.asked("/store/*"),), daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="interrupted; what has arrived stays there"):
        push(plan_push(folder, REPO))
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("ThreadPool")]
    asked = len(hub.requests)
    held.set()
    assert len(hub.requests) == asked and not [path for path in hub.objects if path in str(hub.pushed)]
    assert all(len(request.body) < SIZE for request in hub.asked("/store/*")) and hub.content(REPO) == {}


def stop_when(is_time):
    while not is_time():
        time.sleep(0.02)
    time.sleep(0.2)
    signal.raise_signal(signal.SIGINT)
