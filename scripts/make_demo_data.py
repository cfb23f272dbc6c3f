"""Writes the demo data in `recipes/data`: plain-English orders and the compact JSON a small model learns to answer."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

DATA_DIR = Path(__file__).resolve().parents[1] / "recipes" / "data"
SEED = 20250312
SFT_ROWS, EVAL_ROWS, PAIR_ROWS, PROMPT_ROWS = 1600, 100, 360, 300
# Every prompt token costs training time on a CPU; these limits keep a prompt within about 45 tokens.
MAX_WORDS, MAX_CHARS = 30, 150


def _list(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list written over several lines."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


def _lines(text: str) -> tuple[str, ...]:
    """The non-empty lines of a block, without their indentation."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


TRAIN_FIRST = _list("""Ana, Ben, Carla, David, Elena, Frank, Grace, Hugo, Irene, Jack, Karen, Leo, Maria, Nick, Olga,
    Paul, Rosa, Sam, Tina, Victor, Wendy, Yusuf, Zoë, Amir, Bella, Chris, Diana, Erik, Fatima, George, Hannah, Ivan,
    Julia, Kevin, Laura, Marco, Nina, Oscar, Priya, Ravi, Sofia, Tom, Uma, Vera, Walter, Alice, Peter, Mei, Kofi, Lucy,
    Łukasz, Emma, Noah, Clara, Adam, Ruth, Simon, Helen, Martin, Joan, Abigail, Agnes, Albert, Alexei, Amelia, Andrew,
    Angela, Anton, Astrid, Barbara, Benjamin, Boris, Bruno, Camille, Cecilia, Cedric, Charlotte, Dmitri, Dorothy, Edgar,
    Edith, Elliot, Emilia, Esther, Ethan, Felix, Fiona, Gabriel, Georgia, Gustav, Harriet, Hassan, Ingrid, Isaac,
    Ismail, Jasmine, Jerome, Josephine, Judith, Kamal, Katarina, Kenji, Larissa, Leonard, Liam, Lorenzo, Louise, Magnus,
    Malik, Margaret, Matilda, Maurice, Miriam, Mohammed, Nadia, Natalie, Nathan, Nikolai, Octavia, Oliver,
    Patricia, Philip, Quentin, Rachel, Raphael, Rebecca, Ricardo, Rosalind, Rupert, Sabina, Samuel, Sebastian,
    Stella, Stefan, Sylvia,
    Tamara, Theo, Ursula, Valentina, Viktoria, Vivian, William, Xavier, Yasmin, Yolanda, Zachary""")
TRAIN_LAST = _list("""Silva, Smith, Rossi, Bennett, Garcia, Kim, Novak, Patel, Jones, Müller, Lopez, Chen, Wilson,
    Costa, Meyer, Khan, Taylor, Ito, Moore, Dubois, Walker, Singh, Hall, Jensen, Young, Moreau, King, Santos, Wright,
    Ali, Scott, Tanaka, Baker, Weber, Adams, Ricci, Nelson, Mensah, Carter, Larsen, Evans, Torres, Turner, Bauer,
    Parker, Sato, Collins, Kowalski, Cook, Rivera, Bell, Fischer, Cooper, Romero, Ward, Lee, Grant, Haddad, Ross,
    Marin, Abbott, Acosta, Almeida, Anderson, Aziz, Bailey, Barros, Becker, Bergman, Bishop, Blanco, Brandt, Briggs,
    Cabrera, Campbell, Chandra, Christensen, Coleman, Conti, Crawford, Dalton, Delgado, Dixon, Donovan, Eriksson,
    Esposito, Farouk, Ferguson, Fernandez, Fleming, Fontaine, Foster, Gallo, Gibson, Goldberg, Graham, Greco, Griffin,
    Hansen, Hartmann, Henderson, Hoffman, Howard, Hughes, Ibrahim, Iyer, Jacobs, Jimenez, Kaplan, Kaufman, Keller,
    Kennedy, Kovacs, Kruger, Lambert, Lindgren, Lombardi, Lund, MacDonald, Mancini, Marshall, Mendoza, Mitchell, Morgan,
    Nakamura, Navarro, Nielsen, Okafor, Oliveira, Ortega, Osman, Pereira, Peterson, Phillips, Popov, Quinn, Ramirez,
    Reyes, Richter, Robinson, Rodriguez, Russo, Salazar, Sanders, Sharma, Simmons, Sokolov, Stewart, Sullivan, Vega,
    Watson, Zimmerman""")
