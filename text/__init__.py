"""From files to tokens: reading, tokenizers, the cache of tokenised corpora, the built-in language."""
