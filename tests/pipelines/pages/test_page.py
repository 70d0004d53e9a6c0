from pipelines.pages import page


def test_numbers_are_printed_for_people() -> None:
    assert [page.share(x).replace("\xa0", " ") for x in (0.9345, 1, None)] == ["93.5 %", "100.0 %", "–"]
    assert [page.seconds(x).replace("\xa0", " ") for x in (4.26, 59.97, 93)] == ["4.3 s", "1 min 00 s", "1 min 33 s"]
    assert [page.number(x) for x in (2400, 0.76543, 3e-7, 0)] == ["2,400", "0.765", "3.0e-07", "0"]
    assert [page.number(x) for x in ("x", None)] == ["x", "–"]
