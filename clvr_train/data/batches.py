"""The order of samples: a function of (seed, position) alone, so that resuming is asking for a later position."""

import hashlib

import torch


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch."""
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_samples, generator=generator).tolist()


class Order:
    """Batches of indices over endless epochs; a batch may reach over the end of an epoch, no sample is left out.

    Raises:
        ValueError: without samples.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples={num_samples}, batch_size={batch_size}: both must be at least 1")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._epochs: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) pairs of step `step`, counted from 0; costs the same at any step."""
        return [self._at(step * self.batch_size + i) for i in range(self.batch_size)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = epoch_order(self.num_samples, self.seed, epoch)
        return epoch, self._epochs[epoch][offset]
