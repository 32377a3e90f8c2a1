"""Random numbers that belong to a datum's place in the data set, not to its batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# words of 64 bits are read as signed: the arithmetic of int64 wraps around
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_SHIFTS = (30, 27, 31)
_UNIFORM, _NORMAL, _SIGN = 1, 2, 3  # the distributions use separate streams


@dataclass(frozen=True)
class Noise:
    """Noise of one batch, the same however the data set is cut into batches.

    A number is a hash of its key: the seed, the datum's place in the data set, the term within the datum, the sample
    and the channel. Nothing is stored, and no generator advances. The hash is the finaliser of SplitMix64 (Steele,
    Lea & Flood 2014, doi:10.1145/2660193.2660195), applied once per component of the key.

    `uniform`, `normal` and `signs` take the number of terms T; the terms of each datum (`None` where the data do not
    have equally many: then the key is the term's place in its batch, and the noise does depend on the batches); the
    number of samples M; and, where asked for, the channels of a term C (`width`) and a device. They return `[T, M]`, or
    `[T, M, C]`, in float64.

    Attributes:
        seed: Any integer.
        start: Place of the batch's first datum in the data set.

    Example:
        >>> import torch
        >>> whole = Noise(seed=0, start=0).uniform(6, terms_per_datum=2, mc_samples=3)
        >>> tail = Noise(seed=0, start=1).uniform(4, terms_per_datum=2, mc_samples=3)
        >>> torch.equal(whole[2:], tail)
        True
    """

    seed: int
    start: int

    def uniform(self, *key: Any, **options: Any) -> Tensor:
        """Draw uniformly from the open interval (0, 1)."""
        return _open_unit(self._words(_UNIFORM, *key, **options))

    def normal(self, *key: Any, **options: Any) -> Tensor:
        """Draw from the standard normal distribution."""
        return torch.special.ndtri(_open_unit(self._words(_NORMAL, *key, **options)))

    def signs(self, *key: Any, **options: Any) -> Tensor:
        """Draw from {-1, +1}, each with probability 1/2."""
        return torch.where(self._words(_SIGN, *key, **options) < 0, -1.0, 1.0).double()

    def _words(
        self,
        stream: int,
        num_terms: int,
        terms_per_datum: int | None,
        mc_samples: int,
        width: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random words of 64 bits."""
        term = torch.arange(num_terms, device=device)
        place: Tensor | int = self.start
        within: Tensor | int = term
        if terms_per_datum is not None:
            # an empty batch may report no terms per datum
            count = max(terms_per_datum, 1)
            place, within = (self.start + term, 0) if count == 1 else (self.start + term // count, term % count)
        root = _absorb(_absorb(self.seed, 0) ^ stream, 0)
        key = _absorb(_absorb(root, place), within)
        key = _absorb(key.unsqueeze(-1), torch.arange(mc_samples, device=device) if mc_samples > 1 else 0)
        return key if width is None else _absorb(key.unsqueeze(-1), torch.arange(width, device=device))


def _absorb(key: Any, index: Any) -> Any:
    """Hash one more component into the key; both are words as tensors, or integers."""
    word = _wrapped(_wrapped(key) + _wrapped((index + 1) * _GOLDEN))
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        word = _wrapped((word ^ _shift(word, shift)) * multiplier)
    return word ^ _shift(word, _SHIFTS[-1])


def _wrapped(word: Any) -> Any:
    """An integer as a signed word of 64 bits, as tensors are."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63) if isinstance(word, int) else word


def _shift(word: Any, bits: int) -> Any:
    """Shift to the right without copying the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _open_unit(words: Tensor) -> Tensor:
    """Map words to the middles of equal cells of (0, 1)."""
    return (_shift(words, 12).double() + 0.5) * 2.0**-52
