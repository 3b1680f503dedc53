"""The smallest side of `perfbench ab`: a benchmark of your own.

This one pretends that a token takes sys.argv[1] ms.
"""

import json
import sys


def say(**event):
    print(json.dumps(event), flush=True)


def repetition():
    """Put your own here: one request, or one batch, and when its tokens came."""
    ms = float(sys.argv[1])
    speed = {"decode_tokens_per_s": 1e3 / ms, "tokens_per_s": 1e3 / ms}
    return {"total_ms": 2 * ms, "ttft_ms": ms, "itl_ms": [ms], **speed}


job = json.loads(sys.stdin.readline())
if job["prepare"]:  # once on each side, before anything is timed
    exact = {"aten_ops_per_decode_step": 3}
    say(event="case", case="chat", status="ok", check={"passed": True}, exact=exact)
say(event="ready", cases=["chat"], requests=1)
for line in sys.stdin:
    turn = json.loads(line)
    say(event="block", samples=[repetition() for _ in range(turn["repetitions"])])
