"""The product as a stranger meets it: `isthmus serve` with the embedded model and the official OpenAI client."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from tests.support.server import Served, serve

CHAT = [{"role": "user", "content": "Hello, who are you?"}]
MAX_MEMORY_MIB = 1024


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat_answers_and_streaming_gives_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="isthmus", messages=CHAT, max_tokens=24, temperature=0)
    text = whole.choices[0].message.content
    assert text
    parts = client.chat.completions.create(
        model="isthmus",
        messages=CHAT,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_repeated_prompt_is_served_from_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about " + "blocks and trees " * 30}]
    ask = {"model": "isthmus", "messages": messages, "max_tokens": 1}
    client.chat.completions.create(**ask)
    again = client.chat.completions.create(**ask)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached > 0.8 * again.usage.prompt_tokens


def test_n_seed_logprobs_and_stop(client: openai.OpenAI) -> None:
    ask = {"model": "isthmus", "messages": CHAT, "max_tokens": 12, "temperature": 1.0, "seed": 11, "n": 3}
    first = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    second = client.chat.completions.create(**ask)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    logprobs = first.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)
    plain = client.completions.create(model="isthmus", prompt="One two three", max_tokens=30, temperature=0)
    text = plain.choices[0].text
    stop = text[5:8]
    cut = client.completions.create(model="isthmus", prompt="One two three", max_tokens=30, temperature=0, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_explain_says_what_happened(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="isthmus", messages=CHAT, max_tokens=4, seed=3)
    command = [sys.executable, "-m", "isthmus.cli.main", "explain", answer.id, "--state-dir", str(served.state)]
    while served.metric("isthmus_lineage_written_total") < 1:
        httpx.get(f"{served.url}/health")
    for _ in range(200):
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if result.returncode == 0:
            break
    assert result.returncode == 0, result.stderr
    assert answer.id in result.stdout
    assert "isthmus" in result.stdout


def test_logs_hold_no_content(served: Served, client: openai.OpenAI) -> None:
    canary = "xylophonic-canary-93117"
    client.chat.completions.create(model="isthmus", messages=[{"role": "user", "content": canary}], max_tokens=4)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="isthmus", messages=[{"role": canary, "content": canary}])
    assert canary not in served.log
    assert canary.encode() not in (served.state / "journal.db").read_bytes()


def test_all_processes_together_stay_under_a_gibibyte(served: Served) -> None:
    parent = psutil.Process(served.process.pid)
    sizes = [process.memory_full_info().pss / 2**20 for process in [parent, *parent.children(recursive=True)]]
    assert sum(sizes) < MAX_MEMORY_MIB, sizes


def test_a_client_that_goes_away_frees_the_engine(served: Served) -> None:
    body = {"model": "isthmus", "prompt": "again", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    before = served.metric("isthmus_engine_aborted_total")
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    for _ in range(500):
        httpx.post(f"{served.url}/v1/completions", json={"model": "isthmus", "prompt": "a", "max_tokens": 1})
        if served.metric("isthmus_engine_aborted_total") > before:
            break
    assert served.metric("isthmus_engine_aborted_total") == before + 1
    assert served.metric("vllm:num_requests_running") == 0
    assert served.metric("isthmus_blocks_leased") == 0


def test_sigterm_under_load_loses_no_accepted_request(tmp_path: Path) -> None:
    """Every connection whose request was accepted gets its whole answer; later ones are refused, not cut."""

    async def load(url: str, server: Served) -> tuple[list[int], list[int]]:
        lengths: list[int] = []
        refused: list[int] = []
        started = asyncio.Event()

        async def one(client: httpx.AsyncClient, number: int) -> None:
            body = {"model": "isthmus", "prompt": f"n{number}", "max_tokens": 60, "ignore_eos": True, "stream": True}
            tokens = 0
            try:
                async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                    if response.status_code == 503:
                        refused.append(number)
                        return
                    assert response.status_code == 200
                    started.set()
                    done = False
                    async for line in response.aiter_lines():
                        done = done or line == "data: [DONE]"
                        tokens += line.startswith("data: {")
                    assert done, "an accepted stream was cut"
                    lengths.append(tokens)
            except httpx.ConnectError:
                refused.append(number)

        async with httpx.AsyncClient(timeout=120) as client:
            tasks = [asyncio.create_task(one(client, number)) for number in range(24)]
            await started.wait()
            code = asyncio.create_task(asyncio.to_thread(server.terminate))
            await asyncio.gather(*tasks)
            assert await code == 0
        return lengths, refused

    with serve(tmp_path) as server:
        lengths, refused = asyncio.run(load(server.url, server))
    assert len(lengths) + len(refused) == 24
    assert len(lengths) > 0


def test_a_second_signal_or_a_dead_engine_is_an_error_exit(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        engines = [
            process
            for process in psutil.Process(server.process.pid).children(recursive=True)
            if "isthmus.worker" in " ".join(process.cmdline())
        ]
        assert len(engines) == 1
        engines[0].kill()
        assert server.process.wait(60) != 0
        assert "engine" in server.log


def test_ready_and_health_and_models(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/ready").status_code == 200
    models = httpx.get(f"{served.url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["isthmus"]


def test_concurrent_mixed_clients_all_get_answers(served: Served) -> None:
    failures: list[str] = []

    def one(number: int) -> None:
        body = {"model": "isthmus", "prompt": f"{number} {'x' * (number * 13)}", "max_tokens": number % 9 + 1}
        response = httpx.post(f"{served.url}/v1/completions", content=json.dumps(body), timeout=120,
                              headers={"content-type": "application/json"})  # fmt: skip
        if response.status_code != 200:
            failures.append(response.text)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
