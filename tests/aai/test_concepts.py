"""Reading and moving embeddings, on text features that are easy to check by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aai.concepts import Concepts, Vocabulary
from aai.errors import UserError

VOCABULARY = Vocabulary(
    heads=("a photo of", "a sketch of"),
    objects=("a dog", "a bell", "a clock"),
    ambiences=("at night", "in the rain"),
    any_object="something",
)
TEXTS = [
    "a photo of something",
    "a sketch of something",
    "a photo of a dog",
    "a photo of a bell",
    "a photo of a clock",
    "a photo of something at night",
    "a photo of something in the rain",
]


class Axes:
    """In CLIP's place: the i-th text of TEXTS is the i-th axis of the space."""

    device = "cpu"

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(len(TEXTS))[[TEXTS.index(text) for text in texts]]


@pytest.fixture
def concepts() -> Concepts:
    clip: Any = Axes()
    return Concepts(clip, VOCABULARY)


def test_texts_name_one_thing_and_leave_the_rest_open(concepts: Concepts) -> None:
    axes = torch.eye(len(TEXTS))
    assert torch.equal(concepts.features["heads"], axes[:2])
    assert torch.equal(concepts.features["objects"], axes[2:5])
    assert torch.equal(concepts.features["ambiences"], axes[5:])


def test_reading_is_the_softmax_of_sharpened_cosines(concepts: Concepts) -> None:
    embed = torch.tensor([[0.0, 0, 3, 0, 0, 4, 0], [0.0, 0, 1, 1, 1, 0, 1]])
    for sharpness in (50.0, 2.0):
        cosines = torch.tensor([[0.6, 0, 0], [0.5, 0.5, 0.5]])
        read = concepts.read(embed, "objects", sharpness)
        torch.testing.assert_close(read, (sharpness * cosines).softmax(-1))
    torch.testing.assert_close(concepts.read(embed, "objects"), (50 * cosines).softmax(-1))
    torch.testing.assert_close(concepts.read(embed[:1], "ambiences"), torch.tensor([[1.0, 0.0]]))


def test_moving_exchanges_what_was_read_for_the_target(concepts: Concepts) -> None:
    """Half dog, half night; told to be a clock: the dog goes, the clock comes, the night stays."""
    embed = F.normalize(torch.tensor([[0.0, 0, 1, 0, 0, 1, 0]]), dim=-1)
    target = torch.tensor([[0.0, 0.0, 1.0]])
    moved = concepts.move(embed, "objects", target)
    half = 0.5**0.5
    expected = torch.tensor([[0.0, 0, half - 1, 0, 1, half, 0]])
    torch.testing.assert_close(moved, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(1))
    less = concepts.move(embed, "objects", target, amount=0.5)
    expected = torch.tensor([[0.0, 0, half - 0.5, 0, 0.5, half, 0]])
    torch.testing.assert_close(less, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    same = concepts.move(embed, "objects", concepts.read(embed, "objects"))
    torch.testing.assert_close(same, embed)


def test_the_head_is_read_off_the_picture(concepts: Concepts) -> None:
    assert concepts.head_of(torch.tensor([[0.2, 0.3, 1, 0, 0, 0, 0]])) == "a sketch of"
    assert concepts.head_of(torch.tensor([[0.3, 0.2, 1, 0, 0, 0, 0]])) == "a photo of"


def test_pictures_are_described_with_their_object_and_without(concepts: Concepts) -> None:
    words = concepts.vocabulary
    features = concepts.features
    pictures = torch.stack([features["objects"][i] + 0.5 * features["ambiences"][1 - i] for i in (0, 1)])
    named, unnamed = concepts.described(pictures)
    heads = [concepts.head_of(picture[None]) for picture in pictures]
    assert named == [f"{heads[i]} {words.objects[i]} {words.ambiences[1 - i]}" for i in (0, 1)]
    assert unnamed == [f"{heads[i]} {words.any_object} {words.ambiences[1 - i]}" for i in (0, 1)]


def test_a_vocabulary_needs_something_to_tell_apart() -> None:
    words = {"heads": ["a photo of"], "objects": ["a dog", "a bell"], "ambiences": ["at night", "in the rain"]}
    Vocabulary.parse(words)
    for name, values in words.items():
        with pytest.raises(UserError, match=name):
            Vocabulary.parse({**words, name: values[:-1]})
    assert Vocabulary.parse({k: v for k, v in words.items() if k != "heads"}).heads[0] == "a photo of"
