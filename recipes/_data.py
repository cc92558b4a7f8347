"""What recipes train on: trajectories, captions, several sources at once; their order and their batches."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from clvr_train.data.buckets import BucketBatches, Size, number_buckets
from clvr_train.data.captions import Captions, fit_target
from clvr_train.data.fine_t2i import FineT2I
from clvr_train.data.flux_reason import FluxReason
from clvr_train.data.images import ImageError
from clvr_train.data.loader import Drawn, Mapped, read_ahead
from clvr_train.data.mixing import TEXT_TO_IMAGE, Mix, step_class, step_weights
from clvr_train.data.order import Order
from clvr_train.data.readers import check_pixels, load_trajectories, read_trajectories
from clvr_train.data.records import DataError, shown
from clvr_train.data.refusals import Refusals
from clvr_train.method.trajectory import Sample, Trajectory
from clvr_train.method.truncation import truncate
from clvr_train.models.conditioning import Conditioner
from clvr_train.runtime.distributed import World
from clvr_train.shapes.base import captions
from clvr_train.shapes.render import render

logger = logging.getLogger(__name__)

Samples = Sequence[Sample]  # a list, or a corpus that is read when it is indexed


def read_folder(
    folder: str | Path | None, refusals: Refusals, limit: int | None = None, decode: bool = True
) -> list[Trajectory]:
    """The trajectories of a folder, or the first `limit` of them.

    Every image is decoded once (without `decode` its header is read): what no sample can be made of is found now, not
    when its turn comes.

    Raises:
        DataError, ValueError: see `data.readers.read_trajectories`.
    """
    if folder is None:
        raise ValueError("data.folder: a folder of trajectories is needed")
    progress = partial(tqdm, desc="read", unit=" trajectories", mininterval=1)
    if decode:
        return load_trajectories(Path(folder), refusals, limit, progress)
    return list(progress(read_trajectories(Path(folder), False, refusals, limit)))


def truncated(trajectories: Sequence[Trajectory], folder: str | Path) -> list[Sample]:
    """Every truncation of every trajectory of a folder.

    Raises:
        ValueError: there is none.
    """
    samples = [sample for trajectory in trajectories for sample in truncate(trajectory)]
    if not samples:
        raise ValueError(f"{folder}: none of its {len(trajectories)} trajectories draws an image; there is no sample")
    return samples


def direct_samples(trajectories: Sequence[Trajectory]) -> list[Sample]:
    """One sample a trajectory without reasoning or history: from the goal to the last image, which it ended on.

    Training on traces alone forgets how to draw from a bare prompt.
    """
    return [
        Sample(trajectory.id, len(trajectory.images), trajectory.goal, (), (), trajectory.images[-1])
        for trajectory in trajectories
        if trajectory.images
    ]


def read_corpus(data: DictConfig, window: int = 1) -> Captions:
    """The captions of `data.folder` in the form `data.format`: `flux_reason` or `fine_t2i`. `window`: see
    `FluxReason`.
    """
    if data.folder is None:
        raise ValueError("data.folder: a folder or file of captions is needed")
    if data.format == "flux_reason":
        corpus = FluxReason(Path(data.folder), data.caption, data.limit, window)
        logger.info("%d captions, %d records have none", len(corpus), corpus.num_without_caption)
        return corpus
    if data.format == "fine_t2i":
        corpus = FineT2I(Path(data.folder), data.limit)
        logger.info("%d captions", len(corpus))
        return corpus
    raise ValueError(f"format={data.format!r} is not one of flux_reason, fine_t2i")


def read_prompts(data: DictConfig, max_refused: float = 0.0) -> list[Sample]:
    """The samples of a corpus of captions, whose goals are prompts to draw; their images are found to be readable."""
    corpus = read_corpus(data)
    samples, refusals = [], Refusals(data.folder, max_refused)
    for index in tqdm(range(len(corpus)), desc="read", unit=" prompts", mininterval=1):
        try:
            sample = corpus[index]
            check_pixels(sample.target)
        except (DataError, ImageError) as error:
            refusals.refuse(error)
        else:
            refusals.accept()
            samples.append(sample)
    refusals.finish()
    return samples


def caption_samples(num: int, seed: int, kinds: Mapping[str, float] | None = None) -> list[Sample]:
    """Caption and single-edit pairs of the shapes world as samples without reasoning, for training a base model.

    `kinds`: weights of descriptions, goals and edits, alike by default.
    """
    samples = []
    for number, caption in enumerate(captions(num, seed, kinds)):
        references = () if caption.source is None else (render(caption.source),)
        step = 1 + len(references)
        samples.append(Sample(f"caption-{seed}-{number}", step, caption.text, (), references, render(caption.scene)))
    return samples


def read_sources(data: DictConfig) -> tuple[list[tuple[Samples, Fraction]], int]:
    """What the `data` keys name, each with its weight: one source, or the entries of `data.mix`; and how many records
    were refused.
    """
    if data.mix and (data.folder is not None or data.captions):
        raise ValueError("data.mix: every source is an entry of it; set data.folder=null and data.captions=0")
    sources, refused = [], 0
    ids: dict[str, int] = {}
    for number, entry in enumerate(data.mix or [{}]):
        source = OmegaConf.merge(data, entry)
        if data.mix and source.folder is None and not source.captions:
            raise ValueError(f"data.mix[{number}].folder: an entry needs a folder")
        refusals = Refusals(source.folder or "captions", source.max_refused)
        samples = _read_source(source, refusals)
        if source.format == "trajectories":
            _check_ids(samples, number, ids)
        sources.append((samples, Fraction(str(source.weight))))
        refused += refusals.refused
    return sources, refused


def _check_ids(samples: Iterable[Sample], number: int, ids: dict[str, int]) -> None:
    """Refuse an id that an earlier entry of `data.mix` has too: noise and prompts are told apart by ids."""
    for sample in samples:
        if (other := ids.setdefault(sample.trajectory_id, number)) != number:
            where = f"data.mix[{number}]: id {shown(sample.trajectory_id)}"
            raise ValueError(f"{where} stands in data.mix[{other}] too; an id is for one trajectory, over all entries")


def _read_source(data: DictConfig, refusals: Refusals) -> Samples:
    if data.captions:
        if data.folder is not None:
            raise ValueError(f"data.captions={data.captions}, data.folder={data.folder}: a source is one or the other")
        return caption_samples(data.captions, data.seed, data.kinds)
    if data.format != "trajectories":
        if data.direct:
            raise ValueError(f"data.direct=true: captions (data.format={data.format}) have no trajectories")
        return read_corpus(data, data.window)
    trajectories = read_folder(data.folder, refusals, data.limit)
    return truncated(trajectories, data.folder) + (direct_samples(trajectories) if data.direct else [])


def encode_ahead(sources: Sequence[tuple[Samples, Fraction]], conditioner: Conditioner, world: World) -> None:
    """Encodes the samples that are held in lists, of what goes into a cache each rank its part; of corpora, states what
    a cache will hold.

    Raises:
        ImageError: an image was changed since it was read.
    """

    def share(work: list) -> list:
        world.gather(None)  # all have listed what is missing, and none has written
        return world.share(work)

    for samples, _ in sources:
        if not isinstance(samples, list):
            conditioner.announce(len(samples))
            continue
        progress = partial(tqdm, desc="encode", disable=not world.first)
        conditioner.prime(samples, progress, share)
    world.gather(None)  # what one rank has encoded the others read


def sample_order(sources: Sequence[tuple[Samples, Fraction]], data: DictConfig, batch: int, seed: int) -> Order | Mix:
    """The order of the samples of all sources, one after the other: all once an epoch, or in set shares of sources and
    of kinds (`data.t2i_share`, CLVR A.6). The shares of sources hold within a kind.
    """
    blocks = [samples.blocks if isinstance(samples, Captions) else () for samples, _ in sources]
    if len(sources) == 1 and data.t2i_share is None:
        return Order(len(sources[0][0]), batch, seed, blocks=blocks[0], window=data.window)
    members: dict[tuple[int, int], Sequence[int]] = {}  # by kind and source
    first = 0
    for number, (samples, _) in enumerate(sources):
        places = range(first, first + len(samples))
        if data.t2i_share is None or not isinstance(samples, list):
            members[TEXT_TO_IMAGE, number] = places
        else:
            for place, sample in zip(places, samples, strict=True):
                members.setdefault((step_class(sample), number), []).append(place)
        first += len(samples)
    kinds = {kind for kind, _ in members}
    shares = {TEXT_TO_IMAGE: 1} if data.t2i_share is None else step_weights(kinds, data.t2i_share)
    totals = {kind: sum(sources[number][1] for other, number in members if other == kind) for kind in kinds}
    if not all(totals.values()):
        raise ValueError("data.weight: one of the sources of every kind must weigh more than 0")
    weights = {(kind, n): shares[kind] * sources[n][1] / totals[kind] for kind, n in members}
    in_blocks = {(kind, n): blocks[n] for kind, n in members if len(blocks[n])}
    return Mix(members, weights, batch, seed, blocks=in_blocks, window=data.window)


def number_of_steps(cfg: DictConfig, sources: Sequence[tuple[Samples, Fraction]]) -> int:
    """Optimiser steps of a training: `train.steps`, or those of `train.epochs` passes over the samples.

    Raises:
        ValueError: neither is given, or there is no such thing as a pass.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.epochs is None:
        raise ValueError("train.steps: how long? give it, or train.epochs")
    if len(sources) > 1 or cfg.data.t2i_share is not None:
        raise ValueError("train.epochs: only for one source without data.t2i_share; give train.steps")
    return math.ceil(cfg.train.epochs * len(sources[0][0]) / cfg.train.batch)


