"""Words of the text suite. No word belongs to two categories."""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "a fruit": ("apple", "banana", "cherry", "grape", "lemon", "mango", "melon", "pear", "strawberry", "pineapple"),
    "an animal": ("cat", "cow", "dog", "elephant", "goat", "horse", "lion", "rabbit", "sheep", "tiger"),
    "a vehicle": ("bicycle", "bus", "car", "helicopter", "motorcycle", "tractor", "train", "truck", "tram", "van"),
    "a musical instrument": ("cello", "clarinet", "drum", "flute", "guitar", "harp", "piano", "trumpet", "violin"),
    "a piece of furniture": ("armchair", "bed", "bookcase", "chair", "cupboard", "desk", "sofa", "table", "wardrobe"),
    "a piece of clothing": ("coat", "dress", "hat", "jacket", "scarf", "shirt", "skirt", "sock", "sweater"),
    "a part of the body": ("arm", "elbow", "finger", "foot", "knee", "mouth", "nose", "shoulder", "tooth"),
    "a tool": ("axe", "drill", "hammer", "pliers", "saw", "screwdriver", "shovel", "wrench"),
}
"""Category with its article -> its words."""
NOUNS = tuple(word for words in CATEGORIES.values() for word in words)
COLORS = ("black", "blue", "brown", "golden", "gray", "green", "pink", "purple", "red", "silver", "white", "yellow")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Julia", "Leo", "Maria", "Tom")
PLURALS = ("apples", "balls", "books", "cards", "coins", "cookies", "eggs", "marbles", "pencils", "shells", "stamps")
STORIES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+"),
    ("{name} finds {a} {things} in the morning and {b} {things} in the evening. How many {things} is that?", "+"),
    ("{name} has {a} {things} and gives away {b}. How many {things} are left?", "-"),
    ("There are {a} {things} on the table. {name} takes {b} of them. How many {things} stay on the table?", "-"),
    ("{name} has {a} boxes with {b} {things} in each. How many {things} does {name} have?", "*"),
)
"""Story, and the sign between its numbers a and b."""
