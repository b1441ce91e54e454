"""Losses over the vocabulary, from hidden states, in chunks of tokens.

Logits exist for ``chunk_tokens`` tokens at a time: the gradients with respect to hidden states and
head are known in closed form, so they are computed in the forward pass, chunk by chunk, and
autograd sees one node. The head's matrix product, the softmax and all sums are float32 (float64 if
the hidden states are): logits rounded to bfloat16 move the gradient of a small KL by a third.

Per token, with teacher p and student q at temperature tau, and gradients with respect to the
student's logits divided by tau:

* ``forward_kl``  KL(p || q), gradient q - p;
* ``reverse_kl``  KL(q || p), gradient q ((log q - log p) - KL(q || p));
* ``jsd``         beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, gradient
  (1 - beta) q ((log q - log m) - KL(q || m)). As in TRL and Liger beta 0 means forward, 1 reverse.

The divergence is multiplied by tau**2, so that its gradient does not shrink with the temperature.

Vocabularies: a student may have more rows in its head than the teacher (padding). Those rows are
left out of the student's softmax, get a zero gradient and have no part in any figure.

Shapes: B rows, L tokens of a row, T counted tokens, D width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Kind = Literal["reverse_kl", "forward_kl", "jsd"]
KINDS: tuple[Kind, ...] = ("reverse_kl", "forward_kl", "jsd")

_DISTILLATION = (
    "reverse_kl",
    "forward_kl",
    "cross_entropy",
    "teacher_cross_entropy",
    "teacher_entropy",
    "top1_agreement",
)
_CROSS_ENTROPY = ("cross_entropy", "top1_accuracy")


class LossOutput(NamedTuple):
    """A loss and what it is made of."""

    loss: torch.Tensor
    """Scalar, float32 (or float64): the sum over tokens divided by ``num_targets``."""

    metrics: dict[str, float]
    """Sums over the counted tokens of this batch, in nats, always at temperature 1;
    ``num_targets`` is their number."""


@dataclass(frozen=True)
class _Options:
    kind: Kind | None
    beta: float
    ce_weight: float
    temperature: float
    chunk_tokens: int
    num_targets: int
    needs_hidden_grad: bool = False
    needs_head_grad: bool = False


def distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_targets: int,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> LossOutput:
    """Divergence between student and teacher, plus a part of cross entropy with the text.

    Args:
        student_hidden: (B, L, D) after the final norm.
        student_head: (V, D); may have more rows than ``teacher_head``, see the module.
        teacher_hidden: (B, L, D') after the teacher's final norm; gets no gradient.
        teacher_head: (V', D'); gets no gradient.
        input_ids: (B, L); position t predicts ``input_ids[:, t + 1]``.
        mask: (B, L - 1) bool, whether position t counts (``PackedBatch.target_mask``).
        num_targets: counted tokens of the global batch (all micro-batches and ranks); the losses
            of the parts then add up to that of the whole.
        kind: which divergence.
        beta: ``jsd`` only, from 0 (forward) to 1 (reverse).
        ce_weight: weight of the cross entropy, at temperature 1.
        temperature: divides both logits inside the divergence.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        loss, differentiable with respect to ``student_hidden`` and ``student_head``, and the
        metrics reverse_kl, forward_kl, cross_entropy, teacher_cross_entropy, teacher_entropy,
        top1_agreement and num_targets.

    Raises:
        ValueError: the teacher's vocabulary is larger than the student's, a token id lies outside
            of it, or an option is out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; accepted: {', '.join(KINDS)}.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta} must lie between 0 (forward) and 1 (reverse).")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be > 0.")
    num_teacher, num_student = teacher_head.shape[0], student_head.shape[0]
    if num_teacher > num_student:
        raise ValueError(
            f"vocabulary: the teacher's head has {num_teacher} rows, the student's only "
            f"{num_student}; build the student with vocab_size={num_teacher}."
        )
    if kind == "jsd" and beta in (0, 1):
        # Limits of the family up to a factor; the formula itself is zero at both ends.
        kind = "forward_kl" if beta == 0 else "reverse_kl"
    return _apply(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        input_ids,
        mask,
        _Options(kind, beta, ce_weight, temperature, chunk_tokens, num_targets),
    )


