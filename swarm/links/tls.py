"""TLS 1.3 without a socket: encrypted bytes in, plain bytes out, and the other way round.

The event loops' own TLS would do, but for three things: it leaves sockets in mid-handshake to themselves, takes half a
minute to give up on a peer that does not read, and closes with what was last said still on its way.
"""

from __future__ import annotations

import ssl

from swarm.errors import Malformed
from swarm.links.frames import Buffer


class TlsPipe:
    """One end of a TLS connection. What it has to send, `outgoing` returns; call it after everything else."""

    def __init__(self, context: ssl.SSLContext, server_side: bool) -> None:
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._in, self._out, server_side=server_side)
        self.secure = False  # whether the handshake is done
        self.ended = False  # whether the other side has said that it sends no more

    def handshake(self) -> bool:
        """Go as far as what was fed allows; True once it is done. Raises `Malformed` where the other side errs."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise Malformed(f"no TLS 1.3: {error.reason or error}") from None
        self.secure = True
        return True

    def certificate(self) -> bytes:
        """The other side's certificate (DER), empty where it has none."""
        return self._object.getpeercert(binary_form=True) or b""

    def feed(self, data: memoryview) -> None:
        """Take bytes that came from the other side."""
        self._in.write(data)

    def read_into(self, buffer: memoryview) -> int:
        """Decrypt one record, of 16 KB at most, into `buffer`.

        Returns:
            How many bytes, 0 where more must be fed first or the other side has `ended`. Raises `Malformed`.
        """
        if not self._in.pending and not self._object.pending():
            return 0  # it would say so too, by an exception, which takes ten times as long
        try:
            count: int = self._object.read(len(buffer), buffer)  # type: ignore[assignment]
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLError as error:
            raise Malformed(f"broken TLS: {error.reason or error}") from None
        self.ended = count == 0
        return count

    def fill(self, buffer: memoryview) -> int:
        """As `read_into`, record after record until `buffer` is full or nothing is left."""
        filled = 0
        while filled < len(buffer) and (count := self.read_into(buffer[filled:])):
            filled += count
        return filled

    def write(self, data: Buffer) -> None:
        """Encrypt `data`."""
        if len(data):  # OpenSSL takes an empty write for an error
            self._object.write(data)

    def shut(self) -> None:
        """Say that nothing more will be sent."""
        try:
            self._object.unwrap()
        except ssl.SSLError:
            return  # it waits for the other side's word, or there was no handshake: what is to be sent is in `outgoing`

    def outgoing(self) -> bytes:
        """What is to be sent now."""
        return self._out.read()
