"""Mixing sources and classes of samples in exact shares, without a coin: text to image and editing (CLVR A.6)."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from math import lcm
from types import MappingProxyType

from clvr_train.data.order import epochs, positions
from clvr_train.method.trajectory import Sample

TEXT_TO_IMAGE = 0
STEP_CLASSES = 4  # editing samples with 1, 2, 3 and 4 or more images of history come in equal shares


def step_class(sample: Sample) -> int:
    """0 for text to image; 1, 2, 3, or 4 for four or more images of history."""
    return min(len(sample.references), STEP_CLASSES)


def step_weights(present: Iterable[int], t2i_share: float) -> dict[int, Fraction]:
    """The weight of every class of `step_class` that is present: text to image `t2i_share`, editing equal parts of the
    rest. Classes of history that the data lacks leave their share to the others.

    Raises:
        ValueError: the share is outside [0, 1], or asks for text to image or editing where there is none.
    """
    classes = sorted(set(present))
    if not 0 <= t2i_share <= 1:
        raise ValueError(f"t2i_share={t2i_share} is not in [0, 1]")
    share = _exact(t2i_share)
    if share > 0 and TEXT_TO_IMAGE not in classes:
        raise ValueError(f"t2i_share={t2i_share}, but no sample has an empty history: set it to 0")
    editing = [c for c in classes if c != TEXT_TO_IMAGE]
    if share < 1 and not editing:
        raise ValueError(f"t2i_share={t2i_share}, but no sample has images of history: set it to 1")
    weights = {c: (1 - share) / len(editing) for c in editing}
    return {TEXT_TO_IMAGE: share, **weights} if TEXT_TO_IMAGE in classes else weights


class Shares:
    """Which class stands at a position of an endless sequence in which every class has its exact share.

    A class of share s has about s p of the first p positions, never further off than `len(weights) / 2`, and exactly
    s p where p is a multiple of `period`. It costs the same at any position: the largest class has every 1/s-th
    position, the next its part of what is left, and so on.

    Args:
        weights: not negative, in any unit; a decimal is taken as written (0.1 is a tenth). Weight 0 leaves a class out.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """

    def __init__(self, weights: Mapping[Hashable, float | Fraction]) -> None:
        exact = {name: _exact(weight) for name, weight in weights.items()}
        if any(weight < 0 for weight in exact.values()) or not any(exact.values()):
            raise ValueError(f"weights={dict(weights)}: none may be negative, and one must be above 0")
        total = left = sum(exact.values())
        self.shares = {name: weight / total for name, weight in exact.items() if weight}
        self.period = lcm(*(share.denominator for share in self.shares.values()))
        self._chain: list[tuple[Hashable, int, int]] = []
        for name in sorted(self.shares, key=self.shares.__getitem__, reverse=True):
            part = exact[name] / left
            left -= exact[name]
            self._chain.append((name, part.numerator, part.denominator))

    def at(self, position: int) -> tuple[Hashable, int]:
        """(class, how many of its class came before) at a position, counted from 0."""
        for name, numerator, denominator in self._chain:
            before, after = (_rounded(p * numerator, denominator) for p in (position, position + 1))
            if after > before:
                return name, before
            position -= before
        raise AssertionError("the last class takes all that is left")

    def counts(self, num_positions: int) -> dict[Hashable, int]:
        """How many of the first positions each class has."""
        found = {}
        for name, numerator, denominator in self._chain:
            found[name] = _rounded(num_positions * numerator, denominator)
            num_positions -= found[name]
        return found


class Mix:
    """Batches over classes of samples in exact shares: the counterpart of `data.order.Order`.

    Every class goes through its own samples in epochs of its own: each comes once before one comes again.

    Args:
        members: the indices of the samples of every class (a range will do).
        weights: see `Shares`; a class that has weight must have members.
        blocks: of the classes whose members are read by block, the rows of every block, in the order of the members;
            see `data.order.BlockPermutation`. The others are permuted freely.
        window: how many blocks of a class are mixed with each other. Every class has a window of its own.

    Raises:
        ValueError: see `Shares`; a class of some weight without members; blocks of an unknown class, of another number
            of samples, or a window of more of them than their reader keeps open.
    """

    def __init__(
        self,
        members: Mapping[Hashable, Sequence[int]],
        weights: Mapping[Hashable, float | Fraction],
        batch_size: int,
        seed: int,
        *,
        blocks: Mapping[Hashable, Sequence[int]] = MappingProxyType({}),
        window: int = 1,
    ) -> None:
        self.shares = Shares(weights)
        for name in self.shares.shares:
            if not len(members.get(name, ())):
                raise ValueError(f"weights: {name!r} has weight {float(weights[name])}, but no samples")
        if unknown := blocks.keys() - members.keys():
            raise ValueError(f"blocks: {min(map(repr, unknown))} is no class of the members")
        self.batch_size, self.seed = batch_size, seed
        self._members = {name: members[name] for name in self.shares.shares}
        self._epochs = {
            name: epochs(len(of_class), blocks.get(name, ()), window, "mix", seed, str(name))
            for name, of_class in self._members.items()
        }

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The (epoch of the class, index) pairs of a rank at step `step`, counted from 0."""
        return [self.at(position) for position in positions(step, self.batch_size, rank, world)]

    def at(self, position: int) -> tuple[int, int]:
        """(epoch of the class, index) of the sample at a position."""
        name, number = self.shares.at(position)
        members = self._members[name]
        epoch, offset = divmod(number, len(members))
        return epoch, int(members[self._epochs[name](epoch)[offset]])


def _exact(weight: float | Fraction) -> Fraction:
    try:
        return weight if isinstance(weight, Fraction) else Fraction(str(weight))
    except ValueError as error:
        raise ValueError(f"weight {weight!r} is not a finite number") from error


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
