"""Which share of a stream a session's entries go to, for who writes them and who reads them."""

from zlib import crc32


def share_of(session: str | bytes, shares: int) -> int:
    """The share of a session, 0 to `shares` - 1: CRC-32 (as of zip and PNG) of the id's bytes, modulo `shares`.

    With several shares the entries of session `s` go to the stream `<source>:<share_of(s, shares)>`.
    """
    return crc32(session.encode() if isinstance(session, str) else session) % shares
