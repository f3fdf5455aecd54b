"""The body of a request that goes through FastAPI: read, unpacked, and never more of it than the limit."""

import zlib
from typing import Final

from starlette.requests import ClientDisconnect, Request

from stepcast.errors import Malformed, TooLarge, UnsupportedMediaType

from ..intake import Share
from ..large import aside

ENCODINGS: Final = ("gzip", "x-gzip", "deflate")
_ZLIB: Final = zlib.MAX_WBITS
_GZIP: Final = zlib.MAX_WBITS | 16
_BARE: Final = -zlib.MAX_WBITS


async def read(request: Request, limit: int, share: Share) -> bytes:
    """A request's whole body, unpacked.

    Raises:
        TooLarge: it has more than `limit` bytes, packed or unpacked. UnsupportedMediaType: an unknown encoding.
        IntakeFull: `share` cannot hold it.
        Malformed: it is not packed as it says, or the connection was lost.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", *ENCODINGS):
        known = ", ".join(ENCODINGS)
        raise UnsupportedMediaType(f"content encoding {encoding[:64]!r} is none of {known}", encodings=[*ENCODINGS])
    promised = request.headers.get("content-length", "")
    if promised.isdecimal() and int(promised[:20]) > limit:
        raise _too_large(limit)
    size, parts = 0, []
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            share.hold(size)
            parts.append(part)
    except ClientDisconnect as error:
        raise Malformed("the connection was lost in the body") from error
    packed = b"".join(parts)
    if not packed or encoding not in ENCODINGS:
        return packed
    whole = await aside(size, _unpack, packed, encoding, limit)
    share.hold(len(whole))
    return whole


def _unpack(packed: bytes, encoding: str, limit: int) -> bytes:
    """What was packed, if that is at most `limit` bytes."""
    # HTTP's deflate is zlib's format, but many clients send the bare one.
    wrapped = packed[0] & 15 == 8 and int.from_bytes(packed[:2]) % 31 == 0
    decoder = zlib.decompressobj(_GZIP if encoding != "deflate" else _ZLIB if wrapped else _BARE)
    try:
        whole = decoder.decompress(packed, limit + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not packed as content-encoding says: {error}") from error
    if len(whole) > limit:
        raise _too_large(limit)
    if not decoder.eof or decoder.unused_data:
        raise Malformed("the packed body ends too early" if not decoder.eof else "there is more behind the packed body")
    return whole


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes. Send less at once.", limit=limit)