EVAL_FIRST = _list("""Alan, Beth, Carlos, Daniel, Eva, Fred, Gloria, Henry, Isabel, James, Kate, Luis, Monica, Nora,
    Omar, Paula, Robert, Sarah, Tara, Vincent, Zara, André, Rita, Mark""")
EVAL_LAST = _list("""Allen, Bianchi, Clark, Diaz, Edwards, Ferrari, Gomez, Harris, Ivanov, Johnson, Klein, Lewis,
    Martinez, Nguyen, Olsen, Perez, Roberts, Suzuki, Thomas, Vargas, Wagner, Schäfer, Murphy, Cruz""")
CITIES = _list("""Porto, Lyon, Berlin, Madrid, Oslo, Dublin, Vienna, Boston, Tokyo, Chicago, Milan, Leeds, Prague,
    Toronto, Lisbon, Denver, Athens, Rome, Dallas, Sydney, Warsaw, Geneva, Seattle, Lagos, Mumbai, Helsinki, Naples,
    Bristol, Austin, Cairo, Glasgow, Turin, Hamburg, Seoul, Lima, Quito, Accra, Zürich, New York, San Diego""")
COLORS = _list("red, blue, green, black, white, yellow, grey, brown, pink, purple, orange, silver")
ITEMS = _list("""mug, teapot, plate, bowl, spoon, fork, lamp, chair, table, pillow, blanket, towel, candle, vase, clock,
    basket, notebook, pen, pencil, folder, bag, backpack, sweater, hat, shirt, jacket, belt, apron, umbrella, rug,
    cushion, curtain, bottle, jar, tray, box, brush, glass, bench, dress""")
MONTHS = _list("January, February, March, April, May, June, July, August, September, October, November, December")
NUMBERS = _list("two, three, four, five, six, seven, eight, nine, ten")
NUMBER_WORDS = {**dict(enumerate(NUMBERS, start=2)), 12: "a dozen"}
OPENINGS = ("", "", "", "Hi, ", "Hello, ", "Hey, ", "Hi there, ", "Good morning, ", "Hello! ", "Hi! ", "Good evening. ")
CLOSINGS = ("", "", "", "", " Thanks!", " Thank you.", " Thanks a lot.", " Cheers!", " Many thanks.", " Best wishes.")
MISSPELT = _list("""please plese, thanks thnaks, thank thnk, order ordr, ordered orderd, deliver delivr, ship shp,
    send sned, could coud, would woud, hello helo, need nede, delivery delivry, like liek, morning mornig, want wnat""")
TYPOS = dict(entry.split() for entry in MISSPELT)
TRAIN_BODIES = _lines("""
    could I get {items} sent to {name} in {city} by {date}?
    please send {items} to {name} in {city} by {date}.
    please send {items} to {city} by {date}, for {name}.
    I'd like {items} for {name} in {city}, due {date}.
    I would like {items} by {date}. Send to {name}, {city}.
    I want to order {items}. Ship to {name}, {city}, by {date}.
    {items} for {name} in {city} by {date}.
    {items} to {city} by {date}, please. It's for {name}.
    {items}, please. Deliver to {name} in {city} on {date}.
    {name} in {city} needs {items} by {date}.
    {name} from {city} ordered {items} for {date}.
    {name} wants {items} in {city} by {date}.
    {name}, {city}, {date}: {items}.
    can you deliver {items} to {name}, {city}, before {date}?
    can you ship {items} to {city} by {date}? The name is {name}.
    can I have {items} by {date}? I'm {name} in {city}.
    we need {items} by {date}. Deliver it to {name} in {city}.
    we need {items} in {city} on {date}, for {name}.
    by {date}, send {items} to {name} in {city}.
    before {date}, please ship {items} to {city} for {name}.
    on {date} I need {items} in {city}. Name: {name}.
    for {date}: {items}, to {name} in {city}.
    order for {name}, {city}: {items}. Needed by {date}.
    order for {date}: {items}. It goes to {name} in {city}.
    new order: {items}, for {name}, {city}, {date}.
    my name is {name} and I live in {city}. I need {items} by {date}.
    my friend {name} in {city} would love {items} by {date}.
    my order is {items}, to arrive in {city} by {date}. {name}.
    this is {name} from {city}. Can I have {items} by {date}?
    this is {name}. Please deliver {items} to {city} by {date}.
    I am {name}. Please ship {items} to {city} by {date}.
    I'm {name}, and I want {items} delivered to {city} on {date}.
    I need {items} for {date}. Ship to {city}, name {name}.
    I'll take {items}. Send it to {name} in {city} by {date}.
    deliver to {name} in {city} on {date}: {items}.
    ship to {name}, {city}: {items}, by {date}.
    ship {items} to {city} for {name} by {date}.
    {city}, {date}: {items} for {name}.
    to {city} by {date}: {items}. Customer: {name}.
    is it possible to get {items} to {city} by {date}? It's for {name}.
    would you send {name} in {city} {items} by {date}?
    put me down for {items}. {name}, {city}, {date}.
    get {items} to {name} by {date}. The city is {city}.
    a gift for {name} in {city}: {items}, to arrive on {date}.
    {date} delivery to {city}, for {name}: {items}.
    {date} please: {items} for {name}, {city}.
    name {name}, city {city}, date {date}, order {items}.
    looking for {items}, delivered to {name} in {city} by {date}.
""")
EVAL_BODIES = _lines("""
    could you send {items} to {name} in {city} before {date}?
    may I have {items} shipped to {name}, {city}, by {date}?
    {name} in {city} would like {items} by {date}.
    please ship {items} to {name} in {city} for {date}.
    I want {items} by {date}. Please deliver to {name} in {city}.
    order: {items} for {name} in {city}, by {date}.
    by {date} please deliver {items} to {city} for {name}.
    we would like {items} sent to {name}, {city}, on {date}.
    my name is {name}. Could I get {items} in {city} by {date}?
    I need {items} delivered by {date} to {name} in {city}.
    please get {items} to {name} in {city} on {date}.
    this is {name} in {city}. I'd like to order {items} for {date}.
    for {name} in {city}: {items}, needed by {date}.
    can we get {items} to {city} before {date}? It's for {name}.
    send {name} in {city} {items}, to arrive by {date}.
    delivery for {name}, {city}, on {date}: {items}.
""")

