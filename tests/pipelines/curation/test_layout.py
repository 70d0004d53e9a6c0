"""Where tables lie: what is swept, resumed or read of one must never be another's."""

from pipelines.curation import layout


def test_every_table_has_a_place_of_its_own() -> None:
    names = [value for name, value in vars(layout).items() if name.isupper()]
    assert len(names) == len(set(names)) >= 8
    files = {layout.shard_file("s3://bucket/out/", folder, "shard-00001") for folder in names}
    assert len(files) == len(names)
    assert (
        layout.shard_file("s3://bucket/out/", layout.ACCEPTED, "shard-1") == "s3://bucket/out/accepted/shard-1.parquet"
    )


def test_only_the_two_tables_for_others_are_visible() -> None:
    """Readers of Parquet folders pass over names that begin with an underscore."""
    names = {value for name, value in vars(layout).items() if name.isupper()}
    assert {name for name in names if not name.startswith("_")} == {"accepted", "rejected"}
