"""The default backend: TransformerLens 4 for analysis, the shared-parameter Hugging Face model for tokens in bulk.

Booting a `TransformerBridge` rewrites the module tree and turns attention to eager, so it is booted on a twin that
shares the parameters, and only when asked for. Decoding through the Bridge costs 1.3 to 1.6 times plain Hugging Face
on a CPU; so tokens in bulk go through another parameter-sharing twin, with hooks at the same sites. A test holds the
two together.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from npti_interp.backends._kernels import use_fast_linear
from npti_interp.backends._sharing import sharing_twin
from npti_interp.generation import LocalEngine
from npti_interp.models._sites import FFNSites
from npti_interp.models._weights import compute_dtype, execution_device

__all__ = ["TransformerLensBackend"]


class TransformerLensBackend(LocalEngine):
    """TransformerLens in memory.

    Args:
        hf_model: the user's model, which stays untouched.
        tokenizer: its tokenizer.
        sites: its FFN neurons.
        pad_token_id: see `LocalEngine`.
        stop_token_ids: see `LocalEngine`.
    """

    name = "transformer_lens"

    def __init__(
        self, hf_model: nn.Module, tokenizer: Any, sites: FFNSites, pad_token_id: int, stop_token_ids: Sequence[int]
    ) -> None:
        twin = sharing_twin(hf_model)
        use_fast_linear(twin)
        super().__init__(twin, sites, pad_token_id, stop_token_ids)
        self._hf_model, self._tokenizer = hf_model, tokenizer
        self._unbooted = sharing_twin(hf_model)  # made now: later there may be hooks on the model, and those are copied

    @functools.cached_property
    def bridge(self) -> Any:
        """The `TransformerBridge`, booted on its own twin on first use (5 s, mostly importing)."""
        import transformers

        twin = sharing_twin(self._unbooted)
        if not getattr(twin.config, "architectures", None):
            twin.config.architectures = [type(self._hf_model).__name__]
        verbosity = transformers.logging.get_verbosity()  # importing TransformerLens silences the library
        try:
            from transformer_lens.model_bridge import TransformerBridge

            return TransformerBridge.boot_transformers(
                str(getattr(self._hf_model.config, "_name_or_path", "") or type(self._hf_model).__name__),
                hf_model=twin,
                tokenizer=copy.deepcopy(self._tokenizer),  # TransformerLens gives it missing special tokens
                device=execution_device(self._hf_model),
                dtype=compute_dtype(self._hf_model),
            )
        finally:
            transformers.logging.set_verbosity(verbosity)
