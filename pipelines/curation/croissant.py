"""What was curated, as a Croissant description (MLCommons, 1.0) with its responsible-AI fields, for catalogues.

Croissant: arXiv 2403.19546; its RAI vocabulary: arXiv 2407.16883.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pydantic

from aai.config import Config
from aai.schema import CLIP_TABLE
from pipelines.curation.layout import ACCEPTED

FILE = "croissant.json"
LICENCES = ("license", "licence")
"""Columns of a manifest that name the licence of a clip."""
CONFORMS_TO = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
_TERMS = (
    "citeAs", "column", "extract", "field", "fileProperty", "fileObject", "fileSet", "format", "includes",
    "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated",
    "replace", "separator", "source", "subField", "transform",
)  # fmt: skip
_MEDIA = {"audio": "sc:AudioObject", "frames": "sc:ImageObject"}

Json = dict[str, Any]


class AboutConfig(Config):
    """What only you know of the data: it goes into croissant.json and is not checked."""

    name: str = "clips"
    """Name of the data set."""
    description: str | None = None
    """What it is; empty = clips, hours and labels in a sentence."""
    version: str = pydantic.Field("1.0.0", pattern=r"^\d+\.\d+\.\d+$")
    license: str | None = None
    """Licence of the whole, an SPDX id or URL; empty = what the manifest's column `license` says."""
    creator: str | None = None
    """Who made it."""
    url: str | None = None
    """Page of the data set."""
    date_published: str | None = pydantic.Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    """YYYY-MM-DD."""
    cite_as: str | None = None
    """Citation, best as BibTeX."""
    collection: str | None = None
    """How the recordings were collected."""
    use_cases: tuple[str, ...] = ()
    """What it is meant for."""
    biases: tuple[str, ...] = ()
    """Known biases; how unevenly labels are spread is told besides."""
    limitations: tuple[str, ...] = ()
    """Known limits, and what it should not be used for."""
    personal_information: tuple[str, ...] = ()
    """What it may tell of persons; empty = that nobody looked."""
    social_impact: str | None = None
    """Discussion of the social impact."""
    maintenance: str | None = None
    """Who keeps it up, and how clips are taken down."""


def describe(about: AboutConfig, card: Mapping[str, Any], result: Mapping[str, Any]) -> Json:
    """croissant.json: the tables of accepted clips, their columns, and how they came about.

    card: what card.json holds; result: what curate.json holds.
    """
    vocabulary = {term: f"cr:{term}" for term in _TERMS}
    typed = {"data": {"@id": "cr:data", "@type": "@json"}, "examples": {"@id": "cr:examples", "@type": "@json"}}
    prefixes = {
        "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/", "dct": "http://purl.org/dc/terms/",
        "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
        "conformsTo": "dct:conformsTo", "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    }  # fmt: skip
    told: Json = {
        "@context": prefixes | vocabulary | typed,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS_TO),
        "name": about.name,
        "description": about.description or _sentence(card),
        "version": about.version,
        "license": about.license or _licences(card),
        "creator": about.creator and {"@type": "sc:Organization", "name": about.creator},
        "url": about.url,
        "datePublished": about.date_published,
        "citeAs": about.cite_as,
        "isLiveDataset": False,
        "distribution": [_tables()],
        "recordSet": [_clips(result)],
        **_responsible(about, card, result),
    }
    return {name: value for name, value in told.items() if value not in (None, [], ())}


def _sentence(card: Mapping[str, Any]) -> str:
    funnel, labels = card["funnel"], card["labels"]
    splits = ", ".join(f"{part['accepted']} {name}" for name, part in labels["splits"].items())
    return (
        f"{funnel['accepted']} clips of sound with pictures, {funnel['hours']:.2f} hours, {labels['labels']} labels "
        f"({splits}): curated from {funnel['rows_in']} rows."
    )


def _licences(card: Mapping[str, Any]) -> list[str]:
    """Those of the accepted clips, the commonest first."""
    columns = [column for column in card["columns"] if column["column"].lower() in LICENCES and "values" in column]
    return [row["value"] for column in columns for row in column["values"] if row["accepted"]]


