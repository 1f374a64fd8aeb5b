"""The user's token goes to the Hub's own address and nowhere else: not to storage, into no byte, line, log or exception."""

import json
import logging
import re
import subprocess
import sys
import traceback

import pytest
from huggingface_hub.utils import get_session

from downcycle import DowncycleError
from downcycle.eval.publish.files import plan_push
from downcycle.eval.publish.push import push

from upload_server import SIGNATURE

REPO = "ann/small"


@pytest.fixture
def loud(caplog):
    """Every logger that there is says all that it has to say."""
    get_session()
    for name in ("", "huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "httpcore.http11", "huggingface_hub.utils._http"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def spread(error):
    """All that an exception and those behind it say."""
    said = []
    while error is not None:
        said += [repr(error), *map(str, error.args), *traceback.format_exception(error)]
        error = error.__cause__ or error.__context__
    return " ".join(said)


def test_a_push_that_succeeds_after_faults(hub, model, loud, capfd, token):
    hub.fail("*commit*", times=1, status=503)
    hub.fail("/store/*", times=1, status=500)
    done = push(plan_push(model, REPO))
    out, err = capfd.readouterr()
    for text in (out, err, loud.text, repr(done)):
        assert token not in text and SIGNATURE not in text
    assert err == ""
    logging.getLogger("huggingface_hub").debug("heard again")
    assert "heard again" in loud.text
    assert all(token.encode() not in request.body for request in hub.requests)
    assert token.encode() not in b"".join(hub.objects.values()) + b"".join(hub.content(REPO).values())
    for request in hub.requests:
        sent = {name: value for name, value in request.headers.items() if token in value}
        assert sent == ({"authorization": f"Bearer {token}"} if request.server == "hub" else {})
    assert hub.asked(server="cdn")


ECHOES = [(status, route) for status in (400, 403, 409, 500) for route in ("/api/*", "*/batch", "/store/*")]


@pytest.mark.parametrize(("status", "route"), ECHOES)
def test_a_server_that_quotes_the_token(hub, model, loud, capfd, token, status, route):
    echo = json.dumps({"error": f"no, {token}", "errors": [{"message": f"{token} at http://x/y?Signature={SIGNATURE}"}]}).encode()
    headers = {"X-Error-Message": f"you are {token}", "X-Request-Id": token, "X-HF-Warning": f"a; {token}"}
    hub.fail(route, status=status, body=echo, headers=headers | {"Retry-After": "1"})
    with pytest.raises(DowncycleError) as refused:
        push(plan_push(model, REPO))
    for text in (*capfd.readouterr(), loud.text, spread(refused.value)):
        assert token not in text and SIGNATURE not in text
    assert re.fullmatch(r"[^\n]+", str(refused.value))


def test_a_card_whose_fault_quotes_the_token(hub, model, loud, token):
    hub.card_fault = f"license {token} is none"
    with pytest.raises(DowncycleError) as refused:
        push(plan_push(model, REPO))
    assert "license … is none" in str(refused.value) and token not in spread(refused.value) + loud.text


def test_the_plan_does_not_know_it(model, token):
    assert token not in repr(plan_push(model, REPO))


def test_the_saved_token_serves_too(hub, model, monkeypatch, tmp_path, token, files_of):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "saved").write_text(f"{token}\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "saved"))
    push(plan_push(model, REPO))
    assert hub.content(REPO) == files_of(model)


def test_in_a_process_of_its_own(hub, model, tmp_path, token, files_of):
    """Set by the environment only, with huggingface_hub as loud as it can be."""
    program = (
        "import sys, logging; logging.basicConfig(level=0)\n"
        "from downcycle.eval.publish.files import plan_push\nfrom downcycle.eval.publish.push import push\n"
        "print(push(plan_push(sys.argv[1], sys.argv[2])).files)"
    )
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    hub.fail("*commit*", times=1, status=500)
    ran = subprocess.run([sys.executable, "-c", program, model, REPO], env=settings, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == f"{len(files_of(model))}\n", ran.stderr
    assert token not in ran.stderr and SIGNATURE not in ran.stderr
    assert hub.content(REPO) == files_of(model)
