"""Simple medical captions, and longer descriptions in the manner of VSG, from the grammar of captions.py.

The descriptions teach the bundled tokenizer and T5 their words. They describe no picture, and are not for diagnosis.
"""

from typing import NamedTuple

import numpy as np
from captions import expand

MAX_WORDS = 100  # what the captioner is asked to keep to


class Domain(NamedTuple):
    """One kind of image: the beginning of its simple caption, its classes, and the sentences that may follow."""

    opening: str
    classes: tuple[str, ...]
    sentences: tuple[str, ...]


_SHARED = {
    "side": ("{left|right}",),
    "zone": ("{upper|middle|lower|mid|basal|apical|perihilar|peripheral|central|medial|lateral|retrocardiac}",),
    "extent": ("{mild|slight|moderate|marked|severe|subtle|faint|extensive|focal|diffuse|widespread|minimal|dense}",),
    "maybe": ("{clearly|slightly|partly|partially|barely|mostly|largely|fairly|rather|completely|}",),
    "colour": (
        "{pink|pinkish|red|reddish|deep red|pale|white|whitish|yellow|yellowish|tan|brown|brownish|dark brown|light "
        "brown|black|blue|bluish|blue-green|blue-gray|greenish|purple|violet|grey|gray|orange|salmon|magenta|cream|"
        "translucent}",
    ),
    "shape": (
        "{round|rounded|oval|irregular|irregularly shaped|flat|raised|elongated|lobulated|circular|linear|asymmetric|"
        "symmetric|polygonal|nodular|dome-shaped|star-shaped|ring-shaped|elevated|pedunculated|sessile|spherical}",
    ),
    "texture": (
        "{smooth|rough|glistening|wet|shiny|granular|velvety|uneven|bumpy|coarse|fine|moist|glossy|scaly|dry|crusted|"
        "fibrous|soft|homogeneous|heterogeneous|uniform|patchy|reticular|nodular|friable|spongy|wrinkled|keratotic}",
    ),
    "border": ("{sharp|well-defined|ill-defined|blurred|irregular|smooth|jagged|indistinct|regular|fading|abrupt}",),
    "exposure": (
        "the {image|picture|photograph|view} {is|appears|looks} {maybe} {bright|dark|dim|sharp|blurred|hazy|evenly "
        "lit|overexposed|underexposed|in focus|grainy|noisy|well lit|centered|rotated|cropped|slightly tilted}.",
        "{overall|in general,|} the {contrast|brightness|exposure|sharpness|illumination|image quality|saturation} "
        "is {low|high|good|moderate|adequate|even|uneven|limited|poor|fair|normal|strong|reduced|sufficient}.",
        "the {corners|edges|margins|borders} of the image are {black|dark|bright|empty|vignetted|cut off|shadowed}.",
        "there is {some|little|no|strong} {glare|noise|blur|shadow|reflection|distortion|text|artefact|artifact} in "
        "the {centre|center|corner|background|foreground|upper part|lower part|periphery} of the image.",
        "the background is {uniform|dark|light|grey|black|plain|blurred|out of focus}.",
    ),
}  # fmt: skip

