"""The tokenizer of the pair: a token for each word and number of the task, bytes for the rest, and the chat template.

It works on words, because a model this small does not learn spelling. With digits as separate tokens, it did not learn
to copy two-digit numbers reliably. Other text is encoded byte by byte and decoded without loss.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.task import WORD, vocabulary

PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
VERIFICATION_PROMPT = "Is this right so far?"
CORRECT, INCORRECT = "Correct", "Incorrect"
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer step by step.", "You are careful and precise.")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('roles are system, user and assistant, not ' ~ message.role) }}{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    spoken: Iterable[str] = (VERIFICATION_PROMPT, CORRECT, INCORRECT, *SYSTEM_PROMPTS)
    words = vocabulary().union(*(WORD.findall(text) for text in spoken))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = {byte_level.pre_tokenize_str(word)[0][0] for word in words}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    entries = [*SPECIAL, *sorted(alphabet), *sorted(spelled - alphabet)]
    # There are no merges: a word of the vocabulary is one token (ignore_merges), and any other word is its bytes.
    tokenizer = Tokenizer(models.BPE({entry: k for k, entry in enumerate(entries)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD.pattern), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
