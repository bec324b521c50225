"""Text in and out: tokenizer, chat templates, detokeniser. Never imports torch."""
