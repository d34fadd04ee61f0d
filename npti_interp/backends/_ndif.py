"""nnsight's remote service (NDIF): tasks as jobs, several under way at once, each durable as soon as it is finished.

Everything reduces on the server. Out go prompts and the edits (14 bytes a neuron, 4 an entry of a vector), with the
source of `npti_interp._programs`: the server needs PyTorch and nnsight, not this package. Back come counts, moments and coarse bins
(2 bytes a block and 44 a neuron and job; no activations), tokens, or sums.

A job that fails, is refused or passes its deadline is tried again, later and later, a bounded number of times, and then
reported with its id and the server's words.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn
from tqdm.auto import tqdm

from npti_interp import _programs
from npti_interp._files import library_versions
from npti_interp._secrets import without_key
from npti_interp.activations import ActivationCollector
from npti_interp.backends._jobs import JobStore, task_digest
from npti_interp.backends._nnsight import REPLAY_TOKENS, Task, TaskBackend, quiet
from npti_interp.backends._sharing import sharing_twin
from npti_interp.errors import NonFiniteActivationError, RemoteJobError, RemoteServiceError
from npti_interp.models._sites import FFNSites

__all__ = ["Estimate", "RemoteBackend", "RemoteSettings", "Service", "Traffic", "estimate_locate", "model_key"]

_log = logging.getLogger(__name__)
KEY_VARIABLE = "NDIF_API_KEY"
HOST_VARIABLE = "NDIF_HOST"
_KNOWN_ANEW = 30.0
"""Seconds after which a job that the server knows nothing of is sent again."""


@dataclass(frozen=True)
class RemoteSettings:
    """How jobs are sent.

    Attributes:
        host: the service's address; by default ``$NDIF_HOST``, or what nnsight is configured with.
        rows_per_job: most answers decoded, replayed or scored in one job.
        at_once: jobs under way at the same time.
        deadline: seconds from sending a job until it counts as lost.
        tries: how often a job is sent in all.
        backoff: seconds before the second try; doubled each time, up to a minute.
        poll: seconds between two questions after a job.
        jobs: folder of finished jobs; ``"cache"`` is one in the user's cache folder; None keeps none, so that a run
            which was cut off starts anew.
        trusted: False asks the server to run the code in its sandbox (public services may do so anyway: say it then).
            Decoding is greedy there, and weights cannot be read.
        repo: the checkpoint's name on the service, where it is not the model's.
        revision: its revision.
        here: run jobs in this process instead, serialised and read back as a server would; the model then needs its
            weights. For trying out without a server.
        show: tell before a run how many jobs and bytes it takes at most, and show queued, running and done meanwhile.
    """

    host: str | None = None
    rows_per_job: int = 16
    at_once: int = 4
    deadline: float = 1800.0
    tries: int = 5
    backoff: float = 2.0
    poll: float = 0.5
    jobs: Path | str | None = "cache"
    trusted: bool = True
    repo: str = ""
    revision: str | None = None
    here: bool = False
    show: bool = True

    def __post_init__(self) -> None:
        for name in ("rows_per_job", "at_once", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("deadline", "poll"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if self.backoff < 0:
            raise ValueError(f"backoff must not be negative, got {self.backoff}")


@dataclass
class Traffic:
    """What a backend has sent and received.

    Attributes:
        jobs: jobs sent, retries included.
        reused: jobs whose result was there already.
        retries: jobs sent again.
        bytes_out: request bodies.
        bytes_back: results.
    """

    jobs: int = 0
    reused: int = 0
    retries: int = 0
    bytes_out: int = 0
    bytes_back: int = 0

    def __str__(self) -> str:
        return (
            f"{self.jobs} jobs sent ({self.retries} of them again), {self.reused} known already; "
            f"{self.bytes_out:,} bytes out, {self.bytes_back:,} back"
        )


def model_key(name: str, revision: str | None = None) -> str:
    """The service's name for a checkpoint; said outright, as nnsight would otherwise ask the hub."""
    about = json.dumps({"repo_id": name, "revision": revision, "task": "text-generation"})
    return f"nnsight.modeling.transformers.TransformersModel:{about}"