_HEALTHY_CHEST = Domain(
    "A chest X-ray image of",
    ("normal lungs", "normal lungs", "healthy lungs", "a normal chest"),
    (
        "the {lungs|lung fields|airways} {appear|are|look} {clear|dark|well aerated|well expanded|symmetric|"
        "unremarkable|transparent|open} {and symmetric|with no focal opacity|without consolidation|on both sides|}.",
        "no {consolidation|opacity|infiltrate|pleural effusion|pneumothorax|mass|nodule|haze} "
        "{is seen|is visible|is present|can be seen} {in the {side} lung|in either lung|}.",
        "the {side} heart border is {clearly|well|easily} {visible|defined|outlined|seen}.",
        "the heart {is|appears} {normal in size|of normal size|centrally placed} and the mediastinum is {midline|"
        "normal|central|not widened}.",
        "the {ribs|clavicles|vertebrae|bony structures} {are|remain} {maybe} {visible|intact|symmetric|evenly "
        "spaced} {against the dark lungs|}.",
        "the {diaphragm|{side} hemidiaphragm} is {dome-shaped|smooth|sharp|well-defined}, and the costophrenic "
        "angles are {sharp|clear|open}.",
        "{fine|normal|thin|faint} {vascular|bronchial|pulmonary} markings {extend|spread|fade} from the hilum to the "
        "periphery.",
        "the trachea is {midline|central} and {there are no signs of disease|the chest looks healthy|the lungs are "
        "of equal size}.",
    ),
)  # fmt: skip
_CHEST = Domain(
    "A chest {X-ray|X-ray|X-ray|radiograph} image of",
    (
        "bacterial pneumonia", "bacterial pneumonia", "viral pneumonia", "viral pneumonia", "pneumonia",
        "tuberculosis", "pleural effusion",
        "pneumothorax", "cardiomegaly", "pulmonary edema", "COVID-19 pneumonia", "atelectasis", "a lung nodule",
    ),
    (
        "the {lungs|lung fields|both lungs} {appear|are|look} {hazy|grey|partly clear|poorly aerated|hyperinflated|"
        "asymmetric|underinflated|cloudy|whiter than normal} {on both sides|bilaterally|in the {zone} zones|}.",
        "{there is|the image shows|showing|it shows|one sees} a {extent} {opacity|consolidation|haze|infiltrate|"
        "shadow|whiteness|density|airspace opacity|clouding} in the {side} {zone} {lung|zone|lobe|lung field|"
        "hemithorax}.",
        "{hazy|patchy|dense|fluffy|cloudy|streaky|ground-glass|reticular|interstitial|bilateral|scattered|lobar|"
        "white|confluent} {opacities|consolidations|infiltrates|markings|shadows|areas|patches} are {visible|seen|"
        "present|noted|spread} {in the {side} {zone} {lung|zone}|in both lungs|around the hilum|near the heart|"
        "throughout}.",
        "the {side} heart border is {maybe} {visible|obscured|sharp|silhouetted|hidden|blurred|preserved|lost}.",
        "the heart {is|appears|seems} {normal in size|enlarged|of normal size|small|centrally placed|shifted to the "
        "{side}|boot-shaped} {with a {border} outline|and the mediastinum is {midline|widened|normal|central}|}.",
        "the {ribs|clavicles|shoulder blades|spine|vertebrae|bony structures|rib cage} {are|remain} {maybe} {visible|"
        "intact|symmetric|outlined|faint|bright white|evenly spaced|horizontal}{ against the dark lungs|}.",
        "the {diaphragm|{side} hemidiaphragm|diaphragmatic contour} is {dome-shaped|flattened|raised|elevated|sharp|"
        "smooth|obscured|blunted|well-defined|hidden by the opacity}.",
        "the {side} costophrenic angle is {sharp|blunted|clear|obscured|hazy}, {with|without} {fluid|pleural "
        "effusion|pleural thickening|a visible meniscus}.",
        "the costophrenic angles are {sharp|clear|blunted|open} {on both sides|bilaterally|}.",
        "{no|a small|a large} {pleural effusion|pneumothorax|mass|nodule|cavity|fracture|air bronchogram|"
        "calcification} {is|can be} {seen|visible|identified|noted|detected|present}.",
        "{increased|prominent|decreased|coarse|normal} {vascular|bronchial|interstitial|perihilar|bronchovascular} "
        "markings {extend|spread|radiate|reach} from the hilum {to the periphery|into the lower zones|to the bases}.",
        "the trachea is {midline|central|deviated to the {side}|slightly shifted} and the {airways|bronchi|hila|"
        "hilar shadows} are {maybe} {visible|normal|thickened|prominent|enlarged|indistinct}.",
        "{air bronchograms|peribronchial cuffing|hyperinflation|a silhouette sign|volume loss|septal lines} {may|"
        "can} be {seen|suggested|present|absent|visible}, {consistent with|suggesting|typical of|in keeping with} "
        "{infection|inflammation|fluid in the alveoli|pneumonia|acute disease}.",
        "{wires are|a tube is|electrodes are|a catheter is|a letter marker is|a side marker is} {visible|projected} "
        "over the {chest|shoulder|neck|abdomen|upper corner}.",
        "the {soft tissues|stomach bubble|abdomen|neck|arms|shoulders} {appear|are} {normal|visible|light grey|"
        "raised|unremarkable|bright}, and {the child is|the patient is} {upright|supine|slightly rotated|well "
        "positioned}.",
        "{compared with|unlike} the {side} side, the {other|opposite} lung {is|appears} {darker|brighter|clearer|"
        "whiter|greyer|denser|larger|smaller|less affected|more transparent}.",
    ),
)  # fmt: skip
_ENDOSCOPY = Domain(
    "An endoscopic image of",
    (
        "dyed lifted polyps", "dyed resection margins", "esophagitis", "normal cecum", "normal pylorus",
        "normal z-line",
        "polyps", "ulcerative colitis", "hemorrhoids", "a gastric ulcer", "Barrett's esophagus", "the stomach",
    ),
    (
        "the {polyp|lesion|growth|tissue|area|fold|ulcer|margin} {has|shows|displays|presents} a {colour} {colour|"
        "colouration|color|hue|tint|tone} {with {speckles|patches|streaks|spots|flecks} of {colour}|}.",
        "predominantly {colour} with {speckles|patches|areas|hints} of {colour}.",
        "{it is|they are|the polyps are|the polyp is|the lesion is} {shape} and {shape}{ in form|, "
        "protruding from the wall|, lifted from the surface|, attached by a stalk|, surrounded by {colour} mucosa|}.",
        "the surrounding {mucosa|tissue|mucosal surface|lining} {appears|is|looks} {colour}, {texture} and {normal|"
        "inflamed|swollen|healthy|edematous|eroded|ulcerated|intact|irritated|congested|stained with blue dye}.",
        "the surface {texture|} {is|appears|looks|seems} {texture} {and {texture}|} {with visible {pits|vessels|"
        "folds|grooves|villi|glands|mucus|ridges}|}.",
        "{there is|the image shows|showing} {no|slight|some|minor|active|fresh} {bleeding|blood|oozing|exudate|"
        "erosion|ulceration|pus|sign of bleeding} {around the {margin|base|edge}|in the lumen|}.",
        "{signs of bleeding|erosions|ulcers|blood clots} are {visible|present|absent} {on the wall|near the fold|}.",
        "{blood vessels are|vessels are|the vascular pattern is|capillaries are} {maybe} {visible|lost|branching|"
        "dilated|prominent|blurred|reduced}.",
        "the {lumen|opening|orifice|appendix|pyloric ring|ileocecal valve|z-line|junction|passage} is {maybe} "
        "{visible|open|closed|round|dark|centred|narrow|seen in the distance|filled with {stool|liquid|bubbles|"
        "foam}}.",
        "{a green box is|a black border is|an instrument is|a snare is|an injection needle is|light reflections are|"
        "specular highlights are} {seen|visible} {in the corner|at the edge|on the wet surface|below the lesion|}.",
        "the resection {margins are|margin is|site is|edge is} {stained|outlined|marked|covered} {in|with} {blue|"
        "indigo|dark blue|bluish} {dye|colour|indigo carmine} and {clean|clear of tissue|sharply cut|slightly "
        "raised}.",
        "the {polyp|lesion|area} is {small|large|a few millimetres wide|about one centimetre across|medium-sized} "
        "and {allows|permits} a {thorough|complete|careful} {examination|inspection|removal|biopsy}.",
        "{colon|bowel|esophageal|gastric|rectal|duodenal} {wall|folds|lining} {appear|look} {colour} and {texture}, "
        "indicating {health|inflammation|good preparation|chronic disease|a recent procedure|swelling}.",
    ),
)  # fmt: skip
_DERMOSCOPY = Domain(
    "A {dermoscopy|dermoscopy|dermoscopic|skin lesion} image of",
    (
        "melanoma", "a nevus", "a melanocytic nevus", "seborrheic keratosis", "basal cell carcinoma",
        "actinic keratosis",
        "a dermatofibroma", "a vascular lesion", "squamous cell carcinoma", "benign keratosis", "a light brown lesion",
        "a dark brown lesion", "a black lesion", "a blue-gray lesion", "a red lesion", "a white lesion",
    ),
    (
        "the {lesion|mole|patch|spot|nevus|plaque|nodule} {is|appears|looks} {shape} and {colour}, {with|showing} {a "
        "{border} border|{border} edges|{border} margins|one {colour} {center|rim|centre}}.",
        "{several|two|three|multiple|many} {shades|colours|colors|tones} of {colour} and {colour} are {present|"
        "visible|mixed|seen} {across the lesion|in the centre|near the edge|}.",
        "a {typical|atypical|regular|broken|faint|prominent|delicate} {pigment network|network|grid|pigmentation} "
        "{covers|surrounds|fills|extends over} {the lesion|the periphery|one half|the upper part}.",
        "{dots|globules|streaks|milia-like cysts|blotches|crusts|scales|hairs|comedo-like openings|blue-white areas|"
        "regression areas|pseudopods|clods|pigment dots} are {seen|scattered|visible|absent|clustered|evenly "
        "distributed} {at the edge|in the centre|throughout|on the surface|}.",
        "the surrounding skin is {colour}, {texture} and {without redness|slightly red|sun damaged|healthy|covered "
        "with fine hairs|freckled|marked by fine lines}.",
        "the surface {is|appears} {texture}{ and slightly {scaly|raised|shiny|crusted}|}.",
        "{dotted|linear|arborizing|hairpin|branched|thin|irregular} {vessels|red vessels|blood vessels|capillaries} "
        "{are|can be} {visible|seen|absent} {in the center|at the periphery|}.",
        "the {shape|outline|pigment distribution} is {maybe} {symmetric|asymmetric|asymmetrical|irregular|balanced|"
        "uneven} {in one axis|in two axes|about its axis|}.",
        "{dark hairs|a ruler|gel bubbles|air bubbles|ink marks|a black frame} {cross|cover|surround|lie beside} the "
        "{lesion|skin|image}.",
        "the {lesion|spot} is {small|large|medium-sized|wide} {and fills most of the image|and lies off centre|with "
        "a diameter of several millimetres|}, with {no|some|slight} {bleeding|ulceration|scaling|erosion|redness|"
        "scarring}.",
    ),
)  # fmt: skip
_HISTOLOGY = Domain(
    "A {histology|histology|histopathology|microscopic} image of",
    (
        "adipose tissue", "lymphocytes", "mucus", "smooth muscle", "stroma", "tumor epithelium", "normal colon mucosa",
        "debris", "background", "breast tissue", "colorectal adenocarcinoma", "lung adenocarcinoma", "normal tissue",
        "invasive carcinoma", "prostate glands", "stained tissue", "a lymph node", "kidney tissue", "liver tissue",
    ),
    (
        "the tissue is stained {with hematoxylin and eosin|pink and purple|in {colour} and {colour}|brown and blue|"
        "by immunohistochemistry}.",
        "{nuclei|cell nuclei|dark nuclei|the nuclei} are {small|large|round|oval|elongated|crowded|hyperchromatic|"
        "pleomorphic|evenly spaced|purple|dark blue|densely packed} {and {scattered|arranged in rows|clustered|"
        "uniform in size|of varying size|stacked}|}.",
        "{glands|crypts|ducts|cells|fibres|fibers|tubules|acini|vacuoles|lobules} {are|appear} {maybe} {formed|"
        "regular|irregular|fused|branching|empty|rounded|parallel|wavy|distorted|tightly packed|arranged in sheets}.",
        "the {cytoplasm|stroma|matrix|connective tissue|collagen|background} is {colour}, {abundant|scant|clear|"
        "foamy|loose|dense|fibrous|pale|granular|eosinophilic|vacuolated}.",
        "{clear white|empty|open|large|narrow} {spaces|lumens|holes|gaps|fat cells|vessels} {lie|are seen} between "
        "the {cells|glands|fibres|strands|bundles}.",
        "{many|a few|some|no|scattered|numerous} {lymphocytes|red blood cells|inflammatory cells|mitoses|mitotic "
        "figures|plasma cells|macrophages|goblet cells|fibroblasts|tumor cells|necrotic cells} are {visible|present|"
        "seen|found}.",
        "{high|low|medium} magnification {shows|reveals} {mild|moderate|severe|no} {atypia|necrosis|fibrosis|"
        "inflammation|invasion|differentiation|keratinization|dysplasia|hemorrhage}.",
        "the texture is {texture}, with {colour} and {colour} {areas|bands|strands|regions|islands|zones}.",
        "the architecture is {preserved|lost|disordered|glandular|solid|cribriform|trabecular|papillary|regular}.",
    ),
)  # fmt: skip
_OTHER = Domain(
    "{A|A small|One} {retinal fundus|brain MRI|CT|ultrasound|mammography|bone X-ray|microscopy|medical} image of",
    (
        "a healthy person", "a tumor", "a hemorrhage", "diabetic retinopathy", "glaucoma", "a fracture", "the brain",
        "the liver", "a cyst", "the optic disc", "the knee", "the hand", "blood cells", "a benign mass", "the abdomen",
    ),
    (
        "the {optic disc|macula|retina|ventricle|liver|kidney|mass|bone|joint|cortex|vessel} {is|appears} {shape}, "
        "{texture} and {colour}.",
        "{a|one} {bright|dark|hyperintense|hypointense|echogenic|calcified|hypodense} {spot|region|lesion|rim|line|"
        "ring} {is seen|is visible|lies} {in the {side} {hemisphere|lobe|half}|near the {midline|border|skull|disc}}.",
        "{thin|tortuous|dark red|branching} {arteries|veins|vessels} {cross|leave|surround} the {disc|centre|lesion}.",
        "{healthy|diseased|abnormal|normal} {anatomy|tissue|structures} with a {border} border and {texture} texture.",
    ),
)  # fmt: skip