Row = dict[str, object]


@dataclass(frozen=True)
class Item:
    """One line of an order; `item` is singular and `color` is None when the customer names none."""

    qty: int
    color: str | None
    item: str


@dataclass(frozen=True)
class Order:
    """What the customer wants; `date` reads "12 March"."""

    name: str
    city: str
    date: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Example:
    """An order, the prompt that asks for it, and the JSON that answers the prompt."""

    order: Order
    prompt: str
    answer: str


@dataclass(frozen=True)
class Voice:
    """Who may order and in which words; training and evaluation each have their own."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    bodies: tuple[str, ...]


TRAIN = Voice(TRAIN_FIRST, TRAIN_LAST, TRAIN_BODIES)
EVAL = Voice(EVAL_FIRST, EVAL_LAST, EVAL_BODIES)


def draw_item(rng: Random, item: str) -> Item:
    """`item` with a small quantity and, three times in five, a color."""
    qty = rng.choices((1, rng.randint(2, 6), rng.randint(7, 20)), weights=(35, 50, 15))[0]
    return Item(qty, rng.choice(COLORS) if rng.random() < 0.6 else None, item)


def draw_order(rng: Random, voice: Voice) -> Order:
    """A random order of one to three different items."""
    names = rng.sample(ITEMS, rng.choices((1, 2, 3), weights=(45, 45, 10))[0])
    return Order(
        name=f"{rng.choice(voice.first)} {rng.choice(voice.last)}",
        city=rng.choice(CITIES),
        date=f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        items=tuple(draw_item(rng, name) for name in names),
    )


def answer_json(order: Order) -> str:
    """The target: keys in a fixed order and no spaces, each item in the order English says it."""
    items = [{"qty": item.qty, "color": item.color, "item": item.item} for item in order.items]
    answer = {"name": order.name, "city": order.city, "date": order.date, "items": items}
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def plural(noun: str) -> str:
    """The regular English plural, the only kind in `ITEMS`."""
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def say_item(rng: Random, item: Item) -> str:
    """The item in English: "3 blue mugs", "an apron", "two boxes (red)"."""
    noun = item.item if item.qty == 1 else plural(item.item)
    if item.color is None:
        words, tail = noun, ""
    elif rng.random() < 0.1:
        words, tail = noun, f" ({item.color})"
    else:
        words, tail = f"{item.color} {noun}", ""
    return f"{say_quantity(rng, item.qty, words)} {words}{tail}"


def say_quantity(rng: Random, qty: int, words: str) -> str:
    """The quantity as a digit, a number word, or the article that fits `words`."""
    if qty == 1:
        article = "an" if words[0] in "aeiou" else "a"
        return rng.choices((article, "one", "1"), weights=(70, 15, 15))[0]
    return NUMBER_WORDS[qty] if qty in NUMBER_WORDS and rng.random() < 0.3 else str(qty)


def say_items(rng: Random, items: Sequence[Item]) -> str:
    """The items as an English list."""
    said = [say_item(rng, item) for item in items]
    last = rng.choice((" and ", " and ", " plus ")) if len(said) > 1 else ""
    return ", ".join(said[:-1]) + last + said[-1]


def say_date(rng: Random, date: str) -> str:
    """The date as people write it: "12 March", "March 12", "12th March", "12 Mar" or "Mar 12"."""
    day, month = date.split()
    ordinal = day + {"1": "st", "2": "nd", "3": "rd"}.get(day[-1] if day not in ("11", "12", "13") else "", "th")
    forms = (date, f"{month} {day}", f"{ordinal} {month}", f"{day} {month[:3]}", f"{month[:3]} {day}")
    return rng.choices(forms, weights=(50, 20, 10, 10, 10))[0]


def add_typo(rng: Random, template: str) -> str:
    """The template with one of its common words misspelt, if it has one; the slots stay intact."""
    found = [match for match in re.finditer(r"[A-Za-z]+", template) if match[0].lower() in TYPOS]
    if not found:
        return template
    match = rng.choice(found)
    typo = TYPOS[match[0].lower()]
    return template[: match.start()] + (typo.capitalize() if match[0][0].isupper() else typo) + template[match.end() :]


def draw_template(rng: Random, bodies: Sequence[str]) -> str:
    """A phrasing with its slots: opening, body and closing, sometimes in lower case, sometimes with a typo."""
    opening, body, closing = rng.choice(OPENINGS), rng.choice(bodies), rng.choice(CLOSINGS)
    if not opening.endswith(", "):
        body = body[0].upper() + body[1:]
    template = opening + body + closing
    if rng.random() < 0.15:
        template = template.lower()
    return add_typo(rng, template) if rng.random() < 0.2 else template


def draw_example(rng: Random, voice: Voice) -> Example:
    """A random order and one way of asking for it, within the length limits."""
    while True:
        order = draw_order(rng, voice)
        template = draw_template(rng, voice.bodies)
        prompt = template.format(
            items=say_items(rng, order.items), name=order.name, city=order.city, date=say_date(rng, order.date)
        )
        if len(prompt.split()) <= MAX_WORDS and len(prompt) <= MAX_CHARS:
            return Example(order, prompt, answer_json(order))


def draw_examples(part: str, count: int, voice: Voice, taken: set[str]) -> list[Example]:
    """`count` examples whose prompts and answers are not in `taken`, which they join."""
    rng = Random(f"{SEED}:{part}")
    examples: list[Example] = []
    while len(examples) < count:
        example = draw_example(rng, voice)
        if example.prompt not in taken and example.answer not in taken:
            taken.update((example.prompt, example.answer))
            examples.append(example)
    return examples


def swap_item(order: Order, old: Item, new: Item) -> Order:
    """The order with `new` where `old` was."""
    return replace(order, items=tuple(new if item == old else item for item in order.items))


def wrong_quantity(rng: Random, order: Order) -> str:
    """One quantity is off by one or two."""
    item = rng.choice(order.items)
    wrong = [qty for qty in range(item.qty - 2, item.qty + 3) if qty > 0 and qty != item.qty]
    return answer_json(swap_item(order, item, replace(item, qty=rng.choice(wrong))))


def missing_item(rng: Random, order: Order) -> str:
    """One item is gone, or the only item is not in the list."""
    lost = rng.choice(order.items)
    return answer_json(replace(order, items=tuple(item for item in order.items if item != lost)))


def swapped_name_and_city(rng: Random, order: Order) -> str:  # noqa: ARG001 - the signature all mistakes share
    """The name is where the city belongs and the other way round."""
    return answer_json(replace(order, name=order.city, city=order.name))


def prose_around(rng: Random, order: Order) -> str:
    """The right JSON with talk around it, which a parser refuses."""
    answer = answer_json(order)
    talk = ("Sure! Here is the order: {}", "{} Let me know if you need anything else.", "Order for you:\n{}\nThanks!")
    return rng.choice(talk).replace("{}", answer)


def invalid_json(rng: Random, order: Order) -> str:
    """A bracket too few, a trailing comma, an unquoted key or single quotes."""
    answer = answer_json(order)
    broken = (answer[:-1], answer[:-2] + ",]}", answer.replace('"items"', "items"), answer.replace('"', "'"))
    return rng.choice(broken)


def plural_item(rng: Random, order: Order) -> str:
    """An item keeps the plural it has in the prompt."""
    several = [item for item in order.items if item.qty > 1]
    if not several:
        return answer_json(order)
    item = rng.choice(several)
    return answer_json(swap_item(order, item, replace(item, item=plural(item.item))))


def lost_color(rng: Random, order: Order) -> str:
    """A color that the prompt names is null."""
    colored = [item for item in order.items if item.color]
    if not colored:
        return answer_json(order)
    item = rng.choice(colored)
    return answer_json(swap_item(order, item, replace(item, color=None)))


MISTAKES: tuple[Callable[[Random, Order], str], ...] = (
    wrong_quantity,
    missing_item,
    swapped_name_and_city,
    prose_around,
    invalid_json,
    plural_item,
    lost_color,
)


def reject(rng: Random, example: Example, turn: int) -> str:
    """A wrong answer of the `turn`-th kind, or of the next kind that this order can show."""
    while True:
        rejected = MISTAKES[turn % len(MISTAKES)](rng, example.order)
        if rejected != example.answer:
            return rejected
        turn += 1


def _asked(text: str) -> list[Row]:
    """The task in one short line, in place of the longer system prompt that a template would add, then the order."""
    return [{"role": "system", "content": "Order to JSON."}, {"role": "user", "content": text}]


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def chat_rows(examples: Sequence[Example]) -> list[Row]:
    """Rows for supervised fine-tuning and for evaluation."""
    return [{"messages": [*_asked(example.prompt), _assistant(example.answer)]} for example in examples]


def pair_rows(examples: Sequence[Example]) -> list[Row]:
    """Rows for preference methods: the right answer and a plausible wrong one."""
    rng = Random(f"{SEED}:mistakes")
    return [
        {
            "prompt": _asked(example.prompt),
            "chosen": [_assistant(example.answer)],
            "rejected": [_assistant(reject(rng, example, turn))],
        }
        for turn, example in enumerate(examples)
    ]


def prompt_rows(examples: Sequence[Example]) -> list[Row]:
    """Rows for methods that sample: a prompt, and the answer a reward compares with."""
    return [{"prompt": _asked(example.prompt), "answer": example.answer} for example in examples]


def assert_held_out(held_out: Sequence[Example], seen: Sequence[Example]) -> None:
    """Nothing the evaluation asks, says or answers was seen in training; cities, items and colors are shared."""
    assert not set(TRAIN_FIRST) & set(EVAL_FIRST)
    assert not set(TRAIN_LAST) & set(EVAL_LAST)
    assert not {body.lower() for body in TRAIN_BODIES} & {body.lower() for body in EVAL_BODIES}
    assert not {example.order.name for example in held_out} & {example.order.name for example in seen}
    assert not {example.prompt.lower() for example in held_out} & {example.prompt.lower() for example in seen}
    assert not {example.answer for example in held_out} & {example.answer for example in seen}


def _jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def build() -> dict[str, bytes]:
    """The contents of every file by name, the same on every call."""
    taken: set[str] = set()
    held_out = draw_examples("eval", EVAL_ROWS, EVAL, taken)
    sft = draw_examples("sft", SFT_ROWS, TRAIN, taken)
    pairs = draw_examples("pairs", PAIR_ROWS, TRAIN, taken)
    prompts = draw_examples("prompts", PROMPT_ROWS, TRAIN, taken)
    assert_held_out(held_out, [*sft, *pairs, *prompts])
    return {
        "orders_sft.jsonl": _jsonl(chat_rows(sft)),
        "orders_eval.jsonl": _jsonl(chat_rows(held_out)),
        "orders_pairs.jsonl": _jsonl(pair_rows(pairs)),
        "orders_prompts.jsonl": _jsonl(prompt_rows(prompts)),
    }


def stale(files: dict[str, bytes], folder: Path) -> list[str]:
    """The names of the files that are missing from `folder` or differ there."""
    return [
        name for name, text in files.items() if not (folder / name).is_file() or (folder / name).read_bytes() != text
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check return 1 when the ones on disk are not what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file on disk differs")
    args = parser.parse_args(argv)
    files = build()
    old = stale(files, DATA_DIR)
    if args.check:
        for name in old:
            print(f"{DATA_DIR / name} is missing or differs; run: python scripts/make_demo_data.py", file=sys.stderr)
        return 1 if old else 0
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    for name in old:
        (DATA_DIR / name).write_bytes(files[name])
    print(f"wrote {len(old)} of {len(files)} files in {DATA_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
