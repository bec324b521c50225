"""Single questions with answers known by heart or by a simple rule."""

from __future__ import annotations

import random
from collections.abc import Callable

from training.embedded.extract import Gloss
from training.embedded.recall import digits
from training.embedded.world import World, article, listing, pairs, spin

Turn = tuple[str, str]
Task = Callable[[World, random.Random], Turn]

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer briefly.",
    "You are the small model that ships with Isthmus.",
    "You are a friendly assistant.",
    "Be polite and brief.",
    "You answer questions.",
    "You are an assistant that remembers what it is told.",
)
_GROUPS = ("colours", "animals", "foods", "drinks", "jobs", "hobbies", "instruments", "cities", "months", "days")
_CATEGORY = {"animals": "animal", "foods": "food", "colours": "colour", "cities": "city", "instruments": "instrument"}


def small_talk(world: World, rng: random.Random) -> Turn:
    """A greeting, a thank-you, a question about the model, or the like."""
    intent = rng.choice(world.intents)
    return spin(rng.choice(intent["ask"]), rng), spin(rng.choice(intent["answer"]), rng)


def _meaning(gloss: Gloss) -> str:
    if gloss.part == "noun" and gloss.meaning.startswith(("a ", "an ")):
        return f"{article(gloss.word).capitalize()} is {gloss.meaning}."
    if gloss.part == "verb":
        return f"To {gloss.word} means to {gloss.meaning}."
    return f'The word "{gloss.word}" means {gloss.meaning}.'


def definition(world: World, rng: random.Random) -> Turn:
    """What a common word means; the commonest words come up most often."""
    at = int(len(world.glosses) * rng.random() ** 3)
    gloss = world.glosses[at]
    form = {"noun": article(gloss.word), "verb": f"to {gloss.word}"}.get(gloss.part, gloss.word)
    asked = [
        f'What does "{gloss.word}" mean?',
        f"What does {gloss.word} mean?",
        f"Define {gloss.word}.",
        f'What is the meaning of "{gloss.word}"?',
        f"Explain the word {gloss.word}.",
    ]
    if gloss.part == "noun":
        asked += [f"What is {form}?"] * 5
    return rng.choice(asked), _meaning(gloss)


def known_fact(world: World, rng: random.Random) -> Turn:
    """A question from the list of things known by heart."""
    question = rng.choice(list(world.knowledge["facts"]))
    return question, world.knowledge["facts"][question]


def topic(world: World, rng: random.Random) -> Turn:
    """A short text about a topic."""
    name = rng.choice(list(world.knowledge["topics"]))
    ask = spin("{Tell me about|Tell me something about|What do you know about|Write about|Can you tell me about} ", rng)
    return f"{ask}{name}{'?' if ask.startswith(('What', 'Can')) else '.'}", world.knowledge["topics"][name]


def lookup(world: World, rng: random.Random) -> Turn:
    """Capitals, opposites and the sounds of animals."""
    kind = rng.choice(["capitals", "opposites", "sounds"])
    left, right = rng.choice(pairs(world.knowledge[kind]))
    if kind == "capitals":
        ask = rng.choice(["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."])
        return ask.format(left), f"The capital of {left} is {right}."
    if kind == "opposites":
        left, right = (left, right) if rng.random() < 0.5 else (right, left)
        ask = rng.choice(
            ["What is the opposite of {}?", "What is the opposite of '{}'?", "Tell me the opposite of {}."]
        )
        return ask.format(left), f"The opposite of {left} is {right}."
    ask = rng.choice(["What does {} do?", "What sound does {} make?", "What noise does {} make?"])
    return ask.format(article(left)), f"{article(left).capitalize()} {right}."


def counting(_world: World, rng: random.Random) -> Turn:
    """Counting up or down."""
    first, length = rng.choice([1, 1, 1, rng.randint(0, 40)]), rng.randint(2, 15)
    numbers = [str(n) for n in range(first, first + length)]
    if rng.random() < 0.25:
        numbers.reverse()
    ask = rng.choice(["Count from {} to {}.", "Please count from {} to {}.", "Can you count from {} to {}?"])
    return ask.format(numbers[0], numbers[-1]), ", ".join(numbers) + "."


def spelling(world: World, rng: random.Random) -> Turn:
    """Spelling a word letter by letter."""
    word = world.pick(rng, rng.choice(["common", "names", "animals"]))
    ask = rng.choice(["Spell {}.", "How do you spell {}?", 'Spell the word "{}".', "Please spell {}."])
    return ask.format(word), "-".join(word) + "."


def naming(world: World, rng: random.Random) -> Turn:
    """A few things of one kind."""
    group, count = rng.choice(_GROUPS), rng.choice([2, 3, 3, 3, 4, 5])
    chosen = rng.sample(world.words[group], count)
    word = ["", "", "two", "three", "four", "five"][count]
    ask = rng.choice(["Name {} {}.", "Tell me {} {}.", "Give me {} {}.", "List {} {}.", "Can you name {} {}?"])
    answer = listing(chosen)
    return ask.format(word, group), answer[0].upper() + answer[1:] + "."


