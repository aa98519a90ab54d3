"""Sentences from a small grammar: captions of training photographs, and scenes that teach the bundled T5 words.

A rule is a tuple of templates, one of which is drawn. In a template `{name}` is another rule and `{a|b|}` is one of
the texts between the bars (the empty one included). All randomness comes from the generator that is passed in.
"""

import re

import numpy as np

PHOTO_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "flower", "frog", "horse", "ship", "truck",
)  # fmt: skip
_SLOT = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u[nl](?!i))", re.IGNORECASE)

# Only what is certain of every training photograph: neither colour nor background, which the file does not tell.
_PHOTO_TEMPLATES = (
    "a photo of a {}", "a photograph of a {}", "a picture of a {}", "an image of a {}", "a small photo of a {}",
    "a small photograph of a {}", "a natural image of a {}", "a colour photograph of a {}", "a photo showing a {}",
    "this photo shows a {}", "this is a picture of a {}", "a photograph with a {} in it", "a {}", "{}",
)  # fmt: skip

SYNONYMS = {
    "airplane": ("aeroplane", "plane", "aircraft", "jet", "airliner"),
    "automobile": ("car", "sedan", "motor car", "vehicle", "taxi"),
    "bird": ("sparrow", "parrot", "eagle", "robin", "small bird"),
    "cat": ("kitten", "tabby cat", "house cat", "tomcat"),
    "deer": ("stag", "doe", "elk", "fawn", "moose"),
    "dog": ("puppy", "hound", "terrier", "spaniel"),
    "flower": ("blossom", "rose", "daisy", "tulip", "lily", "petunia", "bloom"),
    "frog": ("toad", "tree frog", "green frog"),
    "horse": ("pony", "mare", "foal", "stallion", "donkey"),
    "ship": ("boat", "sailing boat", "ferry", "vessel", "yacht", "cargo ship", "steamer"),
    "truck": ("lorry", "van", "pickup", "fire engine", "tractor", "bus"),
}
_SIGHTS = (
    "apple|apartment|arm|baby|balcony|balloon|banana|basket|beach|bear|bed|bee|bicycle|book|bottle|bowl|box|boy|"
    "branch|bread|bridge|brush|building|bush|butterfly|button|cake|camel|camera|candle|castle|cave|chair|chicken|"
    "child|church|city|clock|cloud|coast|coat|coffee cup|coin|cow|crab|cup|desert|door|dragonfly|dress|duck|elephant|"
    "eye|face|farm|field|finger|fire|fish|flag|foot|forest|fork|fountain|fox|fruit|garden|girl|glass|glove|goat|"
    "goose|grape|guitar|hand|harbour|hat|helicopter|hill|house|insect|island|jacket|key|kitchen|knife|lake|lamp|leaf|"
    "lemon|lion|lizard|man|map|market|meadow|mirror|monkey|moon|motorcycle|mountain|mouse|mushroom|nest|ocean|old "
    "man|orange|owl|painting|palm tree|path|peach|pear|pen|penguin|person|piano|pig|pillow|plant|plate|pond|potato|"
    "rabbit|railway|rainbow|river|road|rock|rocket|roof|room|runway|sandwich|school|sea|seal|shark|sheep|shell|shirt|"
    "shoe|shop|shore|sky|snail|snake|snow|soldier|spider|spoon|square|squirrel|stable|star|statue|stone|street|sun|"
    "swan|table|tail|tent|tiger|tower|toy|train|tree|turtle|umbrella|village|violin|wagon|wall|waterfall|whale|wheel|"
    "window|wing|wolf|woman|wooden fence|zebra"
)

