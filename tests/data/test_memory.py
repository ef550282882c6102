"""Pictures kept in memory are the source's own, decoded once, within the budget."""

from PIL import Image

from clipdistill.data.memory import KeptInMemory
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import Problems


class Counting(PairSource):
    def __init__(self) -> None:
        self.name, self.problems, self.decoded = "counting", Problems(), 0

    def __len__(self):
        return 4

    def key(self, i):
        return f"k{i}"

    def captions(self, i):
        return (f"caption {i}",)

    def image_bytes(self, i):
        raise AssertionError("not needed")

    def image(self, i, at_least=None):
        self.decoded += 1
        return Image.new("RGB", (5, 4), (i, 10 * i, 255 - i))


def test_each_picture_is_decoded_once():
    source = Counting()
    kept = KeptInMemory(source)
    for _ in range(3):
        for i in range(4):
            assert kept.image(i).tobytes() == Counting().image(i).tobytes()
            assert kept.image(i).size == (5, 4)
    assert source.decoded == 4
    assert [kept.key(i) for i in range(4)] == ["k0", "k1", "k2", "k3"]
    assert kept.captions(2) == ("caption 2",)
    assert kept.fingerprint() == source.fingerprint()


def test_the_budget_holds():
    source = Counting()
    kept = KeptInMemory(source, budget=130)  # two pictures of 60 bytes
    for _ in range(2):
        for i in range(4):
            kept.image(i)
    assert source.decoded == 2 + 2 * 2


def test_what_the_caller_does_to_a_picture_stays_with_the_caller():
    kept = KeptInMemory(Counting())
    kept.image(1)
    kept.image(1).putpixel((0, 0), (9, 9, 9))
    assert kept.image(1).getpixel((0, 0)) == (1, 10, 254)
