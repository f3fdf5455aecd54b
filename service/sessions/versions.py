"""What happens to a session whose model version is no longer served: refuse, start anew, or rebuild."""

from dataclasses import replace

import numpy as np

from ..engine.repository import Served
from ..records.record import Record


def replayable(record: Record, live: Served) -> bool:
    """Whether a session can be rebuilt: it has no state yet, or a log of one example that can be the model's inputs."""
    steps, rest = divmod(len(record.inputs), 4 * live.n_features)
    return not record.examples or (record.examples == 1 and not rest and 0 < steps <= record.step)


def migrated(record: Record, live: Served, policy: str) -> Record:
    """The session's record on the live version.

    The token stays, so that the next commit replaces the stored record and nobody else's.

    Args:
        policy: "reset" starts from the initial state; "replay" runs the kept inputs (the input log of the record)
            through the live version, which is exact where the log holds every input since the state was initial;
            the record must be replayable.
    """
    state = live.runtime.initial(record.examples)
    if policy == "replay" and record.examples:
        x = np.frombuffer(record.inputs, np.float32).reshape(1, -1, live.n_features)
        start = np.frombuffer(state, np.uint8).reshape(1, -1)
        state = live.runtime.run(np.ascontiguousarray(x), None, start)[1].tobytes()
    return replace(record, version=live.version, fingerprint=live.fingerprint, state=state)