def full_batches(
    sources: Sequence[tuple[Samples, Fraction]], conditioner: Conditioner, cfg: DictConfig
) -> Callable[[int], list[Drawn]]:
    """Batches of whole micro-batches of one bucket each, by step."""
    parts, rest = divmod(cfg.train.batch, cfg.train.micro_batch)
    if rest:
        raise ValueError(f"train.full_batches: batch={cfg.train.batch} is no multiple of {cfg.train.micro_batch}")
    samples = sources[0][0]
    if len(sources) > 1 or not isinstance(samples, list) or cfg.data.t2i_share is not None:
        raise ValueError("train.full_batches: only for trajectories of one source, without data.t2i_share")
    bucket_of, buckets = number_buckets(map(conditioner.bucket, tqdm(samples, desc="sizes")))
    order = BucketBatches(bucket_of, cfg.train.micro_batch, cfg.seed)
    logger.info("%d buckets, %.1f %% of the micro-batches are short", len(buckets), 100 * order.short_share)
    return lambda step: [drawn for part in range(parts) for drawn in order.batch(step, part, parts)]


def read_batches(
    sources: Sequence[tuple[Samples, Fraction]],
    batches: Iterable[list[Drawn]],
    sizes: Sequence[Size],
    workers: int = 0,
    refusals: Refusals | None = None,
) -> Iterator[list[tuple[Drawn, Sample]]]:
    """The drawn samples of every batch; images of a corpus are opened ahead, and bad records left out: a batch may have
    none.
    """
    parts = [s if isinstance(s, list) else Mapped(s, partial(fit_target, sizes=sizes)) for s, _ in sources]
    if all(isinstance(part, list) for part in parts):
        workers = 0
    yield from read_ahead(ConcatDataset(parts), batches, workers=workers, refusals=refusals)