def cross_entropy_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_targets: int,
    chunk_tokens: int = 1024,
) -> LossOutput:
    """Cross entropy with the next token, over the whole head.

    Args:
        hidden: (B, L, D) after the final norm.
        head: (V, D).
        input_ids: (B, L); position t predicts ``input_ids[:, t + 1]``.
        mask: (B, L - 1) bool, whether position t counts.
        num_targets: counted tokens of the global batch.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        loss, and the metrics cross_entropy, top1_accuracy and num_targets.

    Raises:
        ValueError: a token id outside of the vocabulary, or an option out of range.
    """
    options = _Options(None, 0.0, 1.0, 1.0, chunk_tokens, num_targets)
    return _apply(hidden, head, None, None, input_ids, mask, options)


def _apply(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    options: _Options,
) -> LossOutput:
    """Picks the counted tokens and runs the autograd function over them."""
    if options.ce_weight < 0 or options.chunk_tokens < 1 or options.num_targets < 0:
        raise ValueError(
            f"ce_weight: {options.ce_weight} must be >= 0, chunk_tokens: {options.chunk_tokens} "
            f"must be >= 1, num_targets: {options.num_targets} must be >= 0."
        )
    expected = (hidden.shape[0], hidden.shape[1] - 1)
    if mask.shape != expected:
        raise ValueError(f"mask: shape {list(mask.shape)}, expected (B, L - 1) = {list(expected)}.")
    targets = input_ids[:, 1:][mask]
    if targets.numel() > 0 and options.num_targets == 0:
        raise ValueError(
            f"num_targets: 0, but the mask counts {targets.numel()} tokens; give the number of "
            "counted tokens of the global batch."
        )
    vocabulary = head.shape[0] if teacher_head is None else teacher_head.shape[0]
    if targets.numel() > 0 and int(targets.max()) >= vocabulary:
        raise ValueError(
            f"input_ids: token {int(targets.max())} lies outside of the vocabulary of "
            f"{vocabulary}; use the tokenizer of this model."
        )
    with_grad = torch.is_grad_enabled()
    options = replace(
        options,
        needs_hidden_grad=with_grad and hidden.requires_grad,
        needs_head_grad=with_grad and head.requires_grad,
    )
    picked = None if teacher_hidden is None else teacher_hidden[:, :-1][mask]
    loss, sums = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1][mask], head, picked, teacher_head, targets, options
    )
    names = _CROSS_ENTROPY if teacher_head is None else _DISTILLATION
    metrics = dict(zip(names, sums.tolist(), strict=True))
    metrics["num_targets"] = float(targets.numel())
    return LossOutput(loss, metrics)


