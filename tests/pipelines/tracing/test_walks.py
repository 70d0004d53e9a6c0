"""From a bundle to its clips, and from clips to what was made of them."""

import pytest

from aai import storage
from aai.errors import UserError
from pipelines.registry.tracking import connect
from pipelines.tracing.walks import origin_of, origin_of_picture, spread_of
from tests.pipelines.tracing.archive import Archive, register, train


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
    assert origin.unknown == ("no training that is on record here made it",)


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
    assert [version.version for version in spread.versions] == [3, 2, 1]  # 3 by its table alone
    assert spread.unknown == ()  # all three are listed
    assert spread.told()["versions"][2] == {"model": "aai-demo", "version": 1, "aliases": ["champion"]}


def test_a_run_that_could_not_tell_what_it_made_hides_no_version(archive: Archive) -> None:
    client = connect(archive.cfg)
    client.delete_tag(archive.runs["both"], "made")
    client.set_terminated(archive.runs["both"], "FAILED")  # as where the server was away at the end
    for clip in ("c0", "c45"):  # of its own table, and of the one that its parent learned from
        assert 1 in [version.version for version in spread_of(archive.cfg, frozenset([clip])).versions]
    origin = origin_of(archive.cfg, "both", "f1")
    assert "what it began from is not known" in origin.unknown[0]


def test_deleted_and_renamed_runs_are_followed_still(archive: Archive) -> None:
    client = connect(archive.cfg)
    client.update_run(archive.runs["both"], name="the good one")
    client.delete_run(archive.runs["aligner2"])
    assert len(origin_of(archive.cfg, "both").clips) == 60
    client.delete_experiment(client.get_run(archive.runs["both"]).info.experiment_id)
    assert [version.version for version in spread_of(archive.cfg, frozenset(["c0"])).versions] == [1]


def test_a_parent_that_nobody_made_is_told(archive: Archive) -> None:
    train(archive.cfg, "adapt", archive.features(1), "f1", "orphan", ["elsewhere"])
    (reason,) = origin_of(archive.cfg, "orphan").unknown
    assert "began from the bundle elsewhere" in reason
    assert reason in spread_of(archive.cfg, frozenset(["c30"])).unknown


def test_a_version_that_nobody_made_is_told(archive: Archive) -> None:
    bundle = archive.folder / "b" / "bundle"
    other = archive.cfg.model_copy(update={"model_name": "another"})
    register(other, bundle, "from elsewhere", "f9")
    assert spread_of(archive.cfg, frozenset(["c0"])).unknown == (
        f"version 3 of {archive.cfg.model_name}: no training that is on record here made it",
        "version 1 of another: no training that is on record here made it",
    )
    register(other, bundle, "both", "f1")
    found = [(version.model, version.version) for version in spread_of(archive.cfg, frozenset(["c0"])).versions]
    assert found == [("aai-demo", 1), ("another", 2)]


def test_a_table_that_changed_between_two_trainings_is_told(archive: Archive) -> None:
    train(archive.cfg, "align", archive.features(1), "f0", "early")
    train(archive.cfg, "adapt", archive.features(1), "f1", "late", ["early"])
    origin = origin_of(archive.cfg, "late")
    assert set(origin.clips["clip_id"].to_pylist()) == ids(0, 30)
    assert ["holds other clips" in reason for reason in origin.unknown] == [True]


def test_a_store_that_is_not_there_is_not_made(archive: Archive) -> None:
    cfg = archive.cfg.model_copy(update={"uri": f"sqlite:///{archive.folder}/none.db"})
    with pytest.raises(UserError, match="no such file"):
        spread_of(cfg, frozenset(["c0"]))
    assert not (archive.folder / "none.db").exists()


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
    assert len(spread.unknown) == 3  # align and adapt on that table, and the version whose training told nothing
    named = spread_of(archive.cfg, frozenset(["c30"]), [f"{archive.folder}/2/curated"])
    assert [holding.kind for holding in named.holdings] == ["accepted", "measured", "embeddings"]
