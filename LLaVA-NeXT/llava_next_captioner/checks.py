"""Whether a description may stand as the caption of its image: small pure functions, True where the fault is there.

Their names stand in the journal of a run. Words are compared in lower case, without punctuation, hyphens and the marks
of the plural.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from llava_next_captioner.prompts import find_phrase, words_of

# A class that consists of these alone, such as `normal`, is no name: "a normal heart size" says nothing about it.
ADJECTIVES = frozenset({
    "abnormal", "acute", "benign", "big", "black", "blue", "bright", "brown", "chronic", "clear", "dark", "diffuse",
    "focal", "gray", "green", "grey", "healthy", "hazy", "large", "left", "light", "malignant", "mild", "moderate",
    "negative", "normal", "orange", "pale", "pink", "positive", "purple", "red", "right", "severe", "small", "tan",
    "unremarkable", "violet", "white", "yellow",
})  # fmt: skip
FILLERS = frozenset({"a", "an", "and", "any", "its", "of", "or", "the", "their"})
ECHO = 3  # features of the list in a row
LONG_NGRAM = 6
SPELLINGS = {
    "colour": "color", "colours": "colors", "grey": "gray", "naevi": "nevus", "naevus": "nevus", "nevi": "nevus",
    "oesophagitis": "esophagitis", "tumour": "tumor", "tumours": "tumors",
}  # fmt: skip
# What shortening can mend.
ONLY_LENGTH = frozenset({"too_many_words", "too_many_tokens"})
# Each run of marks is looked at once, as a whole: a server may send thousands of dots.
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”)\]]*+(?=\s+[^\s\da-z]|\s*$)")


def check(
    text: str,
    *,
    finished: bool,
    simple_caption: str,
    label: str,
    labels: Iterable[str],
    features: Sequence[str],
    count_tokens: Callable[[str], int],
    max_words: int = 100,
    max_tokens: int = 120,
) -> list[str]:
    """The names of the checks that `text` fails, none of them where it may stand.

    `label` is its class, `labels` are the data set's; `count_tokens` asks the tokenizer of the model to be trained.
    """
    faults = {
        "begins_with_caption": not begins_with_caption(text, simple_caption),
        "echoes_features": echoes_features(text, features),
        "too_many_words": too_many_words(text, max_words),
        "too_many_tokens": count_tokens(text) > max_tokens,
        "wrong_class": wrong_class(text, simple_caption, label, labels),
        "loops": loops(text),
        "unfinished": unfinished(text, finished),
    }
    return [name for name, failed in faults.items() if failed]


def begins_with_caption(text: str, simple_caption: str) -> bool:
    """Whether the simple caption, its full stop aside, stands first in `text`; case and white space do not count.

    It must end where a word of `text` ends: "... of polyps" is no beginning of "... of polyposis".
    """
    caption = " ".join(simple_caption.casefold().split()).rstrip(".")
    said = " ".join(text.casefold().split())
    return said.startswith(caption) and not re.match(r"\w", said[len(caption) :])


def echoes_features(text: str, features: Sequence[str]) -> bool:
    """Whether `text` repeats the prompt's list: three features, or all of a shorter one, in a row and in order."""
    said = [word for word in _stems(text) if word not in FILLERS]
    listed = [[word for word in _stems(feature) if word not in FILLERS] for feature in features]
    size = min(ECHO, len(listed))
    if size < 2:
        return False
    runs = (listed[i : i + size] for i in range(len(listed) - size + 1))
    return any(find_phrase([word for feature in run for word in feature], said) for run in runs)


def too_many_words(text: str, max_words: int = 100) -> bool:
    """Whether `text` has more than `max_words` words, as white space separates them."""
    return len(text.split()) > max_words


def wrong_class(text: str, simple_caption: str, label: str, labels: Iterable[str]) -> bool:
    """Whether `text` leaves its own class out or names another one of the data set, be it to deny it.

    Only whole phrases count. A class is not another one where its phrase is part of the own one's (`polyps` for an
    image of `dyed lifted polyps`) or consists of adjectives alone (`normal`). A label that not even the simple caption
    spells out, such as a code, need not be named.
    """
    said, own = _stems(text), _stems(label)
    if find_phrase(own, _stems(simple_caption)) and not find_phrase(own, said):
        return True
    others = (other for other in map(_stems, labels) if not find_phrase(other, own) and not set(other) <= _ADJECTIVES)
    return any(find_phrase(other, said) for other in others)


def loops(text: str) -> bool:
    """Whether `text` goes round in circles.

    That is: a sentence of three or more words twice, a word or a pair of words three times on end, three to twelve
    words twice on end, or the same six words three times anywhere.
    """
    said = [words_of(sentence) for sentence in sentences(text)]
    said_long = [tuple(sentence) for sentence in said if len(sentence) >= 3]
    words = words_of(text)
    if len(set(said_long)) < len(said_long):
        return True
    for size in range(1, 13):
        times = 3 if size < 3 else 2
        for start in range(len(words) - size * times + 1):
            if words[start : start + size * (times - 1)] == words[start + size : start + size * times]:
                return True
    grams = Counter(tuple(words[i : i + LONG_NGRAM]) for i in range(len(words) - LONG_NGRAM + 1))
    return any(times >= 3 for times in grams.values())


def unfinished(text: str, finished: bool = True) -> bool:
    """Whether generation was cut off, or the last sentence has no end."""
    ends = list(SENTENCE_END.finditer(text.rstrip()))
    return not finished or not ends or ends[-1].end() < len(text.rstrip())


def sentences(text: str) -> list[str]:
    """`text` cut after the end of each sentence, with the white space that stood before it.

    A sentence ends at a mark that white space follows, and no digit or small letter after that: not in "approx. 5 mm".
    """
    cuts = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if text[start:end].strip()]


def _stem(word: str) -> str:
    """`word` in American spelling without the mark of the plural: crude, but the same wherever it stands."""
    word = SPELLINGS.get(word, word)
    if re.fullmatch(r".{3,}(o|sta)s[ei]s", word):  # keratoses, metastases
        return word[:-2]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _stems(text: str) -> list[str]:
    return [_stem(word) for word in words_of(text)]


_ADJECTIVES = {_stem(word) for word in ADJECTIVES}
