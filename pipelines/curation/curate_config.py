"""Settings of `aai curate`: the manifest, how long videos are cut, the models that look, and when to stop."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pydantic

from aai import storage
from aai.config import Config
from aai.digest import stored_digest
from aai.foundation.identity import FoundationSpec, identity, pinned_by
from aai.foundation.sizes import picture_sizes
from aai.media.duplicates import DuplicateConfig
from aai.media.edited import EditedConfig
from aai.media.filters import FilterConfig
from aai.media.limits import DecodeConfig
from aai.schema import VERSION
from pipelines.curation.croissant import AboutConfig
from pipelines.curation.layout import ACCEPTED, REJECTED
from pipelines.curation.own_signals import SignalConfig, SignalName, check_signals
from pipelines.manifests.listed import read_list
from pipelines.manifests.packed import PackedRows
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.sources import place_of, source_of
from pipelines.manifests.table import manifest_rows, named_splits, val_or_train
from pipelines.settings import Choice, DType, Plan, RayVerbConfig, RunsConfig

Split = Literal["train", "val", "test"]

SPEED = {"decode_threads", "timeout_s", "max_memory_mb", "recycle_after"}
"""Decode settings that decide how clips are decoded, not what stands in the tables."""

MAX_BYTES_BEFORE = 512 * 2**20
"""The default of decode.max_bytes when long files were held in memory. Folders of then go on; what they refused as
TOO_LARGE, --retry measures."""


TAGS = {
    "speech": (
        "Speech", "Male speech, man speaking", "Female speech, woman speaking", "Child speech, kid speaking",
        "Conversation", "Narration, monologue",
    ),
    "music": ("Music", "Musical instrument", "Background music", "Song", "Singing"),
}  # fmt: skip
"""Names of AudioSet (Gemmeke et al., ICASSP 2017)."""


class CutConfig(Config):
    """How long videos become clips. Rows that have a start_s or end_s are clips already and stay as they are."""

    mode: Literal["none", "windows", "shots"] = "none"
    """none: a file is a clip; windows: clips of a fixed length; shots: a clip for each shot (needs `aai[shots]`)."""
    window_s: float = pydantic.Field(10.0, gt=0)
    """Length of a window."""
    stride_s: float | None = pydantic.Field(None, ge=0.1)
    """From one window's start to the next; empty = window_s, so that windows neither overlap nor leave gaps."""
    min_s: float = pydantic.Field(2.0, ge=0)
    """Shorter shots, and shorter rests at the end of a file, are left out."""
    max_s: float = pydantic.Field(30.0, gt=0)
    """Longer shots are divided into equal parts of at most this length."""
    shot_threshold: float = pydantic.Field(3.0, gt=1)
    """How many times stronger than its neighbours' a change of picture must be to end a shot."""
    max_file_s: float = pydantic.Field(6 * 3600, gt=0)
    """Longest file that is cut; a longer one stays a clip of its own (which decoding then refuses)."""
    timeout_s: float = pydantic.Field(900, gt=0)
    """Wall-clock limit for looking through one file."""

    @pydantic.model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_s > min(self.window_s, self.max_s):
            raise ValueError("min_s is longer than window_s or max_s: no clip would be left")
        return self


