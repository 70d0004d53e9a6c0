import pyarrow as pa

from pipelines.curation.card_data import NUMBERS, _Gathered
from pipelines.curation.card_figures import funnel


def test_more_codes_than_bits_are_summed_up() -> None:
    rows = _Gathered()
    columns = {name: pa.array([1.0] * 200) for name in NUMBERS}
    columns |= {"labels": pa.array([["a"]] * 200), "split": pa.array(["t"] * 200)}
    columns |= {"flags": pa.array([[f"C{i:03d}"] for i in range(200)])}
    rows.add(pa.table(columns))
    rows.add(pa.table(columns))
    counts = {flag["code"]: flag["rows"] for flag in funnel(rows.rows(["x", "y"]))["flags"]}
    assert (len(counts), counts["C000"], counts["OTHER"]) == (64, 2, 2 * (200 - 63))
