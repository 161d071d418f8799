"""Invented names, numbers, dates and phrases: the values that synthetic facts are about."""

import random
from collections.abc import Callable, Sequence

from demo.training.data import word_lists as words


class Names:
    """Draws values by kind. Most are invented, so that a model can only answer by copying them.

    vocabulary: the tokenizer's entries; whole words and "##" pieces of it become rare multi-piece names.
    """

    def __init__(self, rng: random.Random, vocabulary: Sequence[str]) -> None:
        self.rng = rng
        plain = [entry for entry in vocabulary if entry.isascii() and entry.isalpha() and entry.islower()]
        self.whole_words = [entry for entry in plain if 4 <= len(entry) <= 10]
        self.short_words = [entry for entry in plain if 2 <= len(entry) <= 5]
        self.word_ends = [
            entry[2:]
            for entry in vocabulary
            if entry.startswith("##") and entry[2:].isascii() and entry[2:].isalpha() and 2 <= len(entry) <= 7
        ]
        self.kinds: dict[str, Callable[[], str]] = {
            kind: getattr(self, kind)
            for kind in dir(self)
            if not kind.startswith("_") and kind not in ("value", "pick") and callable(getattr(self, kind))
        }

    def value(self, kind: str) -> str:
        """Return a value of this kind: a method of this class, else an entry of a word list."""
        if kind in self.kinds:
            return self.kinds[kind]()
        return self.rng.choice(words.LISTS[kind])

    def pick(self, *options: str) -> str:
        """Return one of the options."""
        return self.rng.choice(options)

    # names

    def word(self) -> str:
        """Return a capitalised invented word, or now and then a real one."""
        rng, roll = self.rng, self.rng.random()
        if roll < 0.35:
            ends = "".join(rng.choice(self.word_ends) for _ in range(rng.choice((1, 1, 2))))
            return (rng.choice(self.short_words) + ends).capitalize()
        if roll < 0.6:
            return rng.choice(self.whole_words).capitalize()
        parts = (
            rng.choice(words.ONSETS) + rng.choice(words.VOWELS) + rng.choice(words.CODAS)
            for _ in range(rng.choice((2, 2, 3)))
        )
        return "".join(parts).capitalize()

    def common(self) -> str:
        """Return a lower-case invented or real word, as currencies and materials have."""
        return self.word().lower()

    def first(self) -> str:
        """Return a first name."""
        return self.rng.choice(words.LISTS["first"]) if self.rng.random() < 0.75 else self.word()

    def surname(self) -> str:
        """Return a surname."""
        return self.rng.choice(words.LISTS["last"]) if self.rng.random() < 0.3 else self.word()

    def person(self) -> str:
        """Return a person's name in one of several shapes."""
        roll = self.rng.random()
        if roll < 0.1:
            return self.surname()
        if roll < 0.18:
            return f"{self.first()} {self.rng.choice('ABCDEFGHJKLMPRSTW')}. {self.surname()}"
        if roll < 0.26:
            return f"{self.first()} {self.pick('von', 'de', 'van', 'da', 'al', 'del')} {self.surname()}"
        if roll < 0.36:
            return f"{self.first()} {self.first()} {self.surname()}"
        return f"{self.first()} {self.surname()}"

    def place(self) -> str:
        """Return the name of a town."""
        roll = self.rng.random()
        if roll < 0.3:
            return self.rng.choice(words.LISTS["city"])
        if roll < 0.45:
            return self.word() + self.rng.choice(words.TOWN_ENDS)
        if roll < 0.55:
            return f"{self.pick('San', 'Port', 'New', 'Saint', 'Santa', 'Fort', 'El', 'La')} {self.word()}"
        if roll < 0.6:
            return f"{self.word()} {self.pick('City', 'Harbour', 'Bay', 'Springs')}"
        return self.word()

    def country(self) -> str:
        """Return the name of a country, half of them real."""
        roll = self.rng.random()
        if roll < 0.45:
            return self.rng.choice(words.LISTS["real_country"])
        if roll < 0.55:
            return f"{self.pick('North', 'South', 'East', 'New', 'Upper')} {self.word()}"
        return self.word() + self.pick("", "", "ia", "land", "stan")

    def region(self) -> str:
        """Return a part of a country or of the world."""
        if self.rng.random() < 0.5:
            return self.rng.choice(words.LISTS["continent"])
        side = self.pick(
            "northern", "southern", "eastern", "western", "central", "the north of", "the south of"
        )
        return f"{side} {self.country()}"

    def water(self) -> str:
        """Return what a river may flow into."""
        name = self.word()
        return self.pick(
            f"the {name} Sea", f"the Gulf of {name}", f"Lake {name}", f"the {name} Ocean", f"the {name}",
            f"the Bay of {name}", f"the {name} River",
        )  # fmt: skip

    def range(self) -> str:
        """Return a range of mountains."""
        name = self.word()
        return self.pick(
            f"the {name} Mountains", f"the {name} Range", f"the {name}s", f"the {name} Alps", f"the {name}"
        )

    def company(self) -> str:
        """Return the name of a firm."""
        name = self.word()
        ends = ("", "", " Corporation", " Industries", " Group", " Brothers", f" & {self.surname()}")
        return name + self.rng.choice(ends)

    def university(self) -> str:
        """Return a place of study."""
        return self.pick(
            f"the University of {self.place()}", f"{self.place()} University", f"{self.word()} College"
        )

    def symbol(self) -> str:
        """Return one or two letters, as chemical symbols have."""
        letters = "abcdefghiklmnoprstuvy"
        return self.rng.choice(letters).upper() + (
            self.rng.choice(letters) if self.rng.random() < 0.8 else ""
        )

    def title(self) -> str:
        """Return the title of a work."""
        rng = self.rng
        adjective, noun = rng.choice(words.LISTS["title_adjective"]), rng.choice(words.LISTS["title_noun"])
        roll = rng.random()
        if roll < 0.35:
            return f"{self.pick('The ', 'A ', '')}{adjective} {noun}"
        if roll < 0.55:
            return f"The {noun} of {self.word()}"
        if roll < 0.7:
            return f"{noun} and {rng.choice(words.LISTS['title_noun'])}"
        return self.person() if roll < 0.85 else self.word()

    def phrase(self) -> str:
        """Return one to four lower-case words that hardly make sense: practice in copying any text."""
        rng = self.rng
        adjective, noun = rng.choice(words.LISTS["adjective"]), rng.choice(self.whole_words)
        roll = rng.random()
        if roll < 0.3:
            return noun
        if roll < 0.6:
            return f"{adjective} {noun}"
        if roll < 0.8:
            return f"{noun} and {rng.choice(self.whole_words)}"
        return f"{adjective} {noun} of {rng.choice(self.whole_words)}"

    # numbers

    def year(self) -> str:
        """Return a year."""
        rng, roll = self.rng, self.rng.random()
        if roll < 0.06:
            return f"{rng.randint(2, 900)} {self.pick('BC', 'AD', 'BCE')}"
        return str(rng.randint(1000, 1799) if roll < 0.4 else rng.randint(1800, 2023))

    def date(self) -> str:
        """Return a day."""
        day, month, year = self.rng.randint(1, 31), self.rng.choice(words.LISTS["month"]), self.year()
        return self.pick(
            f"{day} {month} {year}", f"{month} {day}, {year}", f"{month} {year}", f"{day} {month}"
        )

    def when(self) -> str:
        """Return a year, or now and then a day or a century."""
        roll = self.rng.random()
        if roll < 0.7:
            return self.year()
        return self.date() if roll < 0.92 else f"the {self.rng.randint(5, 20)}th century"

    def _figure(self, low: int, high: int) -> str:
        number = int(low * (high / low) ** self.rng.random())
        if number > 999 and self.rng.random() < 0.92:
            return f"{number:,}"
        return (
            f"{number}.{self.rng.randint(1, 9)}" if number < 100 and self.rng.random() < 0.25 else str(number)
        )

    def count(self) -> str:
        """Return a whole number, small ones often in words."""
        if self.rng.random() < 0.5:
            return self.rng.choice(words.LISTS["number_word"])
        return (
            str(self.rng.randint(2, 999)) if self.rng.random() < 0.7 else f"{self.rng.randint(1000, 60000):,}"
        )

    def number(self) -> str:
        """Return a small plain number, as atomic numbers are."""
        return str(self.rng.randint(1, 150))

    def people(self) -> str:
        """Return a population."""
        if self.rng.random() < 0.5:
            return f"{self._figure(1, 400)} million"
        return f"{int(1000 * 9000 ** self.rng.random()):,}"

    def length(self) -> str:
        """Return a distance."""
        unit = self.pick("km", "kilometres", "kilometers", "miles", "kilometres")
        return f"{self._figure(3, 400000)} {unit}"

    def height(self) -> str:
        """Return a height, depth or span."""
        return f"{self._figure(3, 9000)} {self.pick('metres', 'm', 'feet', 'meters', 'metres')}"

    def area(self) -> str:
        """Return an area."""
        unit = self.pick("square kilometres", "square km", "square miles", "hectares")
        return f"{self._figure(20, 9000000)} {unit}"

    def weight(self) -> str:
        """Return a weight."""
        return f"{self._figure(2, 20000)} {self.pick('kilograms', 'kg', 'tonnes', 'tons', 'grams', 'pounds')}"

    def speed(self) -> str:
        """Return a speed."""
        return f"{self._figure(5, 9000)} {self.pick('km per hour', 'kilometres per hour', 'miles per hour')}"

    def degrees(self) -> str:
        """Return a temperature."""
        sign = "minus " if self.rng.random() < 0.15 else ""
        return f"{sign}{self._figure(3, 4000)} {self.pick('degrees Celsius', 'degrees', 'degrees C')}"

    def percent(self) -> str:
        """Return a share."""
        return f"{self._figure(1, 99)}{self.pick('%', ' percent', ' per cent')}"

    def money(self) -> str:
        """Return a sum of money."""
        return self.rng.choice("$£€") + f"{self._figure(1, 900)} {self.pick('million', 'billion')}"

    def duration(self) -> str:
        """Return a length of time."""
        number = (
            self._figure(2, 900) if self.rng.random() < 0.6 else self.rng.choice(words.LISTS["number_word"])
        )
        unit = self.pick("years", "days", "hours", "months", "minutes", "weeks", "Earth days", "years")
        return f"{number} {unit}"
