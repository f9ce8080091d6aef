"""A peer imports hivemind's libp2p and not the whole of hivemind; the whole is there for whoever asks for it."""

import json
import subprocess
import sys

CHECK = """
import json, sys
import protocol.exchange.peer
lean = "hivemind.averaging" not in sys.modules and "scipy" not in sys.modules
import hivemind
from hivemind import DHT
print(json.dumps([lean, hivemind.DecentralizedAverager.__name__, DHT.__module__, hasattr(hivemind, "nothing")]))
"""


def test_peer_does_not_load_what_it_does_not_use() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [True, "DecentralizedAverager", "hivemind.dht.dht", False]