class FittedDecodeConfig(DecodeConfig):
    """Decoding with pictures as large as the foundation wants them."""

    frame_size_px: Annotated[int, pydantic.Field(ge=16)] | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Shorter side of the kept frames; a smaller source keeps its own size. auto: the larger one of the sizes that
    the CLIP and the diffusion model of `foundation` take."""


class FittedFilterConfig(FilterConfig):
    """Filters that drop what the foundation's CLIP could only see enlarged."""

    min_size_px: Annotated[int, pydantic.Field(ge=1)] | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Smallest width and height (TOO_SMALL). auto: what the CLIP of `foundation` takes, or 48 where
    decode.frame_size_px is a number."""


class ScoreConfig(Config):
    """Models that look at the clips; none by default."""

    caption: bool = False
    """Compare captions and pictures by the CLIP of `foundation` (signal caption_similarity)."""
    foundation: FoundationSpec = FoundationSpec()
    bundle: str | None = None
    """Aligned bundle (of `aai align`) that compares each clip's sound with its pictures (signal av_similarity)."""
    false_accept_rate: float = pydantic.Field(0.05, gt=0, lt=1)
    """Clips are WRONG_AUDIO below the similarity that this share of shuffled pairs of sound and pictures reaches."""
    tagger: str | None = None
    """Classifier of sounds: a folder or hub id of transformers' audio classification, such as AST of AudioSet. What it
    hears becomes signals: NAME_share for each of `tags`, and other_share."""
    tagger_revision: str | None = None
    """Commit of the hub id; required for one."""
    tags: dict[SignalName, tuple[str, ...]] = pydantic.Field(default_factory=lambda: dict(TAGS))
    """Tags of the classifier that count together, by name; a clip's shares are of its time."""
    tag_window_s: float = pydantic.Field(2.0, gt=0)
    """Length of the parts that a sound is tagged in."""
    prompts: dict[SignalName, tuple[str, ...]] = pydantic.Field(default_factory=dict)
    """Signals by the CLIP of `foundation`, 0..1: how likely the pictures show the first of these texts and none of the
    others, as in {watermark: [a picture with a watermark, a picture]}."""
    dtype: DType = "float32"
    """Arithmetic of the CLIP and the tagger."""
    batch_size: int = pydantic.Field(64, ge=1)
    """Pictures, or parts of sounds, per forward pass."""

    @pydantic.model_validator(mode="after")
    def _can_tell(self) -> Self:
        for name, texts in self.prompts.items():
            if len(texts) < 2:
                raise ValueError(f"prompts.{name} has {len(texts)} texts: give the one that is meant, then others")
        if "other" in self.tags:
            raise ValueError("tags.other: other is what no tag names; give another name")
        if len(set(self.names)) < len(self.names):
            raise ValueError("tags and prompts give one signal two meanings: give another name")
        return self

    @property
    def enabled(self) -> bool:
        """Whether any model is to look."""
        return self.caption or self.bundle is not None or bool(self.names)

    @property
    def names(self) -> list[str]:
        """The signals that the tagger and the prompts tell."""
        shares = [f"{name}_share" for name in (*self.tags, "other")] if self.tagger else []
        return [*shares, *self.prompts]

    def content_digest(self) -> str:
        """Of everything that determines the scores, the weights themselves among it."""
        models: dict[str, object] = {"dtype": self.dtype}
        if self.caption:
            models["foundation"] = identity(self.foundation)
        if self.tagger is not None:
            pinned = pinned_by(self.tagger, self.tagger_revision, "tagger", "scores")
            models["tagger"] = [pinned, self.tags, self.tag_window_s]
        if self.prompts:
            models |= {"foundation": identity(self.foundation), "prompts": self.prompts}
        if self.bundle is not None:
            from aai.bundle import read_bundle  # only here: torch takes seconds to import

            models["bundle"] = read_bundle(self.bundle).sha
        return stored_digest([models, self.caption], sort_keys=True)


