"""Converts single tokens to text and to bytes, for log-probabilities."""

from transformers import PreTrainedTokenizerBase

from parse.detokenizer import REPLACEMENT_CHARACTER

ANCHOR = "a"  # tokens are decoded after this text, because some lose a leading space at the start of a text


class TokenText:
    """Decodes single tokens and remembers the results."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        self._anchor_text = self._decode_after_anchor([])
        self._texts: dict[int, str] = {}

    def decode(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decode_after_anchor([token])[len(self._anchor_text) :]
        return self._texts[token]

    def decode_bytes(self, token: int) -> list[int] | None:
        """Returns the bytes of a token, or None if it is only part of a character."""
        text = self.decode(token)
        return None if REPLACEMENT_CHARACTER in text else list(text.encode())

    def _decode_after_anchor(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode([*self._anchor, *token_ids], skip_special_tokens=False))
