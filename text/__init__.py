"""From files to tokens: reading, tokenizers, the token cache, the built-in language."""
