"""The tokenizer of the demo model: byte-level BPE whose digits and spaces are tokens of their own.

A space of its own makes a word the same tokens wherever it stands, which is what lets a model of a few
million parameters copy a name from its prompt that it has never seen.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.training.dialogues import Generator

SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|features|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 2048
DIALOGUES = 10_000


def train_tokenizer(seed: int) -> Tokenizer:
    """A tokenizer of at most `VOCABULARY` tokens, trained on generated dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s|\d|\p{L}+|[^\s\d\p{L}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=5,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = Generator(seed)

    def texts() -> list[str]:
        dialogue = generator.dialogue()
        values = [f"{name}: {value}" for name, value in dialogue.features.items()]
        said = [message["content"] for message in dialogue.messages]
        return [*values, *said, dialogue.answer, generator.passage(4)]

    tokenizer.train_from_iterator((text for _ in range(DIALOGUES) for text in texts()), trainer)
    return tokenizer
