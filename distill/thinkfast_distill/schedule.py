"""Learning rate as a function of the step alone, so that a resumed run needs no scheduler state.

``wsd`` is warm-up, constant, linear decay (MOHAWK's choice); ``cosine`` is the usual one
(MambaInLlama, M1). Steps count from 0 within the stage: every stage has its own schedule.
"""

import math

from thinkfast_distill.config import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """Rate of one optimizer step.

    Args:
        stage: its ``lr``, ``schedule``, fractions and number of steps.
        step: 0 for the first step of the stage.
    """
    return stage.lr * _factor(stage, step)


def _factor(stage: StageConfig, step: int) -> float:
    total = stage.num_steps
    warmup = math.ceil(stage.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)  # the first step moves, the first after warm-up is full
    floor = stage.min_lr_ratio
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "cosine":
        progress = (step - warmup) / max(total - warmup, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = math.ceil(stage.decay_fraction * total)
    into_decay = step - (total - decay)
    if into_decay < 0:
        return 1.0
    # (decay - i) / (decay + 1) would waste the last step at exactly the floor.
    return floor + (1 - floor) * (decay - into_decay) / (decay + 1)
