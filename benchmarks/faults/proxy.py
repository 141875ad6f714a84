"""A TCP proxy on loopback: `python -m benchmarks.faults.proxy LISTEN TARGET`.

A process of its own, so that SIGSTOP is a network that swallows every packet and SIGCONT one that is back.
"""

import asyncio
import contextlib
import sys
from functools import partial

CHUNK = 64 * 1024


async def serve(listen: int, target: int) -> None:
    """Forwards connections to `target` until it is ended."""
    server = await asyncio.start_server(partial(_connected, target), "127.0.0.1", listen)
    async with server:
        await server.serve_forever()


async def _connected(target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
