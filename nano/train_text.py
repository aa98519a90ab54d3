"""Make the bundled tokenizer and T5 text encoder, which learns its words from a flan-t5-small encoder.

    python nano/train_text.py

Needs onnxruntime (`pip install onnxruntime`; the teacher is an int8 ONNX file) and nothing else beyond the
requirements. Writes nano/pixart/tokenizer/, nano/pixart/text_encoder/ and nano/records/text.json. The teacher's
outputs are kept in dataset/.nano/, so that a second run only trains the student: a few minutes on one thread.
"""

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from captions import PHOTO_CLASSES, SYNONYMS, photo_caption, scene
from medical_captions import description, simple_caption
from text_teacher import WIDTH, Teacher, teacher_targets
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from medart_core.options import Parser
from medart_core.text import clean, encode_prompts

HERE = Path(__file__).resolve().parent
VOCABULARY = 2560  # with the width of 192 it keeps the whole encoder under 1.5 M parameters
SUBWORDS = 1000
SUBWORD_SHARE = 0.1
LEXICON = 4000  # the most frequent words among the teacher's pieces, for words that the grammar lacks
HELD_OUT_SEED = 1


def corpus(seed: int, count: int) -> list[str]:
    """`count` distinct cleaned texts: a third long descriptions, the rest captions of all kinds."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        kind = rng.random()
        if kind < 0.35:
            text = description(rng)
        elif kind < 0.43:
            text = simple_caption(rng)
        elif kind < 0.47:
            text = photo_caption(PHOTO_CLASSES[int(rng.integers(len(PHOTO_CLASSES)))], rng)
        else:
            text = scene(rng)
        found[clean(text)] = None
    return list(found)


def train_tokenizer(texts: list[str], lexicon: list[str]) -> T5Tokenizer:
    """A SentencePiece-Unigram tokenizer with T5's conventions: pad 0, end 1, unknown 2, no sentinels.

    The Unigram trainer finds its candidates among repeated parts of distinct words, so that on a small corpus it
    splits even the most frequent ones. It is left the pieces of words; the corpus' own words come in whole.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r'[,.;:!?()"]'), "isolated"),  # no piece holds a word and its comma
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=SUBWORDS, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = split
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    words = [word.removeprefix("▁") for word in (*counts, *lexicon)]
    unigram.train_from_iterator(words, trainer)
    # Rounded, sorted, and single characters by their own frequency: the trainer's choice here changes from run to run.
    trained = json.loads(unigram.to_str())["model"]["vocab"][1:]
    subwords = sorted((-round(score, 6), piece) for piece, score in trained if len(piece) > 1)
    share = math.log(SUBWORD_SHARE)  # of the probability, so that a word known whole is not split
    scores = {piece: share - surprise for surprise, piece in subwords}
    alphabet = ["▁", *(chr(code) for code in range(33, 127) if not chr(code).isupper())]
    letters = Counter("".join(f"▁{word}" for word in words))
    scores |= {letter: share + math.log((letters[letter] + 1) / letters.total()) for letter in alphabet}
    total = counts.total()
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if word in scores or len(scores) < VOCABULARY - 3:
            scores[word] = max(math.log(count / total), scores.get(word, -math.inf))
    for word in lexicon:  # in order of frequency, into the room that is left
        if len(scores) < VOCABULARY - 3:
            scores.setdefault(f"▁{word}", share - math.log(len(lexicon)))
    specials = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=[*specials, *scores.items()], extra_ids=0, model_max_length=512)


def build_student(vocabulary: int) -> T5EncoderModel:
    """T5 v1.1 in small: 3 blocks of width 192, gated feed-forward, about 1.5 M parameters with the embedding."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=WIDTH, d_kv=32, num_heads=6, d_ff=320, num_layers=3,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
            pad_token_id=0, eos_token_id=1, dropout_rate=0.1,
        )
    )  # fmt: skip


def initial_embedding(ids: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The mean target of each piece over the corpus, at unit RMS: (vocabulary, WIDTH); random where never seen."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.zeros(vocabulary, WIDTH).index_add_(0, ids, targets)
    unseen = embedding.abs().amax(dim=1) == 0
    embedding[unseen] = torch.randn(int(unseen.sum()), WIDTH, generator=generator)
    return F.normalize(embedding, dim=1) * WIDTH**0.5


def cosines(student: T5EncoderModel, ids: list[torch.Tensor], targets: list[torch.Tensor]) -> tuple:
    """Mean cosine between student and teacher of (tokens, mean-pooled texts); both are scalars with gradient."""
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    output = student(pad_sequence(ids, batch_first=True), attention_mask=mask).last_hidden_state
    target = pad_sequence(targets, batch_first=True)
    known = (target.abs().amax(dim=2, keepdim=True) > 0).float()
    token = (F.cosine_similarity(output, target, dim=2) * known[..., 0]).sum() / known.sum()
    pooled = F.cosine_similarity((output * known).sum(dim=1), target.sum(dim=1), dim=1).mean()
    return token, pooled


def distil(student: T5EncoderModel, ids: list, targets: list, steps: int, batch_size: int, lr: float) -> None:
    """Raise the token-level and pooled cosines to the teacher with AdamW; texts of like length share a batch."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(0)
    batches: list[np.ndarray] = []
    progress = tqdm(range(steps), desc="student", mininterval=10)
    student.eval()  # no dropout: the targets are exact and the corpus is not used up
    for step in progress:
        if not batches:
            pool = sorted(rng.integers(len(ids), size=8 * batch_size), key=lambda index: len(ids[index]))
            batches = [np.array(pool[i : i + batch_size]) for i in range(0, len(pool), batch_size)]
            rng.shuffle(batches)
        chosen = batches.pop()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        token, pooled = cosines(student, [ids[i] for i in chosen], [targets[i] for i in chosen])
        optimizer.zero_grad()
        (2 - token - pooled).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(token=f"{token.item():.3f}", pooled=f"{pooled.item():.3f}", refresh=False)


