"""Questions about a text, answered from it, over Anthropic's API.

The text is the start of the conversation and stays in it, so the server computes it once: from the second question on
its state is reused (`cached` below). What the text does not say is said so: most often, the model is very small. Run
`make serve` first.
"""

import argparse
from pathlib import Path

import anthropic
from anthropic.types import MessageParam

TEXT = Path(__file__).with_name("harbour.txt")
QUESTIONS = (
    "Where does Greta Larsen live?",
    "What is the job of Greta Larsen?",
    "When was Martin born?",
    "Which instrument does Martin play?",
    "Who is Greta Larsen married to?",
)
MAX_BYTES = 64 * 1024


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="what to ask, one after another")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text (default: harbour.txt)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", default="isthmus", help="its model (default: %(default)s)")
    options = parser.parse_args()
    with options.text.open(encoding="utf-8") as file:
        text = file.read(MAX_BYTES).strip()
    messages: list[MessageParam] = []
    with anthropic.Anthropic(base_url=options.url, api_key="none") as client:
        for number, question in enumerate(options.questions):
            asked = f"{text}\n\n{question}" if number == 0 else question
            messages.append({"role": "user", "content": asked})
            # The newest clients have no argument for it, servers like this one do.
            greedy = {"temperature": 0}
            answer = client.messages.create(model=options.model, max_tokens=64, messages=messages, extra_body=greedy)
            said = "".join(block.text for block in answer.content if block.type == "text")
            messages.append({"role": "assistant", "content": said})
            usage = answer.usage
            cached = usage.cache_read_input_tokens or 0
            print(f"user: {question}")
            print(f"assistant: {said}    (prompt {usage.input_tokens + cached} tokens, {cached} cached)")


if __name__ == "__main__":
    main()
