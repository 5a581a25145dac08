"""Recording sessions, known or inferred, and splits that respect them."""

from spkid.sessions.fingerprints import fingerprint, pack_fingerprints
from spkid.sessions.hold_out import fold_numbers, hold_out, hold_out_known
from spkid.sessions.infer import Sessions, infer_sessions, known_sessions
from spkid.sessions.split import (
    SOURCES,
    SPLIT_KEYS,
    SPLITS,
    divide,
    find_sessions,
    sessions_digest,
    write_manifests,
    written_sessions,
)

__all__ = [
    "SOURCES",
    "SPLITS",
    "SPLIT_KEYS",
    "Sessions",
    "divide",
    "find_sessions",
    "fingerprint",
    "fold_numbers",
    "hold_out",
    "hold_out_known",
    "infer_sessions",
    "known_sessions",
    "pack_fingerprints",
    "sessions_digest",
    "write_manifests",
    "written_sessions",
]
