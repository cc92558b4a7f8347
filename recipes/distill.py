"""Distils a base model into few unguided steps, as the published distilled checkpoints are (stand-in for them on
shapes).

Writes runs/<run>/{config.yaml, metrics.jsonl, checkpoints/, model/}. To resume, run the same command again.
"""

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.order import Order
from clvr_train.models.klein import save_klein
from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import Metrics
from clvr_train.runtime.process import Deferral
from clvr_train.sft.distill import backward_distillation
from recipes._build import build_conditioner, build_klein, is_finished
from recipes._data import caption_samples
from recipes._recipe import recipe, run_folder


@recipe("distill")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg)
    if is_finished(run):
        return
    klein = build_klein(cfg.model, expect="base")
    teacher = build_klein(cfg.model, expect="base").transformer
    samples = caption_samples(cfg.data.captions, cfg.data.seed, cfg.data.kinds)
    conditioner = build_conditioner(klein, cfg.model)
    conditioner.prime(samples)
    student = klein.transformer.requires_grad_(True).train()
    engine = Engine(student, lr=cfg.train.lr, total_steps=cfg.train.steps, clip=cfg.train.clip)
    order = Order(len(samples), cfg.train.batch, cfg.seed)
    with Saver(run / "checkpoints") as saver, Deferral() as sigterm:
        resume = engine.steps if engine.resume(saver) else None
        bar = tqdm(desc="distill", initial=engine.steps, total=cfg.train.steps)
        with Metrics(run, resume, wandb=cfg.logger.wandb) as metrics, bar:
            while engine.steps < cfg.train.steps:
                drawn = order.batch(engine.batches)
                batch = [samples[index] for _, index in drawn]
                loss = backward_distillation(
                    conditioner,
                    teacher,
                    batch,
                    [(cfg.seed, epoch, *sample.key) for (epoch, _), sample in zip(drawn, batch, strict=True)],
                    steps=cfg.train.student_steps,
                    cfg=cfg.train.cfg,
                    substeps=cfg.train.substeps,
                    micro_batch=cfg.train.batch,
                )
                values = engine.step()
                if engine.skipped_in_a_row:
                    continue  # nothing has changed
                bar.update()
                metrics.log(engine.steps, loss=loss, **values)
                ending = sigterm.asked()
                if ending or engine.steps == cfg.train.steps or engine.steps % cfg.train.save_every == 0:
                    engine.save(saver, engine.steps)
                if ending:
                    saver.wait()
                    sigterm.deliver()
    save_klein(klein.folder, student, run / "model", distilled=True, precision=cfg.train.save_precision)


if __name__ == "__main__":
    main()
