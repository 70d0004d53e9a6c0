"""From a bundle to its clips, and from clips to what was made of them."""

from aai import storage
from pipelines.registry.tracking import connect
from pipelines.tracing.walks import origin_of, origin_of_picture, spread_of
from tests.pipelines.tracing.archive import Archive, train


def ids(first: int, last: int) -> set[str]:
    return {f"c{number}" for number in range(first, last)}


def test_a_bundle_has_the_clips_of_all_that_it_began_from(archive: Archive) -> None:
    origin = origin_of(archive.cfg, "both")
    assert [training.run_id for training in origin.trainings] == [archive.runs["both"], archive.runs["aligner2"]]
    assert set(origin.clips["clip_id"].to_pylist()) == ids(0, 60)
    assert origin.by_split() == {"train": 40, "val": 20}
    assert origin.unknown == ()
    assert set(origin_of(archive.cfg, "second").clips["clip_id"].to_pylist()) == ids(30, 60)


def test_a_clip_of_two_trainings_counts_once(archive: Archive) -> None:
    assert len(origin_of(archive.cfg, "second").trainings) == 2
    assert len(origin_of(archive.cfg, "second").clips) == 30


def test_a_bundle_that_no_training_made_is_no_bundle_without_clips(archive: Archive) -> None:
    origin = origin_of(archive.cfg, "stranger")
    assert (origin.trainings, len(origin.clips)) == ([], 0)
    assert origin.unknown == ("no training in this store made it",)


def test_a_table_that_is_gone_is_told(archive: Archive) -> None:
    storage.remove(archive.features(2))
    origin = origin_of(archive.cfg, "both")
    assert set(origin.clips["clip_id"].to_pylist()) == ids(0, 30)
    assert len(origin.unknown) == 1
    assert archive.features(2) in origin.unknown[0]


def test_a_picture_leads_to_its_version(archive: Archive) -> None:
    origin, found = origin_of_picture(archive.cfg, {"bundle": "second"})
    assert [version.version for version in found] == [2]
    assert len(origin.clips) == 30
    assert origin_of_picture(archive.cfg, {"bundle": ["no", "text"]})[1] == []


def test_clips_lead_to_trainings_and_what_began_from_them(archive: Archive) -> None:
    spread = spread_of(archive.cfg, frozenset(["c1"]))
    assert {training.run_id for training in spread.trainings} == {archive.runs["both"], archive.runs["broken"]}
    assert [version.version for version in spread.versions] == [1]
    spread = spread_of(archive.cfg, frozenset(["30.mp4"]))
    assert {training.made for training in spread.trainings} == {"aligner2", "both", "second"}
    assert [version.version for version in spread.versions] == [2, 1]
    assert spread.told()["versions"][1] == {"version": 1, "aliases": ["champion"]}


def test_versions_of_a_release_that_told_less_are_found_by_their_table(archive: Archive) -> None:
    silent = train(archive.cfg, "adapt", archive.features(2), "f2", "x")
    connect(archive.cfg).delete_tag(silent, "made")
    spread = spread_of(archive.cfg, frozenset(["c30"]))
    assert [version.version for version in spread.versions] == [3, 2, 1]
    assert spread_of(archive.cfg, frozenset(["c0"])).versions[0].version == 1


def test_clips_held_out_reach_no_weights(archive: Archive) -> None:
    table = storage.read_table(f"{archive.features(1)}/shard-00000.parquet")
    rows = [{**row, "split": "test"} if row["clip_id"] == "c1" else row for row in table.to_pylist()]
    storage.write_table(f"{archive.features(1)}/shard-00000.parquet", table.from_pylist(rows, schema=table.schema))
    spread = spread_of(archive.cfg, frozenset(["c1"]))
    assert [holding.by_split() for holding in spread.holdings][:1] == [{"test": 1}]
    assert (spread.trainings, spread.versions) == ([], [])


def test_what_cannot_be_told_is_told(archive: Archive) -> None:
    storage.remove(archive.features(2))
    spread = spread_of(archive.cfg, frozenset(["c30"]))
    assert [holding.kind for holding in spread.holdings] == ["embeddings"]
    assert spread.versions == []
    assert len(spread.unknown) == 2  # align and adapt on that table
    named = spread_of(archive.cfg, frozenset(["c30"]), [f"{archive.folder}/2/curated"])
    assert [holding.kind for holding in named.holdings] == ["accepted", "measured", "embeddings"]