class Service:
    """The service's front desk: is it there, does it know us, does it have the model, do versions agree.

    Args:
        host: its address; see `RemoteSettings`.

    Raises:
        RemoteServiceError: the address is none.
    """

    def __init__(self, host: str | None = None) -> None:
        from nnsight.schema.config import CONFIG

        self.host = (host or os.environ.get(HOST_VARIABLE) or CONFIG.API.HOST).rstrip("/")
        if not self.host.startswith(("http://", "https://")):
            raise RemoteServiceError(f"{self.host!r} is no address of a service; it starts with http:// or https://")
        self.key = (os.environ.get(KEY_VARIABLE) or CONFIG.API.APIKEY or "").strip()
        if not (self.key.isascii() and (self.key.isprintable() or not self.key)):
            raise RemoteServiceError(f"the key in {KEY_VARIABLE} holds characters that no key has")

    def get(self, path: str, timeout: float = 30.0) -> Any:
        """The service's answer at ``path``.

        Raises:
            RemoteServiceError: it cannot be reached, or refuses.
        """
        import httpx

        try:
            # The headers have no name here: a traceback that shows its frames' locals must not show the key.
            reply = httpx.get(
                f"{self.host}{path}", headers={"ndif-api-key": self.key} if self.key else None,
                timeout=httpx.Timeout(10.0, read=timeout),
            )  # fmt: skip
            reply.raise_for_status()
            return reply.json()
        except httpx.HTTPStatusError as error:
            said = self.scrubbed(error.response.text)[:300]
            failure = f"the service at {self.host} answers {error.response.status_code} to {path}: {said}"
        except (httpx.HTTPError, ValueError) as error:
            failure = (
                f"no NDIF service answers at {self.host} ({type(error).__name__}: {self.scrubbed(str(error))}); is the "
                f"address right (${HOST_VARIABLE}, or host=), and are you connected?"
            )
        # Not raised where it was caught: the library's error holds the request with its key.
        raise RemoteServiceError(failure)

    def scrubbed(self, text: str) -> str:
        """The text without the key (servers have been seen to repeat it) and without signatures of addresses."""
        text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?[signature]", text)
        return without_key(text, self.key)

    def require_key(self) -> None:
        """Raise unless a key is set. It is read from the environment (or nnsight's own configuration), never stored.

        Raises:
            RemoteServiceError: none is set, or the service does not know it.
        """
        if not self.key:
            raise RemoteServiceError(
                f"no key is set for {self.host}; set the environment variable {KEY_VARIABLE} (a service without keys "
                "takes any word)"
            )

    def require_versions(self) -> dict[str, str]:
        """Raise unless client and server run the same nnsight (major and minor) and the same major PyTorch.

        Returns:
            the server's versions.

        Raises:
            RemoteServiceError: they do not agree.
        """
        from importlib.metadata import version

        packages = dict(self.get("/env", 60.0).get("packages", {}))
        theirs = {name: str(packages.get(name, "")) for name in ("nnsight", "torch", "transformers")}
        for name, places in (("nnsight", 2), ("torch", 1), ("transformers", 1)):
            mine = version(name)
            if theirs[name] and mine.split(".")[:places] != theirs[name].split(".")[:places]:
                raise RemoteServiceError(
                    f"{self.host} runs {name} {theirs[name]}, this is {mine}: code sent there would not run as here; "
                    f"install {name}=={theirs[name]}"
                )
        return theirs

    def require_model(self, name: str, revision: str | None = None) -> None:
        """Raise unless the checkpoint is deployed and running.

        Raises:
            RemoteServiceError: it is not; the message lists what is.
        """
        key = model_key(name, revision)
        there: dict[str, str] = {}
        for entry, value in self.get("/status").get("deployments", {}).items():
            # Servers name an entry by the key itself, or put the key after the actor's name.
            own = str(value.get("model_key") or entry.split(":ModelActor:", 1)[-1])
            there[own] = str(value.get("application_state") or value.get("state") or "?")
        if there.get(key, "").upper() not in ("RUNNING", "READY"):
            state = f"is {there[key]} there" if key in there else "is not deployed there"
            others = ", ".join(sorted(_repo(k) for k in there)) or "none"
            raise RemoteServiceError(f"{name} {state} ({self.host}); deployed models: {others}")


