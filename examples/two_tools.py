"""An assistant with two tools, over OpenAI's API.

The model decides which tool to call and with which arguments; this program makes the call and hands back the result;
the model answers with it. Run `make serve` first.
"""

import argparse
import json
from collections.abc import Callable

import openai
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

WEATHER = {"Oslo": ("snow", -4), "Lisbon": ("sunny", 24), "Prague": ("rain", 11)}
PRICES = {"lamp": 34, "table": 120, "mirror": 58}
QUESTIONS = ("What is the weather in Lisbon?", "What is the price of the table?")
MAX_ROUNDS = 4


def get_weather(city: str) -> dict[str, object]:
    """The weather in a city."""
    if city not in WEATHER:
        return {"error": f"no weather for {city}"}
    condition, temperature = WEATHER[city]
    return {"condition": condition, "temperature": temperature}


def get_price(article: str) -> dict[str, object]:
    """The price of an article."""
    return {"price": PRICES[article]} if article in PRICES else {"error": f"no article {article}"}


def tool(function: Callable[[str], object], argument: str) -> ChatCompletionToolParam:
    """The description of a tool that takes one string."""
    schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    about = (function.__doc__ or "").rstrip(".")
    return {"type": "function", "function": {"name": function.__name__, "description": about, "parameters": schema}}


TOOLS = {"get_weather": get_weather, "get_price": get_price}
OFFERED = [tool(get_weather, "city"), tool(get_price, "article")]


def ask(client: openai.OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> str:
    """Let the model call tools until it answers; every step is printed and added to `messages`."""
    for _ in range(MAX_ROUNDS):
        answer = client.chat.completions.create(model=model, messages=messages, tools=OFFERED, temperature=0)
        message = answer.choices[0].message
        calls = [call for call in message.tool_calls or [] if call.type == "function"]
        if not calls:
            messages.append({"role": "assistant", "content": message.content or ""})
            return message.content or ""
        messages.append(
            {
                "role": "assistant",
                "content": message.content or "",
                "tool_calls": [call.to_dict() for call in calls],  # type: ignore[typeddict-item]
            }
        )
        for call in calls:
            result = json.dumps(TOOLS[call.function.name](**json.loads(call.function.arguments)))
            print(f"  {call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    raise RuntimeError(f"no answer after {MAX_ROUNDS} rounds of calls")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="what to ask, one after another")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", default="isthmus", help="its model (default: %(default)s)")
    options = parser.parse_args()
    messages: list[ChatCompletionMessageParam] = []
    with openai.OpenAI(base_url=f"{options.url}/v1", api_key="none") as client:
        for question in options.questions:
            print(f"user: {question}")
            messages.append({"role": "user", "content": question})
            print(f"assistant: {ask(client, options.model, messages)}")


if __name__ == "__main__":
    main()