class _ChunkedLoss(torch.autograd.Function):
    """Loss, sums of metrics and, already in the forward pass, the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_head: torch.Tensor | None,
        targets: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: (T, D), (V, D), (T, D'), (V', D'), (T,). Returns: loss, sums of metrics."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Autocast would compute the products in bfloat16 whatever the operands are.
        with torch.autocast(hidden.device.type, enabled=False):
            vocabulary = head.shape[0] if teacher_head is None else teacher_head.shape[0]
            weight = head[:vocabulary].to(dtype)
            teacher_weight = None if teacher_head is None else teacher_head.to(dtype)
            scale = 1.0 / max(options.num_targets, 1)
            num_sums = len(_CROSS_ENTROPY if teacher_head is None else _DISTILLATION)
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            sums = torch.zeros(num_sums, dtype=torch.float64, device=hidden.device)
            grad_hidden = grad_head = None
            if options.needs_hidden_grad:
                grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
            if options.needs_head_grad:
                grad_head = torch.zeros(head.shape, dtype=dtype, device=hidden.device)
            for low in range(0, hidden.shape[0], options.chunk_tokens):
                part = slice(low, low + options.chunk_tokens)
                states = hidden[part].to(dtype)
                logits = states @ weight.T
                if teacher_hidden is None or teacher_weight is None:
                    loss, figures, grad = _cross_entropy(logits, targets[part], options)
                else:
                    teacher_logits = teacher_hidden[part].to(dtype) @ teacher_weight.T
                    loss, figures, grad = _divergence(
                        logits, teacher_logits, targets[part], options
                    )
                    del teacher_logits
                del logits
                total += loss
                sums += figures
                if grad is None:
                    continue
                grad *= scale
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[part])
                if grad_head is not None:
                    grad_head[:vocabulary].addmm_(grad.T, states)
                del grad  # else it lives on beside the next chunk
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = (hidden.dtype, head.dtype)
        ctx.mark_non_differentiable(sums)
        return (total * scale).to(dtype), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales the gradients found in the forward pass."""
        grad_hidden, grad_head = ctx.saved_tensors
        grads = [
            None if grad is None else (grad * grad_outputs[0]).to(dtype)
            for grad, dtype in zip((grad_hidden, grad_head), ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None)


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, options: _Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sum of the loss, sums of the metrics, gradient of the sum with respect to the logits."""
    is_top = logits.argmax(-1) == targets
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(1, targets[:, None]).sum(dtype=torch.float64)
    grad = None
    if options.needs_hidden_grad or options.needs_head_grad:
        grad = log_q.exp_()
        grad[torch.arange(len(targets), device=grad.device), targets] -= 1
    return loss, torch.stack([loss, is_top.sum(dtype=torch.float64)]), grad


def _divergence(
    logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, options: _Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As ``_cross_entropy``, for a student and a teacher."""
    needs_grad = options.needs_hidden_grad or options.needs_head_grad
    log_q, log_p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    index = targets[:, None]
    gap = log_q - log_p
    reverse = (q * gap).sum(-1)
    forward = -(p * gap).sum(-1)
    cross_entropy = -log_q.gather(1, index)
    figures = torch.stack(
        [
            reverse.sum(dtype=torch.float64),
            forward.sum(dtype=torch.float64),
            cross_entropy.sum(dtype=torch.float64),
            -log_p.gather(1, index).sum(dtype=torch.float64),
            -(p * log_p).sum(-1).sum(dtype=torch.float64),
            (logits.argmax(-1) == teacher_logits.argmax(-1)).sum(dtype=torch.float64),
        ]
    )
    grad = None
    if options.ce_weight > 0 and needs_grad:
        grad = q.clone()
        grad[torch.arange(len(targets), device=grad.device), targets] -= 1
        grad *= options.ce_weight
    tau = options.temperature
    if tau != 1:
        log_q, log_p = (logits / tau).log_softmax(-1), (teacher_logits / tau).log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        gap = log_q - log_p
        reverse = (q * gap).sum(-1)
        forward = -(p * gap).sum(-1)
    if options.kind == "forward_kl":
        divergence = forward
        slope = q.sub_(p) if needs_grad else None
    elif options.kind == "reverse_kl":
        divergence = reverse
        slope = gap.sub_(reverse[:, None]).mul_(q) if needs_grad else None
    else:
        beta = options.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        teacher_part = (p * (log_p - log_m)).sum(-1)
        gap = log_q - log_m
        student_part = (q * gap).sum(-1)
        divergence = beta * teacher_part + (1 - beta) * student_part
        slope = None
        if needs_grad:
            slope = gap.sub_(student_part[:, None]).mul_(q).mul_(1 - beta)
    loss = divergence.sum(dtype=torch.float64) * tau**2
    loss = loss + options.ce_weight * cross_entropy.sum(dtype=torch.float64)
    if slope is not None:
        grad = slope.mul_(tau) if grad is None else grad.add_(slope, alpha=tau)
    return loss, figures, grad