def sums(_world: World, rng: random.Random) -> Turn:
    """Adding and subtracting small numbers."""
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.7:
        sign, word, result = "+", "plus", left + right
    else:
        left, right = max(left, right), min(left, right)
        sign, word, result = "-", "minus", left - right
    shown = rng.choice([sign, word])
    ask = rng.choice(["What is {} {} {}?", "How much is {} {} {}?", "Calculate {} {} {}."])
    return ask.format(left, shown, right), f"{left} {shown} {right} is {result}."


def category(world: World, rng: random.Random) -> Turn:
    """Whether a thing is of a kind."""
    true, asked = rng.choice(list(_CATEGORY)), rng.choice(list(_CATEGORY))
    asked = true if rng.random() < 0.5 else asked
    word = world.pick(rng, true)
    ask = f"Is {word} {article(_CATEGORY[asked])}?"
    if true == asked:
        return ask, f"Yes, {word} is {article(_CATEGORY[asked])}."
    return ask, f"No, {word} is {article(_CATEGORY[true])}."


def sequence(world: World, rng: random.Random) -> Turn:
    """What comes after or before a day, a month or a number."""
    words = world.words[rng.choice(["days", "months"])]
    at, step = rng.randrange(len(words)), rng.choice([1, -1])
    where = "after" if step == 1 else "before"
    ask = rng.choice(["What comes {} {}?", "Which one comes {} {}?", "What is {} {}?"])
    return ask.format(where, words[at]), f"{words[(at + step) % len(words)]} comes {where} {words[at]}."


def repeat(world: World, rng: random.Random) -> Turn:
    """Repeating words, numbers or a sentence exactly."""
    kind = rng.random()
    if kind < 0.3:
        text = " ".join(world.pick(rng, "common") for _ in range(rng.randint(1, 12)))
    elif kind < 0.5:
        text = digits(rng, 2, 9)
    elif kind < 0.7:
        text = ", ".join(world.pick(rng, rng.choice(["names", "animals", "foods"])) for _ in range(rng.randint(2, 6)))
    else:
        text = world.fill(rng, rng.randint(30, 160))
    ask = rng.choice(
        [
            "Repeat after me: {}",
            "Repeat: {}",
            "Say: {}",
            "Please repeat: {}",
            'Repeat this: "{}"',
            "Copy this text: {}",
            "Echo: {}",
            "Say {}",
            "Write: {}",
            "Repeat the following text: {}",
        ]
    )
    return ask.format(text), text


def story(world: World, rng: random.Random) -> Turn:
    """A very short story."""
    name, place, friend = world.pick(rng, "names"), world.pick(rng, "places"), world.pick(rng, "names")
    animal, other = world.pick(rng, "animals"), world.pick(rng, "animals")
    adjective, thing, food = world.pick(rng, "adjectives"), world.pick(rng, "objects"), world.pick(rng, "foods")
    ask = spin(
        f"{{Tell me a story|Tell me a short story|Write a story|Tell a story|Can you tell me a story}}"
        f"{{.|.| about {article(animal)}.}}",
        rng,
    )
    text = spin(
        f"{{Once upon a time there was|Long ago there lived}} {article(adjective)} {animal} {{named|called}} {name}. "
        f"{name} lived in a {{small|little|quiet}} house near the {place}. "
        f"One {{day|morning|evening}}, {name} found {article(thing)} {{by the road|under a tree|near the water}}. "
        f"{{It belonged to|It had been lost by}} {article(other)} {{named|called}} {friend}. "
        f"{name} {{brought it back|gave it back|returned it}}, and {friend} {{was very happy|smiled|was glad}}. "
        f"{{They ate some {food} together|They shared some {food}}}, "
        f"and {{they became good friends|from that day on they were friends}}.",
        rng,
    )
    return ask, text


def quoted(world: World, rng: random.Random) -> Turn:
    """Finding, in a few sentences, the one that mentions a word."""
    sentences = [world.fill(rng, 60) for _ in range(rng.randint(2, 5))]
    wanted = rng.choice(sentences)
    words = [w for w in wanted.split() if w.isalpha() and len(w) > 5 and sum(w in s for s in sentences) == 1]
    if not words:
        return repeat(world, rng)
    word = rng.choice(words)
    text = "\n".join(f"[{n + 1}] {s}" for n, s in enumerate(sentences))
    asked = [
        'Which sentence mentions "{}"?',
        'Find the sentence with the word "{}".',
        "What does the text say about {}?",
    ]
    ask = rng.choice(asked)
    return f"{text}\n{ask.format(word)}", f"[{sentences.index(wanted) + 1}] {wanted}"


TASKS: tuple[tuple[Task, float], ...] = (
    (small_talk, 10.0),
    (definition, 7.0),
    (known_fact, 7.0),
    (topic, 2.5),
    (lookup, 5.0),
    (counting, 2.5),
    (spelling, 2.5),
    (naming, 3.0),
    (sums, 3.0),
    (category, 1.5),
    (sequence, 1.5),
    (repeat, 5.0),
    (story, 1.0),
    (quoted, 2.0),
)


def task(world: World, rng: random.Random) -> Turn:
    """One question and its answer, of a kind drawn by its share."""
    kinds, shares = zip(*TASKS, strict=True)
    chosen: Task = rng.choices(kinds, shares)[0]
    return chosen(world, rng)