def _tables() -> Json:
    return {
        "@type": "cr:FileSet",
        "@id": "tables",
        "description": "One row a clip; plain Parquet files.",
        "encodingFormat": "application/x-parquet",
        "includes": f"{ACCEPTED}/*.parquet",
    }


def _clips(result: Mapping[str, Any]) -> Json:
    """A field for each column that is not a hash."""
    further = {**result.get("columns", {}), **dict.fromkeys(result.get("signals", ()), "number")}
    kinds = {field.name: field.type for field in CLIP_TABLE if not pa.types.is_binary(field.type)}
    kinds |= {name: CLIP_TABLE.field(name).type for name in _MEDIA}
    kinds |= {name: pa.float64() if kind == "number" else pa.string() for name, kind in further.items()}
    fields = []
    for name, kind in kinds.items():
        source = {"fileSet": {"@id": "tables"}, "extract": {"column": name}}
        field = {"@type": "cr:Field", "@id": f"clips/{name}", "dataType": _data_type(name, kind), "source": source}
        fields.append({**field, "repeated": True} if pa.types.is_list(kind) else field)
    return {"@type": "cr:RecordSet", "@id": "clips", "key": {"@id": "clips/clip_id"}, "field": fields}


def _data_type(name: str, kind: pa.DataType) -> str:
    if name in _MEDIA:
        return _MEDIA[name]
    if pa.types.is_list(kind):
        return _data_type(name, kind.value_type)
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Integer" if pa.types.is_integer(kind) else "sc:Text"


# ---------------------------------------------------------------- responsible AI


def _responsible(about: AboutConfig, card: Mapping[str, Any], result: Mapping[str, Any]) -> Json:
    """The rai: fields; what was not said stands there as not said."""
    funnel = card["funnel"]
    unread = sum(stage["rows"] for stage in funnel["stages"] if stage["stage"] in ("read", "decode"))
    nobody = ("Not looked at: recordings may show and let hear persons, places and names.",)
    return {
        "rai:dataCollection": about.collection,
        "rai:dataCollectionMissingData": f"{unread} of {funnel['rows_in']} rows could not be read or decoded.",
        "rai:dataPreprocessingProtocol": _protocol(card, result),
        "rai:dataAnnotationProtocol": "Captions, labels and splits are those of the manifest.",
        "rai:machineAnnotationTools": [f"{name}: {s['source']}" for name, s in result.get("signals", {}).items()],
        "rai:dataUseCases": list(about.use_cases),
        "rai:dataBiases": [*about.biases, *_unevenness(card)],
        "rai:dataLimitations": [*about.limitations, "Of each clip there are a few pictures and mono sound, no video."],
        "rai:personalSensitiveInformation": list(about.personal_information or nobody),
        "rai:dataSocialImpact": about.social_impact,
        "rai:dataReleaseMaintenancePlan": about.maintenance,
    }


def _protocol(card: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """A sentence for each step that took rows, with its thresholds, and for what was computed by which code."""
    limits: dict[str, list[str]] = {}
    for setting, move in card["thresholds"].items():
        for code in move["codes"]:
            limits.setdefault(code, []).append(f"{setting} {move['limit']:g}")
    steps = []
    for stage in card["funnel"]["stages"]:
        for code in stage["codes"]:
            told = f" ({', '.join(limits[code['code']])})" if code["code"] in limits else ""
            steps.append(f"{stage['stage']}: {code['rows']} rows rejected as {code['code']}{told}")
    return [*steps, f"written by aai {result['written_by']}"] if "written_by" in result else steps


def _unevenness(card: Mapping[str, Any]) -> list[str]:
    rows, accepted = card["labels"]["rows"], card["funnel"]["accepted"]
    if not rows or not accepted:
        return []
    share = rows[0]["accepted"] / accepted
    return [
        f"The commonest of {card['labels']['labels']} labels, {rows[0]['label']!r}, is on {share:.1%} of the clips."
    ]
