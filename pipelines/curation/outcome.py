"""What becomes of the clips, as the two tables will have it: the driver knows it and need not read it back."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aai.schema import NO_PICTURE, STILL_PICTURE, VIDEO_PICTURES
from pipelines.curation.card_data import NUMBERS, Gathered, Rows, table_files
from pipelines.curation.layout import ACCEPTED, REJECTED, shard_file
from pipelines.curation.table_slices import TableSlices
from pipelines.curation.verdicts import WHY, JudgedClip, JudgeShard, final

_LABELS = pa.list_(pa.string())


class JudgedTables:
    """The small columns of accepted/ and rejected/, gathered while the shards are judged."""

    def __init__(self, out: str, measured: TableSlices, flag_only: bool, own: Sequence[str] = ()) -> None:
        """own: signals beside NUMBERS."""
        self.out, self.measured, self.flag_only = out, measured, flag_only
        self._numbers = [*NUMBERS, *own]
        self._gathered = Gathered(self._numbers)
        self._names: list[str] = []
        self._rejected = TableSlices()
        self._codes: Counter[str] = Counter()
        self._flags: Counter[str] = Counter()
        self._pictures: Counter[str] = Counter()

    def watch(self, shards: Iterable[JudgeShard]) -> Iterator[JudgeShard]:
        """Hands the shards on, takes note of them, and lets go of what was measured of them."""
        for shard in shards:
            self._names.append(shard.name)
            self._add(self.measured[shard.name], {clip.key: clip for clip in shard.clips})
            self.measured.drop_before(shard.name)
            yield shard

    def _add(self, table: pa.Table, clips: Mapping[str, JudgedClip]) -> None:
        table = table.select(["key", "clip_id", *self._numbers, *WHY])
        whys = [dict(zip(WHY, values, strict=True)) for values in zip(*_lists(table, WHY), strict=True)]
        judged = [clips[key] for key in table["key"].to_pylist()]
        ends = [final(why, clip.reasons, self.flag_only) for why, clip in zip(whys, judged, strict=True)]
        described = table.drop_columns(["key", *WHY])
        described = described.append_column("labels", pa.array([list(clip.row.labels) for clip in judged], _LABELS))
        described = described.append_column("split", pa.array([clip.row.split for clip in judged], pa.string()))
        is_taken = pa.array([end["code"] is None for end in ends], pa.bool_())
        flags = [end["flags"] for end in ends if end["code"] is None]
        taken = described.filter(is_taken).append_column("flags", pa.array(flags, _LABELS))
        left_out = described.filter(pc.invert(is_taken))
        for name in WHY:
            kind = pa.bool_() if name == "transient" else pa.string()
            values = [end[name] for end in ends if end["code"] is not None]
            left_out = left_out.append_column(name, pa.array(values, kind))
        self._codes.update(left_out["code"].to_pylist())
        for clip, end in zip(judged, ends, strict=True):
            self._pictures[clip.picture or VIDEO_PICTURES] += end["code"] is None
        self._flags.update(flag for clip_flags in flags for flag in clip_flags)
        self._gathered.add(taken)
        self._rejected.add(self._names[-1], left_out)

    def rows(self) -> Rows:
        """All of it, as the data card takes it; once the tables are written."""
        for name, table in self._rejected.items():
            self._gathered.add(table)
            self._rejected.drop_before(name)
        sizes: dict[str, int] = {}
        for folder, there in zip((ACCEPTED, REJECTED), table_files(self.out), strict=True):
            files = [shard_file(self.out, folder, name) for name in self._names]
            sizes |= {file: there[file] for file in files}
        return self._gathered.rows(sizes)

    def codes(self) -> dict[str, int]:
        """Rejected rows by code, commonest first."""
        return _counts(self._codes)

    def pictures(self) -> dict[str, int]:
        """Accepted rows by what they show."""
        return {kind: self._pictures[kind] for kind in (VIDEO_PICTURES, STILL_PICTURE, NO_PICTURE)}

    def flags(self) -> dict[str, int]:
        """Accepted rows by flag, commonest first."""
        return _counts(self._flags)


def _lists(table: pa.Table, names: Sequence[str]) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


def _counts(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
