"""Digests name what tables were made of: two that agree by chance, or differ by it, cost a recomputation or a lie."""

from aai.digest import digest, stored_digest, stored_digest_of_lists


def test_equal_values_have_equal_digests_whatever_the_order_of_their_keys() -> None:
    value = {"b": [1, 2.5, None], "a": {"y": "ö", "x": True}}
    again = {"a": {"x": True, "y": "ö"}, "b": (1, 2.5, None)}
    assert digest(value) == digest(again)
    assert len({digest(value), digest({**value, "b": [2.5, 1, None]}), digest({**value, "b": ["1", 2.5, None]})}) == 3
    assert (len(digest(value)), len(digest(value, 40))) == (16, 40)
    assert digest(value, 40).startswith(digest(value))


def test_digests_are_those_of_every_machine_and_version() -> None:
    """From `printf '{"a":[1,"\\u00f6"]}' | sha256sum` and, with spaces, of what older tables carry."""
    assert digest({"a": [1, "ö"]}) == "28d7f3579955e3f6"
    assert stored_digest({"b": 1, "a": 2}) == "6f21dfd78e16c056"
    assert stored_digest({"b": 1, "a": 2}, sort_keys=True) == "21501dbaf73f5223"


def test_long_lists_need_not_be_there_at_once() -> None:
    keys, rows = ["k1", "k2 ö"], [{"b": 1.5, "a": None}, {"b": [True], "a": "x"}]
    for lists in ([keys, rows], [[], rows], [keys], []):
        for further in ([], ["sources", {"b": 1, "a": 2}]):
            one_by_one = ((item for item in items) for items in lists)
            assert stored_digest_of_lists(one_by_one, further) == stored_digest([*lists, *further], sort_keys=True)