DOMAINS = {
    "healthy chest": _HEALTHY_CHEST, "chest": _CHEST, "endoscopy": _ENDOSCOPY, "dermoscopy": _DERMOSCOPY,
    "histology": _HISTOLOGY, "other": _OTHER
}  # fmt: skip
_SHARE = np.array((0.12, 0.28, 0.22, 0.16, 0.14, 0.08))  # of the domains, in their order
_LINKS = (". ", ". ", ". ", ", ", "; ", " with these features: ", ", showing the following. ")


def _draw_domain(rng: np.random.Generator) -> Domain:
    return tuple(DOMAINS.values())[int(rng.choice(len(DOMAINS), p=_SHARE))]


def _opening(domain: Domain, rng: np.random.Generator) -> str:
    return expand(f"{domain.opening} {domain.classes[int(rng.integers(len(domain.classes)))]}", rng, _SHARED)


def simple_caption(rng: np.random.Generator, domain: str | None = None) -> str:
    """A caption that names the kind of image and its class: "A chest X-ray image of bacterial pneumonia"."""
    return _opening(DOMAINS[domain] if domain else _draw_domain(rng), rng)


def description(rng: np.random.Generator, domain: str | None = None) -> str:
    """At most 100 words that begin with the simple caption and go on with visual features of that kind of image."""
    chosen = DOMAINS[domain] if domain else _draw_domain(rng)
    text = _opening(chosen, rng) + _LINKS[int(rng.integers(len(_LINKS)))]
    sentences = [chosen.sentences[i] for i in rng.permutation(len(chosen.sentences))[: int(rng.integers(3, 8))]]
    sentences.insert(int(rng.integers(len(sentences) + 1)), "{exposure}")
    for template in sentences:
        sentence = expand(template, rng, _SHARED)
        if text.endswith(". "):
            sentence = sentence[0].upper() + sentence[1:]
        if len((text + sentence).split()) > MAX_WORDS:
            break
        text += sentence + " "
    return text.strip()
