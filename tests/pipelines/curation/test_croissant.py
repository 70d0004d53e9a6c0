"""The Croissant description: what MLCommons' own library says of it, and what it says of the data."""

import itertools
from pathlib import Path
from typing import Any

import mlcroissant
import pytest

from aai import storage
from aai.media.filters import FilterConfig
from pipelines.curation import card, croissant
from pipelines.curation.croissant import AboutConfig
from tests.pipelines.curation.test_card import write_tables

ABOUT = AboutConfig(
    name="bells", license="CC-BY-4.0", creator="The bell ringers", url="https://example.org/bells",
    date_published="2026-11-29", cite_as="@misc{bells}", collection="Recorded on towers.", use_cases=("training",),
    biases=("Few small bells.",), personal_information=("None.",), maintenance="Write to us.",
)  # fmt: skip
RESULT: dict[str, Any] = {"written_by": "1.0 (commit abc)"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("croissant")
    write_tables(folder)
    card.write_card(str(folder), FilterConfig().model_dump(), RESULT, about=ABOUT)
    return folder


def test_the_library_of_mlcommons_finds_nothing_to_say(out: Path) -> None:
    dataset = mlcroissant.Dataset(jsonld=out / "croissant.json")
    issues = dataset.metadata.ctx.issues
    assert (list(issues.errors), list(issues.warnings)) == ([], [])
    assert dataset.metadata.name == "bells"
    assert dataset.metadata.data_biases[0] == "Few small bells."


def test_the_library_reads_the_clips_by_it(out: Path) -> None:
    records = mlcroissant.Dataset(jsonld=out / "croissant.json").records("clips")
    rows = {row["clip_id"]: row for row in storage.read_table(f"{out}/accepted").to_pylist()}
    for record in itertools.islice(records, 3):
        row = rows[record["clips/clip_id"].decode()]
        assert record["clips/caption"].decode() == row["caption"]
        assert record["clips/duration_s"] == row["duration_s"]


def test_the_responsible_ai_fields_tell_what_was_counted(out: Path) -> None:
    told = storage.read_json(str(out / "croissant.json"))
    assert told["rai:dataCollection"] == "Recorded on towers."
    assert told["rai:dataCollectionMissingData"] == "1 of 20 rows could not be read or decoded."
    steps = told["rai:dataPreprocessingProtocol"]
    assert "read: 1 rows rejected as IO_ERROR" in steps
    assert "written by aai 1.0 (commit abc)" in steps
    assert any(bias.startswith("The commonest of") for bias in told["rai:dataBiases"])
    assert told["rai:personalSensitiveInformation"] == ["None."]


def test_what_nobody_said_is_left_out_and_licences_come_from_the_manifest(out: Path) -> None:
    figures = storage.read_json(str(out / "card.json"))
    values = [{"value": "CC0", "accepted": 2, "rejected": 0}, {"value": "?", "accepted": 0, "rejected": 1}]
    figures["columns"] = [{"column": "license", "kind": "text", "values": values}]
    result = {"columns": {"license": "text"}, "signals": {"nsfw": {"source": "nsfw.parquet"}}}
    told = croissant.describe(AboutConfig(), figures, result)
    assert told["license"] == ["CC0"]
    assert told["description"].startswith("16 clips of sound with pictures")
    assert told["rai:machineAnnotationTools"] == ["nsfw: nsfw.parquet"]
    assert "Not looked at" in told["rai:personalSensitiveInformation"][0]
    assert {"creator", "url", "rai:dataCollection", "citeAs"}.isdisjoint(told)
    fields = {field["@id"].split("/")[1]: field["dataType"] for field in told["recordSet"][0]["field"]}
    assert (fields["license"], fields["nsfw"], fields["width"]) == ("sc:Text", "sc:Float", "sc:Integer")
    assert "video_hash" not in fields