_RULES: dict[str, tuple[str, ...]] = {
    "sight": (f"{{{_SIGHTS}}}",),
    "thing": tuple("{" + "|".join((name, name, *others)) + "}" for name, others in SYNONYMS.items()),
    "plural": (
        "{airplanes|planes|cars|birds|cats|kittens|deer|dogs|puppies|flowers|roses|tulips|frogs|horses|ponies|ships|"
        "boats|trucks|buses|people|trees|houses|leaves|clouds|mountains|children|men|women|animals|vehicles|plants|"
        "machines}",
    ),
    "colour": (
        "{red|blue|green|yellow|white|black|brown|grey|gray|orange|purple|pink|golden|silver|violet|beige|cream|"
        "turquoise|crimson|scarlet|tan|teal|dark red|light blue|dark green|pale yellow|bright white|deep blue|bright "
        "red|dark brown|light grey|pale pink|reddish|bluish|greenish|yellowish|colourful|colorful}",
    ),
    "quality": (
        "{small|large|big|little|tiny|huge|old|new|young|wild|beautiful|shiny|dirty|wet|dry|round|tall|long|short|"
        "single|lonely|fast|quiet|modern|wooden|wide|narrow|heavy|thin|thick|soft|smooth|rough|bright|dark|sharp|"
        "clean}",
    ),
    "place": (
        "{in|near|in front of|beside|behind|next to|above|below|across from} {a|the} {sight}",
        "on {the ground|the grass|the water|the road|a table|a white background|a black background|a {colour} "
        "background|green leaves|sand|snow}",
        "in {the sky|the sea|a field|the forest|a garden|the city|the desert|the rain|the morning|the evening|bright "
        "sunlight|the shade|spring|summer|autumn|winter}",
        "at {sunset|sunrise|night|noon|the harbour|the airport|the beach|the zoo|the station}",
        "{under|against} {a blue sky|a cloudy sky|dark clouds|the trees|the open sky}",
    ),
    "action": (
        "{standing|sitting|lying|waiting|resting|sleeping} {still|quietly|alone|}",
        "{running|walking|jumping|moving|turning|flying|driving|sailing|swimming|floating|racing|landing} {fast|"
        "slowly|}",
        "{seen|viewed|photographed} from {the side|the front|behind|above|below|far away|nearby}",
        "{eating|drinking|playing|hiding|growing|blooming|shining|parked|surrounded by {colour} {leaves|flowers|"
        "stones}}",
    ),
    "photo": (
        "a {photo|photograph|picture|snapshot|close-up|view|painting|drawing|blurry photo|sharp photograph|low "
        "resolution image|macro photograph|wide view}",
        "an {image|outdoor photograph|old photograph|overexposed picture}",
        "{two photos|a series of pictures|a black and white photograph|a colour photograph|a low contrast picture}",
    ),
    "subject": (
        "a {thing}", "a {colour} {thing}", "a {quality} {thing}", "a {quality} {colour} {thing}", "the {thing}",
        "a {sight}", "a {colour} {sight}", "a {quality} {sight}", "{two|three|four|many|several|some} {plural}",
    ),
    "scene": (
        "{photo} of {subject}", "{photo} of {subject} {place}", "{photo} of {subject} {action} {place}",
        "{photo} of {subject} and {subject}", "{subject} {action}", "{subject} {place}",
        "{photo} of {subject}, {photo}",
        "{thing}", "{sight}", "{colour}", "there is {subject} {place}", "{photo} without any {thing}",
        "a {thing} is a kind of {vehicle|animal|plant|machine|thing}", "{photo} with {subject} {place}",
        "{the weather is|the light is|the colours are} {warm|cold|soft|harsh|vivid|pale|saturated|natural|dull|"
        "strong}",
        "a {sky|sea|road|field|wall|background} that is {colour}", "{photo} with {vivid|muted|natural|warm|cool} "
        "colours",
    ),
}  # fmt: skip


def expand(template: str, rng: np.random.Generator, rules: dict[str, tuple[str, ...]]) -> str:
    """Draw a text from `template`: rules by name, `{a|b}` one of several; spaces, articles and stops made right."""

    def fill(text: str) -> str:
        while match := _SLOT.search(text):  # the innermost braces first
            options = rules[match[1]] if match[1] in rules else tuple(match[1].split("|"))
            choice = options[int(rng.integers(len(options)))]
            text = text[: match.start()] + choice + text[match.end() :]
        return text

    text = re.sub(r"\s+", " ", fill(template)).strip()
    text = re.sub(r" ([,.;])", r"\1", text)
    return _ARTICLE.sub(r"\1n ", text)


def photo_caption(label: str, rng: np.random.Generator) -> str:
    """One of a dozen ways to say that a photograph shows a `label`, claiming nothing else about it."""
    template = _PHOTO_TEMPLATES[int(rng.integers(len(_PHOTO_TEMPLATES)))]
    return expand(template.format(label), rng, {})


def scene(rng: np.random.Generator) -> str:
    """A photograph caption with colours, backgrounds and all kinds of things: for learning words, not for pictures."""
    return expand("{scene}", rng, _RULES)
