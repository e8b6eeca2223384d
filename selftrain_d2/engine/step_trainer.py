"""The training step: gradient accumulation, mixed precision, and losses that are not finite."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selftrain_d2.engine.hooks.loss_normalizer import model_of
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.norm import single_values_explained
from selftrain_d2.modeling.meta_arch.by_source import LABEL_SOURCES, by_source, pseudo_labels_in_words
from selftrain_d2.modeling.meta_arch.classification import CLASSIFICATION, CLASSIFICATION_LOSS

logger = logging.getLogger(__name__)


#: Batches saved in a run that leaves steps out: each file holds the model as well.
MAX_SAVED_BATCHES = 3


class NonFiniteLossError(FloatingPointError):
    """A training loss was NaN or infinite; the message says where and what may help."""


class StepTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer and AMPTrainer in one, with gradient accumulation and a guard.

    The model is one with :class:`~selftrain_d2.modeling.meta_arch.LossesBySource`.

    A loss or a gradient that is NaN or infinite, in any process, never reaches the weights: the step is left out, up
    to ``max_skipped_steps`` of them in a run, and the next one raises :class:`NonFiniteLossError` with the step,
    the source of the labels, the image files, and the file where the batch was saved (see
    :mod:`~selftrain_d2.engine.replay`). In float16 gradients are the gradient scaler's business: it leaves out steps
    of infinite ones itself, as it does in every run until its scale fits.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer.
        accumulation_steps: each batch of the loader is split into as many parts, each with its share of human
            and of pseudo images, which pass through the model one after the other and make one step together:
            the step of the whole batch, but for batch norm, which sees a part at a time.
        precision: ``torch.float16`` (with a gradient scaler) or ``torch.bfloat16`` for mixed precision; None
            for float32.
        max_skipped_steps: steps of the run that may be left out.
        save_batch: called with a batch and its losses (name to value) before a step is left out or the run
            stops, in each process whose losses are not finite; returns the file written, for the log.

    Attributes:
        prepare_batch: makes of each batch of the loader the one to learn from.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int = 1,
        precision: torch.dtype | None = None,
        max_skipped_steps: int = 0,
        save_batch: Callable[[list[dict], dict[str, float]], str] | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulation_steps = accumulation_steps
        self.precision = precision
        self.max_skipped_steps = max_skipped_steps
        self.save_batch = save_batch
        self.prepare_batch: Callable[[list[dict]], list[dict]] = _as_it_is
        self.skipped_steps = 0
        device = next(model.parameters()).device.type
        self.grad_scaler = _grad_scaler(device, enabled=precision is torch.float16)

    def run_step(self) -> None:
        """One step of the optimizer, unless a loss is not finite."""
        model = model_of(self)
        assert self.model.training, "The model was changed to evaluation mode."
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        batch = self.prepare_batch(batch)

        positive_anchor_averages = dict(getattr(model, "positive_anchor_averages", {}))
        # Batch norm's running statistics would keep a NaN for ever.
        buffers = [b.clone() for b in model.buffers()] if self.max_skipped_steps else []
        self.optimizer.zero_grad()
        losses = self._forward_and_backward(batch)
        if not self._finite_everywhere(losses):  # before any hook or checkpoint sees the gradients
            model.positive_anchor_averages = positive_anchor_averages
            self._leave_out(batch, losses, buffers)
            return
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)  # plain optimizer.step() without float16
        self.grad_scaler.update()

    def _forward_and_backward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Gradients of a batch; its losses, weighted."""
        if self.accumulation_steps == 1:
            return self._pass(batch)
        parts = split_batch(batch, self.accumulation_steps)
        passes = []
        with model_of(self).one_step(parts):
            for number, part in enumerate(parts, start=1):
                last = number == len(parts)
                # Gradients are reduced over processes once, in the last pass.
                waiting = isinstance(self.model, DistributedDataParallel) and not last
                with self.model.no_sync() if waiting else contextlib.nullcontext():
                    passes.append(self._pass(part))
        return {name: sum(losses[name] for losses in passes) for name in passes[0]}

    def _pass(self, batch: list[dict]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device.type
        autocast = torch.autocast(device, self.precision, enabled=self.precision is not None)
        with autocast, single_values_explained():
            losses = self.model(batch)
        losses = {name: loss / self.accumulation_steps for name, loss in losses.items()}
        self.grad_scaler.scale(sum(losses.values())).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    # ---- losses that are not finite -------------------------------------------------------------

    def _finite_everywhere(self, losses: dict[str, Tensor]) -> bool:
        """Whether all losses and gradients of every process are finite: all processes must go the same way."""
        values = [torch.stack([loss.double() for loss in losses.values()]).sum()]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not self.grad_scaler.is_enabled():
            # The largest absolute value of each: a few kernels for all, and one number to wait for.
            largest = torch._foreach_norm(gradients, float("inf"))
            values.append(torch.stack([x.double() for x in largest]).sum())
        total = torch.stack(values).sum()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        return math.isfinite(total.item())

    def _leave_out(self, batch: list[dict], losses: dict[str, Tensor], buffers: list[Tensor]) -> None:
        model = model_of(self)
        gradients = self._gradients_in_words()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers):
                buffer.copy_(before)
        # Files are saved by the processes concerned; every process raises, so that none waits for another, and all say
        # the same: a launcher passes on what one of them says.
        values = {name: loss.item() for name, loss in losses.items()}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        losses_are_finite = not any(comm.all_gather(bool(wrong)))
        # Gradients are those of all processes together: where only they are wrong, any batch may be the cause.
        report = self._describe(batch, values, wrong) if wrong or losses_are_finite else ""
        report = "; ".join(filter(None, comm.all_gather(report)))
        what = "A loss is not finite"
        if losses_are_finite:
            what = f"The losses are finite, but gradients are not ({gradients})"
        poisoned = not all(torch.isfinite(p).all() for p in model.parameters())
        self.skipped_steps += 1
        if poisoned:
            report += (
                "; the weights were not finite already: start from others, or resume from a checkpoint before this "
                "step"
            )
        if poisoned or self.skipped_steps > self.max_skipped_steps:
            raise NonFiniteLossError(f"{what} {report}.")
        logger.warning(
            f"{what} {report}. The step is left out ({self.skipped_steps} of "
            f"{self.max_skipped_steps} that SOLVER.MAX_SKIPPED_STEPS allows)."
        )
        model.raw_losses = dict.fromkeys(LABEL_SOURCES)  # for LossNormalizer: nothing to learn from this step
        get_event_storage().put_scalar("skipped_steps", self.skipped_steps, smoothing_hint=False)

    def _gradients_in_words(self) -> str:
        """Names of weights whose gradients are not finite, for a message."""
        names = [
            name
            for name, p in model_of(self).named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        return f"of {len(names)} weights, e.g. {names[0]}" if names else "in another process"

    def _describe(self, batch: list[dict], values: dict[str, float], wrong: list[str]) -> str:
        """Where and of which images, for a message."""
        raw = model_of(self).raw_losses
        sources = [s for s in LABEL_SOURCES if raw[s] is not None and not math.isfinite(raw[s].item())]
        sources += [CLASSIFICATION] * (CLASSIFICATION_LOSS in wrong)
        files = [
            str(sample.get("file_name", "?"))
            for sample in batch
            if not sources or sample.get("label_source", "human") in sources
        ]
        # Nearly empty pseudo labels are a cause that is not seen in the losses.
        about_pseudo = raw["pseudo"] is not None and (not wrong or "pseudo" in sources)
        pseudo = f", {pseudo_labels_in_words(model_of(self))}" if about_pseudo else ""
        saved = ""
        if self.save_batch and self.skipped_steps < MAX_SAVED_BATCHES:
            saved = f"; the batch is saved in {self.save_batch(batch, values)}"
        return (
            f"at step {self.iter}, for {' and '.join(sources) or 'all'} labels "
            f"({', '.join(f'{name} {values[name]:.6g}' for name in wrong or values)}{pseudo}). "
            f"Images: {', '.join(files)}{saved}"
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "skipped_steps": self.skipped_steps}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.skipped_steps = state.get("skipped_steps", 0)
        if "grad_scaler" in state and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state["grad_scaler"])


def _as_it_is(batch: list[dict]) -> list[dict]:
    return batch


def _grad_scaler(device: str, enabled: bool) -> torch.amp.GradScaler | torch.cuda.amp.GradScaler:
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device, enabled=enabled)
    # torch before 2.3; only CUDA trains in float16.
    return torch.cuda.amp.GradScaler(enabled=enabled)


def split_batch(batch: list[dict], parts: int) -> list[list[dict]]:
    """Parts of a batch, each with the same number of images of each source.

    Raises:
        InputError: they do not divide.
    """
    split: list[list[dict]] = [[] for _ in range(parts)]
    for source, index in by_source(batch).items():
        if len(index) % parts:
            raise InputError(
                f"A process has {len(index)} {source}-labeled images a step, which do not divide into "
                f"SOLVER.ACCUMULATION_STEPS {parts} parts."
            )
        size = len(index) // parts
        for number, part in enumerate(split):
            part += [batch[i] for i in index[number * size : (number + 1) * size]]
    return split