@torch.no_grad()
def neighbours_of_a_kind(tokenizer: T5Tokenizer, student: T5EncoderModel) -> float:
    """Share of the photograph classes' words whose nearest other word is of the same class: ship and boat."""
    kinds = {word: label for label, words in SYNONYMS.items() for word in (label, *words) if " " not in word}
    embeds, mask = encode_prompts(tokenizer, student, list(kinds))
    inner = (mask.cumsum(dim=1) < mask.sum(dim=1, keepdim=True)).float()[..., None]  # without the end token
    pooled = F.normalize((embeds * inner).sum(dim=1), dim=1)
    nearest = (pooled @ pooled.T).fill_diagonal_(-1).argmax(dim=1).tolist()
    labels = list(kinds.values())
    return sum(labels[row] == labels[other] for row, other in enumerate(nearest)) / len(labels)


def save(student: T5EncoderModel, folder: Path) -> None:
    """Tensors in bf16, but a config that says float32, or stock loading of the pipeline would mix dtypes."""
    student.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    values = json.loads((folder / "config.json").read_text())
    values.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=14000, help="training texts (default 14000)")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps (default 600)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts per step (default 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3, cosine to 0)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    teacher = Teacher()
    train = corpus(0, options.sentences)
    lexicon = teacher.lexicon(LEXICON)
    tokenizer = train_tokenizer(train, lexicon)
    seen = set(train)
    held_out = [text for text in corpus(HELD_OUT_SEED, 800) if text not in seen]
    texts = [*train, *lexicon, *held_out]
    encoded = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
    taught = teacher_targets(tokenizer, texts, teacher)
    targets = list(taught.vectors.split([len(ids) for ids in encoded]))
    learn, judge = slice(0, len(train) + len(lexicon)), slice(len(train) + len(lexicon), None)

    student = build_student(len(tokenizer))
    ids, values = torch.cat(encoded[learn]), torch.cat(targets[learn])
    student.shared.weight.data.copy_(initial_embedding(ids, values, len(tokenizer)))
    print(f"{sum(p.numel() for p in student.parameters()):,} parameters, {len(ids):,} tokens", flush=True)
    start = time.perf_counter()
    distil(student, encoded[learn], targets[learn], options.steps, options.batch_size, options.lr)
    minutes = (time.perf_counter() - start) / 60
    tokenizer.save_pretrained(HERE / "pixart" / "tokenizer")  # only now: the two belong together
    save(student, HERE / "pixart" / "text_encoder")

    student = T5EncoderModel.from_pretrained(HERE / "pixart" / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        token, pooled = cosines(student, encoded[judge], targets[judge])
    long = [clean(description(np.random.default_rng([HELD_OUT_SEED, i]))) for i in range(200)]
    pieces = sum(len(ids) - 1 for ids in tokenizer(long).input_ids)
    record = {
        "parameters": sum(p.numel() for p in student.parameters()),
        "vocabulary": len(tokenizer),
        "tokens_per_word_of_held_out_descriptions": round(pieces / sum(len(text.split()) for text in long), 3),
        "held_out_cosine_of_tokens": round(token.item(), 4),
        "held_out_cosine_of_mean_pooled_texts": round(pooled.item(), 4),
        "nearest_word_is_of_the_same_class": round(neighbours_of_a_kind(tokenizer, student), 3),
        "share_of_teacher_variance_in_targets": round(taught.variance_share, 4),
        "texts": {"train": len(train), "words": len(lexicon), "held_out": len(held_out)},
        "steps": options.steps,
        "batch_size": options.batch_size,
        "minutes": {"teacher": round(taught.minutes, 1), "student": round(minutes, 1)},
        "sources": {"teacher": "flan-t5-small encoder, int8 ONNX, from traceforge-title-model==0.2.0 (MIT)"},
    }
    (HERE / "records").mkdir(exist_ok=True)
    (HERE / "records" / "text.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    with exit_codes():
        main()
