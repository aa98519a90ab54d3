"""How captions word what `attributes.py` measures: the bundled captioner learns to say it, an evaluation reads it.

No wording of a value is part of another value's, so that `parse` finds in a caption what it claims.
"""

from collections.abc import Sequence

Wordings = dict[str, dict[str, str]]  # attribute -> value -> wordings, with bars between them

PHRASES: dict[str, Wordings] = {
    "chest-xray": {
        "exposure": {
            "dark": "is darkly exposed|has a dark exposure|looks dark as a whole",
            "balanced": "is evenly exposed|has a balanced exposure|looks neither dark nor bright",
            "bright": "is brightly exposed|has a bright exposure|looks bright as a whole",
        },
        "contrast": {
            "low": "with low contrast|and its contrast is weak|with flat contrast",
            "moderate": "with moderate contrast|and its contrast is medium|with middling contrast",
            "high": "with high contrast|and its contrast is strong|with marked contrast",
        },
        "haze": {
            "clear": "The lung fields look clear|Both lung fields are free of haze|The lungs are clearly darker than "
            "the middle of the chest",
            "slight": "The lung fields look slightly hazy|Both lung fields show a little haze|The lungs are somewhat "
            "darker than the middle of the chest",
            "hazy": "The lung fields look very hazy|Both lung fields show much haze|The lungs are hardly darker than "
            "the middle of the chest",
        },
        "side": {
            "left brighter": "the left half of the picture is the brighter one|the left side is whiter than the right",
            "even": "both halves are about equally bright|the two sides are alike in brightness",
            "right brighter": "the right half of the picture is the brighter one|the right side is whiter than the "
            "left",
        },
        "marker": {
            "faint": "No letter marker stands out|A letter marker is faint or missing|The edge shows no plain marker",
            "plain": "A bright letter marker stands out near the edge|A letter marker is plain to see|The edge shows "
            "a bright marker",
        },
    },
    "dermoscopy": {
        "colour": {
            name: f"is mostly {name}|has a {name} colour|appears {name} overall"
            for name in ("black", "blue-grey", "red-pink", "dark brown", "light brown", "pale tan")
        },
        "variegation": {
            "even": "in one even shade|with hardly any change of shade|of uniform colouring",
            "varied": "in several close shades|with some change of shade|of varied colouring",
            "mottled": "in many mottled shades|with a strong change of shade|of mottled colouring",
        },
        "border": {
            "soft": "Borders within it are soft|Its areas fade into each other|No sharp edge is seen",
            "moderate": "Borders within it are moderately sharp|Its areas differ slightly from each other|A few weak "
            "edges are seen",
            "sharp": "Borders within it are sharp|Its areas stand out from each other|Strong edges are seen",
        },
    },
    "histology": {
        "stain": {
            "H&E": "is stained pink and violet|shows a pink and violet stain|takes on pink to violet tones",
            "IHC": "is stained brown and blue|shows a brown and blue stain|takes on brown to pale blue tones",
        },
        "nuclei": {
            "few": "Dark nuclei are few|Hardly any dark nuclei are seen|The nuclei lie far apart",
            "some": "Dark nuclei are of middling number|Some dark nuclei are seen|The nuclei are moderately dense",
            "many": "Dark nuclei are many|Plenty of dark nuclei are seen|The nuclei lie close together",
        },
        "space": {
            "closed": "the tissue fills the picture|there is hardly any empty space",
            "partly open": "the tissue leaves some gaps|there is some empty space",
            "mostly open": "the tissue covers only a part|there is much empty space",
        },
    },
    "photograph": {
        "exposure": {
            "dark": "is rather dark|has dark lighting",
            "balanced": "is neither dark nor bright|has balanced lighting",
            "bright": "is rather bright|has bright lighting",
        },
        "tone": {
            "cool": "Its colours are cool|Bluish tones prevail",
            "neutral": "Its colours are neutral|No tone prevails",
            "warm": "Its colours are warm|Reddish tones prevail",
        },
    },
}


def parse(domain: str, text: str) -> dict[str, str | None]:
    """What a caption claims of each attribute; None where it claims nothing, or two things at once."""
    said = {}
    for name, values in PHRASES[domain].items():
        found = {value for value, wordings in values.items() if any(w in text for w in wordings.split("|"))}
        said[name] = found.pop() if len(found) == 1 else None
    return said


def domain_of(captions: Sequence[str]) -> str | None:
    """The domain whose wordings occur in the most captions; None if none occurs in any."""
    counts = {domain: sum(any(parse(domain, text).values()) for text in captions) for domain in PHRASES}
    best = max(counts, key=lambda domain: counts[domain])
    return best if counts[best] else None
