"""The engine in its own process, with the embedded model, over the real socket pair.

Promises: every submitted request ends with a finish or an error of the tree; closing the iterator aborts; a killed
engine fails everything at once and nothing hangs; a bad folder is a clear start-up error; nothing is left behind.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.requests import make_request

from isthmus import worker
from isthmus.config import Settings
from isthmus.contracts.errors import Draining, EngineFailed, InvalidInput, ModelInvalid, Overloaded, TooLarge
from isthmus.contracts.events import Finish, RequestOutput
from isthmus.contracts.requests import Work
from isthmus.execution.inference.client import EngineProcess
from isthmus.execution.inference.settings import EngineSettings, SchedulerSettings

PROMPT = list(range(40, 90))


def quiet(stage: str, fraction: float) -> None:
    assert 0.0 <= fraction <= 1.0, stage


@asynccontextmanager
async def engine(**scheduler: int) -> AsyncIterator[EngineProcess]:
    settings = EngineSettings(
        model=str(Settings().model_folder), name="fake", kv_bytes=1 << 24, scheduler=SchedulerSettings(**scheduler)
    )
    process = EngineProcess.spawn(settings, worker.command(None))
    try:
        await process.ready(quiet)
        yield process
    finally:
        await process.close()


async def collect(process: EngineProcess, request_id: str, **kwargs: object) -> list[RequestOutput]:
    request = make_request(request_id, PROMPT, **kwargs)  # type: ignore[arg-type]
    return [output async for output in process.submit(request)]


def run(body: Callable[[EngineProcess], Awaitable[None]], **scheduler: int) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            async with engine(**scheduler) as process:
                await body(process)

    asyncio.run(main())


def test_outputs_stream_and_end_once_and_reuse_is_reported() -> None:
    async def body(process: EngineProcess) -> None:
        first = await collect(process, "a", max_tokens=6, ignore_eos=True, temperature=0.0)
        second = await collect(process, "b", max_tokens=6, ignore_eos=True, temperature=0.0)
        assert [output.finish for output in first][-1] is Finish.LENGTH
        assert all(output.finish is None for output in first[:-1])
        tokens = [token for output in first for token in output.token_ids]
        assert len(tokens) == 6
        assert tokens == [token for output in second for token in output.token_ids]
        assert first[0].cached_tokens == 0
        assert second[0].cached_tokens == 48

    run(body)


def test_many_requests_at_once_all_end_and_leave_nothing() -> None:
    async def body(process: EngineProcess) -> None:
        results = await asyncio.gather(
            *(collect(process, f"r{n}", max_tokens=n % 7 + 1, seed=n, ignore_eos=True) for n in range(24))
        )
        for number, outputs in enumerate(results):
            assert sum(len(output.token_ids) for output in outputs) == number % 7 + 1
        assert process.stats.blocks_leased == 0
        assert process.stats.running == 0

    run(body, max_running=8)


def test_closing_the_iterator_aborts_the_request() -> None:
    async def body(process: EngineProcess) -> None:
        stream = process.submit(make_request("a", PROMPT, max_tokens=400, ignore_eos=True))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await collect(process, "b", max_tokens=1)
        assert process.stats.aborted == 1
        assert process.stats.blocks_leased == 0

    run(body)


def test_a_killed_engine_fails_every_request_at_once() -> None:
    async def body(process: EngineProcess) -> None:
        tasks = [asyncio.create_task(collect(process, f"r{n}", max_tokens=1500, ignore_eos=True)) for n in range(4)]
        while process.stats.running < 4:
            await asyncio.sleep(0)
        os.kill(process.pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        assert isinstance(await process.failed(), EngineFailed)
        with pytest.raises(EngineFailed):
            await collect(process, "late")

    run(body)


def test_refusals_are_errors_of_the_tree() -> None:
    async def body(process: EngineProcess) -> None:
        with pytest.raises(TooLarge) as too_large:
            async for _ in process.submit(make_request("a", [5] * 5000)):
                pass
        assert too_large.value.field == "prompt"
        stream = process.submit(make_request("b", PROMPT, max_tokens=100, ignore_eos=True))
        await anext(stream)
        with pytest.raises(InvalidInput, match="id"):
            await collect(process, "b")
        waiting = asyncio.create_task(collect(process, "c", max_tokens=3))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as overloaded:
            await collect(process, "d")
        assert overloaded.value.retry_after_s >= 1
        drained = asyncio.create_task(process.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await collect(process, "e")
        await stream.aclose()  # type: ignore[attr-defined]
        assert (await waiting)[-1].finish is not None
        await drained

    run(body, max_running=1, max_waiting=1)


def test_embed_and_prefill() -> None:
    async def body(process: EngineProcess) -> None:
        prefilled = await collect(process, "p", work=Work.PREFILL)
        assert prefilled[-1].finish is Finish.DONE
        embedded = await collect(process, "e", work=Work.EMBED)
        assert embedded[-1].cached_tokens == 48
        assert embedded[-1].hidden is not None
        assert len(embedded[-1].hidden) % 4 == 0

    run(body)


def test_a_resumed_request_goes_on_as_if_never_interrupted() -> None:
    async def body(process: EngineProcess) -> None:
        sampling = {"max_tokens": 12, "seed": 5, "ignore_eos": True, "temperature": 0.9, "presence_penalty": 0.6}
        whole = [token for output in await collect(process, "a", **sampling) for token in output.token_ids]
        rest = await collect(process, "b", output_ids=whole[:5], **sampling)
        assert [token for output in rest for token in output.token_ids] == whole[5:]

    run(body)


def test_a_folder_that_cannot_be_served_is_a_clear_error(tmp_path: Path) -> None:
    async def main() -> None:
        process = EngineProcess.spawn(EngineSettings(model=str(tmp_path / "absent"), name="x"), worker.command(None))
        try:
            with pytest.raises(ModelInvalid, match="absent"):
                await process.ready(quiet)
        finally:
            await process.close()

    asyncio.run(main())
