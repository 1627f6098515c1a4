"""Units of measure, as far as they change which number a person reads."""

#: A larger unit, a smaller one, and how many of these it has.
_COMPOUNDS = {
    ("dollar", "cent"): 100,
    ("dollar", "penny"): 100,
    ("euro", "cent"): 100,
    ("pound", "penny"): 100,
    ("pound", "ounce"): 16,
    ("hour", "minute"): 60,
    ("minute", "second"): 60,
    ("day", "hour"): 24,
    ("week", "day"): 7,
    ("year", "month"): 12,
    ("year", "week"): 52,
    ("foot", "inch"): 12,
    ("yard", "foot"): 3,
    ("meter", "centimeter"): 100,
    ("kilometer", "meter"): 1000,
    ("kilogram", "gram"): 1000,
    ("liter", "milliliter"): 1000,
    ("gallon", "quart"): 4,
}
_NAMES = {
    "foot": "feet ft",
    "inch": "inches in",
    "penny": "pence pennies",
    "cent": "¢",
    "hour": "h hr hrs",
    "minute": "min mins",
    "second": "s sec secs",
    "pound": "lb lbs",
    "ounce": "oz",
    "meter": "m metre metres",
    "centimeter": "cm",
    "kilometer": "km kilometre kilometres",
    "kilogram": "kg kgs",
    "gram": "g",
    "liter": "l litre litres",
    "milliliter": "ml",
}
_NAME_OF = {written: name for name, all_written in _NAMES.items() for written in all_written.split()}


def unit_name(word: str) -> str:
    """The unit that a word in lower case names, in the singular. Any other word is a unit of its own."""
    return _NAME_OF.get(word) or word.removesuffix("s")


def is_abbreviation(word: str) -> bool:
    """Whether a word is a short name of a unit, such as `h` in `km/h`."""
    return word in _NAME_OF


def parts_of(larger: str, smaller: str) -> int | None:
    """How many of the smaller unit make one of the larger; None if they do not belong together."""
    return _COMPOUNDS.get((larger, smaller))
