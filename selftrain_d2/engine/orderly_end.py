"""How a training run ends that failed."""

from __future__ import annotations

import logging

from detectron2.engine import TrainerBase, hooks

logger = logging.getLogger(__name__)

# They evaluate and save what training ended with; at a failure in the last step they take it for finished.
_AFTER_SUCCESS = (hooks.EvalHook, hooks.BestCheckpointer)


class OrderlyEnd(TrainerBase):
    """A trainer whose hooks end a failed run without a result, and without hiding why it failed.

    detectron2 calls ``after_train`` after a failure as well. Writers then write what they have and close; nothing is
    evaluated, and what a hook raises is logged: the first exception is the one to be seen. To be put in front of a
    trainer of detectron2 among the bases of a class.
    """

    @property
    def finished(self) -> bool:
        """Whether the last step is done, of a run that had none to do as well."""
        return self.iter >= max(self.max_iter, self.start_iter + 1)

    def after_train(self) -> None:
        if self.finished:
            super().after_train()
            return
        self.storage.iter = self.iter
        for hook in self._hooks:
            if isinstance(hook, _AFTER_SUCCESS):
                continue
            try:
                hook.after_train()
            except Exception as error:
                logger.info(f"After the failure {type(hook).__name__} failed too: {error!r}")
