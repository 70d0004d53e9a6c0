"""A proxy in front of an S3 server that counts requests, and may make each of them wait."""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest
import s3fs

_METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


@contextmanager
def counted(patch: pytest.MonkeyPatch, delay_s: float = 0) -> Iterator[Counter[str]]:
    """While the body runs, S3 is reached by way of the proxy. Yields the requests by method.

    delay_s: what every request waits, as if the server were that far away.
    """
    target, counts = urlsplit(os.environ["AWS_ENDPOINT_URL"]), Counter[str]()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_request: bool) -> None:
        try:
            while data := await reader.read(2**18):
                if is_request and data.startswith(_METHODS):  # a client sends the next one after the answer
                    counts[data.split(b" ", 1)[0].decode()] += 1
                    await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(target.hostname, target.port)
        with suppress(asyncio.CancelledError):  # of `_end`; asyncio would log it
            await asyncio.gather(pump(reader, up_writer, True), pump(up_reader, writer, False))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = server.sockets[0].getsockname()[1]
    with patch.context() as inner:
        inner.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield counts
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            asyncio.run_coroutine_threadsafe(_end(server), loop).result(timeout=5)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=5)
            loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    pumps = asyncio.all_tasks() - {asyncio.current_task()}
    for pump in pumps:
        pump.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)
