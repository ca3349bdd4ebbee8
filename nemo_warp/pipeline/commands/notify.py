"""Tell somebody that a run has ended, failed or stopped: the recipe's ``notify``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import urllib.request

from nemo_warp import exit_codes
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.records import write_text_atomically

_TIMEOUT_S = 20
_EVENTS = {
    exit_codes.DONE: "done",
    exit_codes.FAILED: "failed",
    exit_codes.STOPPED_RESUMABLE: "stopped",
}


def notify(recipe: Recipe, code: int) -> None:
    """Send one JSON object, ``{"event", "name", "run_directory"}``, once per event.

    A URL gets it as a POST, a command on its standard input. If sending fails, the
    driver prints it and goes on.

    Args:
        recipe: of the run.
        code: what the driver ended with.
    """
    whom, event = recipe.values["notify"], _EVENTS.get(code, "")
    told = recipe.paths.notified
    if whom is None or (told.read_text() if told.exists() else "") == event:
        return
    # Before sending: a command that fails, or kills this driver, is not tried again every ten
    # minutes by cron.
    write_text_atomically(told, event)
    # Still running: the last event was cleared above, so that the next end is sent again.
    if not event:
        return
    root = str(recipe.paths.root)
    text = json.dumps({"event": event, "name": recipe.name, "run_directory": root})
    try:
        _send(whom, text.encode())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"warning: notify: {whom}: {error}", file=sys.stderr)


def _send(whom: str, message: bytes) -> None:
    if whom.startswith(("http://", "https://")):
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(whom, message, kind)
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        return
    subprocess.run(
        shlex.split(whom), input=message, timeout=_TIMEOUT_S, check=True, stdout=subprocess.DEVNULL
    )
