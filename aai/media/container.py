"""The one door to media files: what may be opened, which streams count, and their packets until the time is up."""

from collections.abc import Iterator, Sequence
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition

from aai.media.limits import ClipError, Deadline, DecodeConfig, reason
from aai.media.ranged import Content, opened

FORMATS = "mov,mp4,m4a,matroska,webm,avi,mpegts,mpeg,flv,asf,wav,w64,aiff,au,caf,mp3,flac,ogg,aac,amr"
"""Containers that are opened. Playlists are not among them: those name other files."""
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
_COMMENTS = Disposition.comment | Disposition.descriptions | Disposition.hearing_impaired | Disposition.visual_impaired


def open_media(data: Content, max_bytes: int, max_streams: int, formats: str = FORMATS) -> InputContainer:
    """Opens a file's content; the caller closes it. Raises ClipError: EMPTY_FILE, TOO_LARGE or UNREADABLE."""
    if not len(data):
        raise ClipError("EMPTY_FILE", "file of 0 bytes")
    if len(data) > max_bytes:
        raise ClipError("TOO_LARGE", f"file of {len(data)} bytes is over the limit of {max_bytes}")
    options = {"format_whitelist": formats, "protocol_whitelist": "none"}
    try:
        # Tags are in whatever encoding their writer had, and nothing here reads them.
        container = av.open(opened(data), "r", options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise ClipError("UNREADABLE", f"not a media file that can be opened ({reason(error)})") from error
    if len(container.streams) > max_streams:
        container.close()
        raise ClipError("TOO_LARGE", f"{len(container.streams)} streams are over the limit of {max_streams}")
    return container


def find_video(container: InputContainer, cfg: DecodeConfig) -> Any | None:
    """The video with the largest pictures that can be decoded and is no cover, set up for decoding within the limits.

    Of equal ones the default, then the first. Raises ClipError: TOO_LARGE.
    """
    videos = [s for s in container.streams.video if s.codec_context and not s.disposition & _COVERS]
    if not videos:
        return None
    videos = [s for s in videos if _pixels(s) <= cfg.max_pixels] or videos
    stream = max(videos, key=lambda s: (_pixels(s), bool(s.disposition & Disposition.default)))
    context = stream.codec_context
    if _pixels(stream) > cfg.max_pixels:
        raise ClipError("TOO_LARGE", f"video of {context.width}x{context.height} px is over the limit")
    context.options = {"max_pixels": str(cfg.max_pixels)}  # also refuses frames that grow on the way
    context.thread_count = cfg.decode_threads
    context.thread_type = "AUTO" if cfg.decode_threads > 1 else "NONE"
    return stream


def _pixels(stream: Any) -> int:
    return int(stream.codec_context.width * stream.codec_context.height)


def find_audio(container: InputContainer) -> Any | None:
    """The default one of the sounds that can be decoded, else the first that is no commentary or description."""
    sounds = [s for s in container.streams.audio if s.codec_context and s.codec_context.sample_rate]
    order = [(bool(s.disposition & Disposition.default), not s.disposition & _COMMENTS) for s in sounds]
    return sounds[order.index(max(order))] if sounds else None


def shows_video(data: Content, cfg: DecodeConfig) -> bool:
    """Whether a file has video other than a cover, also of an unknown codec. Raises ClipError as `open_media`."""
    with open_media(data, cfg.max_bytes, cfg.max_streams) as container:
        return any(not s.disposition & _COVERS for s in container.streams.video)


def video_stream(container: InputContainer, cfg: DecodeConfig) -> Any:
    """As `find_video`. Raises ClipError: NO_VIDEO, UNSUPPORTED_VIDEO or TOO_LARGE."""
    stream = find_video(container, cfg)
    if stream is not None:
        return stream
    if any(not s.disposition & _COVERS for s in container.streams.video):
        raise ClipError("UNSUPPORTED_VIDEO", "there is video, of a codec that cannot be decoded here")
    raise ClipError("NO_VIDEO", "no video stream")


def audio_stream(container: InputContainer) -> Any:
    """As `find_audio`. Raises ClipError: NO_AUDIO or UNSUPPORTED_AUDIO."""
    stream = find_audio(container)
    if stream is not None:
        return stream
    if container.streams.audio:
        raise ClipError("UNSUPPORTED_AUDIO", "there is sound, of a codec that cannot be decoded here")
    raise ClipError("NO_AUDIO", "no audio stream")


def stream_start_s(stream: Any) -> float:
    """When a stream begins, in seconds on the file's own clock."""
    return float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0


def shared_origin_s(streams: Sequence[Any]) -> float:
    """The clip's time 0 on the file's own clock, in seconds: the earliest of the streams' starts."""
    return min(stream_start_s(stream) for stream in streams)


def packets(
    container: InputContainer, streams: Sequence[Any], clock: Deadline, to_the_break: bool = False
) -> Iterator[Any]:
    """Packets in file order, and one without content for each stream at the end.

    Ask `packet.stream.index` whose it is: the last one's `stream_index` is 0 whatever its stream.
    to_the_break: end quietly where reading breaks off. Raises ClipError: TIMEOUT, else UNREADABLE.
    """
    found = container.demux(*streams)
    while True:
        clock.check()
        try:
            packet = next(found)
        except StopIteration:
            return
        except IndexError:  # of a stream that shows up only now: the packets after it are still to come
            found = container.demux(*streams)
            continue
        except (av.FFmpegError, ValueError) as error:
            if to_the_break:
                return
            raise ClipError("UNREADABLE", f"reading broke off ({reason(error)})") from error
        yield packet
