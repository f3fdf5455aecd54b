"""What happens to a session whose model version is no longer served: refuse, start anew, or rebuild."""

from dataclasses import replace

import numpy as np

from .record import Record
from .repository import Served


def migrated(record: Record, live: Served, policy: str) -> Record:
    """The session's record on the live version.

    The token stays, so that the next commit replaces the stored record and nobody else's.

    Args:
        policy: "reset" starts from the initial state; "replay" runs the kept inputs (the input log of the record)
            through the live version, which is exact where the log holds every input since the state was initial.
    """
    state = live.runtime.initial(record.examples)
    if policy == "replay" and record.inputs and record.examples == 1:
        x = np.frombuffer(record.inputs, np.float32).reshape(1, -1, live.manifest.n_features)
        start = np.frombuffer(state, np.uint8).reshape(1, -1)
        state = live.runtime.run(np.ascontiguousarray(x), None, start)[1].tobytes()
    return replace(record, version=live.version, fingerprint=live.fingerprint, state=state)