def _repo(key: str) -> str:
    try:
        return str(json.loads(key.split(":", 1)[1])["repo_id"])
    except (IndexError, ValueError, KeyError, TypeError):
        return key


@dataclass
class _Job:
    number: int
    digest: str
    backend: Any = None
    sent: float = 0.0
    tries: int = 0
    not_before: float = 0.0
    unknown_since: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What a run costs at most.

    Attributes:
        jobs: jobs.
        bytes_out: what is sent, without the code (some 20 kB a job).
        bytes_back: what comes back.
    """

    jobs: int
    bytes_out: int
    bytes_back: int

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.jobs + other.jobs, self.bytes_out + other.bytes_out, self.bytes_back + other.bytes_back)

    def __str__(self) -> str:
        return f"at most {self.jobs:,} jobs, {_bytes(self.bytes_out)} out, {_bytes(self.bytes_back)} back"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def counting_bytes(n_blocks: int) -> int:
    """Bytes a neuron that a job of counting sends back, uncompressed."""
    return 2 * n_blocks + 8 + 2 * _programs.COARSE_BINS


def estimate_locate(
    n_layers: int,
    d_mlp: int,
    *,
    n_questions: int,
    max_new_tokens: int,
    prompt_tokens: int = 150,
    n_blocks: int = 8,
    rows_per_job: int = RemoteSettings.rows_per_job,
    share: float = 0.05,
) -> Estimate:
    """What locating one trait costs on the service: two poles, each decoded and counted, then a second pass.

    Args:
        n_layers: of the model.
        d_mlp: neurons a layer.
        n_questions: search questions, each answered as both poles.
        max_new_tokens: length of an answer.
        prompt_tokens: length of a prompt.
        n_blocks: question blocks.
        rows_per_job: see `RemoteSettings`.
        share: share of neurons that a pole's second pass is made for.
    """
    neurons = n_layers * d_mlp
    per_pole = -(-n_questions // rows_per_job)
    out = 8 * n_questions * (2 * prompt_tokens + max_new_tokens)
    chosen = int(share * neurons)
    decoding = Estimate(per_pole, out // 2, per_pole * neurons * counting_bytes(n_blocks))
    # The second pass is cut by tokens as well.
    rows = max(1, min(rows_per_job, REPLAY_TOKENS // (prompt_tokens + max_new_tokens)))
    jobs = -(-n_questions // rows)
    second = Estimate(jobs, out // 2 + 12 * chosen * jobs, jobs * chosen * 4 * _programs.FINE_BINS)
    return decoding + decoding + second + second


class RemoteBackend(TaskBackend):
    """Sends tasks to NDIF.

    Args:
        hf_model: the model's skeleton (on the meta device, say): its weights, if any, stay here.
        tokenizer: its tokenizer.
        sites: the model's FFN neurons.
        pad_token_id: see `TaskBackend`.
        stop_token_ids: see `TaskBackend`.
        settings: how jobs are sent.
    """

    reduces = True

    def __init__(
        self,
        hf_model: nn.Module,
        tokenizer: Any,
        sites: FFNSites,
        pad_token_id: int,
        stop_token_ids: Sequence[int],
        settings: RemoteSettings,
    ) -> None:
        import nnsight

        twin = sharing_twin(hf_model)
        super().__init__(sites, twin.config, pad_token_id, stop_token_ids)
        nnsight.register(_programs)
        # The device is said, as nnsight's pipeline would move a skeleton to a real one.
        device = next(twin.parameters()).device
        self.nnsight_model: Any = nnsight.TransformersModel(twin, tokenizer=copy.deepcopy(tokenizer), device=device)
        self.settings = settings
        self.rows_per_task = settings.rows_per_job
        self.sandboxed = not settings.trusted
        self.identity = ""
        """What results depend on beside the task and the place: the model's fingerprint, once it is known."""
        self.dtype = "unknown"
        """Precision of the weights where the jobs run, once it is known."""
        self.traffic = Traffic()
        self._key = model_key(settings.repo, settings.revision)
        self._service = None if settings.here else Service(settings.host)
        versions = self._service.require_versions() if self._service is not None else library_versions()
        self.place: dict[str, Any] = {"host": self._service.host if self._service else "here", "versions": versions}
        """Where jobs run: results of one place are never taken for those of another."""
        cache = Path(platformdirs.user_cache_dir("npti_interp")) / "jobs"
        self._store = JobStore(cache if settings.jobs == "cache" else Path(settings.jobs) if settings.jobs else None)

    def rows_within(self, budget: int, rows: Sequence[Any], decoding: Any) -> int:
        """Rows of one job."""
        return self.settings.rows_per_job

    def generate(
        self,
        rows: Sequence[Any],
        interventions: Sequence[Any],
        decoding: Any,
        *,
        collector: ActivationCollector | None = None,
        max_rows: int = 64,
        progress: Any = None,
    ) -> list[list[int]]:
        """See `LocalEngine.generate`; a job never has more rows than the settings allow."""
        most = min(max_rows, self.settings.rows_per_job)
        if collector is not None and most * decoding.max_new_tokens > 65_535:
            raise ValueError(
                f"a job counts at most 65,535 tokens, and {most} answers of {decoding.max_new_tokens} may be more; set "
                "rows_per_job lower"
            )
        return super().generate(rows, interventions, decoding, collector=collector, max_rows=most, progress=progress)

    # -- one job -------------------------------------------------------------------------------------------------

    def _client(self, job_id: str | None = None) -> Any:
        assert self._service is not None
        return _client_class()(self, self._service, self._key, job_id)

    def _send(self, name: str, task: Task, job: _Job) -> None:
        job.tries += 1
        job.sent, job.unknown_since = time.monotonic(), None
        job.backend = self._client()
        self.traffic.jobs += 1
        self.traffic.retries += job.tries > 1
        submit(self.nnsight_model, name, task, job.backend)
        self._store.note(job.digest, job.backend.job_id)

    def probe(self, names: Sequence[str], count: int) -> dict[str, torch.Tensor] | None:
        """Evenly spaced entries of the named parameters, for the fingerprint.

        Returns:
            their bits; None where the server runs code in a sandbox, in which weights cannot be read.

        Raises:
            RemoteJobError: the job failed.
        """
        found: dict[str, torch.Tensor] = {}

        def done(_number: int, result: Task) -> None:
            found.update(result["samples"])
            self.dtype = result["dtype"]

        store, self._store = self._store, JobStore(None)  # what is deployed under a name may have changed
        try:
            self._run("probe", [{"names": list(names), "count": count}], None, done)
        except RemoteJobError as error:
            if "meta tensor" not in str(error) and "device meta" not in str(error):
                raise
            _log.warning("the server's sandbox lets no weights be read: the model is known by its name alone")
            return None
        finally:
            self._store = store
        return found

    @property
    def known_as(self) -> str:
        """The checkpoint's name and revision: its identity where weights cannot be read."""
        return f"named {self.settings.repo}@{self.settings.revision or 'main'}"

    def _estimate(self, name: str, tasks: Sequence[Task]) -> Estimate:
        neurons = self._sites.n_layers * self._sites.d_mlp
        out = back = 0
        for task in tasks:
            tokens = sum(map(len, task["prompts"])) + sum(map(len, task.get("answers", [])))
            plan = task.get("plan", {"neurons": {}, "vectors": {}})
            edited = sum(len(columns[0]) for columns in plan["neurons"].values())
            added = sum(vectors.numel() for own in plan["vectors"].values() for _, vectors in own.values())
            out += 8 * tokens + 14 * edited + 4 * added
            rows = len(task["prompts"])
            if name == "decode":
                back += 8 * rows * task["decoding"]["max_new_tokens"]
            if (blocks := task.get("n_blocks", 0)) and task.get("want", "counts") == "counts":
                back += neurons * counting_bytes(blocks)
            if task.get("want") == "windows":
                chosen = sum(len(own) for own, _ in task["chosen"].values())
                out, back = out + 12 * chosen, back + 4 * chosen * _programs.FINE_BINS
            if task.get("want") == "read":
                places = tokens if task["at"] == "every" else rows
                back += 4 * places * self._sites.n_layers * self._sites.width(task["site"])
            if name == "score":
                back += 8 * rows
            if name == "logits":
                back += 4 * rows * int(self._config.vocab_size)
        return Estimate(len(tasks), out, back)

    # -- many ----------------------------------------------------------------------------------------------------

    def _run(
        self, name: str, tasks: Sequence[Task], collector: ActivationCollector | None, done: Callable[[int, Task], None]
    ) -> None:
        # Results are handed on in the tasks' order, so that sums come out alike whichever job ends first.
        results: dict[int, Task] = {}
        handed = 0

        def finish(job: _Job, result: Task, *, keep: bool) -> None:
            nonlocal handed
            if keep:
                self._store.keep(job.digest, result)
            results[job.number] = result
            while handed in results:
                done(handed, results.pop(handed))
                handed += 1

        waiting: list[_Job] = []
        about = [self._key, self.identity, self.dtype, self.place, self.sandboxed, _program_source()]
        for number, task in enumerate(tasks):
            job = _Job(number, task_digest(name, task, about))
            known = self._store.load(job.digest)
            if known is not None:
                self.traffic.reused += 1
                finish(job, known, keep=False)
            else:
                waiting.append(job)
        if waiting and name != "probe" and self.settings.show:
            tqdm.write(f"{name}: {self._estimate(name, [tasks[job.number] for job in waiting])}")
        if self.settings.here:
            for job in waiting:
                self.traffic.jobs += 1
                try:
                    with quiet():
                        result = run_here(self.nnsight_model, name, tasks[job.number])
                except Exception as error:
                    raise self._final(job, str(error)) from error
                finish(job, result, keep=True)
            return
        under_way: list[_Job] = []
        for job in list(waiting):
            if job_id := self._store.under_way(job.digest):
                job.backend, job.sent, job.tries = self._client(job_id), time.monotonic(), 1
                waiting.remove(job)
                under_way.append(job)
        bar = tqdm(total=len(tasks), initial=handed, desc=f"{name} jobs", leave=False, disable=not self.settings.show)
        with bar:
            self._loop(name, tasks, waiting, under_way, finish, bar)

    def _loop(
        self, name: str, tasks: Sequence[Task], waiting: list[_Job], under_way: list[_Job], finish: Any, bar: Any
    ) -> None:
        while waiting or under_way:
            now = time.monotonic()
            for job in list(waiting):
                if len(under_way) < self.settings.at_once and job.not_before <= now:
                    waiting.remove(job)
                    failed = None
                    try:
                        self._send(name, tasks[job.number], job)
                        under_way.append(job)
                    except Exception as error:
                        failed = self._again(job, waiting, error)
                    if failed is not None:
                        raise failed
            for job in list(under_way):
                result = failed = None
                try:
                    result = self._ask(job)
                except Exception as error:
                    under_way.remove(job)
                    self._store.forget(job.digest)
                    failed = self._again(job, waiting, error)
                # Not raised where it was caught: the library's error holds the request with its key.
                if failed is not None:
                    raise failed
                if result is not None:
                    under_way.remove(job)
                    finish(job, result, keep=True)
                    bar.update(1)
            running = sum(job.backend.state == "running" for job in under_way)
            bar.set_postfix_str(f"{len(waiting)} waiting, {len(under_way) - running} queued, {running} running")
            if waiting or under_way:
                time.sleep(self.settings.poll)

    def _ask(self, job: _Job) -> Task | None:
        """A job's result, or None while it is under way.

        Raises:
            RemoteJobError: it failed or passed its deadline.
        """
        import httpx

        try:
            result = job.backend.poll()
        except httpx.HTTPError as error:  # the service may come back: the deadline decides
            if isinstance(error, httpx.HTTPStatusError):
                status = error.response.status_code
                if 400 <= status < 500 and status not in (408, 429):  # a stale address, a key that was revoked
                    raise RemoteJobError(f"the service answers {status}: {error}") from error
            if time.monotonic() - job.sent > self.settings.deadline:
                raise RemoteJobError(f"the service stopped answering: {error}") from error
            return None
        if result is not None:
            return result["result"]
        if job.backend.unknown:
            job.unknown_since = job.unknown_since or time.monotonic()
            if time.monotonic() - job.unknown_since > _KNOWN_ANEW:
                raise RemoteJobError(f"the server knows nothing of job {job.backend.job_id}")
        else:
            job.unknown_since = None
        if time.monotonic() - job.sent > self.settings.deadline:
            raise RemoteJobError(
                f"job {job.backend.job_id} passed its deadline of {self.settings.deadline:g} s; it was {job.backend.state}"
            )
        return None

    def _again(self, job: _Job, waiting: list[_Job], error: Exception) -> Exception | None:
        """Put a job back, to be sent again later; or say what to give up with."""
        said = str(error).strip() or type(error).__name__
        said = self._service.scrubbed(said) if self._service is not None else said
        hopeless = "NaN or infinite" in said or "meta tensor" in said
        if hopeless or job.tries >= self.settings.tries:
            return self._final(job, said)
        job.not_before = time.monotonic() + min(60.0, self.settings.backoff * 2 ** (job.tries - 1))
        _log.warning("job %s failed (%s); it is sent again", getattr(job.backend, "job_id", None), _last_line(said))
        waiting.append(job)
        return None

    def _final(self, job: _Job, said: str) -> Exception:
        if "NaN or infinite" in said:
            return NonFiniteActivationError(next(x for x in reversed(said.splitlines()) if "NaN or infinite" in x))
        name = getattr(job.backend, "job_id", None) or "(never accepted)"
        return RemoteJobError(f"job {name} failed {job.tries or 1} times; the server's last words: {said}")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200] if text.strip() else ""