class CurateConfig(RayVerbConfig):
    """Settings of `aai curate`."""

    manifest: str
    """CSV or Parquet (uri, start_s, end_s, caption, labels, split), a WebDataset tar, or a folder of media and tars."""
    media_root: str | None = None
    """Folder of the videos when the manifest is the CSV of VGGSound or of AudioSet."""
    label_names: str | None = None
    """AudioSet's class_labels_indices.csv, which gives its labels words."""
    manifest_columns: tuple[str, ...] | None = None
    """Further columns of the manifest that become columns of the tables, such as license; empty = all that hold numbers
    or text, [] = none."""
    out: str
    """Folder or s3:// prefix of the tables."""
    foundation: FoundationSpec = FoundationSpec()
    """The models that the tables are for: they decide how large the pictures are kept."""
    default_split: Split = "train"
    """Split of rows that name none."""
    split_names: dict[str, Split] = pydantic.Field(default_factory=dict)
    """What the manifest's splits are called here, where not train, val and test: {validation: val, eval: test}."""
    val_share: float = pydantic.Field(0, ge=0, lt=1)
    """Share of train's files, chosen by a hash of their URIs, that become the split val: for data that has none."""
    split_by: Literal["clip", "source"] = "clip"
    """What stays in one split. source: the video that clips came from: `val_share` draws videos, and a clip whose video
    is in a split held out before its own (test, then val) is rejected (CROSS_SPLIT_SOURCE)."""
    source_pattern: str | None = None
    """Regular expression with one group: in a file's name, the video that it was cut from, such as
    ([\\w-]{11})_\\d+ for ID_START.mp4. Empty, or not found: the file itself is the video."""
    cut: CutConfig = CutConfig()
    rows_per_shard: int = pydantic.Field(128, ge=1)
    """Rows of one unit of work, and of one Parquet file."""
    film_cache_gb: float = pydantic.Field(16, ge=0)
    """Disk of each node, in its folder for temporary files, for what was read of files under s3:// of more than 128 MB,
    until all clips are measured: their bytes are fetched once, not for each shard. 0 = none. A tenth of the disk stays
    free in any case."""
    decode: FittedDecodeConfig = FittedDecodeConfig()
    filters: FittedFilterConfig = FittedFilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    scores: ScoreConfig = ScoreConfig()
    signals: dict[SignalName, SignalConfig] = pydantic.Field(default_factory=dict)
    """Signals of your own by name, with their thresholds: {aesthetic: {table: scores.parquet, min: 4.5}}."""
    about: AboutConfig = AboutConfig()
    """What croissant.json says of the data beyond what was counted."""
    exclude: str | None = None
    """Text file of clips that are left out (EXCLUDED), and all that look and sound like them: a clip id, content hash
    or URI a line, such as `aai takedown` writes. It is read anew in each run."""
    flag_only: bool = False
    """Keep clips that filters speak against, and put the codes into the column `flags`."""
    max_reject_ratio: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of rejected rows above which the job stops, keeping what is done: the data or the settings are wrong."""
    retry: tuple[str, ...] = ()
    """Codes of undecodable rows to measure again in this run; TRANSIENT = all that may pass next time."""
    rejudge: bool = False
    """Judge what is measured already by other filters than it was judged by."""
    tracking: RunsConfig | None = None
    """MLflow store that the data card is logged to, as a run `curate`; empty = nowhere."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_foundation(cls, data: Any) -> Any:
        """Scores are of the same foundation unless they name another."""
        scores = data.get("scores", {}) if isinstance(data, dict) else None
        if isinstance(scores, dict) and "foundation" in data:
            data = {**data, "scores": {"foundation": data["foundation"], **scores}}
        return data

    @pydantic.field_validator("source_pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        try:
            groups = re.compile(value).groups if value is not None else 1
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from error
        if groups != 1:
            raise ValueError(f"has {groups} groups; put parentheses around what names the video, and only there")
        return value

    @pydantic.field_validator("retry", mode="before")
    @classmethod
    def _split_codes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        codes = [code.strip() for code in value.split(",")]
        return [code for code in codes if code]

    @pydantic.model_validator(mode="after")
    def _scored(self) -> Self:
        if self.filters.min_caption_similarity is not None and not self.scores.caption:
            raise ValueError("filters.min_caption_similarity needs scores.caption=true")
        return self

    @property
    def kept_bytes(self) -> int:
        """`film_cache_gb` in bytes."""
        return int(self.film_cache_gb * 10**9)

    def plan(self) -> Plan:
        """Counts the manifest's rows; decodes nothing."""
        rows, carved = self.listed()
        check_signals(self.signals, rows, self.scores.names)
        shards = -(-len(rows) // self.rows_per_shard)
        chosen = self.fitted()[1] | carved
        return Plan(
            inputs={"manifest": f"{self.manifest} ({len(rows)} rows, {shards} shards)"},
            outputs={name: storage.join(self.out, name) for name in (ACCEPTED, REJECTED)},
            resources=self.resources(),
            chosen={name: str(choice) for name, choice in chosen.items()},
        )

    def fitted(self) -> tuple[Self, dict[str, Choice]]:
        """These settings with a number for each `auto`, and what was chosen and why.

        The foundation is looked at only where the size of the frames is `auto`. Raises UserError when it does not tell.
        """
        frame_px, min_px = self.decode.frame_size_px, self.filters.min_size_px
        frame_why = min_why = "given"
        sizes = None
        if frame_px == "auto":
            sizes = picture_sizes(self.foundation)
            frame_px, frame_why = sizes.largest_px, f"auto: {sizes}"
        if min_px == "auto":
            min_px, min_why = FilterConfig().min_size_px, "auto: decode.frame_size_px is given"
            if sizes:
                min_px, min_why = sizes.clip_px, f"auto: foundation.clip takes {sizes.clip_px} px"
        decode = self.decode.model_copy(update={"frame_size_px": frame_px})
        filters = self.filters.model_copy(update={"min_size_px": min_px})
        chosen = {
            "decode.frame_size_px": Choice(value=frame_px, why=frame_why),
            "filters.min_size_px": Choice(value=min_px, why=min_why),
        }
        return self.model_copy(update={"decode": decode, "filters": filters}), chosen

    def rows(self) -> Sequence[ManifestRow]:
        """The manifest's rows with their splits by our names and with `val_share`, before any cutting."""
        return self.listed()[0]

    def listed(self) -> tuple[PackedRows, dict[str, Choice]]:
        """See `rows`; besides, where `val_share` is set, how many rows it moved."""
        further = self.manifest_columns
        given = manifest_rows(self.manifest, self.media_root, self.default_split, self.label_names, further)
        rows = PackedRows(named_splits(self.manifest, given, self.split_names))
        if not self.val_share:
            return rows, {}
        train = _rows_of_train(rows)
        name_of = self.source_of if self.split_by == "source" else place_of
        rows = PackedRows(val_or_train(row, self.val_share, name_of) for row in rows)
        moved = train - _rows_of_train(rows)
        why = f"{moved:,} of train's {train:,} rows become the split val, by a hash of where their files lie"
        return rows, {"val_share": Choice(value=self.val_share, why=why)}

    def source_of(self, row: ManifestRow) -> str:
        """The video that a clip came from."""
        return source_of(row, self.source_pattern)

    def excluded(self) -> frozenset[str]:
        """The entries of `exclude`. Raises UserError for a file that is absent or says nothing."""
        return read_list("exclude", self.exclude) if self.exclude is not None else frozenset()

    def digests(self) -> dict[str, int | str]:
        """Of the (fitted) settings that decide what is measured, and how that is judged."""
        decode = self.decode.model_dump(mode="json", exclude=SPEED)
        if decode["max_bytes"] == DecodeConfig().max_bytes:
            decode["max_bytes"] = MAX_BYTES_BEFORE
        measured = {"version": VERSION, "decode": decode}
        judged = self.model_dump(mode="json", include={"filters", "duplicates", "flag_only"})
        if self.duplicates.edited == EditedConfig():  # folders of before there were prints are gone on with
            del judged["duplicates"]["edited"]
        if self.split_by == "source":
            judged["source_pattern"] = self.source_pattern
        if self.exclude is not None:
            judged["exclude"] = sorted(self.excluded())
        if self.signals:
            judged["signals"] = {name: signal.model_dump(mode="json") for name, signal in self.signals.items()}
        judged["scores"] = None
        if self.scores.enabled:
            judged["scores"] = [self.scores.content_digest(), self.scores.false_accept_rate]
        return {
            "version": VERSION,
            "decode": stored_digest(measured, sort_keys=True),
            "judge": stored_digest(judged, sort_keys=True),
        }


def _rows_of_train(rows: Sequence[ManifestRow]) -> int:
    return sum(row.split == "train" for row in rows)
