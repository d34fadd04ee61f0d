"""Answers from an engine that decodes fast but cannot be hooked, for the hooked model to replay.

What `locate` needs of a model are the values at the tokens of its answers, and a causal model gives the same values when
it is fed an answer as when it wrote it. So the slow part, decoding, may be done by vLLM, and the values are read here in
one teacher-forced pass over the finished answers: ``locate(..., generator=ServedGenerator(model, url))``.

Three things make this exact. *Tokens*, never text, cross in both directions: prompts are encoded by this model's chat
template and checked on their way back, answers return as the ids that were decoded, with the token that ended them.
*Every setting is sent*, as a server fills what is left out from the model's ``generation_config.json``. *It is the same
model*: before anything is asked, what the engine says of a few prompts (its tokens, and their probabilities) is
compared with what this model says.

`ServedGenerator` asks a vLLM server, which needs no environment in common with this package; `VLLMGenerator` runs vLLM
in this process (``pip install npti-interp[vllm]``). The server is started with, for example,
``vllm serve MODEL --dtype float32 --served-model-name NAME``. In the model's own precision the answers are those of
`Model.generate` but for near-ties, which different kernels break differently. The statistics are exact either way: they
are those of the answers that were given.

Neither can edit neurons: steering stays with `Model.generate`.
"""

from npti_interp.serving._base import Agreement, Generator
from npti_interp.serving._served import ServedGenerator
from npti_interp.serving._vllm import VLLMGenerator

__all__ = ["Agreement", "Generator", "ServedGenerator", "VLLMGenerator"]