def _program_source() -> str:
    """Results depend on the code that made them."""
    import inspect

    return inspect.getsource(_programs)


# One function a trace: names bound to a finished tracer cannot be sent.


def submit(model: Any, name: str, task: Task, backend: Any) -> None:
    """Send a task without waiting for it."""
    run_task: Any = _programs.run_task
    with model.session(backend=backend):
        result = run_task(model, name, task)
        result.save()


def run_here(model: Any, name: str, task: Task) -> Task:
    """Run a task here, by the way it would take to a server and back."""
    run_task: Any = _programs.run_task
    with model.session(remote="local"):
        result = run_task(model, name, task)
        result.save()
    return result


def _client_class() -> Any:
    """Nnsight's client, silent, that counts bytes and loads nothing but tensors and plain containers."""
    from nnsight.intervention.backends import remote
    from nnsight.intervention.backends.remote import RemoteBackend as Client
    from nnsight.schema.response import Status

    class Counting(Client):
        def __init__(self, owner: RemoteBackend, service: Service, key: str, job_id: str | None) -> None:
            super().__init__(key, host=service.host, api_key=service.key or None, blocking=False, job_id=job_id)
            self.owner = owner
            self.display.enabled = False
            self.unknown = False
            # One reply that hangs must not hold up the others; the library waits 600 s.
            remote._READ_TIMEOUT = min(60.0, owner.settings.deadline)

        @property
        def state(self) -> str:
            return self.status.value.lower() if isinstance(self.status, Status) else "not accepted yet"

        def _serialize(self, tracer: Any) -> bytes:
            blob = super()._serialize(tracer)
            self.owner.traffic.bytes_out += len(blob)
            return blob

        def _post(self, request: Any, blob: bytes) -> Any:
            if not self.owner.settings.trusted:
                envelope = json.dumps({**json.loads(request.metadata()), "trusted": False})
                object.__setattr__(request, "metadata", lambda: envelope)
            return super()._post(request, blob)

        def poll(self, tracer: Any = None) -> Any:
            before, self.status = self.status, None
            result = super().poll(tracer)
            self.unknown = self.status is None and result is None
            self.status = self.status or before
            return result

        def finalize(self, content: bytes) -> Any:
            self.owner.traffic.bytes_back += len(content)
            if self.compress:
                import zstandard

                content = zstandard.ZstdDecompressor().decompress(content)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    return Counting
